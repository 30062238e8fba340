//! Truth values, integers, floats and bytes, in both formats; and what is text, from binary formats that are not.

use std::str::FromStr;

use crate::column_builder::Misfit;

const NO_BOOLEAN: Misfit = "not a boolean";
const NO_INTEGER: Misfit = "not an integer of the column's type";
const NO_FLOAT: Misfit = "not a floating-point number of the column's type";
const NO_BYTES: Misfit = "not bytes in hexadecimal like \\x00ff";
const NO_CHAR: Misfit = "not a \"char\"";
const NO_UUID: Misfit = "not a UUID";
const NO_JSONB: Misfit = "not of version 1 of jsonb's binary format";
const WRONG_SIZE: Misfit = "a binary value of another size than the column's type";

pub(crate) fn utf8(text: &[u8]) -> Result<&str, Misfit> {
    std::str::from_utf8(text).map_err(|_| "not UTF-8")
}

pub(crate) fn boolean_from_text(text: &[u8]) -> Result<bool, Misfit> {
    match text {
        b"t" => Ok(true),
        b"f" => Ok(false),
        _ => Err(NO_BOOLEAN),
    }
}

pub(crate) fn boolean_from_binary(bytes: &[u8]) -> Result<bool, Misfit> {
    match bytes {
        [1] => Ok(true),
        [0] => Ok(false),
        _ => Err(NO_BOOLEAN),
    }
}

/// The bytes of a number, if there are as many as its type has.
pub(crate) fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Misfit> {
    bytes.try_into().map_err(|_| WRONG_SIZE)
}

pub(crate) fn integer_from_text<T: FromStr>(text: &[u8]) -> Result<T, Misfit> {
    match utf8(text)?.parse() {
        Ok(number) if !text.starts_with(b"+") => Ok(number),
        _ => Err(NO_INTEGER),
    }
}

/// The number nearest to the digits, which are enough to tell it from its neighbours. One beyond the type's range, at
/// either end, is refused.
pub(crate) fn float_from_text<T: FromStr + Copy + Into<f64>>(text: &[u8]) -> Result<T, Misfit> {
    let unsigned = text.strip_prefix(b"-").unwrap_or(text);
    let is_special = text == b"NaN" || unsigned == b"Infinity";
    let is_digit = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'+' | b'-');
    let is_number = unsigned.first().is_some_and(u8::is_ascii_digit) && unsigned.iter().all(is_digit);
    if !is_special && !is_number {
        return Err(NO_FLOAT);
    }
    let number: T = utf8(text)?.parse().map_err(|_| NO_FLOAT)?;
    let is_zero = || unsigned.iter().take_while(|byte| **byte != b'e').all(|byte| matches!(byte, b'0' | b'.'));
    match number.into() {
        wide if is_special || (wide.is_finite() && (wide != 0.0 || is_zero())) => Ok(number),
        _ => Err(NO_FLOAT),
    }
}

/// All NaNs are one value to PostgreSQL, and one here.
pub(crate) fn single_from_binary(bytes: &[u8]) -> Result<f32, Misfit> {
    let number = f32::from_be_bytes(fixed(bytes)?);
    Ok(if number.is_nan() { f32::NAN } else { number })
}

pub(crate) fn double_from_binary(bytes: &[u8]) -> Result<f64, Misfit> {
    let number = f64::from_be_bytes(fixed(bytes)?);
    Ok(if number.is_nan() { f64::NAN } else { number })
}

/// Puts what `\x00ff` stands for into `bytes`.
pub(crate) fn bytes_from_text(text: &[u8], bytes: &mut Vec<u8>) -> Result<(), Misfit> {
    let nibble = |digit: u8| match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(NO_BYTES),
    };
    let (pairs, odd) = text.strip_prefix(b"\\x").ok_or(NO_BYTES)?.as_chunks::<2>();
    if !odd.is_empty() {
        return Err(NO_BYTES);
    }
    bytes.clear();
    bytes.reserve(pairs.len());
    for &[high, low] in pairs {
        bytes.push(nibble(high)? << 4 | nibble(low)?);
    }
    Ok(())
}

/// A `"char"` as PostgreSQL 16 and newer print it: nothing for 0, and octal digits for what is not ASCII.
pub(crate) fn char_from_binary(bytes: &[u8]) -> Result<String, Misfit> {
    match *bytes {
        [0] => Ok(String::new()),
        [byte @ 1..=0x7f] => Ok(char::from(byte).into()),
        [byte] => Ok(format!("\\{byte:03o}")),
        _ => Err(NO_CHAR),
    }
}

/// A UUID in lower case, with its hyphens.
pub(crate) fn uuid_from_binary(bytes: &[u8]) -> Result<String, Misfit> {
    const HYPHENS_BEFORE: [usize; 4] = [4, 6, 8, 10];
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bytes: [u8; 16] = bytes.try_into().map_err(|_| NO_UUID)?;
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.into_iter().enumerate() {
        if HYPHENS_BEFORE.contains(&at) {
            text.push('-');
        }
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    Ok(text)
}

/// The text of a `jsonb`, after its version.
pub(crate) fn jsonb_from_binary(bytes: &[u8]) -> Result<&str, Misfit> {
    match bytes {
        [1, text @ ..] => utf8(text),
        _ => Err(NO_JSONB),
    }
}
