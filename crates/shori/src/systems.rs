//! Kinds of sources: what each can do for the verbs. The one place that knows which there are.

use std::path::Path;

use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Position, SortKey};
use shori_core::secret::Secret;
use shori_core::source::{CaptureInfo, Source};
use shori_core::{Error, ErrorKind, Result};
use shori_files::{FilesConfig, FilesSource};
use shori_postgres::{PollSource, Polls, PostgresConfig, PostgresSource, PostgresTable, READ_TIMEOUT, Server, Tls};
use shori_sqlite::{SqliteConfig, SqliteSource, SqliteTable};
use std::time::Duration;

use crate::config::{CaptureKind, Loaded, ServerConfig, SourceConfig, SourceKind, TlsMode};
use crate::generate::{Application, Orders, Shop};

/// Rows of a snapshot's chunk. Those of SQLite are held as rows before they are a batch.
const SQLITE_CHUNK_ROWS: usize = 50_000;
/// A row group of DuckDB: a transaction that brings it whole writes it into the file, compressed, where smaller ones go by
/// way of the write-ahead log (duckdb.org/docs, "Storage Versions and Format", "Row Groups").
const POSTGRES_CHUNK_ROWS: usize = 122_880;

/// A source as it is configured.
pub enum System {
    Sqlite(SqliteConfig),
    Postgres(Box<PostgresConfig>),
    Files(FilesConfig),
}

/// What could be captured, and what is in the way of it.
pub struct Inspected {
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
    /// What else is missing: rights, settings.
    pub problems: Vec<Error>,
    /// What capture works without, and who relies on it should know.
    pub notes: Vec<String>,
}

/// What was made ready for capture.
pub struct Installed {
    /// For messages.
    pub source: String,
    pub tables: Vec<String>,
    /// Why other tables are not captured.
    pub failed: Vec<Error>,
}

/// What of the source is not in the log yet.
pub enum Backlog {
    Changes(u64),
    /// Bytes of the source's own log, with changes of other tables among them.
    LogBytes(u64),
}

impl System {
    pub fn of(loaded: &Loaded, source: &SourceConfig) -> Result<Self> {
        Ok(match source.kind {
            SourceKind::Sqlite => Self::Sqlite(sqlite_config(loaded, source)),
            SourceKind::Postgres => Self::Postgres(Box::new(postgres_config(loaded, source)?)),
            SourceKind::Files => Self::Files(FilesConfig {
                path: loaded.resolve(source.file()),
                source_name: source.name.clone(),
                tables: source.tables.keys().cloned().collect(),
            }),
        })
    }

    pub fn source(self) -> Box<dyn Source> {
        match self {
            Self::Sqlite(config) => Box::new(SqliteSource::new(config)),
            Self::Postgres(config) if config.polls.is_some() => Box::new(PollSource::new(*config)),
            Self::Postgres(config) => Box::new(PostgresSource::new(*config)),
            Self::Files(config) => Box::new(FilesSource::new(config)),
        }
    }

    /// Refuses a source that is not there, where that can be told without waiting for it.
    pub fn must_be_there(&self) -> Result<()> {
        match self {
            // It is the one that knows what to say.
            Self::Sqlite(config) if !config.path.is_file() => shori_sqlite::log_end(config).map(|_| ()),
            Self::Files(config) if !config.path.is_dir() => shori_files::inspect(config).map(|_| ()),
            Self::Sqlite(_) | Self::Postgres(_) | Self::Files(_) => Ok(()),
        }
    }

    pub async fn inspect(&self) -> Result<Inspected> {
        match self {
            Self::Sqlite(config) => {
                let shori_sqlite::Inspected { captures, failed } = shori_sqlite::inspect(config)?;
                Ok(Inspected { captures, failed, problems: Vec::new(), notes: Vec::new() })
            }
            Self::Postgres(config) => {
                let inspected = shori_postgres::inspect(config).await?;
                let shori_postgres::Inspected { captures, failed, problems, notes } = inspected;
                Ok(Inspected { captures, failed, problems, notes })
            }
            Self::Files(config) => {
                let shori_files::Inspected { captures, failed } = shori_files::inspect(config)?;
                Ok(Inspected { captures, failed, problems: Vec::new(), notes: Vec::new() })
            }
        }
    }

    /// The first rows of every table that can be captured.
    pub async fn sample(&self, rows: usize) -> Result<Vec<ChangeBatch>> {
        match self {
            Self::Sqlite(config) => shori_sqlite::sample(config, rows),
            Self::Postgres(config) => shori_postgres::sample(config, rows).await,
            Self::Files(config) => shori_files::sample(config, rows),
        }
    }

    /// Makes the source ready for capture. May be repeated.
    pub async fn install(&self) -> Result<Installed> {
        match self {
            Self::Sqlite(config) => {
                let installed = shori_sqlite::install(config)?;
                let mut tables: Vec<_> = installed.captures.iter().map(|info| info.id.instance.to_string()).collect();
                tables.sort_unstable();
                let failed = installed.failed.into_iter().map(|(_, error)| error).collect();
                Ok(Installed { source: config.path.display().to_string(), tables, failed })
            }
            Self::Postgres(config) => {
                let (tables, failed) = shori_postgres::install(config).await?;
                Ok(Installed { source: config.server.name(), tables, failed })
            }
            // Whoever wrote the files has captured them: they only have to be there.
            Self::Files(config) => {
                let inspected = shori_files::inspect(config)?;
                let tables = inspected.captures.iter().map(|info| info.id.instance.to_string()).collect();
                let failed = inspected.failed.into_iter().map(|(_, error)| error).collect();
                Ok(Installed { source: config.path.display().to_string(), tables, failed })
            }
        }
    }

    /// Runs the script that makes the pipeline's sample tables; existing ones stay as they are.
    pub async fn make_sample(&self, script: &str) -> Result<()> {
        match self {
            Self::Sqlite(config) => make_sqlite_sample(&config.path, script),
            Self::Postgres(config) => shori_postgres::execute(&config.server, script).await,
            Self::Files(config) => Err(no_sample(config)),
        }
    }

    /// What writes to the sample tables of such a source.
    pub fn application(&self) -> Result<Application> {
        Ok(match self {
            Self::Sqlite(config) => Application::Shop(Shop::new(&config.path)),
            Self::Postgres(config) => {
                Application::Orders(Orders { server: config.server.clone(), schema: config.schema.clone() })
            }
            Self::Files(config) => return Err(no_sample(config)),
        })
    }

    /// What is above the watermark with this `lsn` in hexadecimal; `None` where that is not a position of this source.
    pub async fn backlog(&self, lsn: &str) -> Result<Option<Backlog>> {
        let number = || u64::from_str_radix(if lsn.is_empty() { "0" } else { lsn }, 16);
        match self {
            Self::Sqlite(config) => {
                let Ok(lsn) = number() else { return Ok(None) };
                let watermark = Position::new(SortKey::from_u64(lsn), SortKey::MAX);
                shori_sqlite::changes_above(config, &watermark).map(|count| Some(Backlog::Changes(count)))
            }
            // Nobody counts what a poll will find.
            Self::Postgres(config) if config.polls.is_some() => Ok(None),
            Self::Postgres(config) => {
                let Ok(lsn) = number() else { return Ok(None) };
                shori_postgres::log_bytes_above(config, lsn).await.map(|bytes| Some(Backlog::LogBytes(bytes)))
            }
            Self::Files(config) => shori_files::bytes_above(config, lsn).map(|bytes| bytes.map(Backlog::LogBytes)),
        }
    }
}

fn no_sample(config: &FilesConfig) -> Error {
    let object = format!("change logs {}", config.path.display());
    let cause = "they are written by the pipeline that has the log";
    Error::new(ErrorKind::Usage, "have sample tables in", object, cause).with_remedy("have them exported: shori export")
}

fn make_sqlite_sample(path: &Path, script: &str) -> Result<()> {
    let fail = |cause| Error::new(ErrorKind::Refused, "create sample tables in", path.display().to_string(), cause);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|cause| Error::new(ErrorKind::Usage, "create", format!("folder {}", parent.display()), cause))?;
    }
    let connection = rusqlite::Connection::open(path).map_err(fail)?;
    connection.execute_batch(script).map_err(fail)
}

pub fn sqlite_config(loaded: &Loaded, source: &SourceConfig) -> SqliteConfig {
    let table = |(name, table): (&String, &crate::config::TableConfig)| SqliteTable {
        name: name.clone(),
        columns: table.columns.clone(),
    };
    SqliteConfig {
        busy_timeout: source.busy_timeout(),
        snapshot_chunk_rows: source.snapshot_chunk_rows.unwrap_or(SQLITE_CHUNK_ROWS),
        keep_changes: source.keep_changes(),
        ..SqliteConfig::new(loaded.resolve(source.file()), &source.name, source.tables.iter().map(table).collect())
    }
}

fn postgres_config(loaded: &Loaded, source: &SourceConfig) -> Result<PostgresConfig> {
    let no_server = || loaded.wrong(&format!("source {}", source.name), "it has no server, which says where it is");
    let table = |(name, table): (&String, &crate::config::TableConfig)| PostgresTable {
        name: name.clone(),
        columns: table.columns.clone(),
        changed_at: table.changed_at.clone(),
    };
    let own_name = || name_of(&[&loaded.config.pipeline.name, &source.name]);
    Ok(PostgresConfig {
        server: server(loaded, source.server.as_ref().ok_or_else(no_server)?)?,
        source_name: source.name.clone(),
        schema: source.schema().to_string(),
        tables: source.tables.iter().map(table).collect(),
        publication: source.publication.clone().unwrap_or_else(own_name),
        slot: source.slot.clone().unwrap_or_else(own_name),
        manage: source.manage.unwrap_or(true),
        snapshot_chunk_rows: source.snapshot_chunk_rows.unwrap_or(POSTGRES_CHUNK_ROWS),
        read_timeout: READ_TIMEOUT,
        polls: (source.capture() == CaptureKind::Timestamp)
            .then(|| Polls { every: source.poll_interval(), overlap: source.overlap() }),
    })
}

pub fn server(loaded: &Loaded, config: &ServerConfig) -> Result<Server> {
    let password = match &config.password_file {
        None => config.password.clone(),
        Some(file) => {
            let path = loaded.resolve(file);
            let text = std::fs::read_to_string(&path).map_err(|cause| {
                Error::new(ErrorKind::Usage, "read", format!("password file {}", path.display()), cause)
            })?;
            Some(Secret::new(text.trim_end_matches(['\r', '\n'])))
        }
    };
    let tls = match config.tls {
        Some(TlsMode::Off) => Tls::Off,
        None if Server::is_local(&config.host) && config.tls_roots.is_none() => Tls::Off,
        _ => Tls::Verified { roots: config.tls_roots.as_ref().map(|file| loaded.resolve(file)) },
    };
    Ok(Server {
        host: config.host.clone(),
        port: config.port,
        database: config.database.clone(),
        user: config.user.clone(),
        password,
        tls,
        connect_timeout: Duration::from_secs(config.connect_timeout_seconds),
        statement_timeout: Duration::from_secs(config.statement_timeout_seconds),
    })
}

/// A name for things of the server's that are this pipeline's: as a slot may be named.
fn name_of(parts: &[&str]) -> String {
    const LENGTH_MAX: usize = 63;
    let plain = |letter: char| match letter.to_ascii_lowercase() {
        letter if letter.is_ascii_lowercase() || letter.is_ascii_digit() => letter,
        _ => '_',
    };
    let name = format!("shori_{}", parts.join("_"));
    name.chars().map(plain).take(LENGTH_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_server_are_those_of_pipeline_and_source() {
        assert_eq!(name_of(&["orders-history", "Shop é"]), "shori_orders_history_shop__");
        assert_eq!(name_of(&[&"x".repeat(100)]).len(), 63);
    }
}
