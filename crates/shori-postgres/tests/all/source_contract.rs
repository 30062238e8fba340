//! A PostgreSQL database under the contract that every source keeps.

use async_trait::async_trait;
use chrono::DateTime;
use shori_core::position::CaptureId;
use shori_core::source::Source;
use shori_core::testing::memory_database::Write;
use shori_core::testing::source_contract::{SourceHarness, SourceSystem, run};
use shori_core::testing::value::Value;
use shori_postgres::{PostgresConfig, PostgresSource};
use tokio_postgres::Client;

use crate::harness::config;
use crate::server::Server;

struct Databases {
    /// One column is configured as text, so that the stream comes in text format.
    as_text: bool,
}

struct Database {
    config: PostgresConfig,
    client: Client,
}

#[async_trait]
impl SourceHarness for Databases {
    async fn fresh(&self) -> Box<dyn SourceSystem> {
        let server = Server::shared();
        let name = server.create_database().await;
        let client = server.connect(&name).await;
        let tables = "
            create table items (id bigint primary key, name text, price numeric(18,2), changed_at timestamp);
            create table quiet (id bigint primary key, name text);
            create table spans (id bigint primary key, span interval);";
        client.batch_execute(tables).await.unwrap();
        let mut config =
            config(server, &name, if self.as_text { &["items", "quiet", "spans"] } else { &["items", "quiet"] });
        if self.as_text {
            config.tables[2].columns.insert("span".into(), "text".into());
        }
        Box::new(Database { config, client })
    }
}

fn literal(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => format!("'{text}'"),
        Value::Decimal(unscaled) => format!("{}.{:02}", unscaled / 100, unscaled % 100),
        Value::Time(time) => {
            let time = DateTime::from_timestamp_micros(*time).unwrap();
            format!("'{}'", time.format("%Y-%m-%d %H:%M:%S%.6f"))
        }
        other => panic!("{other:?} is in no table of the contract"),
    }
}

fn statement(write: &Write) -> String {
    let list = |values: &mut dyn Iterator<Item = String>| values.collect::<Vec<_>>().join(", ");
    match write {
        Write::Insert { table, row } => {
            format!("insert into {table} values ({})", list(&mut row.iter().map(literal)))
        }
        Write::Update { table, key, row } => {
            let columns = ["id", "name", "price", "changed_at"].iter().zip(row.iter());
            let set = list(&mut columns.map(|(column, value)| format!("{column} = {}", literal(value))));
            format!("update {table} set {set} where id = {}", literal(&key[0]))
        }
        Write::Delete { table, key } => format!("delete from {table} where id = {}", literal(&key[0])),
        Write::Truncate { table } => format!("truncate {table}"),
    }
}

#[async_trait]
impl SourceSystem for Database {
    async fn open(&self) -> Box<dyn Source> {
        Box::new(PostgresSource::new(self.config.clone()))
    }

    async fn commit(&self, writes: &[Write]) {
        let statements: Vec<String> = writes.iter().map(statement).collect();
        self.client.batch_execute(&format!("begin; {}; commit", statements.join("; "))).await.unwrap();
    }

    fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.config.source_name, table)
    }

    /// Somebody drops the slot.
    async fn prune(&self) -> bool {
        // The server may not have noticed yet that its reader has gone.
        let end =
            "select pg_terminate_backend(active_pid, 10000) from pg_replication_slots where slot_name = $1 and active";
        self.client.execute(end, &[&self.config.slot]).await.unwrap();
        self.client.execute("select pg_drop_replication_slot($1)", &[&self.config.slot]).await.unwrap();
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_sources_holds_in_binary_format() {
    run(&Databases { as_text: false }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_sources_holds_in_text_format() {
    run(&Databases { as_text: true }).await;
}
