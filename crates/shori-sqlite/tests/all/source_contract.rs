//! SQLite files under the contract that every source keeps.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use chrono::DateTime;
use rusqlite::types::Value as Stored;
use rusqlite::{Connection, params_from_iter};
use shori_core::position::CaptureId;
use shori_core::source::Source;
use shori_core::testing::memory_database::Write;
use shori_core::testing::source_contract::{SourceHarness, SourceSystem, run};
use shori_core::testing::value::Value;
use shori_sqlite::{SqliteConfig, SqliteSource, SqliteTable};

use crate::harness::Fixture;

struct Files;

struct File {
    config: SqliteConfig,
    writer: Mutex<Connection>,
    _directory: tempfile::TempDir,
}

#[async_trait]
impl SourceHarness for Files {
    async fn fresh(&self) -> Box<dyn SourceSystem> {
        let items = SqliteTable::new("items").with_type("price", "decimal(18,2)").with_type("changed_at", "timestamp");
        let fixture = Fixture::new(
            "create table items (id integer primary key, name text, price text, changed_at text);
             create table quiet (id integer primary key, name text);",
            vec![items, SqliteTable::new("quiet")],
        );
        let Fixture { directory, writer, config } = fixture;
        Box::new(File { config, writer: Mutex::new(writer), _directory: directory })
    }
}

fn stored(value: &Value) -> Stored {
    match value {
        Value::Null => Stored::Null,
        Value::Integer(number) => Stored::Integer(*number),
        Value::Text(text) => Stored::Text(text.to_string()),
        Value::Decimal(unscaled) => Stored::Text(format!("{}.{:02}", unscaled / 100, unscaled % 100)),
        Value::Time(time) => {
            let time = DateTime::from_timestamp_micros(*time).unwrap();
            Stored::Text(time.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string())
        }
        other => panic!("{other:?} is in no table of the contract"),
    }
}

fn statement(write: &Write) -> (String, Vec<Stored>) {
    match write {
        Write::Insert { table, row } => {
            let places = vec!["?"; row.len()].join(", ");
            (format!("insert into {table} values ({places})"), row.iter().map(stored).collect())
        }
        Write::Update { table, key, row } => {
            let columns = ["id", "name", "price", "changed_at"];
            let set: Vec<String> = columns[..row.len()].iter().map(|column| format!("{column} = ?")).collect();
            let values = row.iter().chain(key.iter()).map(stored).collect();
            (format!("update {table} set {} where id = ?", set.join(", ")), values)
        }
        Write::Delete { table, key } => (format!("delete from {table} where id = ?"), key.iter().map(stored).collect()),
        Write::Truncate { table } => (format!("delete from {table}"), Vec::new()),
    }
}

#[async_trait]
impl SourceSystem for File {
    async fn open(&self) -> Box<dyn Source> {
        Box::new(SqliteSource::new(self.config.clone()))
    }

    async fn commit(&self, writes: &[Write]) {
        let mut writer = self.writer.lock().unwrap();
        let transaction = writer.transaction().unwrap();
        for (sql, values) in writes.iter().map(statement) {
            transaction.execute(&sql, params_from_iter(values)).unwrap();
        }
        transaction.commit().unwrap();
    }

    fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.config.source_name, table)
    }

    /// As another reader of the file that has everything in its log.
    async fn prune(&self) -> bool {
        let mut source = SqliteSource::new(self.config.clone());
        source.start(&BTreeMap::new()).await.unwrap();
        let head = source.head().await.unwrap();
        source.acknowledge(&head.boundary).await.unwrap();
        let query = "select max(pruned_to) > 0 from _shori_captures";
        assert!(self.writer.lock().unwrap().query_row(query, [], |row| row.get::<_, bool>(0)).unwrap());
        true
    }
}

#[tokio::test]
async fn the_contract_of_sources_holds() {
    run(&Files).await;
}
