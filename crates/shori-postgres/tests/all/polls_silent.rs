//! Servers that keep silent while tables are polled: the connection stands, and nothing comes.

use std::time::{Duration, Instant};

use shori_core::ErrorKind;
use shori_core::source::BatchLimit;

use crate::harness::{LIMIT, Reader, polled};
use crate::polls::{assert_none_doubled, count};
use crate::server::Server;

const ITEMS: &str = "
create table items (id bigint primary key, note text, changed timestamptz not null default now());
create index on items (changed);
insert into items select n, 'first' from generate_series(1, 300) n;";
const SMALL: BatchLimit = BatchLimit { rows: 50, bytes: 1 << 20 };
/// Far more than a limit of a few seconds needs to be noticed.
const NOTICED: Duration = Duration::from_secs(40);

/// The process that answers the reader.
async fn backend(reader: &Reader) -> i32 {
    let database = &reader.config.server.database;
    let query = format!(
        "select pid from pg_stat_activity
        where datname = '{database}' and application_name = 'shori' and backend_type = 'client backend'"
    );
    let found = reader.printed(&query).await;
    assert_eq!(found.len(), 1, "the source has one connection: {found:?}");
    found[0][0].as_ref().unwrap().parse().unwrap()
}

/// Polls on until that fails, as an ingestor would; whatever is waited for, a server that keeps silent ends it.
async fn until_given_up(reader: &mut Reader, server: &Server, pid: i32) {
    let begun = Instant::now();
    let reading = async {
        loop {
            match reader.step(SMALL).await {
                Ok(batch) => assert!(batch.more, "the poll that had begun has come to its end: nothing was silent"),
                Err(error) => return error,
            }
        }
    };
    let told = tokio::time::timeout(NOTICED, reading).await;
    server.thaw(pid);
    let error = told.unwrap_or_else(|_| panic!("not noticed within {NOTICED:?}"));
    println!("after {:?}: {error}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Unavailable, "it is tried again: {error}");
    let said = error.to_string();
    assert!(said.contains(&reader.config.server.name()) && said.contains("it has not answered for 10 s"), "{said}");
}

/// `first` poll: the one that reads the table whole. In the others, the changes since.
async fn is_given_up(server: &Server, first: bool, begun: bool) {
    let database = server.create_database().await;
    let mut reader = Reader::over(server, &database, ITEMS, &["items"]).await;
    polled(&mut reader.config, "changed");
    reader.config.server.statement_timeout = Duration::from_secs(5);
    reader.config.read_timeout = Duration::from_secs(5);
    reader.config.snapshot_chunk_rows = SMALL.rows;
    reader.start().await;
    if !first {
        reader.read().await;
        reader.sql("update items set note = 'second', changed = now() where id <= 200").await;
    }
    if begun {
        let batch = reader.step(SMALL).await.unwrap();
        assert!(batch.more && batch.rows() > 0, "it is in the middle of a poll");
    }
    let pid = backend(&reader).await;
    server.freeze(pid);
    // What others write meanwhile is not lost either.
    reader.sql("insert into items values (1000, 'meanwhile'); update items set note = 'meanwhile', changed = now() where id = 7").await;
    until_given_up(&mut reader, server, pid).await;
    // Woken, the process finds that nobody listens, and lets go of what the poll had held.
    reader.wait_for(&format!("not exists (select from pg_stat_activity where pid = {pid})")).await;
    reader.start_again().await.unwrap();
    reader.try_read(SMALL).await.unwrap();
    reader.sql("insert into items values (1001, 'after')").await;
    reader.try_read(LIMIT).await.unwrap();
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
    let least = if first { 302 } else { 502 };
    assert!(count(&reader, "items") >= least, "{} versions", count(&reader, "items"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_keeps_silent_in_a_poll_or_before_it_is_given_up_and_polled_on() {
    let server = Server::start(&[]);
    futures::join!(
        is_given_up(&server, true, true),
        is_given_up(&server, false, true),
        is_given_up(&server, false, false),
    );
}
