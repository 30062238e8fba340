//! Tables that change their shape under capture.

use shori_core::change::Op;
use shori_core::error::ErrorKind;
use shori_core::source::{BatchLimit, SnapshotProgress, SnapshotState};
use shori_sqlite::SqliteTable;

use crate::harness::{ALL, Fixture, Reader};

fn fixture() -> Fixture {
    Fixture::new(
        "create table t (id integer primary key, v text); insert into t values (1, 'a'), (2, 'b');
         create table other (id integer primary key);",
        vec![SqliteTable::new("t"), SqliteTable::new("other")],
    )
}

fn following(fixture: &Fixture) -> Reader {
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    reader.images.clear();
    reader
}

fn assert_equal(fixture: &Fixture, reader: &Reader) {
    assert_eq!(reader.rows("t"), fixture.rows(&reader.schemas[&reader.id("t")]));
}

fn generation(reader: &Reader) -> u32 {
    reader.progress[&reader.id("t")].generation
}

#[test]
fn a_column_added_while_reading_is_followed_without_reading_the_table_again() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("alter table t add column n int;");
    let batch = reader.next(ALL).unwrap();
    assert_eq!(batch.schemas.len(), 1);
    fixture.run("update t set n = 5 where id = 1; insert into t values (3, 'c', 6);");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(reader.rows("t")[&vec!["1".to_string()]]["n"], "5");
    assert_eq!(generation(&reader), 1);
}

#[test]
fn values_of_an_added_column_that_no_trigger_saw_are_read_again() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("alter table t add column n int; update t set n = 5 where id = 1; insert into t values (3, 'c', 6);");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(generation(&reader), 2);
}

#[test]
fn the_default_of_an_added_column_is_read_again_also_after_a_restart() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("alter table t add column n int not null default 7; insert into t (id) values (3);");
    reader.start().unwrap();
    // The request is in the log before anything of the new shape is.
    let batch = reader.next(BatchLimit { rows: 1, bytes: 1 << 20 }).unwrap();
    assert!(batch.more);
    reader.start().unwrap();
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(reader.rows("t")[&vec!["2".to_string()]]["n"], "7");
    assert_eq!(generation(&reader), 2);
}

#[test]
fn a_dropped_column_needs_a_release_and_reads_as_null_afterwards() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    assert!(fixture.writer.execute_batch("alter table t drop column v").is_err());
    shori_sqlite::release(&fixture.config.path, "t").unwrap();
    fixture.run("alter table t drop column v; insert into t values (3); delete from t where id = 1;");
    reader.start().unwrap();
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(reader.rows("t").len(), 2);
    fixture.run("insert into t values (4);");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    // The old column's slot is not given to another.
    fixture.run("alter table t add column v text; update t set v = 'new' where id = 4;");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
}

#[test]
fn release_wants_a_captured_table() {
    let fixture = fixture();
    let error = shori_sqlite::release(&fixture.config.path, "t").unwrap_err();
    assert_eq!((error.kind(), error.remedy().is_some()), (ErrorKind::Usage, true));
    shori_sqlite::install(&fixture.config).unwrap();
    shori_sqlite::release(&fixture.config.path, "t").unwrap();
    shori_sqlite::release(&fixture.config.path, "t").unwrap();
}

#[test]
fn a_renamed_column_keeps_its_values() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("alter table t rename column v to w; update t set w = 'z' where id = 1;");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(reader.rows("t")[&vec!["2".to_string()]]["w"], "b");
}

#[test]
fn a_retyped_column_stops_its_table_until_it_is_read_anew() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    let rebuild = "create table new_t (id integer primary key, v int); insert into new_t select id, id from t;
         drop table t; alter table new_t rename to t;";
    fixture.run(&format!("begin; {rebuild} commit; insert into other values (1);"));
    reader.drain(ALL);
    let (id, error) = reader.failed.pop().unwrap();
    assert_eq!((&*id.instance, error.kind()), ("t", ErrorKind::Schema));
    assert_eq!(error.remedy(), Some("run shori resnapshot --retyped t"));
    assert_eq!(reader.rows("other").len(), 1);
    // It stays so, until the resnapshot is asked for.
    reader.start().unwrap();
    assert_eq!(reader.started.as_ref().unwrap().failed.len(), 1);
    reader.progress.insert(id.clone(), SnapshotProgress::requested(2));
    reader.start().unwrap();
    assert!(reader.started.as_ref().unwrap().failed.is_empty());
    fixture.run("update t set v = 10 where id = 1;");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
}

#[test]
fn a_rebuilt_table_of_the_same_shape_is_read_again() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run(
        "begin; create table new_t (id integer primary key, v text); insert into new_t values (2, 'b'), (9, 'i');
         drop table t; alter table new_t rename to t; commit;",
    );
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    fixture.run("insert into t values (10, 'j');");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert!(reader.failed.is_empty());
}

#[test]
fn a_unique_index_added_while_nobody_read_is_followed() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("create unique index t_v on t (v); insert or replace into t values (3, 'a');");
    reader.start().unwrap();
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    fixture.run("insert or replace into t values (4, 'a');");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
}

#[test]
fn triggers_of_an_older_release_are_replaced_without_reading_the_table_again() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    let query = "select name, sql from sqlite_schema where type = 'trigger' and tbl_name = 't' order by name";
    let current = |fixture: &Fixture| -> Vec<(String, String)> {
        let mut statement = fixture.writer.prepare(query).unwrap();
        statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().collect::<Result<_, _>>().unwrap()
    };
    let triggers = current(&fixture);
    let of_then = |sql: &str| sql.replace("_shori_changes (capture", "_shori_changes  (capture");
    let older: Vec<_> = triggers.iter().map(|(name, sql)| (name, of_then(sql))).collect();
    for (name, sql) in &older {
        fixture.run(&format!("drop trigger {name}; {sql};"));
    }
    let stored = serde_json::json!(older).to_string();
    fixture.writer.execute("update _shori_captures set triggers = ?1 where table_name = 't'", [stored]).unwrap();
    assert_ne!(current(&fixture), triggers);
    fixture.run("insert into t values (3, 'c');");
    reader.start().unwrap();
    assert_eq!(current(&fixture), triggers);
    fixture.run("insert into t values (4, 'd');");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!((generation(&reader), reader.images.len()), (1, 2));
}

#[test]
fn a_dropped_and_a_renamed_table_fail_by_name() {
    let fixture = fixture();
    let mut reader = following(&fixture);
    fixture.run("alter table t rename to u; drop table other;");
    reader.drain(ALL);
    let errors: Vec<String> = reader.failed.iter().map(|(_, error)| error.to_string()).collect();
    assert!(errors[0].starts_with("cannot capture table t: it was renamed to u; rename it back"), "{errors:?}");
    assert!(errors[1].starts_with("cannot capture table other: there is no such table; create it"), "{errors:?}");
    fixture
        .run("alter table u rename to t; insert into t values (5, 'e'); create table other (id integer primary key);");
    reader.start().unwrap();
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
}

#[test]
fn reading_again_while_a_snapshot_runs_starts_over() {
    let mut fixture = fixture();
    fixture.config.snapshot_chunk_rows = 1;
    let mut reader = fixture.reader();
    reader.start().unwrap();
    while reader.progress.get(&reader.id("t")).is_none_or(|progress| progress.state != SnapshotState::Running) {
        reader.next(ALL).unwrap();
    }
    fixture.run("alter table t add column n int default 3;");
    reader.drain(ALL);
    assert_equal(&fixture, &reader);
    assert_eq!(generation(&reader), 2);
    assert!(reader.images.iter().all(|image| image.op == Op::Snapshot));
}
