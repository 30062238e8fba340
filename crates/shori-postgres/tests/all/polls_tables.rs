//! What tables may be polled, by what columns, and what becomes of those that change.

use shori_core::change::Op;
use shori_core::{Error, ErrorKind};

use crate::harness::{LIMIT, Reader, address, polled, shown, table};
use crate::polls::{assert_none_doubled, count, fresh, versions};
use crate::server::Server;

const ITEMS: &str =
    "create table items (id bigint primary key, note text, changed timestamptz not null default now());";

#[tokio::test(flavor = "multi_thread")]
async fn a_column_without_zone_is_read_in_whatever_zone_it_is() {
    for zone in ["America/New_York", "Asia/Tokyo", "UTC"] {
        for written in ["America/New_York", "Asia/Tokyo", "UTC"] {
            let sql = format!(
                "create table items (id bigint primary key, note text, changed timestamp not null default (now() at time zone '{written}'))"
            );
            let mut reader = fresh(&sql, &["items"]).await;
            reader.sql(&format!("alter database {} set timezone = '{zone}'", reader.config.server.database)).await;
            reader.sql("insert into items values (1, 'first')").await;
            reader.start().await;
            reader.read().await;
            for id in 2..=4 {
                reader.sql(&format!("insert into items values ({id}, 'later')")).await;
                reader.read().await;
            }
            assert_eq!(count(&reader, "items"), 4, "{written} in a database of {zone}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn timestamps_that_are_no_measure_blind_nobody() {
    let mut reader =
        fresh("create table items (id bigint primary key, note text, changed timestamptz)", &["items"]).await;
    reader.sql("insert into items values (1, 'a', 'infinity'), (2, 'b', '2999-01-01'), (3, 'c', null), (4, 'd', '-infinity')").await;
    reader.start().await;
    reader.read().await;
    // What Arrow has no timestamp for is kept among what was rejected.
    assert_eq!((count(&reader, "items"), reader.rejected.len()), (2, 2), "{:?}", reader.rejected);
    reader.sql("insert into items values (5, 'e', now())").await;
    reader.read().await;
    reader
        .sql("insert into items values (6, 'f', null); update items set note = 'g', changed = now() where id = 5")
        .await;
    reader.read().await;
    let seen: Vec<String> = reader.log("items").iter().map(|image| format!("{:?}", image.row[1])).collect();
    assert!(["\"e\"", "\"f\"", "\"g\""].iter().all(|note| seen.iter().any(|seen| seen.contains(note))), "{seen:?}");
    let before = count(&reader, "items");
    reader.read().await;
    assert_eq!(count(&reader, "items"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_as_a_snapshot_has_it() {
    let sql = "
        create type mood as enum ('good', 'bad');
        create table items (
            id bigint primary key, b boolean, i2 smallint, i4 int, f4 real, f8 double precision, n numeric(20, 4),
            t text, v varchar(10), c char(5), y bytea, d date, tm time, ts timestamp, tz timestamptz, u uuid,
            j json, jb jsonb, m mood, span interval, twice bigint generated always as (i4 * 2) stored,
            changed timestamptz not null default now()
        );
        insert into items select n, true, 2, 3, 0.1, 0.2, 12345.6789, 'text', 'v', 'c', '\\x00ff', '2024-02-29', '12:34:56.789012',
            '2024-02-29 01:02:03.456789', '2024-02-29 01:02:03.456789+02', '00000000-0000-0000-0000-000000000001',
            '{\"a\": 1}', '{\"a\": 1}', 'bad', '1 day' from generate_series(1, 2) n;
        insert into items (id) values (3);";
    let mut reader = fresh(sql, &["items"]).await;
    reader.config.tables[0].columns.insert("span".into(), "text".into());
    reader.start().await;
    reader.read().await;
    reader.sql("update items set changed = now()").await;
    reader.read().await;
    assert!(reader.rejected.is_empty(), "{:?}", reader.rejected);
    let columns = reader.log("items")[0].row.len() - 1;
    assert_eq!((count(&reader, "items"), columns), (6, 21), "generated columns are read, too");
    for images in versions(&reader, "items").values() {
        let [snapshot, poll] = &images[..] else { panic!("{images:?}") };
        assert_eq!((snapshot.op, poll.op), (Op::Snapshot, Op::UpdateAfter));
        assert_eq!(snapshot.row[..columns], poll.row[..columns]);
        assert!(poll.row[columns] > snapshot.row[columns]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_is_one() {
    let sql = "
        create table items (id bigint primary key, note text, changed timestamptz not null default now())
            partition by range (id);
        create table low partition of items for values from (0) to (100);
        create table high partition of items for values from (100) to (200);
        insert into items select n, 'first' from generate_series(50, 149) n;";
    let mut reader = fresh(sql, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("update items set note = 'second', changed = now() where id % 3 = 0").await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
    assert_eq!(count(&reader, "items"), 133);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_added_column_flows_through_and_a_dropped_one_is_null() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items values (1, 'a'), (2, 'b')").await;
    reader.start().await;
    reader.read().await;
    reader.sql("alter table items add column channel text default 'web'").await;
    reader.read().await;
    assert_eq!(reader.snapshot("items").generation, 2, "rows have values for it already");
    reader.assert_equal("items").await;
    reader
        .sql("alter table items add column empty text; update items set empty = 'x', changed = now() where id = 1")
        .await;
    reader.read().await;
    assert_eq!(reader.snapshot("items").generation, 2);
    reader.assert_equal("items").await;
    reader.sql("alter table items drop column note; update items set changed = now() where id = 1").await;
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

#[track_caller]
fn assert_told(told: &[(shori_core::position::CaptureId, Error)], parts: &[&str]) {
    let [(_, error)] = told else { panic!("{told:?}") };
    for part in parts {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_polled_is_told_with_its_remedy() {
    for (sql, column, parts) in [
        (ITEMS, "changed_on", &["table public.items", "has no column changed_on", "name as changed_at"][..]),
        (ITEMS, "note", &["table public.items", "column note", "is of type text"]),
        ("create table items (id bigint, changed timestamptz)", "changed", &["no primary key"]),
        ("create view items as select 1 as id, now() as changed", "changed", &["it is no table"]),
        ("create table others (id bigint primary key)", "changed", &["table public.items", "does not exist"]),
    ] {
        let mut reader = Reader::fresh(sql, &["items"]).await;
        polled(&mut reader.config, column);
        reader.start().await;
        assert_told(&reader.failed, parts);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_table_stops_itself_alone() {
    for (damage, parts) in [
        ("revoke select on items from ROLE", &["table public.items", "run: grant select on public.items to"][..]),
        ("drop table items", &["table public.items", "does not exist"]),
        (
            "drop table items; create table items (id bigint primary key, changed timestamptz); grant select on items to ROLE",
            &["created again", "shori resnapshot items"],
        ),
        (
            "alter table items alter column note type int using 1",
            &["column note was text and is int32", "resnapshot --retyped items"],
        ),
        ("alter table items alter column changed type date", &["column changed was timestamptz and is date"]),
        ("alter table items drop column changed", &["has no column changed"]),
        ("alter table items drop constraint items_pkey", &["no primary key"]),
    ] {
        let sql = format!("{ITEMS} create table others (like items including all)");
        let mut reader = fresh(&sql, &["items", "others"]).await;
        let role = format!("reader_of_{}", reader.config.server.database);
        reader.sql(&format!("create role {role} login; grant select on items, others to {role}")).await;
        reader.config.server = address(Server::shared(), &reader.config.server.database);
        reader.config.server.user = role.clone();
        reader.sql("insert into items values (1, 'a'); insert into others values (1, 'a')").await;
        reader.start().await;
        reader.read().await;
        reader.sql(&damage.replace("ROLE", &role)).await;
        reader.sql("insert into others values (2, 'b')").await;
        reader.read().await;
        assert_told(&reader.failed, parts);
        assert_eq!(count(&reader, "others"), 2, "{damage}");
        reader.assert_equal("others").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_added_is_read_and_one_made_anew_after_a_resnapshot() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items values (1, 'a')").await;
    reader.start().await;
    reader.read().await;
    reader.sql("create table others (like items including all); insert into others values (1, 'o')").await;
    reader.config.tables.push(table("others"));
    polled(&mut reader.config, "changed");
    reader.start().await;
    reader.read().await;
    reader.assert_equal("others").await;
    reader.sql("drop table items").await;
    reader.sql(&format!("{ITEMS} insert into items values (7, 'new')")).await;
    reader.try_read(LIMIT).await.unwrap();
    assert_eq!(reader.failed[0].1.kind(), ErrorKind::Gap);
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert!(shown(&reader.rows("items")).starts_with("7,new"), "{}", shown(&reader.rows("items")));
}
