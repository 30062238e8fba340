//! A PostgreSQL database under the contract that every source keeps.

use std::time::Duration;

use async_trait::async_trait;
use chrono::DateTime;
use shori_core::position::CaptureId;
use shori_core::source::Source;
use shori_core::testing::memory_database::Write;
use shori_core::testing::source_contract::{Sees, SourceHarness, SourceSystem, run};
use shori_core::testing::value::Value;
use shori_postgres::{PollSource, Polls, PostgresConfig, PostgresSource};
use tokio_postgres::Client;

use crate::harness::{config, polled, table};
use crate::server::Server;

#[derive(Clone, Copy, PartialEq)]
enum Databases {
    Binary,
    /// One column is configured as text, so that the stream comes in text format.
    Text,
    /// Every row has a column that tells when it changed.
    Polled,
}

const TOUCHED: &str = "
create function touch() returns trigger language plpgsql as $$ begin new.touched = now(); return new; end $$;
alter table items add column touched timestamptz not null default now();
alter table quiet add column touched timestamptz not null default now();
create trigger touch before update on items for each row execute function touch();
create trigger touch before update on quiet for each row execute function touch();
";

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
        let mut config = config(server, &name, &["items", "quiet"]);
        match self {
            Databases::Binary => {}
            Databases::Text => {
                config.tables.push(table("spans"));
                config.tables[2].columns.insert("span".into(), "text".into());
            }
            Databases::Polled => {
                client.batch_execute(TOUCHED).await.unwrap();
                polled(&mut config, "touched");
                // The suite holds a source to be at its end that brings nothing for a while.
                config.polls = config.polls.map(|polls| Polls { every: Duration::from_millis(200), ..polls });
            }
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
        match self.config.polls {
            Some(_) => Box::new(PollSource::new(self.config.clone())),
            None => Box::new(PostgresSource::new(self.config.clone())),
        }
    }

    async fn commit(&self, writes: &[Write]) {
        let statements: Vec<String> = writes.iter().map(statement).collect();
        self.client.batch_execute(&format!("begin; {}; commit", statements.join("; "))).await.unwrap();
    }

    fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.config.source_name, table)
    }

    fn sees(&self) -> Sees {
        if self.config.polls.is_some() { Sees::StandingRows } else { Sees::EveryChange }
    }

    /// Somebody drops the slot. What is polled is kept nowhere that it could be gone from.
    async fn prune(&self) -> bool {
        if self.config.polls.is_some() {
            return false;
        }
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
    run(&Databases::Binary).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_sources_holds_in_text_format() {
    run(&Databases::Text).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_sources_holds_for_polled_tables() {
    run(&Databases::Polled).await;
}
