//! Who computes: a connection to DuckDB, and one that reads the state file. A second pair works beside the first, in a
//! thread of its own: reading rows one by one and running queries over them keeps one processor busy.

use std::panic::resume_unwind;
use std::thread;

use rusqlite::Connection;
use shori_core::{Error, ErrorKind, Result};

use super::file::View;
use super::session::Session;

/// Less than this is done before a second thread would have begun.
const WORTH_SHARING: usize = 128;

#[derive(Clone, Copy)]
pub(super) struct Hands<'a> {
    pub session: &'a Session,
    /// Of the state file.
    pub view: &'a Connection,
}

/// The second pair. Its view shows the same state: it was begun while the file was held.
pub(super) struct Second<'a> {
    session: &'a mut Session,
    view: View,
}

impl<'a> Second<'a> {
    pub fn new(session: &'a mut Session, view: View) -> Self {
        Self { session, view }
    }
}

/// Does both: side by side where there is a second pair of hands.
pub(super) fn both<A, B: Send>(
    hands: Hands<'_>,
    second: Option<&mut Second<'_>>,
    one: impl FnOnce(Hands<'_>) -> Result<A>,
    other: impl FnOnce(Hands<'_>) -> Result<B> + Send,
) -> Result<(A, B)> {
    let Some(second) = second else {
        let one = one(hands)?;
        return Ok((one, other(hands)?));
    };
    thread::scope(|scope| {
        let other = move || other(Hands { session: second.session, view: &second.view });
        let begun = thread::Builder::new().name("second".into()).spawn_scoped(scope, other);
        let other = begun.map_err(|cause| Error::new(ErrorKind::Unavailable, "begin", "a thread", cause))?;
        let one = one(hands);
        let other = other.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((one?, other?))
    })
}

/// The second pair, where there is enough to do for two.
pub(super) fn worth_sharing<'s, 'a>(second: &'s mut Option<Second<'a>>, work: usize) -> Option<&'s mut Second<'a>> {
    second.as_mut().filter(|_| work >= WORTH_SHARING)
}

#[cfg(test)]
mod tests {
    use super::super::file::StateFile;
    use super::super::session::WORK;
    use super::*;
    use crate::database::{Database, Settings};

    #[test]
    fn either_half_may_fail_and_both_are_done() {
        let directory = tempfile::tempdir().unwrap();
        let spill_directory = directory.path().join("spill");
        let settings = Settings { memory_limit_mib: 128, threads: 1, spill_directory, inline: false };
        let database = Database::open(&settings).unwrap();
        let root = database.connect("memory").unwrap();
        root.execute_batch(&format!("attach ':memory:' as {WORK}")).unwrap();
        let (file, writer) = StateFile::open(&directory.path().join("state.sqlite")).unwrap();
        let session = Session::open(&database).unwrap();
        let hands = Hands { session: &session, view: &writer };
        let mut spare = Session::open(&database).unwrap();
        let number = |number: i64| move |hands: Hands<'_>| hands.session.made(&format!("select {number}::bigint"));
        let fails = |_: Hands<'_>| Err::<i64, _>(Error::new(ErrorKind::Internal, "do", "this half", "it was asked to"));
        for shared in [false, true] {
            let mut second = shared.then(|| Second::new(&mut spare, file.view().unwrap()));
            assert_eq!(both(hands, second.as_mut(), number(1), number(2)).unwrap(), (1, 2));
            assert!(both(hands, second.as_mut(), fails, number(2)).is_err());
            assert!(both(hands, second.as_mut(), number(1), fails).is_err());
        }
    }
}
