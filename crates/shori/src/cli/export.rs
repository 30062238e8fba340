//! `shori export`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use shori_core::error::Response;
use shori_core::position::Position;
use shori_core::{Error, ErrorKind, Result};
use shori_files::{FILE_CHANGES_MAX, LogFolder, Origin, Range, TableLog};
use tokio_util::sync::CancellationToken;

use super::Which;
use super::reach::Reach;
use super::status::rows;
use crate::config::{Loaded, SourceConfig};
use crate::control::logged::LoggedCapture;

/// Write the log as change logs: files of JSON lines, a folder a table.
///
/// Goes on where the files end, so that every change is written once, however often and whenever it is killed. A source
/// of kind "files" reads them. The log must still have what follows: export at least as often as retention brings it down.
#[derive(Args, Clone)]
#[command(
    after_help = "Examples:\n  shori export -c shori.toml\n  shori export --dir demo --to /backup/cdc_logs --follow"
)]
pub struct Export {
    #[command(flatten)]
    pub(super) which: Which,
    /// The folder; data/cdc_logs beside the configuration if not given
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// The source whose tables are written, where there are several: each needs a folder of its own
    #[arg(long)]
    source: Option<String>,
    /// Write this table alone; may be repeated
    #[arg(long, value_name = "TABLE")]
    table: Vec<String>,
    /// Go on until interrupted
    #[arg(short, long)]
    follow: bool,
    /// Seconds from one look at the log to the next
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    every: u64,
    /// Most changes of one file
    #[arg(long, value_name = "CHANGES", default_value_t = FILE_CHANGES_MAX, value_parser = clap::value_parser!(u64).range(1..))]
    file_changes: u64,
    /// Print what was written as one line of JSON
    #[arg(long, conflicts_with = "follow")]
    json: bool,
}

const DEFAULT_FOLDER: &str = "data/cdc_logs";
/// How often a log that is compacted while it is read is read again.
const ATTEMPTS: usize = 3;

#[derive(Debug, Serialize)]
struct Exported {
    source: String,
    folder: String,
    tables: Vec<ExportedTable>,
}

#[derive(Debug, Serialize)]
struct ExportedTable {
    table: String,
    changes: u64,
    /// Hexadecimal.
    up_to_lsn: String,
    up_to_seq: String,
}

impl Export {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        if self.follow {
            return super::block_on(self.keep_on(loaded)).map(|()| ExitCode::SUCCESS);
        }
        let exported = self.round(&loaded)?;
        if self.json {
            super::print_json(&exported)?;
        } else {
            for table in &exported.tables {
                super::print(format_args!("{}: {} changes\n", table.table, table.changes))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Rounds until a signal; the one in hand is finished. What may pass is waited for.
    async fn keep_on(self, loaded: Loaded) -> Result<()> {
        let stop = CancellationToken::new();
        super::signals::cancel_on_signal(stop.clone())?;
        while !stop.is_cancelled() {
            let (export, of) = (self.clone(), loaded.clone());
            let round = tokio::task::spawn_blocking(move || export.round(&of)).await;
            match round.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "an export", cause))? {
                Ok(exported) => {
                    let changes: u64 = exported.tables.iter().map(|table| table.changes).sum();
                    tracing::info!(changes, folder = exported.folder, "exported");
                }
                Err(error) if error.response() == Response::Retry || error.kind() == ErrorKind::InUse => {
                    tracing::warn!(%error, "trying again");
                }
                Err(error) => return Err(error),
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(Duration::from_secs(self.every)) => {}
            }
        }
        Ok(())
    }

    fn round(&self, loaded: &Loaded) -> Result<Exported> {
        let source = self.source(loaded)?;
        let folder = match &self.to {
            Some(folder) => folder.clone(),
            None => loaded.resolve(Path::new(DEFAULT_FOLDER)),
        };
        let reach = Reach::to_look(loaded)?;
        reach.must_have_run(loaded)?;
        let store = rows(&reach.query(loaded, None, "select store_id from ctl_store")?);
        let store = store.into_iter().flatten().flatten().next().unwrap_or_default();
        let log = LogFolder::open(&folder, Origin { store, source: source.name.clone() })?;
        let log = log.with_changes_per_file(self.file_changes);
        for _ in 0..ATTEMPTS {
            if let Some(tables) = self.write(loaded, source, &reach, &log)? {
                return Ok(Exported { source: source.name.clone(), folder: folder.display().to_string(), tables });
            }
        }
        let object = format!("the log of source {}", source.name);
        Err(Error::new(ErrorKind::Unavailable, "export", object, "it is compacted each time while it is read")
            .with_remedy("try again"))
    }

    /// The one that is meant. Names of tables must be among its own.
    fn source<'a>(&self, loaded: &'a Loaded) -> Result<&'a SourceConfig> {
        let sources = &loaded.config.sources;
        let found = match &self.source {
            Some(name) => sources.iter().find(|source| source.name == *name),
            None if sources.len() == 1 => sources.first(),
            None => {
                let names: Vec<&str> = sources.iter().map(|source| source.name.as_str()).collect();
                let cause = "there are several, and a folder holds the tables of one";
                return Err(loaded
                    .wrong("a source", cause)
                    .with_remedy(format!("name one with --source: {}", names.join(", "))));
            }
        };
        let name = self.source.as_deref().unwrap_or_default();
        let source = found.ok_or_else(|| loaded.wrong(&format!("source {name}"), "there is none of that name"))?;
        match self.table.iter().find(|table| !source.tables.contains_key(*table)) {
            Some(table) => Err(loaded.wrong(&format!("table {table}"), &format!("source {} has none", source.name))),
            None => Ok(source),
        }
    }

    fn is_meant(&self, source: &SourceConfig, capture: &LoggedCapture) -> bool {
        let name = &*capture.id.instance;
        *capture.id.source == *source.name
            && source.tables.contains_key(name)
            && (self.table.is_empty() || self.table.iter().any(|table| table == name))
    }

    /// One round; `None` when the log was compacted meanwhile.
    fn write(
        &self,
        loaded: &Loaded,
        source: &SourceConfig,
        reach: &Reach,
        log: &LogFolder,
    ) -> Result<Option<Vec<ExportedTable>>> {
        let mut captures = reach.captures(loaded)?;
        captures.retain(|capture| self.is_meant(source, capture));
        let tables: Vec<TableLog> = captures.iter().map(|capture| log.table(&capture.id)).collect::<Result<_>>()?;
        let mut ranges = Vec::new();
        for (capture, table) in captures.iter().zip(&tables) {
            must_still_follow(capture, table)?;
            if let Some(reason) = &capture.failed {
                tracing::warn!(table = %capture.id.instance, reason, "it stands still, and its files end there");
            }
            if capture.boundary.boundary > table.end() {
                ranges.push((capture, write_range(loaded, reach, capture, table)?));
            }
        }
        for now in reach.captures(loaded)? {
            let Some((then, table)) = captures.iter().zip(&tables).find(|(then, _)| then.id == now.id) else {
                continue;
            };
            if now.horizon != then.horizon && (table.is_new() || now.horizon > table.end()) {
                return Ok(None);
            }
        }
        publish(&captures, ranges).map(Some)
    }
}

/// A log that was brought down to the last change of each key no longer has all that follows.
fn must_still_follow(capture: &LoggedCapture, table: &TableLog) -> Result<()> {
    if table.end() == Position::ZERO || capture.horizon <= table.end() {
        return Ok(());
    }
    let object = format!("table {}", capture.id.instance);
    let cause = format!(
        "its files end at {}, and the log has been compacted up to {} since: what is between is not whole any more",
        table.end(),
        capture.horizon
    );
    Err(Error::new(ErrorKind::Gap, "go on with the change log of", object, cause).with_remedy(
        "export to another folder, which begins with the rows as they stood then; and export more often than retention.keep_hours",
    ))
}

fn write_range<'a>(loaded: &Loaded, reach: &Reach, capture: &LoggedCapture, table: &'a TableLog) -> Result<Range<'a>> {
    let mut writer = table.write(capture.horizon, &capture.snapshots);
    let between = (&table.end(), &capture.boundary.boundary);
    reach.log(loaded, &capture.id, between, &mut |batch| writer.push(&batch))?;
    writer.finish(&capture.boundary, &capture.schema)
}

/// Tables without changes tell how far the log has come, where another has some.
fn publish(captures: &[LoggedCapture], ranges: Vec<(&LoggedCapture, Range<'_>)>) -> Result<Vec<ExportedTable>> {
    let has_news = ranges.iter().any(|(_, range)| range.has_news());
    let mut written: Vec<ExportedTable> = captures
        .iter()
        .map(|capture| ExportedTable {
            table: capture.id.instance.to_string(),
            changes: 0,
            up_to_lsn: capture.boundary.boundary.lsn.to_string(),
            up_to_seq: capture.boundary.boundary.seq.to_string(),
        })
        .collect();
    for (capture, range) in ranges {
        if !has_news {
            range.discard()?;
            continue;
        }
        let changes = range.publish()?;
        if let Some(table) = written.iter_mut().find(|table| *table.table == *capture.id.instance) {
            table.changes = changes;
        }
    }
    Ok(written)
}
