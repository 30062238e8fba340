//! Which steps were applied, and which of their changes are still kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rusqlite::Connection;
use shori_core::Result;
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Projection};
use shori_core::transform::Applied;

use super::advance::{Leg, STEP_SHIFT, TableStep};
use super::file::{execute, number, rows};
use super::layout::Layout;
use super::tables::{CaptureNumber, Table};

pub(super) fn applied(connection: &Connection, layout: &Layout) -> Result<BTreeMap<CaptureId, Applied>> {
    let stored = rows(connection, "select capture, lsn, seq, time from applied", &[], |row| {
        Ok((row.get::<_, CaptureNumber>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, Vec<u8>>(2)?, row.get(3)?))
    })?;
    let mut applied = BTreeMap::new();
    let captures = layout.tables.values().flat_map(|table| &table.captures);
    let names: BTreeMap<_, _> = captures.map(|(number, id)| (*number, id)).collect();
    for (number, lsn, seq, time) in stored {
        if let Some(&id) = names.get(&number) {
            applied.insert(id.clone(), Applied { position: Position::from_slices(&lsn, &seq)?, time });
        }
    }
    Ok(applied)
}

pub(super) fn last(connection: &Connection) -> Result<i64> {
    number(connection, "select max(step) from steps", &[])
}

/// Records that `leg` ended with `step`, in which so many changes of its table were kept.
pub(super) fn record(
    connection: &Connection,
    step: i64,
    leg: &Leg,
    done: Option<&TableStep>,
    changes: i64,
) -> Result<()> {
    let position = &leg.to.position;
    let (lsn, seq, capture) = (position.lsn.as_slice(), position.seq.as_slice(), leg.number);
    // Where a table was not touched, nothing is missing of what it did.
    let (nets, versions) = done.map_or((true, true), |done| (done.nets, done.table.has_history));
    let values: [&dyn rusqlite::ToSql; 4] = [&capture, &lsn, &seq, &leg.to.time];
    execute(connection, "insert or replace into applied values (?, ?, ?, ?)", &values)?;
    let values: [&dyn rusqlite::ToSql; 7] = [&step, &capture, &lsn, &seq, &nets, &versions, &changes];
    execute(connection, "insert into steps values (?, ?, ?, ?, ?, ?, ?)", &values).map(|_| ())
}

/// Changes kept.
pub(super) fn kept(connection: &Connection) -> Result<i64> {
    number(connection, "select sum(changes) from steps", &[])
}

/// The steps above a checkpoint, per capture.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Ranges(BTreeMap<CaptureNumber, i64>);

impl Ranges {
    /// Whether the captures of `other` are all here, with the same steps.
    pub fn agree_with(&self, other: &Ranges) -> bool {
        other.0.iter().all(|(number, step)| self.0.get(number) == Some(step))
    }

    /// Everything that `captures` changed after `step`.
    pub fn all_since(captures: &[CaptureNumber], step: i64) -> Self {
        Self(captures.iter().map(|capture| (*capture, step)).collect())
    }

    fn of(&self, capture: CaptureNumber) -> i64 {
        self.0.get(&capture).copied().unwrap_or_default()
    }

    /// The lowest of the steps that the captures of a table are seen from.
    pub fn lowest(&self, table: &Table) -> i64 {
        table.captures.iter().map(|(number, _)| self.of(*number)).min().unwrap_or_default()
    }

    /// Whether what a capture changed in `step` is above the checkpoint.
    pub fn hold(&self, capture: CaptureNumber, step: i64) -> bool {
        step > self.of(capture)
    }
}

/// Which kept changes an output is made from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Nets,
    Versions,
    Both,
}

/// Where state is, seen from a checkpoint.
pub(super) enum Standing {
    Level,
    /// State is behind.
    Behind,
    /// What changed since is kept.
    Covered(Ranges),
    /// What changed since is gone, or was never kept.
    Gone,
}

/// Compares `since` (nothing consumed: `None`) with how far the captures of `tables` are applied.
pub(super) fn standing(
    connection: &Connection,
    tables: &[Arc<Table>],
    applied: &BTreeMap<CaptureId, Applied>,
    since: Option<&Positions>,
    need: Need,
) -> Result<Standing> {
    let at = |id: &CaptureId| applied.get(id).map_or(Position::ZERO, |applied| applied.position);
    let from = |id: &CaptureId| since.and_then(|since| since.get(id)).copied().unwrap_or(Position::ZERO);
    let captures = || tables.iter().flat_map(|table| &table.captures);
    if captures().any(|(_, id)| at(id) < from(id)) {
        return Ok(Standing::Behind);
    }
    let here: Positions = captures().filter_map(|(_, id)| Some((id.clone(), applied.get(id)?.position))).collect();
    if since == Some(&here) {
        return Ok(Standing::Level);
    }
    let column = match need {
        Need::Nets => "nets_kept",
        Need::Versions => "versions_kept",
        Need::Both => "nets_kept and versions_kept",
    };
    let steps = rows(connection, &format!("select capture, step, lsn, seq, {column} from steps"), &[], |row| {
        Ok((
            row.get::<_, CaptureNumber>(0)?,
            row.get::<_, i64>(1)?,
            row.get::<_, Vec<u8>>(2)?,
            row.get::<_, Vec<u8>>(3)?,
            row.get::<_, bool>(4)?,
        ))
    })?;
    let mut ranges = Ranges::default();
    for (number, id) in captures() {
        let position = from(id);
        let own = || steps.iter().filter(|(capture, ..)| capture == number);
        let is_there = |lsn: &[u8], seq: &[u8]| lsn == position.lsn.as_slice() && seq == position.seq.as_slice();
        let reached = own().filter(|(_, _, lsn, seq, _)| is_there(lsn, seq)).map(|(_, step, ..)| *step).max();
        let Some(reached) = reached else { return Ok(Standing::Gone) };
        if own().any(|(_, step, _, _, kept)| *step > reached && !kept) {
            return Ok(Standing::Gone);
        }
        ranges.0.insert(*number, reached);
    }
    Ok(Standing::Covered(ranges))
}

/// Lets go of changes that every one of `checkpoints` has consumed. An empty checkpoint has consumed nothing. A history
/// that is not in `started` will need all there is, and a table that some projection reads, but no checkpoint names, is
/// left alone.
pub(super) fn forget(
    connection: &Connection,
    layout: &Layout,
    checkpoints: &[Positions],
    started: &BTreeSet<Arc<str>>,
) -> Result<()> {
    if checkpoints.iter().any(Positions::is_empty) {
        return Ok(());
    }
    for table in layout.tables.values() {
        let mut readers = layout.projections.values().filter(|projection| projection.tables().contains(&table.name));
        let waits = |projection: &Projection| {
            matches!(projection.derivation, Derivation::History(_)) && !started.contains(&projection.name)
        };
        let is_read = readers.clone().next().is_some();
        if readers.any(waits) {
            continue;
        }
        for (number, id) in &table.captures {
            let lowest = checkpoints.iter().filter_map(|checkpoint| checkpoint.get(id)).min();
            let step = match lowest {
                Some(position) => consumed(connection, *number, position)?,
                None if is_read => {
                    self::number(connection, "select min(step) from steps where capture = ?", &[number])?
                }
                None => self::number(connection, "select max(step) from steps where capture = ?", &[number])?,
            };
            forget_up_to(connection, table, *number, step)?;
        }
    }
    Ok(())
}

fn consumed(connection: &Connection, capture: CaptureNumber, position: &Position) -> Result<i64> {
    let (lsn, seq) = (position.lsn.as_slice(), position.seq.as_slice());
    let sql = "select max(step) from steps where capture = ?1 and (lsn < ?2 or (lsn = ?2 and seq <= ?3))";
    number(connection, sql, &[&capture, &lsn, &seq])
}

fn forget_up_to(connection: &Connection, table: &Table, capture: CaptureNumber, step: i64) -> Result<()> {
    execute(connection, "delete from steps where capture = ? and step < ?", &[&capture, &step])?;
    execute(connection, "update steps set changes = 0 where capture = ? and step = ?", &[&capture, &step])?;
    let last = number(connection, "select max(step) from steps where capture = ?", &[&capture])?;
    let is_all = step >= last && table.captures.len() == 1;
    let end = (step + 1) << STEP_SHIFT;
    for kind in ["net", "version"] {
        let name = format!("{kind}_{}", table.number);
        match is_all {
            // Without a condition, SQLite lets go of whole pages.
            true => execute(connection, &format!("delete from {name}"), &[])?,
            false => {
                execute(connection, &format!("delete from {name} where id < ? and capture = ?"), &[&end, &capture])?
            }
        };
    }
    Ok(())
}
