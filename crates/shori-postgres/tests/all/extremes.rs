//! The ends of each type, in both formats.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{
    Date32Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType,
    TimestampMicrosecondType,
};
use chrono::{NaiveDate, NaiveDateTime};
use rand::Rng;
use shori_postgres::column_types::{Kind, PostgresType};
use shori_postgres::message::Value;

use crate::bytes::seeded;
use crate::columns::{agreed, column, decoded, refused};

const BOOL: u32 = 16;
const BYTEA: u32 = 17;
const CHAR: u32 = 18;
const INT8: u32 = 20;
const INT2: u32 = 21;
const INT4: u32 = 23;
const TEXT: u32 = 25;
const OID: u32 = 26;
const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const DATE: u32 = 1082;
const TIME: u32 = 1083;
const TIMESTAMP: u32 = 1114;
const TIMESTAMPTZ: u32 = 1184;
const UUID: u32 = 2950;
const JSONB: u32 = 3802;

const EPOCH_DAYS: i32 = 10_957;
const EPOCH_MICROS: i64 = 946_684_800_000_000;
const DAY_MICROS: i64 = 86_400_000_000;

fn no_value(oid: u32, texts: &[&str], binaries: &[&[u8]]) {
    let column = column(oid);
    for text in texts {
        assert!(decoded(&column, Value::Text(text.as_bytes())).is_err(), "{text}");
    }
    for bytes in binaries {
        assert!(decoded(&column, Value::Binary(bytes)).is_err(), "{bytes:?}");
    }
}

#[test]
fn truth_values() {
    assert!(agreed(&column(BOOL), "t", &[1]).as_boolean().value(0));
    assert!(!agreed(&column(BOOL), "f", &[0]).as_boolean().value(0));
    no_value(BOOL, &["", "true", "T", "1"], &[&[], &[2], &[0, 1]]);
}

#[test]
fn integers() {
    for number in [i16::MIN, -1, 0, 1, i16::MAX] {
        let array = agreed(&column(INT2), &number.to_string(), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Int16Type>().value(0), number);
    }
    for number in [i32::MIN, -1, 0, 1, i32::MAX] {
        let array = agreed(&column(INT4), &number.to_string(), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Int32Type>().value(0), number);
    }
    for number in [i64::MIN, -1, 0, 1, i64::MAX] {
        let array = agreed(&column(INT8), &number.to_string(), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Int64Type>().value(0), number);
    }
    for number in [0, 1, u32::MAX] {
        let array = agreed(&column(OID), &number.to_string(), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Int64Type>().value(0), i64::from(number));
    }
    no_value(INT2, &["", "32768", "-32769", "+1", " 1", "1.0", "0x1", "1_000"], &[&[], &[1], &[0; 4]]);
    no_value(INT4, &["2147483648"], &[&[0; 2], &[0; 8]]);
    no_value(INT8, &["9223372036854775808"], &[&[0; 4], &[0; 9]]);
    no_value(OID, &["-1", "4294967296"], &[&[0; 8]]);
}

#[test]
fn floats_keep_infinities_and_their_last_bit() {
    let singles = [0.0, -0.0, 1.5, f32::MIN, f32::MAX, f32::MIN_POSITIVE, f32::from_bits(1), 16_777_216.0, 0.1];
    for number in singles {
        let array = agreed(&column(FLOAT4), &format!("{number:e}"), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Float32Type>().value(0).to_bits(), number.to_bits());
    }
    for number in [0.0, -0.0, 0.1, f64::MIN, f64::MAX, f64::MIN_POSITIVE, f64::from_bits(1), 9_007_199_254_740_993.0] {
        let array = agreed(&column(FLOAT8), &format!("{number:e}"), &number.to_be_bytes());
        assert_eq!(array.as_primitive::<Float64Type>().value(0).to_bits(), number.to_bits());
    }
    for (text, single, double) in [
        ("Infinity", f32::INFINITY, f64::INFINITY),
        ("-Infinity", f32::NEG_INFINITY, f64::NEG_INFINITY),
        ("1e+20", 1e20, 1e20),
        ("1.5e-07", 1.5e-7, 1.5e-7),
    ] {
        let array = agreed(&column(FLOAT4), text, &single.to_be_bytes());
        assert_eq!(array.as_primitive::<Float32Type>().value(0), single);
        let array = agreed(&column(FLOAT8), text, &double.to_be_bytes());
        assert_eq!(array.as_primitive::<Float64Type>().value(0), double);
    }
    // Whatever its bits, a NaN is the one that is printed.
    for bits in [0x7fc0_0000u32, 0xffc0_0000, 0x7f80_0001] {
        let array = agreed(&column(FLOAT4), "NaN", &bits.to_be_bytes());
        assert!(array.as_primitive::<Float32Type>().value(0).is_nan());
    }
    for bits in [0x7ff8_0000_0000_0000u64, 0xfff8_0000_0000_0000, 0x7ff0_0000_0000_0001] {
        let array = agreed(&column(FLOAT8), "NaN", &bits.to_be_bytes());
        assert!(array.as_primitive::<Float64Type>().value(0).is_nan());
    }
    let spellings = ["", "nan", "inf", "infinity", "-NaN", "+1", ".5", "1e", "1e5e5", "0x10", "1 ", "--1"];
    no_value(FLOAT8, &spellings, &[&[0; 4], &[0; 9]]);
    no_value(FLOAT8, &["1e309", "-1e309", "1e-400"], &[]);
    no_value(FLOAT4, &["1e39", "-1e39", "1e-60"], &[&[0; 8]]);
}

#[test]
fn dates_to_the_ends_of_the_calendar() {
    for (text, days) in [
        ("2000-01-01", 0),
        ("1970-01-01", -EPOCH_DAYS),
        ("1999-12-31", -1),
        ("2024-02-29", 8825),
        // The first and the last day that PostgreSQL has.
        ("4714-11-24 BC", -2_451_545),
        ("5874897-12-31", 2_145_031_948),
    ] {
        let array = agreed(&column(DATE), text, &i32::to_be_bytes(days));
        assert_eq!(array.as_primitive::<Date32Type>().value(0), days + EPOCH_DAYS, "{text}");
    }
    for (text, (year, month, day)) in [
        ("0001-12-31 BC", (0, 12, 31)),
        ("0001-01-01", (1, 1, 1)),
        ("0044-03-15 BC", (-43, 3, 15)),
        ("4713-01-01 BC", (-4712, 1, 1)),
        ("10000-01-01", (10_000, 1, 1)),
        ("262000-12-31", (262_000, 12, 31)),
    ] {
        let date = NaiveDate::from_ymd_opt(year, month, day).unwrap();
        let days = (date - NaiveDate::from_ymd_opt(2000, 1, 1).unwrap()).num_days() as i32;
        agreed(&column(DATE), text, &days.to_be_bytes());
    }
    refused(&column(DATE), "infinity", &i32::MAX.to_be_bytes());
    refused(&column(DATE), "-infinity", &i32::MIN.to_be_bytes());
    // The number that another store takes for infinity.
    refused(&column(DATE), "5881580-07-11", &(i32::MAX - EPOCH_DAYS).to_be_bytes());
    refused(&column(DATE), "9999999-01-01", &(i32::MAX - 1).to_be_bytes());
    no_value(DATE, &["9999999-01-01 BC", "2024-02-30"], &[&[], &[0; 8]]);
}

#[test]
fn times_end_before_midnight() {
    for (text, micros) in
        [("00:00:00", 0), ("00:00:00.000001", 1), ("03:04:05.1", 11_045_100_000), ("23:59:59.999999", DAY_MICROS - 1)]
    {
        let array = agreed(&column(TIME), text, &i64::to_be_bytes(micros));
        assert_eq!(array.as_primitive::<Time64MicrosecondType>().value(0), micros, "{text}");
    }
    refused(&column(TIME), "24:00:00", &DAY_MICROS.to_be_bytes());
    refused(&column(TIME), "25:00:00", &(DAY_MICROS + 1).to_be_bytes());
    refused(&column(TIME), "-00:00:01", &(-1i64).to_be_bytes());
    no_value(TIME, &[], &[&[0; 4], &i64::MIN.to_be_bytes(), &i64::MAX.to_be_bytes()]);
}

#[test]
fn timestamps_to_the_ends_of_the_range() {
    for (text, micros) in [
        ("2000-01-01 00:00:00", 0),
        ("1999-12-31 23:59:59.999999", -1),
        ("1970-01-01 00:00:00", -EPOCH_MICROS),
        ("2024-01-02 03:04:05.678901", 757_479_845_678_901),
        // The first that PostgreSQL has, and the last that microseconds since 1970 hold.
        ("4714-11-24 00:00:00 BC", -211_813_488_000_000_000),
        ("294247-01-10 04:00:54.775806", i64::MAX - 1 - EPOCH_MICROS),
    ] {
        for (oid, text) in [(TIMESTAMP, text.to_owned()), (TIMESTAMPTZ, with_offset(text, "+00"))] {
            let array = agreed(&column(oid), &text, &i64::to_be_bytes(micros));
            assert_eq!(array.as_primitive::<TimestampMicrosecondType>().value(0), micros + EPOCH_MICROS, "{text}");
        }
    }
    for (text, micros) in [
        ("infinity", i64::MAX),
        ("-infinity", i64::MIN),
        // The number that another store takes for infinity, and the last that PostgreSQL has.
        ("294247-01-10 04:00:54.775807", i64::MAX - EPOCH_MICROS),
        ("294276-12-31 23:59:59.999999", 9_223_371_331_199_999_999),
    ] {
        refused(&column(TIMESTAMP), text, &micros.to_be_bytes());
        let text = if text.ends_with('y') { text.to_owned() } else { with_offset(text, "+00") };
        refused(&column(TIMESTAMPTZ), &text, &micros.to_be_bytes());
    }
    no_value(TIMESTAMP, &["9999999-12-31 00:00:00", "9999999-12-31 00:00:00 BC"], &[&[], &[0; 4]]);
}

/// The offset stands before the era.
fn with_offset(text: &str, offset: &str) -> String {
    match text.strip_suffix(" BC") {
        Some(text) => format!("{text}{offset} BC"),
        None => format!("{text}{offset}"),
    }
}

#[test]
fn instants_are_told_in_utc() {
    for (text, utc) in [
        ("2024-01-02 03:04:05.678901+00", "2024-01-02 03:04:05.678901"),
        ("2024-01-02 03:04:05+05:30", "2024-01-01 21:34:05"),
        ("1900-01-01 00:00:00-03:30:15", "1900-01-01 03:30:15"),
        ("2024-01-01 00:00:00+15:59:59", "2023-12-31 08:00:01"),
        ("0001-12-31 23:59:59-00:00:01 BC", "0001-01-01 00:00:00"),
        ("0044-03-15 12:00:00+00 BC", "0044-03-15 12:00:00 BC"),
    ] {
        let column = column(TIMESTAMPTZ);
        let instant = decoded(&column, Value::Text(text.as_bytes())).unwrap();
        let same = decoded(&column, Value::Text(with_offset(utc, "+00").as_bytes())).unwrap();
        assert_eq!(instant.to_data(), same.to_data(), "{text}");
    }
}

#[test]
fn random_timestamps_are_the_same_in_both_formats() {
    let mut rng = seeded(0x5eed_0006);
    let first = NaiveDate::from_ymd_opt(1, 1, 1).unwrap().and_hms_opt(0, 0, 0).unwrap().and_utc().timestamp_micros();
    let last = NaiveDate::from_ymd_opt(9999, 12, 31).unwrap().and_hms_opt(0, 0, 0).unwrap().and_utc();
    for _ in 0..50_000 {
        let micros = rng.random_range(first..last.timestamp_micros());
        let time: NaiveDateTime = chrono::DateTime::from_timestamp_micros(micros).unwrap().naive_utc();
        let text = time.format("%Y-%m-%d %H:%M:%S%.6f").to_string();
        let array = agreed(&column(TIMESTAMP), &text, &(micros - EPOCH_MICROS).to_be_bytes());
        assert_eq!(array.as_primitive::<TimestampMicrosecondType>().value(0), micros, "{text}");
    }
}

#[test]
fn text_is_taken_as_it_is() {
    let enumeration = PostgresType { oid: 90_000, modifier: -1, kind: Kind::Enum, name: "mood".into() };
    let citext = PostgresType { name: "citext".into(), ..column(90_001) };
    let megabyte = "aß\u{10348}".repeat(150_000);
    assert!(megabyte.len() > 1 << 20);
    let types = [19, TEXT, 114, 142, 1042, 1043].map(column);
    for column in types.iter().chain([&enumeration, &citext]) {
        for text in ["", "  padded  ", "{\"a\": 1.0}", "\\x00", &megabyte] {
            assert_eq!(agreed(column, text, text.as_bytes()).as_string::<i32>().value(0), text);
        }
        for bytes in [&b"\xff"[..], b"a\xc3", b"\xed\xa0\x80"] {
            assert!(decoded(column, Value::Text(bytes)).is_err());
            assert!(decoded(column, Value::Binary(bytes)).is_err());
        }
    }
}

#[test]
fn what_is_text_and_written_otherwise_in_binary() {
    let text = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11";
    let bytes = 0xa0ee_bc99_9c0b_4ef8_bb6d_6bb9_bd38_0a11u128.to_be_bytes();
    assert_eq!(agreed(&column(UUID), text, &bytes).as_string::<i32>().value(0), text);
    agreed(&column(UUID), "00000000-0000-0000-0000-000000000000", &[0; 16]);
    no_value(UUID, &[], &[&[], &[0; 15], &[0; 17], text.as_bytes()]);
    agreed(&column(JSONB), "{\"a\": [1, null]}", b"\x01{\"a\": [1, null]}");
    no_value(JSONB, &[], &[&[], b"{}", b"\x02{}", b"\x01\xff"]);
    for (text, byte) in [("", 0), ("a", b'a'), ("\u{7f}", 0x7f), ("\\200", 0x80), ("\\377", 0xff)] {
        agreed(&column(CHAR), text, &[byte]);
    }
    no_value(CHAR, &[], &[&[], b"ab"]);
}

#[test]
fn bytes_in_hexadecimal() {
    let every: Vec<u8> = (0..=255).collect();
    let hexadecimal = |bytes: &[u8]| bytes.iter().fold("\\x".to_owned(), |text, byte| text + &format!("{byte:02x}"));
    for bytes in [&[][..], &[0], &[0xff, 0], &every, &every.repeat(4096)] {
        assert_eq!(agreed(&column(BYTEA), &hexadecimal(bytes), bytes).as_binary::<i32>().value(0), bytes);
    }
    no_value(BYTEA, &["", "\\", "\\x0", "\\x0g", "\\X00", "00", "\\000", "\\x 0", "\\x00 "], &[]);
}
