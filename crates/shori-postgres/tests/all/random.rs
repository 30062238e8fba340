//! Random transactions of several writers, read with random limits and restarts, against the tables themselves.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use shori_core::source::BatchLimit;

use crate::harness::Reader;
use crate::server::Server;
use crate::writers::{Writers, random, seed};

const TABLES: [&str; 3] = ["a", "b", "c"];
const SQL: &str = "
    create table a (id bigint primary key, n bigint, t text);
    create table b (id bigint, n bigint, t text, primary key (n, id));
    create table c (id bigint not null, n bigint, t text, unique (id));
    alter table b replica identity full;
    alter table c replica identity using index c_id_key;
    insert into a select i, i, 'a' from generate_series(1, 1500) i;
    insert into b select i, i % 7, 'b' from generate_series(1, 800) i;";
/// Committed while it is read, at least.
const TRANSACTIONS: u64 = 400;

fn statement(random: &mut ChaCha8Rng) -> String {
    let table = TABLES[random.random_range(0..3)];
    let id = random.random_range(0..2000);
    let to = id + random.random_range(0..20);
    let n = random.random_range(0..7);
    match random.random_range(0..20) {
        0..6 => format!("insert into {table} values ({id}, {n}, repeat('t', {})) on conflict do nothing", id % 90),
        6..11 => format!("update {table} set t = t || 'x' where id between {id} and {to}"),
        11..13 => format!("update {table} set id = id + 5000 where id = {id}"),
        13..16 => format!("delete from {table} where id between {id} and {to}"),
        16 => format!("delete from a where id = {id}; insert into a values ({id}, {n}, 'again')"),
        17 => format!("savepoint s; update {table} set n = -1; rollback to s; update a set n = {n} where id = {id}"),
        18 => format!("update b set n = {n} where id = {id}; update a set t = null where id = {to}"),
        _ if id < 60 => format!("truncate {table}; insert into {table} values ({id}, {n}, 'first')"),
        _ => "select 1".into(),
    }
}

fn transaction(random: &mut ChaCha8Rng) -> String {
    let statements = (0..random.random_range(1..6)).map(|_| statement(random)).collect::<Vec<_>>().join("; ");
    // Some are given up, so that nothing of them is read.
    if random.random_range(0..10) == 0 { format!("{statements}; rollback; begin") } else { statements }
}

async fn run(seed: u64) {
    let server = Server::shared();
    let database = server.create_database().await;
    let mut random = random(seed);
    let mut reader = Reader::over(server, &database, SQL, &TABLES).await;
    reader.config.snapshot_chunk_rows = random.random_range(50..400);
    reader.acknowledges = false;
    reader.start().await;
    let writers = Writers::start(server, &database, 3, seed, transaction).await;
    let mut kept = reader.stored.clone();
    let (mut restarts, mut resnapshots) = (0, 0);
    while writers.committed() < TRANSACTIONS || !TABLES.iter().all(|table| reader.snapshot(table).is_done()) {
        let rows = if random.random_range(0..4) == 0 { random.random_range(1..10) } else { 1000 };
        let limit = BatchLimit { rows, bytes: random.random_range(200..100_000) };
        if !reader.step(limit).await.unwrap().more {
            reader.source.as_mut().unwrap().wait(std::time::Duration::from_millis(20)).await.unwrap();
        }
        match random.random_range(0..60) {
            // What is kept is safe: the source may let go of it.
            0..8 => {
                kept = reader.stored.clone();
                let staged = reader.watermark.staged;
                reader.source.as_mut().unwrap().acknowledge(&staged).await.unwrap();
            }
            8 if restarts < 12 => {
                // The process ends before it has stored what it read, wherever that is.
                reader.stored = kept.clone();
                reader.start().await;
                restarts += 1;
            }
            9 if resnapshots < 3 => {
                let table = TABLES[random.random_range(0..3)];
                if reader.has_begun(table) {
                    reader.resnapshot(table, false);
                    resnapshots += 1;
                    kept = reader.stored.clone();
                    reader.start().await;
                }
            }
            _ => {}
        }
    }
    writers.end().await;
    reader.start().await;
    reader.try_read(BatchLimit { rows: 100, bytes: 1 << 20 }).await.unwrap();
    for table in TABLES {
        reader.assert_equal(table).await;
    }
    assert!(reader.failed.is_empty() && reader.rejected.is_empty(), "{:?} {:?}", reader.failed, reader.rejected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_equals_the_tables_whatever_was_written_and_however_it_was_read() {
    run(seed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_equals_the_tables_with_other_choices() {
    run(seed().wrapping_mul(31).wrapping_add(7)).await;
}
