//! Which steps were applied, and which of their changes are still kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shori_core::Result;
use shori_core::position::{CaptureId, Position, Positions};
use shori_core::projection::{Derivation, Projection};
use shori_core::transform::Applied;

use super::layout::{Layout, create_kept};
use super::session::{Session, blob};
use super::staging::Leg;
use super::tables::{CaptureNumber, Table};

pub(super) fn applied(session: &Session, layout: &Layout) -> Result<BTreeMap<CaptureId, Applied>> {
    let stored = session.rows("select capture, lsn, seq, time from applied", |row| {
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

pub(super) fn last(session: &Session) -> Result<i64> {
    session.number("select max(step) from steps")
}

/// Records that `leg` ended with `step`, its changes kept or not.
pub(super) fn record(session: &Session, step: i64, leg: &Leg, nets: bool, versions: bool, rows: i64) -> Result<()> {
    let Leg { number, to, .. } = leg;
    let position = format!("{}, {}", blob(to.position.lsn.as_slice()), blob(to.position.seq.as_slice()));
    session.run(&format!(
        "delete from applied where capture = {number};
         insert into applied values ({number}, {position}, {});
         insert into steps values ({step}, {number}, {position}, {nets}, {versions}, {rows})",
        to.time
    ))
}

/// The steps above a checkpoint, per capture.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Ranges(BTreeMap<CaptureNumber, i64>);

impl Ranges {
    /// Whether the captures of `other` are all here, with the same steps.
    pub fn agree_with(&self, other: &Ranges) -> bool {
        other.0.iter().all(|(number, step)| self.0.get(number) == Some(step))
    }

    /// A condition on rows of `net_<table>`.
    pub fn of_nets(&self, table: &Table) -> String {
        self.condition(table, |step| format!("__at > {}", 2 * step + 1))
    }

    /// A condition on rows of `delta_<table>`.
    pub fn of_versions(&self, table: &Table) -> String {
        self.condition(table, |step| format!("__step > {step}"))
    }

    fn condition(&self, table: &Table, above: impl Fn(i64) -> String) -> String {
        let step = |number: &CaptureNumber| self.0.get(number).copied().unwrap_or_default();
        if let [(number, _)] = table.captures.as_slice() {
            return above(step(number));
        }
        let one =
            |(number, _): &(CaptureNumber, CaptureId)| format!("(__capture = {number} and {})", above(step(number)));
        format!("({})", table.captures.iter().map(one).collect::<Vec<_>>().join(" or "))
    }
}

/// Which kept changes an output is made from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Nets,
    Versions,
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
    session: &Session,
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
    };
    let steps = session.rows(&format!("select capture, step, lsn, seq, {column} from steps"), |row| {
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
    session: &Session,
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
        let mut left = 0;
        let mut conditions = (Vec::new(), Vec::new());
        for (number, id) in &table.captures {
            let lowest = checkpoints.iter().filter_map(|checkpoint| checkpoint.get(id)).min();
            let step = match lowest {
                Some(position) => {
                    let (lsn, seq) = (blob(position.lsn.as_slice()), blob(position.seq.as_slice()));
                    session.number(&format!(
                        "select max(step) from steps
                         where capture = {number} and (lsn < {lsn} or (lsn = {lsn} and seq <= {seq}))"
                    ))?
                }
                None if is_read => session.number(&format!("select min(step) from steps where capture = {number}"))?,
                None => session.number(&format!("select max(step) from steps where capture = {number}"))?,
            };
            session.run(&format!(
                "delete from steps where capture = {number} and step < {step};
                 update steps set rows = 0 where capture = {number} and step = {step} and rows > 0"
            ))?;
            left += session.number(&format!("select sum(rows)::bigint from steps where capture = {number}"))?;
            conditions.0.push(format!("(__capture = {number} and __at <= {})", 2 * step + 1));
            conditions.1.push(format!("(__capture = {number} and __step <= {step})"));
        }
        if left > 0 {
            session.run(&format!(
                "delete from {} where {}; delete from {} where {}",
                table.net(),
                conditions.0.join(" or "),
                table.delta(),
                conditions.1.join(" or ")
            ))?;
        } else if has_rows(session, &table.net())? || has_rows(session, &table.delta())? {
            create_kept(session, table, "create or replace table")?;
        }
    }
    Ok(())
}

fn has_rows(session: &Session, table: &str) -> Result<bool> {
    Ok(session.number(&format!("select count(*) from (select 1 from {table} limit 1)"))? > 0)
}
