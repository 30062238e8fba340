//! Folding a layered target's resting overlay into its base: one transaction that no reader sees anything of.
//!
//! It writes the base and the resting overlay alone, and commits write neither, so both go on side by side. A fold that fails
//! has changed nothing and is tried again; one that a crash cuts short is found by the next commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use shori_core::projection::{Target, TargetShape};
use shori_core::{Result, failpoint};

use super::layers;
use super::layout::{GONE, Side, base_table, changes_table, ends_table};
use super::session::{Session, Sessions};
use super::target;
use crate::database::{is_out_of_memory, quote_name};
use crate::scattered::VECTOR_ROWS;

/// Targets that wait to be folded.
const WAITING_MAX: usize = 64;
const CLOSED: &str = "shori_folded";

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
            let begun = thread::Builder::new().name("fold".into()).spawn(begin);
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

/// Folds the overlay that rests, if it holds anything.
pub(super) fn fold(session: &Session, target: &Target) -> Result<()> {
    let (name, _only) = (&*target.projection, session.known_targets().folding());
    let deleted = session.transaction(name, |session| match layers::active(session, name)? {
        Some(active) => fold_side(session, target, active.other()),
        None => Ok(0),
    })?;
    session.deleted(&base_table(name), deleted);
    session.known_targets().change(session.catalog(), name, |known| known.frozen = false);
    Ok(())
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
    let (changes, ends) = (quote_name(&changes_table(name, side)), quote_name(&ends_table(name, side)));
    let find = format!(
        "create or replace temp table {CLOSED} as
         select r.* replace (l.valid_to as valid_to, false as is_current, l.updated_at as updated_at)
         from (select rowid as shori_row, * from {base} where is_current) r join {ends} l on {}",
        target::same_key(target, "r", "l")
    );
    session.batch(&find, CLOSED)?;
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
