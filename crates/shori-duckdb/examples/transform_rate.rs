//! Measures the transform on ten million orders and eight million payments: what a refresh costs against a full
//! computation, near the newest rows and anywhere, in steady cycles, and for a long history.
//!
//! `cargo run --release -p shori-duckdb --example transform_rate [orders in millions] [memory limit in MiB]`

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Decimal128Array, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, TimeUnit};
use async_trait::async_trait;
use shori_core::Result;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, Positions, SortKey};
use shori_core::projection::*;
use shori_core::schema::TableSchema;
use shori_core::transform::*;
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::transform::DuckdbTransform;

const START: i64 = 1_717_200_000_000_000;
const BATCH_ROWS: usize = 16_384;

struct Batches(VecDeque<ChangeBatch>);

#[async_trait]
impl LogReader for Batches {
    async fn next(&mut self) -> Result<Option<ChangeBatch>> {
        Ok(self.0.pop_front())
    }
}

fn id(table: &str) -> CaptureId {
    CaptureId::new("shop", table)
}

fn time() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, None)
}

fn schema(table: &str, fields: &[(&str, DataType)]) -> Arc<TableSchema> {
    let fields: Vec<Field> = fields.iter().map(|(name, of)| Field::new(*name, of.clone(), false)).collect();
    let key = fields[0].name().clone();
    Arc::new(TableSchema::new(table, fields, &[&key]).unwrap())
}

struct World {
    transform: DuckdbTransform,
    schemas: BTreeMap<&'static str, Arc<TableSchema>>,
    lsn: u64,
    orders: i64,
}

fn schemas() -> BTreeMap<&'static str, Arc<TableSchema>> {
    let money = DataType::Decimal128(18, 2);
    let customers =
        schema("customers", &[("customer_id", DataType::Int32), ("segment", DataType::Utf8), ("updated_at", time())]);
    let orders = schema(
        "orders",
        &[
            ("order_id", DataType::Int64),
            ("customer_id", DataType::Int32),
            ("amount", money.clone()),
            ("status", DataType::Utf8),
            ("created_at", time()),
            ("updated_at", time()),
        ],
    );
    let payments = schema(
        "payments",
        &[("payment_id", DataType::Int64), ("order_id", DataType::Int64), ("paid_amount", money), ("paid_at", time())],
    );
    [("customers", customers), ("orders", orders), ("payments", payments)].into()
}

const KPI: &str = "
select coalesce(o.minute_bucket, p.minute_bucket) as minute_bucket, coalesce(o.segment, p.segment) as segment,
    coalesce(o.n, 0)::integer as orders_count, coalesce(o.amount, 0)::decimal(18,2) as orders_amount_sum,
    coalesce(p.paid, 0)::decimal(18,2) as paid_amount_sum, coalesce(o.n, 0) + coalesce(p.n, 0) as base_rows
from (
    select date_trunc('minute', o.created_at) as minute_bucket, coalesce(c.segment, 'UNKNOWN') as segment,
        count(distinct o.order_id) as n, sum(o.amount) as amount
    from orders o left join customers c using (customer_id) group by 1, 2
) o
full join (
    select date_trunc('minute', p.paid_at) as minute_bucket, coalesce(c.segment, 'UNKNOWN') as segment,
        count(*) as n, sum(p.paid_amount) as paid
    from payments p join orders o using (order_id) left join customers c using (customer_id) group by 1, 2
) p on o.minute_bucket = p.minute_bucket and o.segment = p.segment";

const LATEST: &str = "
select o.order_id, o.customer_id, c.segment, o.amount, o.status, o.created_at, o.updated_at, o.__lsn as __source_lsn
from orders o left join customers c using (customer_id)";

fn entity(tables: &[&str]) -> Entity {
    let order = EntityPath::Column("order_id".into());
    let customer = EntityPath::Through {
        table: "orders".into(),
        own_column: "customer_id".into(),
        their_column: "customer_id".into(),
    };
    let all = [("orders", order.clone()), ("payments", order), ("customers", customer)];
    let paths = all.into_iter().filter(|(name, _)| tables.contains(name));
    Entity { paths: paths.map(|(name, path)| (Arc::from(name), path)).collect() }
}

fn sql(name: &str, text: &str, tables: &[&str], key: &[&str], measures: Measures) -> Projection {
    let derivation = Derivation::Sql(SqlProjection {
        file: format!("{name}.sql"),
        text: text.into(),
        tables: tables.iter().map(|table| Arc::from(*table)).collect(),
        key: key.iter().map(|name| name.to_string()).collect(),
        maintenance: Maintenance::ByEntity { entity: entity(tables), measures },
    });
    Projection { name: name.into(), derivation }
}

fn kpi() -> Projection {
    let measures = Measures::Additive {
        additive: ["orders_count", "orders_amount_sum", "paid_amount_sum"].map(String::from).into(),
        weight: "base_rows".into(),
        publish_weight: false,
    };
    sql("kpi", KPI, &["orders", "payments", "customers"], &["minute_bucket", "segment"], measures)
}

fn steady() -> Vec<Projection> {
    let tables = ["orders", "payments", "customers"];
    vec![
        kpi(),
        sql("orders_latest", LATEST, &tables, &["order_id"], Measures::PerEntity),
        Projection { name: "payments".into(), derivation: Derivation::Latest { table: "payments".into() } },
        Projection {
            name: "orders_history".into(),
            derivation: Derivation::History(HistoryProjection {
                table: "orders".into(),
                key: vec!["order_key".into()],
            }),
        },
    ]
}

/// Writes state as a finished load would have left it.
fn fill(directory: &Path, database: &Database, orders: i64) {
    let cache = database.connect("cache").unwrap();
    let marks = format!("{START}, null, 1, (select number from cache_captures where instance =");
    let lsn = |at: &str| format!("(1000 + {at})::ubigint, 0::ubigint, 8::utinyint");
    let names = "__lsn_a, __lsn_b, __lsn_length, __time, __boundary, __generation, __capture";
    let at = format!("make_timestamp({START} + i * 259200)");
    let order = format!("greatest(1, least({orders}, (i * 1.25)::bigint + (hash(i * 5) % 4000)::bigint - 2000))");
    cache
        .execute_batch(&format!(
            "insert into state_customers (customer_id, segment, updated_at, {names})
             select i, ['SMB', 'ENT', 'MID', 'GOV', 'EDU'][1 + i % 5], make_timestamp({START}), {}, {marks} 'customers')
             from range(1, 10001) t(i);
             insert into state_orders (order_id, customer_id, amount, status, created_at, updated_at, {names})
             select i, 1 + (hash(i) % 10000)::int, ((hash(i * 7) % 100000) / 100)::decimal(18,2),
                 case when hash(i * 3) % 10 < 7 then 'open' else 'paid' end, {at}, {at}, {}, {marks} 'orders')
             from range(1, {orders} + 1) t(i);
             insert into state_payments (payment_id, order_id, paid_amount, paid_at, {names})
             select i, {order}, ((hash(i * 13) % 100000) / 100)::decimal(18,2),
                 make_timestamp({START} + {order} * 259200), {}, {marks} 'payments')
             from range(1, {orders} * 8 // 10 + 1) t(i);
             checkpoint;",
            lsn("i"),
            lsn("i"),
            lsn("i")
        ))
        .unwrap();
    let size = std::fs::metadata(directory.join("state.sqlite")).unwrap().len() >> 20;
    println!("cache file: {size} MiB");
}

impl World {
    fn at(&self) -> Position {
        Position::new(SortKey::from_u64(self.lsn), SortKey::MAX)
    }

    /// Updates of orders, one commit for each `per_commit`.
    fn order_batches(&mut self, keys: &[i64], per_commit: usize) -> VecDeque<ChangeBatch> {
        let mut batches = VecDeque::new();
        for keys in keys.chunks(BATCH_ROWS) {
            let mut head = ChangeHeadBuilder::default();
            for (index, _) in keys.iter().enumerate() {
                if index % per_commit == 0 {
                    self.lsn += 1;
                }
                let seq = SortKey::from_u64(index as u64);
                head.push(&Position::new(SortKey::from_u64(self.lsn), seq), Op::UpdateAfter, START + self.lsn as i64);
            }
            let lsn = self.lsn as i64;
            let money =
                Decimal128Array::from_iter_values(keys.iter().map(|key| i128::from((key * 31 + lsn) % 100_000)))
                    .with_precision_and_scale(18, 2)
                    .unwrap();
            let created = TimestampMicrosecondArray::from_iter_values(keys.iter().map(|key| START + key * 259_200));
            let updated = TimestampMicrosecondArray::from_iter_values(keys.iter().map(|_| START + lsn));
            let columns: Vec<ArrayRef> = vec![
                Arc::new(Int64Array::from_iter_values(keys.iter().copied())),
                Arc::new(Int32Array::from_iter_values(keys.iter().map(|key| 1 + (key * 7919 % 10_000) as i32))),
                Arc::new(money),
                Arc::new(StringArray::from_iter_values(keys.iter().map(|_| "paid"))),
                Arc::new(created),
                Arc::new(updated),
            ];
            batches.push_back(head.finish(id("orders"), self.schemas["orders"].clone(), columns).unwrap());
        }
        batches
    }

    fn customer_batch(&mut self, keys: &[i32]) -> ChangeBatch {
        let mut head = ChangeHeadBuilder::default();
        self.lsn += 1;
        for (index, _) in keys.iter().enumerate() {
            let seq = SortKey::from_u64(index as u64);
            head.push(&Position::new(SortKey::from_u64(self.lsn), seq), Op::UpdateAfter, START + self.lsn as i64);
        }
        let segment = ["SMB", "ENT", "MID"][self.lsn as usize % 3];
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int32Array::from(keys.to_vec())),
            Arc::new(StringArray::from_iter_values(keys.iter().map(|_| segment))),
            Arc::new(TimestampMicrosecondArray::from_iter_values(keys.iter().map(|_| START))),
        ];
        head.finish(id("customers"), self.schemas["customers"].clone(), columns).unwrap()
    }

    async fn advance(&self, batches: VecDeque<ChangeBatch>) {
        let to = Applied { position: self.at(), time: START + self.lsn as i64 };
        let advance = |table: &&str| CaptureAdvance { capture: id(table), to, generation: 1, sweep: None };
        let captures: Vec<_> = self.schemas.keys().map(advance).collect();
        self.transform.advance(&captures, &mut Batches(batches)).await.unwrap();
    }

    /// Computes, reads and settles. Returns the new checkpoint and the rows of the output.
    async fn refresh(&self, name: &str, since: Option<&Positions>) -> (Positions, usize) {
        let Computed::Output { positions, mut reader, .. } = self.transform.compute(name, since).await.unwrap() else {
            panic!("{name} gives no output")
        };
        let mut rows = 0;
        while let Some(part) = reader.next().await.unwrap() {
            use shori_core::store::OutputRows::*;
            let (Upsert(part) | Delete(part) | Version(part) | Close(part)) = part;
            rows += part.num_rows();
        }
        self.transform.settle(name, Some(&positions)).await.unwrap();
        (positions, rows)
    }

    fn near(&self, count: i64, cycle: i64) -> Vec<i64> {
        distinct((0..2 * count).map(|i| self.orders - mixed(i + cycle * 1_000_003) % 13_888), count)
    }

    fn anywhere(&self, count: i64, cycle: i64) -> Vec<i64> {
        distinct((0..2 * count).map(|i| 1 + mixed(i + cycle * 1_000_003) % self.orders), count)
    }
}

fn mixed(number: i64) -> i64 {
    let number = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((number ^ number >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 2) as i64
}

fn distinct(keys: impl Iterator<Item = i64>, count: i64) -> Vec<i64> {
    let mut seen = std::collections::HashSet::new();
    keys.filter(|key| seen.insert(*key)).take(count as usize).collect()
}

/// Where time goes: statements by their first words.
#[derive(Clone, Default)]
struct Profile(Arc<Mutex<BTreeMap<String, (u32, Duration)>>>);

impl Profile {
    fn print(&self, title: &str, cycles: u32) {
        let mut entries: Vec<_> = std::mem::take(&mut *self.0.lock().unwrap()).into_iter().collect();
        entries.sort_by_key(|(_, (_, time))| std::cmp::Reverse(*time));
        let (count, total) = entries.iter().fold((0, Duration::ZERO), |sum, (_, one)| (sum.0 + one.0, sum.1 + one.1));
        println!("  {title}: {} statements, {:.1?} a cycle", count / cycles, total / cycles);
        for (text, (count, time)) in entries.into_iter().take(9) {
            println!("    {:8.1?} {count:4}x  {text}", time / cycles);
        }
    }
}

struct Statement(Option<(u64, String)>);

impl tracing::field::Visit for Statement {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "sql" {
            let text = format!("{value:?}").replace("\\n", " ");
            let words: Vec<&str> = text.split_whitespace().collect();
            self.0.get_or_insert_default().1 = words.join(" ").chars().take(100).collect();
        }
    }

    fn record_u64(&mut self, _: &tracing::field::Field, value: u64) {
        self.0.get_or_insert_default().0 = value;
    }
}

impl tracing::Subscriber for Profile {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "shori_duckdb::sql"
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut statement = Statement(None);
        event.record(&mut statement);
        if let Some((micros, text)) = statement.0 {
            let mut entries = self.0.lock().unwrap();
            let entry = entries.entry(text).or_default();
            *entry = (entry.0 + 1, entry.1 + Duration::from_micros(micros));
        }
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("0");
    line.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).next().unwrap_or(0) / 1024
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn open(directory: &Path, database: &Database, projections: &[Projection]) -> DuckdbTransform {
    let transform = DuckdbTransform::open(database, &directory.join("state.sqlite")).unwrap();
    let tables: Vec<_> = schemas().into_iter().map(|(name, schema)| StateTable { capture: id(name), schema }).collect();
    transform.open("store", &tables, projections).await.unwrap();
    transform
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<f64>().unwrap());
    let orders = (arguments.next().unwrap_or(10.0) * 1e6) as i64;
    let memory_limit_mib = arguments.next().unwrap_or(350.0) as u64;
    let profile = Profile::default();
    tracing::subscriber::set_global_default(profile.clone()).unwrap();
    let directory = tempfile::tempdir_in(std::env::var("SHORI_BENCH_DIR").unwrap_or("/tmp".into())).unwrap();
    let settings =
        Settings { memory_limit_mib, threads: 2, spill_directory: directory.path().join("spill"), inline: false };
    let database = Database::open(&settings).unwrap();
    let transform = open(directory.path(), &database, &steady()).await;
    fill(directory.path(), &database, orders);
    drop(transform);
    let started = Instant::now();
    let transform = open(directory.path(), &database, &steady()).await;
    println!("opening with {orders} orders: {:.1?}", started.elapsed());
    let mut world = World { transform, schemas: schemas(), lsn: 100_000_000, orders };
    world.advance(VecDeque::new()).await;
    // Histories begin at what is kept; this one begins empty.
    let started = Instant::now();
    let (mut since, rows) = world.refresh("kpi", None).await;
    println!("KPI in full, read out and kept: {:.1?} for {rows} rows", started.elapsed());
    profile.print("full", 1);
    let mut full = Vec::new();
    for _ in 0..3 {
        world.transform.settle("kpi", None).await.unwrap();
        let started = Instant::now();
        since = world.refresh("kpi", None).await.0;
        full.push(started.elapsed());
    }
    let full = median(&mut full);
    profile.print("full", 3);
    for (title, near) in [("last hour", true), ("anywhere", false)] {
        let mut times = Vec::new();
        let mut rows = 0;
        for cycle in 0..7 {
            let keys = if near { world.near(10_000, cycle) } else { world.anywhere(10_000, cycle) };
            let batches = world.order_batches(&keys, 100);
            let started = Instant::now();
            world.advance(batches).await;
            (since, rows) = world.refresh("kpi", Some(&since)).await;
            times.push(started.elapsed());
            world.transform.forget(&[since.clone()]).await.unwrap();
        }
        let median = median(&mut times);
        println!(
            "10000 changes {title}: {median:.1?}, {:.3} of {full:.1?}; {rows} rows; {times:.0?}",
            median.as_secs_f64() / full.as_secs_f64()
        );
        profile.print(title, 7);
    }
    steady_cycles(&mut world, &profile, since).await;
    history(&database, &profile, &mut world).await;
    println!("peak resident memory: {} MiB with a limit of {memory_limit_mib} MiB", resident_mib());
}

async fn steady_cycles(world: &mut World, profile: &Profile, since: Positions) {
    let mut checkpoints: BTreeMap<&str, Positions> = BTreeMap::from([("kpi", since)]);
    for name in ["payments", "orders_latest", "orders_history"] {
        let started = Instant::now();
        let (positions, rows) = world.refresh(name, None).await;
        println!("{name} in full: {:.1?} for {rows} rows", started.elapsed());
        checkpoints.insert(name, positions);
    }
    profile.print("whole outputs", 1);
    let mut times = Vec::new();
    for cycle in 0..40 {
        let mut keys = world.near(1_000, cycle + 100);
        keys.extend(world.anywhere(247, cycle + 200));
        let customers: Vec<i32> = (0..3).map(|i| 1 + ((cycle * 3 + i) % 10_000) as i32).collect();
        let mut batches = world.order_batches(&keys, 10);
        batches.push_back(world.customer_batch(&customers));
        let started = Instant::now();
        world.advance(batches).await;
        for (name, since) in &mut checkpoints {
            *since = world.refresh(name, Some(since)).await.0;
        }
        let all: Vec<Positions> = checkpoints.values().cloned().collect();
        world.transform.forget(&all).await.unwrap();
        times.push(started.elapsed());
    }
    let worst = times.iter().max().copied().unwrap_or_default();
    println!("steady cycles of 1250 changes, four projections: {:.1?}, worst {worst:.1?}", median(&mut times));
    profile.print("steady", 40);
}

async fn history(_: &Database, profile: &Profile, world: &mut World) {
    let name = "orders_history";
    world.advance(VecDeque::new()).await;
    let first = Positions::from([(id("orders"), world.at())]);
    let keys: Vec<i64> = (0..1_000_000).map(|i| 1 + mixed(i) % 200_000).collect();
    let batches = world.order_batches(&keys, 50);
    let started = Instant::now();
    world.advance(batches).await;
    let advanced = started.elapsed();
    let (_, rows) = world.refresh(name, Some(&first)).await;
    let all = started.elapsed();
    println!(
        "history of 1000000 changes on 200000 keys: advance {advanced:.1?}, with reading {all:.1?}, {:.0} changes/s, {rows} rows",
        1e6 / all.as_secs_f64()
    );
    profile.print("history", 1);
}
