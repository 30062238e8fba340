//! The ends of each type, through the log and through targets of both shapes; and what has no place.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int16Array,
    Int32Array, Int64Array, RecordBatch, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{DataType, Field, Schema};
use futures::TryStreamExt;
use shori_core::ErrorKind;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::Position;
use shori_core::projection::{Target, TargetShape, history};
use shori_core::schema::TableSchema;
use shori_core::source::CaptureInfo;
use shori_core::store::{OutputKind, OutputRows, Store};
use shori_core::testing::value::rows_of as plain_rows;

use crate::store_output::commit;
use crate::stored::*;

const DAY_MICROS: i64 = 86_400_000_000;
/// 4714-11-24 BC, the first instant that PostgreSQL has.
const FIRST_MICROS: i64 = -210_866_803_200_000_000;
const FIRST_DAY: i32 = -2_440_588;
const LAST_DAY: i32 = 2_145_031_948 + 10_957;

/// Five rows of every type: both ends, zero, one near it, and null.
fn columns() -> Vec<(&'static str, ArrayRef)> {
    let times = || vec![Some(FIRST_MICROS), Some(i64::MAX - 1), Some(0), Some(-1), None];
    let wide = 10i128.pow(38) - 1;
    let decimal = |precision, scale, values: Vec<Option<i128>>| -> ArrayRef {
        Arc::new(Decimal128Array::from(values).with_precision_and_scale(precision, scale).unwrap())
    };
    let megabyte = "aß\u{10348}".repeat(150_000);
    vec![
        (
            "boolean",
            Arc::new(BooleanArray::from(vec![Some(true), Some(false), Some(false), Some(true), None])) as ArrayRef,
        ),
        ("int16", Arc::new(Int16Array::from(vec![Some(i16::MIN), Some(i16::MAX), Some(0), Some(-1), None]))),
        ("int32", Arc::new(Int32Array::from(vec![Some(i32::MIN), Some(i32::MAX), Some(0), Some(-1), None]))),
        ("int64", Arc::new(Int64Array::from(vec![Some(i64::MIN), Some(i64::MAX), Some(0), Some(-1), None]))),
        (
            "float32",
            Arc::new(Float32Array::from(vec![
                Some(f32::MIN),
                Some(f32::from_bits(1)),
                Some(-0.0),
                Some(f32::NAN),
                None,
            ])),
        ),
        (
            "float64",
            Arc::new(Float64Array::from(vec![Some(f64::MAX), Some(f64::NEG_INFINITY), Some(-0.0), Some(0.1), None])),
        ),
        (
            "text",
            Arc::new(StringArray::from(vec![
                Some(""),
                Some(megabyte.as_str()),
                Some("\u{1}\t\\x\n"),
                Some("\u{10ffff}"),
                None,
            ])),
        ),
        (
            "binary",
            Arc::new(BinaryArray::from(vec![Some(&b""[..]), Some(&[0; 70_000]), Some(&[0, 0xff]), Some(b"\\x"), None])),
        ),
        ("date", Arc::new(Date32Array::from(vec![Some(FIRST_DAY), Some(LAST_DAY), Some(0), Some(-1), None]))),
        (
            "time",
            Arc::new(Time64MicrosecondArray::from(vec![
                Some(0),
                Some(DAY_MICROS - 1),
                Some(1),
                Some(DAY_MICROS / 2),
                None,
            ])),
        ),
        ("timestamp", Arc::new(TimestampMicrosecondArray::from(times()))),
        ("timestamptz", Arc::new(TimestampMicrosecondArray::from(times()).with_timezone("UTC"))),
        ("money", decimal(18, 2, vec![Some(-(10i128.pow(18) - 1)), Some(10i128.pow(18) - 1), Some(0), Some(-1), None])),
        ("wide", decimal(38, 0, vec![Some(-wide), Some(wide), Some(0), Some(10_000), None])),
        ("fine", decimal(38, 38, vec![Some(-wide), Some(wide), Some(0), Some(1), None])),
        ("odd", decimal(38, 37, vec![Some(-wide), Some(wide), Some(0), Some(10i128.pow(36)), None])),
        // Names of the log's own columns, of the server's, and of none that anybody would like.
        ("op", Arc::new(Int64Array::from(vec![1, 2, 3, 4, 5]))),
        ("xmin", Arc::new(Int64Array::from(vec![1, 2, 3, 4, 5]))),
        ("Sélect \"x\" '; --", Arc::new(Int64Array::from(vec![1, 2, 3, 4, 5]))),
    ]
}

fn keyed(columns: Vec<(&str, ArrayRef)>) -> (Arc<TableSchema>, Vec<ArrayRef>) {
    let rows = columns[0].1.len() as i64;
    let mut fields = vec![Field::new("id", DataType::Int64, false)];
    let mut arrays: Vec<ArrayRef> = vec![Arc::new(Int64Array::from_iter_values(0..rows))];
    for (name, array) in columns {
        fields.push(Field::new(name, array.data_type().clone(), true));
        arrays.push(array);
    }
    (Arc::new(TableSchema::new("things", fields, &["id"]).unwrap()), arrays)
}

fn changes(schema: &Arc<TableSchema>, arrays: Vec<ArrayRef>) -> ChangeBatch {
    let mut head = ChangeHeadBuilder::default();
    for row in 0..arrays[0].len() {
        head.push(&at(1, row as u64), Op::Insert, 10);
    }
    head.finish(id("things"), schema.clone(), arrays).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_comes_back_from_the_log() {
    let Stored { store, .. } = Stored::fresh().await;
    let (schema, arrays) = keyed(columns());
    let info = CaptureInfo { id: id("things"), schema: schema.clone() };
    store.prepare_captures("t", "here", &[info]).await.unwrap();
    let batch = changes(&schema, arrays);
    append(&store, &[("things", Position::ZERO)], std::slice::from_ref(&batch), at(1, 9)).await.unwrap();
    let read = store.read_log(&id("things"), &Position::ZERO, &at(9, 0)).await.unwrap();
    let read: Vec<ChangeBatch> = read.try_collect().await.unwrap();
    let [read] = &read[..] else { panic!("{} batches", read.len()) };
    assert_eq!(plain_rows(&read.to_record_batch().unwrap()), plain_rows(&batch.to_record_batch().unwrap()));
    assert_eq!(
        read.columns[5].as_any().downcast_ref::<Float32Array>().unwrap().value(2).to_bits(),
        (-0.0f32).to_bits()
    );
}

fn rows_target(fields: Vec<Field>, shape: TargetShape) -> Target {
    Target {
        projection: "things_out".into(),
        shape,
        key: vec!["id".into()],
        columns: Arc::new(Schema::new(fields)),
        definition: String::new(),
        keeps_tombstones: false,
        captures: vec![id("things")],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_comes_back_from_targets() {
    let without_server_names = |(name, _): &(&str, ArrayRef)| *name != "xmin";
    for (shape, kind) in [
        (TargetShape::Rows, OutputKind::Merge),
        (TargetShape::Rows, OutputKind::Replace),
        (TargetShape::Versions, OutputKind::Versions),
        (TargetShape::Versions, OutputKind::ReplaceVersions),
    ] {
        let Stored { store, client, .. } = Stored::fresh().await;
        let (schema, mut arrays) = keyed(columns().into_iter().filter(without_server_names).collect());
        let mut fields: Vec<Field> = schema.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
        if shape == TargetShape::Versions {
            fields.extend(history::fields());
            let time = || Arc::new(TimestampMicrosecondArray::from_value(5, 5)) as ArrayRef;
            arrays.extend([time(), Arc::new(TimestampMicrosecondArray::new_null(5))]);
            arrays.push(Arc::new(BooleanArray::from(vec![true; 5])));
            arrays.extend([Arc::new(StringArray::from(vec!["INSERT"; 5])) as ArrayRef, time()]);
            arrays.push(Arc::new(BinaryArray::from(vec![&[0u8, 1][..]; 5])));
        }
        let target = rows_target(fields, shape.clone());
        store.prepare_target(&target).await.unwrap();
        let whole = RecordBatch::try_new(target.columns.clone(), arrays).unwrap();
        let part = |rows: RecordBatch| match shape {
            TargetShape::Rows => OutputRows::Upsert(rows),
            TargetShape::Versions => OutputRows::Version(rows),
        };
        // Straight into the empty table, then by way of a temporary one.
        let zero = Position::ZERO;
        commit(&store, &target, (0, 1), kind, vec![part(whole.slice(0, 2))], zero).await.unwrap();
        let second = match kind {
            OutputKind::Merge | OutputKind::Versions => whole.slice(2, 3),
            OutputKind::Replace | OutputKind::ReplaceVersions => whole.clone(),
        };
        commit(&store, &target, (1, 2), kind, vec![part(second)], zero).await.unwrap();
        let mut found = rows_of(&client, "public", &target).await;
        found.sort();
        let mut expected = plain_rows(&whole);
        expected.sort();
        assert_eq!(found, expected, "{kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_place_is_refused_by_the_name_of_its_column_and_nothing_is_written() {
    let misfits: [(&str, ArrayRef); 4] = [
        ("note", Arc::new(StringArray::from(vec!["fine", "a\0b"]))),
        ("day", Arc::new(Date32Array::from(vec![0, FIRST_DAY - 1]))),
        ("moment", Arc::new(TimestampMicrosecondArray::from(vec![0, FIRST_MICROS - 1]))),
        ("price", Arc::new(Decimal128Array::from(vec![1, 1000]).with_precision_and_scale(3, 0).unwrap())),
    ];
    for (name, array) in misfits {
        let Stored { store, client, .. } = Stored::fresh().await;
        let (schema, arrays) = keyed(vec![(name, array)]);
        let info = CaptureInfo { id: id("things"), schema: schema.clone() };
        store.prepare_captures("t", "here", &[info]).await.unwrap();
        let batch = changes(&schema, arrays.clone());
        let refused = append(&store, &[("things", Position::ZERO)], &[batch], at(1, 9)).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Data, "{refused}");
        assert!(refused.to_string().contains(name), "{refused}");
        println!("{refused}");
        assert_eq!(store.captures().await.unwrap()[&id("things")].watermark.staged, Position::ZERO);
        let fields = schema.columns.fields().iter().map(|field| field.as_ref().clone()).collect();
        let target = rows_target(fields, TargetShape::Rows);
        store.prepare_target(&target).await.unwrap();
        let rows = RecordBatch::try_new(target.columns.clone(), arrays).unwrap();
        let parts = vec![OutputRows::Upsert(rows)];
        let refused = commit(&store, &target, (0, 1), OutputKind::Merge, parts, Position::ZERO).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Data, "{refused}");
        assert!(refused.to_string().contains(name), "{refused}");
        assert_eq!(rows_of(&client, "public", &target).await.len(), 0);
        assert_eq!(store.checkpoint("things_out").await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_the_server_would_cut_are_refused_before_anything_is_made() {
    let Stored { store, client, .. } = Stored::fresh().await;
    let long = "n".repeat(64);
    let fields = |name: &str| vec![Field::new("id", DataType::Int64, false), Field::new(name, DataType::Int64, true)];
    for (table, column) in [(long.as_str(), "fine"), ("things", long.as_str())] {
        let schema = TableSchema::new(table, fields(column), &["id"]).unwrap();
        let info = CaptureInfo { id: id(table), schema: Arc::new(schema) };
        let refused = store.prepare_captures("t", "here", &[info]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Schema, "{refused}");
        assert!(refused.to_string().contains("63"), "{refused}");
        println!("{refused}");
    }
    let named = |projection: &str, column: &str| Target {
        projection: projection.into(),
        ..rows_target(fields(column), TargetShape::Rows)
    };
    for target in [named(&long, "fine"), named("fine", &long), named("fine", "ctid")] {
        let refused = store.prepare_target(&target).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Schema, "{refused}");
        println!("{refused}");
    }
    assert!(store.captures().await.unwrap().is_empty());
    let made = "select count(*) from pg_tables where tablename like 'stg_cdc_%' or tablename = 'fine'";
    assert_eq!(client.query_one(made, &[]).await.unwrap().get::<_, i64>(0), 0);
    store.prepare_target(&named("fine", "also_fine")).await.unwrap();
}
