//! Opening the file, and the one place that maps SQLite's errors to kinds.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use shori_core::{Error, ErrorKind, Result};

/// An open database file, and which file that is.
pub(crate) struct Database {
    pub connection: Connection,
    pub path: PathBuf,
    file: FileId,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

/// Prepared statements kept: a few per captured table.
const STATEMENT_CACHE: usize = 64;

impl Database {
    /// Opens an existing file for reading and writing. It is never created here.
    pub fn open(path: &Path, busy_timeout: Duration) -> Result<Self> {
        let file = file_id(&file_metadata(path)?);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let fail = |cause| sqlite_error("open", file_name(path), cause);
        let connection = Connection::open_with_flags(path, flags).map_err(fail)?;
        connection.busy_timeout(busy_timeout).map_err(fail)?;
        connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
        // Read something, so that a file of another format is found here.
        connection.query_row("pragma schema_version", [], |_| Ok(())).map_err(fail)?;
        Ok(Self { connection, path: path.into(), file })
    }

    /// Fails when the path names another file than the one that is open.
    pub fn check_same_file(&self) -> Result<()> {
        let replaced = |cause: String| {
            Err(Error::new(ErrorKind::SourceReplaced, "read", file_name(&self.path), cause)
                .with_remedy("put the captured file back and start again, or start with an empty log"))
        };
        match std::fs::metadata(&self.path) {
            Ok(metadata) if file_id(&metadata) == self.file => Ok(()),
            Ok(_) => replaced("another file took its place while it was read".into()),
            Err(cause) => replaced(format!("it was removed while it was read ({cause})")),
        }
    }

    pub fn name(&self) -> String {
        file_name(&self.path)
    }

    /// Maps an error of this file.
    pub fn fail(&self, operation: &str) -> impl Fn(rusqlite::Error) -> Error + use<> {
        let (operation, object) = (operation.to_string(), self.name());
        move |cause| sqlite_error(&operation, object.clone(), cause)
    }
}

pub(crate) fn file_name(path: &Path) -> String {
    format!("SQLite file {}", path.display())
}

fn file_metadata(path: &Path) -> Result<Metadata> {
    let usage = |cause: String, remedy: &str| {
        Error::new(ErrorKind::Usage, "open", file_name(path), cause).with_remedy(remedy.to_string())
    };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(usage("it is a directory".into(), "give the path of the file")),
        Ok(metadata) => Ok(metadata),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            Err(usage("it does not exist".into(), "correct the path, or create a sample with shori init --sample"))
        }
        Err(cause) => Err(usage(cause.to_string(), "let this user read and write the file and its directory")),
    }
}

fn file_id(metadata: &Metadata) -> FileId {
    FileId { device: metadata.dev(), inode: metadata.ino() }
}

/// `"name"`, safe in a statement.
pub(crate) fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Whether another connection's lock is the reason: nothing was done, and trying again may help.
pub(crate) fn is_busy(cause: &rusqlite::Error) -> bool {
    matches!(cause.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// Whether the disk is the reason. The file beside a database that its readers share grows before anything is written,
/// and where that fails, SQLite does not say why.
pub fn is_disk_full(cause: &rusqlite::Error) -> bool {
    let code = cause.sqlite_error().map(|error| error.extended_code);
    cause.sqlite_error_code() == Some(ErrorCode::DiskFull) || code == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE)
}

/// Tells apart what the engine must.
pub(crate) fn sqlite_error(operation: &str, object: impl Into<String>, cause: rusqlite::Error) -> Error {
    let (kind, remedy) = match cause.sqlite_error_code() {
        _ if is_disk_full(&cause) => (ErrorKind::DiskFull, Some("free some space and start again: nothing is lost")),
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::FileLockingProtocolFailed
            | ErrorCode::SchemaChanged
            | ErrorCode::OperationInterrupted
            | ErrorCode::SystemIoFailure,
        ) => (ErrorKind::Unavailable, None),
        Some(ErrorCode::NotADatabase) => {
            (ErrorKind::Corrupt, Some("give the path of a SQLite database (an encrypted one cannot be read)"))
        }
        Some(ErrorCode::DatabaseCorrupt) => (ErrorKind::Corrupt, Some("check it with pragma integrity_check")),
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => (
            ErrorKind::Usage,
            Some("let this user read and write the file and its directory: capture adds a table and triggers"),
        ),
        Some(ErrorCode::OutOfMemory) => (ErrorKind::Refused, None),
        Some(_) => (ErrorKind::Refused, None),
        // A value of another type than our own tables hold.
        None => (ErrorKind::Corrupt, None),
    };
    let error = Error::new(kind, operation, object, cause);
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(code: i32) -> ErrorKind {
        let cause = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        sqlite_error("read", "SQLite file x", cause).kind()
    }

    #[test]
    fn each_sqlite_error_has_its_kind() {
        use rusqlite::ffi;
        assert_eq!(kind_of(ffi::SQLITE_BUSY), ErrorKind::Unavailable);
        assert_eq!(kind_of(ffi::SQLITE_BUSY_SNAPSHOT), ErrorKind::Unavailable);
        assert_eq!(kind_of(ffi::SQLITE_LOCKED), ErrorKind::Unavailable);
        assert_eq!(kind_of(ffi::SQLITE_IOERR), ErrorKind::Unavailable);
        assert_eq!(kind_of(ffi::SQLITE_NOTADB), ErrorKind::Corrupt);
        assert_eq!(kind_of(ffi::SQLITE_CORRUPT), ErrorKind::Corrupt);
        assert_eq!(kind_of(ffi::SQLITE_READONLY), ErrorKind::Usage);
        assert_eq!(kind_of(ffi::SQLITE_PERM), ErrorKind::Usage);
        assert_eq!(kind_of(ffi::SQLITE_CANTOPEN), ErrorKind::Usage);
        assert_eq!(kind_of(ffi::SQLITE_FULL), ErrorKind::DiskFull);
        assert_eq!(kind_of(ffi::SQLITE_IOERR_SHMSIZE), ErrorKind::DiskFull);
        assert_eq!(kind_of(ffi::SQLITE_CONSTRAINT), ErrorKind::Refused);
    }
}
