//! How fast changes are written by the triggers and read into Arrow: `cargo run --release --example read_rate [changes]`.

use std::collections::BTreeMap;
use std::time::Instant;

use rusqlite::Connection;
use shori_core::Result;
use shori_core::source::{BatchLimit, Source};
use shori_sqlite::{SqliteConfig, SqliteSource, SqliteTable};

const TABLES: &str = "
create table customers (
    customer_id integer primary key, segment text not null, is_active boolean not null, updated_at text not null
);
create table orders (
    order_id integer primary key, customer_id integer not null, amount text not null, status text not null,
    created_at text not null, updated_at text not null
);
create table payments (
    payment_id integer primary key, order_id integer not null, paid_amount text not null, paid_at text not null
);
";

const ORDER: &str = "insert into orders values (?1, ?1 % 10000, '12.30', 'open', ?2, ?2)";
const UPDATE: &str = "update orders set status = 'paid', updated_at = ?2 where order_id = ?1";
const PAYMENT: &str = "insert into payments values (?1, ?1, '12.30', ?2)";
const AT: &str = "2026-01-02T03:04:05.123456Z";

fn fill(connection: &Connection, orders: i64) -> rusqlite::Result<()> {
    connection.execute_batch("begin")?;
    for id in 0..orders {
        connection.prepare_cached(ORDER)?.execute((id, AT))?;
        connection.prepare_cached(UPDATE)?.execute((id, AT))?;
        connection.prepare_cached(PAYMENT)?.execute((id, AT))?;
    }
    connection.execute_batch("commit")
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let changes: i64 = std::env::args().nth(1).map_or(Ok(1_500_000), |count| count.parse())?;
    let path = std::env::temp_dir().join(format!("shori_read_rate_{}.db", std::process::id()));
    let connection = Connection::open(&path)?;
    connection.execute_batch(TABLES)?;
    let times = |name: &str, columns: &[(&str, &str)]| {
        columns.iter().fold(SqliteTable::new(name), |table, (column, kind)| table.with_type(*column, *kind))
    };
    let tables = vec![
        times("customers", &[("updated_at", "timestamp")]),
        times("orders", &[("amount", "decimal(18,2)"), ("created_at", "timestamp"), ("updated_at", "timestamp")]),
        times("payments", &[("paid_amount", "decimal(18,2)"), ("paid_at", "timestamp")]),
    ];
    let mut config = SqliteConfig::new(&path, "rate", tables);
    config.inline = true;
    let mut source = SqliteSource::new(config);
    let limit = BatchLimit { rows: 50_000, bytes: 64 << 20 };
    source.start(&BTreeMap::new()).await?;
    while source.next(limit).await?.more {}

    let begun = Instant::now();
    fill(&connection, changes / 3)?;
    let written = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut rows = 0;
    loop {
        let batch = source.next(limit).await?;
        rows += batch.rows();
        if !batch.more {
            break;
        }
    }
    let read = begun.elapsed().as_secs_f64();
    println!("written: {rows} changes in {written:.2} s, {:.0}/s, in one transaction", rows as f64 / written);
    println!("read:    {rows} changes in {read:.2} s, {:.0}/s", rows as f64 / read);
    drop(connection);
    std::fs::remove_file(&path)?;
    Ok(())
}
