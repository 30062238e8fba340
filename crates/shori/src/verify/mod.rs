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
mod report;
mod scratch;
mod serving;
mod source;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use shori_core::{Error, ErrorKind, Result};

pub use report::{EXAMPLES_MAX, Finding, FindingKind, ProjectionReport, Report};
pub use serving::Serving;

use asof::AsOf;
use scratch::{Scratch, quote_name};
use source::Source;

/// What is verified, in plain words: nothing here depends on the engine.
#[derive(Clone, Debug)]
pub struct VerifyInput {
    /// The captured SQLite file; it is only read.
    pub source: PathBuf,
    pub tables: Vec<TableInput>,
    pub projections: Vec<ProjectionInput>,
    /// Where rows that do not fit into memory go; the system's folder for temporary files if not given.
    pub scratch_directory: Option<PathBuf>,
    pub memory_limit_mib: u64,
    /// 0 means one per core.
    pub threads: usize,
    /// How long a projection that is behind the source is waited for; zero where no pipeline runs. Rows that stay behind
    /// are compared too, where the source still keeps the changes since.
    pub catch_up: Duration,
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
    pub derivation: DerivationInput,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DerivationInput {
    Sql {
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

/// Compares every projection with what the source calls for. Fails where that cannot be told: when a projection has not
/// been built, or is so far behind that the source's changes since are no longer kept.
pub fn verify(input: &VerifyInput, serving: &mut dyn Serving) -> Result<Report> {
    let scratch = Scratch::open(input)?;
    let mut source = Source::load(input, &scratch)?;
    let mut checkpoints = Vec::new();
    for projection in &input.projections {
        serving::wait(serving, projection, source.head, input.catch_up)?;
        checkpoints.push(serving::load(serving, &scratch, projection)?);
    }
    source.load_changes(input, &scratch, &checkpoints)?;
    let mut asof = AsOf::new(input, &scratch, source.head);
    let mut projections = Vec::new();
    for (projection, checkpoint) in input.projections.iter().zip(&checkpoints) {
        let schema = asof.schema(checkpoint)?;
        let mut report = ProjectionReport {
            projection: projection.name.clone(),
            kind: projection.kind(),
            as_of_change: checkpoint.values().copied().max().unwrap_or(0),
            rows_expected: 0,
            rows_found: 0,
            findings: Vec::new(),
            notes: Vec::new(),
        };
        let compared = uncarried(&scratch, &schema, input, projection, &source, &mut report)?;
        match &projection.derivation {
            _ if !compared => {}
            DerivationInput::Sql { text, key, hidden, .. } => {
                compare::sql(&scratch, &schema, text, key, hidden, &mut report)?;
            }
            DerivationInput::Latest { table } => {
                compare::latest(&scratch, &schema, input.table(table)?, &mut report)?;
            }
            DerivationInput::History { table, key } => {
                let table = input.table(table)?;
                let key = if key.is_empty() { &table.key } else { key };
                history::check(&scratch, &schema, table, key, &mut source, &mut report)?;
            }
        }
        projections.push(report);
    }
    Ok(Report { projections })
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
