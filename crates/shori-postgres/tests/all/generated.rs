//! Generated columns: not in the stream, and in the log all the same, with the value that each version had.

use std::time::Duration;

use rand::Rng;
use shori_core::ErrorKind;
use shori_core::change::Op;
use shori_core::source::BatchLimit;
use shori_core::testing::value::Value;

use crate::harness::{LIMIT, Reader, shown};
use crate::writers::{random, seed};

const ITEMS: &str = "
    create type mood as enum ('low', 'high');
    create table items (
        low text generated always as (lower(name)) stored,
        id bigint primary key,
        name text,
        size int,
        tags text[],
        feeling mood,
        area int generated always as (size * 2) stored,
        tagged int generated always as (coalesce(cardinality(tags), 0)) stored,
        is_high boolean generated always as (feeling = 'high') stored,
        fixed int generated always as (7) stored,
        rounded numeric(6, 2) generated always as (size * 0.333) stored,
        short varchar(40) generated always as (left(name, 40)) stored
    );
    alter table items alter column name set storage external;
    create table parts (id bigint primary key);
    insert into items (id, name, size, tags, feeling) values (1, 'ONE', 10, '{a,b}', 'high'), (2, null, null, null, null);";

/// The tags are an array, which is carried as text.
async fn items() -> Reader {
    let mut reader = Reader::fresh(ITEMS, &["items", "parts"]).await;
    for table in &mut reader.config.tables {
        if table.name == "items" {
            table.columns.insert("tags".into(), "text".into());
        }
    }
    reader
}

/// All but what is carried as text: then the stream is binary.
async fn items_in_binary() -> Reader {
    let reader = Reader::fresh(ITEMS, &["items", "parts"]).await;
    reader.sql("alter table items drop column tags cascade").await;
    reader
}

fn columns(reader: &Reader) -> Vec<String> {
    let schema = reader.stored.known[&reader.capture("items")].schema.clone().unwrap();
    schema.columns.fields().iter().map(|field| field.name().clone()).collect()
}

/// The values of a column in the images of the stream, in their order.
fn told(reader: &Reader, column: &str) -> Vec<(Op, Value)> {
    let index = columns(reader).iter().position(|name| name == column).unwrap();
    let images = reader.log("items").iter().filter(|row| row.op != Op::Snapshot);
    images.map(|row| (row.op, row.row[index].clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_version_has_its_own_values() {
    for mut reader in [items().await, items_in_binary().await] {
        reader.start().await;
        reader.read().await;
        reader.assert_equal("items").await;
        // By the time that it is read, the row is another.
        reader
            .sql(
                "update items set size = 11 where id = 1; update items set size = 12, name = 'TWO' where id = 1;
                 update items set id = 3, size = 13 where id = 1; insert into items (id, size) values (4, 14);
                 delete from items where id = 3; insert into items (id, name) values (5, 'FIVE');
                 update items set size = null, feeling = 'low' where id = 4",
            )
            .await;
        reader.read().await;
        reader.assert_equal("items").await;
        let integer = Value::Integer;
        let areas = told(&reader, "area");
        let expected = [
            (Op::UpdateAfter, integer(22)),
            (Op::UpdateAfter, integer(24)),
            (Op::UpdateBefore, Value::Null),
            (Op::UpdateAfter, integer(26)),
            (Op::Insert, integer(28)),
            (Op::Delete, Value::Null),
            (Op::Insert, Value::Null),
            (Op::UpdateAfter, Value::Null),
        ];
        assert_eq!(areas, expected);
        let lows: Vec<Value> = told(&reader, "low").into_iter().map(|(_, value)| value).take(2).collect();
        assert_eq!(lows, [Value::Text("one".into()), Value::Text("two".into())]);
        reader.sql("truncate items; insert into items (id, name) values (6, 'SIX')").await;
        reader.read().await;
        reader.assert_equal("items").await;
        assert!(reader.failed.is_empty() && reader.rejected.is_empty(), "{:?} {:?}", reader.failed, reader.rejected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_update_does_not_send_is_read() {
    let mut reader = items_in_binary().await;
    reader.sql("update items set name = repeat('LONG', 100000) where id = 1").await;
    reader.start().await;
    reader.read().await;
    reader.sql("update items set size = 99 where id = 1").await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert_eq!(told(&reader, "area"), [(Op::UpdateAfter, Value::Integer(198))]);
    // Gone before it can be read: then it is as it was.
    reader.source = None;
    reader.sql("update items set size = 100 where id = 1; delete from items where id = 1").await;
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert!(reader.failed.is_empty() && reader.rejected.is_empty(), "{:?} {:?}", reader.failed, reader.rejected);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_transactions_are_computed_in_parts() {
    let mut reader = items().await;
    reader.start().await;
    reader.read().await;
    reader
        .sql(
            "insert into items (id, name, size, tags)
             select n, case when n % 3 > 0 then 'N' || n end, nullif(n % 7, 0), case when n % 5 > 0 then array['x', null] end
             from generate_series(10, 1500) as n;
             update items set size = size + 1 where id % 2 = 0; delete from items where id % 10 = 0",
        )
        .await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert!(reader.failed.is_empty(), "{:?}", reader.failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn generated_columns_come_and_go() {
    let mut reader = items_in_binary().await;
    reader.start().await;
    reader.read().await;
    for (change, is_there, column) in [
        ("alter table items add column later int generated always as (size + 1000) stored", true, "later"),
        ("alter table items drop column area", false, "area"),
        (
            "alter table items add column plain int, add column made int generated always as (size - 1) stored",
            true,
            "made",
        ),
    ] {
        reader.sql(change).await;
        reader
            .sql("update items set size = size + 1; insert into items (id, size) select max(id) + 1, 5 from items")
            .await;
        let seen = format!("{change} is followed");
        reader.read_until(&seen, |reader| columns(reader).iter().any(|name| name == column) == is_there).await;
        reader.read().await;
        reader.assert_equal("items").await;
    }
    // While nobody reads.
    reader.source = None;
    reader
        .sql(
            "update items set size = 500 where id = 1; alter table items drop column made;
             alter table items add column twice int generated always as (size * 2) stored; update items set size = 501 where id = 1",
        )
        .await;
    reader.start().await;
    reader.read_until("it is followed", |reader| columns(reader).contains(&"twice".into())).await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert!(!columns(&reader).contains(&"made".into()));
    assert!(reader.failed.is_empty(), "{:?}", reader.failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_at_any_place_computes_the_same() {
    let mut random = random(seed());
    let mut reader = items().await;
    for round in 0..12 {
        reader.start().await;
        for _ in 0..random.random_range(1..12) {
            let id = random.random_range(1..20);
            let size = random.random_range(0..1000);
            let sql = match random.random_range(0..5) {
                0 => format!("delete from items where id = {id}"),
                1 => format!(
                    "update items set id = id + 100 where id = {id} and not exists (select from items where id = {id} + 100)"
                ),
                2 => format!("update items set name = repeat('R{size}', 3000) where id = {id}"),
                3 => format!("update items set size = {size}, tags = '{{a,{size}}}' where id = {id}"),
                _ => format!(
                    "insert into items (id, name, size, feeling) values ({id}, 'N{size}', {size}, 'high')
                     on conflict (id) do update set size = excluded.size"
                ),
            };
            reader.sql(&sql).await;
        }
        let limit = BatchLimit { rows: random.random_range(1..6), ..LIMIT };
        for _ in 0..random.random_range(0..6) {
            reader.step(limit).await.unwrap();
        }
        if round % 4 == 3 {
            reader.read().await;
            reader.assert_equal("items").await;
        }
    }
    assert!(reader.failed.is_empty() && reader.rejected.is_empty(), "{:?} {:?}", reader.failed, reader.rejected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_computed_is_refused_alone() {
    let mut reader = items_in_binary().await;
    reader
        .sql(
            "create function odd(int) returns int immutable language sql as 'select $1 + 1';
             alter table items add column odd int generated always as (odd(size)) stored;
             create or replace function odd(int) returns int immutable language sql as 'select $1 + 2';
             insert into parts values (1)",
        )
        .await;
    reader.start().await;
    let (id, error) = reader.failed.pop().unwrap();
    assert_eq!((id, error.kind()), (reader.capture("items"), ErrorKind::Schema), "{error}");
    assert!(
        error.to_string().contains("generated column odd holds something else than (odd(size))::integer gives"),
        "{error}"
    );
    reader.read().await;
    reader.assert_equal("parts").await;

    // It fails of itself.
    let mut reader = items_in_binary().await;
    reader
        .sql(
            "create function bad(int) returns int immutable language plpgsql as 'begin return $1; end';
             alter table items add column bad int generated always as (bad(size)) stored;
             create or replace function bad(int) returns int immutable language plpgsql as
                 'begin raise exception ''no such size''; end';
             insert into parts values (1)",
        )
        .await;
    reader.start().await;
    let (id, error) = reader.failed.pop().unwrap();
    assert_eq!((id, error.kind()), (reader.capture("items"), ErrorKind::Schema), "{error}");
    assert!(error.to_string().contains("no such size"), "{error}");
    reader.read().await;
    reader.assert_equal("parts").await;

    // It fails later.
    let mut reader = items_in_binary().await;
    reader
        .sql(
            "create function half(int) returns int immutable language plpgsql as 'begin return $1 / 2; end';
             alter table items add column half int generated always as (half(size)) stored",
        )
        .await;
    reader.start().await;
    reader.read().await;
    reader
        .sql(
            "insert into items (id, size) values (9, 9);
             create or replace function half(int) returns int immutable language plpgsql as
                 'begin raise exception ''no halves''; end'",
        )
        .await;
    reader.read_until("it is told", |reader| !reader.failed.is_empty()).await;
    let (id, error) = reader.failed.pop().unwrap();
    assert_eq!(id, reader.capture("items"));
    assert!(error.to_string().contains("no halves") && error.to_string().contains("table items"), "{error}");
    reader.sql("insert into parts values (2)").await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("parts")), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generated_key_is_refused() {
    let sql = "create table items (n int, id int generated always as (n + 1) stored primary key)";
    let mut reader = Reader::fresh(sql, &["items"]).await;
    reader.start().await;
    let (_, error) = reader.failed.pop().unwrap();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("its key column id is generated"), "{error}");
}

/// From PostgreSQL 18 on it may send them, and has virtual ones, which it never sends.
#[tokio::test(flavor = "multi_thread")]
async fn whether_they_are_sent_makes_no_difference() {
    let mut reader = items_in_binary().await;
    let can_send = reader.value("select current_setting('server_version_num')::int >= 180000").await == "t";
    if can_send {
        reader
            .sql(
                "alter table items add column seen int generated always as (size * 3) virtual;
                 create publication shori for table items, parts
                     with (publish_via_partition_root = true, publish_generated_columns = stored)",
            )
            .await;
    }
    reader.start().await;
    reader.read().await;
    for send in ["none", "stored", "none"] {
        let before = columns(&reader);
        if can_send {
            reader.sql(&format!("alter publication shori set (publish_generated_columns = {send})")).await;
        }
        reader
            .sql("update items set size = size + 1; insert into items (id, name) select max(id) + 1, 'M' from items")
            .await;
        reader.read().await;
        reader
            .read_until("all columns are there", |reader| {
                let mut now = columns(reader);
                let mut before = before.clone();
                now.sort();
                before.sort();
                now == before
            })
            .await;
        reader.read().await;
        reader.assert_equal("items").await;
        reader.start().await;
        reader.sql("update items set size = size + 1").await;
        reader.read().await;
        reader.assert_equal("items").await;
    }
    assert!(reader.failed.is_empty() && reader.rejected.is_empty(), "{:?} {:?}", reader.failed, reader.rejected);
}

/// A batch takes many statements: it is each of them that must end in time.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_long_to_compute_comes_in_the_end() {
    let mut reader = items_in_binary().await;
    reader
        .sql(
            "create function slow(int) returns int immutable language plpgsql as
                 'begin perform pg_sleep(0.01); return $1; end';
             alter table items add column slow int generated always as (slow(size)) stored",
        )
        .await;
    // With what an answer may take longer, eight seconds in all.
    reader.config.server.statement_timeout = Duration::from_secs(3);
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items (id, size) select n, n from generate_series(10, 900) as n").await;
    reader.read().await;
    reader.assert_equal("items").await;
}
