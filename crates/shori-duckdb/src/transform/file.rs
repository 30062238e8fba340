//! The state file: SQLite, for its trees of rows by key. What marks it, how it is opened, and its errors.
//!
//! Rows are looked for by key some thousand times a step, whatever the size of a table; DuckDB's tables would be read as
//! a whole for that. Memory is bounded by the page caches; the system's own cache holds what is read often.
//!
//! A commit survives the end of the process. Nothing is waited for until it lies on the disk: the file is a cache, and
//! one that was open when the machine went down is made anew from the log. Where it cannot be told whether that has
//! happened, writes are waited for.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, ToSql};
use shori_core::{Error, ErrorKind, Result};

use crate::database::locked;

/// "Shri" in the file's header.
const APPLICATION_ID: i32 = 0x5368_7269;
/// Not permanent: a file of another layout is moved aside, and comes back from the log.
const LAYOUT_VERSION: i32 = 2;
/// The version before had no log of results: a program of that version would not read what is logged.
const LAYOUT_BEFORE: i32 = 1;

/// Pages that a connection keeps, in KiB: the one that writes, and those that read.
const WRITER_CACHE_KIB: i64 = 32 * 1024;
const READER_CACHE_KIB: i64 = 4 * 1024;
/// Pages of the write-ahead log after which it is folded into the file. Pages that are written at each step come only once.
const LOG_PAGES: i64 = 16_384;
/// Statements that a connection keeps.
const STATEMENTS_KEPT: usize = 64;
/// Readers that wait for use.
const IDLE_MAX: usize = 4;
/// Writers are one by one in this process; another process holds the folder's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const OBJECT: &str = "the state file";

/// Opens connections to the file, and lends those that only read.
#[derive(Clone)]
pub(super) struct StateFile {
    path: Arc<PathBuf>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl StateFile {
    /// Opens the file for writing, making it if it is missing. What is no state file, damaged, or of another layout is moved
    /// aside.
    pub fn open(path: &Path) -> Result<(Self, Connection)> {
        let connection = match connect_to_write(path) {
            Ok(connection) => connection,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(%error, path = %path.display(), "the file is no state of this version and is moved aside");
                move_aside(path)?;
                connect_to_write(path)?
            }
            Err(error) => return Err(error),
        };
        Ok((Self { path: Arc::new(path.to_path_buf()), idle: Arc::default() }, connection))
    }

    /// A connection that reads one state of the file, until it is dropped.
    pub fn view(&self) -> Result<View> {
        let idle = locked(&self.idle).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => connect(&self.path, OpenFlags::SQLITE_OPEN_READ_WRITE, READER_CACHE_KIB)?,
        };
        // Of itself, SQLite begins to read with the first query: by then, state has gone on.
        let begin = "begin; select count(*) from owner";
        connection.execute_batch(begin).map_err(|cause| failure("read", cause))?;
        Ok(View { connection: Some(connection), file: self.clone() })
    }
}

/// One state of the file.
pub(super) struct View {
    connection: Option<Connection>,
    file: StateFile,
}

impl std::ops::Deref for View {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // It is taken by dropping only.
        self.connection.as_ref().unwrap_or_else(|| unreachable!("a view has its connection"))
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if let Err(cause) = connection.execute_batch("rollback") {
            tracing::debug!(%cause, "a view of the state file is closed with its connection");
            return;
        }
        let mut idle = locked(&self.file.idle);
        if idle.len() < IDLE_MAX {
            idle.push(connection);
        }
    }
}

fn connect(path: &Path, flags: OpenFlags, cache_kib: i64) -> Result<Connection> {
    let open = || {
        let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "cache_size", -cache_kib)?;
        connection.pragma_update(None, "temp_store", "file")?;
        Ok(connection)
    };
    open().map_err(|cause| failure("open", cause))
}

fn connect_to_write(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
    let connection = connect(path, flags, WRITER_CACHE_KIB)?;
    let mark = || {
        let application: i32 = connection.query_row("pragma application_id", [], |row| row.get(0))?;
        let version: i32 = connection.query_row("pragma user_version", [], |row| row.get(0))?;
        let tables: i64 = connection.query_row("select count(*) from sqlite_master", [], |row| row.get(0))?;
        if application != APPLICATION_ID || ![LAYOUT_BEFORE, LAYOUT_VERSION].contains(&version) {
            if tables > 0 || application != 0 {
                return Ok(false);
            }
            connection.pragma_update(None, "application_id", APPLICATION_ID)?;
        }
        if version != LAYOUT_VERSION {
            connection.pragma_update(None, "user_version", LAYOUT_VERSION)?;
        }
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "wal_autocheckpoint", LOG_PAGES)?;
        connection.execute_batch(CREATE_CONTROL)?;
        connection.execute_batch(CREATE_OPEN_COMMIT)?;
        mark_open(&connection)
    };
    match mark().map_err(|cause: rusqlite::Error| failure("open", cause))? {
        true => Ok(connection),
        false => {
            let cause = "it is not of this program, of another version, or was open when the machine went down";
            Err(Error::new(ErrorKind::Corrupt, "open", format!("state file {}", path.display()), cause))
        }
    }
}

/// Notes that the file is open since the machine was started. `false`: it was open when the machine went down.
fn mark_open(connection: &Connection) -> rusqlite::Result<bool> {
    let Some(boot) = boot() else { return Ok(true) };
    let left: Vec<String> =
        connection.prepare("select boot from opened")?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    if left.iter().any(|other| *other != boot) {
        return Ok(false);
    }
    if left.is_empty() {
        connection.execute("insert into opened values (?)", [boot])?;
    }
    connection.pragma_update(None, "synchronous", "off")?;
    Ok(true)
}

/// Notes that the file is closed, when all of it lies on the disk.
pub(super) fn mark_closed(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "synchronous", "full")?;
    connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))?;
    connection.execute("delete from opened", [])?;
    connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(()))
}

/// Tells one start of the machine from another, where the system does.
fn boot() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_string())
}

/// The tables that every state file has. Those of rows are made for each captured table: see
/// [`layout`](super::layout).
pub(super) const CREATE_CONTROL: &str = "
create table if not exists owner (store_id text);
create table if not exists opened (boot text);
create table if not exists captures (
    number integer primary key, source text, instance text, table_number integer, shape text
);
create table if not exists applied (capture integer primary key, lsn blob, seq blob, time integer);
create table if not exists steps (
    step integer, capture integer, lsn blob, seq blob, nets_kept integer, versions_kept integer, changes integer
);
create table if not exists indexes (table_number integer, name text, number integer primary key);
create table if not exists results (
    number integer primary key, projection text unique, definition text, checkpoint text
);
create table if not exists result_log (id integer primary key, number integer, rows blob);
create index if not exists result_log_number on result_log (number);
";

/// Keys that a commit has touched whose parts were written in its midst: how it found them.
const CREATE_OPEN_COMMIT: &str = "
create temp table open_commit (k primary key, existed integer, boundary integer) without rowid;
";

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Keeps the file beside, so that nothing of somebody else's is lost.
fn move_aside(path: &Path) -> Result<()> {
    let fail = |cause| Error::new(ErrorKind::Corrupt, "move aside", format!("file {}", path.display()), cause);
    for log in [suffixed(path, "-wal"), suffixed(path, "-shm")] {
        if log.exists() {
            std::fs::remove_file(&log).map_err(fail)?;
        }
    }
    std::fs::rename(path, suffixed(path, ".replaced")).map_err(fail)
}

/// Runs statements that give nothing.
pub(super) fn run(connection: &Connection, sql: &str) -> Result<()> {
    connection.execute_batch(sql).map_err(|cause| failure("update", cause))
}

/// Runs one statement, which is kept, and returns how many rows it changed.
pub(super) fn execute(connection: &Connection, sql: &str, values: &[&dyn ToSql]) -> Result<usize> {
    let run = || connection.prepare_cached(sql)?.execute(values);
    run().map_err(|cause| failure("update", cause))
}

/// All rows of a query, each made by `make`.
pub(super) fn rows<T>(
    connection: &Connection,
    sql: &str,
    values: &[&dyn ToSql],
    make: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>> {
    let read = || connection.prepare_cached(sql)?.query_map(values, make)?.collect::<rusqlite::Result<Vec<T>>>();
    read().map_err(|cause| failure("read", cause))
}

/// The single number that a query gives; null is 0.
pub(super) fn number(connection: &Connection, sql: &str, values: &[&dyn ToSql]) -> Result<i64> {
    let numbers = rows(connection, sql, values, |row| row.get::<_, Option<i64>>(0))?;
    Ok(numbers.first().copied().flatten().unwrap_or(0))
}

/// Runs `work` in a transaction: all of it, or nothing.
pub(super) fn transaction<T>(connection: &Connection, work: impl FnOnce() -> Result<T>) -> Result<T> {
    run(connection, "begin immediate")?;
    match work().and_then(|value| run(connection, "commit").map(|()| value)) {
        Ok(value) => Ok(value),
        Err(error) => {
            roll_back(connection);
            Err(error)
        }
    }
}

/// Ends what is begun, if anything is.
pub(super) fn roll_back(connection: &Connection) {
    if !connection.is_autocommit()
        && let Err(cause) = connection.execute_batch("rollback")
    {
        tracing::debug!(%cause, "a rollback failed");
    }
}

const REMOVE_IT: &str = "stop the pipeline and remove the file: it comes back from the log";

/// An error about the file as a whole.
pub(super) fn failure(operation: &str, cause: rusqlite::Error) -> Error {
    let full = (ErrorKind::DiskFull, Some("free some space and start again: nothing is lost"));
    let (kind, remedy) = match cause.sqlite_error_code() {
        // The index of its write-ahead log cannot grow.
        _ if cause.sqlite_error().is_some_and(|code| code.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE) => full,
        Some(ErrorCode::DiskFull) => full,
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => (ErrorKind::Corrupt, Some(REMOVE_IT)),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => (ErrorKind::Unavailable, None),
        // What is there is not what this program writes.
        None => (ErrorKind::Corrupt, Some(REMOVE_IT)),
        _ => (ErrorKind::Refused, None),
    };
    let error = Error::new(kind, operation, OBJECT, cause);
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trying again would never end.
    #[test]
    fn what_is_there_and_cannot_be_read_is_damage_with_a_remedy() {
        let connection = Connection::open_in_memory().unwrap();
        let text = "select cast(x'ff' as text)";
        let error = rows(&connection, text, &[], |row| row.get::<_, String>(0)).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(REMOVE_IT), "{error}");
        let error = rows(&connection, "select 'a'", &[], |row| row.get::<_, i64>(0)).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(REMOVE_IT), "{error}");
    }

    #[test]
    fn a_view_is_of_the_state_in_which_it_was_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (file, writer) = StateFile::open(&folder.path().join("state.sqlite")).unwrap();
        let count = |connection: &Connection| number(connection, "select count(*) from applied", &[]).unwrap();
        for round in 0..3 {
            let view = file.view().unwrap();
            execute(&writer, "insert into applied values (?, x'', x'', 0)", &[&round]).unwrap();
            assert_eq!((count(&view), count(&writer)), (round, round + 1));
        }
    }
}
