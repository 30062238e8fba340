//! How far retention lets a capture's log be compacted, found along the primary key alone.
//!
//! Rows are staged in position order, so that the newest one of a time is found by halving: the log may be long, and its
//! times have no index, which every append would pay for.

use shori_core::Result;
use shori_core::position::{CaptureId, Micros, Position, SORT_KEY_MAX_BYTES};

use super::captures;
use super::session::{Link, Time, get_position};
use crate::connect::quoted;

/// See [`Store::retention_horizon`](shori_core::store::Store::retention_horizon).
pub(super) async fn horizon(
    link: &Link,
    id: &CaptureId,
    staged_before: Option<Micros>,
    keep_rows: Option<u64>,
) -> Result<Position> {
    let object = format!("the log of {id}");
    link.run("set local statement_timeout = 0; set local enable_seqscan = off", &object).await?;
    let capture = captures::one(link, id).await?;
    let table = quoted(&capture.staging_table);
    let mut horizon = capture.horizon;
    if let Some(before) = staged_before {
        let newest = Staged { link, table: &table, object: &object, before: Time(before) }.newest().await?;
        horizon = newest.map_or(horizon, |newest| horizon.max(newest));
    }
    if let Some(keep) = keep_rows {
        let keep = keep.min(i64::MAX as u64);
        let sql = format!("select lsn, seqval from {table} order by lsn desc, seqval desc limit 1 offset {keep}");
        for row in link.rows_of(&sql, &[], &object).await? {
            horizon = horizon.max(get_position(&row, 0)?);
        }
    }
    Ok(horizon)
}

/// The rows of a log that were staged before a time.
struct Staged<'a> {
    link: &'a Link,
    table: &'a str,
    object: &'a str,
    before: Time,
}

/// A row next to a place, and whether it was staged before the time.
type Neighbour = Option<(Position, bool)>;

impl Staged<'_> {
    async fn newest(&self) -> Result<Option<Position>> {
        // A commit whose first row was staged before the time; later rows of it may not have been.
        let mut commit = None;
        let (mut low, mut high) = (0, u128::MAX);
        while low <= high {
            let middle = low + (high - low) / 2;
            match self.around(middle).await? {
                (_, Some((next, true))) => {
                    commit = Some(next);
                    match number(next.lsn.as_slice()).checked_add(1) {
                        Some(above) => low = above,
                        None => break,
                    }
                }
                (Some((previous, true)), _) => return Ok(Some(previous)),
                (Some((previous, false)), _) => high = number(previous.lsn.as_slice()),
                (None, _) => break,
            }
        }
        match commit {
            Some(commit) => self.newest_of(&commit).await,
            None => Ok(None),
        }
    }

    /// The last row below the LSN that `place` stands for, and the first one at or above it.
    async fn around(&self, place: u128) -> Result<(Neighbour, Neighbour)> {
        let table = self.table;
        let sql = format!(
            "(select lsn, seqval, ingested_at < $2, false from {table} where lsn < $1 \
             order by lsn desc, seqval desc limit 1) \
             union all \
             (select lsn, seqval, ingested_at < $2, true from {table} where lsn >= $1 order by lsn, seqval limit 1)"
        );
        let (mut previous, mut next) = (None, None);
        for row in self.link.rows_of(&sql, &[&key(place).as_slice(), &self.before], self.object).await? {
            let neighbour = if row.get(3) { &mut next } else { &mut previous };
            *neighbour = Some((get_position(&row, 0)?, row.get(2)));
        }
        Ok((previous, next))
    }

    async fn newest_of(&self, commit: &Position) -> Result<Option<Position>> {
        let sql = format!(
            "select lsn, seqval from {} where lsn = $1 and ingested_at < $2 order by seqval desc limit 1",
            self.table
        );
        let rows = self.link.rows_of(&sql, &[&commit.lsn.as_slice(), &self.before], self.object).await?;
        rows.first().map(|row| get_position(row, 0)).transpose()
    }
}

/// Keys as numbers, in their order; those that differ by zeros at the end are one.
fn number(key: &[u8]) -> u128 {
    let mut bytes = [0; SORT_KEY_MAX_BYTES];
    bytes[..key.len()].copy_from_slice(key);
    u128::from_be_bytes(bytes)
}

/// The first key that has this number.
fn key(number: u128) -> Vec<u8> {
    let mut bytes = number.to_be_bytes().to_vec();
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_numbers_have_one_order() {
        let keys: [&[u8]; 6] = [&[], &[0, 1], &[1], &[1, 0, 7], &[1, 1], &[0xff; 16]];
        assert!(keys.is_sorted_by(|one, next| number(one) < number(next)));
        for given in keys {
            assert_eq!(key(number(given)), given);
        }
        assert_eq!(key(number(&[1, 0])), [1], "a prefix sorts first");
    }
}
