//! `shori status`

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use arrow::array::{Array, AsArray, RecordBatch};
use clap::Args;
use serde::Serialize;
use shori_core::pipeline::now;
use shori_core::{ErrorKind, Result};

use super::Which;
use super::reach::Reach;
use crate::config::{Loaded, StoreKind};
use crate::systems::{Backlog, System};

/// How far every capture and projection has come.
///
/// Backlog is counted in the source's own change table, so a capture that stands still shows.
#[derive(Args)]
#[command(after_help = "Examples:\n  shori status --dir demo --watch\n  shori status -c shori.toml --json")]
pub struct Status {
    #[command(flatten)]
    pub(super) which: Which,
    /// Repeat every second until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
pub struct PipelineStatus {
    pub pipeline: String,
    pub running: bool,
    pub captures: Vec<CaptureStatus>,
    pub projections: Vec<ProjectionStatus>,
}

#[derive(Debug, Serialize)]
pub struct CaptureStatus {
    pub source: String,
    pub capture: String,
    /// Hexadecimal; null before the first change.
    pub last_ingested_lsn: Option<String>,
    /// Changes in the source's log above the watermark, over all tables; null if the source cannot be read.
    pub changes_waiting: Option<u64>,
    /// Bytes of the source's own log that are not in the log yet, changes of other tables among them: of sources that
    /// cannot count changes.
    pub log_bytes_waiting: Option<u64>,
    /// Row images that did not fit their column's type, and are in no projection.
    pub rejected: u64,
    pub failed: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ProjectionStatus {
    pub projection: String,
    pub status: String,
    pub as_of_lsn: Option<String>,
    /// Source commit time, UTC.
    pub as_of_time: Option<String>,
    /// Seconds from then to now; on an idle source this grows although nothing is missing.
    pub age_seconds: Option<f64>,
    pub last_error: Option<String>,
}

impl Status {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        loop {
            let status = read(&loaded)?;
            if self.json {
                super::print_json(&status)?;
            } else {
                // Clears the terminal and goes to its top left.
                let clear = if self.watch && std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
                super::print(format_args!("{clear}{}", shown(&status)))?;
            }
            if !self.watch {
                let failed = status.captures.iter().any(|capture| capture.failed.is_some())
                    || status.projections.iter().any(|projection| projection.status == "ERROR");
                return Ok(ExitCode::from(u8::from(failed)));
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn captures_query(kind: StoreKind) -> String {
    format!(
        "
select
    source_name,
    capture_instance,
    {},
    failed_reason,
    (
        select cast(count(*) as varchar)
        from ctl_rejected_changes as rejected
        where rejected.source_name = marks.source_name
            and rejected.capture_instance = marks.capture_instance
    )
from ctl_ingestion_watermarks as marks
order by source_name, capture_instance",
        kind.hex("last_ingested_lsn")
    )
}

fn projections_query(kind: StoreKind) -> String {
    format!(
        "
select
    projection_name,
    status,
    {},
    {},
    {},
    last_error
from ctl_projection_metadata
order by projection_name",
        kind.hex("as_of_lsn"),
        kind.iso_time("as_of_time"),
        kind.micros("as_of_time")
    )
}

pub fn read(loaded: &Loaded) -> Result<PipelineStatus> {
    let reach = Reach::to_look(loaded)?;
    reach.must_have_run(loaded)?;
    let mut captures = Vec::new();
    let mut asked = BTreeMap::new();
    for row in rows(&reach.query(loaded, None, &captures_query(loaded.staging()?.kind))?) {
        let [source, capture, lsn, failed, rejected] = take(row);
        // Captures of one source stand at one place, as a rule.
        let place = (source.clone().unwrap_or_default(), lsn.clone().unwrap_or_default());
        let waits = asked.entry(place).or_insert_with_key(|(source, lsn)| waiting(loaded, source, lsn));
        let (changes_waiting, log_bytes_waiting, unreadable) = waits.clone();
        captures.push(CaptureStatus {
            changes_waiting,
            log_bytes_waiting,
            source: source.unwrap_or_default(),
            capture: capture.unwrap_or_default(),
            last_ingested_lsn: lsn.filter(|lsn| !lsn.is_empty()),
            rejected: rejected.and_then(|count| count.parse().ok()).unwrap_or(0),
            failed: failed.or(unreadable),
        });
    }
    captures.extend(never_captured(loaded, &captures));
    let mut projections = Vec::new();
    for store in &loaded.config.stores {
        if !reach.has_run(loaded, &store.name)? {
            continue;
        }
        for row in rows(&reach.query(loaded, Some(&store.name), &projections_query(store.kind))?) {
            projections.extend(projection(loaded, &store.name, row));
        }
    }
    projections.sort_by(|one, other| one.projection.cmp(&other.projection));
    let pipeline = loaded.config.pipeline.name.clone();
    Ok(PipelineStatus { pipeline, running: reach.is_running(), captures, projections })
}

/// Tables that the configuration names, and the store knows nothing of.
fn never_captured(loaded: &Loaded, known: &[CaptureStatus]) -> Vec<CaptureStatus> {
    let tables =
        loaded.config.sources.iter().flat_map(|source| source.tables.keys().map(|table| (&source.name, table)));
    let is_known = |source: &str, table: &str| {
        known.iter().any(|capture| capture.source == source && capture.capture.eq_ignore_ascii_case(table))
    };
    tables
        .filter(|(source, table)| !is_known(source, table))
        .map(|(source, table)| CaptureStatus {
            source: source.clone(),
            capture: table.clone(),
            last_ingested_lsn: None,
            changes_waiting: None,
            log_bytes_waiting: None,
            rejected: 0,
            failed: Some("it has never been captured: shori check tells why, or start the pipeline again".into()),
        })
        .collect()
}

/// What a store says of a projection. One that was taken out of the configuration, or given another store, leaves rows
/// behind that say nothing about the pipeline.
fn projection(loaded: &Loaded, store: &str, row: Vec<Option<String>>) -> Option<ProjectionStatus> {
    let [name, status, as_of_lsn, as_of_time, micros, last_error] = take(row);
    let name = name.unwrap_or_default();
    let configured = loaded.config.projections.iter().find(|projection| projection.name == name)?;
    if super::reach::target(loaded, configured).ok()? != store {
        return None;
    }
    // Nothing has been built as of the beginning of time.
    let micros = micros.and_then(|text| text.parse::<i64>().ok()).filter(|micros| *micros > 0);
    Some(ProjectionStatus {
        projection: name,
        status: if configured.enabled { status.unwrap_or_default() } else { "OFF".into() },
        as_of_lsn: as_of_lsn.filter(|lsn| !lsn.is_empty()),
        as_of_time: as_of_time.filter(|_| micros.is_some()),
        age_seconds: micros.map(|micros| (now() - micros) as f64 / 1e6),
        last_error: last_error.filter(|_| configured.enabled),
    })
}

/// The backlog in changes, or in bytes; or why nothing can be read. A source that is only busy is one that goes on.
fn waiting(loaded: &Loaded, source: &str, lsn: &str) -> (Option<u64>, Option<u64>, Option<String>) {
    let Some(configured) = loaded.config.sources.iter().find(|configured| configured.name == source) else {
        return (None, None, None);
    };
    let system = System::of(loaded, configured);
    let backlog = system.and_then(|system| super::block_on(async { system.backlog(lsn).await }));
    match backlog {
        Ok(Some(Backlog::Changes(count))) => (Some(count), None, None),
        Ok(Some(Backlog::LogBytes(bytes))) => (None, Some(bytes), None),
        Ok(None) => (None, None, None),
        Err(error) if error.kind() == ErrorKind::Unavailable => {
            tracing::warn!(%error, "the source's backlog is not known");
            (None, None, None)
        }
        Err(error) => (None, None, Some(error.to_string())),
    }
}

/// Rows of text columns.
pub fn rows(batches: &[RecordBatch]) -> Vec<Vec<Option<String>>> {
    let text = |batch: &RecordBatch, column: usize, row: usize| {
        let array = batch.column(column).as_string_opt::<i32>()?;
        array.is_valid(row).then(|| array.value(row).to_string())
    };
    let row = |batch: &RecordBatch, row| (0..batch.num_columns()).map(|column| text(batch, column, row)).collect();
    batches.iter().flat_map(|batch| (0..batch.num_rows()).map(move |index| row(batch, index))).collect()
}

fn take<const N: usize>(row: Vec<Option<String>>) -> [Option<String>; N] {
    let mut row = row.into_iter();
    std::array::from_fn(|_| row.next().flatten())
}

fn shown(status: &PipelineStatus) -> String {
    let mut lines = Vec::new();
    lines.push(format!(
        "pipeline {} {}",
        status.pipeline,
        if status.running { "is running" } else { "is not running" }
    ));
    lines.push(format!("\n{:<32} {:>18} {:>12}", "capture", "ingested lsn", "waiting"));
    for capture in &status.captures {
        let name = format!("{}/{}", capture.source, capture.capture);
        let waiting = match (capture.changes_waiting, capture.log_bytes_waiting) {
            (Some(count), _) => count.to_string(),
            (None, Some(bytes)) => format!("{:.1} MB", bytes as f64 / 1e6),
            (None, None) => "?".into(),
        };
        lines.push(format!("{name:<32} {:>18} {waiting:>12}", capture.last_ingested_lsn.as_deref().unwrap_or("-")));
        if let Some(failed) = &capture.failed {
            lines.push(format!("  stands still: {failed}"));
        }
        if capture.rejected > 0 {
            lines.push(format!("  rejected: {} rows, see ctl_rejected_changes", capture.rejected));
        }
    }
    lines.push(format!("\n{:<40} {:<6} {:<28} {:>10}", "projection", "status", "as of", "age s"));
    for projection in &status.projections {
        let age = projection.age_seconds.map_or("-".to_string(), |age| format!("{age:.1}"));
        let as_of = projection.as_of_time.as_deref().unwrap_or("-");
        lines.push(format!("{:<40} {:<6} {as_of:<28} {age:>10}", projection.projection, projection.status));
        if let Some(error) = &projection.last_error {
            lines.push(format!("  {error}"));
        }
    }
    lines.join("\n") + "\n"
}
