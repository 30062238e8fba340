//! Values of every type, and those that do not fit.

use arrow::array::AsArray;
use arrow::datatypes::{Decimal128Type, TimestampMicrosecondType};
use shori_core::error::ErrorKind;
use shori_sqlite::SqliteTable;

use crate::harness::{ALL, Fixture};

#[test]
fn spec4_08_money_stays_decimal_and_timestamps_keep_their_microseconds() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, amount text, price decimal(10,2), at text, updated datetime);
         insert into t values (1, '12.30', 12.30, '2026-01-02T03:04:05.123456Z', '2026-01-02 03:04:05.123456');",
        vec![SqliteTable::new("t").with_type("amount", "decimal(18,2)").with_type("at", "timestamp")],
    );
    let mut reader = fixture.reader();
    reader.start().unwrap();
    let batch = reader.next(ALL).unwrap();
    let columns = &batch.changes[0].columns;
    assert_eq!(columns[1].as_primitive::<Decimal128Type>().value(0), 1230);
    assert_eq!(columns[2].as_primitive::<Decimal128Type>().value(0), 1230);
    let expected = 1_767_323_045_123_456;
    assert_eq!(columns[3].as_primitive::<TimestampMicrosecondType>().value(0), expected);
    assert_eq!(columns[4].as_primitive::<TimestampMicrosecondType>().value(0), expected);
}

#[test]
fn every_type_comes_through_the_stream_as_through_the_snapshot() {
    let columns =
        ["i int", "s text", "f real", "b blob", "y boolean", "d date", "h time", "z timestamptz", "n numeric(5,1)"];
    let insert = |id: i64| {
        format!(
            "insert into t values ({id}, -7, 'é', 1.5, x'00ff', 1, '2026-02-28', '23:59:59.000001',
             '2026-01-01T00:00:00+01:00', 3.5);"
        )
    };
    let ddl = format!("create table t (id integer primary key, {}); {}", columns.join(", "), insert(1));
    let fixture = Fixture::new(&ddl, vec![SqliteTable::new("t")]);
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run(&insert(2));
    reader.drain(ALL);
    let rows = reader.rows("t");
    let (mut first, mut second) = (rows[&vec!["1".to_string()]].clone(), rows[&vec!["2".to_string()]].clone());
    first.remove("id");
    second.remove("id");
    assert_eq!(first, second);
    assert_eq!(first.len(), columns.len());
    assert_eq!((first["z"].as_str(), first["n"].as_str()), ("2025-12-31T23:00:00", "3.5"));
}

#[test]
fn spec4_13_a_row_that_cannot_be_decoded_is_kept_with_reason_and_raw_bytes() {
    let fixture = Fixture::new(
        "create table t (id integer primary key, n int, amount text, s text);
         insert into t values (1, 1, '1.00', 'fine'), (2, 'two', '1.00', 'snapshot');",
        vec![SqliteTable::new("t").with_type("amount", "decimal(4,2)")],
    );
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture.run(
        "insert into t values (3, 3, '1.005', 'places'), (4, 4, '100.00', 'large'), (5, 5, x'31', 'class'),
             (8, -1e400, '8.00', 'infinite');
         insert into t values (6, 6, '6.00', cast(x'ff' as text)), (7, 7, '7.00', 'fine');
         delete from t where id = 3;",
    );
    reader.drain(ALL);
    let reasons: Vec<&str> = reader.rejected.iter().map(|rejected| rejected.reason.as_str()).collect();
    assert_eq!(
        reasons,
        [
            "column n: a value of another kind than the column's type",
            "column amount: more decimal places than the column's type has",
            "column amount: larger than the column's type holds",
            "column amount: a value of another kind than the column's type",
            "column n: a value of another kind than the column's type",
            "column s: not UTF-8",
        ]
    );
    assert_eq!(
        String::from_utf8(reader.rejected[0].raw.clone()).unwrap(),
        r#"{"op":0,"row":{"id":2,"n":"two","amount":"1.00","s":"snapshot"}}"#
    );
    assert!(String::from_utf8_lossy(&reader.rejected[4].raw).contains(r#""n":"-inf""#));
    assert!(String::from_utf8_lossy(&reader.rejected[5].raw).contains(r#""s":{"text_hex":"ff"}"#));
    let keys: Vec<_> = reader.rows("t").into_keys().flatten().collect();
    assert_eq!(keys, ["1", "7"]);
    // The deletion of a rejected row is an image like any other: its key is all it needs.
    assert_eq!(reader.images.last().map(|image| image.key.clone()), Some(vec!["3".to_string()]));
}

#[test]
fn rows_with_null_in_the_key_are_rejected() {
    let fixture = Fixture::new(
        "create table t (id text primary key, v int); insert into t values (null, 1), ('a', 1);",
        vec![SqliteTable::new("t")],
    );
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    fixture
        .run("insert into t values (null, 2); update t set id = 'b' where v = 2; update t set id = null where v = 2;");
    reader.drain(ALL);
    let reasons: Vec<_> = reader.rejected.iter().map(|rejected| rejected.reason.as_str()).collect();
    assert_eq!(reasons, ["column id: null in a key"; 3]);
    let keys: Vec<_> = reader.rows("t").into_keys().flatten().collect();
    assert_eq!(keys, ["a"]);
}

#[test]
fn a_table_with_more_keyless_rows_than_a_chunk_holds_stops_itself_only() {
    let mut fixture = Fixture::new(
        "create table t (id text primary key, v int); insert into t (v) values (1), (2), (3);
         create table u (id integer primary key); insert into u values (1);",
        vec![SqliteTable::new("t"), SqliteTable::new("u")],
    );
    fixture.config.snapshot_chunk_rows = 3;
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    assert_eq!((reader.rejected.len(), reader.failed.len()), (3, 0));
    fixture.config.snapshot_chunk_rows = 2;
    let mut reader = fixture.reader();
    reader.start().unwrap();
    reader.drain(ALL);
    let (id, error) = &reader.failed[0];
    assert_eq!((&*id.instance, error.kind(), error.remedy().is_some()), ("t", ErrorKind::Data, true));
    assert_eq!(reader.rows("u").len(), 1);
}
