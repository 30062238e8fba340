//! Positions: where a change stands in the commit order of its timeline.
//!
//! A position is `(lsn, seq)`. Both are byte strings that sort as the timeline commits, so that every store can compare
//! them without knowing the source. Each source encodes its own, always in the same way: the layout of a released source
//! is permanent, because logs keep it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// Longest `lsn` or `seq` in bytes. SQL Server needs 10 for an LSN and 15 for a sequence.
pub const SORT_KEY_MAX_BYTES: usize = 16;

/// A short byte string, compared byte by byte (a prefix sorts first).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SortKey {
    length: u8,
    bytes: [u8; SORT_KEY_MAX_BYTES],
}

impl SortKey {
    /// The empty key: sorts before every other.
    pub const EMPTY: SortKey = SortKey { length: 0, bytes: [0; SORT_KEY_MAX_BYTES] };
    /// Sorts after every key that a source makes.
    pub const MAX: SortKey = SortKey { length: SORT_KEY_MAX_BYTES as u8, bytes: [0xff; SORT_KEY_MAX_BYTES] };

    /// Fails when `bytes` is longer than [`SORT_KEY_MAX_BYTES`].
    pub fn from_slice(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > SORT_KEY_MAX_BYTES {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "decode",
                "position",
                format!("{} bytes, at most {SORT_KEY_MAX_BYTES} fit", bytes.len()),
            ));
        }
        let mut key = Self::EMPTY;
        key.length = bytes.len() as u8;
        key.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(key)
    }

    /// Eight bytes, big endian: numbers sort as bytes.
    pub fn from_u64(number: u64) -> Self {
        let mut key = Self::EMPTY;
        key.length = 8;
        key.bytes[..8].copy_from_slice(&number.to_be_bytes());
        key
    }

    /// The inverse of [`SortKey::from_u64`]; the empty key is 0, other lengths are `None`.
    pub fn to_u64(&self) -> Option<u64> {
        match self.length {
            0 => Some(0),
            8 => {
                let mut eight = [0; 8];
                eight.copy_from_slice(&self.bytes[..8]);
                Some(u64::from_be_bytes(eight))
            }
            _ => None,
        }
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length as usize]
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

impl Ord for SortKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.as_slice().cmp(other.as_slice())
    }
}

impl PartialOrd for SortKey {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for SortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{self}")
    }
}

/// The commit a change belongs to.
pub type Lsn = SortKey;
/// The order of a row image within its commit.
pub type Seq = SortKey;

/// Where one row image stands on its timeline: unique per image, the same on every reading.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Position {
    pub lsn: Lsn,
    pub seq: Seq,
}

impl Position {
    /// Before every change.
    pub const ZERO: Position = Position { lsn: SortKey::EMPTY, seq: SortKey::EMPTY };

    pub fn new(lsn: Lsn, seq: Seq) -> Self {
        Self { lsn, seq }
    }

    pub fn from_slices(lsn: &[u8], seq: &[u8]) -> Result<Self> {
        Ok(Self { lsn: SortKey::from_slice(lsn)?, seq: SortKey::from_slice(seq)? })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.seq.is_empty() { write!(f, "{}", self.lsn) } else { write!(f, "{}.{}", self.lsn, self.seq) }
    }
}

/// Microseconds since 1970-01-01 00:00 UTC.
pub type Micros = i64;

/// How far a capture is staged, and the last place between two commits at or below that.
///
/// Only `boundary` may become visible in a projection (contract 3); `staged` may stand in the middle of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermark {
    pub staged: Position,
    pub boundary: Position,
    /// Source commit time of the newest change at or below `boundary`; 0 before the first one.
    pub boundary_time: Micros,
}

impl Watermark {
    pub const ZERO: Watermark = Watermark { staged: Position::ZERO, boundary: Position::ZERO, boundary_time: 0 };
}

/// Names a capture: one table's stream, of one source.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CaptureId {
    pub source: Arc<str>,
    pub instance: Arc<str>,
}

impl CaptureId {
    pub fn new(source: &str, instance: &str) -> Self {
        Self { source: source.into(), instance: instance.into() }
    }
}

impl fmt::Display for CaptureId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.source, self.instance)
    }
}

impl fmt::Debug for CaptureId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A position per capture: a cutoff, a checkpoint, or how far state has been applied.
///
/// Captures of one timeline that are read together hold the same position in a cutoff.
pub type Positions = BTreeMap<CaptureId, Position>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_as_bytes_and_come_back() {
        let numbers = [0, 1, 255, 256, 65_535, 1 << 40, u64::MAX];
        for pair in numbers.windows(2) {
            assert!(SortKey::from_u64(pair[0]) < SortKey::from_u64(pair[1]));
        }
        for number in numbers {
            assert_eq!(SortKey::from_u64(number).to_u64(), Some(number));
        }
    }

    #[test]
    fn a_prefix_sorts_first_and_too_long_a_key_is_refused() {
        let short = SortKey::from_slice(&[1]).unwrap();
        let long = SortKey::from_slice(&[1, 0]).unwrap();
        assert!(SortKey::EMPTY < short && short < long && long < SortKey::MAX);
        assert!(SortKey::from_slice(&[0; SORT_KEY_MAX_BYTES + 1]).is_err());
    }
}
