//! The database that everything is compared in: a file of its own, gone afterwards, that spills what memory does not
//! hold.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use arrow::array::RecordBatch;
use duckdb::{Config, Connection};
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::set_time;
use tempfile::TempDir;

use super::VerifyInput;
use super::report::{EXAMPLES_MAX, Finding, FindingKind};

const PREFIX: &str = "shori-verify-";
/// Held while a folder is in use, so that one left behind by a killed process is known.
const LOCK: &str = "lock";
/// A folder without a lock may be one that another process has just made.
const MADE_WITHIN: Duration = Duration::from_secs(3600);

pub(super) struct Scratch {
    connection: Connection,
    // Removed after the connection has let go of it.
    _directory: TempDir,
    _lock: File,
}

/// Removes what killed processes left behind. What cannot be removed is in nobody's way.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let left_behind = match File::open(entry.path().join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => {
                let made = entry.metadata().and_then(|metadata| metadata.modified()).ok();
                made.and_then(|made| made.elapsed().ok()).is_some_and(|age| age > MADE_WITHIN)
            }
        };
        if left_behind && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::debug!(%error, folder = %entry.path().display(), "a scratch folder was left behind");
        }
    }
}

impl Scratch {
    pub(super) fn open(input: &VerifyInput) -> Result<Self> {
        let make = || match &input.scratch_directory {
            Some(parent) => TempDir::with_prefix_in(PREFIX, parent),
            None => TempDir::with_prefix(PREFIX),
        };
        if let Some(parent) = &input.scratch_directory {
            sweep(parent);
        }
        let locked = || {
            let directory = make()?;
            let lock = File::create(directory.path().join(LOCK))?;
            lock.lock()?;
            Ok((directory, lock))
        };
        let (directory, lock) = locked().map_err(|cause: std::io::Error| {
            Error::new(ErrorKind::Refused, "make", "a scratch folder", cause)
                .with_remedy("name a folder with enough space")
        })?;
        let open = || {
            let mut config = Config::default()
                .with("autoinstall_known_extensions", "false")?
                .with("autoload_known_extensions", "false")?
                .with("memory_limit", format!("{}MiB", input.memory_limit_mib))?
                .with("temp_directory", directory.path().join("spill").display().to_string())?;
            if input.threads > 0 {
                config = config.with("threads", input.threads.to_string())?;
            }
            let connection = Connection::open_with_flags(directory.path().join("verify.duckdb"), config)?;
            connection.execute_batch(set_time(&connection)?)?;
            connection.execute_batch(
                "
                set preserve_insertion_order = false;
                create schema base;
                create schema touched;
                create schema before;
                create schema misfits;
                create schema found;
                create schema expected;
                ",
            )?;
            Ok(connection)
        };
        let connection = open().map_err(|cause| scratch_error("open", "the scratch database", cause))?;
        Ok(Self { connection, _directory: directory, _lock: lock })
    }

    pub(super) fn execute(&self, statements: &str) -> Result<()> {
        self.connection.execute_batch(statements).map_err(|cause| scratch_error("compute", statements, cause))
    }

    /// Runs `begin`, which is one line, with the text that a person wrote in a file: what is wrong with it is theirs to
    /// know.
    pub(super) fn execute_projection(&self, begin: &str, text: &str, file: &str) -> Result<()> {
        self.connection.execute_batch(&format!("{begin}{text}\n")).map_err(|cause| written_error(file, cause))
    }

    pub(super) fn append(&self, schema: &str, table: &str, batch: RecordBatch) -> Result<()> {
        let append = || {
            let mut appender = self.connection.appender_to_db(table, schema)?;
            appender.append_record_batch(batch)?;
            appender.flush()
        };
        append().map_err(|cause| scratch_error("load", &format!("rows of {table}"), cause))
    }

    pub(super) fn number(&self, query: &str) -> Result<u64> {
        let number: Option<i64> = self
            .connection
            .query_row(query, [], |row| row.get(0))
            .map_err(|cause| scratch_error("compute", query, cause))?;
        Ok(number.unwrap_or(0).max(0) as u64)
    }

    pub(super) fn texts(&self, query: &str) -> Result<Vec<String>> {
        let read = || -> duckdb::Result<Vec<String>> {
            let mut statement = self.connection.prepare(query)?;
            let texts = statement.query_map([], |row| row.get::<_, Option<String>>(0))?;
            texts.map(|text| text.map(Option::unwrap_or_default)).collect()
        };
        read().map_err(|cause| scratch_error("compute", query, cause))
    }

    /// Names and types of a table's columns, in order.
    pub(super) fn columns(&self, schema: &str, table: &str) -> Result<Vec<(String, String)>> {
        let query = format!(
            "
            select column_name, data_type
            from information_schema.columns
            where table_schema = {} and table_name = {}
            order by ordinal_position
            ",
            quote_text(schema),
            quote_text(table)
        );
        let read = || -> duckdb::Result<Vec<(String, String)>> {
            let mut statement = self.connection.prepare(&query)?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        read().map_err(|cause| scratch_error("compute", &query, cause))
    }

    /// Counts what `query` finds and names the first; its one column is the text that names a row. `None` where it
    /// finds nothing.
    pub(super) fn finding(&self, kind: FindingKind, query: &str) -> Result<Option<Finding>> {
        let count = self.number(&format!("select count(*) from ({query})"))?;
        if count == 0 {
            return Ok(None);
        }
        let examples = self.texts(&format!("select * from ({query}) order by 1 limit {EXAMPLES_MAX}"))?;
        Ok(Some(Finding { kind, count, examples }))
    }
}

/// `"name"`, safe in a statement.
pub(super) fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `'text'`, safe in a statement.
pub(super) fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

pub(super) fn scratch_error(operation: &str, object: &str, cause: duckdb::Error) -> Error {
    let text = cause.to_string();
    let object = object.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.contains("No space left") || text.contains("max_temp_directory_size") {
        Error::new(ErrorKind::DiskFull, operation, object, cause).with_remedy("name a scratch folder with enough space")
    } else if text.contains("Out of Memory") {
        Error::new(ErrorKind::Refused, operation, object, cause).with_remedy("allow more memory")
    } else {
        Error::new(ErrorKind::Refused, operation, object, cause)
    }
}

/// Names the file's line where DuckDB names one: that of the statement, which begins a line earlier.
fn written_error(file: &str, cause: duckdb::Error) -> Error {
    let told = match cause {
        // Beside the message there is only a code, which is the same for every failure.
        duckdb::Error::DuckDBFailure(_, Some(message)) => message,
        other => other.to_string(),
    };
    let (message, excerpt) = told.split_once("\n\nLINE ").unwrap_or((&told, ""));
    let line = excerpt.split(':').next().and_then(|digits| digits.parse::<u64>().ok()).filter(|line| *line > 1);
    let object = match line {
        Some(line) => format!("the query in {file}, line {}", line - 1),
        None => format!("the query in {file}"),
    };
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    Error::new(ErrorKind::Projection, "compute", object, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_processes_left_behind_is_removed_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let folder = |name: &str, locked: bool| {
            let path = parent.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let lock = locked.then(|| File::create(path.join(LOCK)).unwrap());
            (path, lock)
        };
        let (left, lock) = folder("shori-verify-left", true);
        drop(lock);
        let (used, lock) = folder("shori-verify-used", true);
        lock.as_ref().unwrap().lock().unwrap();
        let (new, _) = folder("shori-verify-new", false);
        let (old, _) = folder("shori-verify-old", false);
        let long_ago = std::time::SystemTime::now() - 2 * MADE_WITHIN;
        File::open(&old).unwrap().set_modified(long_ago).unwrap();
        let (other, lock_of_other) = folder("other", true);
        drop(lock_of_other);
        sweep(parent.path());
        assert_eq!([left, used, new, old, other].map(|path| path.exists()), [false, true, true, false, true]);
    }
}
