//! Compaction of the PostgreSQL store: whatever it removes, state read from the log stays the same.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::change::Op;
use shori_core::position::{Position, SortKey, Watermark};
use shori_core::source::{SnapshotProgress, SnapshotState};
use shori_core::store::{Append, Store};
use shori_postgres::PostgresStore;

use crate::stored::*;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    text: Option<String>,
    lsn: SortKey,
    boundary: i64,
    touched: Position,
}

#[derive(Clone, Debug, Default)]
struct State {
    rows: BTreeMap<i64, Row>,
    /// Newest commit and boundary per key, deleted ones too.
    chain: BTreeMap<i64, (SortKey, i64)>,
    /// Keys whose chain a truncation or a sweep has cut.
    cut: BTreeSet<i64>,
}

impl State {
    fn boundary(&mut self, image: &Image) -> i64 {
        let boundary = match self.chain.get(&image.id) {
            Some((lsn, boundary)) if *lsn == image.position.lsn => *boundary,
            Some((_, boundary)) => image.time.max(boundary + 1),
            None => image.time,
        };
        self.chain.insert(image.id, (image.position.lsn, boundary));
        boundary
    }

    fn apply(&mut self, image: &Image) {
        if image.op == Op::Truncate {
            self.cut.extend(self.chain.keys());
            self.chain.clear();
            self.rows.clear();
        } else if !image.op.leaves_row() {
            self.boundary(image);
            self.rows.remove(&image.id);
        } else {
            let standing = self.rows.get_mut(&image.id);
            let text = match &standing {
                Some(row) if image.is_marked => row.text.clone(),
                _ => image.text.clone(),
            };
            match standing {
                Some(row) if image.op == Op::Snapshot && row.text == text => row.touched = image.position,
                _ => {
                    let boundary = self.boundary(image);
                    let row = Row { text, lsn: image.position.lsn, boundary, touched: image.position };
                    self.rows.insert(image.id, row);
                }
            }
        }
    }

    fn sweep(&mut self, snapshot: &SnapshotProgress) {
        let gone: BTreeSet<i64> =
            self.rows.iter().filter(|(_, row)| row.touched <= snapshot.start).map(|(id, _)| *id).collect();
        self.rows.retain(|id, _| !gone.contains(id));
        self.chain.retain(|id, _| !gone.contains(id));
        self.cut.extend(gone);
    }
}

fn replay(images: &[Image], sweeps: &[SnapshotProgress], up_to: Position) -> State {
    let mut state = State::default();
    let mut sweeps = sweeps.iter().filter(|sweep| sweep.end <= up_to).peekable();
    for image in images.iter().filter(|image| image.position <= up_to) {
        while let Some(sweep) = sweeps.next_if(|sweep| sweep.end < image.position) {
            state.sweep(sweep);
        }
        state.apply(image);
    }
    sweeps.for_each(|sweep| state.sweep(sweep));
    state
}

struct Run {
    random: ChaCha8Rng,
    images: Vec<Image>,
    lsn: u64,
    snapshots: Vec<SnapshotProgress>,
    /// Keys that had no row at some horizon: their chain of boundaries may begin anew after it.
    broken: BTreeSet<i64>,
}

impl Run {
    /// A commit of one to four images, or a chunk of a snapshot, or the end of one.
    fn commit(&mut self) -> Vec<Image> {
        self.lsn += 1;
        let mut state = replay(&self.images, &done(&self.snapshots), Position::new(SortKey::MAX, SortKey::MAX));
        let mut commit = Vec::new();
        let time = 1_000 + self.lsn as i64 * 3 - if self.random.random_bool(0.2) { 40 } else { 0 };
        let running = self.snapshots.last().is_some_and(|last| last.state == SnapshotState::Running);
        for seq in 0..self.random.random_range(1..5) {
            let id = self.random.random_range(0..12);
            let standing = state.rows.get(&id).cloned();
            let text = Some(format!("v{}", self.random.random_range(0..1000)));
            let mut image = Image { position: at(self.lsn, seq), op: Op::Insert, time, id, text, is_marked: false };
            match standing {
                _ if self.random.random_bool(0.005) => {
                    (image.op, image.text, image.id) = (Op::Truncate, None, 0);
                }
                Some(row) if running && self.random.random_bool(0.5) => {
                    image.op = Op::Snapshot;
                    if self.random.random_bool(0.8) {
                        image.text = row.text;
                    }
                }
                Some(_) => match self.random.random_range(0..4) {
                    0 => (image.op, image.text) = (Op::Delete, None),
                    1 => (image.op, image.text, image.is_marked) = (Op::UpdateAfter, None, true),
                    _ => image.op = Op::UpdateAfter,
                },
                None => {}
            }
            state.apply(&image);
            commit.push(image);
        }
        commit
    }

    /// Begins or ends a snapshot, sometimes.
    fn snapshot(&mut self) -> bool {
        let end = at(self.lsn, 1_000);
        match self.snapshots.last_mut() {
            Some(last) if last.state == SnapshotState::Running => {
                if self.random.random_bool(0.1) {
                    (last.state, last.end, last.end_time) = (SnapshotState::Done, end, 1);
                    return true;
                }
            }
            last => {
                if self.random.random_bool(0.05) {
                    let generation = last.map_or(1, |last| last.generation + 1);
                    let mut next = SnapshotProgress::requested(generation);
                    (next.state, next.start) = (SnapshotState::Running, end);
                    self.snapshots.push(next);
                    return true;
                }
            }
        }
        false
    }
}

fn done(snapshots: &[SnapshotProgress]) -> Vec<SnapshotProgress> {
    snapshots.iter().filter(|progress| progress.is_done()).cloned().collect()
}

async fn run(seed: u64, keep_deletes: bool) {
    let stored = Stored::fresh().await;
    let store = &stored.store;
    store.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
    let mut run = Run {
        random: ChaCha8Rng::seed_from_u64(seed),
        images: Vec::new(),
        lsn: 0,
        snapshots: Vec::new(),
        broken: BTreeSet::new(),
    };
    let mut staged = Position::ZERO;
    let mut horizon = Position::ZERO;
    for _ in 0..6 {
        let mut images = Vec::new();
        for _ in 0..run.random.random_range(1..40) {
            let commit = run.commit();
            images.extend(commit.clone());
            run.images.extend(commit);
            run.snapshot();
        }
        let to = at(run.lsn, 1_000);
        let expected = BTreeMap::from([(id("orders"), staged)]);
        let snapshots: Vec<_> = run.snapshots.iter().map(|progress| (id("orders"), progress.clone())).collect();
        let changes = [batch("orders", &images)];
        let append = Append {
            timeline: "t",
            expected: &expected,
            changes: &changes,
            watermark: Watermark { staged: to, boundary: to, boundary_time: 7 },
            snapshots: &snapshots,
            schemas: &[],
            rejected: &[],
        };
        store.append(&append).await.unwrap();
        staged = to;
        horizon = horizon.max(at(run.random.random_range(1..=run.lsn), 1_000));
        store.compact(&id("orders"), &horizon, keep_deletes).await.unwrap();
        let live = replay(&run.images, &done(&run.snapshots), horizon).rows;
        run.broken.extend((0..12).filter(|id| !live.contains_key(id)));
        check(store, &run, horizon, staged, keep_deletes, seed).await;
    }
}

async fn check(store: &PostgresStore, run: &Run, horizon: Position, end: Position, keep_deletes: bool, seed: u64) {
    let state = store.captures().await.unwrap()[&id("orders")].clone();
    assert_eq!(state.horizon, horizon, "seed {seed}");
    let mut sweeps = state.earlier_snapshots.clone();
    sweeps.push(state.snapshot);
    let sweeps = done(&sweeps);
    let kept = whole_log(store, "orders").await;
    assert!(kept.is_sorted_by_key(|image| image.position), "seed {seed}");
    let model = done(&run.snapshots);
    for up_to in [horizon, end] {
        let expected = replay(&run.images, &model, up_to);
        let found = replay(&kept, &sweeps, up_to);
        let rows = |state: &State| -> Vec<_> {
            let kept = |id: &i64, row: &Row| {
                let is_whole = !run.broken.contains(id) && !expected.cut.contains(id);
                is_whole.then_some(row.boundary)
            };
            state.rows.iter().map(|(id, row)| (*id, row.text.clone(), row.lsn, kept(id, row))).collect()
        };
        assert_eq!(rows(&found), rows(&expected), "seed {seed} up to {up_to}, horizon {horizon}");
    }
    let below: Vec<_> = kept.iter().filter(|image| image.position <= horizon).collect();
    let deletes = below.iter().filter(|image| !image.op.leaves_row()).count();
    assert!(keep_deletes || deletes == 0, "seed {seed}");
    let keys: BTreeSet<i64> = below.iter().map(|image| image.id).collect();
    let beside = below.iter().filter(|image| image.op == Op::Snapshot).count();
    assert!(below.len() <= keys.len() + beside + 1, "seed {seed}: {below:?}");
    assert!(below.iter().all(|image| !image.is_marked), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_09_compaction_keeps_the_state_of_random_logs() {
    for seed in seeds() {
        run(seed, seed % 3 == 0).await;
    }
}

/// A few, or as many as `SHORI_SEEDS` says.
fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("SHORI_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(8)
}
