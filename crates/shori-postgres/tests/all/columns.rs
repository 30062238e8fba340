//! Columns built of values in both formats.

use arrow::array::{Array, ArrayRef};
use arrow::datatypes::DataType;
use rand::Rng;
use shori_core::ErrorKind;
use shori_postgres::column_builder::{ColumnBuilder, Misfit};
use shori_postgres::column_types::{Kind, PostgresType, arrow_type};
use shori_postgres::message::Value;

use crate::bytes::{random_bytes, seeded};

pub fn column(oid: u32) -> PostgresType {
    PostgresType { oid, modifier: -1, kind: Kind::Base, name: format!("type_{oid}") }
}

pub fn numeric(precision: u8, scale: u8) -> PostgresType {
    let modifier = (i32::from(precision) << 16 | i32::from(scale)) + 4;
    PostgresType { oid: 1700, modifier, kind: Kind::Base, name: "numeric".into() }
}

pub fn builder(column: &PostgresType, as_text: bool) -> ColumnBuilder {
    ColumnBuilder::new(&arrow_type(column, as_text).unwrap(), column).unwrap()
}

/// The array of one value.
pub fn decoded(column: &PostgresType, value: Value<'_>) -> Result<ArrayRef, Misfit> {
    let mut builder = builder(column, false);
    builder.append(value)?;
    Ok(builder.finish())
}

/// The array of one value that is the same in both formats.
pub fn agreed(column: &PostgresType, text: &str, binary: &[u8]) -> ArrayRef {
    let from_text = decoded(column, Value::Text(text.as_bytes())).unwrap_or_else(|misfit| panic!("{text}: {misfit}"));
    let from_binary = decoded(column, Value::Binary(binary)).unwrap_or_else(|misfit| panic!("{text}: {misfit}"));
    assert_eq!(from_text.to_data(), from_binary.to_data(), "{text}");
    from_text
}

/// Both formats are refused, for the same reason.
pub fn refused(column: &PostgresType, text: &str, binary: &[u8]) {
    let from_text = decoded(column, Value::Text(text.as_bytes())).expect_err(text);
    assert_eq!(from_text, decoded(column, Value::Binary(binary)).expect_err(text), "{text}");
}

/// All types that are carried, with their Arrow types.
fn carried() -> Vec<PostgresType> {
    const OIDS: [u32; 21] =
        [16, 17, 18, 19, 20, 21, 23, 25, 26, 114, 142, 700, 701, 1042, 1043, 1082, 1083, 1114, 1184, 2950, 3802];
    let decimals = [numeric(38, 0), numeric(38, 38), numeric(18, 2), numeric(1, 1)];
    OIDS.into_iter().map(column).chain(decimals).collect()
}

#[test]
fn a_refused_value_leaves_no_trace_and_nulls_are_kept() {
    for column in carried() {
        let mut builder = builder(&column, false);
        assert!(builder.is_empty());
        builder.append_null();
        assert!(builder.append(Value::Unchanged).is_err());
        assert!(builder.append(Value::Text(b"\xff")).is_err(), "{}", column.name);
        let odd = builder.append(Value::Binary(&[0xff; 5])).is_err();
        assert_eq!(odd, column.oid != 17, "{}", column.name);
        builder.append(Value::Null).unwrap();
        assert_eq!(builder.len(), 2 + usize::from(!odd));
        let held = builder.memory_bytes();
        assert!(held >= builder.len() && held < 100, "{held}");
        let array = builder.finish();
        assert_eq!((array.null_count(), array.len()), (2, 2 + usize::from(!odd)), "{}", column.name);
        assert_eq!(array.data_type(), &arrow_type(&column, false).unwrap());
    }
}

#[test]
fn a_column_configured_as_text_takes_what_is_printed_alone() {
    let interval = column(1186);
    for (column, printed) in [(&interval, "1 mon -3 days"), (&numeric(18, 2), "NaN"), (&column(1082), "infinity")] {
        let mut builder = builder(column, true);
        assert!(builder.append(Value::Binary(printed.as_bytes())).is_err());
        builder.append(Value::Text(printed.as_bytes())).unwrap();
        assert_eq!(arrow::util::display::array_value_to_string(&builder.finish(), 0).unwrap(), printed);
    }
    // Text is text in both formats, configured or not.
    let mut builder = builder(&column(25), true);
    builder.append(Value::Binary(b"a")).unwrap();
    assert_eq!(builder.finish().len(), 1);
}

#[test]
fn a_column_is_carried_as_its_own_type_or_as_text() {
    for (column, data_type) in [
        (column(20), DataType::Int32),
        (column(1186), DataType::Int64),
        (numeric(18, 2), DataType::Decimal128(18, 3)),
        (column(25), DataType::Binary),
    ] {
        let refused = ColumnBuilder::new(&data_type, &column).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Schema);
    }
}

#[test]
fn random_values_never_panic() {
    const LENGTHS: [usize; 8] = [1, 2, 4, 8, 16, 10, 14, 40];
    const LETTERS: &[u8] = b"0123456789-+:. TBCtfeENaInfinity\\x";
    let mut rng = seeded(0x5eed_0003);
    let carried = carried();
    for _ in 0..30_000 {
        let column = &carried[rng.random_range(0..carried.len())];
        let mut builder = builder(column, false);
        for _ in 0..20 {
            let mut bytes = match rng.random_range(0..3) {
                0 => random_bytes(&mut rng, 40),
                1 => (0..rng.random_range(0..30)).map(|_| LETTERS[rng.random_range(0..LETTERS.len())]).collect(),
                _ => vec![0; LENGTHS[rng.random_range(0..LENGTHS.len())]],
            };
            if let Some(at) = bytes.len().checked_sub(1) {
                bytes[rng.random_range(0..=at)] = rng.random();
            }
            let rows = builder.len();
            let taken = [Value::Text(&bytes), Value::Binary(&bytes)].map(|value| builder.append(value).is_ok());
            assert_eq!(builder.len(), rows + taken.into_iter().filter(|taken| *taken).count());
        }
        let rows = builder.len();
        assert_eq!(builder.finish().len(), rows);
    }
}

#[test]
fn text_that_is_printed_nearly_right_never_panics() {
    const PRINTED: [&str; 8] = [
        "2024-01-02 03:04:05.678901+05:30:15 BC",
        "294276-12-31 23:59:59.999999",
        "5874897-12-31 BC",
        "23:59:59.999999",
        "-99999999999999999999999999999999999999.99",
        "-1.7976931348623157e+308",
        "\\x00ff00ff",
        "-9223372036854775808",
    ];
    let mut rng = seeded(0x5eed_0004);
    let carried = carried();
    for _ in 0..300_000 {
        let mut text = PRINTED[rng.random_range(0..PRINTED.len())].as_bytes().to_vec();
        text.truncate(rng.random_range(0..=text.len()));
        if let Some(last) = text.len().checked_sub(1) {
            text[rng.random_range(0..=last)] = rng.random_range(b' '..=b'~');
        }
        let _ = decoded(&carried[rng.random_range(0..carried.len())], Value::Text(&text));
    }
}
