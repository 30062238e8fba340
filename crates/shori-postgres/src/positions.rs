//! How a position is encoded. Permanent: logs keep it.
//!
//! | `seq` | `lsn` | what |
//! |---|---|---|
//! | index (u64 BE, below 2^56, so its first byte is `00`) | where the commit's record begins | a row image, by its index in the transaction |
//! | `01` | the last byte before the place that has been read up to | a boundary |
//! | `02 ‖ chunk (u32 BE) ‖ row (u32 BE)` | the same, of the boundary that the row follows | a snapshot row |
//! | `02 ‖ chunk ‖ ffffffff` | the same | the end of a chunk |
//!
//! `lsn` is eight bytes big endian. Places in the write-ahead log where a record begins are multiples of eight, and the
//! next commit may begin right where the last one ends: the byte before lies above all images of the one, and below those
//! of the other.
//!
//! Of a polled source, `lsn` is when the poll began, in microseconds since 1970, or later where the clock went back. What
//! it reads are chunks, numbered over all tables; the last one is empty and ends the poll.
//!
//! The index counts all images of the transaction, of captured tables or not, in the order they were sent; an update
//! takes two, whether or not the first is needed. It is then the same in every run, whatever is captured. Chunks are
//! counted over all captures.

use shori_core::position::{Position, SortKey};
use shori_core::{Error, ErrorKind, Result};

use crate::message::WalLocation;

const IMAGE: u8 = 0;
const BOUNDARY: u8 = 1;
const SNAPSHOT: u8 = 2;
const END_OF_CHUNK: u32 = u32::MAX;
const INDEX_BITS: u32 = 56;

/// Where image `index` of the transaction committed at `commit_lsn` stands.
pub fn of_image(commit_lsn: WalLocation, index: u64) -> Result<Position> {
    if index >> INDEX_BITS != 0 {
        let object = format!("image {index} of the transaction at {commit_lsn:x}");
        return Err(Error::new(ErrorKind::Internal, "place", object, "no transaction has so many"));
    }
    Ok(Position::new(SortKey::from_u64(commit_lsn), SortKey::from_u64(index)))
}

/// The boundary where the log is read up to `wal_end`: above all commits that end at or before it, below the others.
pub fn of_boundary(wal_end: WalLocation) -> Result<Position> {
    Ok(Position::new(SortKey::from_u64(wal_end.saturating_sub(1)), SortKey::from_slice(&[BOUNDARY])?))
}

/// Where row `row` of snapshot chunk `chunk` stands: above the boundary at `wal_end`. Its snapshot must show all commits
/// that end at or before that.
pub fn of_chunk_row(wal_end: WalLocation, chunk: u32, row: u32) -> Result<Position> {
    let mut seq = [SNAPSHOT; 9];
    seq[1..5].copy_from_slice(&chunk.to_be_bytes());
    seq[5..9].copy_from_slice(&row.to_be_bytes());
    Ok(Position::new(SortKey::from_u64(wal_end.saturating_sub(1)), SortKey::from_slice(&seq)?))
}

/// Above every row of the chunk.
pub fn of_chunk_end(wal_end: WalLocation, chunk: u32) -> Result<Position> {
    of_chunk_row(wal_end, chunk, END_OF_CHUNK)
}

/// Where reading goes on so that nothing above `position` is missed: no commit that begins before it is needed.
pub fn read_on_at(position: &Position) -> Result<WalLocation> {
    let lsn = position.lsn.to_u64().ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, "decode", format!("position {position}"), "it is not of a PostgreSQL source")
    })?;
    Ok(match position.seq.as_slice().first() {
        None | Some(&IMAGE) => lsn,
        Some(_) => lsn.saturating_add(1),
    })
}

/// Whether `position` stands between two commits.
pub fn is_between_commits(position: &Position) -> bool {
    position.seq.as_slice().first() != Some(&IMAGE)
}

/// The first chunk number that is free at the boundary at `wal_end` above `position`.
pub fn next_chunk(wal_end: WalLocation, position: &Position) -> u32 {
    if position.lsn != SortKey::from_u64(wal_end.saturating_sub(1)) {
        return 0;
    }
    match position.seq.as_slice() {
        [SNAPSHOT, a, b, c, d, ..] => u32::from_be_bytes([*a, *b, *c, *d]).saturating_add(1),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_sort_as_they_are_emitted_and_come_back() {
        // A commit from 16 to 64, and one right after it.
        let order = [
            Position::ZERO,
            of_boundary(8).unwrap(),
            of_chunk_row(8, 0, 0).unwrap(),
            of_image(16, 0).unwrap(),
            of_image(16, 1).unwrap(),
            of_image(16, 256).unwrap(),
            of_image(16, (1 << INDEX_BITS) - 1).unwrap(),
            of_boundary(64).unwrap(),
            of_chunk_row(64, 0, 0).unwrap(),
            of_chunk_row(64, 0, 1).unwrap(),
            of_chunk_end(64, 0).unwrap(),
            of_chunk_row(64, 1, 0).unwrap(),
            of_chunk_row(64, 256, 0).unwrap(),
            of_image(64, 0).unwrap(),
            of_boundary(72).unwrap(),
            of_chunk_end(u64::MAX, u32::MAX).unwrap(),
            Position::new(SortKey::MAX, SortKey::MAX),
        ];
        assert!(order.windows(2).all(|pair| pair[0] < pair[1]));
        let read_on: Vec<_> = order[..15].iter().map(|position| read_on_at(position).unwrap()).collect();
        assert_eq!(read_on, [0, 8, 8, 16, 16, 16, 16, 64, 64, 64, 64, 64, 64, 64, 72]);
        let between: Vec<_> = order[1..15].iter().map(is_between_commits).collect();
        assert_eq!(between.iter().filter(|between| !**between).count(), 5);
        assert!(is_between_commits(&Position::ZERO));
        assert_eq!(next_chunk(64, &order[7]), 0);
        assert_eq!(next_chunk(64, &order[10]), 1);
        assert_eq!(next_chunk(72, &order[10]), 0);
        assert_eq!(next_chunk(u64::MAX, &order[15]), u32::MAX);
    }

    #[test]
    fn an_index_comes_back_and_one_that_would_sort_elsewhere_is_refused() {
        for index in [0, 1, 255, 256, 1 << 40, (1 << INDEX_BITS) - 1] {
            assert_eq!(of_image(9, index).unwrap().seq.to_u64(), Some(index));
        }
        assert_eq!(of_image(9, 1 << INDEX_BITS).unwrap_err().kind(), ErrorKind::Internal);
        assert!(of_image(9, u64::MAX).is_err());
    }

    #[test]
    fn the_layout_is_the_permanent_one() {
        assert_eq!(of_boundary(258).unwrap().to_string(), "0000000000000101.01");
        assert_eq!(of_image(258, 3).unwrap().to_string(), "0000000000000102.0000000000000003");
        assert_eq!(of_chunk_row(258, 3, 4).unwrap().to_string(), "0000000000000101.020000000300000004");
        assert_eq!(of_chunk_end(258, 3).unwrap().to_string(), "0000000000000101.0200000003ffffffff");
    }

    #[test]
    fn a_position_of_another_source_is_refused() {
        let foreign = Position::from_slices(&[1, 2, 3], &[]).unwrap();
        assert_eq!(read_on_at(&foreign).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
