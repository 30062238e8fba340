//! Polled tables: nothing is lost or doubled, whatever is interrupted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::ErrorKind;
use shori_core::change::Op;
use shori_core::source::BatchLimit;
use shori_core::testing::memory_log::LogRow;
use shori_core::testing::value::Row;

use crate::harness::{LIMIT, Reader, polled, shown};
use crate::writers::seed;

const ITEMS: &str = "
create table items (id bigint primary key, note text, changed timestamptz not null default now());
create index on items (changed);
";
const SMALL: BatchLimit = BatchLimit { rows: 7, bytes: 1 << 20 };

pub async fn fresh(sql: &str, tables: &[&str]) -> Reader {
    let mut reader = Reader::fresh(sql, tables).await;
    polled(&mut reader.config, "changed");
    reader
}

/// Images that open a version in a history: a snapshot's row that is as it stands opens none.
pub fn versions(reader: &Reader, table: &str) -> BTreeMap<Row, Vec<LogRow>> {
    let mut versions: BTreeMap<Row, Vec<LogRow>> = BTreeMap::new();
    for image in reader.log(table) {
        let of_key = versions.entry(image.key()).or_default();
        let stands = of_key.last().is_some_and(|last| last.row == image.row);
        if !(image.op == Op::Snapshot && stands) {
            of_key.push(image.clone());
        }
    }
    versions
}

/// How many there are. Images may be more: while any transaction of the server is open, a row may come again.
pub fn count(reader: &Reader, table: &str) -> usize {
    versions(reader, table).values().flatten().count()
}

/// No version is as the one before.
#[track_caller]
pub fn assert_none_doubled(reader: &Reader, table: &str) {
    for (key, versions) in versions(reader, table) {
        for pair in versions.windows(2) {
            assert_ne!(pair[0].row, pair[1].row, "{table} has {key:?} twice: {pair:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_the_overlap_come_once() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.config.polls.as_mut().unwrap().overlap = Duration::from_secs(3600);
    reader.sql("insert into items select n, 'first' from generate_series(1, 50) n").await;
    reader.start().await;
    reader.read().await;
    reader.sql("update items set note = 'second', changed = now() where id <= 20").await;
    reader.read().await;
    assert_eq!(count(&reader, "items"), 70);
    let before = reader.watermark;
    for _ in 0..3 {
        reader.read().await;
        assert!(reader.watermark.boundary > before.boundary, "an idle table moves on");
        // Nothing but the log remembers.
        reader.start().await;
        reader.read().await;
    }
    assert_eq!(count(&reader, "items"), 70, "no row comes again");
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_starts_anew_after_every_batch_loses_and_doubles_nothing() {
    let seed = seed();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items select n, 'first' from generate_series(1, 300) n").await;
    let mut whole = 0;
    for round in 0..150 {
        reader.start().await;
        for _ in 0..random.random_range(1..6) {
            reader.step(SMALL).await.unwrap();
        }
        whole += u32::from(reader.snapshot("items").is_done());
        let (id, other) = (random.random_range(1..400), random.random_range(1..400));
        reader
            .sql(&format!(
                "update items set note = 'round {round}', changed = clock_timestamp() where id between {id} and {id} + 5;
                insert into items values ({other}, 'new {round}') on conflict do nothing"
            ))
            .await;
    }
    assert!(whole > 0, "the snapshot ends in parts");
    reader.start().await;
    reader.try_read(SMALL).await.unwrap();
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_snapshot_in_parts_passed_by_is_found_without_its_timestamp() {
    let mut reader =
        fresh("create table items (id bigint primary key, note text, changed timestamptz)", &["items"]).await;
    reader.config.snapshot_chunk_rows = 100;
    let wide = "insert into items select n, repeat('x', 500), '2020-01-01' from generate_series(1, 500) n";
    reader.sql(wide).await;
    // Room at the beginning, for rows of the end to move to.
    reader.sql("delete from items where id <= 100").await;
    reader.sql("vacuum items").await;
    reader.start().await;
    let limit = BatchLimit { rows: 150, bytes: 1 << 20 };
    reader.step(limit).await.unwrap();
    assert!(reader.has_begun("items") && !reader.snapshot("items").is_done());
    reader.source = None;
    reader.sql("update items set note = 'moved' where id > 450; insert into items values (1000, 'new', null)").await;
    reader.start().await;
    reader.try_read(limit).await.unwrap();
    reader.assert_equal("items").await;
    assert_none_doubled(&reader, "items");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_polls_do_not_see_a_resnapshot_mends() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items values (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')").await;
    reader.start().await;
    reader.read().await;
    reader.sql("update items set note = 'between', changed = now() where id = 1").await;
    reader.sql("update items set note = 'after', changed = now() where id = 1").await;
    reader.sql("delete from items where id = 2; update items set id = 30, changed = now() where id = 3").await;
    reader.sql("update items set note = 'untold' where id = 4").await;
    reader.read().await;
    let notes = |reader: &Reader| {
        let rows = reader.rows("items").into_iter().map(|row| row[..2].to_vec());
        shown(&rows.collect::<Vec<_>>())
    };
    // The row whose timestamp was not set came since the last poll: who wrote it tells.
    assert!(notes(&reader).starts_with("1,after 2,b 3,c 30,c 4,"), "{}", notes(&reader));
    assert!(!versions(&reader, "items").values().flatten().any(|image| image.row[1] == "between".into()));
    reader.sql("update items set changed = '2001-01-01'").await;
    reader.read().await;
    reader.sql("update items set note = 'unseen'").await;
    reader.read().await;
    assert!(!notes(&reader).contains("unseen"), "{}", notes(&reader));
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    assert_eq!(reader.snapshot("items").generation, 2);
    assert_eq!(notes(&reader), "1,unseen 30,unseen 4,unseen");
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_the_other_capture_is_refused() {
    let mut reader = fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items values (1, 'a')").await;
    reader.start().await;
    reader.read().await;
    let polls = reader.config.polls.take();
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceReplaced);
    assert!(error.to_string().contains("put back capture = \"timestamp\""), "{error}");
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.config.polls = polls;
    reader.config.tables[0].changed_at = Some("changed".into());
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceReplaced);
    assert!(error.to_string().contains("start with an empty log"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_consistent_at_a_boundary_though_a_poll_takes_many_batches() {
    let both = "
        create table items (id bigint primary key, n bigint, changed timestamptz not null default now());
        create table others (id bigint primary key, n bigint, changed timestamptz not null default now());
        insert into items select n, 0 from generate_series(1, 40) n;
        insert into others select n, 0 from generate_series(1, 40) n;";
    let mut reader = fresh(both, &["items", "others"]).await;
    reader.start().await;
    let mut boundaries = Vec::new();
    for round in 1..40 {
        let update = format!("set n = {round}, changed = now()");
        reader.sql(&format!("begin; update items {update}; update others {update}; commit")).await;
        for _ in 0..3 {
            reader.step(SMALL).await.unwrap();
            boundaries.push(reader.watermark.boundary);
        }
    }
    reader.try_read(LIMIT).await.unwrap();
    boundaries.push(reader.watermark.boundary);
    let mut seen = BTreeSet::new();
    for boundary in boundaries {
        let values = |table| reader.rows_at(table, &boundary).into_iter().map(|row| row[1].clone());
        let values: BTreeSet<_> = values("items").chain(values("others")).collect();
        assert!(values.len() <= 1, "half a transaction at {boundary}: {values:?}");
        seen.extend(values);
    }
    assert!(seen.len() > 3, "{seen:?}");
}
