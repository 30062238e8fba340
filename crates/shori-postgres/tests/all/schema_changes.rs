//! Tables change their shape: what can be followed is, what cannot stops its own capture alone, with what to do.

use std::time::Duration;

use shori_core::change::Op;
use shori_core::source::BatchLimit;
use shori_core::{Error, ErrorKind};

use crate::harness::{Reader, shown, table};

const TWO: &str = "
    create table items (id bigint primary key, name text, size int);
    create table parts (id bigint primary key);
    insert into items values (1, 'a', 10); insert into parts values (1);";

async fn two() -> Reader {
    let mut reader = Reader::fresh(TWO, &["items", "parts"]).await;
    reader.start().await;
    reader.read().await;
    reader
}

/// The error that `items` alone has failed with; its neighbour goes on.
async fn failed(reader: &mut Reader) -> Error {
    reader.read_until("it is told", |reader| !reader.failed.is_empty()).await;
    let (id, error) = reader.failed.pop().unwrap();
    assert_eq!((id, reader.failed.len()), (reader.capture("items"), 0));
    let next: i64 = reader.value("select max(id) + 1 from parts").await.parse().unwrap();
    reader.sql(&format!("insert into parts values ({next})")).await;
    reader.read().await;
    reader.assert_equal("parts").await;
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_come_and_go() {
    let mut reader = two().await;
    for (change, sql) in [
        (
            "alter table items add column note text",
            "insert into items values (2, 'b', 20, 'n'); update items set note = 'm'",
        ),
        (
            "alter table items add column flag boolean default true",
            "insert into items (id) values (3); update items set name = 'z'",
        ),
        (
            "alter table items drop column size",
            "insert into items values (4, 'd', 'o', false); update items set name = 'y'",
        ),
        (
            "alter table items rename column note to remark",
            "insert into items (id, remark) values (5, 'p'); update items set name = 'x'",
        ),
        ("alter table items alter column name type varchar(40)", "update items set name = 'w'"),
    ] {
        reader.sql(change).await;
        reader.sql(sql).await;
        reader.read().await;
        reader.assert_equal("items").await;
        reader.assert_equal("parts").await;
    }
    let schema = reader.stored.known[&reader.capture("items")].schema.clone().unwrap();
    let names: Vec<&str> = schema.columns.fields().iter().map(|field| field.name().as_str()).collect();
    assert_eq!(names, ["id", "name", "remark", "flag"]);
    assert!(reader.failed.is_empty(), "{:?}", reader.failed);
}

/// In one transaction, read in parts and after a restart: each image has the columns of its moment.
#[tokio::test(flavor = "multi_thread")]
async fn columns_change_in_the_middle_of_a_transaction() {
    let mut reader = two().await;
    reader.source = None;
    reader
        .sql(
            "begin; insert into items values (2, 'b', 20); alter table items add column note text; \
              insert into items values (3, 'c', 30, 'n'); alter table items drop column size; \
              insert into items values (4, 'd', 'o'); update items set note = 'all'; commit",
        )
        .await;
    for rows in [1, 1, 2] {
        reader.start().await;
        let goal = reader.log("items").len() + 1;
        let limit = BatchLimit { rows, bytes: 1 << 20 };
        reader.read_until_with(limit, "something is read", |reader| reader.log("items").len() >= goal).await;
    }
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert_eq!(reader.log("items").len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retyped_column_stops_its_table_alone() {
    let mut reader = two().await;
    reader.sql("alter table items alter column size type bigint").await;
    reader.sql("insert into items values (2, 'b', 5000000000)").await;
    let error = failed(&mut reader).await;
    assert_eq!(error.kind(), ErrorKind::Schema, "{error}");
    assert!(error.to_string().contains("--retyped items"), "{error}");
    // The next start says the same.
    reader.stored.stopped.clear();
    reader.start().await;
    assert_eq!(reader.failed.pop().unwrap().1.kind(), ErrorKind::Schema);
    reader.resnapshot("items", true);
    reader.start().await;
    reader.stored.log.remove(&reader.capture("items"));
    reader.read().await;
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_anew_or_renamed_is_another() {
    let is_told = async |(sql, back): (&str, &str)| {
        let mut reader = two().await;
        reader.sql(sql).await;
        let error = failed(&mut reader).await;
        assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
        assert!(error.to_string().contains("shori resnapshot items"), "{error}");
        reader.sql(back).await;
        reader.resnapshot("items", false);
        reader.start().await;
        reader.read().await;
        reader.assert_equal("items").await;
    };
    // At once: each takes as long as it takes until the publication is looked at.
    let cases = [
        ("alter table items rename to old_items", "alter table old_items rename to items"),
        (
            "drop table items",
            "create table items (id bigint primary key, name text, size int); insert into items values (9, 'z', 9)",
        ),
        (
            "drop table items; create table items (id bigint primary key, name text, size int); \
             alter publication shori add table items; insert into items values (9, 'z', 9)",
            "",
        ),
    ];
    futures::future::join_all(cases.map(is_told)).await;
}

/// While nobody reads, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_made_anew_while_nobody_reads_is_another() {
    let mut reader = two().await;
    reader.source = None;
    reader.sql("drop table items; create table items (id bigint primary key, name text, size int)").await;
    reader.sql("insert into items values (9, 'z', 9)").await;
    reader.start().await;
    let error = failed(&mut reader).await;
    assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_swap_their_names_are_both_others() {
    let mut reader = two().await;
    reader
        .sql("begin; alter table items rename to swap; alter table parts rename to items; \
              alter table swap rename to parts; insert into items values (2); insert into parts values (2, 'b', 2); commit")
        .await;
    reader.read_until("both are told", |reader| reader.failed.len() >= 2).await;
    let ids: std::collections::BTreeSet<_> = reader.failed.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(ids.len(), 2, "{:?}", reader.failed);
}

/// Field 5.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_taken_out_of_the_publication_is_told_in_time() {
    let mut reader = two().await;
    reader.sql("alter publication shori drop table items").await;
    reader.sql("insert into items values (2, 'b', 20)").await;
    let begun = std::time::Instant::now();
    let error = failed(&mut reader).await;
    assert!(begun.elapsed() < Duration::from_secs(15), "after {:?}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
    reader.sql("alter publication shori add table items").await;
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

/// What was written since is not sent, whoever puts it back.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_taken_out_of_the_publication_while_nobody_reads_is_a_gap() {
    let mut reader = two().await;
    reader.source = None;
    reader.sql("alter publication shori drop table items").await;
    reader.sql("insert into items values (2, 'b', 20)").await;
    reader.start().await;
    let error = failed(&mut reader).await;
    assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
    assert!(error.remedy().is_some_and(|remedy| remedy.contains("shori resnapshot items")), "{error}");
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

/// Its deletes would come without their key.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_whose_key_is_no_longer_sent_is_told() {
    let mut reader = two().await;
    reader
        .sql(
            "alter table items alter column name set not null;
            create unique index items_name on items (name);
            alter table items replica identity using index items_name;
            delete from items where id = 1",
        )
        .await;
    let error = failed(&mut reader).await;
    assert!(error.to_string().contains("replica identity"), "{error}");
    assert!(!reader.ops("items").contains(&Op::Delete), "{:?}", reader.ops("items"));
}

/// The values of rows that nothing else touches are others, and nothing tells which.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_retyped_within_text_is_read_anew() {
    let mut reader = two().await;
    reader.sql("alter table items alter column name type varchar(50) using upper(name) || '!'").await;
    reader.sql("insert into items values (2, 'b', 20)").await;
    reader.read().await;
    reader.read_until("the table is read anew", |reader| reader.snapshot("items").is_done()).await;
    reader.read().await;
    reader.assert_equal("items").await;
}

/// What waits in the slot is of the type that the column had, which only its text tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_configured_as_text_and_retyped_while_nobody_reads_is_read_on_in_text_format() {
    let sql = "create table items (id bigint primary key, size numeric); insert into items values (1, 1.5)";
    let mut reader = Reader::fresh(sql, &["items"]).await;
    reader.config.tables[0].columns.insert("size".into(), "text".into());
    reader.start().await;
    reader.read().await;
    reader.source = None;
    reader.sql("insert into items values (2, 2.5)").await;
    reader.sql("alter table items alter column size type text; insert into items values (3, 'x')").await;
    reader.start().await;
    let error = reader.read_until_error().await;
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("in text format"), "{error}");
    reader.start_again().await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn domains_and_enums_are_carried_and_other_types_as_text_only() {
    let sql = "
        create domain positive as numeric(10, 2) check (value > 0);
        create domain strictly as positive;
        create type mood as enum ('sad', 'glad');
        create table items (id bigint primary key, price strictly, mood mood, span interval);
        create table parts (id bigint primary key);
        insert into items values (1, 1.50, 'sad', '1 day 02:00'); insert into parts values (1);";
    let mut reader = Reader::fresh(sql, &["items", "parts"]).await;
    reader.start().await;
    let error = failed(&mut reader).await;
    assert_eq!(error.kind(), ErrorKind::Schema, "{error}");
    assert!(error.to_string().contains("configure it as text"), "{error}");
    reader.stored.stopped.clear();
    reader.config.tables[0].columns.insert("span".into(), "text".into());
    reader.start().await;
    reader.read().await;
    reader.sql("alter type mood add value 'so so'").await;
    reader.sql("insert into items values (2, 2.25, 'so so', '-1 mons'), (3, null, null, null)").await;
    reader.read().await;
    let rows = shown(&reader.rows("items"));
    assert_eq!(
        rows, "1,Decimal(150),sad,1 day 02:00:00 2,Decimal(225),so so,-1 mons 3,-,-,-",
        "read by both the snapshot and the stream"
    );
}

/// The rows that are still to be read have another shape than those that were.
#[tokio::test(flavor = "multi_thread")]
async fn columns_come_and_go_while_the_table_is_read() {
    for change in [
        "alter table items drop column size",
        "alter table items add column note text",
        "alter table items rename column size to length",
    ] {
        let mut reader = Reader::fresh(TWO, &["items", "parts"]).await;
        reader.sql("insert into items select i, 'n', i from generate_series(2, 3000) i").await;
        reader.config.snapshot_chunk_rows = 500;
        reader.start().await;
        reader.read_until("some of it is read", |reader| reader.snapshot("items").rows >= 500).await;
        reader.sql(change).await;
        let is_over = |reader: &Reader| reader.snapshot("items").is_done() || !reader.failed.is_empty();
        reader.read_until("it is read", is_over).await;
        reader.sql("update items set name = 'm'").await;
        reader.read().await;
        assert!(reader.failed.is_empty(), "{change}: {:?}", reader.failed);
        reader.assert_equal("items").await;
    }
}

/// What an update does not bring is read from a table that has another shape by then.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_dropped_since_does_not_stop_the_completion_of_a_row() {
    let sql = "
        create table items (id bigint primary key, name text, size int, body text);
        insert into items
        select i, 'a', i, (select string_agg(md5(i || '.' || j), '') from generate_series(1, 200) j)
        from generate_series(1, 200) i;";
    let mut reader = Reader::fresh(sql, &["items"]).await;
    reader.config.snapshot_chunk_rows = 20;
    reader.start().await;
    reader.read_until("some of it is read", |reader| reader.snapshot("items").rows >= 40).await;
    reader.source = None;
    reader.sql("update items set name = 'b' where id > 100").await;
    reader.sql("alter table items drop column size").await;
    reader.sql("update items set name = 'c' where id = 1").await;
    reader.start().await;
    reader.read().await;
    assert!(reader.failed.is_empty(), "{:?}", reader.failed);
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_cannot_be_told_apart_is_refused_and_its_neighbour_read() {
    for (sql, remedy) in [
        ("create table items (id bigint)", "add one"),
        (
            "create table items (id bigint primary key); alter table items replica identity nothing",
            "replica identity default",
        ),
        ("create unlogged table items (id bigint primary key)", "set logged"),
        ("create view items as select 1 as id", ""),
    ] {
        let mut reader = Reader::fresh("create table parts (id bigint primary key)", &["parts"]).await;
        reader.sql(sql).await;
        reader.config.tables.push(table("items"));
        reader.start().await;
        let (id, error) = reader.failed.pop().expect("it fails");
        assert_eq!((id, error.kind()), (reader.capture("items"), ErrorKind::Schema), "{error}");
        assert!(error.to_string().contains(remedy), "{error}");
        reader.sql("insert into parts values (1)").await;
        reader.read().await;
        reader.assert_equal("parts").await;
    }
}
