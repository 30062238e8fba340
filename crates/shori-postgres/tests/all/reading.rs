//! What is committed is read: every kind of change, whole, in order, at its time.

use shori_core::change::Op;
use shori_core::source::BatchLimit;

use crate::harness::{Reader, shown};
use crate::server::Server;

const TWO_TABLES: &str = "
    create table items (id bigint primary key, name text);
    create table parts (a int, b text, size bigint, primary key (b, a));";

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_comes_as_what_it_is() {
    let mut reader = Reader::fresh(TWO_TABLES, &["items", "parts"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items values (1, 'a'), (2, null); update items set name = 'b' where id = 1").await;
    reader.sql("delete from items where id = 2").await;
    reader.read().await;
    use Op::{Delete, Insert, Truncate, UpdateAfter, UpdateBefore};
    assert_eq!(reader.ops("items"), [Insert, Insert, UpdateAfter, Delete]);
    assert_eq!(shown(&reader.rows("items")), "1,b");
    reader.sql("update items set id = 7 where id = 1; truncate items; insert into items values (7, 'c')").await;
    reader.read().await;
    assert_eq!(reader.ops("items")[4..], [UpdateBefore, UpdateAfter, Truncate, Insert]);
    assert_eq!(shown(&reader.rows("items")), "7,c");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_comes_and_goes_in_one_transaction_ends_as_the_source_has_it() {
    let mut reader = Reader::fresh(TWO_TABLES, &["items", "parts"]).await;
    reader.start().await;
    for transaction in [
        "insert into items values (1, 'a'); delete from items; insert into items values (1, 'b')",
        "delete from items where id = 1; insert into items values (1, 'c'); update items set id = 2; update items set id = 1",
        "insert into items values (3, 'x'); delete from items where id = 3",
        "insert into parts values (1, 'x', 5), (2, 'x', 6); update parts set a = 3 - a where false; \
         update parts set a = a + 10; update parts set size = size + 1; insert into items values (4, 'd')",
        "update parts set b = 'y', a = 1 where a = 11; delete from parts where a = 12; insert into parts values (12, 'x', 0)",
        "truncate items, parts; insert into items values (9, 'z')",
        "insert into parts values (1, 'x', 1)",
    ] {
        reader.sql(&format!("begin; {transaction}; commit")).await;
        reader.read().await;
        reader.assert_equal("items").await;
        reader.assert_equal("parts").await;
    }
    assert_eq!(shown(&reader.rows("items")), "9,z");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rolled_back_is_not_there_and_what_is_empty_moves_on() {
    let mut reader = Reader::fresh(TWO_TABLES, &["items", "parts"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("begin; insert into items values (1, 'no'); rollback").await;
    reader.sql("begin; commit").await;
    reader
        .sql(
            "begin; insert into items values (1, 'a'); savepoint s; insert into items values (2, 'no'); \
              update items set name = 'no' where id = 1; rollback to s; savepoint t; \
              insert into items values (3, 'c'); release t; commit",
        )
        .await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("items")), "1,a 3,c");
    assert_eq!(reader.ops("items").len(), 2);
    let before = reader.watermark;
    reader.sql("create table other (id int); insert into other values (1)").await;
    reader.read().await;
    assert!(reader.watermark.boundary > before.boundary);
    assert_eq!(reader.ops("items").len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_times_are_the_sources_to_the_microsecond() {
    let server = Server::start(&[("track_commit_timestamp", "on")]);
    let database = server.create_database().await;
    let mut reader = Reader::over(&server, &database, TWO_TABLES, &["items", "parts"]).await;
    reader.start().await;
    reader.read().await;
    for id in 0..20 {
        reader.sql(&format!("insert into items values ({id}, 'a')")).await;
    }
    reader.read().await;
    let times = "
        select id, (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1000000)::int8 from items";
    let times = reader.printed(times).await;
    let log = reader.log("items");
    let mut read: Vec<_> =
        log.iter().map(|row| vec![Some(row.row[0].integer().to_string()), Some(row.commit_time.to_string())]).collect();
    read.sort();
    assert_eq!(read, times);
    let newest = log.iter().map(|row| row.commit_time).max().unwrap();
    assert_eq!(reader.watermark.boundary_time, newest);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_are_split_by_limits_and_never_half_visible() {
    let mut reader = Reader::fresh(TWO_TABLES, &["items", "parts"]).await;
    reader.start().await;
    reader.read().await;
    reader
        .sql(
            "begin; insert into items select i, 'a' from generate_series(1, 500) i; \
              insert into parts select i, 'p', i from generate_series(1, 500) i; commit",
        )
        .await;
    reader.sql("begin; update items set name = 'b'; delete from parts where a > 400; commit").await;
    reader.try_read(BatchLimit { rows: 7, bytes: 1 << 20 }).await.unwrap();
    let (mut items, mut parts) = (reader.replay("items"), reader.replay("parts"));
    let mut seen = std::collections::BTreeSet::new();
    for boundary in &reader.boundaries {
        items.advance(boundary);
        parts.advance(boundary);
        seen.insert((items.rows.len(), parts.rows.len()));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 0), (500, 400), (500, 500)]);
}

/// Field 1 and 8: with limits that split it, a large transaction arrives whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_300_000_rows_comes_whole() {
    let mut reader = Reader::fresh("create table items (id bigint primary key, name text)", &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items select i, 'name ' || i from generate_series(1, 300000) i").await;
    let limit = BatchLimit { rows: 10_000, bytes: 1 << 20 };
    let batches = reader.try_read(limit).await.unwrap();
    assert!(batches.len() >= 30, "{} batches", batches.len());
    let log = reader.log("items");
    assert_eq!(log.len(), 300_000);
    assert!(log.iter().zip(1..).all(|(row, id)| row.row[0].integer() == id && row.op == Op::Insert));
    let (first, last) = (log[0].position, log[299_999].position);
    let inside = reader.boundaries.range(first..last).count();
    assert_eq!(inside, 0, "boundaries in the middle of it");
    assert!(reader.watermark.boundary > last);
}

/// Text that no compression makes shorter, of `bytes`, different for each `seed`.
fn incompressible(seed: &str, bytes: usize) -> String {
    let pieces = bytes.div_ceil(32);
    format!("(select left(string_agg(md5({seed} || '.' || i), ''), {bytes}) from generate_series(1, {pieces}) i)")
}

/// Field 11: the value of a sibling that was updated is marked, not lost.
#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_large_value_is_marked_and_kept() {
    let mut reader =
        Reader::fresh("create table files (id bigint primary key, name text, body text)", &["files"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql(&format!("insert into files values (1, 'a', {})", incompressible("'x'", 1 << 20))).await;
    reader.sql("update files set name = 'b'").await;
    reader.read().await;
    let log = reader.log("files");
    assert_eq!((log[0].unchanged.len(), log[1].unchanged.as_slice()), (0, &[2][..]));
    reader.assert_equal("files").await;
    reader.sql(&format!("update files set body = {}", incompressible("'y'", 1 << 20))).await;
    reader.sql("update files set name = null").await;
    reader.read().await;
    reader.assert_equal("files").await;
}

/// Only the key's own earlier images are looked at for what is marked: another key has none.
#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_large_value_goes_along_with_its_key() {
    let mut reader =
        Reader::fresh("create table files (id bigint primary key, name text, body text)", &["files"]).await;
    reader.start().await;
    reader.sql(&format!("insert into files values (1, 'a', {})", incompressible("'x'", 100_000))).await;
    reader.read().await;
    reader.sql("update files set id = 2").await;
    reader.read().await;
    reader.assert_equal("files").await;
    reader.sql("begin; update files set id = 3; update files set id = 4; update files set name = 'c'; commit").await;
    reader.sql("begin; update files set id = 5; delete from files; commit").await;
    reader.read().await;
    reader.assert_equal("files").await;
}

/// An index holds values of up to 2,704 bytes; the row itself keeps those above 2,000 out of line.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_kept_out_of_line_is_there() {
    let mut reader =
        Reader::fresh("create table files (path text primary key, name text, size bigint)", &["files"]).await;
    reader.start().await;
    reader.read().await;
    for seed in ["'x'", "'y'", "'z'"] {
        reader.sql(&format!("insert into files values ({}, 'a', 1)", incompressible(seed, 2500))).await;
    }
    reader.read().await;
    reader.sql("update files set name = 'b'").await;
    reader.read().await;
    reader.assert_equal("files").await;
    reader.sql("update files set path = 'short' where path = (select min(path) from files)").await;
    reader.sql("delete from files where path = (select max(path) from files where path <> 'short')").await;
    reader.read().await;
    reader.assert_equal("files").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_identity_brings_large_values_from_the_old_row() {
    let sql =
        "create table files (id bigint primary key, name text, body text); alter table files replica identity full";
    let mut reader = Reader::fresh(sql, &["files"]).await;
    reader.start().await;
    reader.sql(&format!("insert into files values (1, 'a', {})", incompressible("'x'", 100_000))).await;
    reader.sql("insert into files values (2, null, null)").await;
    reader.read().await;
    reader
        .sql("update files set name = 'b'; update files set id = 3 where id = 1; delete from files where id = 2")
        .await;
    reader.read().await;
    assert!(reader.log("files").iter().all(|row| row.unchanged.is_empty()));
    use Op::{Delete, Insert, Snapshot, UpdateAfter, UpdateBefore};
    let first = reader.ops("files").iter().filter(|op| matches!(op, Insert | Snapshot)).count();
    assert_eq!(reader.ops("files")[first..], [UpdateAfter, UpdateAfter, UpdateBefore, UpdateAfter, Delete]);
    reader.assert_equal("files").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_told_apart_by_the_index_of_their_identity() {
    let sql = "
        create table codes (id bigint, code text not null, name text, unique (code));
        alter table codes replica identity using index codes_code_key;
        insert into codes values (1, 'x', 'a'), (2, 'y', 'b');";
    let mut reader = Reader::fresh(sql, &["codes"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("update codes set id = id + 10; update codes set code = 'z' where code = 'x'").await;
    reader.sql("delete from codes where code = 'y'; insert into codes values (12, 'y', null)").await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("codes")), "11,z,a 12,y,-");
    reader.assert_equal("codes").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_are_the_same_when_read_again_from_the_middle_of_a_transaction() {
    let images = |reader: &Reader| reader.stored.log.values().map(Vec::len).sum::<usize>();
    for rows in [1, 2, 3, 11] {
        let mut reader = Reader::fresh(TWO_TABLES, &["items", "parts"]).await;
        reader.start().await;
        reader.read().await;
        // Each start lets go of what is below: what was read by then is stored.
        reader.acknowledges = false;
        let before = reader.stored.clone();
        for first in [0, 100, 200] {
            let sql = format!(
                "begin; insert into items select i, 'a' from generate_series({first}, {first} + 30) i; \
                 insert into parts select i, 'p', i from generate_series({first}, {first} + 5) i; \
                 update items set id = id + 1000 where id > {first} and id < {first} + 4; commit"
            );
            reader.sql(&sql).await;
        }
        reader.read().await;
        let whole = std::mem::replace(&mut reader.stored, before);
        let all = whole.log.values().map(Vec::len).sum::<usize>();
        while images(&reader) < all {
            reader.start().await;
            let goal = (images(&reader) + 17).min(all);
            let limit = BatchLimit { rows, bytes: 1 << 20 };
            reader.read_until_with(limit, "some images are read", |reader| images(reader) >= goal).await;
        }
        assert_eq!(reader.stored.log, whole.log);
        reader.start().await;
        reader.read().await;
        reader.assert_equal("items").await;
        reader.assert_equal("parts").await;
    }
}

/// Each keeps up with what is read, however long nothing was written to it.
#[tokio::test(flavor = "multi_thread")]
async fn of_five_hundred_tables_all_but_one_are_idle() {
    const TABLES: usize = 500;
    let names: Vec<String> = (0..TABLES).map(|number| format!("t{number}")).collect();
    let tables: Vec<&str> = names.iter().map(String::as_str).collect();
    let create = |name: &String| {
        format!("create table {name} (id bigint primary key, n int); insert into {name} values (1, 0);")
    };
    let mut reader = Reader::fresh(&names.iter().map(create).collect::<String>(), &tables).await;
    reader.start().await;
    reader.read().await;
    for round in 1..=20 {
        reader
            .sql(&format!("update t7 set n = {round} where id = 1; insert into t7 values (10 + {round}, {round})"))
            .await;
        reader.read().await;
        let behind = reader.stored.known.values().filter(|known| known.watermark != reader.watermark).count();
        assert_eq!(behind, 0, "tables whose watermark stays");
    }
    assert_eq!(reader.log("t7").len(), 1 + 40);
    assert_eq!(reader.log("t8").len(), 1);
    reader.assert_equal("t7").await;
    let slot = format!(
        "select restart_lsn > '0/0' and active from pg_replication_slots where slot_name = '{}'",
        reader.config.slot
    );
    assert_eq!(reader.value(&slot).await, "t");
}
