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
