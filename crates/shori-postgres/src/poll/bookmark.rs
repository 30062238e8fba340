//! How far a table has been polled. The encoding is permanent: logs keep it, in the snapshot's progress.
//!
//! JSON, so that what is added later is told apart by its name. The other capture's bookmarks begin with a byte that no
//! JSON begins with.

use serde_json::{Value, json};
use shori_core::position::Micros;
use shori_core::{Error, ErrorKind, Result};

use crate::snapshot;
use crate::visibility::Visibility;

/// What a poll saw of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub visibility: Visibility,
    /// When it began, by the server's clock.
    pub time: Micros,
    /// What it did not show began at this time or later, as far as is known.
    pub floor: Micros,
    /// Transactions that still ran, each with a time since which it did at the latest. Not every one's beginning is told: not
    /// to every role, and of none that is prepared.
    pub waits: Vec<(u64, Micros)>,
    /// The first id that was not given yet: of those below, a snapshot does not list the ones above the last that ended.
    pub given: u64,
    /// The same of them as of those that are listed.
    pub unlisted: Micros,
    /// The highest value of the timestamp column, in the column's own time; none in an empty table.
    pub highest: Option<Micros>,
}

/// A row version up to which a poll has read, in the order of tables (partitions) and places in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Passed {
    pub relation: u32,
    /// The file that holds it: another one after it was rewritten.
    pub file: u32,
    pub block: u32,
    pub line: u16,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Bookmark {
    /// The table, so that another of its name is told apart.
    pub table: u32,
    /// All that it shows is in the log, or has a newer version that it does not show. None while blocks are read.
    pub whole: Option<Seen>,
    /// A poll that has begun: what it shows up to `passed` is in the log. While blocks are read, the first one.
    pub begun: Option<Seen>,
    pub passed: Option<Passed>,
    /// Where reading blocks goes on.
    pub place: Option<snapshot::Bookmark>,
}

impl Seen {
    /// Since when a transaction ran at the latest that runs later.
    pub fn since(&self, id: u64) -> Micros {
        match self.waits.iter().find(|(other, _)| *other == id) {
            Some((_, since)) => *since,
            None if id < self.given => self.unlisted,
            // One that had not written by then is taken to have begun after it.
            None => self.time,
        }
    }
}

impl Bookmark {
    pub fn new(table: u32) -> Self {
        Self { table, whole: None, begun: None, passed: None, place: None }
    }

    pub fn encode(&self) -> Vec<u8> {
        let seen = |seen: &Seen| {
            json!({
                "snapshot": seen.visibility.to_string(),
                "time": seen.time,
                "floor": seen.floor,
                "highest": seen.highest,
                "waits": seen.waits,
                "given": seen.given,
                "unlisted": seen.unlisted,
            })
        };
        json!({
            "table": self.table,
            "whole": self.whole.as_ref().map(seen),
            "begun": self.begun.as_ref().map(seen),
            "passed": self.passed.map(|at| [at.relation, at.file, at.block, u32::from(at.line)]),
            "place": self.place.map(|place| place.encode()),
        })
        .to_string()
        .into_bytes()
    }

    /// Whether it is one, and not that of the other capture.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.first() == Some(&b'{')
    }

    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged =
            || Error::new(ErrorKind::Corrupt, "decode", "how far a table was polled", "it is of no known layout");
        let value: Value = serde_json::from_slice(bytes).map_err(|_| damaged())?;
        let table = value["table"].as_u64().and_then(|table| u32::try_from(table).ok()).ok_or_else(damaged)?;
        let seen = |value: &Value| {
            if value.is_null() {
                return Ok::<_, Error>(None);
            }
            let number = |name: &str| value[name].as_i64().ok_or_else(damaged);
            let visibility = Visibility::read(value["snapshot"].as_str().ok_or_else(damaged)?)?;
            let highest = if value["highest"].is_null() { None } else { Some(number("highest")?) };
            let waits = value["waits"].as_array().ok_or_else(damaged)?.iter();
            let wait = |wait: &Value| Some((wait[0].as_u64()?, wait[1].as_i64()?));
            let waits = waits.map(wait).collect::<Option<_>>().ok_or_else(damaged)?;
            let (time, floor, unlisted) = (number("time")?, number("floor")?, number("unlisted")?);
            let given = value["given"].as_u64().ok_or_else(damaged)?;
            Ok(Some(Seen { visibility, time, floor, waits, given, unlisted, highest }))
        };
        let place = match &value["place"] {
            Value::Null => None,
            Value::Array(bytes) => {
                let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok()).ok_or_else(damaged);
                snapshot::Bookmark::decode(&bytes.iter().map(byte).collect::<Result<Vec<_>>>()?)?
            }
            _ => return Err(damaged()),
        };
        let passed = match &value["passed"] {
            Value::Null => None,
            numbers => {
                let number = |index: usize| numbers[index].as_u64().and_then(|number| u32::try_from(number).ok());
                let read = || {
                    let line = u16::try_from(number(3)?).ok()?;
                    Some(Passed { relation: number(0)?, file: number(1)?, block: number(2)?, line })
                };
                Some(read().ok_or_else(damaged)?)
            }
        };
        Ok(Self { table, whole: seen(&value["whole"])?, begun: seen(&value["begun"])?, passed, place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_permanent_one() {
        let place = [1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 6];
        let visibility = Visibility::read("7:9:7").unwrap();
        let seen = |highest| Seen {
            visibility: visibility.clone(),
            time: 20,
            floor: 10,
            waits: vec![(7, 5), (8, 6)],
            given: 11,
            unlisted: 4,
            highest,
        };
        let bookmark = Bookmark {
            table: 1,
            whole: Some(seen(Some(-5))),
            begun: Some(seen(None)),
            passed: Some(Passed { relation: 1, file: 2, block: 3, line: 4 }),
            place: snapshot::Bookmark::decode(&place).unwrap(),
        };
        let bytes = bookmark.encode();
        let stored = r#"{
            "table": 1,
            "whole": {"snapshot": "7:9:7", "time": 20, "floor": 10, "highest": -5, "waits": [[7, 5], [8, 6]],
                "given": 11, "unlisted": 4},
            "begun": {"snapshot": "7:9:7", "time": 20, "floor": 10, "highest": null, "waits": [[7, 5], [8, 6]],
                "given": 11, "unlisted": 4},
            "passed": [1, 2, 3, 4],
            "place": [1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 6]
        }"#;
        assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), stored.parse::<Value>().unwrap());
        assert_eq!(Bookmark::decode(stored.as_bytes()).unwrap(), bookmark);
        assert_eq!(Bookmark::decode(&bytes).unwrap(), bookmark);
        assert_eq!(Bookmark::decode(&Bookmark::new(3).encode()).unwrap(), Bookmark::new(3));
        assert!(Bookmark::is_one(&bytes) && !Bookmark::is_one(&place) && !Bookmark::is_one(&[]));
        for damaged in [
            &bytes[..20],
            b"{}",
            b"{\"table\":1,\"whole\":3}",
            b"{\"table\":1,\"place\":[300]}",
            b"{\"table\":1,\"passed\":[1,2,3,70000]}",
        ] {
            assert_eq!(Bookmark::decode(damaged).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
