//! Tables of results, and the control rows of the projections that they hold.

use arrow::datatypes::{DataType, Field, TimeUnit};
use duckdb::types::Value;
use shori_core::position::{CaptureId, Lsn, Positions, SortKey};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::{Checkpoint, target_mismatch};
use shori_core::{Error, ErrorKind, Result};

use super::layout;
use super::session::{Session, get_position, get_time, now, position_values, text, time};
use crate::database::quote_name;
use crate::types::duckdb_type;

const METADATA: &str = "projection metadata";
const CHECKPOINTS: &str = "projection checkpoints";
/// Longest message that `last_error` keeps.
const LAST_ERROR_MAX_CHARS: usize = 4000;

const SELECT_COLUMNS: &str = "
select column_name, data_type
from duckdb_columns()
where database_name = current_database() and schema_name = 'main' and table_name = ?
order by column_index";

const SELECT_SHAPE: &str = "
select target_shape, target_key, definition
from ctl_projection_metadata
where projection_name = ?";

const INSERT_METADATA: &str = "
insert into ctl_projection_metadata
values (?, null, null, null, 'INIT', null, null, 1, ?, ?, ?)";

const SELECT_CHECKPOINT: &str = "
select source_name, instance_name, last_consumed_lsn, last_seq
from ctl_projection_checkpoints
where projection_name = ?";

const SELECT_AS_OF: &str = "
select as_of_time
from ctl_projection_metadata
where projection_name = ?";

const UPDATE_CHECKPOINT: &str = "
update ctl_projection_checkpoints
set last_consumed_lsn = ?, updated_at = ?, last_seq = ?
where projection_name = ? and source_name = ? and instance_name = ?";

const INSERT_CHECKPOINT: &str = "
insert into ctl_projection_checkpoints
    (last_consumed_lsn, updated_at, last_seq, projection_name, source_name, instance_name, capture_instance)
values (?, ?, ?, ?, ?, ?, ?)";

const DELETE_CHECKPOINT: &str = "
delete from ctl_projection_checkpoints
where projection_name = ? and source_name = ? and instance_name = ?";

const DELETE_CHECKPOINTS: &str = "
delete from ctl_projection_checkpoints
where projection_name = ?";

/// Shape of a projection that has failed before it came as far as a table of its own.
const NO_SHAPE: &str = "";

const SET_SHAPE: &str = "
update ctl_projection_metadata
set target_shape = ?, target_key = ?, definition = ?
where projection_name = ?";

const SET_ERROR: &str = "
update ctl_projection_metadata
set status = 'ERROR', last_error = ?
where projection_name = ?";

const CLEAR_ERROR: &str = "
update ctl_projection_metadata as metadata
set last_error = null, status = case
    when exists (select 1 from ctl_projection_checkpoints as kept where kept.projection_name = metadata.projection_name)
    then 'OK' else 'INIT' end
where projection_name = ? and status = 'ERROR'";

const SET_INIT: &str = "
update ctl_projection_metadata
set status = 'INIT', as_of_lsn = null, as_of_time = null
where projection_name = ?";

const SELECT_STATUSES: &str = "
select projection_name, as_of_lsn, as_of_time, built_at, status, last_error, run_id
from ctl_projection_metadata
order by projection_name";

/// A projection's row of `ctl_projection_metadata`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProjectionStatus {
    pub projection: String,
    pub as_of_lsn: Option<Lsn>,
    pub as_of_time: Option<shori_core::position::Micros>,
    pub built_at: Option<shori_core::position::Micros>,
    /// INIT, OK or ERROR.
    pub status: String,
    pub last_error: Option<String>,
    pub run_id: Option<String>,
}

/// All columns of the target's table, in its order.
pub(super) fn table_fields(target: &Target) -> Vec<Field> {
    let time = DataType::Timestamp(TimeUnit::Microsecond, None);
    let carried = || target.columns.fields().iter().map(|field| field.as_ref().clone());
    match target.shape {
        TargetShape::Rows => carried().collect(),
        TargetShape::Versions => {
            let mut fields = vec![Field::new(history::SURROGATE_KEY, DataType::Int64, false)];
            let before_own = carried().filter(|field| field.name() != history::SOURCE_LSN);
            fields.extend(before_own.map(|field| {
                let name = layout::history_column(field.name());
                field.with_name(name)
            }));
            fields.push(Field::new(history::BATCH_ID, DataType::Utf8, false));
            fields.push(Field::new(history::CREATED_AT, time.clone(), false));
            fields.push(Field::new(history::UPDATED_AT, time, false));
            fields.push(Field::new(history::SOURCE_LSN, DataType::Binary, false));
            fields
        }
    }
}

fn shape_name(shape: &TargetShape) -> &'static str {
    match shape {
        TargetShape::Rows => "rows",
        TargetShape::Versions => "versions",
    }
}

pub(super) fn prepare(session: &Session, target: &Target) -> Result<()> {
    let table = &*target.projection;
    if layout::is_reserved_table(table) {
        return Err(Error::new(
            ErrorKind::Usage,
            "prepare",
            format!("target table {table}"),
            "the name is the store's own",
        )
        .with_remedy("give the projection another name"));
    }
    session.transaction(table, |session| {
        let mut columns = session.rows(SELECT_COLUMNS, &[text(table)], table, |row| Ok((row.get(0)?, row.get(1)?)))?;
        let wanted = Written::wanted(target);
        let stored = Written::stored(session, table)?;
        if is_made_anew(target, &columns, stored.as_ref(), &wanted.key)? {
            session.batch(&format!("drop table {}", quote_name(table)), table)?;
            columns.clear();
        }
        let is_new = columns.is_empty();
        create_or_evolve(session, target, &columns)?;
        match stored {
            // Whoever dropped it, what its checkpoint says is no longer there.
            Some(_) if is_new => {
                reset_in(session, table)?;
                wanted.update(session, table)
            }
            Some(stored) if stored.shape != NO_SHAPE => stored.follow(session, &wanted, table),
            _ if !is_new && !is_empty(session, table)? => {
                Err(target_mismatch(table, "it stands already and no projection has written it".into()))
            }
            Some(_) => wanted.update(session, table),
            None => {
                let values = [text(table), text(&wanted.shape), text(&wanted.key), text(&wanted.definition)];
                session.execute(INSERT_METADATA, &values, METADATA).map(|_| ())
            }
        }
    })
}

/// What a target was written as.
struct Written {
    shape: String,
    key: String,
    definition: String,
}

impl Written {
    fn wanted(target: &Target) -> Self {
        let (shape, key) = (shape_name(&target.shape).to_string(), serde_json::json!(target.key).to_string());
        Self { shape, key, definition: target.definition.clone() }
    }

    fn stored(session: &Session, table: &str) -> Result<Option<Self>> {
        let stored = session.rows(SELECT_SHAPE, &[text(table)], METADATA, |row| {
            let definition: Option<String> = row.get(2)?;
            Ok(Self { shape: row.get(0)?, key: row.get(1)?, definition: definition.unwrap_or_default() })
        });
        Ok(stored?.into_iter().next())
    }

    fn update(&self, session: &Session, table: &str) -> Result<()> {
        let values = [text(&self.shape), text(&self.key), text(&self.definition), text(table)];
        session.execute(SET_SHAPE, &values, METADATA).map(|_| ())
    }

    /// Rows that another query made stay until the next output, which begins from nothing.
    fn follow(&self, session: &Session, wanted: &Self, table: &str) -> Result<()> {
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
            reset_in(session, table)?;
        }
        wanted.update(session, table)
    }
}

/// Rows are derived whole from state: where a projection wrote them, and their key or the type of a column is another
/// now, they are made anew. Versions are kept: nothing else may hold what they do.
fn is_made_anew(target: &Target, columns: &[(String, String)], stored: Option<&Written>, key: &str) -> Result<bool> {
    let rows = shape_name(&TargetShape::Rows);
    let Some(stored) = stored.filter(|_| !columns.is_empty()) else { return Ok(false) };
    if stored.shape != rows || shape_name(&target.shape) != rows {
        return Ok(false);
    }
    let mut other = stored.key != key;
    for field in &table_fields(target) {
        let wanted = described_type(field.data_type())?;
        other |= columns.iter().any(|(name, stored)| name.eq_ignore_ascii_case(field.name()) && *stored != wanted);
    }
    Ok(other)
}

pub(super) fn is_empty(session: &Session, table: &str) -> Result<bool> {
    let sql = format!("select count(*) from (select 1 from {} limit 1)", quote_name(table));
    Ok(session.number(&sql, table)? == 0)
}

fn create_or_evolve(session: &Session, target: &Target, columns: &[(String, String)]) -> Result<()> {
    let table = &*target.projection;
    let fields = table_fields(target);
    if columns.is_empty() {
        let definitions: Result<Vec<String>> =
            fields.iter().map(|field| layout::column_definition(field.name(), field.data_type())).collect();
        return session.batch(&format!("create table {} ({})", quote_name(table), definitions?.join(", ")), table);
    }
    for field in &fields {
        let wanted = described_type(field.data_type())?;
        match columns.iter().find(|(name, _)| name.eq_ignore_ascii_case(field.name())) {
            Some((_, stored)) if *stored == wanted => {}
            Some((name, stored)) => {
                return Err(target_mismatch(table, format!("column {name} is {stored}, and {wanted} is wanted")));
            }
            None => {
                let definition = layout::column_definition(field.name(), field.data_type())?;
                session.batch(&format!("alter table {} add column {definition}", quote_name(table)), table)?;
            }
        }
    }
    Ok(())
}

/// As DuckDB's catalog spells the type.
fn described_type(data_type: &DataType) -> Result<String> {
    Ok(match duckdb_type(data_type)?.as_str() {
        "timestamptz" => "TIMESTAMP WITH TIME ZONE".into(),
        other => other.to_uppercase(),
    })
}

pub(super) fn positions(session: &Session, projection: &str) -> Result<Option<Positions>> {
    let rows = session.rows(SELECT_CHECKPOINT, &[text(projection)], CHECKPOINTS, |row| {
        let (source, instance): (String, String) = (row.get(0)?, row.get(1)?);
        Ok((CaptureId::new(&source, &instance), get_position(row, 2)?))
    })?;
    Ok(if rows.is_empty() { None } else { Some(rows.into_iter().collect()) })
}

pub(super) fn checkpoint(session: &Session, projection: &str) -> Result<Option<Checkpoint>> {
    session.transaction(CHECKPOINTS, |session| {
        let Some(positions) = positions(session, projection)? else { return Ok(None) };
        let times = session.rows(SELECT_AS_OF, &[text(projection)], METADATA, |row| get_time(row, 0))?;
        Ok(Some(Checkpoint { positions, as_of_time: times.first().copied().flatten().unwrap_or_default() }))
    })
}

/// Puts `next` in the place of `stored`, within the caller's transaction.
pub(super) fn put_checkpoint(
    session: &Session,
    projection: &str,
    stored: Option<&Positions>,
    next: &Positions,
) -> Result<()> {
    let mut sources: Vec<&str> = next.keys().map(|id| &*id.source).collect();
    sources.dedup();
    for (id, position) in next {
        let [lsn, seq] = position_values(position);
        let mut values = vec![lsn, time(now()), seq, text(projection), text(&id.source), text(&id.instance)];
        if session.execute(UPDATE_CHECKPOINT, &values, CHECKPOINTS)? == 0 {
            let shown = if sources.len() > 1 { id.to_string() } else { id.instance.to_string() };
            values.push(text(&shown));
            session.execute(INSERT_CHECKPOINT, &values, CHECKPOINTS)?;
        }
    }
    for id in stored.into_iter().flat_map(Positions::keys).filter(|id| !next.contains_key(*id)) {
        let values = [text(projection), text(&id.source), text(&id.instance)];
        session.execute(DELETE_CHECKPOINT, &values, CHECKPOINTS)?;
    }
    Ok(())
}

pub(super) fn record_error(session: &Session, projection: &str, message: &str) -> Result<()> {
    let message: String = message.chars().take(LAST_ERROR_MAX_CHARS).collect();
    let values = [text(&message), text(projection)];
    session.transaction(METADATA, |session| {
        if session.execute(SET_ERROR, &values, METADATA)? == 0 {
            let unknown = [text(projection), text(NO_SHAPE), text(""), text("")];
            session.execute(INSERT_METADATA, &unknown, METADATA)?;
            session.execute(SET_ERROR, &values, METADATA)?;
        }
        Ok(())
    })
}

pub(super) fn clear_error(session: &Session, projection: &str) -> Result<()> {
    session.transaction(METADATA, |session| session.execute(CLEAR_ERROR, &[text(projection)], METADATA).map(|_| ()))
}

pub(super) fn reset(session: &Session, projection: &str) -> Result<()> {
    session.transaction(CHECKPOINTS, |session| reset_in(session, projection))
}

fn reset_in(session: &Session, projection: &str) -> Result<()> {
    session.execute(DELETE_CHECKPOINTS, &[text(projection)], CHECKPOINTS)?;
    session.execute(SET_INIT, &[text(projection)], METADATA).map(|_| ())
}

pub(super) fn statuses(session: &Session) -> Result<Vec<ProjectionStatus>> {
    session.rows(SELECT_STATUSES, &[] as &[Value], METADATA, |row| {
        let lsn: Option<Vec<u8>> = row.get(1)?;
        Ok(ProjectionStatus {
            projection: row.get(0)?,
            as_of_lsn: lsn.and_then(|bytes| SortKey::from_slice(&bytes).ok()),
            as_of_time: get_time(row, 2)?,
            built_at: get_time(row, 3)?,
            status: row.get(4)?,
            last_error: row.get(5)?,
            run_id: row.get(6)?,
        })
    })
}
