//! Positions, boundaries, snapshots, waiting and pruning.

use std::time::{Duration, Instant};

use shori_core::change::Op;
use shori_core::error::ErrorKind;
use shori_core::position::Position;
use shori_core::source::{BatchLimit, Source};
use shori_sqlite::SqliteTable;

use crate::harness::{ALL, Fixture};

const ONE: BatchLimit = BatchLimit { rows: 1, bytes: 1 << 20 };

fn fixture(rows: usize) -> Fixture {
    let fixture = Fixture::new(
        "create table a (id integer primary key, v int); create table b (id text primary key not null, v int);
         create table idle (id integer primary key);",
        ["a", "b", "idle"].map(SqliteTable::new).to_vec(),
    );
    let fill = "with recursive n (i) as (select 1 union all select i + 1 from n where i < ";
    if rows > 0 {
        fixture.run(&format!("{fill}{rows}) insert into a select i, i from n;"));
        fixture.run(&format!("{fill}{rows}) insert into b select 'k' || i, i from n;"));
    }
    fixture
}

#[test]
fn spec4_04_rows_before_capture_are_there_without_gap_or_duplicate() {
    let mut fixture = fixture(25);
    fixture.config.snapshot_chunk_rows = 4;
    let mut reader = fixture.reader();
    reader.start().unwrap();
    let mut step = 0;
    while !reader.all_read() {
        reader.next(BatchLimit { rows: 5, bytes: 1 << 20 }).unwrap();
        step += 1;
        fixture.run(&format!(
            "update a set v = {step} where id in ({step}, 26 - {step}); update or ignore a set id = 100 - id where id = {step};
             insert into b values ('new{step}', 0); delete from b where v = {step};"
        ));
        if step % 3 == 0 {
            reader.start().unwrap();
        }
    }
    reader.drain(ALL);
    for table in ["a", "b", "idle"] {
        assert_eq!(reader.rows(table), fixture.rows(&reader.schemas[&reader.id(table)]), "{table}");
    }
    let seen = reader.images.iter().filter(|image| image.op == Op::Snapshot && image.capture == "a");
    let mut keys: Vec<_> = seen.map(|image| image.key.clone()).collect();
    let all = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), all, "a row was read twice");
}

#[test]
fn empty_tables_are_done_at_once_and_every_place_is_a_boundary_when_nothing_happens() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    assert!(reader.all_read());
    assert_eq!(reader.watermark.boundary, reader.watermark.staged);
    let before = reader.watermark;
    reader.drain(ALL);
    assert_eq!(reader.watermark, before);
    reader.start().unwrap();
    reader.drain(ALL);
    assert_eq!(reader.watermark, before);
}

#[test]
fn a_transaction_may_span_batches_but_the_boundary_waits_for_its_end() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let before = reader.watermark.boundary;
    fixture.run("begin; insert into a values (1, 1), (2, 2); insert into b values ('x', 1); commit;");
    for _ in 0..2 {
        let batch = reader.next(ONE).unwrap();
        assert_eq!((batch.rows(), batch.more, batch.watermark.boundary), (1, true, before));
    }
    let batch = reader.next(ONE).unwrap();
    assert_eq!((batch.rows(), batch.more), (1, false));
    assert_eq!(batch.watermark.boundary, batch.watermark.staged);
    assert!(batch.watermark.boundary_time > 1_700_000_000_000_000);
}

#[test]
fn positions_are_the_same_on_every_reading() {
    let fixture = fixture(3);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let (watermark, from) = (reader.watermark, reader.images.len());
    fixture.run("insert into a values (10, 1); update a set id = 11 where id = 10; delete from b;");
    reader.drain(ONE);
    let first = reader.images.split_off(from);
    reader.watermark = watermark;
    reader.start().unwrap();
    reader.drain(ALL);
    let mut second = reader.images.split_off(from);
    second.sort_by_key(|image| image.position);
    assert_eq!(first, second);
}

#[test]
fn spec4_05_a_gap_is_an_error_with_a_remedy_and_never_a_false_one() {
    let fixture = fixture(1);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let behind = reader.watermark;
    fixture.run("insert into a values (5, 5); insert into b values ('x', 5);");
    reader.drain(ALL);
    // Clocks are milliseconds: what is not older than now is kept.
    let pruned = "select max(pruned_to) from _shori_captures";
    while fixture.number(pruned) == 0 {
        reader.acknowledge();
    }
    fixture.run("insert into idle values (1);");
    reader.drain(ALL);
    while fixture.number("select count(*) from _shori_changes") > 1 {
        reader.acknowledge();
    }
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 1);
    reader.start().unwrap();
    assert!(reader.started.as_ref().unwrap().failed.is_empty());
    reader.watermark = behind;
    reader.start().unwrap();
    let failed = &reader.started.as_ref().unwrap().failed;
    let gaps: Vec<_> = failed.iter().map(|(id, error)| (&*id.instance, error.kind(), error.remedy())).collect();
    let gap = |table, remedy| (table, ErrorKind::Gap, Some(remedy));
    assert_eq!(gaps, [gap("a", "run shori resnapshot a"), gap("b", "run shori resnapshot b")]);
    let text = failed[0].1.to_string();
    assert!(text.contains("source retention has passed the watermark"), "{text}");
    reader.drain(ALL);
    assert_eq!(reader.rows("idle").len(), 1);
}

#[test]
fn what_is_not_acknowledged_or_young_is_kept() {
    let mut fixture = fixture(0);
    fixture.config.keep_changes = Duration::from_secs(3600);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (1, 1), (2, 2), (3, 3);");
    reader.drain(ALL);
    reader.acknowledge();
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 3);
    fixture.run("update _shori_changes set at_us = at_us - 7200000000;");
    let second = reader.images[1].position;
    reader.block_on(async |source| source.acknowledge(&second).await).unwrap();
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 1);
    // The newest row stays, so that its id is not given again.
    reader.acknowledge();
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 1);
}

#[test]
fn pruning_waits_for_the_writer() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    fixture.run("insert into a values (1, 1), (2, 2);");
    reader.drain(ALL);
    fixture.run("begin immediate");
    reader.acknowledge();
    fixture.run("commit");
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 2);
}

#[test]
fn waiting_ends_with_a_foreign_commit_and_at_the_latest_after_the_time_given() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let begun = Instant::now();
    reader.block_on(async |source| source.wait(Duration::from_millis(30)).await).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(30));
    fixture.run("insert into a values (1, 1)");
    let begun = Instant::now();
    reader.block_on(async |source| source.wait(Duration::from_secs(60)).await).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(30));
    assert_eq!(reader.next(ALL).unwrap().rows(), 1);
}

#[test]
fn spec4_10_backlog_is_measured_against_the_source_s_own_log() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (1, 1), (2, 2), (3, 3);");
    let head = reader.block_on(async |source| source.head().await).unwrap();
    assert_eq!(head.changes_waiting, Some(3));
    assert!(head.boundary > reader.watermark.boundary && head.time > 0);
    reader.drain(ALL);
    let head = reader.block_on(async |source| source.head().await).unwrap();
    assert_eq!((head.changes_waiting, head.boundary), (Some(0), reader.watermark.boundary));
    assert_eq!(shori_sqlite::changes_above(&fixture.config, &Position::ZERO).unwrap(), 3);
}

#[test]
fn before_images_are_no_changes_of_their_own() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (1, 1), (2, 2); update a set v = 3; delete from a where id = 1;");
    assert_eq!(fixture.number("select count(*) from _shori_changes"), 7);
    let head = reader.block_on(async |source| source.head().await).unwrap();
    assert_eq!(head.changes_waiting, Some(5));
    assert_eq!(shori_sqlite::changes_above(&fixture.config, &Position::ZERO).unwrap(), 5);
    for left in (0..5).rev() {
        assert_eq!(reader.next(ONE).unwrap().rows(), 1);
        let staged = reader.watermark.staged;
        assert_eq!(shori_sqlite::changes_above(&fixture.config, &staged).unwrap(), left);
        // Reading goes on between any two changes, also between one and its before image.
        if left == 2 {
            reader.start().unwrap();
        }
    }
    reader.drain(ALL);
    assert_eq!(reader.watermark.boundary, reader.watermark.staged);
    assert_eq!(reader.rows("a"), fixture.rows(&reader.schemas[&reader.id("a")]));
    assert_eq!(reader.images.len(), 5);
}

#[test]
fn a_before_image_that_is_pruned_ahead_of_its_change_is_no_gap() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (1, 1);");
    reader.drain(ALL);
    let inserted = reader.watermark;
    fixture.run("update a set v = 2;");
    reader.drain(ALL);
    // All but the newest row, which is the update's second.
    while fixture.number("select count(*) from _shori_changes") > 1 {
        reader.acknowledge();
    }
    reader.watermark = inserted;
    reader.start().unwrap();
    assert!(reader.started.as_ref().unwrap().failed.is_empty());
    reader.drain(ALL);
    assert!(reader.failed.is_empty());
    assert_eq!(reader.rows("a"), fixture.rows(&reader.schemas[&reader.id("a")]));
}

#[test]
fn a_call_that_is_dropped_loses_nothing() {
    let fixture = fixture(0);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (1, 1), (2, 2);");
    let completed = reader.block_on(async |source| {
        // Polled once: the blocking part may or may not run to its end.
        tokio::select! { biased; _ = source.next(ALL) => true, () = std::future::ready(()) => false }
    });
    if completed {
        // Its batch was returned, and is lost here: reading starts again from the watermark.
        reader.start().unwrap();
    }
    reader.drain(ALL);
    assert_eq!(reader.rows("a").len(), 2);
}

#[test]
fn a_table_that_is_captured_later_does_not_hold_back_the_others() {
    let mut fixture = fixture(3);
    let added = fixture.config.tables.remove(1);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run("insert into a values (9, 9);");
    reader.drain(ALL);
    reader.acknowledge();
    reader.config.tables.push(added);
    reader.start().unwrap();
    reader.drain(ALL);
    assert!(reader.all_read());
    assert_eq!((reader.rows("a").len(), reader.rows("b").len()), (4, 3));
}
