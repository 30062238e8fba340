//! Failures: each names its object, and says what to do.

use std::path::Path;

use shori_core::error::{Error, ErrorKind};
use shori_core::position::SortKey;
use shori_sqlite::{SqliteConfig, SqliteTable};

use crate::harness::{ALL, Fixture, Reader, open};

fn fixture() -> Fixture {
    Fixture::new("create table t (id integer primary key);", vec![SqliteTable::new("t")])
}

fn start_at(path: &Path) -> Error {
    Reader::new(SqliteConfig::new(path, "shop", vec![SqliteTable::new("t")])).start().unwrap_err()
}

fn assert_is(error: &Error, kind: ErrorKind, object: &Path) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.object().contains(&*object.to_string_lossy()), "{error}");
    assert!(error.remedy().is_some() || kind == ErrorKind::Unavailable, "{error}");
}

#[test]
fn a_missing_file_is_not_created() {
    let fixture = fixture();
    let path = fixture.directory.path().join("missing.db");
    let error = start_at(&path);
    assert_is(&error, ErrorKind::Usage, &path);
    assert!(error.to_string().contains("it does not exist") && error.to_string().contains("shori init --sample"));
    assert!(!path.exists());
    assert_is(&start_at(fixture.directory.path()), ErrorKind::Usage, fixture.directory.path());
}

#[test]
fn a_file_of_another_format_is_refused() {
    let fixture = fixture();
    let path = fixture.directory.path().join("notes.txt");
    std::fs::write(&path, "nothing but text, and more of it than a header".repeat(100)).unwrap();
    assert_is(&start_at(&path), ErrorKind::Corrupt, &path);
}

#[test]
fn a_lock_held_by_another_is_waited_for_and_then_may_be_retried() {
    let fixture = fixture();
    let other = open(&fixture.config.path);
    other.execute_batch("pragma journal_mode = wal; begin immediate; create table u (id)").unwrap();
    let mut reader = fixture.reader();
    assert_is(&reader.start().unwrap_err(), ErrorKind::Unavailable, &fixture.config.path);
    other.execute_batch("commit").unwrap();
    reader.start().unwrap();
    // Reading goes on beside a writer.
    other.execute_batch("begin immediate; insert into t values (1)").unwrap();
    reader.drain(ALL);
    assert!(reader.rows("t").is_empty());
    other.execute_batch("commit").unwrap();
    reader.drain(ALL);
    assert_eq!(reader.rows("t").len(), 1);
}

#[test]
fn a_file_replaced_or_removed_while_it_is_read_is_noticed() {
    let fixture = fixture();
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let aside = fixture.directory.path().join("aside.db");
    std::fs::rename(&fixture.config.path, &aside).unwrap();
    assert_is(&reader.next(ALL).unwrap_err(), ErrorKind::SourceReplaced, &fixture.config.path);
    open(&fixture.config.path).execute_batch("create table t (id integer primary key)").unwrap();
    assert_is(&reader.next(ALL).unwrap_err(), ErrorKind::SourceReplaced, &fixture.config.path);
    let before = reader.started.as_ref().unwrap().identity.clone();
    reader.start().unwrap();
    assert_ne!(reader.started.as_ref().unwrap().identity, before);
}

#[test]
fn an_older_copy_of_the_file_is_noticed() {
    let fixture = fixture();
    let mut reader = fixture.reader();
    reader.start().unwrap();
    fixture.run("insert into t values (1), (2);");
    reader.drain(ALL);
    reader.watermark.staged.lsn = SortKey::from_u64(99);
    let error = reader.start().unwrap_err();
    assert_is(&error, ErrorKind::SourceReplaced, &fixture.config.path);
    assert!(error.to_string().contains("the log has its change 99, but its newest is 2"), "{error}");
}

#[test]
fn change_rows_deleted_by_somebody_else_are_a_gap() {
    // What is deleted, of changes 3 to 8, and what is read all the same before the gap.
    for (deleted, before) in [("id = 5", 2), ("id in (3, 4)", 0), ("id > 6", 4), ("id > 2", 0)] {
        let mut fixture = fixture();
        fixture.run("create table u (id integer primary key); insert into u values (1);");
        fixture.config.tables.push(SqliteTable::new("u"));
        let mut reader = fixture.reader();
        reader.start().unwrap();
        fixture.run("insert into t values (1), (2);");
        reader.drain(ALL);
        fixture.run("insert into t values (3), (4), (5), (6), (7), (8);");
        fixture.run(&format!("delete from _shori_changes where {deleted}"));
        reader.drain(ALL);
        let failed: Vec<_> = reader.failed.iter().map(|(id, error)| (&*id.instance, error.kind())).collect();
        assert_eq!(failed, [("t", ErrorKind::Gap), ("u", ErrorKind::Gap)], "{deleted}");
        let error = &reader.failed[0].1;
        assert!(error.to_string().contains("are gone from _shori_changes"), "{error}");
        assert_eq!(error.remedy(), Some("run shori resnapshot t"));
        assert_eq!(reader.rows("t").len(), 2 + before, "{deleted}");
        assert!(reader.all_read(), "{deleted}: reading goes on behind the gap");
    }
}

#[test]
fn a_capture_without_changes_misses_nothing_by_what_was_pruned() {
    let mut fixture = fixture();
    fixture.run("create table u (id integer primary key); alter table t add column v integer;");
    fixture.config.tables.push(SqliteTable::new("u"));
    fixture.config.keep_changes = std::time::Duration::ZERO;
    let mut reader = fixture.reader();
    reader.start().unwrap();
    fixture.run("insert into t values (1, 1); insert into u values (1);");
    reader.drain(ALL);
    let older = reader.watermark;
    // The newest row that goes is a before image, the newest that stays the change that it belongs to.
    fixture.run("update t set v = 2; update t set v = 3;");
    reader.drain(ALL);
    reader.acknowledge();
    let query = "select min(id) - max(pruned_to) from _shori_changes, _shori_captures";
    assert_eq!(fixture.number(query), 2);
    reader.watermark = older;
    reader.start().unwrap();
    fixture.run("insert into u values (2);");
    reader.drain(ALL);
    let failed = reader.started.as_ref().unwrap().failed.iter().chain(&reader.failed);
    let failed: Vec<&str> = failed.map(|(id, _)| &*id.instance).collect();
    assert_eq!(failed, ["t"]);
    assert_eq!(reader.rows("u").len(), 2);
}

#[test]
fn a_copy_put_back_and_written_to_since_is_noticed() {
    let fixture = fixture();
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let copy = fixture.directory.path().join("copy.db");
    fixture.run(&format!("vacuum into '{}'", copy.display()));
    fixture.run("insert into t values (1), (2);");
    reader.drain(ALL);
    // Time as SQLite knows it has passed.
    let clock = open(&copy);
    let now = || clock.query_row("select strftime('%s %f')", [], |row| row.get::<_, String>(0)).unwrap();
    let then = now();
    while now() == then {}
    clock.execute_batch("insert into t values (3), (4), (5)").unwrap();
    let mut config = fixture.config.clone();
    config.path = copy;
    reader.config = config.clone();
    reader.source = shori_sqlite::SqliteSource::new(config.clone());
    reader.start().unwrap();
    let error = reader.next(ALL).unwrap_err();
    assert_is(&error, ErrorKind::SourceReplaced, &config.path);
    assert!(error.to_string().contains("written to since"), "{error}");
}

#[test]
fn capture_tables_made_anew_are_noticed() {
    let fixture = fixture();
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run(
        "drop trigger _shori_1_after_insert; drop trigger _shori_1_after_update; drop trigger _shori_1_after_delete;
         drop table _shori_source; drop table _shori_captures; drop table _shori_changes; drop table _shori_evicted;",
    );
    assert_is(&reader.next(ALL).unwrap_err(), ErrorKind::SourceReplaced, &fixture.config.path);
}

#[test]
fn capture_of_another_release_is_refused() {
    let fixture = fixture();
    shori_sqlite::install(&fixture.config).unwrap();
    fixture.run("update _shori_source set layout = 2");
    assert_is(&shori_sqlite::install(&fixture.config).unwrap_err(), ErrorKind::Usage, &fixture.config.path);
}

#[test]
fn a_table_named_twice_or_an_unknown_column_or_type_is_refused() {
    let mut fixture = fixture();
    fixture.config.tables.push(SqliteTable::new("T"));
    let error = shori_sqlite::install(&fixture.config).unwrap_err();
    assert_eq!((error.kind(), error.object()), (ErrorKind::Usage, "table T"));
    for (column, type_name, reason) in [("x", "text", "no such column"), ("id", "money", "unknown type \"money\"")] {
        fixture.config.tables = vec![SqliteTable::new("t").with_type(column, type_name)];
        let failed = shori_sqlite::install(&fixture.config).unwrap().failed;
        assert!(failed[0].1.to_string().contains(reason) && failed[0].1.remedy().is_some(), "{failed:?}");
    }
}
