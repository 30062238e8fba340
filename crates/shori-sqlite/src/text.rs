//! Numbers and times from text, digit by digit: no allocation, no locale, and total.

/// Why a value does not fit the type of its column.
pub(crate) type Misfit = &'static str;

const MICROS_PER_SECOND: i64 = 1_000_000;
const SECONDS_PER_DAY: i64 = 86_400;

const NO_DECIMAL: Misfit = "not a decimal number";
const TOO_MANY_PLACES: Misfit = "more decimal places than the column's type has";
const TOO_LARGE: Misfit = "larger than the column's type holds";
const NO_DATE: Misfit = "not a date like 2026-01-02";
const NO_TIME: Misfit = "not a time like 03:04:05.123456";
const NO_TIMESTAMP: Misfit = "not a timestamp like 2026-01-02T03:04:05.123456Z";
const TOO_FINE: Misfit = "finer than a microsecond";

/// `[+-]digits[.digits]` as an integer of `10^-scale`. Places beyond `scale` must be zero.
pub(crate) fn decimal(text: &[u8], precision: u8, scale: i8) -> Result<i128, Misfit> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    let scale = scale.unsigned_abs() as usize;
    let (mut value, mut places, mut seen, mut after_point) = (0i128, 0usize, 0usize, false);
    for &byte in digits {
        match byte {
            b'0'..=b'9' => {
                seen += 1;
                let digit = i128::from(byte - b'0');
                if after_point {
                    if places == scale {
                        if digit != 0 {
                            return Err(TOO_MANY_PLACES);
                        }
                        continue;
                    }
                    places += 1;
                }
                value = value.checked_mul(10).and_then(|value| value.checked_add(digit)).ok_or(TOO_LARGE)?;
            }
            b'.' if !after_point && seen > 0 => after_point = true,
            _ => return Err(NO_DECIMAL),
        }
    }
    if seen == 0 || text.last() == Some(&b'.') {
        return Err(NO_DECIMAL);
    }
    let value = value.checked_mul(power_of_ten(scale - places)?).ok_or(TOO_LARGE)?;
    within(if negative { -value } else { value }, precision)
}

/// An integer as an integer of `10^-scale`.
pub(crate) fn decimal_from_integer(number: i64, precision: u8, scale: i8) -> Result<i128, Misfit> {
    let factor = power_of_ten(scale.unsigned_abs() as usize)?;
    within(i128::from(number).checked_mul(factor).ok_or(TOO_LARGE)?, precision)
}

/// A double is a decimal when it is the double nearest to one of `scale` places, and that decimal is the only such: up
/// to 15 significant digits. (SQLite turns `'12.30'` into a double in a column of NUMERIC affinity.)
pub(crate) fn decimal_from_real(number: f64, precision: u8, scale: i8) -> Result<i128, Misfit> {
    const UNIQUE_BELOW: f64 = 1e15;
    const EXACT_POWERS: i8 = 22;
    if !number.is_finite() || scale > EXACT_POWERS {
        return Err(NO_DECIMAL);
    }
    let factor = 10f64.powi(i32::from(scale));
    let nearest = (number * factor).round();
    if nearest.abs() >= UNIQUE_BELOW {
        return Err("a floating-point number too large to be a decimal exactly");
    }
    if nearest / factor != number {
        return Err(TOO_MANY_PLACES);
    }
    within(nearest as i128, precision)
}

fn power_of_ten(exponent: usize) -> Result<i128, Misfit> {
    10i128.checked_pow(exponent as u32).ok_or(TOO_LARGE)
}

fn within(value: i128, precision: u8) -> Result<i128, Misfit> {
    let limit = power_of_ten(usize::from(precision))?;
    if value.abs() < limit { Ok(value) } else { Err(TOO_LARGE) }
}

/// `YYYY-MM-DD` as days since 1970-01-01.
pub(crate) fn date(text: &[u8]) -> Result<i32, Misfit> {
    if text.len() == 10 { days(text).ok_or(NO_DATE) } else { Err(NO_DATE) }
}

/// `HH:MM[:SS[.fraction]]` as microseconds since midnight.
pub(crate) fn time(text: &[u8]) -> Result<i64, Misfit> {
    let (micros, rest) = time_of_day(text, NO_TIME)?;
    if rest.is_empty() { Ok(micros) } else { Err(NO_TIME) }
}

/// `YYYY-MM-DD[(T| )HH:MM[:SS[.fraction]][ ][Z|±HH[:MM]]]` as microseconds since 1970-01-01; an offset is taken off.
pub(crate) fn timestamp(text: &[u8]) -> Result<i64, Misfit> {
    let (day, rest) = text.split_at_checked(10).ok_or(NO_TIMESTAMP)?;
    let midnight = i64::from(days(day).ok_or(NO_TIMESTAMP)?) * SECONDS_PER_DAY * MICROS_PER_SECOND;
    let rest = match rest {
        [] => return Ok(midnight),
        [b'T' | b't' | b' ', rest @ ..] => rest,
        _ => return Err(NO_TIMESTAMP),
    };
    let (micros, rest) = time_of_day(rest, NO_TIMESTAMP)?;
    Ok(midnight + micros - offset(rest)? * MICROS_PER_SECOND)
}

/// Seconds east of UTC.
fn offset(text: &[u8]) -> Result<i64, Misfit> {
    let text = if let [b' ', rest @ ..] = text { rest } else { text };
    let (sign, digits) = match text {
        [] | [b'Z' | b'z'] => return Ok(0),
        [b'+', rest @ ..] => (1, rest),
        [b'-', rest @ ..] => (-1, rest),
        _ => return Err(NO_TIMESTAMP),
    };
    let (hours, minutes) = match digits {
        [a, b] => (two(&[*a, *b]), Some(0)),
        [a, b, c, d] | [a, b, b':', c, d] => (two(&[*a, *b]), two(&[*c, *d])),
        _ => return Err(NO_TIMESTAMP),
    };
    match (hours, minutes) {
        (Some(hours @ 0..=23), Some(minutes @ 0..=59)) => Ok(sign * i64::from(hours * 3600 + minutes * 60)),
        _ => Err(NO_TIMESTAMP),
    }
}

fn time_of_day(text: &[u8], misfit: Misfit) -> Result<(i64, &[u8]), Misfit> {
    let part = |at: usize, most: u32| text.get(at..at + 2).and_then(two).filter(|number| *number <= most).ok_or(misfit);
    if text.get(2) != Some(&b':') {
        return Err(misfit);
    }
    let minutes = part(0, 23)? * 60 + part(3, 59)?;
    let (mut seconds, mut micros, mut end) = (0, 0, 5);
    if text.get(5) == Some(&b':') {
        seconds = part(6, 59)?;
        end = 8;
        if text.get(8) == Some(&b'.') {
            let digits = text[9..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            micros = fraction(&text[9..9 + digits], misfit)?;
            end = 9 + digits;
        }
    }
    Ok((i64::from(minutes * 60 + seconds) * MICROS_PER_SECOND + micros, &text[end..]))
}

/// Up to nine digits after the point, as microseconds.
fn fraction(digits: &[u8], misfit: Misfit) -> Result<i64, Misfit> {
    if digits.is_empty() || digits.len() > 9 {
        return Err(misfit);
    }
    if digits.iter().skip(6).any(|digit| *digit != b'0') {
        return Err(TOO_FINE);
    }
    Ok((0..6).fold(0, |micros, at| micros * 10 + digits.get(at).map_or(0, |digit| i64::from(digit - b'0'))))
}

/// Days since 1970-01-01 of a `YYYY-MM-DD` of exactly ten bytes, if there is such a day.
fn days(text: &[u8]) -> Option<i32> {
    let [y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1] = *text else { return None };
    let year = (two(&[y0, y1])? * 100 + two(&[y2, y3])?) as i32;
    let (month, day) = (two(&[m0, m1])? as i32, two(&[d0, d1])? as i32);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i32::from(leap),
        _ => return None,
    };
    if !(1..=last).contains(&day) {
        return None;
    }
    // Years are counted from March, so that the leap day is the last of its year.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    Some(era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468)
}

fn two(digits: &[u8]) -> Option<u32> {
    match digits {
        [a @ b'0'..=b'9', b @ b'0'..=b'9'] => Some(u32::from(a - b'0') * 10 + u32::from(b - b'0')),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::{DateTime, NaiveDate};

    #[test]
    fn spec4_08_decimals_stay_decimals() {
        assert_eq!(decimal(b"12.30", 18, 2), Ok(1230));
        assert_eq!(decimal(b"-0.05", 18, 2), Ok(-5));
        assert_eq!(decimal(b"+7", 18, 2), Ok(700));
        assert_eq!(decimal(b"1.2300", 18, 2), Ok(123));
        assert_eq!(decimal(b"9999999999999999.99", 18, 2), Ok(999_999_999_999_999_999));
        assert_eq!(decimal(b"10000000000000000.00", 18, 2), Err(TOO_LARGE));
        assert_eq!(decimal(b"1.234", 18, 2), Err(TOO_MANY_PLACES));
        for text in [&b""[..], b"-", b".", b".5", b"5.", b"1e3", b"1,5", b" 1", b"1.2.3", b"NaN", b"\xff"] {
            assert_eq!(decimal(text, 18, 2), Err(NO_DECIMAL), "{text:?}");
        }
        assert_eq!(decimal(&[b'9'; 60], 38, 0), Err(TOO_LARGE));
        assert_eq!(decimal_from_integer(i64::MIN, 38, 10).unwrap(), i128::from(i64::MIN) * 10_000_000_000);
        assert_eq!(decimal_from_integer(100, 4, 2), Err(TOO_LARGE));
    }

    #[test]
    fn a_real_is_a_decimal_only_when_nothing_is_lost() {
        assert_eq!(decimal_from_real(12.3, 18, 2), Ok(1230));
        assert_eq!(decimal_from_real(-0.01, 18, 2), Ok(-1));
        assert_eq!(decimal_from_real(0.1 + 0.2, 18, 2), Err(TOO_MANY_PLACES));
        assert_eq!(decimal_from_real(12.345, 18, 2), Err(TOO_MANY_PLACES));
        assert!(decimal_from_real(1e16, 38, 2).is_err());
        assert!(decimal_from_real(f64::INFINITY, 38, 2).is_err());
        for cents in [0i64, 1, 99, 100, 1_999, 123_456_789, 99_999_999_999_999] {
            let real: f64 = format!("{}.{:02}", cents / 100, cents % 100).parse().unwrap();
            assert_eq!(decimal_from_real(real, 18, 2), Ok(i128::from(cents)));
        }
    }

    #[test]
    fn spec4_08_timestamps_keep_their_microseconds() {
        let micros = |text: &str| timestamp(text.as_bytes());
        let expected = DateTime::parse_from_rfc3339("2026-01-02T03:04:05.123456Z").unwrap().timestamp_micros();
        for text in [
            "2026-01-02T03:04:05.123456Z",
            "2026-01-02 03:04:05.123456",
            "2026-01-02T03:04:05.123456000Z",
            "2026-01-02T05:34:05.123456+02:30",
            "2026-01-02T01:04:05.123456 -0200",
            "2026-01-02T01:04:05.123456-02",
        ] {
            assert_eq!(micros(text), Ok(expected), "{text}");
        }
        assert_eq!(micros("1970-01-01"), Ok(0));
        assert_eq!(micros("1969-12-31 23:59"), Ok(-60_000_000));
        assert_eq!(micros("2026-01-02T03:04:05.1"), Ok(expected - 23_456));
        assert_eq!(micros("2026-01-02T03:04:05.1234567Z"), Err(TOO_FINE));
        for text in [
            "",
            "2026",
            "2026-02-29",
            "2026-13-01",
            "2026-01-02T",
            "2026-01-02T24:00",
            "2026-01-02T03:60",
            "2026-01-02T03:04:60",
            "2026-01-02T03:04:05.",
            "2026-01-02T03:04:05.1234567890",
            "2026-01-02T03:04:05+25:00",
            "2026-01-02T03:04:05ZZ",
            "2026-01-02T3:04",
            "1767322445",
            "é026-01-02",
        ] {
            assert!(micros(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_day_is_the_calendar_s() {
        let epoch = NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
        let mut day = NaiveDate::from_ymd_opt(1, 1, 1).unwrap();
        while day < NaiveDate::from_ymd_opt(2500, 1, 1).unwrap() {
            let text = day.format("%Y-%m-%d").to_string();
            assert_eq!(date(text.as_bytes()), Ok((day - epoch).num_days() as i32), "{text}");
            day = day.succ_opt().unwrap();
        }
    }

    #[test]
    fn times_of_day() {
        assert_eq!(time(b"03:04:05.123456"), Ok(11_045_123_456));
        assert_eq!(time(b"23:59"), Ok(86_340_000_000));
        assert!(time(b"03:04:05Z").is_err());
        assert!(time(b"").is_err());
    }
}
