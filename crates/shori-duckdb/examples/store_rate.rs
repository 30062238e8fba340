//! Rates of the DuckDB store alone: `cargo run --release -p shori-duckdb --example store_rate`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, Decimal128Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use futures::StreamExt;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, Positions, SortKey, Watermark};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::schema::TableSchema;
use shori_core::source::CaptureInfo;
use shori_core::store::{Append, Appended, Committed, OutputCommit, OutputKind, OutputReader, OutputRows, Store};
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::store::DuckdbStore;

type Failure = Box<dyn std::error::Error>;

fn at(lsn: u64) -> Position {
    Position::new(SortKey::from_u64(lsn), SortKey::EMPTY)
}

fn schema() -> Result<Arc<TableSchema>, Failure> {
    let time = DataType::Timestamp(TimeUnit::Microsecond, None);
    let fields = vec![
        Field::new("order_id", DataType::Int64, false),
        Field::new("customer_id", DataType::Int64, false),
        Field::new("amount", DataType::Decimal128(18, 2), false),
        Field::new("status", DataType::Utf8, false),
        Field::new("created_at", time.clone(), false),
        Field::new("updated_at", time, false),
    ];
    Ok(Arc::new(TableSchema::new("orders", fields, &["order_id"])?))
}

fn columns(range: std::ops::Range<u64>, keys: u64) -> Result<Vec<ArrayRef>, Failure> {
    let numbers = || range.clone().map(|number| number as i64);
    let amounts = Decimal128Array::from_iter_values(numbers().map(|number| i128::from(number % 100_000)));
    Ok(vec![
        Arc::new(Int64Array::from_iter_values(range.clone().map(|number| (number * 7919 % keys) as i64))),
        Arc::new(Int64Array::from_iter_values(numbers().map(|number| number % 10_000))),
        Arc::new(amounts.with_precision_and_scale(18, 2)?),
        Arc::new(StringArray::from_iter_values(
            numbers().map(|number| ["open", "paid", "cancelled"][number as usize % 3]),
        )),
        Arc::new(TimestampMicrosecondArray::from_iter_values(numbers())),
        Arc::new(TimestampMicrosecondArray::from_iter_values(numbers())),
    ])
}

fn changes(schema: &Arc<TableSchema>, range: std::ops::Range<u64>) -> Result<ChangeBatch, Failure> {
    let mut head = ChangeHeadBuilder::default();
    for number in range.clone() {
        head.push(&at(number), Op::UpdateAfter, number as i64);
    }
    Ok(head.finish(CaptureId::new("source1", "orders"), schema.clone(), columns(range, 400_000)?)?)
}

struct Parts(OutputKind, std::vec::IntoIter<OutputRows>);

#[async_trait::async_trait]
impl OutputReader for Parts {
    fn kind(&self) -> OutputKind {
        self.0
    }
    fn rows_hint(&self) -> Option<u64> {
        None
    }
    async fn next(&mut self) -> shori_core::Result<Option<OutputRows>> {
        Ok(self.1.next())
    }
}

async fn append(store: &DuckdbStore, batch: ChangeBatch, from: u64, to: u64) -> Result<Appended, Failure> {
    let expected =
        BTreeMap::from([(CaptureId::new("source1", "orders"), if from == 0 { Position::ZERO } else { at(from) })]);
    let watermark = Watermark { staged: at(to), boundary: at(to), boundary_time: to as i64 };
    let changes = [batch];
    let append = Append {
        timeline: "t",
        expected: &expected,
        changes: &changes,
        watermark,
        snapshots: &[],
        schemas: &[],
        rejected: &[],
    };
    Ok(store.append(&append).await?)
}

async fn commit(
    store: &DuckdbStore,
    target: &Target,
    step: u64,
    kind: OutputKind,
    parts: Vec<OutputRows>,
) -> Result<u64, Failure> {
    commit_as(store, target, step, kind, parts, true).await
}

async fn commit_as(
    store: &DuckdbStore,
    target: &Target,
    step: u64,
    kind: OutputKind,
    parts: Vec<OutputRows>,
    complete: bool,
) -> Result<u64, Failure> {
    let id = CaptureId::new("source1", "orders");
    let expected = (step > 1).then(|| Positions::from([(id.clone(), at(step - 1))]));
    let checkpoint = Positions::from([(id, at(step))]);
    let commit = OutputCommit {
        target,
        expected: expected.as_ref(),
        checkpoint: &checkpoint,
        as_of_lsn: None,
        as_of_time: 0,
        horizon: Position::ZERO,
        complete,
        run_id: "rate",
        output: &mut Parts(kind, parts.into_iter()),
    };
    match store.commit_output(commit).await? {
        Committed::Applied { rows } => Ok(rows),
        other => Err(format!("{other:?}").into()),
    }
}

fn report(what: &str, rows: u64, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    println!("{what}: {rows} rows in {seconds:.3} s = {:.0} rows/s", rows as f64 / seconds);
}

fn upserts(range: std::ops::Range<u64>, schema: &TableSchema) -> Result<RecordBatch, Failure> {
    Ok(RecordBatch::try_new(schema.columns.clone(), columns(range.clone(), u64::MAX)?)?)
}

fn versions(range: std::ops::Range<u64>, target: &Target) -> Result<RecordBatch, Failure> {
    let count = (range.end - range.start) as usize;
    let mut arrays = columns(range.clone(), 1_000_003)?;
    let times = TimestampMicrosecondArray::from_iter_values(range.clone().map(|number| number as i64));
    arrays.push(Arc::new(times.clone()));
    arrays.push(Arc::new(TimestampMicrosecondArray::new_null(count)));
    arrays.push(Arc::new(BooleanArray::from(vec![true; count])));
    arrays.push(Arc::new(StringArray::from_iter_values(range.clone().map(|_| "INSERT"))));
    arrays.push(Arc::new(times));
    arrays.push(Arc::new(BinaryArray::from_iter_values(range.map(|number| number.to_be_bytes()))));
    Ok(RecordBatch::try_new(target.columns.clone(), arrays)?)
}

fn closes(keys: impl Iterator<Item = i64> + Clone) -> Result<RecordBatch, Failure> {
    let schema = Schema::new(vec![
        Field::new("order_id", DataType::Int64, false),
        Field::new("valid_to", DataType::Timestamp(TimeUnit::Microsecond, None), false),
    ]);
    let times = TimestampMicrosecondArray::from_iter_values(keys.clone());
    Ok(RecordBatch::try_new(Arc::new(schema), vec![Arc::new(Int64Array::from_iter_values(keys)), Arc::new(times)])?)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let directory = tempfile::tempdir_in(".")?;
    let settings =
        Settings { memory_limit_mib: 1024, threads: 2, spill_directory: directory.path().join("spill"), inline: false };
    let database = Database::open(&settings)?;
    let store = DuckdbStore::open(&database, &directory.path().join("serving.duckdb"), "serving")?;
    store.bootstrap().await?;
    let schema = schema()?;
    let id = CaptureId::new("source1", "orders");
    store.prepare_captures("t", "one", &[CaptureInfo { id: id.clone(), schema: schema.clone() }]).await?;

    let batches: Vec<_> =
        (0..20u64).map(|n| changes(&schema, n * 50_000 + 1..(n + 1) * 50_000 + 1)).collect::<Result<_, _>>()?;
    let began = Instant::now();
    for (n, batch) in (0u64..).zip(batches) {
        append(&store, batch, n * 50_000, (n + 1) * 50_000).await?;
    }
    report("append in batches of 50000", 1_000_000, began);

    let small: Vec<_> =
        (0..500u64).map(|n| changes(&schema, 1_000_001 + n * 5..1_000_006 + n * 5)).collect::<Result<_, _>>()?;
    let began = Instant::now();
    for (n, batch) in (0u64..).zip(small) {
        append(&store, batch, 1_000_000 + n * 5, 1_000_005 + n * 5).await?;
    }
    println!("append of 5 rows: {:.2} ms", began.elapsed().as_secs_f64() * 2.0);

    let began = Instant::now();
    let mut rows = 0;
    let mut stream = store.read_log(&id, &Position::ZERO, &at(u64::MAX)).await?;
    while let Some(batch) = stream.next().await {
        rows += batch?.len() as u64;
    }
    report("read_log", rows, began);
    let began = Instant::now();
    let mut stream = store.read_log(&id, &at(1_002_400), &at(u64::MAX)).await?;
    let mut rows = 0;
    while let Some(batch) = stream.next().await {
        rows += batch?.len() as u64;
    }
    report("read_log of the tail", rows, began);
    let began = Instant::now();
    let compacted = store.compact(&id, &at(1_000_000), false).await?;
    report(&format!("compact {compacted:?}"), 1_000_000, began);

    let rows_target = Target {
        projection: "proj_orders".into(),
        shape: TargetShape::Rows,
        key: vec!["order_id".into()],
        columns: schema.columns.clone(),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id.clone()],
    };
    store.prepare_target(&rows_target).await?;
    let part = |range: std::ops::Range<u64>| -> Result<Vec<OutputRows>, Failure> {
        range
            .clone()
            .step_by(65_536)
            .map(|from| Ok(OutputRows::Upsert(upserts(from..range.end.min(from + 65_536), &schema)?)))
            .collect()
    };
    let parts = part(0..1_000_000)?;
    let began = Instant::now();
    let rows = commit(&store, &rows_target, 1, OutputKind::Replace, parts).await?;
    report("first output", rows, began);
    let parts = part(900_000..1_100_000)?;
    let began = Instant::now();
    let rows = commit(&store, &rows_target, 2, OutputKind::Merge, parts).await?;
    report("merge of 200000 into 1 M", rows, began);
    let parts = part(0..1_100_000)?;
    let began = Instant::now();
    let rows = commit(&store, &rows_target, 3, OutputKind::Replace, parts).await?;
    report("replace of 1.1 M that are the same", rows, began);
    let began = Instant::now();
    for step in 4..104 {
        commit(&store, &rows_target, step, OutputKind::Merge, part(step * 100..step * 100 + 10)?).await?;
    }
    println!("merge of 10 rows into 1.1 M: {:.2} ms", began.elapsed().as_secs_f64() * 10.0);

    let mut fields: Vec<Field> = schema.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields.extend(history::fields());
    let dim = Target {
        projection: "dim_orders_history".into(),
        shape: TargetShape::Versions,
        key: vec!["order_id".into()],
        columns: Arc::new(Schema::new(fields)),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id],
    };
    store.prepare_target(&dim).await?;
    let version_parts = |range: std::ops::Range<u64>| -> Result<Vec<OutputRows>, Failure> {
        range
            .clone()
            .step_by(65_536)
            .map(|from| Ok(OutputRows::Version(versions(from..range.end.min(from + 65_536), &dim)?)))
            .collect()
    };
    let parts = version_parts(0..1_000_000)?;
    let began = Instant::now();
    let rows = commit(&store, &dim, 1, OutputKind::Versions, parts).await?;
    report("first versions", rows, began);
    let mut parts = vec![OutputRows::Close(closes((0..200_000).map(|n| n * 5))?)];
    parts.extend(version_parts(1_000_000..2_000_000)?);
    let began = Instant::now();
    let rows = commit_as(&store, &dim, 2, OutputKind::Versions, parts, false).await?;
    report("1 M versions and 200000 closes over 1 M", rows, began);
    for step in 3..11 {
        let mut parts = version_parts((step - 1) * 1_000_000..step * 1_000_000)?;
        parts.insert(0, OutputRows::Close(closes(0..1_000_003)?));
        commit_as(&store, &dim, step, OutputKind::Versions, parts, false).await?;
    }
    let mut step = 11;
    for (keys, stride) in [(3_000u64, 333u64), (700, 1_427), (10, 99_991)] {
        let mut times = Vec::new();
        for round in 0..100 {
            let part = closes((0..keys).map(|n| ((n * stride + round) * 7919 % 1_000_003) as i64))?;
            let from = 20_000_000 + step * 3_000;
            let mut parts = vec![OutputRows::Close(part)];
            parts.extend(version_parts(from..from + keys)?);
            let commit_began = Instant::now();
            commit(&store, &dim, step, OutputKind::Versions, parts).await?;
            times.push(commit_began.elapsed());
            step += 1;
            tokio::time::sleep(PAUSE).await;
        }
        report_times(&format!("{keys} closes and versions over 10 M"), times);
    }
    large_rows(&store, &schema).await
}

/// Between two commits, as between two steps of a pipeline.
const PAUSE: Duration = Duration::from_millis(50);

fn report_times(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1000.0;
    println!("{what}: median {:.1} ms, p99 {:.1} ms, at most {:.1} ms", at(50), at(99), at(100));
}

/// Merges of rows that lie anywhere in a target of 10 M.
async fn large_rows(store: &DuckdbStore, schema: &Arc<TableSchema>) -> Result<(), Failure> {
    let target = Target {
        projection: "proj_large".into(),
        shape: TargetShape::Rows,
        key: vec!["order_id".into()],
        columns: schema.columns.clone(),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![CaptureId::new("source1", "orders")],
    };
    store.prepare_target(&target).await?;
    // A target is layered when a small output comes: the rows before are as those of a snapshot.
    for step in 1..11u64 {
        let range = (step - 1) * 1_000_000..step * 1_000_000;
        let part = |from: u64| Ok(OutputRows::Upsert(upserts(from..range.end.min(from + 65_536), schema)?));
        let parts: Result<Vec<OutputRows>, Failure> = range.clone().step_by(65_536).map(part).collect();
        commit_as(store, &target, step, OutputKind::Merge, parts?, false).await?;
    }
    let mut times = Vec::new();
    for step in 11..411u64 {
        let ids =
            Int64Array::from_iter_values((0..2_500).map(|n| ((n * 3_989 + step * 31) % 10_000_000 * 7919) as i64));
        let mut arrays = columns(0..2_500, u64::MAX)?;
        arrays[0] = Arc::new(ids);
        let part = OutputRows::Upsert(RecordBatch::try_new(schema.columns.clone(), arrays)?);
        let began = Instant::now();
        commit(store, &target, step, OutputKind::Merge, vec![part]).await?;
        times.push(began.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    report_times("merge of 2500 rows into 10 M", times);
    for sql in ["select count(*), sum(amount) from proj_large", "select * from proj_large where order_id = 7919000"] {
        let began = Instant::now();
        let rows: usize = store.query(sql).await?.iter().map(RecordBatch::num_rows).sum();
        println!("{sql}: {rows} row in {:.0} ms", began.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(())
}
