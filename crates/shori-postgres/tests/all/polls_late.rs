//! Transactions that commit after a poll has passed the time at which they began.

use tokio_postgres::Client;

use crate::harness::{Reader, address};
use crate::polls::{assert_none_doubled, count, fresh};
use crate::server::Server;

const ITEMS: &str =
    "create table items (id bigint primary key, note text, changed timestamptz not null default now());";

async fn other(reader: &Reader) -> Client {
    Server::shared().connect(&reader.config.server.database).await
}

/// As who may only read.
async fn as_reader(reader: &mut Reader) {
    let role = format!("reader_of_{}", reader.config.server.database);
    reader.sql(&format!("create role {role} login; grant select on all tables in schema public to {role}")).await;
    reader.config.server = address(Server::shared(), &reader.config.server.database);
    reader.config.server.user = role;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_commit_is_seen_however_late() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    let late = other(&reader).await;
    reader.start().await;
    reader.read().await;
    // It writes only after polls have passed its time.
    late.batch_execute("begin; select now()").await.unwrap();
    for id in 1..=4 {
        reader.sql(&format!("insert into items values ({id}, 'early')")).await;
        reader.read().await;
    }
    late.batch_execute("insert into items values (5, 'late')").await.unwrap();
    reader.read().await;
    reader.sql("insert into items values (6, 'early')").await;
    reader.read().await;
    reader.start().await;
    late.batch_execute("commit").await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
    reader.start().await;
    reader.read().await;
    assert_none_doubled(&reader, "items");
    assert_eq!(count(&reader, "items"), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_a_transaction_are_seen_with_it() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    let late = other(&reader).await;
    reader.start().await;
    reader.read().await;
    let parts = "begin; insert into items values (1, 'late'); savepoint a; insert into items values (2, 'part')";
    late.batch_execute(parts).await.unwrap();
    reader.sql("insert into items values (3, 'between')").await;
    late.batch_execute("savepoint b; insert into items values (4, 'part')").await.unwrap();
    reader.read().await;
    let images = reader.log("items").len();
    assert_eq!(images, 1);
    for _ in 0..3 {
        reader.read().await;
    }
    assert_eq!(reader.log("items").len(), images, "what is remembered does not come again");
    reader.start().await;
    reader.read().await;
    late.batch_execute("commit").await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
    assert_eq!(count(&reader, "items"), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_read_sees_what_had_been_written_before_the_last_poll() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    as_reader(&mut reader).await;
    let late = other(&reader).await;
    late.batch_execute("begin; insert into items values (1, 'late')").await.unwrap();
    reader.start().await;
    reader.read().await;
    let later = other(&reader).await;
    later.batch_execute("begin; insert into items values (2, 'late')").await.unwrap();
    for id in 3..=6 {
        reader.sql(&format!("insert into items values ({id}, 'early')")).await;
        reader.read().await;
    }
    late.batch_execute("commit").await.unwrap();
    reader.read().await;
    later.batch_execute("commit").await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_prepared_is_seen_when_it_commits() {
    let server = Server::start(&[("max_prepared_transactions", "5")]);
    let database = server.create_database().await;
    let mut reader = Reader::over(&server, &database, ITEMS, &["items"]).await;
    crate::harness::polled(&mut reader.config, "changed");
    reader.start().await;
    reader.read().await;
    reader.sql("begin; insert into items values (1, 'late'); prepare transaction 'two'").await;
    for id in 2..=4 {
        reader.sql(&format!("insert into items values ({id}, 'early')")).await;
        reader.read().await;
    }
    reader.start().await;
    reader.sql("commit prepared 'two'").await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
}
