//! What a store's schema holds. Permanent: databases of released versions are opened by later ones, so a column may be
//! added here (with a higher [`LAYOUT_VERSION`] and a step that adds it), but none may change its name, type or meaning.
//!
//! Columns that people know come first, what else is needed after them. Positions are two `bytea` that sort as bytes;
//! times are UTC, without a zone. A staging table is named by its control row (`staging_table`), and so are its columns
//! (`staging_columns`: the source's names in the order in which they came to the table; bit `i` of
//! `unchanged_columns` stands for entry `i` of that list).

use arrow::datatypes::{DataType, Field, TimeUnit};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::schema::type_name;
use shori_core::{Error, ErrorKind, Result};

use crate::column_types::{Kind, PostgresType, oid};
use crate::connect::quoted;

/// Goes up when what is written from here on cannot be understood by older versions.
pub(super) const LAYOUT_VERSION: i64 = 1;

/// Longest name, in bytes: PostgreSQL cuts longer ones off without an error.
const NAME_MAX_BYTES: usize = 63;

pub(super) const CREATE_STORE_TABLE: &str = "
create table if not exists ctl_store (
    only_row boolean primary key,
    store_id text not null,
    layout_version bigint not null,
    created_at timestamp not null
)";

/// Rows that every commit updates have room beside them for their next version.
pub(super) const CREATE_CONTROL_TABLES: &str = "
create table if not exists ctl_ingestion_watermarks (
    source_name text not null,
    capture_instance text not null,
    last_ingested_lsn bytea not null,
    updated_at timestamp not null,
    last_seq bytea not null,
    boundary_lsn bytea not null,
    boundary_seq bytea not null,
    boundary_time timestamp not null,
    timeline text not null,
    identity text not null,
    staging_table text not null,
    staging_columns text not null,
    table_schema text not null,
    schema_forgotten boolean not null,
    failed_reason text,
    primary key (source_name, capture_instance)
) with (fillfactor = 50);
create table if not exists ctl_horizons (
    source_name text not null,
    capture_instance text not null,
    horizon_lsn bytea not null,
    horizon_seq bytea not null,
    updated_at timestamp not null,
    primary key (source_name, capture_instance)
);
create table if not exists ctl_snapshots (
    source_name text not null,
    capture_instance text not null,
    generation bigint not null,
    state text not null,
    start_lsn bytea not null,
    start_seq bytea not null,
    end_lsn bytea not null,
    end_seq bytea not null,
    end_time timestamp not null,
    row_count bigint not null,
    resume bytea not null,
    updated_at timestamp not null,
    primary key (source_name, capture_instance, generation)
) with (fillfactor = 50);
create table if not exists ctl_rejected_changes (
    source_name text not null,
    capture_instance text not null,
    lsn bytea not null,
    seqval bytea not null,
    reason text not null,
    raw bytea not null,
    rejected_at timestamp not null
);
create table if not exists ctl_projection_checkpoints (
    projection_name text not null,
    capture_instance text not null,
    last_consumed_lsn bytea not null,
    updated_at timestamp not null,
    last_seq bytea not null,
    source_name text not null,
    instance_name text not null,
    primary key (projection_name, capture_instance)
) with (fillfactor = 50);
create table if not exists ctl_projection_metadata (
    projection_name text primary key,
    as_of_lsn bytea,
    as_of_time timestamp,
    built_at timestamp,
    status text not null,
    last_error text,
    run_id text,
    target_shape text not null,
    target_key text not null,
    definition text not null
) with (fillfactor = 50);
create table if not exists pipeline_metadata (
    pipeline_name text not null,
    run_id text not null,
    start_time timestamp not null,
    end_time timestamp,
    status text not null,
    records_processed bigint not null,
    records_successful bigint not null,
    records_failed bigint not null,
    error_message text,
    performance_metrics text not null,
    primary key (pipeline_name, run_id)
) with (fillfactor = 50)";

/// Columns of a staging table that are not the source's: three before the source's, the rest after.
const STAGING_HEAD: [&str; 3] = ["lsn", "seqval", "op"];
const STAGING_TAIL: [&str; 4] = ["ingested_at", "commit_time", "unchanged_columns", "boundary_time"];

/// Columns that every table of PostgreSQL has (PostgreSQL documentation, "System Columns").
const SYSTEM_COLUMNS: [&str; 6] = ["tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"];

/// Whether tables of that name are the store's own. Temporary ones are called `ctl_` too: they would hide a target of
/// their name. A target may be called as any alias is, and `excluded`, so statements give it one, too.
pub fn is_reserved_table(name: &str) -> bool {
    let lower = name.to_lowercase();
    lower.starts_with("ctl_") || lower.starts_with("stg_cdc_") || lower == "pipeline_metadata"
}

/// The column of a staging table that holds the source's column `name`.
pub(super) fn staging_column(name: &str) -> String {
    let lower = name.to_lowercase();
    let mut taken = STAGING_HEAD.iter().chain(&STAGING_TAIL).chain(&SYSTEM_COLUMNS);
    if taken.any(|reserved| *reserved == lower) { format!("{name}__source") } else { name.to_string() }
}

/// `name` followed by `suffix`, cut where it would be too long together.
pub(super) fn with_suffix(name: &str, suffix: &str) -> String {
    let mut end = name.len().min(NAME_MAX_BYTES.saturating_sub(suffix.len()));
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &name[..end])
}

/// Fails when a name that is to be made is longer than PostgreSQL keeps.
pub(super) fn check_name(name: &str, what: &str, object: &str) -> Result<()> {
    if name.len() <= NAME_MAX_BYTES {
        return Ok(());
    }
    let cause = format!("the name {name} has {} bytes, and PostgreSQL keeps {NAME_MAX_BYTES}", name.len());
    Err(Error::new(ErrorKind::Schema, "prepare", object, cause).with_remedy(format!("give the {what} a shorter name")))
}

/// `boundary_time` is where the key's history stood with this image, where compaction has found it later than
/// `commit_time`; it continues the chain of history boundaries that the removed images began.
pub(super) fn create_staging_table<'a>(table: &str, fields: impl Iterator<Item = &'a Field>) -> Result<String> {
    let object = format!("staging table {table}");
    check_name(table, "source table", &object)?;
    let mut columns: Vec<String> =
        vec!["lsn bytea not null".into(), "seqval bytea not null".into(), "op smallint not null".into()];
    for field in fields {
        columns.push(staging_definition(table, field)?);
    }
    columns.push("ingested_at timestamp not null".into());
    columns.push("commit_time timestamp not null".into());
    columns.push("unchanged_columns bytea".into());
    columns.push("boundary_time timestamp".into());
    columns.push("primary key (lsn, seqval)".into());
    Ok(format!("create table {} ({})", quoted(table), columns.join(", ")))
}

/// A source's column of a staging table, as a statement that makes it spells it.
pub(super) fn staging_definition(table: &str, field: &Field) -> Result<String> {
    let name = staging_column(field.name());
    check_name(&name, "source column", &format!("staging table {table}"))?;
    Ok(format!("{} {}", quoted(&name), sql_type(field.data_type())?))
}

/// The column of a target that holds the carried column `name`: a source's `created_at` is not the store's own.
pub(super) fn target_column(shape: &TargetShape, name: &str) -> String {
    let own = [history::SURROGATE_KEY, history::BATCH_ID, history::CREATED_AT, history::UPDATED_AT];
    let is_own = *shape == TargetShape::Versions && own.contains(&name.to_lowercase().as_str());
    if is_own { history::published_name(name) } else { name.to_string() }
}

/// A column of a target's table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct TargetColumn {
    pub name: String,
    /// As the catalog prints it.
    pub sql_type: String,
    pub not_null: bool,
}

impl TargetColumn {
    fn new(name: &str, data_type: &DataType, not_null: bool) -> Result<Self> {
        Ok(Self { name: name.to_string(), sql_type: sql_type(data_type)?, not_null })
    }

    pub fn definition(&self) -> String {
        let not_null = if self.not_null { " not null" } else { "" };
        let identity = if self.name == history::SURROGATE_KEY && self.not_null {
            " generated by default as identity primary key"
        } else {
            ""
        };
        format!("{} {}{not_null}{identity}", quoted(&self.name), self.sql_type)
    }
}

/// All columns of the target's table, in its order. Only what must be there is not null: a column that a source drops
/// comes no more.
pub(super) fn target_columns(target: &Target) -> Result<Vec<TargetColumn>> {
    let object = format!("target table {}", target.projection);
    check_name(&target.projection, "projection", &object)?;
    let time = DataType::Timestamp(TimeUnit::Microsecond, None);
    let mut columns = Vec::new();
    if target.shape == TargetShape::Versions {
        columns.push(TargetColumn::new(history::SURROGATE_KEY, &DataType::Int64, true)?);
    }
    let is_moved = |name: &str| target.shape == TargetShape::Versions && name == history::SOURCE_LSN;
    for field in target.columns.fields().iter().filter(|field| !is_moved(field.name())) {
        let name = target_column(&target.shape, field.name());
        check_name(&name, "column", &object)?;
        if SYSTEM_COLUMNS.contains(&name.as_str()) {
            let cause = format!("every table of PostgreSQL has a column {name} of its own");
            return Err(Error::new(ErrorKind::Schema, "prepare", object, cause)
                .with_remedy("give the column another name in the projection"));
        }
        let not_null = target.shape == TargetShape::Rows && target.key.contains(field.name()) && !field.is_nullable();
        columns.push(TargetColumn::new(&name, field.data_type(), not_null)?);
    }
    if target.shape == TargetShape::Versions {
        columns.push(TargetColumn::new(history::BATCH_ID, &DataType::Utf8, false)?);
        columns.push(TargetColumn::new(history::CREATED_AT, &time, false)?);
        columns.push(TargetColumn::new(history::UPDATED_AT, &time, false)?);
        columns.push(TargetColumn::new(history::SOURCE_LSN, &DataType::Binary, false)?);
    }
    Ok(columns)
}

/// What a target's key columns are called in its table.
pub(super) fn key_columns(target: &Target) -> Vec<String> {
    target.key.iter().map(|name| quoted(&target_column(&target.shape, name))).collect()
}

/// Statements that make the target's table and its indexes: rows are unique by key, of versions the current ones. Where a
/// part of the key may be null, that is no primary key.
pub(super) fn create_target(target: &Target, columns: &[TargetColumn]) -> Vec<String> {
    let table = quoted(&target.projection);
    let key = key_columns(target).join(", ");
    let mut definitions: Vec<String> = columns.iter().map(TargetColumn::definition).collect();
    let has_nulls = target.key.iter().any(|name| is_nullable(target, name));
    if target.shape == TargetShape::Rows && !has_nulls {
        definitions.push(format!("primary key ({key})"));
    }
    let mut statements = vec![format!("create table {table} ({})", definitions.join(", "))];
    match target.shape {
        TargetShape::Versions => statements.push(format!("create unique index on {table} ({key}) where is_current")),
        TargetShape::Rows if has_nulls => statements.push(format!("create unique index on {table} ({key})")),
        TargetShape::Rows => {}
    }
    statements
}

/// Whether a carried column may hold nulls.
pub(super) fn is_nullable(target: &Target, name: &str) -> bool {
    target.columns.field_with_name(name).map_or(true, Field::is_nullable)
}

/// The type that keeps every value of `data_type`, as the catalog prints it (`format_type`).
pub(super) fn sql_type(data_type: &DataType) -> Result<String> {
    Ok(match data_type {
        DataType::Boolean => "boolean".into(),
        DataType::Int16 => "smallint".into(),
        DataType::Int32 => "integer".into(),
        DataType::Int64 => "bigint".into(),
        DataType::Float32 => "real".into(),
        DataType::Float64 => "double precision".into(),
        DataType::Utf8 => "text".into(),
        DataType::Binary => "bytea".into(),
        DataType::Date32 => "date".into(),
        DataType::Time64(TimeUnit::Microsecond) => "time without time zone".into(),
        DataType::Timestamp(TimeUnit::Microsecond, None) => "timestamp without time zone".into(),
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "timestamp with time zone".into(),
        DataType::Decimal128(precision, scale) => format!("numeric({precision},{scale})"),
        other => {
            let cause = format!("no column of PostgreSQL keeps every value of type {}", type_name(other));
            return Err(Error::new(ErrorKind::Schema, "make", "a table's column", cause)
                .with_remedy("cast it in the projection's SQL"));
        }
    })
}

/// The same, as what is read in binary is decoded by.
pub(super) fn read_type(data_type: &DataType) -> Result<PostgresType> {
    let name = sql_type(data_type)?;
    let mut modifier = -1;
    let oid = match data_type {
        DataType::Boolean => oid::BOOL,
        DataType::Int16 => oid::INT2,
        DataType::Int32 => oid::INT4,
        DataType::Int64 => oid::INT8,
        DataType::Float32 => oid::FLOAT4,
        DataType::Float64 => oid::FLOAT8,
        DataType::Binary => oid::BYTEA,
        DataType::Date32 => oid::DATE,
        DataType::Time64(_) => oid::TIME,
        DataType::Timestamp(_, None) => oid::TIMESTAMP,
        DataType::Timestamp(_, Some(_)) => oid::TIMESTAMPTZ,
        DataType::Decimal128(precision, scale) => {
            modifier = (i32::from(*precision) << 16 | i32::from(*scale)) + 4;
            oid::NUMERIC
        }
        _ => oid::TEXT,
    };
    Ok(PostgresType { oid, modifier, kind: Kind::Base, name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::column_types::arrow_type;

    #[test]
    fn a_source_column_never_takes_the_name_of_the_logs_own() {
        assert_eq!(staging_column("amount"), "amount");
        assert_eq!(staging_column("LSN"), "LSN__source");
        assert_eq!(staging_column("ctid"), "ctid__source");
        assert_eq!(target_column(&TargetShape::Versions, "created_at"), "created_at__source");
        assert_eq!(target_column(&TargetShape::Versions, "valid_from"), "valid_from");
        assert_eq!(target_column(&TargetShape::Rows, "created_at"), "created_at");
    }

    #[test]
    fn names_are_cut_between_characters_or_refused() {
        assert_eq!(with_suffix(&"é".repeat(40), "__dropped_1").len(), 63);
        assert_eq!(with_suffix("short", "__dropped_1"), "short__dropped_1");
        assert!(check_name(&"n".repeat(63), "table", "it").is_ok());
        assert!(check_name(&"n".repeat(64), "table", "it").unwrap_err().to_string().contains("64 bytes"));
    }

    #[test]
    fn what_is_written_is_read_as_the_same_type() {
        let time = TimeUnit::Microsecond;
        for data_type in [
            DataType::Boolean,
            DataType::Int16,
            DataType::Int32,
            DataType::Int64,
            DataType::Float32,
            DataType::Float64,
            DataType::Utf8,
            DataType::Binary,
            DataType::Date32,
            DataType::Time64(time),
            DataType::Timestamp(time, None),
            DataType::Timestamp(time, Some("UTC".into())),
            DataType::Decimal128(1, 0),
            DataType::Decimal128(38, 38),
        ] {
            assert_eq!(arrow_type(&read_type(&data_type).unwrap(), false), Ok(data_type));
        }
        assert!(sql_type(&DataType::Duration(time)).is_err());
    }
}
