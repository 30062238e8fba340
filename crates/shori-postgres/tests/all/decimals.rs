//! `numeric` in both formats.

use arrow::array::AsArray;
use arrow::datatypes::Decimal128Type;
use rand::Rng;
use shori_postgres::message::Value;

use crate::bytes::{Bytes, seeded};
use crate::columns::{agreed, decoded, numeric, refused};

/// What `numeric_send` writes for printed digits: no zero digits at either end, as the server keeps it.
fn binary(text: &str) -> Vec<u8> {
    let unsigned = text.trim_start_matches('-');
    let (whole, places) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    let mut padded = "0".repeat(whole.len().next_multiple_of(4) - whole.len()) + whole;
    let mut weight = (padded.len() / 4) as i16 - 1;
    padded += places;
    padded += &"0".repeat(padded.len().next_multiple_of(4) - padded.len());
    let digits: Vec<u16> = (0..padded.len()).step_by(4).map(|at| padded[at..at + 4].parse().unwrap()).collect();
    let leading = digits.iter().take_while(|digit| **digit == 0).count();
    let mut kept = &digits[leading..];
    weight -= leading as i16;
    while let [rest @ .., 0] = kept {
        kept = rest;
    }
    if kept.is_empty() {
        weight = 0;
    }
    let sign = if text.starts_with('-') && !kept.is_empty() { 0x4000 } else { 0 };
    encoded(weight, sign, places.len() as u16, kept)
}

fn encoded(weight: i16, sign: u16, places: u16, digits: &[u16]) -> Vec<u8> {
    let head = Bytes::default().u16(digits.len() as u16).u16(weight as u16).u16(sign).u16(places);
    digits.iter().fold(head, |bytes, digit| bytes.u16(*digit)).0
}

fn agreed_decimal(text: &str, precision: u8, scale: u8) -> i128 {
    agreed(&numeric(precision, scale), text, &binary(text)).as_primitive::<Decimal128Type>().value(0)
}

fn from_binary(bytes: &[u8], precision: u8, scale: u8) -> Option<i128> {
    let array = decoded(&numeric(precision, scale), Value::Binary(bytes)).ok()?;
    Some(array.as_primitive::<Decimal128Type>().value(0))
}

#[test]
fn decimals_stay_decimals() {
    let nines = "9".repeat(38);
    for (text, precision, scale, expected) in [
        ("12.30", 18, 2, 1230),
        ("-0.05", 18, 2, -5),
        ("0", 18, 2, 0),
        ("0.00", 18, 2, 0),
        ("1.2300", 18, 2, 123),
        ("10000", 9, 0, 10_000),
        ("100000000", 9, 0, 100_000_000),
        ("-1", 1, 0, -1),
        ("0.0001", 4, 4, 1),
        ("0.00001", 5, 5, 1),
        ("0.000010", 38, 38, 10i128.pow(33)),
        ("1234567.8901", 11, 4, 12_345_678_901),
        ("9999999999999999.99", 18, 2, 999_999_999_999_999_999),
        (&nines, 38, 0, 10i128.pow(38) - 1),
        (&format!("-{nines}"), 38, 0, 1 - 10i128.pow(38)),
        (&format!("0.{nines}"), 38, 38, 10i128.pow(38) - 1),
        (&format!("{}.{}", &nines[..19], &nines[19..]), 38, 19, 10i128.pow(38) - 1),
        (&format!("-{}.{}", &nines[..1], &nines[1..]), 38, 37, 1 - 10i128.pow(38)),
    ] {
        assert_eq!(agreed_decimal(text, precision, scale), expected, "{text}");
    }
}

#[test]
fn what_a_decimal_cannot_hold_is_refused() {
    for (text, precision, scale) in [
        ("1.234", 18, 2),
        ("-0.001", 18, 2),
        ("0.00000000000000000001", 18, 2),
        ("0.5", 38, 0),
        ("10000000000000000.00", 18, 2),
        ("10", 1, 0),
        ("1", 1, 1),
        ("1", 38, 38),
        (&"9".repeat(39), 38, 0),
        (&"9".repeat(1000), 38, 0),
        (&format!("-1{}", "0".repeat(500)), 38, 2),
    ] {
        refused(&numeric(precision, scale), text, &binary(text));
    }
    for (text, sign) in [("NaN", 0xc000), ("Infinity", 0xd000), ("-Infinity", 0xf000)] {
        refused(&numeric(18, 2), text, &encoded(0, sign, 0, &[]));
    }
}

#[test]
fn what_is_no_numeric_is_refused() {
    for text in ["", "-", ".", ".5", "5.", "1e3", "1,5", " 1", "1 ", "1.2.3", "+1", "--1", "nan", "-.5", "1.-5", "é"] {
        assert!(decoded(&numeric(18, 2), Value::Text(text.as_bytes())).is_err(), "{text}");
    }
    for bytes in [
        vec![],
        vec![0; 7],
        encoded(0, 0, 0, &[1])[..9].to_vec(),
        [encoded(0, 0, 0, &[1]), vec![0]].concat(),
        encoded(0, 0, 0, &[10_000]),
        encoded(0, 0, 0, &[u16::MAX]),
        encoded(0, 1, 0, &[1]),
        encoded(0, 0x8000, 0, &[1]),
        encoded(i16::MAX, 0, 0, &[1]),
        encoded(i16::MIN, 0, 0, &[1]),
        Bytes::default().u16(u16::MAX).u16(0).u16(0).u16(0).0,
    ] {
        assert_eq!(from_binary(&bytes, 18, 2), None, "{bytes:?}");
    }
}

#[test]
fn digits_that_are_zero_count_nothing_wherever_they_stand() {
    assert_eq!(from_binary(&encoded(7, 0, 2, &[]), 18, 2), Some(0));
    assert_eq!(from_binary(&encoded(i16::MAX, 0x4000, 2, &[0, 0]), 18, 2), Some(0));
    assert_eq!(from_binary(&encoded(i16::MIN, 0, 2, &[0]), 18, 2), Some(0));
    assert_eq!(from_binary(&encoded(20, 0, 2, &[0; 20]), 18, 2), Some(0));
    let mut digits = [0; 24];
    digits[20] = 12;
    digits[21] = 3000;
    assert_eq!(from_binary(&encoded(20, 0, 2, &digits), 18, 2), Some(1230));
    let column = numeric(18, 2);
    let text = format!("{}12.30{}", "0".repeat(500), "0".repeat(500));
    let array = decoded(&column, Value::Text(text.as_bytes())).unwrap();
    assert_eq!(array.as_primitive::<Decimal128Type>().value(0), 1230);
}

#[test]
fn random_decimals_are_the_same_in_both_formats() {
    let mut rng = seeded(0x5eed_0005);
    for _ in 0..100_000 {
        let precision = rng.random_range(1..=38u8);
        let scale = rng.random_range(0..=precision);
        let digits = rng.random_range(1..=precision);
        let value = rng.random_range(0..10i128.pow(digits.into())) * if rng.random() { -1 } else { 1 };
        let padded = format!("{:0>1$}", value.unsigned_abs(), usize::from(scale) + 1);
        let (whole, places) = padded.split_at(padded.len() - usize::from(scale));
        let sign = if value < 0 { "-" } else { "" };
        let point = if scale > 0 { "." } else { "" };
        let text = format!("{sign}{whole}{point}{places}");
        assert_eq!(agreed_decimal(&text, precision, scale), value, "{text} as numeric({precision},{scale})");
    }
}
