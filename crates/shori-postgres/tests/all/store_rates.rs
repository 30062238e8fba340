//! Many rows: that they arrive, in how many parts they are read, and at what rate, on a server that syncs.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Decimal128Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use futures::TryStreamExt;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::Position;
use shori_core::projection::{Target, TargetShape, history};
use shori_core::schema::TableSchema;
use shori_core::source::CaptureInfo;
use shori_core::store::{Appended, Committed, OutputKind, OutputRows, Store};

use crate::server::Server;
use crate::store_output::{closes, commit};
use crate::stored::*;

/// Enough to leave any batch or buffer, or as many as `SHORI_RATE_ROWS` says.
fn row_count() -> usize {
    std::env::var("SHORI_RATE_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(200_000)
}

const SETTINGS: [(&str, &str); 3] = [("fsync", "on"), ("shared_buffers", "512MB"), ("max_wal_size", "4GB")];

fn order_fields() -> Vec<Field> {
    vec![
        Field::new("order_id", DataType::Int64, false),
        Field::new("customer_id", DataType::Int64, true),
        Field::new("amount", DataType::Decimal128(18, 2), true),
        Field::new("status", DataType::Utf8, true),
        Field::new("updated_at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
    ]
}

fn orders(ids: std::ops::Range<i64>) -> Vec<ArrayRef> {
    let count = (ids.end - ids.start) as usize;
    let amounts = Decimal128Array::from_iter_values(ids.clone().map(|id| i128::from(id) * 7 % 1_000_000));
    vec![
        Arc::new(Int64Array::from_iter_values(ids.clone())),
        Arc::new(Int64Array::from_iter_values(ids.clone().map(|id| id % 10_000))),
        Arc::new(amounts.with_precision_and_scale(18, 2).unwrap()),
        Arc::new(StringArray::from_iter_values(ids.clone().map(|id| ["open", "paid", "cancelled"][id as usize % 3]))),
        Arc::new(TimestampMicrosecondArray::from(vec![1_700_000_000_000_000; count])),
    ]
}

fn versions(ids: std::ops::Range<i64>, step: u64) -> RecordBatch {
    let mut arrays = orders(ids);
    let count = arrays[0].len();
    let time = || Arc::new(TimestampMicrosecondArray::from(vec![step as i64 * 1000; count])) as ArrayRef;
    arrays.extend([time(), Arc::new(TimestampMicrosecondArray::new_null(count))]);
    arrays.push(Arc::new(BooleanArray::from(vec![true; count])));
    arrays.extend([Arc::new(StringArray::from(vec!["UPDATE"; count])) as ArrayRef, time()]);
    let lsn = step.to_be_bytes();
    arrays.push(Arc::new(BinaryArray::from(vec![&lsn[..]; count])));
    RecordBatch::try_new(history_target().columns, arrays).unwrap()
}

fn history_target() -> Target {
    let mut fields = order_fields();
    fields[0] = Field::new("order_key", DataType::Int64, false);
    fields.extend(history::fields());
    Target {
        projection: "dim_orders_history".into(),
        shape: TargetShape::Versions,
        key: vec!["order_key".into()],
        columns: Arc::new(Schema::new(fields)),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id("orders")],
    }
}

fn latest_target() -> Target {
    Target {
        projection: "orders_latest".into(),
        shape: TargetShape::Rows,
        key: vec!["order_id".into()],
        columns: Arc::new(Schema::new(order_fields())),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id("orders")],
    }
}

fn tell(what: &str, rows: usize, since: Instant) {
    let took = since.elapsed();
    println!("{what}: {rows} rows in {:.3} s, {:.0} rows/s", took.as_secs_f64(), rows as f64 / took.as_secs_f64());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_changes_are_appended_and_read() {
    let server = Server::start(&SETTINGS);
    let Stored { store, .. } = Stored::on(&server).await;
    let schema = Arc::new(TableSchema::new("orders", order_fields(), &["order_id"]).unwrap());
    let info = CaptureInfo { id: id("orders"), schema: schema.clone() };
    store.prepare_captures("t", "here", &[info]).await.unwrap();
    let mut head = ChangeHeadBuilder::default();
    (1..=row_count() as u64).for_each(|n| head.push(&at(n, 0), Op::Insert, n as i64));
    let batch: ChangeBatch = head.finish(id("orders"), schema, orders(0..row_count() as i64)).unwrap();
    let since = Instant::now();
    let zero = [("orders", Position::ZERO)];
    let applied = append(&store, &zero, std::slice::from_ref(&batch), at(row_count() as u64, 0)).await.unwrap();
    tell("append, one transaction", row_count(), since);
    assert_eq!(applied, Appended::Applied { rows: row_count() as u64 });
    let since = Instant::now();
    let read = store.read_log(&id("orders"), &Position::ZERO, &at(u64::MAX, 0)).await.unwrap();
    let read: Vec<ChangeBatch> = read.try_collect().await.unwrap();
    tell("read_log", row_count(), since);
    assert!(read.iter().all(|part| part.len() <= 32_768));
    let read = ChangeBatch::concat(&read).unwrap().unwrap();
    assert_eq!(read.to_record_batch().unwrap().columns(), batch.to_record_batch().unwrap().columns());
    let since = Instant::now();
    for n in 0..500u64 {
        let from = [("orders", at(row_count() as u64 + n, 0))];
        append(&store, &from, &[], at(row_count() as u64 + n + 1, 0)).await.unwrap();
    }
    tell("appends without rows", 500, since);
    let since = Instant::now();
    let compacted = store.compact(&id("orders"), &at(row_count() as u64 + 500, 0), true).await.unwrap();
    tell("compaction that finds nothing to remove", row_count(), since);
    assert_eq!((compacted.rows_before, compacted.rows_after), (row_count() as u64, row_count() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_versions_are_committed_closed_and_replaced() {
    let server = Server::start(&SETTINGS);
    let Stored { store, client, .. } = Stored::on(&server).await;
    let (target, zero) = (history_target(), Position::ZERO);
    store.prepare_target(&target).await.unwrap();
    let all = row_count() as i64;
    let since = Instant::now();
    let parts = vec![OutputRows::Version(versions(0..all, 1))];
    let done = commit(&store, &target, (0, 1), OutputKind::Versions, parts, zero).await.unwrap();
    tell("first versions", row_count(), since);
    assert_eq!(done, Committed::Applied { rows: row_count() as u64 });
    client.batch_execute("analyze").await.unwrap();
    let ended = |ids: std::ops::Range<i64>, step: u64| {
        let closed: Vec<_> = ids.map(|id| (id, step as i64 * 1000)).collect();
        OutputRows::Close(closes(&closed))
    };
    let mut step = 1;
    for (size, outputs) in [(1_000i64, 20i64), (10_000, 4), (100_000, 1)] {
        let since = Instant::now();
        for output in 0..outputs {
            step += 1;
            let ids = output * size..(output + 1) * size;
            let parts = vec![ended(ids.clone(), step), OutputRows::Version(versions(ids, step))];
            let done = commit(&store, &target, (step - 1, step), OutputKind::Versions, parts, zero).await.unwrap();
            assert_eq!(done, Committed::Applied { rows: 2 * size as u64 });
        }
        tell(&format!("updates closed and opened, {size} an output"), (size * outputs) as usize, since);
    }
    let current = "select count(*) from dim_orders_history where is_current";
    assert_eq!(client.query_one(current, &[]).await.unwrap().get::<_, i64>(0), all);
    store.reset_projection(&target.projection).await.unwrap();
    let since = Instant::now();
    let parts = vec![OutputRows::Version(versions(0..all, 1))];
    commit(&store, &target, (0, 1), OutputKind::ReplaceVersions, parts, zero).await.unwrap();
    tell("versions replaced by a rebuild", row_count(), since);
    let total = "select count(*) from dim_orders_history";
    assert_eq!(client.query_one(current, &[]).await.unwrap().get::<_, i64>(0), all);
    assert_eq!(client.query_one(total, &[]).await.unwrap().get::<_, i64>(0), all);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_are_merged_and_replaced() {
    let server = Server::start(&SETTINGS);
    let Stored { store, client, .. } = Stored::on(&server).await;
    let (target, zero) = (latest_target(), Position::ZERO);
    store.prepare_target(&target).await.unwrap();
    let all = row_count() as i64;
    let rows = |ids| OutputRows::Upsert(RecordBatch::try_new(target.columns.clone(), orders(ids)).unwrap());
    let since = Instant::now();
    commit(&store, &target, (0, 1), OutputKind::Replace, vec![rows(0..all)], zero).await.unwrap();
    tell("first rows", row_count(), since);
    client.batch_execute("analyze").await.unwrap();
    let mut step = 1;
    for (size, outputs) in [(1_000i64, 20i64), (10_000, 4)] {
        let since = Instant::now();
        for output in 0..outputs {
            step += 1;
            let ids = output * size..(output + 1) * size;
            commit(&store, &target, (step - 1, step), OutputKind::Merge, vec![rows(ids)], zero).await.unwrap();
        }
        tell(&format!("rows merged, {size} an output"), (size * outputs) as usize, since);
    }
    let since = Instant::now();
    let done = commit(&store, &target, (step, step + 1), OutputKind::Replace, vec![rows(0..all)], zero).await.unwrap();
    tell("rows replaced by the same", row_count(), since);
    assert_eq!(done, Committed::Applied { rows: 0 }, "what is the same is not written");
    let none = commit(&store, &target, (step + 1, step + 2), OutputKind::Replace, vec![], zero).await.unwrap();
    assert_eq!(none, Committed::Applied { rows: row_count() as u64 });
}
