//! How a position is encoded. Permanent: logs keep it.
//!
//! `lsn` is the change row's id, eight bytes big endian. `seq` is `00` for the image of that row, and
//! `01 ‖ chunk (u32 BE) ‖ row (u32 BE)` for a snapshot row read when that change was the newest; chunks are counted over
//! all captures. `01 ‖ chunk ‖ ffffffff` is the end of a snapshot whose last chunk that is.

use shori_core::position::{Position, SortKey};
use shori_core::{Error, ErrorKind, Result};

const STREAM: u8 = 0;
const SNAPSHOT: u8 = 1;
const END_OF_CHUNK: u32 = u32::MAX;

/// Where the image of change `id` stands; also the boundary after it.
pub(crate) fn of_change(id: i64) -> Result<Position> {
    Ok(Position::new(SortKey::from_u64(id.unsigned_abs()), SortKey::from_slice(&[STREAM])?))
}

/// Where row `row` of snapshot chunk `chunk`, read at change `id`, stands.
pub(crate) fn of_chunk_row(id: i64, chunk: u32, row: u32) -> Result<Position> {
    let mut seq = [SNAPSHOT; 9];
    seq[1..5].copy_from_slice(&chunk.to_be_bytes());
    seq[5..9].copy_from_slice(&row.to_be_bytes());
    Ok(Position::new(SortKey::from_u64(id.unsigned_abs()), SortKey::from_slice(&seq)?))
}

/// Above every row of the chunk.
pub(crate) fn of_chunk_end(id: i64, chunk: u32) -> Result<Position> {
    of_chunk_row(id, chunk, END_OF_CHUNK)
}

/// The newest change at or below `position`.
pub(crate) fn change_at(position: &Position) -> Result<i64> {
    let misfit =
        || Error::new(ErrorKind::Corrupt, "decode", format!("position {position}"), "it is not of a SQLite source");
    let id = position.lsn.to_u64().and_then(|id| i64::try_from(id).ok()).ok_or_else(misfit)?;
    Ok(if position.seq.is_empty() { (id - 1).max(0) } else { id })
}

/// The first chunk number that is free at change `id` above `position`.
pub(crate) fn next_chunk(id: i64, position: &Position) -> u32 {
    if position.lsn != SortKey::from_u64(id.unsigned_abs()) {
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
            of_change(0).unwrap(),
            of_chunk_row(0, 0, 0).unwrap(),
            of_change(7).unwrap(),
            of_chunk_row(7, 0, 0).unwrap(),
            of_chunk_row(7, 0, 1).unwrap(),
            of_chunk_end(7, 0).unwrap(),
            of_chunk_row(7, 1, 0).unwrap(),
            of_chunk_row(7, 256, 0).unwrap(),
            of_change(8).unwrap(),
            of_change(i64::MAX).unwrap(),
        ];
        assert!(order.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(change_at(&order[6]).unwrap(), 7);
        assert_eq!(change_at(&Position::ZERO).unwrap(), 0);
        assert_eq!(next_chunk(7, &order[3]), 0);
        assert_eq!(next_chunk(7, &order[6]), 1);
        assert_eq!(next_chunk(8, &order[6]), 0);
    }

    #[test]
    fn the_layout_is_the_permanent_one() {
        let row = of_chunk_row(258, 3, 4).unwrap();
        assert_eq!(row.to_string(), "0000000000000102.010000000300000004");
        assert_eq!(of_change(258).unwrap().to_string(), "0000000000000102.00");
    }

    #[test]
    fn a_position_of_another_source_is_refused() {
        let foreign = Position::from_slices(&[1, 2, 3], &[]).unwrap();
        assert_eq!(change_at(&foreign).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
