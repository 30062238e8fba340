//! Dates and times in both formats. No allocation, no locale, no time zone but the offset that is printed, and total.
//!
//! The text is that of `datestyle` ISO (PostgreSQL documentation, "Date/Time Output"):
//! `2026-01-02 03:04:05.123456+05:30`, years of four digits or more, ` BC` at the end. Binary counts from 2000-01-01, in
//! days or microseconds. The calendar is the Gregorian one throughout, and 1 BC is the year before 1.

use crate::column_builder::Misfit;
use crate::message::POSTGRES_EPOCH_MICROS;

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_DAY: i64 = 86_400 * MICROS_PER_SECOND;
const POSTGRES_EPOCH_DAYS: i64 = POSTGRES_EPOCH_MICROS / MICROS_PER_DAY;

const NO_DATE: Misfit = "not a date like 2026-01-02";
const NO_TIME: Misfit = "not a time like 03:04:05.123456";
const NO_TIMESTAMP: Misfit = "not a timestamp like 2026-01-02 03:04:05.123456";
const NO_INSTANT: Misfit = "not a timestamp with an offset like 2026-01-02 03:04:05.123456+00";
const INFINITE: Misfit = "infinite";
const END_OF_DAY: Misfit = "24:00:00, where a time ends before midnight";
const OUT_OF_RANGE: Misfit = "outside the range of the column's type";

/// Days since 1970-01-01.
pub(crate) fn date_from_text(text: &[u8]) -> Result<i32, Misfit> {
    finite(text)?;
    let (date, before_christ) = without_era(text);
    match days(date, before_christ) {
        Some((days, [])) => date_in_range(days),
        _ => Err(NO_DATE),
    }
}

pub(crate) fn date_from_binary(bytes: &[u8]) -> Result<i32, Misfit> {
    match i32::from_be_bytes(bytes.try_into().map_err(|_| NO_DATE)?) {
        i32::MIN | i32::MAX => Err(INFINITE),
        days => date_in_range(i64::from(days) + POSTGRES_EPOCH_DAYS),
    }
}

/// Microseconds since midnight, below a day.
pub(crate) fn time_from_text(text: &[u8]) -> Result<i64, Misfit> {
    match time_of_day(text) {
        Some((micros, [])) => Ok(micros),
        _ if text == b"24:00:00" => Err(END_OF_DAY),
        _ => Err(NO_TIME),
    }
}

pub(crate) fn time_from_binary(bytes: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(bytes.try_into().map_err(|_| NO_TIME)?) {
        micros @ 0..MICROS_PER_DAY => Ok(micros),
        MICROS_PER_DAY => Err(END_OF_DAY),
        _ => Err(NO_TIME),
    }
}

/// Microseconds since 1970-01-01 00:00, by the same clock.
pub(crate) fn timestamp_from_text(text: &[u8]) -> Result<i64, Misfit> {
    finite(text)?;
    match date_and_time(text) {
        Some((micros, [])) => timestamp_in_range(micros),
        _ => Err(NO_TIMESTAMP),
    }
}

/// Microseconds since 1970-01-01 00:00 UTC: the offset, which must be there, is taken off.
pub(crate) fn instant_from_text(text: &[u8]) -> Result<i64, Misfit> {
    finite(text)?;
    let (micros, rest) = date_and_time(text).ok_or(NO_INSTANT)?;
    let offset = offset_seconds(rest).ok_or(NO_INSTANT)? * MICROS_PER_SECOND;
    timestamp_in_range(micros - i128::from(offset))
}

/// Of both kinds of timestamp: one with a time zone is in UTC.
pub(crate) fn timestamp_from_binary(bytes: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(bytes.try_into().map_err(|_| NO_TIMESTAMP)?) {
        i64::MIN | i64::MAX => Err(INFINITE),
        micros => timestamp_in_range(i128::from(micros) + i128::from(POSTGRES_EPOCH_MICROS)),
    }
}

fn finite(text: &[u8]) -> Result<(), Misfit> {
    if matches!(text, b"infinity" | b"-infinity") { Err(INFINITE) } else { Ok(()) }
}

/// The ends of the range stand for infinities where rows are kept.
fn date_in_range(days: i64) -> Result<i32, Misfit> {
    i32::try_from(days).ok().filter(|days| days.unsigned_abs() < i32::MAX.unsigned_abs()).ok_or(OUT_OF_RANGE)
}

fn timestamp_in_range(micros: i128) -> Result<i64, Misfit> {
    i64::try_from(micros).ok().filter(|micros| micros.unsigned_abs() < i64::MAX.unsigned_abs()).ok_or(OUT_OF_RANGE)
}

fn without_era(text: &[u8]) -> (&[u8], bool) {
    match text.strip_suffix(b" BC") {
        Some(rest) => (rest, true),
        None => (text, false),
    }
}

/// Microseconds since 1970-01-01 00:00, and what follows the time except for the era.
fn date_and_time(text: &[u8]) -> Option<(i128, &[u8])> {
    let (text, before_christ) = without_era(text);
    let (days, rest) = days(text, before_christ)?;
    let (micros, rest) = time_of_day(rest.strip_prefix(b" ")?)?;
    Some((i128::from(days) * i128::from(MICROS_PER_DAY) + i128::from(micros), rest))
}

/// `YYYY-MM-DD`: days since 1970-01-01 if there is such a day, and what follows.
fn days(text: &[u8], before_christ: bool) -> Option<(i64, &[u8])> {
    const YEAR_DIGITS: std::ops::RangeInclusive<usize> = 4..=7;
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !YEAR_DIGITS.contains(&digits) {
        return None;
    }
    let (year, rest) = text.split_at(digits);
    let (&[b'-', m0, m1, b'-', d0, d1], rest) = rest.split_first_chunk::<6>()? else { return None };
    let year = year.iter().fold(0, |year, digit| year * 10 + i64::from(digit - b'0'));
    if year == 0 {
        return None;
    }
    let year = if before_christ { 1 - year } else { year };
    Some((days_of(year, two_digits(m0, m1)?, two_digits(d0, d1)?)?, rest))
}

/// Days since 1970-01-01, if there is such a day. Year 0 is 1 BC.
fn days_of(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i64::from(leap),
        _ => return None,
    };
    if !(1..=last).contains(&day) {
        return None;
    }
    // Years are counted from March, so that the leap day is the last of its year.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    Some(era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468)
}

/// `HH:MM:SS[.ffffff]`: microseconds since midnight, and what follows.
fn time_of_day(text: &[u8]) -> Option<(i64, &[u8])> {
    const FRACTION_DIGITS: std::ops::RangeInclusive<usize> = 1..=6;
    let (&[h0, h1, b':', m0, m1, b':', s0, s1], mut rest) = text.split_first_chunk::<8>()? else { return None };
    let (hours, minutes, seconds) = (two_digits(h0, h1)?, two_digits(m0, m1)?, two_digits(s0, s1)?);
    if hours > 23 || minutes > 59 || seconds > 59 {
        return None;
    }
    let mut micros = 0;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if !FRACTION_DIGITS.contains(&digits) {
            return None;
        }
        let digit = |at: usize| if at < digits { i64::from(fraction[at] - b'0') } else { 0 };
        micros = (0..6).fold(0, |micros, at| micros * 10 + digit(at));
        rest = &fraction[digits..];
    }
    Some(((hours * 3600 + minutes * 60 + seconds) * MICROS_PER_SECOND + micros, rest))
}

/// `±HH[:MM[:SS]]`: seconds east of UTC. Local mean times, before zones, have seconds.
fn offset_seconds(text: &[u8]) -> Option<i64> {
    const HOURS_MAX: i64 = 15;
    let (sign, digits) = match text {
        [b'+', rest @ ..] => (1, rest),
        [b'-', rest @ ..] => (-1, rest),
        _ => return None,
    };
    let (hours, minutes, seconds) = match *digits {
        [a, b] => (two_digits(a, b)?, 0, 0),
        [a, b, b':', c, d] => (two_digits(a, b)?, two_digits(c, d)?, 0),
        [a, b, b':', c, d, b':', e, f] => (two_digits(a, b)?, two_digits(c, d)?, two_digits(e, f)?),
        _ => return None,
    };
    if hours > HOURS_MAX || minutes > 59 || seconds > 59 {
        return None;
    }
    Some(sign * (hours * 3600 + minutes * 60 + seconds))
}

fn two_digits(tens: u8, ones: u8) -> Option<i64> {
    let digits = tens.is_ascii_digit() && ones.is_ascii_digit();
    digits.then(|| i64::from(tens - b'0') * 10 + i64::from(ones - b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::{Datelike, NaiveDate};

    #[test]
    fn every_day_is_the_calendar_s() {
        let epoch = NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
        let mut day = NaiveDate::from_ymd_opt(-850, 1, 1).unwrap();
        while day < NaiveDate::from_ymd_opt(2500, 1, 1).unwrap() {
            let (year, era) = if day.year() > 0 { (day.year(), "") } else { (1 - day.year(), " BC") };
            let text = format!("{year:04}-{:02}-{:02}{era}", day.month(), day.day());
            assert_eq!(date_from_text(text.as_bytes()), Ok((day - epoch).num_days() as i32), "{text}");
            day = day.succ_opt().unwrap();
        }
    }

    #[test]
    fn days_that_are_none_are_refused() {
        for text in [
            "",
            "2026",
            "2026-02-29",
            "1900-02-29",
            "0004-02-29 BC",
            "2026-13-01",
            "2026-00-01",
            "2026-01-00",
            "2026-04-31",
            "0000-01-01",
            "0000-01-01 BC",
            "026-01-01",
            "12345678-01-01",
            "2026-1-01",
            "2026/01/01",
            "2026-01-01 ",
            "2026-01-01BC",
            "2026-01-01 bc",
            "-2026-01-01",
            "2026-01-01 00:00:00",
            "é026-01-02",
            "today",
        ] {
            assert_eq!(date_from_text(text.as_bytes()), Err(NO_DATE), "{text}");
        }
        assert!(date_from_text(b"0001-02-29 BC").is_ok());
    }

    #[test]
    fn times_that_are_none_are_refused() {
        for text in [
            "",
            "03:04",
            "3:04:05",
            "24:00:01",
            "03:60:05",
            "03:04:60",
            "03:04:05.",
            "03:04:05.1234567",
            "03:04:05+00",
            "03:04:05.12x",
            "03-04-05",
        ] {
            assert_eq!(time_from_text(text.as_bytes()), Err(NO_TIME), "{text}");
        }
        for text in ["", "2026-01-02", "2026-01-02T03:04:05", "2026-01-02 03:04:05+00", "2026-01-02 24:00:00"] {
            assert_eq!(timestamp_from_text(text.as_bytes()), Err(NO_TIMESTAMP), "{text}");
        }
        for offset in ["", "Z", " +00", "+0", "+0000", "+16", "+00:60", "+00:00:60", "+00:00:00:00", "UTC"] {
            let text = format!("2026-01-02 03:04:05{offset}");
            assert_eq!(instant_from_text(text.as_bytes()), Err(NO_INSTANT), "{text}");
        }
    }
}
