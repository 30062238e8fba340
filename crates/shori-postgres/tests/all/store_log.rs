//! The log of the PostgreSQL store: what an append leaves, and what a reader gets.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, Int64Array, StringArray};
use arrow::datatypes::{DataType, Field};
use futures::TryStreamExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::ErrorKind;
use shori_core::change::{ChangeHeadBuilder, Op};
use shori_core::position::{Position, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::{CaptureInfo, Rejected, SnapshotProgress, SnapshotState};
use shori_core::store::{Append, Appended, Store};

use crate::server::Server;
use crate::stored::*;

async fn prepared() -> Stored {
    let stored = Stored::fresh().await;
    stored.store.prepare_captures("t", "here", &[info("orders"), info("idle")]).await.unwrap();
    stored
}

fn mark(staged: Position) -> Watermark {
    Watermark { staged, boundary: staged, boundary_time: 7 }
}

const ZERO: Position = Position::ZERO;

#[tokio::test(flavor = "multi_thread")]
async fn spec4_12_an_append_made_twice_or_overlapping_leaves_each_change_once() {
    let Stored { store, .. } = prepared().await;
    let first =
        [image(1, 0, Op::Insert, 1, "a"), image(1, 1, Op::Insert, 2, "b"), image(2, 0, Op::UpdateAfter, 1, "c")];
    let both = [("orders", ZERO), ("idle", ZERO)];
    let changes = [batch("orders", &first)];
    assert_eq!(append(&store, &both, &changes, at(2, 0)).await.unwrap(), Appended::Applied { rows: 3 });
    assert_eq!(append(&store, &both, &changes, at(2, 0)).await.unwrap(), Appended::AlreadyApplied);
    // A batch that begins before the watermark, by a writer who knows it.
    let second = [first[2].clone(), image(3, 0, Op::Delete, 2, "b")];
    let both = [("orders", at(2, 0)), ("idle", at(2, 0))];
    let changes = [batch("orders", &second)];
    assert_eq!(append(&store, &both, &changes, at(3, 5)).await.unwrap(), Appended::Applied { rows: 1 });
    // A writer who believes an old watermark.
    let both = [("orders", at(2, 0)), ("idle", at(2, 0))];
    let third = [batch("orders", &[image(4, 0, Op::Insert, 9, "x")])];
    assert_eq!(append(&store, &both, &third, at(4, 0)).await.unwrap(), Appended::Conflict);
    let mut all = first.to_vec();
    all.push(second[1].clone());
    assert_eq!(whole_log(&store, "orders").await, all);
    assert_eq!(log(&store, "orders", at(1, 0), at(2, 0)).await, all[1..3]);
    assert_eq!(log(&store, "orders", at(3, 0), at(9, 0)).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_02_the_watermark_of_an_idle_capture_moves() {
    let Stored { store, .. } = prepared().await;
    let both = [("orders", ZERO), ("idle", ZERO)];
    append(&store, &both, &[batch("orders", &[image(5, 0, Op::Insert, 1, "a")])], at(5, 0)).await.unwrap();
    let moved = [("orders", at(5, 0)), ("idle", at(5, 0))];
    assert_eq!(append(&store, &moved, &[], at(8, 0)).await.unwrap(), Appended::Applied { rows: 0 });
    // One capture alone: the other keeps its own.
    assert!(matches!(append(&store, &[("idle", at(8, 0))], &[], at(9, 0)).await.unwrap(), Appended::Applied { .. }));
    let states = store.captures().await.unwrap();
    assert_eq!(states[&id("orders")].watermark, mark(at(8, 0)));
    assert_eq!(states[&id("idle")].watermark, mark(at(9, 0)));
    assert_eq!(&*states[&id("idle")].timeline, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_06_delete_and_insert_of_one_key_keep_both() {
    let Stored { store, .. } = prepared().await;
    let images = [image(1, 0, Op::Delete, 1, "a"), image(1, 1, Op::Insert, 1, "b")];
    append(&store, &[("orders", ZERO)], &[batch("orders", &images)], at(1, 1)).await.unwrap();
    assert_eq!(whole_log(&store, "orders").await, images);
}

#[tokio::test(flavor = "multi_thread")]
async fn contract6_of_two_writers_one_is_fenced() {
    let Stored { store: one, database, .. } = Stored::fresh().await;
    let other = open(Server::shared(), &database);
    assert_eq!(one.bootstrap().await.unwrap(), other.bootstrap().await.unwrap());
    one.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
    let mut watermark = ZERO;
    for round in 1..30u64 {
        let expected = [("orders", watermark)];
        let mine = [batch("orders", &[image(round, 0, Op::Insert, 1, "mine")])];
        let theirs =
            [batch("orders", &[image(round, 0, Op::Insert, 1, "theirs"), image(round, 1, Op::Insert, 2, "x")])];
        let (to_mine, to_theirs) = (at(round, 0), at(round, 1));
        let (first, second) =
            tokio::join!(append(&one, &expected, &mine, to_mine), append(&other, &expected, &theirs, to_theirs));
        let outcomes = (first.unwrap(), second.unwrap());
        watermark = match outcomes {
            (Appended::Applied { rows: 1 }, Appended::Conflict) => to_mine,
            (Appended::Conflict | Appended::AlreadyApplied, Appended::Applied { rows: 2 }) => to_theirs,
            other => panic!("{other:?}"),
        };
    }
    assert!(whole_log(&one, "orders").await.is_sorted_by_key(|image| image.position));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_added_column_is_null_before_and_an_incompatible_one_is_refused() {
    let Stored { store, .. } = prepared().await;
    append(&store, &[("orders", ZERO)], &[batch("orders", &[image(1, 0, Op::Insert, 1, "a")])], at(1, 0))
        .await
        .unwrap();
    let fields = |names: &[(&str, DataType)]| {
        let fields = names.iter().map(|(name, data_type)| Field::new(*name, data_type.clone(), true)).collect();
        Arc::new(TableSchema::new("orders", fields, &["id"]).unwrap())
    };
    let wide = fields(&[("id", DataType::Int64), ("op", DataType::Utf8), ("text", DataType::Utf8)]);
    let mut head = ChangeHeadBuilder::default();
    head.push(&at(2, 0), Op::Insert, 20);
    let columns: Vec<arrow::array::ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![2])),
        Arc::new(StringArray::from(vec!["new"])),
        Arc::new(StringArray::from(vec!["b"])),
    ];
    let mut change = head.finish(id("orders"), wide.clone(), columns).unwrap();
    change.unchanged = Some(arrow::array::BinaryArray::from(vec![&[0b100u8][..]]));
    let schemas = [CaptureInfo { id: id("orders"), schema: wide.clone() }];
    let expected = BTreeMap::from([(id("orders"), at(1, 0))]);
    let changes = [change];
    let request = Append {
        timeline: "t",
        expected: &expected,
        changes: &changes,
        watermark: mark(at(2, 0)),
        snapshots: &[],
        schemas: &schemas,
        rejected: &[],
    };
    assert_eq!(store.append(&request).await.unwrap(), Appended::Applied { rows: 1 });
    let stream = store.read_log(&id("orders"), &ZERO, &at(9, 0)).await.unwrap();
    let batches: Vec<_> = stream.try_collect().await.unwrap();
    assert_eq!(batches[0].schema, wide);
    assert_eq!(batches[0].columns[1].as_ref(), &StringArray::from(vec![None, Some("new")]) as &dyn Array);
    // The mark follows its column, which the table holds at another place.
    assert_eq!(batches[0].unchanged.as_ref().unwrap().value(1), [0b100]);

    let dropped =
        CaptureInfo { id: id("orders"), schema: fields(&[("id", DataType::Int64), ("text", DataType::Utf8)]) };
    store.prepare_captures("t", "here", &[dropped]).await.unwrap();
    let back = [("id", DataType::Int64), ("text", DataType::Utf8), ("op", DataType::Int64)];
    let back = CaptureInfo { id: id("orders"), schema: fields(&back) };
    store.prepare_captures("t", "here", std::slice::from_ref(&back)).await.unwrap();
    let stream = store.read_log(&id("orders"), &ZERO, &at(9, 0)).await.unwrap();
    let batches: Vec<_> = stream.try_collect().await.unwrap();
    assert_eq!(batches[0].columns[2].null_count(), 2, "a column that came back is another one");

    let retyped =
        CaptureInfo { id: id("orders"), schema: fields(&[("id", DataType::Int64), ("text", DataType::Int64)]) };
    let refused = store.prepare_captures("t", "here", std::slice::from_ref(&retyped)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Schema);
    let progress = store.request_snapshot(&id("orders"), true).await.unwrap();
    assert_eq!((progress.generation, progress.state), (2, SnapshotState::Requested));
    store.prepare_captures("t", "here", &[retyped]).await.unwrap();
    assert_eq!(
        store.read_log(&id("orders"), &ZERO, &at(9, 0)).await.unwrap().try_collect::<Vec<_>>().await.unwrap().len(),
        0
    );
    let replaced = store.prepare_captures("t", "elsewhere", &[info("idle")]).await.unwrap_err();
    assert_eq!(replaced.kind(), ErrorKind::SourceReplaced);
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_13_rejected_changes_and_snapshot_progress_stand_beside_the_rows() {
    let Stored { store, client, .. } = prepared().await;
    let expected = BTreeMap::from([(id("orders"), ZERO)]);
    let running = SnapshotProgress {
        state: SnapshotState::Running,
        start: at(1, 0),
        rows: 4,
        resume: vec![0, 1, 255],
        ..SnapshotProgress::requested(1)
    };
    let snapshots = [(id("orders"), running.clone())];
    let rejected =
        [Rejected { capture: id("orders"), position: at(2, 0), reason: "no JSON".into(), raw: vec![0, 0xff] }];
    let request = Append {
        timeline: "t",
        expected: &expected,
        changes: &[],
        watermark: Watermark { staged: at(2, 0), boundary: at(1, 0), boundary_time: 3 },
        snapshots: &snapshots,
        schemas: &[],
        rejected: &rejected,
    };
    store.append(&request).await.unwrap();
    assert_eq!(store.append(&request).await.unwrap(), Appended::AlreadyApplied);
    let row = client.query_one("select reason, raw from ctl_rejected_changes", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &[u8]>(1)), ("no JSON", &[0, 0xff][..]));
    store.mark_failed(&id("orders"), "gap").await.unwrap();
    let state = store.captures().await.unwrap()[&id("orders")].clone();
    assert_eq!((state.snapshot, state.failed.as_deref()), (running, Some("gap")));
    assert_eq!(state.watermark, request.watermark);
    assert_eq!(store.request_snapshot(&id("orders"), false).await.unwrap().generation, 2);
    assert_eq!(store.captures().await.unwrap()[&id("orders")].failed, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_log_is_read_in_order_in_parts_while_appends_go_on() {
    let Stored { store, .. } = prepared().await;
    let images =
        |from: u64, to: u64| -> Vec<Image> { (from..to).map(|n| image(n, 0, Op::Insert, n as i64, "text")).collect() };
    append(&store, &[("orders", ZERO)], &[batch("orders", &images(1, 150_000))], at(149_999, 0)).await.unwrap();
    let mut stream = store.read_log(&id("orders"), &ZERO, &at(u64::MAX, 0)).await.unwrap();
    let first = stream.try_next().await.unwrap().unwrap();
    append(&store, &[("orders", at(149_999, 0))], &[batch("orders", &images(150_000, 150_010))], at(150_009, 0))
        .await
        .unwrap();
    let rest: Vec<_> = stream.try_collect().await.unwrap();
    let rows = first.len() + rest.iter().map(|batch| batch.len()).sum::<usize>();
    assert_eq!(rows, 149_999, "a reader sees what stood when it began");
    assert!(rest.iter().all(|batch| batch.len() <= 40_000));
    let all = whole_log(&store, "orders").await;
    assert_eq!(all.len(), 150_009);
    assert!(all.is_sorted_by_key(|image| image.position));
    let kept = store.retention_horizon(&id("orders"), None, Some(9)).await.unwrap();
    assert_eq!(kept, at(150_000, 0));
    assert_eq!(store.retention_horizon(&id("orders"), Some(0), Some(1_000_000)).await.unwrap(), ZERO);
    assert_eq!(store.retention_horizon(&id("orders"), Some(i64::MAX / 2), None).await.unwrap(), at(150_009, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_09_the_newest_row_of_a_time_is_found_in_any_log() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..4 {
        let Stored { store, client, .. } = prepared().await;
        let horizon = async |time| store.retention_horizon(&id("orders"), Some(time), None).await.unwrap();
        assert_eq!(horizon(5).await, ZERO);
        let mut lsn = 0;
        let mut images = Vec::new();
        for _ in 0..random.random_range(1..40) {
            let bits = random.random_range(1..40);
            lsn += random.random_range(1..1u64 << bits);
            for seq in 0..random.random_range(1..4) {
                images.push(image(lsn, seq, Op::Insert, 1, "a"));
            }
        }
        append(&store, &[("orders", ZERO)], &[batch("orders", &images)], at(lsn, 9)).await.unwrap();
        // Staged one to three at a time, also in the middle of a commit.
        let stage = "
            with numbered as (select ctid as row, row_number() over (order by lsn, seqval) as number from stg_cdc_orders)
            update stg_cdc_orders as s set ingested_at = timestamp 'epoch' + n.number / $1 * interval '1 microsecond'
            from numbered n where s.ctid = n.row";
        let step = random.random_range(1..4i64);
        client.execute(stage, &[&step]).await.unwrap();
        for time in -1..=images.len() as i64 / step + 2 {
            let is_before = |number: &usize| (*number as i64 + 1) / step < time;
            let last = (0..images.len()).take_while(is_before).last();
            assert_eq!(horizon(time).await, last.map_or(ZERO, |last| images[last].position), "{time} of {step}");
        }
    }
}
