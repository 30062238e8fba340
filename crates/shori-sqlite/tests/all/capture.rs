//! What the triggers log, statement by statement.

use shori_core::change::Op;
use shori_core::error::ErrorKind;
use shori_sqlite::SqliteTable;

use crate::harness::{ALL, Fixture, Reader};

/// A reader whose snapshot is behind it.
fn following(fixture: &Fixture) -> Reader {
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    reader.images.clear();
    reader
}

/// Operation and first key value of each image since the last call.
fn logged(reader: &mut Reader) -> Vec<(Op, String)> {
    reader.drain(ALL);
    reader.images.drain(..).map(|image| (image.op, image.key.join("/"))).collect()
}

fn ops(expected: &[(Op, &str)]) -> Vec<(Op, String)> {
    expected.iter().map(|(op, key)| (*op, key.to_string())).collect()
}

#[test]
fn each_statement_logs_its_images() {
    let fixture = Fixture::new("create table t (id integer primary key, v text);", vec![SqliteTable::new("t")]);
    let mut reader = following(&fixture);
    fixture
        .run("insert into t values (1, 'a'), (2, 'b'); update t set v = 'c' where id = 1; delete from t where id = 2;");
    let expected = [(Op::Insert, "1"), (Op::Insert, "2"), (Op::UpdateAfter, "1"), (Op::Delete, "2")];
    assert_eq!(logged(&mut reader), ops(&expected));
    fixture.run("update t set id = 9;");
    assert_eq!(logged(&mut reader), ops(&[(Op::UpdateBefore, "1"), (Op::UpdateAfter, "9")]));
    fixture.run("begin; insert into t values (3, 'x'); rollback;");
    assert_eq!(logged(&mut reader), []);
}

#[test]
fn spec4_06_delete_and_insert_of_one_key_keep_both() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, v text); insert into t values (1, 'old');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("begin; delete from t where id = 1; insert into t values (1, 'new'); commit;");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "1"), (Op::Insert, "1")]));
    assert_eq!(reader.rows("t")[&vec!["1".to_string()]]["v"], "new");
}

/// Operation and values of every row of the change table.
fn change_rows(fixture: &Fixture) -> Vec<String> {
    let query = "select format('%d %s %s %s', op, v0, v1, v2) from _shori_changes order by id";
    let mut statement = fixture.writer.prepare(query).unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
}

#[test]
fn updates_and_deletions_keep_the_whole_row_as_it_was() {
    let fixture = Fixture::new(
        "create table t (a int, b text, c text, primary key (a, b));
         insert into t values (1, 'x', 'old'), (2, 'y', 'old'), (null, 'z', 'old');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("update t set c = 'new' where a = 1; update t set b = 'w' where a = 2; delete from t where a = 1;");
    let rows = ["8 1 x old", "4 1 x new", "3 2 y old", "4 2 w old", "1 1 x new"];
    assert_eq!(change_rows(&fixture), rows);
    let expected = [(Op::UpdateAfter, "1/x"), (Op::UpdateBefore, "2/y"), (Op::UpdateAfter, "2/w"), (Op::Delete, "1/x")];
    reader.drain(ALL);
    let deleted = &reader.images.last().unwrap().row;
    assert_eq!((deleted["b"].as_str(), deleted["c"].as_str()), ("x", "new"));
    assert_eq!(logged(&mut reader), ops(&expected));
    // A row without a key is none of the log, so none goes by its update.
    fixture.run("update t set a = 3 where c = 'old' and a is null;");
    assert_eq!(change_rows(&fixture)[5..], ["8  z old", "4 3 z old"]);
    fixture.run("insert into t values (3, 'z', 'upserted') on conflict do update set c = excluded.c;");
    assert_eq!(change_rows(&fixture)[7..], ["8 3 z old", "4 3 z upserted"]);
    assert_eq!(logged(&mut reader), ops(&[(Op::UpdateAfter, "3/z"), (Op::UpdateAfter, "3/z")]));
}

#[test]
fn an_update_of_a_key_that_stands_again_keeps_its_row_too() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, v text, w text); insert into t values (1, 'a', 'old');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    // Newer than capture's trigger, it runs first.
    fixture.run(
        "create trigger user_update after update on t when old.id = 1 begin insert into t values (1, 'b', 'again'); end;
         update t set id = 2;",
    );
    assert_eq!(change_rows(&fixture), ["2 1 b again", "8 1 a old", "4 2 a old"]);
    assert_eq!(logged(&mut reader), ops(&[(Op::Insert, "1"), (Op::UpdateAfter, "2")]));
}

#[test]
fn a_row_evicted_through_another_unique_index_is_logged_as_deleted() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, u text unique); insert into t values (1, 'a'), (2, 'b');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert or replace into t values (3, 'a');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "1"), (Op::Insert, "3")]));
    fixture.run("update or replace t set u = 'a' where id = 2;");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "3"), (Op::UpdateAfter, "2")]));
    fixture.run("insert or replace into t values (2, 'c');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Insert, "2")]));
    fixture.run("insert or replace into t values (5, null), (6, null);");
    assert_eq!(logged(&mut reader), ops(&[(Op::Insert, "5"), (Op::Insert, "6")]));
    fixture.run("insert or ignore into t values (7, 'c'); insert into t values (8, 'c') on conflict do nothing;");
    assert_eq!(logged(&mut reader), []);
    fixture.run("insert into t values (8, 'c') on conflict (u) do update set u = 'd';");
    assert_eq!(logged(&mut reader), ops(&[(Op::UpdateAfter, "2")]));
}

#[test]
fn with_recursive_triggers_an_eviction_is_logged_once() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, u text unique); insert into t values (1, 'a');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("pragma recursive_triggers = on; insert or replace into t values (3, 'a');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "1"), (Op::Insert, "3")]));
}

#[test]
fn evictions_through_partial_and_expression_indexes_and_defaults_are_seen() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, a text, b int, c text not null default 'x' unique);
         create unique index partial on t (b) where a is not null;
         create unique index expression on t (lower(a) desc) where b > 10;
         insert into t values (1, 'One', 1, 'c1'), (2, null, 2, 'c2'), (3, 'Three', 13, 'x');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert or replace into t values (4, 'x', 1, 'c4');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "1"), (Op::Insert, "4")]));
    fixture.run("insert or replace into t values (5, null, 2, 'c5');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Insert, "5")]));
    fixture.run("insert or replace into t values (6, 'THREE', 14, 'c6');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "3"), (Op::Insert, "6")]));
    fixture.run("insert into t values (7, null, null, 'x'); insert or replace into t values (8, null, null, null);");
    let expected = [(Op::Insert, "7"), (Op::Delete, "7"), (Op::Insert, "8")];
    assert_eq!(logged(&mut reader), ops(&expected));
}

#[test]
fn two_spellings_under_one_collation_are_two_keys() {
    let fixture = Fixture::new(
        "create table t (id text collate nocase primary key not null, v int); insert into t values ('a', 1);",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert or replace into t values ('A', 2);");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "a"), (Op::Insert, "A")]));
    fixture.run("update t set id = 'a';");
    assert_eq!(logged(&mut reader), ops(&[(Op::UpdateBefore, "A"), (Op::UpdateAfter, "a")]));
}

#[test]
fn a_row_evicted_through_the_hidden_rowid_is_logged_as_deleted() {
    let fixture = Fixture::new(
        "create table t (code text primary key not null); insert into t (rowid, code) values (5, 'a');",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert or replace into t (rowid, code) values (5, 'b');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Delete, "a"), (Op::Insert, "b")]));
}

#[test]
fn triggers_of_the_user_may_change_the_row_again() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, v int); create table log (id integer primary key, t int);",
        vec![SqliteTable::new("t"), SqliteTable::new("log")],
    );
    let mut reader = following(&fixture);
    fixture.run(
        "create trigger user_insert after insert on t begin
            update t set v = v + 100 where id = new.id; insert into log (t) values (new.id); end;
         create trigger user_delete after delete on t begin insert into t values (old.id, 0); end;
         insert into t values (1, 1), (2, 2);",
    );
    reader.drain(ALL);
    assert_eq!(reader.rows("t"), fixture.rows(&reader.schemas[&reader.id("t")]));
    assert_eq!(reader.rows("log").len(), 2);
    fixture.run("delete from t where id = 1;");
    reader.drain(ALL);
    assert_eq!(reader.rows("t"), fixture.rows(&reader.schemas[&reader.id("t")]));
}

#[test]
fn composite_keys_and_generated_columns_are_captured() {
    let fixture = Fixture::new(
        "create table t (a int, b text, n int, twice int as (n * 2), thrice int as (n * 3) stored, primary key (b, a))
         without rowid;",
        vec![SqliteTable::new("t")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert into t (a, b, n) values (1, 'x', 5), (2, 'x', 6); update t set n = 7 where a = 1;");
    let expected = [(Op::Insert, "x/1"), (Op::Insert, "x/2"), (Op::UpdateAfter, "x/1")];
    assert_eq!(logged(&mut reader), ops(&expected));
    let row = &reader.rows("t")[&vec!["x".to_string(), "1".to_string()]];
    assert_eq!((row["twice"].as_str(), row["thrice"].as_str()), ("14", "21"));
}

#[test]
fn installing_twice_writes_nothing() {
    let fixture = Fixture::new("create table t (id integer primary key);", vec![SqliteTable::new("t")]);
    let first = shori_sqlite::install(&fixture.config).unwrap();
    assert!(first.changed);
    let version = fixture.number("pragma schema_version");
    let second = shori_sqlite::install(&fixture.config).unwrap();
    assert!(!second.changed);
    assert_eq!((first.identity, fixture.number("pragma schema_version")), (second.identity, version));
    assert_eq!(fixture.number("select journal_mode = 'wal' from pragma_journal_mode"), 1);
}

#[test]
fn tables_that_cannot_be_captured_are_refused_by_name_and_leave_their_neighbours() {
    let tables = ["fine", "keyless", "odd", "money", "seen", "missing", "fluid"];
    let fixture = Fixture::new(
        "create table fine (id integer primary key); create table keyless (v int, w int unique);
         create table odd (id integer primary key, thing); create table money (price decimal(9,2) primary key);
         create view seen as select 1 as id; create table fluid (id integer primary key,
            code text not null default (hex(randomblob(4))) unique);",
        tables.map(SqliteTable::new).to_vec(),
    );
    let mut reader = fixture.reader();
    reader.start().unwrap();
    let started = reader.started.as_ref().unwrap();
    let captured: Vec<_> = started.captures.iter().map(|info| info.id.instance.to_string()).collect();
    assert_eq!(captured, ["fine"]);
    let reasons = ["has no key", "stands for no type", "several spellings", "it is a view", "no such table", "random"];
    for ((id, error), reason) in started.failed.iter().zip(reasons) {
        assert_eq!(error.kind(), ErrorKind::Schema);
        assert!(error.to_string().contains(reason) && error.object().contains(&*id.instance), "{error}");
        assert!(error.remedy().is_some(), "{error}");
    }
    assert_eq!(started.failed.len(), reasons.len());
}

#[test]
fn names_that_need_quotes_are_captured() {
    let fixture = Fixture::new(
        "create table \"or\"\"der\" (\"new\" integer primary key, \"old\" text unique, \"a b\" text);",
        vec![SqliteTable::new("or\"der")],
    );
    let mut reader = following(&fixture);
    fixture.run("insert or replace into \"or\"\"der\" values (1, 'x', 'y'), (2, 'x', 'z');");
    assert_eq!(logged(&mut reader), ops(&[(Op::Insert, "1"), (Op::Delete, "1"), (Op::Insert, "2")]));
}
