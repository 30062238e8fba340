//! What is derived from captured tables, and the table it is written to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, SchemaRef, TimeUnit};

use crate::position::CaptureId;

/// A projection as configured. Nothing here knows a business table: it is SQL and names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Projection {
    pub name: Arc<str>,
    pub derivation: Derivation,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Derivation {
    Sql(SqlProjection),
    /// The current rows of one table, with `__source_lsn`.
    Latest {
        table: Arc<str>,
    },
    /// All versions of the rows of one table (SCD type 2).
    History(HistoryProjection),
}

/// Rows derived by a query over the current rows of tables.
///
/// The query names tables as they are captured, without a schema; every table has its columns and `__lsn`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SqlProjection {
    /// Where the text stands, for messages.
    pub file: String,
    pub text: String,
    pub tables: Vec<Arc<str>>,
    /// Columns of the result that make its key.
    pub key: Vec<String>,
    pub maintenance: Maintenance,
}

/// How a query's result is kept up to date.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Maintenance {
    /// Computed in full and compared with what stands.
    Recompute,
    /// Computed over the touched entities alone, before and after.
    ByEntity { entity: Entity, measures: Measures },
}

/// What a result row says of its entities.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Measures {
    /// Each result row belongs to one entity (the entity is part of the key, or a result key never spans two): rows
    /// before and after are compared by key.
    PerEntity,
    /// A result row sums over entities: `additive` columns take the difference between after and before. `weight`, a
    /// column of the query, counts base rows; a result row whose weight is zero is gone. It is published only if
    /// `publish_weight`. With columns that are neither key nor additive, touched keys are recomputed in full.
    Additive { additive: Vec<String>, weight: String, publish_weight: bool },
}

/// The thing by which a result is maintained (an order), and how a row of each table leads to the ones it touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entity {
    pub paths: BTreeMap<Arc<str>, EntityPath>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EntityPath {
    /// The row holds the entity in this column.
    Column(String),
    /// The row leads to the rows of `table` whose `their_column` equals its `own_column`, and on from there.
    Through { table: Arc<str>, own_column: String, their_column: String },
}

#[derive(Clone, PartialEq, Eq)]
pub struct HistoryProjection {
    pub table: Arc<str>,
    /// Names of the key columns in the history, in the table's key order. Empty: those of the table, see
    /// [`Projection::with_key_names`].
    pub key: Vec<String>,
    pub tracked: Tracked,
    pub deletes: Deletes,
}

/// The columns, beside the key, that a history has: a commit that leaves all of them as they were makes no version.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Tracked {
    /// Every column; every commit that writes a row makes a version, be it the same.
    #[default]
    All,
    Only(Vec<String>),
    /// Columns that are added to the table later, too.
    AllBut(Vec<String>),
}

/// What a history does when a row is deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Deletes {
    /// Its version ends.
    #[default]
    Close,
    /// One follows that says so, with the values that stood last; it ends when the key comes back.
    Tombstone,
}

impl HistoryProjection {
    pub fn tracks(&self, column: &str) -> bool {
        match &self.tracked {
            Tracked::All => true,
            Tracked::Only(columns) => columns.iter().any(|name| name == column),
            Tracked::AllBut(columns) => columns.iter().all(|name| name != column),
        }
    }

    /// Columns that it names and that `has` does not know.
    pub fn unknown_columns(&self, has: impl Fn(&str) -> bool) -> Vec<&str> {
        let named = match &self.tracked {
            Tracked::All => &[],
            Tracked::Only(columns) | Tracked::AllBut(columns) => columns.as_slice(),
        };
        named.iter().map(String::as_str).filter(|name| !has(name)).collect()
    }
}

/// Part of [`Projection::definition`]: what is as it is by default is left out, so that a history that was made before
/// there was a choice stays the same.
impl fmt::Debug for HistoryProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("HistoryProjection");
        shown.field("table", &self.table).field("key", &self.key);
        if self.tracked != Tracked::default() {
            shown.field("tracked", &self.tracked);
        }
        if self.deletes != Deletes::default() {
            shown.field("deletes", &self.deletes);
        }
        shown.finish()
    }
}

impl Projection {
    /// A history that names no key columns takes the names that the table's have, as a history has them; others stay as
    /// they are. Transforms and stores are given projections that name theirs.
    pub fn with_key_names(&self, key_of: impl Fn(&str) -> Vec<String>) -> Self {
        let mut named = self.clone();
        if let Derivation::History(of) = &mut named.derivation {
            if of.key.is_empty() {
                of.key = key_of(&of.table);
            }
            of.key.iter_mut().for_each(|name| *name = history::published_name(name));
        }
        named
    }

    /// Captured tables that the projection reads.
    pub fn tables(&self) -> Vec<Arc<str>> {
        match &self.derivation {
            Derivation::Sql(sql) => sql.tables.clone(),
            Derivation::Latest { table } => vec![table.clone()],
            Derivation::History(history) => vec![history.table.clone()],
        }
    }

    /// Tells one derivation from another. Where the text of a query stands is no part of it: a pipeline may be moved.
    pub fn definition(&self) -> String {
        let mut derivation = self.derivation.clone();
        if let Derivation::Sql(sql) = &mut derivation {
            sql.file.clear();
        }
        format!("{derivation:?}")
    }

    /// Whether a deletion leaves a version of its own.
    pub fn keeps_tombstones(&self) -> bool {
        matches!(&self.derivation, Derivation::History(history) if history.deletes == Deletes::Tombstone)
    }

    /// Whether an output may go out while an initial snapshot still runs. A query over several half-read tables would
    /// mislead, one table's rows do not.
    pub fn shows_partial_snapshot(&self) -> bool {
        !matches!(self.derivation, Derivation::Sql(_))
    }
}

/// The shape of a projection's table in its target store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetShape {
    /// Unique by key.
    Rows,
    /// Several versions per key; see [`history`].
    Versions,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Names the control rows, and the table.
    pub projection: Arc<str>,
    pub shape: TargetShape,
    pub key: Vec<String>,
    /// What outputs carry. A history's table has the store's own columns besides.
    pub columns: SchemaRef,
    /// What its rows are derived by: see [`Projection::definition`].
    pub definition: String,
    /// See [`Projection::keeps_tombstones`]. A store asks for it when the definition has changed: tombstones of before, which
    /// nothing would end any more, end then.
    pub keeps_tombstones: bool,
    pub captures: Vec<CaptureId>,
}

/// Columns of a history that the engine fills, after key and tracked columns, in this order. The store adds
/// `surrogate_key` in front, and `batch_id, created_at, updated_at` before `__source_lsn`.
pub mod history {
    use super::*;

    /// max(source commit time, the key's previous boundary + 1 us): versions of a key never overlap, whatever the
    /// source's clock did.
    pub const VALID_FROM: &str = "valid_from";
    /// Equals the successor's `valid_from`; null for the current version, which a tombstone is, too.
    pub const VALID_TO: &str = "valid_to";
    pub const IS_CURRENT: &str = "is_current";
    /// What opened the version: INSERT, UPDATE or SNAPSHOT; DELETE where it is a [tombstone](Deletes::Tombstone).
    pub const CDC_OPERATION: &str = "cdc_operation";
    pub const DELETE: &str = "DELETE";
    /// Source commit time as it was.
    pub const CDC_TIMESTAMP: &str = "cdc_timestamp";
    /// The commit that opened the version; unique per key.
    pub const SOURCE_LSN: &str = "__source_lsn";

    pub const SURROGATE_KEY: &str = "surrogate_key";
    pub const BATCH_ID: &str = "batch_id";
    pub const CREATED_AT: &str = "created_at";
    pub const UPDATED_AT: &str = "updated_at";

    /// Name of a function beside the history that gives its rows as they were at a time.
    pub fn as_of_function(projection: &str) -> String {
        format!("{projection}_as_of")
    }

    /// The condition for a version to have been a row at `time`, an expression.
    pub fn as_of_condition(time: &str) -> String {
        format!(
            "{VALID_FROM} <= {time} and ({VALID_TO} is null or {VALID_TO} > {time}) and {CDC_OPERATION} <> '{DELETE}'"
        )
    }

    /// The name under which a history has the table's column `name`: those of its own columns are taken, in any case.
    pub fn published_name(name: &str) -> String {
        let own = [
            VALID_FROM,
            VALID_TO,
            IS_CURRENT,
            CDC_OPERATION,
            CDC_TIMESTAMP,
            SOURCE_LSN,
            SURROGATE_KEY,
            BATCH_ID,
            CREATED_AT,
            UPDATED_AT,
        ];
        if own.contains(&name.to_lowercase().as_str()) { format!("{name}__source") } else { name.to_string() }
    }

    pub fn fields() -> Vec<Field> {
        let time = DataType::Timestamp(TimeUnit::Microsecond, None);
        vec![
            Field::new(VALID_FROM, time.clone(), false),
            Field::new(VALID_TO, time.clone(), true),
            Field::new(IS_CURRENT, DataType::Boolean, false),
            Field::new(CDC_OPERATION, DataType::Utf8, false),
            Field::new(CDC_TIMESTAMP, time, false),
            Field::new(SOURCE_LSN, DataType::Binary, false),
        ]
    }
}

/// The column of a `latest` projection that tells which commit left the row as it is.
pub const SOURCE_LSN: &str = "__source_lsn";

#[cfg(test)]
mod tests {
    use super::*;

    fn history(untracked: &str, deletes: Deletes) -> Projection {
        let tracked = Tracked::AllBut(vec![untracked.into()]);
        let derivation = HistoryProjection { table: "orders".into(), key: vec!["id".into()], tracked, deletes };
        Projection { name: "h".into(), derivation: Derivation::History(derivation) }
    }

    #[test]
    fn a_history_keeps_tombstones_by_its_setting_and_not_by_a_name_in_its_definition() {
        let closing = history("deletes: Tombstone", Deletes::Close);
        assert!(closing.definition().contains("deletes: Tombstone") && !closing.keeps_tombstones());
        assert!(history("note", Deletes::Tombstone).keeps_tombstones());
    }

    /// Stores keep it: another text would make each projection anew, or end its tombstones.
    #[test]
    fn a_definition_is_the_text_that_stores_hold() {
        let head = "History(HistoryProjection { table: \"orders\", key: [\"id\"], tracked: AllBut([\"note\"])";
        assert_eq!(history("note", Deletes::Close).definition(), format!("{head} }})"));
        assert_eq!(history("note", Deletes::Tombstone).definition(), format!("{head}, deletes: Tombstone }})"));
    }
}
