//! What was found: for people as a table, for programs as JSON.

use std::fmt;

use serde::Serialize;

/// Keys named per finding at most.
pub const EXAMPLES_MAX: usize = 10;

/// All projections, in the order of the input.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    pub projections: Vec<ProjectionReport>,
}

/// One projection: what was compared, and what is wrong. Nothing is wrong where it was compared
/// and `findings` is empty.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ProjectionReport {
    pub projection: String,
    /// `sql`, `latest` or `history`.
    pub kind: &'static str,
    pub state: State,
    /// The newest change of the source that the projection holds, by id.
    pub as_of_change: u64,
    /// Rows that the source calls for; for a history, those that are current.
    pub rows_expected: u64,
    /// Rows that the projection has; for a history, versions.
    pub rows_found: u64,
    pub findings: Vec<Finding>,
    /// It has failed since, and is not kept up to date any more.
    pub has_failed: bool,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Whether a projection was compared; where it was not, a note tells why.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Compared,
    /// It has no rows yet.
    NotBuilt,
    /// The source no longer keeps what tells how it stood then.
    Behind,
    /// What the source calls for cannot be told.
    NotCompared,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Finding {
    pub kind: FindingKind,
    pub count: u64,
    /// The first keys, at most [`EXAMPLES_MAX`].
    pub examples: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A column is missing or has another type.
    Columns,
    /// A row that the source calls for is not there: it was lost. For a history: a live key has no current version.
    Missing,
    /// A row is there that the source does not call for. For a history: a dead key has a current version.
    Extra,
    /// A key is there more than once. For a history: a key has several current versions.
    Duplicated,
    /// A row has other values than the source calls for.
    Differing,
    /// `is_current` and an open `valid_to` disagree.
    CurrentFlag,
    /// A version ends at or before its beginning.
    Backwards,
    /// Two versions of a key hold at one time.
    Overlap,
    /// A time between two versions of a key, though the later one continues the earlier one.
    Gap,
    /// There are other numbers of versions than committed row images.
    VersionCount,
    /// There are other numbers of ended rows than committed deletions.
    DeletionCount,
}

impl FindingKind {
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::Columns => "columns",
            FindingKind::Missing => "missing",
            FindingKind::Extra => "extra",
            FindingKind::Duplicated => "duplicated",
            FindingKind::Differing => "differing",
            FindingKind::CurrentFlag => "current flag",
            FindingKind::Backwards => "backwards",
            FindingKind::Overlap => "overlap",
            FindingKind::Gap => "gap",
            FindingKind::VersionCount => "version count",
            FindingKind::DeletionCount => "deletion count",
        }
    }
}

impl Report {
    /// Whether every projection is what the source calls for.
    pub fn ok(&self) -> bool {
        self.projections.iter().all(ProjectionReport::ok)
    }
}

impl ProjectionReport {
    pub fn ok(&self) -> bool {
        self.state == State::Compared && self.findings.is_empty() && !self.has_failed
    }

    fn result(&self) -> &'static str {
        match self.state {
            State::Compared if self.ok() => "ok",
            State::Compared if self.findings.is_empty() => "FAILED",
            State::Compared => "WRONG",
            State::NotBuilt => "NOT BUILT",
            State::Behind => "BEHIND",
            State::NotCompared => "NOT COMPARED",
        }
    }

    pub fn finding(&self, kind: FindingKind) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }

    /// Rows affected by findings of `kind`.
    pub fn count(&self, kind: FindingKind) -> u64 {
        self.finding(kind).map_or(0, |finding| finding.count)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.projections.iter().map(|projection| projection.projection.len()).max().unwrap_or(0).max(10);
        writeln!(
            f,
            "{:<width$}  {:<7}  {:>12}  {:>12}  {:>9}  {:>9}  {:>10}  {:>9}  {:>9}  result",
            "projection", "kind", "expected", "found", "missing", "extra", "duplicated", "differing", "other"
        )?;
        use FindingKind::{Differing, Duplicated, Extra, Missing};
        for projection in &self.projections {
            let shown = [Missing, Extra, Duplicated, Differing];
            let other: u64 =
                projection.findings.iter().filter(|finding| !shown.contains(&finding.kind)).map(|one| one.count).sum();
            writeln!(
                f,
                "{:<width$}  {:<7}  {:>12}  {:>12}  {:>9}  {:>9}  {:>10}  {:>9}  {:>9}  {}",
                projection.projection,
                projection.kind,
                projection.rows_expected,
                projection.rows_found,
                projection.count(Missing),
                projection.count(Extra),
                projection.count(Duplicated),
                projection.count(Differing),
                other,
                projection.result()
            )?;
        }
        for projection in &self.projections {
            for finding in &projection.findings {
                writeln!(f, "{}: {} {}", projection.projection, finding.count, finding.kind.name())?;
                for example in &finding.examples {
                    writeln!(f, "  {example}")?;
                }
                if finding.count > finding.examples.len() as u64 && !finding.examples.is_empty() {
                    writeln!(f, "  ...")?;
                }
            }
            for note in &projection.notes {
                writeln!(f, "{}: note: {note}", projection.projection)?;
            }
        }
        Ok(())
    }
}
