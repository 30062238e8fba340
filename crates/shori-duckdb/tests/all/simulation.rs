//! The seeded simulation over the DuckDB store and transform, on real files: a crash drops every handle, and the files
//! are opened again.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use futures::{FutureExt, TryStreamExt};
use shori_core::position::{CaptureId, Position};
use shori_core::projection::{Projection, Target, TargetShape};
use shori_core::source::Rejected;
use shori_core::store::{OutputKind, OutputRows, RunRecord, RunStatus, Store};
use shori_core::testing::faults::Faults;
use shori_core::testing::memory_store::MemoryStorage;
use shori_core::testing::memory_target::{Status, TargetTable, Told};
use shori_core::testing::memory_transform::MemoryCache;
use shori_core::testing::model_projections::{model_projections, target_of};
use shori_core::testing::simulation::faulty::{FaultyStore, FaultyTransform};
use shori_core::testing::simulation::parts::Parts;
use shori_core::testing::simulation::plan::{CacheFate, Size};
use shori_core::testing::simulation::{Options, run_with};
use shori_core::testing::value::{Value, rows_of};
use shori_core::transform::{StateTable, Transform};
use shori_core::{Error, Result};
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::store::DuckdbStore;
use shori_duckdb::transform::DuckdbTransform;

use crate::transform_random::projections_in_sql;

struct DuckdbParts {
    directory: tempfile::TempDir,
    now: Mutex<Option<Opened>>,
    /// The process before: while anything of it lived, its files could not be opened as after a crash.
    before: Mutex<(Weak<DuckdbStore>, Weak<DuckdbTransform>)>,
}

/// Both files, open.
#[derive(Clone)]
struct Opened {
    store: Arc<DuckdbStore>,
    transform: Arc<DuckdbTransform>,
}

/// The answer of a call that runs on this thread and waits for nothing.
fn at_once<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    call.now_or_never().expect("calls run inline")
}

impl DuckdbParts {
    fn new() -> Self {
        // In memory where that can be: what is tested is order, not the disk.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { directory, now: Mutex::default(), before: Mutex::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self) -> Result<Opened> {
        let settings =
            Settings { memory_limit_mib: 256, threads: 1, spill_directory: self.path("spill"), inline: true };
        let database = Database::open(&settings)?;
        let store = DuckdbStore::open(&database, &self.path("serving.duckdb"), "serving")?;
        let transform = DuckdbTransform::open(&database, &self.path("state.sqlite"))?;
        Ok(Opened { store: Arc::new(store), transform: Arc::new(transform) })
    }

    /// The parts of the process that lives, or opened for this once.
    fn opened(&self) -> Result<Opened> {
        let now = self.now.lock().unwrap().clone();
        now.map_or_else(|| self.open(), Ok)
    }
}

impl Parts for DuckdbParts {
    fn projections(&self) -> Vec<Projection> {
        projections_in_sql()
    }

    fn start(&self, _worker: usize, faults: &Faults) -> Result<(Arc<dyn Store>, Arc<dyn Transform>)> {
        let opened = self.open()?;
        *self.before.lock().unwrap() = (Arc::downgrade(&opened.store), Arc::downgrade(&opened.transform));
        *self.now.lock().unwrap() = Some(opened.clone());
        let store = FaultyStore { inner: opened.store, faults: faults.clone() };
        let transform = FaultyTransform { inner: opened.transform, faults: faults.clone() };
        Ok((Arc::new(store), Arc::new(transform)))
    }

    fn end(&self, _worker: usize, fate: CacheFate) {
        *self.now.lock().unwrap() = None;
        let before = self.before.lock().unwrap();
        assert!(before.0.upgrade().is_none() && before.1.upgrade().is_none(), "something of the process still lives");
        let (cache, older) = (self.path("state.sqlite"), self.path("state.older"));
        let left = std::fs::read(&cache).unwrap();
        match fate {
            CacheFate::Kept => {}
            CacheFate::Lost => std::fs::remove_file(&cache).unwrap(),
            CacheFate::Older if older.exists() => drop(std::fs::copy(&older, &cache).unwrap()),
            CacheFate::Older => {}
        }
        if !self.path("state.sqlite-wal").exists() {
            std::fs::write(&older, left).unwrap();
        }
    }

    fn store(&self) -> Result<Arc<dyn Store>> {
        Ok(self.opened()?.store)
    }

    fn durable(&self) -> Result<MemoryStorage> {
        let store = self.opened()?.store;
        at_once(store.bootstrap())?;
        seen(&store)
    }

    fn changes_kept(&self, _worker: usize) -> Result<u64> {
        // While state is being advanced, the answer waits, and a cache never opened has none: then it is not yet zero.
        Ok(self.opened()?.transform.changes_kept().now_or_never().and_then(Result::ok).unwrap_or(1))
    }
}

/// Everything that an oracle looks at.
fn seen(store: &DuckdbStore) -> Result<MemoryStorage> {
    let states = at_once(store.captures())?;
    let mut captures = Vec::new();
    for (id, state) in &states {
        let log = at_once(async {
            let log = store.read_log(id, &Position::ZERO, &state.watermark.staged).await?;
            log.try_collect::<Vec<_>>().await
        })?;
        captures.push((state.clone(), log));
    }
    let mut targets = Vec::new();
    if states.len() == 4 {
        let statuses = at_once(store.projection_statuses())?;
        for target in described(&states)? {
            let Some(status) = statuses.iter().find(|status| *status.projection == *target.projection) else {
                continue;
            };
            targets.push(seen_target(store, target, &status.status, status.last_error.clone())?);
        }
    }
    MemoryStorage::seen(captures, targets, seen_rejected(store)?, seen_runs(store)?)
}

/// The targets of the model's projections over these captures.
fn described(states: &std::collections::BTreeMap<CaptureId, shori_core::store::CaptureState>) -> Result<Vec<Target>> {
    let memory = MemoryCache::default().open(Faults::none());
    let tables: Vec<StateTable> =
        (states.iter()).map(|(id, state)| StateTable { capture: id.clone(), schema: state.schema.clone() }).collect();
    let schemas = states.iter().map(|(id, state)| (id.clone(), state.schema.clone())).collect();
    let projections = model_projections();
    at_once(memory.open("any", &tables, &projections))?;
    let describe =
        |projection: &Projection| Ok(target_of(projection, at_once(memory.describe(&projection.name))?, &schemas));
    projections.iter().map(describe).collect()
}

fn seen_target(store: &DuckdbStore, target: Target, status: &str, last_error: Option<String>) -> Result<TargetTable> {
    let checkpoint = at_once(store.checkpoint(&target.projection))?;
    let versions = target.shape == TargetShape::Versions;
    // A history has columns of its own; a source's column of such a name stands beside.
    let column = |name: &str| match name {
        "created_at" | "updated_at" if versions => format!("{name}__source"),
        other => other.to_string(),
    };
    let names: Vec<String> =
        target.columns.fields().iter().map(|field| format!("\"{}\"", column(field.name()))).collect();
    let rows = at_once(store.query(&format!("select {} from \"{}\"", names.join(", "), target.projection)))?;
    let kind = if versions { OutputKind::ReplaceVersions } else { OutputKind::Replace };
    let part = |rows| if versions { OutputRows::Version(rows) } else { OutputRows::Upsert(rows) };
    let parts: Vec<OutputRows> = rows.into_iter().map(part).collect();
    let mut table = TargetTable::new(target);
    table.apply(kind, &parts, Told { horizon: Position::ZERO, as_of_time: 0 })?;
    table.checkpoint = checkpoint;
    table.last_error = last_error;
    table.status = match status {
        "OK" => Status::Ok,
        "ERROR" => Status::Error,
        _ => Status::Init,
    };
    Ok(table)
}

fn seen_rejected(store: &DuckdbStore) -> Result<Vec<Rejected>> {
    let rows = at_once(store.query("select lsn, seqval from ctl_rejected_changes"))?;
    let bytes = |value: &Value| match value {
        Value::Binary(bytes) => bytes.clone(),
        other => panic!("{other:?} is no position"),
    };
    let rejected = |row: shori_core::testing::value::Row| {
        let position = Position::from_slices(&bytes(&row[0]), &bytes(&row[1]))?;
        Ok::<_, Error>(Rejected {
            capture: CaptureId::new("shop", "notes"),
            position,
            reason: String::new(),
            raw: Vec::new(),
        })
    };
    rows.iter().flat_map(rows_of).map(rejected).collect()
}

fn seen_runs(store: &DuckdbStore) -> Result<Vec<RunRecord>> {
    let rows = at_once(store.query("select run_id, status, end_time from pipeline_metadata"))?;
    let run = |row: shori_core::testing::value::Row| RunRecord {
        pipeline: String::new(),
        run_id: format!("{:?}", row[0]),
        started: 0,
        ended: (!row[2].is_null()).then_some(1),
        status: if row[1] == "running".into() { RunStatus::Running } else { RunStatus::Completed },
        records_processed: 0,
        records_successful: 0,
        records_failed: 0,
        error: None,
        metrics: String::new(),
    };
    Ok(rows.iter().flat_map(rows_of).map(run).collect())
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Seeds that run side by side.
const THREADS: usize = 2;
/// Steps of a failed run that are printed.
const TRACE_TAIL: usize = 80;

/// `SHORI_SEEDS` and `SHORI_SEED` choose others.
#[test]
fn the_pipeline_over_real_files_agrees_with_the_oracle() {
    let (first, seeds) = (number("SHORI_SEED", 1), number("SHORI_SEEDS", 200));
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        return;
                    }
                    assert_passes(seed);
                }
            });
        }
    });
}

fn assert_passes(seed: u64) {
    let options = Options { size: Size::SMALL, trace: true, ..Options::default() };
    let report = run_with(seed, &options, |_| Box::new(DuckdbParts::new()));
    if let Some(failure) = report.failure {
        let tail = report.trace.len().saturating_sub(TRACE_TAIL);
        panic!("SHORI_SEED={seed} SHORI_SEEDS=1: {failure}\n{}", report.trace[tail..].join("\n"));
    }
}
