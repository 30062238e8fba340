//! Exact decimals from `numeric`, in both formats. No floating point, no allocation, and total.

use crate::column_builder::Misfit;
use crate::reader::Reader;

pub(crate) const NOT_FINITE: Misfit = "NaN or infinite";
const NO_NUMERIC: Misfit = "not a numeric";
const TOO_MANY_PLACES: Misfit = "more decimal places than the column's type has";
const TOO_LARGE: Misfit = "larger than the column's type holds";

/// `[-]digits[.digits]` as an integer of `10^-scale`. Places beyond `scale` must be zero.
pub(crate) fn from_text(text: &[u8], precision: u8, scale: u8) -> Result<i128, Misfit> {
    if matches!(text, b"NaN" | b"Infinity" | b"-Infinity") {
        return Err(NOT_FINITE);
    }
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    let (mut value, mut places, mut after_point, mut last) = (0i128, 0u8, false, b'.');
    for &byte in digits {
        match byte {
            b'0'..=b'9' if after_point && places == scale => {
                if byte != b'0' {
                    return Err(TOO_MANY_PLACES);
                }
            }
            b'0'..=b'9' => {
                places += u8::from(after_point);
                let digit = i128::from(byte - b'0');
                value = value.checked_mul(10).and_then(|value| value.checked_add(digit)).ok_or(TOO_LARGE)?;
            }
            b'.' if !after_point && last != b'.' => after_point = true,
            _ => return Err(NO_NUMERIC),
        }
        last = byte;
    }
    if last == b'.' {
        return Err(NO_NUMERIC);
    }
    let value = value.checked_mul(power_of_ten(i32::from(scale - places))?).ok_or(TOO_LARGE)?;
    within(if negative { -value } else { value }, precision)
}

/// What `numeric_send` writes, as an integer of `10^-scale`: Int16 count, weight, sign and printed places, then as many
/// digits to the base 10,000, of which the first counts `10,000^weight`. Places beyond `scale` must be zero.
pub(crate) fn from_binary(bytes: &[u8], precision: u8, scale: u8) -> Result<i128, Misfit> {
    const DIGIT_PLACES: i32 = 4;
    let mut reader = Reader::new(bytes);
    let mut header = || -> Result<_, Misfit> { Ok((reader.u16()?, reader.i16()?, reader.u16()?, reader.u16()?)) };
    let (count, weight, sign, _printed_places) = header().map_err(|_| NO_NUMERIC)?;
    let negative = match sign {
        0x0000 => false,
        0x4000 => true,
        0xc000 | 0xd000 | 0xf000 => return Err(NOT_FINITE),
        _ => return Err(NO_NUMERIC),
    };
    if reader.rest().len() != 2 * usize::from(count) {
        return Err(NO_NUMERIC);
    }
    let mut value = 0i128;
    // The digit counts 10^exponent in units of the column's last place.
    let mut exponent = i32::from(weight) * DIGIT_PLACES + i32::from(scale);
    for _ in 0..count {
        let digit = reader.u16().map_err(|_| NO_NUMERIC)?;
        if digit >= 10_000 {
            return Err(NO_NUMERIC);
        }
        let part = match digit {
            0 => 0,
            _ if exponent >= 0 => i128::from(digit).checked_mul(power_of_ten(exponent)?).ok_or(TOO_LARGE)?,
            _ if exponent <= -DIGIT_PLACES => return Err(TOO_MANY_PLACES),
            _ => {
                let unit = power_of_ten(-exponent)?;
                if i128::from(digit) % unit != 0 {
                    return Err(TOO_MANY_PLACES);
                }
                i128::from(digit) / unit
            }
        };
        value = value.checked_add(part).ok_or(TOO_LARGE)?;
        exponent -= DIGIT_PLACES;
    }
    within(if negative { -value } else { value }, precision)
}

fn power_of_ten(exponent: i32) -> Result<i128, Misfit> {
    u32::try_from(exponent).ok().and_then(|exponent| 10i128.checked_pow(exponent)).ok_or(TOO_LARGE)
}

fn within(value: i128, precision: u8) -> Result<i128, Misfit> {
    if value.unsigned_abs() < power_of_ten(i32::from(precision))?.unsigned_abs() { Ok(value) } else { Err(TOO_LARGE) }
}
