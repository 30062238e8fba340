//! How a position is encoded. Permanent: logs keep it.
//!
//! `lsn` is where a transaction's commit record begins in the write-ahead log, eight bytes big endian. The first byte
//! of `seq` is what stands there:
//!
//! | `seq` | what |
//! |---|---|
//! | empty | before all of the commit: what ends before `lsn` has been read |
//! | index (u64 BE, below 2^56, so its first byte is `00`) | a row image, by its index in the transaction |
//! | `01` | the end of the commit |
//! | `02 ‖ chunk (u32 BE) ‖ row (u32 BE)` | a snapshot row read when that commit was the newest |
//! | `02 ‖ chunk ‖ ffffffff` | the end of a chunk |
//!
//! The index counts all images of the transaction that are committed, of captured tables or not, in the order they were
//! sent. It is then the same in every run, whether or not the transaction was streamed before it was known what of it
//! would be rolled back. Chunks are counted over all captures.

use shori_core::position::{Position, SortKey};
use shori_core::{Error, ErrorKind, Result};

use crate::message::WalLocation;

const END_OF_COMMIT: u8 = 1;
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

/// The boundary after the transaction committed at `commit_lsn`: above all its images.
pub fn of_commit_end(commit_lsn: WalLocation) -> Result<Position> {
    Ok(Position::new(SortKey::from_u64(commit_lsn), SortKey::from_slice(&[END_OF_COMMIT])?))
}

/// The boundary where the log is read up to `wal_end`: above all commits that end at or before it, below the others.
/// The next commit record may begin right there.
pub fn of_wal_end(wal_end: WalLocation) -> Position {
    Position::new(SortKey::from_u64(wal_end), SortKey::EMPTY)
}

/// Where row `row` of snapshot chunk `chunk` stands: above the commit at `lsn`, which its snapshot must show, with none
/// above. `lsn` must not be a `wal_end`: a commit that begins right there would stand below the chunk that lacks it.
pub fn of_chunk_row(lsn: WalLocation, chunk: u32, row: u32) -> Result<Position> {
    let mut seq = [SNAPSHOT; 9];
    seq[1..5].copy_from_slice(&chunk.to_be_bytes());
    seq[5..9].copy_from_slice(&row.to_be_bytes());
    Ok(Position::new(SortKey::from_u64(lsn), SortKey::from_slice(&seq)?))
}

/// Above every row of the chunk.
pub fn of_chunk_end(lsn: WalLocation, chunk: u32) -> Result<Position> {
    of_chunk_row(lsn, chunk, END_OF_CHUNK)
}

/// The place in the write-ahead log; 0 before the first.
pub fn lsn_of(position: &Position) -> Result<WalLocation> {
    position.lsn.to_u64().ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, "decode", format!("position {position}"), "it is not of a PostgreSQL source")
    })
}

/// The first chunk number that is free at `lsn` above `position`.
pub fn next_chunk(lsn: WalLocation, position: &Position) -> u32 {
    if position.lsn != SortKey::from_u64(lsn) {
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
        let order = [
            Position::ZERO,
            of_wal_end(0),
            of_image(0, 0).unwrap(),
            of_wal_end(7),
            of_image(7, 0).unwrap(),
            of_image(7, 1).unwrap(),
            of_image(7, 256).unwrap(),
            of_image(7, (1 << INDEX_BITS) - 1).unwrap(),
            of_commit_end(7).unwrap(),
            of_chunk_row(7, 0, 0).unwrap(),
            of_chunk_row(7, 0, 1).unwrap(),
            of_chunk_end(7, 0).unwrap(),
            of_chunk_row(7, 1, 0).unwrap(),
            of_chunk_row(7, 256, 0).unwrap(),
            of_wal_end(8),
            of_image(8, 0).unwrap(),
            of_chunk_end(u64::MAX, u32::MAX).unwrap(),
            Position::new(SortKey::MAX, SortKey::MAX),
        ];
        assert!(order.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(order[3..14].iter().all(|position| lsn_of(position).unwrap() == 7));
        assert_eq!(lsn_of(&Position::ZERO).unwrap(), 0);
        assert_eq!(lsn_of(&of_commit_end(u64::MAX).unwrap()).unwrap(), u64::MAX);
        assert_eq!(next_chunk(7, &order[8]), 0);
        assert_eq!(next_chunk(7, &order[11]), 1);
        assert_eq!(next_chunk(8, &order[11]), 0);
        assert_eq!(next_chunk(u64::MAX, &order[16]), u32::MAX);
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
        assert_eq!(of_wal_end(258).to_string(), "0000000000000102");
        assert_eq!(of_image(258, 3).unwrap().to_string(), "0000000000000102.0000000000000003");
        assert_eq!(of_commit_end(258).unwrap().to_string(), "0000000000000102.01");
        assert_eq!(of_chunk_row(258, 3, 4).unwrap().to_string(), "0000000000000102.020000000300000004");
        assert_eq!(of_chunk_end(258, 3).unwrap().to_string(), "0000000000000102.0200000003ffffffff");
    }

    #[test]
    fn a_position_of_another_source_is_refused() {
        let foreign = Position::from_slices(&[1, 2, 3], &[]).unwrap();
        assert_eq!(lsn_of(&foreign).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
