//! Tables of results, and the control rows of the projections that they hold.
//!
//! Whoever changes a projection's rows, its checkpoint or its table's shape locks its row of `ctl_projection_metadata`
//! first (contract 6).

use shori_core::position::{CaptureId, Lsn, Micros, Positions};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::{Checkpoint, target_mismatch};
use shori_core::{Error, ErrorKind, Result};

use super::captures::lock_shapes;
use super::layout::{self, TargetColumn};
use super::session::{Link, Time, get_position, now, storable};
use crate::connect::{literal, quoted};

const METADATA: &str = "projection metadata";
const CHECKPOINTS: &str = "projection checkpoints";
/// Longest message that `last_error` keeps.
const LAST_ERROR_MAX_CHARS: usize = 4000;
/// Shape of a projection that has failed before it came as far as a table of its own.
const NO_SHAPE: &str = "";

const SELECT_COLUMNS: &str = "
select attname::text, format_type(atttypid, atttypmod), attnotnull
from pg_attribute
where attrelid = to_regclass($1) and attnum > 0 and not attisdropped
order by attnum";

const LOCK_SHAPE: &str = "
select target_shape, target_key, definition
from ctl_projection_metadata
where projection_name = $1
for update";

const INSERT_METADATA: &str = "
insert into ctl_projection_metadata
    (projection_name, status, target_shape, target_key, definition)
values ($1, 'INIT', $2, $3, $4)";

const SET_SHAPE: &str = "
update ctl_projection_metadata
set target_shape = $1, target_key = $2, definition = $3
where projection_name = $4";

const HAS_FUNCTION: &str = "select to_regprocedure($1) is not null";

const LOCK_METADATA: &str = "
select 1
from ctl_projection_metadata
where projection_name = $1
for update";

/// One row for each capture of the checkpoint, none without.
const SELECT_CHECKPOINT: &str = "
select c.source_name, c.instance_name, c.last_consumed_lsn, c.last_seq, m.as_of_time
from ctl_projection_checkpoints c
left join ctl_projection_metadata m using (projection_name)
where projection_name = $1";

const DELETE_CHECKPOINTS: &str = "
delete from ctl_projection_checkpoints
where projection_name = $1";

const MOVE_CHECKPOINTS: &str = "
update ctl_projection_checkpoints as c
set last_consumed_lsn = n.lsn, last_seq = n.seq, updated_at = $6
from unnest($2::text[], $3::text[], $4::bytea[], $5::bytea[]) as n (source_name, instance_name, lsn, seq)
where c.projection_name = $1 and c.source_name = n.source_name and c.instance_name = n.instance_name";

const INSERT_CHECKPOINTS: &str = "
insert into ctl_projection_checkpoints
    (projection_name, updated_at, source_name, instance_name, last_consumed_lsn, last_seq, capture_instance)
select $1::text, $6::timestamp, n.*
from unnest($2::text[], $3::text[], $4::bytea[], $5::bytea[], $7::text[]) as n";

const SET_BUILT: &str = "
update ctl_projection_metadata
set as_of_lsn = $1, as_of_time = $2, built_at = $3, status = $4, last_error = null, run_id = $5
where projection_name = $6";

const PUT_ERROR: &str = "
insert into ctl_projection_metadata
    (projection_name, status, last_error, target_shape, target_key, definition)
values ($1, 'ERROR', $2, '', '', '')
on conflict (projection_name) do update
set status = 'ERROR', last_error = excluded.last_error";

const CLEAR_ERROR: &str = "
update ctl_projection_metadata as m
set last_error = null, status = case
    when exists (select 1 from ctl_projection_checkpoints c where c.projection_name = m.projection_name) then 'OK'
    else 'INIT' end
where projection_name = $1 and status = 'ERROR'";

const SET_INIT: &str = "
update ctl_projection_metadata
set status = 'INIT', as_of_lsn = null, as_of_time = null
where projection_name = $1";

fn shape_name(shape: &TargetShape) -> &'static str {
    match shape {
        TargetShape::Rows => "rows",
        TargetShape::Versions => "versions",
    }
}

/// What a target was written as, or is to be.
struct Written {
    shape: String,
    key: String,
    definition: String,
}

impl Written {
    fn wanted(target: &Target) -> Self {
        let (shape, key) = (shape_name(&target.shape).to_string(), serde_json::json!(target.key).to_string());
        Self { shape, key, definition: storable(&target.definition) }
    }

    async fn stored(link: &Link, table: &str) -> Result<Option<Self>> {
        let rows = link.rows(LOCK_SHAPE, &[&table], METADATA).await?;
        Ok(rows.first().map(|row| Self { shape: row.get(0), key: row.get(1), definition: row.get(2) }))
    }

    async fn update(&self, link: &Link, table: &str) -> Result<()> {
        link.execute(SET_SHAPE, &[&self.shape, &self.key, &self.definition, &table], METADATA).await.map(drop)
    }

    /// Rows that another query made stay until the next output, which begins from nothing.
    async fn follow(&self, link: &Link, wanted: &Self, table: &str) -> Result<()> {
        if self.shape != wanted.shape {
            return Err(target_mismatch(table, format!("it holds {}, and {} are to come", self.shape, wanted.shape)));
        }
        if self.key != wanted.key {
            return Err(target_mismatch(table, format!("its key is {}, and {} is wanted", self.key, wanted.key)));
        }
        if self.definition == wanted.definition {
            return Ok(());
        }
        if self.shape == shape_name(&TargetShape::Rows) {
            reset(link, table).await?;
        }
        wanted.update(link, table).await
    }
}

pub(super) async fn prepare(link: &Link, schema: &str, target: &Target) -> Result<()> {
    let table = &*target.projection;
    if layout::is_reserved_table(table) {
        let object = format!("target table {table}");
        return Err(Error::new(ErrorKind::Usage, "prepare", object, "the name is the store's own")
            .with_remedy("give the projection another name"));
    }
    let wanted_columns = layout::target_columns(target)?;
    lock_shapes(link, schema).await?;
    let wanted = Written::wanted(target);
    let stored = Written::stored(link, table).await?;
    let mut standing = columns(link, schema, table).await?;
    if is_made_anew(target, &wanted_columns, &standing, stored.as_ref(), &wanted.key) {
        link.run(&format!("drop table {}", quoted(table)), table).await?;
        standing.clear();
    }
    let is_new = standing.is_empty();
    let is_own = stored.as_ref().is_some_and(|stored| stored.shape != NO_SHAPE);
    if !is_new && !is_own {
        return Err(target_mismatch(table, "it stands already and no projection has written it".into()));
    }
    create_or_evolve(link, target, &wanted_columns, &standing).await?;
    match stored {
        // Whoever dropped it, what its checkpoint says is no longer there.
        Some(_) if is_new => {
            reset(link, table).await?;
            wanted.update(link, table).await?;
        }
        Some(stored) => {
            let differs = stored.definition != wanted.definition;
            stored.follow(link, &wanted, table).await?;
            if differs && target.shape == TargetShape::Versions && !target.keeps_tombstones {
                end_tombstones(link, table).await?;
            }
        }
        None => {
            let values: super::session::Values<'_> = &[&table, &wanted.shape, &wanted.key, &wanted.definition];
            link.execute(INSERT_METADATA, values, METADATA).await?;
        }
    }
    if target.shape == TargetShape::Versions {
        create_as_of(link, schema, table).await?;
    }
    Ok(())
}

/// The table's columns, in order; none without the table.
async fn columns(link: &Link, schema: &str, table: &str) -> Result<Vec<TargetColumn>> {
    let name = format!("{}.{}", quoted(schema), quoted(table));
    let rows = link.rows(SELECT_COLUMNS, &[&name], table).await?;
    let column =
        |row: &tokio_postgres::Row| TargetColumn { name: row.get(0), sql_type: row.get(1), not_null: row.get(2) };
    Ok(rows.iter().map(column).collect())
}

/// Rows are derived whole from state: where a projection wrote them, and their key, or a column's name or type, is another
/// now, they are made anew, and so where a column does not come any more: it would be left as it was. Columns that are
/// new are added. Versions are kept: nothing else may hold what they do.
fn is_made_anew(
    target: &Target,
    wanted: &[TargetColumn],
    standing: &[TargetColumn],
    stored: Option<&Written>,
    key: &str,
) -> bool {
    let rows = shape_name(&TargetShape::Rows);
    let Some(stored) = stored.filter(|_| !standing.is_empty()) else { return false };
    if stored.shape != rows || shape_name(&target.shape) != rows {
        return false;
    }
    let fits = |column: &TargetColumn| {
        let mut same = wanted.iter().filter(|wanted| wanted.name == column.name && wanted.sql_type == column.sql_type);
        same.any(|wanted| wanted.not_null || !column.not_null)
    };
    stored.key != key || !standing.iter().all(fits)
}

async fn create_or_evolve(
    link: &Link,
    target: &Target,
    wanted: &[TargetColumn],
    standing: &[TargetColumn],
) -> Result<()> {
    let table = &*target.projection;
    if standing.is_empty() {
        let statements = layout::create_target(target, wanted);
        return link.run(&statements.join(";"), table).await.map(drop);
    }
    for column in wanted {
        match standing.iter().find(|standing| standing.name == column.name) {
            Some(stands) if stands.sql_type == column.sql_type => {}
            Some(stands) => {
                let TargetColumn { name, sql_type, .. } = column;
                let cause = format!("column {name} is {}, and {sql_type} is wanted", stands.sql_type);
                return Err(target_mismatch(table, cause));
            }
            None => {
                // Rows that stand have no value for it.
                let added = TargetColumn { not_null: false, ..column.clone() };
                let sql = format!("alter table {} add column {}", quoted(table), added.definition());
                link.run(&sql, table).await?;
            }
        }
    }
    Ok(())
}

/// Nothing follows them any more: they end where they began.
async fn end_tombstones(link: &Link, table: &str) -> Result<()> {
    let sql = format!(
        "update {} set valid_to = valid_from + interval '1 microsecond', is_current = false, updated_at = $1 \
         where is_current and cdc_operation = '{}'",
        quoted(table),
        history::DELETE
    );
    link.execute_of(&sql, &[&Time(now())], table).await.map(drop)
}

/// The function by which people ask for a history's rows at a time. It takes the table's columns as they are when it is
/// asked.
async fn create_as_of(link: &Link, schema: &str, table: &str) -> Result<()> {
    // Whoever asks may look for tables elsewhere.
    let qualified = |name: &str| format!("{}.{}", quoted(schema), quoted(name));
    let (name, table_name) = (qualified(&history::as_of_function(table)), qualified(table));
    let is_there = link.rows(HAS_FUNCTION, &[&format!("{name}(timestamptz)")], table).await?;
    if is_there.first().is_some_and(|row| row.get(0)) {
        return Ok(());
    }
    let body = format!("select * from {table_name} where {}", history::as_of_condition("($1 at time zone 'UTC')"));
    let create = format!(
        "create function {name}(timestamptz) returns setof {table_name} language sql stable as {}",
        literal(&body)
    );
    link.run(&create, table).await.map(drop)
}

/// How loaded keys are compared with those that stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Nulls {
    /// A key with a null in it is equal to none. The index serves.
    Never,
    /// Nulls are equal: arrays compare so, and hash, which `is not distinct from` does not.
    Match,
}

/// Equality of the key in `left` and `right`.
pub(super) fn same_key(target: &Target, left: &str, right: &str, nulls: Nulls) -> String {
    let keys = target.key.iter().zip(layout::key_columns(target));
    let equal = keys.map(|(name, column)| match nulls {
        Nulls::Match if layout::is_nullable(target, name) => {
            format!("array[{left}.{column}] = array[{right}.{column}]")
        }
        _ => format!("{left}.{column} = {right}.{column}"),
    });
    equal.collect::<Vec<_>>().join(" and ")
}

/// Whether a loaded key has a null in it.
pub(super) fn has_null(target: &Target, table: &str) -> String {
    let keys = target.key.iter().zip(layout::key_columns(target));
    let nullable = keys.filter(|(name, _)| layout::is_nullable(target, name));
    let nulls: Vec<String> = nullable.map(|(_, column)| format!("{table}.{column} is null")).collect();
    if nulls.is_empty() { "false".into() } else { format!("({})", nulls.join(" or ")) }
}

/// Waits for other writers of the projection; its checkpoint as they have left it.
pub(super) async fn lock(link: &Link, projection: &str) -> Result<Option<Positions>> {
    if link.rows(LOCK_METADATA, &[&projection], METADATA).await?.is_empty() {
        let object = format!("target {projection}");
        return Err(Error::new(ErrorKind::Internal, "write", object, "it was never prepared"));
    }
    Ok(checkpoint(link, projection).await?.map(|checkpoint| checkpoint.positions))
}

pub(super) async fn checkpoint(link: &Link, projection: &str) -> Result<Option<Checkpoint>> {
    let mut checkpoint = Checkpoint { positions: Positions::new(), as_of_time: 0 };
    for row in link.rows(SELECT_CHECKPOINT, &[&projection], CHECKPOINTS).await? {
        checkpoint.positions.insert(CaptureId::new(row.get(0), row.get(1)), get_position(&row, 2)?);
        checkpoint.as_of_time = row.get::<_, Option<Time>>(4).map_or(0, |time| time.0);
    }
    Ok((!checkpoint.positions.is_empty()).then_some(checkpoint))
}

pub(super) async fn put_checkpoint(
    link: &Link,
    projection: &str,
    stored: Option<&Positions>,
    next: &Positions,
) -> Result<()> {
    let sources: Vec<&str> = next.keys().map(|id| &*id.source).collect();
    let instances: Vec<&str> = next.keys().map(|id| &*id.instance).collect();
    let lsns: Vec<&[u8]> = next.values().map(|position| position.lsn.as_slice()).collect();
    let seqs: Vec<&[u8]> = next.values().map(|position| position.seq.as_slice()).collect();
    let now = Time(now());
    if stored.is_some_and(|stored| stored.keys().eq(next.keys())) {
        let values: super::session::Values<'_> = &[&projection, &sources, &instances, &lsns, &seqs, &now];
        return link.execute(MOVE_CHECKPOINTS, values, CHECKPOINTS).await.map(drop);
    }
    let has_one_source = sources.windows(2).all(|pair| pair[0] == pair[1]);
    let shown = |id: &CaptureId| if has_one_source { id.instance.to_string() } else { id.to_string() };
    let shown: Vec<String> = next.keys().map(shown).collect();
    link.execute(DELETE_CHECKPOINTS, &[&projection], CHECKPOINTS).await?;
    let values: super::session::Values<'_> = &[&projection, &sources, &instances, &lsns, &seqs, &now, &shown];
    link.execute(INSERT_CHECKPOINTS, values, CHECKPOINTS).await.map(drop)
}

/// What the metadata say of an output.
pub(super) struct Built<'a> {
    pub as_of_lsn: Option<Lsn>,
    pub as_of_time: Micros,
    pub complete: bool,
    pub run_id: &'a str,
}

impl Built<'_> {
    pub async fn put(&self, link: &Link, projection: &str) -> Result<()> {
        let lsn = self.as_of_lsn.as_ref().map(Lsn::as_slice);
        let status = if self.complete { "OK" } else { "INIT" };
        let values: super::session::Values<'_> =
            &[&lsn, &Time(self.as_of_time), &Time(now()), &status, &self.run_id, &projection];
        link.execute(SET_BUILT, values, METADATA).await.map(drop)
    }
}

pub(super) async fn record_error(link: &Link, projection: &str, message: Option<&str>) -> Result<()> {
    let Some(message) = message else {
        return link.execute(CLEAR_ERROR, &[&projection], METADATA).await.map(drop);
    };
    let message: String = storable(message).chars().take(LAST_ERROR_MAX_CHARS).collect();
    link.execute(PUT_ERROR, &[&projection, &message], METADATA).await.map(drop)
}

/// The row is locked by its own update, before the checkpoint goes.
pub(super) async fn reset(link: &Link, projection: &str) -> Result<()> {
    link.execute(SET_INIT, &[&projection], METADATA).await?;
    link.execute(DELETE_CHECKPOINTS, &[&projection], CHECKPOINTS).await.map(drop)
}
