//! Recomputes every projection from the source's tables, and compares.
//!
//! Shares no code with what it verifies: rows come from the source itself, not from the log; projections are computed in
//! full, not by change; values are decoded by DuckDB. Of what Shori keeps, only the checkpoints are taken (what the
//! projections claim to hold), and the change table of the source, to bring its tables to there.
//!
//! Bounded: rows stream through batches into a scratch file that spills; memory does not grow with them.
//!
//! [`serving`] copies what is served, [`source`] what the source holds, [`asof`] makes tables as they stood at a
//! checkpoint, [`compare`] and [`history`] find what is wrong, [`report`] tells it. [`values`] and [`scratch`] serve
//! them.

mod asof;
mod compare;
mod history;
mod postgres_source;
mod report;
mod scratch;
mod serving;
mod source;
mod sqlite_source;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use shori_core::{Error, ErrorKind, Result};

pub use postgres_source::{PostgresPlace, ReadBy};
pub use report::{EXAMPLES_MAX, Finding, FindingKind, ProjectionReport, Report, State};
pub use serving::Serving;

use asof::AsOf;
use scratch::{Scratch, quote_name};
use serving::Checkpoint;
use source::Source;

/// What is verified, in plain words: nothing here depends on the engine.
#[derive(Clone, Debug)]
pub struct VerifyInput {
    pub source: SourceInput,
    pub source_name: String,
    /// The store that tells how capture stands.
    pub staging: String,
    pub tables: Vec<TableInput>,
    pub projections: Vec<ProjectionInput>,
    /// Where rows that do not fit into memory go; the system's folder for temporary files if not given.
    pub scratch_directory: Option<PathBuf>,
    pub memory_limit_mib: u64,
    /// 0 means one per core.
    pub threads: usize,
    /// How long projections that are behind the source are waited for; zero where no pipeline runs. Rows that stay behind
    /// are compared too, where the source still keeps the changes since.
    pub catch_up: Duration,
}

/// What was captured; it is only read.
#[derive(Clone, Debug)]
pub enum SourceInput {
    Sqlite(PathBuf),
    Postgres(Box<PostgresPlace>),
}

/// A captured table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableInput {
    pub name: String,
    /// In key order.
    pub key: Vec<String>,
    pub columns: Vec<ColumnInput>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ColumnInput {
    pub name: String,
    /// As configured: `int64`, `decimal(18,2)`, `timestamp`.
    pub type_name: String,
}

/// A projection, and the table of its name in the serving store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProjectionInput {
    pub name: String,
    pub store: String,
    pub derivation: DerivationInput,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DerivationInput {
    Sql {
        /// For messages.
        file: String,
        text: String,
        tables: Vec<String>,
        key: Vec<String>,
        /// Columns of the query that are not published.
        hidden: Vec<String>,
    },
    Latest {
        table: String,
    },
    History {
        table: String,
        /// Names of the key columns in the history, in the table's key order; empty where they are the table's.
        key: Vec<String>,
        /// Columns of the table that the history does not have: what changes them alone makes no version.
        left_out: Vec<String>,
        /// A deletion is a version, too.
        tombstones: bool,
    },
}

impl ColumnInput {
    pub fn new(name: impl Into<String>, type_name: impl Into<String>) -> Self {
        Self { name: name.into(), type_name: type_name.into() }
    }
}

impl ProjectionInput {
    fn kind(&self) -> &'static str {
        match &self.derivation {
            DerivationInput::Sql { .. } => "sql",
            DerivationInput::Latest { .. } => "latest",
            DerivationInput::History { .. } => "history",
        }
    }

    fn tables(&self) -> Vec<&str> {
        match &self.derivation {
            DerivationInput::Sql { tables, .. } => tables.iter().map(String::as_str).collect(),
            DerivationInput::Latest { table } | DerivationInput::History { table, .. } => vec![table],
        }
    }
}

impl VerifyInput {
    fn table(&self, name: &str) -> Result<&TableInput> {
        self.tables.iter().find(|table| table.name == name).ok_or_else(|| {
            Error::new(ErrorKind::Usage, "verify", format!("table {name}"), "it is not among the captured tables")
        })
    }
}

impl ProjectionReport {
    /// Nothing has been compared yet.
    pub fn of(projection: &ProjectionInput) -> Self {
        Self {
            projection: projection.name.clone(),
            kind: projection.kind(),
            state: State::Compared,
            as_of_change: 0,
            rows_expected: 0,
            rows_found: 0,
            findings: Vec::new(),
            has_failed: false,
            notes: Vec::new(),
        }
    }

    pub fn not(mut self, state: State, why: impl std::fmt::Display) -> Self {
        self.state = state;
        self.notes.push(why.to_string());
        self
    }
}

/// Compares every projection with what the source calls for. One of which that cannot be told is reported as such: it has
/// not been built, or is so far behind that the source's changes since are no longer kept.
pub fn verify(input: &VerifyInput, serving: &mut dyn Serving) -> Result<Report> {
    let scratch = Scratch::open(input)?;
    let mut source = Source::load(input, &scratch)?;
    serving::wait(serving, input, source.head())?;
    let mut loaded = Vec::new();
    for projection in &input.projections {
        loaded.push(load(serving, &scratch, input, projection)?);
    }
    let behind = |table: &str| {
        let checkpoints = loaded.iter().filter_map(|(_, checkpoint)| checkpoint.as_ref());
        checkpoints.filter_map(|checkpoint| checkpoint.get(table)).any(|id| *id < source.head())
    };
    let behind: Vec<_> = input.tables.iter().map(|table| table.name.clone()).filter(|name| behind(name)).collect();
    source.load_changes(input, &scratch, &behind)?;
    let mut asof = AsOf::new(input, &scratch, source.head());
    let mut projections = Vec::new();
    for (projection, (mut report, checkpoint)) in input.projections.iter().zip(loaded) {
        let Some(checkpoint) = checkpoint else {
            projections.push(report);
            continue;
        };
        if checkpoint.values().any(|id| *id < source.head()) {
            report.notes.push(format!("compared as of the source's change {}", report.as_of_change));
        }
        match compare(input, &scratch, &mut source, &mut asof, projection, &checkpoint, &mut report) {
            Ok(()) => report.notes.extend(unseen(input, &report)),
            Err(error) if error.kind() == ErrorKind::Unavailable => report = report.not(State::Behind, error),
            Err(error) if error.kind() == ErrorKind::Projection => report = report.not(State::NotCompared, error),
            Err(error) => return Err(error),
        }
        projections.push(report);
    }
    Ok(Report { projections })
}

/// What may explain a difference that a way of capture is bound to leave.
fn unseen(input: &VerifyInput, report: &ProjectionReport) -> Option<String> {
    let SourceInput::Postgres(place) = &input.source else { return None };
    let ReadBy::Timestamps(_) = &place.read_by else { return None };
    let differs = report.count(FindingKind::Extra) + report.count(FindingKind::Differing) > 0;
    differs.then(|| {
        "its source is captured by timestamp, which sees neither deletions nor updates that do not set the column: \
         shori resnapshot TABLE repairs what they left"
            .to_string()
    })
}

/// Copies what is served of a projection, and begins its report.
fn load(
    serving: &mut dyn Serving,
    scratch: &Scratch,
    input: &VerifyInput,
    projection: &ProjectionInput,
) -> Result<(ProjectionReport, Option<Checkpoint>)> {
    let mut report = ProjectionReport::of(projection);
    serving.choose(&projection.store)?;
    if let Some(error) = serving::failure(serving, projection) {
        report.has_failed = true;
        report.notes.push(format!("it has failed: {error}"));
    }
    for table in serving::standing_still(serving, input, projection)? {
        report.notes.push(format!("the capture of table {table} stands still: its rows are compared as of then"));
    }
    Ok(match serving::load(serving, scratch, projection) {
        Ok(Some(checkpoint)) => {
            report.as_of_change = checkpoint.values().copied().max().unwrap_or(0);
            (report, Some(checkpoint))
        }
        Ok(None) => {
            let why = "it has not been built yet: start the pipeline and let it catch up";
            (report.not(State::NotBuilt, why), None)
        }
        Err(error) if error.kind() == ErrorKind::Unavailable => (report.not(State::Behind, error), None),
        Err(error) => return Err(error),
    })
}

fn compare(
    input: &VerifyInput,
    scratch: &Scratch,
    source: &mut Source,
    asof: &mut AsOf<'_>,
    projection: &ProjectionInput,
    checkpoint: &Checkpoint,
    report: &mut ProjectionReport,
) -> Result<()> {
    source.must_reach(checkpoint)?;
    let schema = asof.schema(checkpoint)?;
    if !uncarried(scratch, &schema, input, projection, source, report)? {
        return Ok(());
    }
    match &projection.derivation {
        DerivationInput::Sql { file, text, key, hidden, .. } => {
            compare::sql(scratch, &schema, file, text, key, hidden, report)
        }
        DerivationInput::Latest { table } => compare::latest(scratch, &schema, input.table(table)?, report),
        DerivationInput::History { table, key, left_out, tombstones } => {
            let table = input.table(table)?;
            let key = if key.is_empty() { &table.key } else { key };
            let of = history::Of { table, key, left_out, tombstones: *tombstones };
            history::check(scratch, &schema, &of, source, report)
        }
    }
}

/// Tells of rows that cannot be carried, and puts aside those of which nothing is known. Returns whether the rest can be
/// compared: not where rows are added up of which some are not known.
fn uncarried(
    scratch: &Scratch,
    schema: &str,
    input: &VerifyInput,
    projection: &ProjectionInput,
    source: &Source,
    report: &mut ProjectionReport,
) -> Result<bool> {
    for name in projection.tables() {
        let misfits = source.misfits(name);
        if misfits == 0 {
            continue;
        }
        report.notes.push(format!(
            "{misfits} rows of table {name} cannot be carried and are left out; see ctl_rejected_changes"
        ));
        let unknown = format!("{schema}.{}", quote_name(&asof::unknown(name)));
        let count = scratch.number(&format!("select count(*) from {unknown}"))?;
        if count == 0 || !source.is_pruned(name) {
            continue;
        }
        let table = input.table(name)?;
        let key = match &projection.derivation {
            DerivationInput::Sql { .. } => {
                report.notes.push(format!("not compared: how {count} of them were carried last is no longer kept"));
                return Ok(false);
            }
            DerivationInput::History { key, .. } if !key.is_empty() => key,
            _ => &table.key,
        };
        let pairs = key.iter().zip(&table.key).map(|(found, own)| (found.as_str(), own.as_str()));
        scratch.execute(&format!(
            "delete from found.{} as f where exists (from {unknown} as u where {})",
            quote_name(&projection.name),
            compare::same(pairs, "f", "u")
        ))?;
    }
    Ok(true)
}
