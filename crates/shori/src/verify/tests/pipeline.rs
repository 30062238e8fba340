//! A pipeline without the engine: a captured source, and what it calls for, worked out row by row.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use duckdb::Connection as Serving;
use rusqlite::Connection as Source;
use tempfile::TempDir;

use crate::generate::{Application, Clock, Shop, Workload};
use crate::verify::{
    ColumnInput, DerivationInput, ProjectionInput, Report, SourceInput, TableInput, VerifyInput, verify,
};

const SAMPLE: &str = include_str!("../../../../../pipelines/demo/sql/sample_source.sql");
const KPI: &str = include_str!("../../../../../pipelines/demo/sql/proj_orders_kpi_by_minute_segment.sql");
const LATEST: &str = include_str!("../../../../../pipelines/demo/sql/proj_orders_latest.sql");

/// Source columns with their types; the first is the key.
pub const TABLES: [(&str, &[(&str, &str)]); 3] = [
    (
        "customers",
        &[("customer_id", "int64"), ("segment", "text"), ("is_active", "boolean"), ("updated_at", "timestamp")],
    ),
    (
        "orders",
        &[
            ("order_id", "int64"),
            ("customer_id", "int64"),
            ("amount", "decimal(18,2)"),
            ("status", "text"),
            ("created_at", "timestamp"),
            ("updated_at", "timestamp"),
        ],
    ),
    (
        "payments",
        &[("payment_id", "int64"), ("order_id", "int64"), ("paid_amount", "decimal(18,2)"), ("paid_at", "timestamp")],
    ),
];

/// The change table's layout, as `shori-sqlite` documents it.
const CAPTURE: &str = "
create table _shori_captures (number integer primary key, table_name, columns, schema, shape, triggers, pruned_to);
create table _shori_changes (id integer primary key autoincrement, capture, op, at_us, v0, v1, v2, v3, v4, v5);
";

pub struct Pipeline {
    directory: TempDir,
    pub source: Source,
    pub serving: Serving,
}

impl Pipeline {
    /// Changes before capture, then changes after.
    pub fn new(before: u64, after: u64) -> Self {
        let directory = TempDir::new().unwrap();
        let source = Source::open(directory.path().join("source.db")).unwrap();
        source.execute_batch(SAMPLE).unwrap();
        let mut pipeline = Self { directory, source, serving: Serving::open_in_memory().unwrap() };
        if before > 0 {
            pipeline.generate(before);
        }
        pipeline.capture();
        pipeline.generate(after);
        pipeline
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("source.db")
    }

    pub fn generate(&mut self, changes: u64) {
        let clock = Clock::Fixed { start: 1_767_323_045_000_000, step_us: 400_000 };
        let workload = Workload { changes: Some(changes), customers: 20, seed: changes, ..Workload::default() };
        let shop = Application::Shop(Shop { path: self.path(), clock });
        shop.run(&workload, &AtomicBool::new(false), |_| {}).unwrap();
    }

    fn capture(&self) {
        self.source.execute_batch(CAPTURE).unwrap();
        self.source.execute_batch("create table snapshot_orders as select * from orders").unwrap();
        for (number, (table, columns)) in (0_i64..).zip(TABLES.iter()) {
            let key = columns[0].0;
            let json: Vec<_> =
                columns.iter().map(|(name, _)| serde_json::json!({"name": name, "live": true})).collect();
            self.source
                .execute(
                    "insert into _shori_captures values (?1, ?2, ?3, '', '', '', 0)",
                    rusqlite::params![number, table, serde_json::Value::Array(json).to_string()],
                )
                .unwrap();
            let slots: String = (0..columns.len()).map(|slot| format!(", v{slot}")).collect();
            let values = |row: &str| columns.iter().map(|(name, _)| format!(", {row}.{name}")).collect::<String>();
            let log = |op: u8, row: &str| {
                format!(
                    "insert into _shori_changes (capture, op, at_us{slots}) \
                     select {number}, {op}, 1767323045000000 + 1000 * (select count(*) from _shori_changes){}",
                    values(row)
                )
            };
            self.source
                .execute_batch(&format!(
                    "
                    create trigger {table}_insert after insert on {table} begin {}; end;
                    create trigger {table}_update after update on {table} begin
                        {} where old.{key} <> new.{key};
                        {} where old.{key} = new.{key};
                        {};
                    end;
                    create trigger {table}_delete after delete on {table} begin {}; end;
                    ",
                    log(2, "new"),
                    log(3, "old"),
                    log(8, "old"),
                    log(4, "new"),
                    log(1, "old")
                ))
                .unwrap();
        }
    }

    pub fn head(&self) -> i64 {
        self.source.query_row("select coalesce(max(id), 0) from _shori_changes", [], |row| row.get(0)).unwrap()
    }

    /// Makes the serving database what it should be at the source's newest change.
    pub fn project(&mut self) {
        self.serving = Serving::open_in_memory().unwrap();
        self.serving
            .execute_batch(
                "
                set TimeZone = 'UTC';
                create schema state;
                create table ctl_projection_checkpoints (
                    projection_name varchar, capture_instance varchar, last_consumed_lsn blob, last_seq blob
                );
                ",
            )
            .unwrap();
        for (table, columns) in TABLES {
            self.copy_state(table, columns);
        }
        let published =
            KPI.replace("    count(*) as __weight\n", "").replace("as paid_amount_sum,", "as paid_amount_sum");
        self.serving
            .execute_batch(&format!(
                "
                set schema = 'state';
                create table main.proj_orders_kpi_by_minute_segment as {published};
                create table main.proj_orders_latest as {LATEST};
                create table main.customers_latest as select * replace (__lsn as __lsn) from customers;
                alter table main.customers_latest rename __lsn to __source_lsn;
                set schema = 'main';
                "
            ))
            .unwrap();
        self.project_history();
        for projection in self.input().projections {
            for table in projection.tables() {
                self.serving
                    .execute(
                        "insert into ctl_projection_checkpoints values (?, ?, unhex(printf('%016x', ?)), '\\x00'::blob)",
                        duckdb::params![projection.name, table, self.head()],
                    )
                    .unwrap();
            }
        }
    }

    fn copy_state(&self, table: &str, columns: &[(&str, &str)]) {
        let definitions: Vec<_> =
            columns.iter().map(|(name, kind)| format!("{name} {}", crate::verify::values::duckdb_type(kind))).collect();
        self.serving
            .execute_batch(&format!("create table state.{table} ({}, __lsn blob)", definitions.join(", ")))
            .unwrap();
        let number = TABLES.iter().position(|(name, _)| *name == table).unwrap();
        let texts: Vec<_> = columns.iter().map(|(name, _)| format!("cast({name} as text)")).collect();
        let query = format!(
            "select {}, printf('%016x', coalesce((
                select max(id) from _shori_changes where capture = {number} and v0 = {} and op in (2, 4)
            ), 0)) from {table}",
            texts.join(", "),
            columns[0].0
        );
        let mut statement = self.source.prepare(&query).unwrap();
        let mut rows = statement.query([]).unwrap();
        self.serving.execute_batch("begin").unwrap();
        let places = vec!["?"; columns.len()].join(", ");
        let mut insert =
            self.serving.prepare(&format!("insert into state.{table} values ({places}, unhex(?))")).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values: Vec<String> = (0..=columns.len()).map(|index| row.get(index).unwrap()).collect();
            insert.execute(duckdb::params_from_iter(values)).unwrap();
        }
        self.serving.execute_batch("commit").unwrap();
    }

    /// One version per image, in the order of the change table.
    fn project_history(&self) {
        self.serving
            .execute_batch(
                "
                create table dim_orders_history (
                    surrogate_key bigint, order_key bigint, customer_id bigint, amount decimal(18,2), status varchar,
                    created_at timestamp, updated_at timestamp, valid_from timestamp, valid_to timestamp,
                    is_current boolean, cdc_operation varchar, cdc_timestamp timestamp, __source_lsn blob
                )
                ",
            )
            .unwrap();
        let query = "
            select 0, 0, 1767323045000000 - 1, * from snapshot_orders
            union all
            select id, op, at_us, v0, v1, v2, v3, v4, v5 from _shori_changes where capture = 1 and op <> 8
            order by 1, 4
        ";
        let mut statement = self.source.prepare(query).unwrap();
        let mut rows = statement.query([]).unwrap();
        let mut open: BTreeMap<i64, i64> = BTreeMap::new();
        let mut boundaries: BTreeMap<i64, i64> = BTreeMap::new();
        let mut surrogate = 0;
        while let Some(row) = rows.next().unwrap() {
            let (id, op, at, key): (i64, i64, i64, i64) =
                (row.get(0).unwrap(), row.get(1).unwrap(), row.get(2).unwrap(), row.get(3).unwrap());
            let from = boundaries.get(&key).map_or(at, |boundary| at.max(boundary + 1));
            boundaries.insert(key, from);
            if let Some(version) = open.remove(&key) {
                self.serving
                    .execute(
                        "update dim_orders_history set valid_to = make_timestamp(?), is_current = false
                        where surrogate_key = ?",
                        duckdb::params![from, version],
                    )
                    .unwrap();
            }
            if matches!(op, 1 | 3) {
                continue;
            }
            surrogate += 1;
            open.insert(key, surrogate);
            let operation = match op {
                0 => "SNAPSHOT",
                2 => "INSERT",
                _ => "UPDATE",
            };
            let texts: Vec<String> = (5..9).map(|index| row.get(index).unwrap()).collect();
            let customer: i64 = row.get(4).unwrap();
            self.serving
                .execute(
                    "insert into dim_orders_history values (
                        ?, ?, ?, ?, ?, ?, ?, make_timestamp(?), null, true, ?, make_timestamp(?),
                        unhex(printf('%016x', ?))
                    )",
                    duckdb::params![
                        surrogate, key, customer, texts[0], texts[1], texts[2], texts[3], from, operation, at, id
                    ],
                )
                .unwrap();
        }
    }

    pub fn input(&self) -> VerifyInput {
        let table = |(name, columns): &(&str, &[(&str, &str)])| TableInput {
            name: name.to_string(),
            key: vec![columns[0].0.to_string()],
            columns: columns.iter().map(|(name, kind)| ColumnInput::new(*name, *kind)).collect(),
        };
        let sql = |name: &str, text: &str, tables: &[&str], key: &[&str], hidden: &[&str]| {
            let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
            let derivation = DerivationInput::Sql {
                file: "query.sql".into(),
                text: text.to_string(),
                tables: names(tables),
                key: names(key),
                hidden: names(hidden),
            };
            ProjectionInput { name: name.to_string(), store: String::new(), derivation }
        };
        VerifyInput {
            source: SourceInput::Sqlite(self.path()),
            source_name: String::new(),
            staging: String::new(),
            tables: TABLES.iter().map(table).collect(),
            projections: vec![
                sql(
                    "proj_orders_kpi_by_minute_segment",
                    KPI,
                    &["customers", "orders", "payments"],
                    &["minute_bucket", "segment"],
                    &["__weight"],
                ),
                sql("proj_orders_latest", LATEST, &["customers", "orders"], &["order_id"], &[]),
                ProjectionInput {
                    name: "customers_latest".into(),
                    store: String::new(),
                    derivation: DerivationInput::Latest { table: "customers".into() },
                },
                ProjectionInput {
                    name: "dim_orders_history".into(),
                    store: String::new(),
                    derivation: DerivationInput::History {
                        table: "orders".into(),
                        key: vec!["order_key".into()],
                        left_out: Vec::new(),
                        tombstones: false,
                    },
                },
            ],
            scratch_directory: None,
            memory_limit_mib: 256,
            threads: 1,
            catch_up: Duration::ZERO,
        }
    }

    pub fn verify(&mut self) -> Report {
        let input = self.input();
        verify(&input, &mut self.serving).unwrap()
    }
}
