//! What a store file holds. Permanent: files of released versions are opened by later ones, so a column may be added
//! here (with a higher [`LAYOUT_VERSION`] and a step that adds it), but none may change its name, type or meaning.
//!
//! Columns that people know come first, what else is needed after them. Positions are two blobs that sort as bytes;
//! times are UTC. A staging table is named by its control row (`staging_table`), and so are its columns
//! (`staging_columns`: the source's names in the order in which they came to the table; bit `i` of
//! `unchanged_columns` stands for entry `i` of that list).

use arrow::datatypes::{DataType, Field};
use shori_core::Result;
use shori_core::projection::history;

use crate::database::quote_name;
use crate::types::duckdb_type;

/// Goes up when a file written from here on cannot be understood by older versions.
pub(super) const LAYOUT_VERSION: i64 = 2;
/// What a file without layered targets has: versions that do not know them understand it.
pub(super) const PLAIN_LAYOUT_VERSION: i64 = 1;

pub(super) const CREATE_STORE_TABLE: &str = "
create table if not exists ctl_store (
    only_row boolean primary key,
    store_id varchar not null,
    layout_version bigint not null,
    created_at timestamp not null
)";

pub(super) const CREATE_CONTROL_TABLES: &str = "
create table if not exists ctl_ingestion_watermarks (
    source_name varchar not null,
    capture_instance varchar not null,
    last_ingested_lsn blob not null,
    updated_at timestamp not null,
    last_seq blob not null,
    boundary_lsn blob not null,
    boundary_seq blob not null,
    boundary_time timestamp not null,
    timeline varchar not null,
    identity varchar not null,
    staging_table varchar not null,
    staging_columns varchar not null,
    table_schema varchar not null,
    schema_forgotten boolean not null,
    failed_reason varchar,
    primary key (source_name, capture_instance)
);
create table if not exists ctl_horizons (
    source_name varchar not null,
    capture_instance varchar not null,
    horizon_lsn blob not null,
    horizon_seq blob not null,
    updated_at timestamp not null,
    primary key (source_name, capture_instance)
);
create table if not exists ctl_snapshots (
    source_name varchar not null,
    capture_instance varchar not null,
    generation bigint not null,
    state varchar not null,
    start_lsn blob not null,
    start_seq blob not null,
    end_lsn blob not null,
    end_seq blob not null,
    end_time timestamp not null,
    row_count bigint not null,
    resume blob not null,
    updated_at timestamp not null,
    primary key (source_name, capture_instance, generation)
);
create table if not exists ctl_rejected_changes (
    source_name varchar not null,
    capture_instance varchar not null,
    lsn blob not null,
    seqval blob not null,
    reason varchar not null,
    raw blob not null,
    rejected_at timestamp not null
);
create table if not exists ctl_projection_checkpoints (
    projection_name varchar not null,
    capture_instance varchar not null,
    last_consumed_lsn blob not null,
    updated_at timestamp not null,
    last_seq blob not null,
    source_name varchar not null,
    instance_name varchar not null,
    primary key (projection_name, capture_instance)
);
create table if not exists ctl_projection_metadata (
    projection_name varchar primary key,
    as_of_lsn blob,
    as_of_time timestamp,
    built_at timestamp,
    status varchar not null,
    last_error varchar,
    run_id varchar,
    next_surrogate_key bigint not null,
    target_shape varchar not null,
    target_key varchar not null
);
alter table ctl_projection_metadata add column if not exists definition varchar;
alter table ctl_projection_metadata add column if not exists active_layer varchar;
create table if not exists ctl_checkpoints (
    marked_at timestamp not null
);
create table if not exists pipeline_metadata (
    pipeline_name varchar not null,
    run_id varchar not null,
    start_time timestamp not null,
    end_time timestamp,
    status varchar not null,
    records_processed bigint not null,
    records_successful bigint not null,
    records_failed bigint not null,
    error_message varchar,
    performance_metrics varchar not null,
    primary key (pipeline_name, run_id)
)";

/// Columns of a staging table that are not the source's, in lower case: three before the source's, the rest after.
pub(super) const STAGING_HEAD: [&str; 3] = ["lsn", "seqval", "op"];
pub(super) const STAGING_TAIL: [&str; 4] = ["ingested_at", "commit_time", "unchanged_columns", "boundary_time"];

/// The column of a staging table that holds the source's column `name`. DuckDB's names are the same in any case.
pub(super) fn staging_column(name: &str) -> String {
    let lower = name.to_lowercase();
    let taken = STAGING_HEAD.iter().chain(&STAGING_TAIL).any(|reserved| *reserved == lower);
    if taken { format!("{name}__source") } else { name.to_string() }
}

/// The column of a history that holds the carried column `name`: a source's `created_at` is not the store's own.
pub(super) fn history_column(name: &str) -> String {
    let own = [history::SURROGATE_KEY, history::BATCH_ID, history::CREATED_AT, history::UPDATED_AT];
    if own.contains(&name.to_lowercase().as_str()) { format!("{name}__source") } else { name.to_string() }
}

/// `boundary_time` is where the key's history stood with this image, where compaction has found it later than
/// `commit_time`; it continues the chain of history boundaries that the removed images began.
pub(super) fn create_staging_table<'a>(table: &str, fields: impl Iterator<Item = &'a Field>) -> Result<String> {
    let mut columns =
        vec!["lsn blob not null".to_string(), "seqval blob not null".into(), "op utinyint not null".into()];
    for field in fields {
        columns.push(format!("{} {}", quote_name(&staging_column(field.name())), duckdb_type(field.data_type())?));
    }
    columns.push("ingested_at timestamp not null".into());
    columns.push("commit_time timestamp not null".into());
    columns.push("unchanged_columns blob".into());
    columns.push("boundary_time timestamp".into());
    Ok(format!("create table {} ({})", quote_name(table), columns.join(", ")))
}

/// Whether tables of that name are the store's own. Temporary ones are called `ctl_` too: they would hide a target of
/// their name. A target may be called as any alias is, so statements give it one, too, and name its columns by that.
pub fn is_reserved_table(name: &str) -> bool {
    let lower = name.to_lowercase();
    lower.starts_with("ctl_")
        || lower.starts_with("stg_cdc_")
        || lower == "pipeline_metadata"
        || lower.ends_with(BASE)
        || Side::BOTH.iter().any(|side| {
            let ends_with = |suffix: &str| lower.strip_suffix(side.name()).is_some_and(|rest| rest.ends_with(suffix));
            ends_with(CHANGES) || ends_with(ENDS)
        })
}

/// Behind a layered target's name: the large table, its overlays and, for a history, what ends versions below them.
///
/// A large target `p` is a view over `p__base` and two overlays, `a` and `b`: rows that have come since
/// (`p__changes_a`, with [`GONE`] where a key was deleted; for a history, versions) and, for a history, `p__ends_a`: the
/// key, `valid_to` and `updated_at` by which open versions in the layers below are closed. An overlay lies above the
/// base, and the active one (`active_layer` of the projection's metadata) above the other. A target without an active
/// layer is one plain table.
const BASE: &str = "__base";
const CHANGES: &str = "__changes_";
const ENDS: &str = "__ends_";

/// Column of an overlay of rows: the key has no row any more.
pub(super) const GONE: &str = "__shori_gone";

/// One of a layered target's two overlays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    A,
    B,
}

impl Side {
    pub const BOTH: [Side; 2] = [Side::A, Side::B];

    pub fn name(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::BOTH.into_iter().find(|side| side.name() == name)
    }

    pub fn other(self) -> Self {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

pub(super) fn base_table(projection: &str) -> String {
    format!("{projection}{BASE}")
}

pub(super) fn changes_table(projection: &str, side: Side) -> String {
    format!("{projection}{CHANGES}{}", side.name())
}

pub(super) fn ends_table(projection: &str, side: Side) -> String {
    format!("{projection}{ENDS}{}", side.name())
}

/// A table's column, as a statement that makes the table spells it.
pub(super) fn column_definition(name: &str, data_type: &DataType) -> Result<String> {
    Ok(format!("{} {}", quote_name(name), duckdb_type(data_type)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_column_never_takes_the_name_of_the_logs_own() {
        assert_eq!(staging_column("amount"), "amount");
        assert_eq!(staging_column("LSN"), "LSN__source");
        assert_eq!(staging_column("commit_time"), "commit_time__source");
        assert_eq!(history_column("created_at"), "created_at__source");
        assert_eq!(history_column("valid_from"), "valid_from");
    }

    #[test]
    fn layers_have_names_that_no_projection_takes() {
        for side in Side::BOTH {
            assert_eq!(Side::named(side.name()), Some(side));
            for table in [base_table("Orders"), changes_table("orders", side), ends_table("orders", side)] {
                assert!(is_reserved_table(&table), "{table}");
            }
        }
        assert_eq!(changes_table("orders", Side::B), "orders__changes_b");
        assert!(!is_reserved_table("orders_base") && !is_reserved_table("data__changes_c"));
    }
}
