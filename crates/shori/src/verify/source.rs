//! What the source holds, read from the source itself, whichever kind it is.

use shori_core::{Error, ErrorKind, Result};

use super::postgres_source::PostgresSource;
use super::scratch::{Scratch, quote_name};
use super::serving::Checkpoint;
use super::sqlite_source::SqliteSource;
use super::{SourceInput, TableInput, VerifyInput};

pub(super) enum Source {
    Sqlite(SqliteSource),
    Postgres(Box<PostgresSource>),
}

/// Row images that were committed up to a checkpoint, as the writer counted them.
pub(super) struct Images {
    /// Those that leave a row: each opens a version.
    pub opening: u64,
    /// Those that take a row away.
    pub ending: u64,
    /// Rows that lived when capture began.
    pub before_capture: u64,
    /// Change rows that the writer did not count.
    pub by_others: u64,
}

impl Source {
    /// Copies every table that a projection reads to `base`.
    pub(super) fn load(input: &VerifyInput, scratch: &Scratch) -> Result<Self> {
        Ok(match &input.source {
            SourceInput::Sqlite(path) => Self::Sqlite(SqliteSource::load(path, input, scratch)?),
            SourceInput::Postgres(place) => Self::Postgres(Box::new(PostgresSource::load(place, input, scratch)?)),
        })
    }

    /// The newest change when the tables were read.
    pub(super) fn head(&self) -> u64 {
        match self {
            Self::Sqlite(source) => source.head,
            Self::Postgres(source) => source.head,
        }
    }

    /// Copies changes of every table to `touched`; a projection shows an earlier state of those named `behind`.
    pub(super) fn load_changes(&mut self, input: &VerifyInput, scratch: &Scratch, behind: &[String]) -> Result<()> {
        match self {
            Self::Sqlite(source) => source.load_changes(input, scratch, behind),
            Self::Postgres(source) => source.look_again(input, scratch),
        }
    }

    /// Fails when changes between a checkpoint and the copies are not known.
    pub(super) fn must_reach(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        match self {
            Self::Sqlite(source) => source.must_reach(checkpoint),
            Self::Postgres(source) => source.must_reach(checkpoint),
        }
    }

    /// Rows of a table that cannot be carried.
    pub(super) fn misfits(&self, table: &str) -> u64 {
        match self {
            Self::Sqlite(source) => source.misfits(table),
            Self::Postgres(source) => source.misfits(table),
        }
    }

    /// Whether changes of a table are not known any more.
    pub(super) fn is_pruned(&self, table: &str) -> bool {
        match self {
            Self::Sqlite(source) => source.is_pruned(table),
            Self::Postgres(_) => true,
        }
    }

    /// What the source's writer counted of `table` up to change `id`, or why it says nothing.
    pub(super) fn images(&mut self, table: &str, id: u64) -> Result<std::result::Result<Images, String>> {
        match self {
            Self::Sqlite(source) => source.images(table, id),
            Self::Postgres(_) => Ok(Err("the source has no ledger of its writer".into())),
        }
    }
}

/// The changes that would tell how a table stood are gone.
pub(super) fn catch_up_first(table: &str) -> Error {
    let cause = "a projection is behind its rows, and the changes between are no longer kept";
    Error::new(ErrorKind::Unavailable, "verify", format!("table {table}"), cause)
        .with_remedy("let the pipeline catch up first, and verify then")
}

pub(super) fn used_tables(input: &VerifyInput) -> Result<Vec<&TableInput>> {
    let mut used = std::collections::BTreeMap::new();
    for projection in &input.projections {
        for name in projection.tables() {
            used.insert(name, input.table(name)?);
        }
    }
    Ok(used.into_values().collect())
}

/// Tables of changes, of which there are none.
pub(super) fn no_changes(scratch: &Scratch, table: &TableInput) -> Result<()> {
    let name = quote_name(&table.name);
    let head = "select 0::bigint as change_id, 0::bigint as change_op";
    scratch.execute(&format!(
        "create table touched.{name} as {head}, *, false as {whole} from base.{name} limit 0;
        create table before.{name} as {head}, * from base.{name} limit 0;",
        whole = super::values::WHOLE
    ))
}
