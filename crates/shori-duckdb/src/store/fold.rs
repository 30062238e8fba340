//! Folding a layered target's resting overlay into its base: no reader sees anything of it.
//!
//! It writes the base and the resting overlay alone, and commits write neither, so both go on side by side. A fold that fails
//! or is cut short by a crash is found by the next commit and begun again; what it has done by then counts for nothing, or is
//! not done again. Row ids hold while it goes on: a checkpoint that could move rows waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use shori_core::projection::{Target, TargetShape};
use shori_core::{Result, failpoint};

use super::layers;
use super::layout::{GONE, Side, base_table, changes_table, ends_table};
use super::session::{Session, Sessions};
use super::target;
use crate::background;
use crate::database::{is_out_of_memory, quote_name};
use crate::scattered::VECTOR_ROWS;

/// Targets that wait to be folded.
const WAITING_MAX: usize = 64;
const CLOSED: &str = "ctl_folded";
const FOUND: &str = "ctl_found";

/// A thread that folds, beside commits. Dropping it waits for the fold under way.
pub(super) struct Folder {
    waiting: Option<SyncSender<Target>>,
    thread: Option<JoinHandle<()>>,
    ending: Arc<AtomicBool>,
}

impl Folder {
    /// Where calls run on the caller's thread, so do folds.
    pub fn start(sessions: &Arc<Sessions>) -> Self {
        let ending = Arc::new(AtomicBool::new(false));
        let (waiting, targets) = sync_channel(WAITING_MAX);
        let thread = if sessions.database.is_inline() {
            None
        } else {
            let (sessions, ends) = (sessions.clone(), ending.clone());
            let begin = move || fold_all(&sessions, &targets, &ends);
            let begun = background::spawn("fold", begin);
            begun.inspect_err(|error| tracing::warn!(%error, "large targets are folded between commits")).ok()
        };
        Self { waiting: thread.is_some().then_some(waiting), thread, ending }
    }

    /// Without a thread that folds, who asks does.
    pub fn ask(&self, sessions: &Arc<Sessions>, target: &Target) {
        match self.waiting.as_ref().map(|waiting| waiting.try_send(target.clone())) {
            Some(Ok(())) => {}
            Some(Err(TrySendError::Full(_))) => {
                // The next commit asks again.
                let known = sessions.database.known_targets();
                known.change(&sessions.catalog, &target.projection, |known| known.asked = false);
            }
            None | Some(Err(TrySendError::Disconnected(_))) => attempt(sessions, target),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        drop(self.waiting.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the thread that folds large targets has failed");
        }
    }
}

fn fold_all(sessions: &Arc<Sessions>, targets: &Receiver<Target>, ending: &AtomicBool) {
    while let Ok(target) = targets.recv() {
        if ending.load(Ordering::Relaxed) {
            return;
        }
        attempt(sessions, &target);
    }
}

fn attempt(sessions: &Arc<Sessions>, target: &Target) {
    let folded = sessions.session().and_then(|session| match fold(&session, target) {
        Ok(()) => {
            session.give_back();
            Ok(())
        }
        Err(error) => {
            if is_out_of_memory(&error) {
                sessions.database.relieve(&session.connection);
            }
            Err(error)
        }
    });
    if let Err(error) = &folded {
        tracing::warn!(%error, projection = &*target.projection, "a large target is folded another time");
    }
    let known = sessions.database.known_targets();
    known.change(&sessions.catalog, &target.projection, |known| known.folded(folded.is_ok()));
}

/// Rows that one transaction of a fold writes: others wait for its commit as long as it takes.
const PART_ROWS: u64 = 25_000;

/// Folds the overlay that rests, if it holds anything: in many small transactions, none of which changes what a reader sees,
/// since the overlay counts until it is emptied, last of all. One that was cut short is begun again.
pub(super) fn fold(session: &Session, target: &Target) -> Result<()> {
    let (name, _only) = (&*target.projection, session.known_targets().folding());
    let side = session.transaction(name, |session| match layers::active(session, name)? {
        Some(active) if layers::holds_rows(session, target, active.other())? => Ok(Some(active.other())),
        _ => Ok(None),
    })?;
    if let Some(side) = side {
        let deleted = match target.shape {
            TargetShape::Rows => fold_rows_in_parts(session, target, side),
            TargetShape::Versions => fold_versions_in_parts(session, target, side),
        }?;
        session.transaction(name, |session| layers::create_overlay(session, target, side))?;
        session.deleted(&base_table(name), deleted);
    }
    session.known_targets().change(session.catalog(), name, |known| known.frozen = false);
    Ok(())
}

/// A fold may take its time, commits may not: between two of its transactions it rests for so many times as long as one
/// took, so that it has a part of the processor only.
const RESTS: u32 = 3;

/// One transaction of a fold, and the rest after it.
fn part<T>(session: &Session, name: &str, work: impl FnMut(&Session) -> Result<T>) -> Result<()> {
    let begun = Instant::now();
    session.transaction(name, work)?;
    if !session.is_inline() {
        thread::sleep(begun.elapsed() * RESTS);
    }
    Ok(())
}

/// Row ids of the overlay are those of its rows in order: nobody deletes from it while it rests.
fn parts(session: &Session, table: &str) -> Result<impl Iterator<Item = String>> {
    let end = session.number(&format!("select coalesce(max(rowid) + 1, 0)::bigint from {table}"), table)?.max(0) as u64;
    let part = |start: u64| format!("rowid >= {start} and rowid < {}", start + PART_ROWS);
    Ok((0..end).step_by(PART_ROWS as usize).map(part))
}

/// Rows of the base that are replaced or gone are found once, and deleted in the order in which they lie.
fn fold_rows_in_parts(session: &Session, target: &Target, side: Side) -> Result<u64> {
    let name = &*target.projection;
    let (base, changes) = (quote_name(&base_table(name)), quote_name(&changes_table(name, side)));
    let find = format!(
        "create or replace temp table {FOUND} as
         select {base}.rowid as shori_row from {base} semi join {changes} as l on {} order by shori_row",
        target::same_key(target, &base, "l")
    );
    session.batch(&find, FOUND)?;
    for rows in parts(session, &format!("temp.{FOUND}"))? {
        part(session, name, |session| delete_found(session, name, &rows))?;
        failpoint::reached(failpoint::STORE_INSIDE_FOLD);
    }
    for rows in parts(session, &changes)? {
        let insert =
            format!("insert into {base} by name select * exclude ({GONE}) from {changes} where not {GONE} and {rows}");
        part(session, name, |session| session.execute(&insert, &[], name))?;
    }
    vectors_and_drop(session)
}

/// Deletes from the base what a part of the found rows names; only the rows between its first and last are read.
fn delete_found(session: &Session, name: &str, rows: &str) -> Result<()> {
    let bounds = format!("select min(shori_row), max(shori_row) from temp.{FOUND} where {rows}");
    let bounds =
        session.rows(&bounds, &[], FOUND, |row| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?)))?;
    let Some((Some(first), Some(last))) = bounds.first() else { return Ok(()) };
    let delete = format!(
        "delete from {} where rowid between {first} and {last}
         and rowid in (select shori_row from temp.{FOUND} where {rows})",
        quote_name(&base_table(name))
    );
    session.execute(&delete, &[], name).map(|_| ())
}

fn fold_versions_in_parts(session: &Session, target: &Target, side: Side) -> Result<u64> {
    let name = &*target.projection;
    let (base, changes) = (quote_name(&base_table(name)), quote_name(&changes_table(name, side)));
    session.batch(&find_ended(target, side, FOUND), FOUND)?;
    for rows in parts(session, &format!("temp.{FOUND}"))? {
        let put = format!("insert into {base} by name select * exclude (shori_row) from temp.{FOUND} where {rows}");
        part(session, name, |session| {
            delete_found(session, name, &rows)?;
            session.execute(&put, &[], name)
        })?;
        failpoint::reached(failpoint::STORE_INSIDE_FOLD);
    }
    // They have ended what they can, and must not end what comes into the base now.
    let ended = format!("delete from {}", quote_name(&ends_table(name, side)));
    session.transaction(name, |session| session.execute(&ended, &[], name))?;
    for rows in parts(session, &changes)? {
        part(session, name, |session| {
            session.execute(&format!("insert into {base} by name from {changes} where {rows}"), &[], name)?;
            session.execute(&format!("delete from {changes} where {rows}"), &[], name)
        })?;
    }
    vectors_and_drop(session)
}

/// How many vectors of the base lost rows.
fn vectors_and_drop(session: &Session) -> Result<u64> {
    let vectors = format!("select count(distinct shori_row // {VECTOR_ROWS}) from temp.{FOUND}");
    let deleted = session.number(&vectors, FOUND)?.max(0) as u64;
    session.batch(&format!("drop table temp.{FOUND}"), FOUND)?;
    Ok(deleted)
}

/// Makes `found`: current versions of the base that the overlay ends, as they will be, by their row ids.
fn find_ended(target: &Target, side: Side, found: &str) -> String {
    let name = &*target.projection;
    format!(
        "create or replace temp table {found} as
         select r.* replace (l.valid_to as valid_to, false as is_current, l.updated_at as updated_at)
         from (select rowid as shori_row, * from {} where is_current) r join {} l on {} order by shori_row",
        quote_name(&base_table(name)),
        quote_name(&ends_table(name, side)),
        target::same_key(target, "r", "l")
    )
}

/// Brings an overlay into the base, within the caller's transaction. Returns how many vectors of the base lost rows, at most.
pub(super) fn fold_side(session: &Session, target: &Target, side: Side) -> Result<u64> {
    if !layers::holds_rows(session, target, side)? {
        return Ok(0);
    }
    let deleted = match target.shape {
        TargetShape::Rows => fold_rows(session, target, side),
        TargetShape::Versions => fold_versions(session, target, side),
    }?;
    layers::create_overlay(session, target, side)?;
    Ok(deleted)
}

fn fold_rows(session: &Session, target: &Target, side: Side) -> Result<u64> {
    let name = &*target.projection;
    let (base, changes) = (quote_name(&base_table(name)), quote_name(&changes_table(name, side)));
    let same = target::same_key(target, &base, "l");
    let deleted = session.execute(&format!("delete from {base} using {changes} as l where {same}"), &[], name)?;
    failpoint::reached(failpoint::STORE_INSIDE_FOLD);
    let insert = format!("insert into {base} by name select * exclude ({GONE}) from {changes} where not {GONE}");
    session.execute(&insert, &[], name)?;
    Ok(deleted)
}

/// Rows that are closed are taken out and put back: an update in place keeps 24 KiB in memory for each column of each vector
/// of rows that it meets, until the next checkpoint, and that one writes those columns anew.
fn fold_versions(session: &Session, target: &Target, side: Side) -> Result<u64> {
    let name = &*target.projection;
    let base = quote_name(&base_table(name));
    let changes = quote_name(&changes_table(name, side));
    session.batch(&find_ended(target, side, CLOSED), CLOSED)?;
    let delete = format!("delete from {base} where rowid in (select shori_row from temp.{CLOSED})");
    session.execute(&delete, &[], name)?;
    failpoint::reached(failpoint::STORE_INSIDE_FOLD);
    let insert = format!("insert into {base} by name select * exclude (shori_row) from temp.{CLOSED}");
    session.execute(&insert, &[], name)?;
    session.execute(&format!("insert into {base} by name from {changes}"), &[], name)?;
    let vectors = format!("select count(distinct shori_row // {VECTOR_ROWS}) from temp.{CLOSED}");
    let deleted = session.number(&vectors, CLOSED)?.max(0) as u64;
    session.batch(&format!("drop table temp.{CLOSED}"), CLOSED)?;
    Ok(deleted)
}
