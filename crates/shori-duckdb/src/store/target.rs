//! Tables of results, and the control rows of the projections that they hold.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, Field, Int64Type, TimeUnit};
use duckdb::types::Value;
use shori_core::position::{CaptureId, Lsn, Position, Positions, SortKey};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::store::{Checkpoint, target_mismatch};
use shori_core::{Error, ErrorKind, Result};

use super::layers;
use super::layout::{self, Side, base_table};
use super::rewrite::{Taken, rewrite};
use super::session::{Session, get_position, get_time, now, position_values, text, time};
use crate::database::quote_name;
use crate::types::duckdb_type;

const METADATA: &str = "projection metadata";
const CHECKPOINTS: &str = "projection checkpoints";
const CHECKPOINTS_TABLE: &str = "ctl_projection_checkpoints";
const METADATA_TABLE: &str = "ctl_projection_metadata";
/// Longest message that `last_error` keeps.
const LAST_ERROR_MAX_CHARS: usize = 4000;

const SELECT_COLUMNS: &str = "
select column_name, data_type
from duckdb_columns()
where database_name = current_database() and schema_name = 'main' and table_name = ?
order by column_index";

const SELECT_SHAPE: &str = "
select target_shape, target_key, definition, active_layer
from ctl_projection_metadata
where projection_name = ?";

const INSERT_METADATA: &str = "
insert into ctl_projection_metadata
values (?, null, null, null, 'INIT', null, null, 1, ?, ?, ?, null)";

/// One row for each capture of the checkpoint, or one without.
const SELECT_CHECKPOINT: &str = "
select source_name, instance_name, last_consumed_lsn, last_seq
from ctl_projection_checkpoints
where projection_name = ?";

const SELECT_AS_OF: &str = "
select as_of_time
from ctl_projection_metadata
where projection_name = ?";

const INSERT_CHECKPOINT: &str = "
insert into ctl_projection_checkpoints
    (last_consumed_lsn, last_seq, source_name, instance_name, updated_at, projection_name, capture_instance)
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
    // A fold of it would be met in the catalog, again and again.
    let _only = session.known_targets().folding();
    while session.transaction(table, |session| prepare_once(session, target))? == Prepared::Layered {
        layers::flatten_alone(session, target)?;
    }
    if target.shape == TargetShape::Versions {
        create_as_of(session, table)?;
    }
    session.known_targets().forget(session.catalog(), table);
    Ok(())
}

/// Nothing follows them any more: they end where they began.
fn end_tombstones(session: &Session, table: &str) -> Result<()> {
    let sql = format!(
        "update {} set valid_to = valid_from + interval 1 microsecond, is_current = false, updated_at = $1 \
         where is_current and cdc_operation = '{}'",
        quote_name(table),
        history::DELETE
    );
    session.execute(&sql, &[time(now())], table).map(|_| ())
}

/// The function by which people ask for a history's rows at a time.
fn create_as_of(session: &Session, table: &str) -> Result<()> {
    const TIME: &str = "__shori_as_of";
    let create = format!(
        "create macro if not exists {}({TIME}) as table select * from {} where {}",
        quote_name(&history::as_of_function(table)),
        quote_name(table),
        history::as_of_condition(TIME)
    );
    session.batch(&create, table)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Prepared {
    Ready,
    /// Nothing has happened: it has to be changed, and must be one table for that.
    Layered,
}

fn prepare_once(session: &Session, target: &Target) -> Result<Prepared> {
    let table = &*target.projection;
    let wanted = Written::wanted(target);
    let mut stored = Written::stored(session, table)?;
    if let Some(layered) = stored.as_mut().filter(|stored| stored.active.is_some()) {
        if layers::is_whole(session, target)? {
            let columns = columns(session, &base_table(table))?;
            if !is_made_anew(target, &columns, Some(layered), &wanted.key)? {
                let fits = layered.key == wanted.key && layered.definition == wanted.definition;
                let fits = fits && layered.shape == wanted.shape && has_columns(target, &columns)?;
                // What cannot be followed is refused by the way of plain tables.
                return Ok(if fits { Prepared::Ready } else { Prepared::Layered });
            }
        }
        layers::drop_layers(session, target)?;
        layered.active = None;
    }
    prepare_plain(session, target, &wanted, stored)?;
    Ok(Prepared::Ready)
}

fn prepare_plain(session: &Session, target: &Target, wanted: &Written, stored: Option<Written>) -> Result<()> {
    let table = &*target.projection;
    let mut columns = columns(session, table)?;
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
        Some(stored) if stored.shape != NO_SHAPE => {
            let differs = stored.definition != wanted.definition;
            stored.follow(session, wanted, table)?;
            match differs && target.shape == TargetShape::Versions && !target.keeps_tombstones {
                true => end_tombstones(session, table),
                false => Ok(()),
            }
        }
        _ if !is_new && !is_empty(session, table)? => {
            Err(target_mismatch(table, "it stands already and no projection has written it".into()))
        }
        Some(_) => wanted.update(session, table),
        None => {
            let values = [text(table), text(&wanted.shape), text(&wanted.key), text(&wanted.definition)];
            session.execute(INSERT_METADATA, &values, METADATA).map(|_| ())
        }
    }
}

/// Names and types of the table's columns, in order; none without the table.
pub(super) fn columns(session: &Session, table: &str) -> Result<Vec<(String, String)>> {
    session.rows(SELECT_COLUMNS, &[text(table)], table, |row| Ok((row.get(0)?, row.get(1)?)))
}

fn has_columns(target: &Target, columns: &[(String, String)]) -> Result<bool> {
    for field in &table_fields(target) {
        let wanted = described_type(field.data_type())?;
        if !columns.iter().any(|(name, stored)| name.eq_ignore_ascii_case(field.name()) && *stored == wanted) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Equality of the key in `left` and `right`; the join that DuckDB makes best where no key is null.
pub(super) fn same_key(target: &Target, left: &str, right: &str) -> String {
    let equal = |name: &String| {
        let nullable = target.columns.field_with_name(name).map_or(true, |field| field.is_nullable());
        let comparison = if nullable { "is not distinct from" } else { "=" };
        let name = quote_name(name);
        format!("{left}.{name} {comparison} {right}.{name}")
    };
    target.key.iter().map(equal).collect::<Vec<_>>().join(" and ")
}

/// What a target was written as.
struct Written {
    shape: String,
    key: String,
    definition: String,
    active: Option<Side>,
}

impl Written {
    fn wanted(target: &Target) -> Self {
        let (shape, key) = (shape_name(&target.shape).to_string(), serde_json::json!(target.key).to_string());
        Self { shape, key, definition: target.definition.clone(), active: None }
    }

    fn stored(session: &Session, table: &str) -> Result<Option<Self>> {
        let stored = session.rows(SELECT_SHAPE, &[text(table)], METADATA, |row| {
            let definition: Option<String> = row.get(2)?;
            let active: Option<String> = row.get(3)?;
            Ok(Self {
                shape: row.get(0)?,
                key: row.get(1)?,
                definition: definition.unwrap_or_default(),
                active: active.as_deref().and_then(Side::named),
            })
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

/// Rows are derived whole from state: where a projection wrote them, and their key, or a column's name or type, is another
/// now, they are made anew, and so where a column does not come any more: it would be left as it was. Columns that are
/// new are added. Versions are kept: nothing else may hold what they do.
fn is_made_anew(target: &Target, columns: &[(String, String)], stored: Option<&Written>, key: &str) -> Result<bool> {
    let rows = shape_name(&TargetShape::Rows);
    let Some(stored) = stored.filter(|_| !columns.is_empty()) else { return Ok(false) };
    if stored.shape != rows || shape_name(&target.shape) != rows {
        return Ok(false);
    }
    if stored.key != key {
        return Ok(true);
    }
    let mut wanted = Vec::new();
    for field in &table_fields(target) {
        wanted.push((field.name().clone(), described_type(field.data_type())?));
    }
    Ok(columns.iter().any(|column| !wanted.contains(column)))
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

/// How a projection stands when a commit begins.
pub(super) struct Standing {
    pub checkpoint: Option<Positions>,
    pub next_surrogate_key: i64,
    pub active: Option<Side>,
    pub metadata: Taken,
    pub checkpoints: Taken,
}

/// Takes the control rows of a projection out: two writers meet there, and the second one fails before it has read any rows.
/// `None`: the target was never prepared.
pub(super) fn take_standing(session: &Session, projection: &str) -> Result<Option<Standing>> {
    let whose = [text(projection)];
    let metadata = Taken::take(session, METADATA_TABLE, "projection_name = ?", &whose)?;
    if metadata.rows() == 0 {
        return Ok(None);
    }
    let checkpoints = Taken::take(session, CHECKPOINTS_TABLE, "projection_name = ?", &whose)?;
    let next_surrogate_key =
        metadata.column("next_surrogate_key").find_map(|keys| keys.as_primitive_opt::<Int64Type>());
    let active = metadata.column("active_layer").find_map(|layers| layers.as_string_opt::<i32>());
    let active = active.filter(|layers| layers.is_valid(0)).and_then(|layers| Side::named(layers.value(0)));
    let positions = taken_positions(&checkpoints)?;
    Ok(Some(Standing {
        next_surrogate_key: next_surrogate_key.map_or(1, |keys| keys.value(0)),
        checkpoint: (!positions.is_empty()).then_some(positions),
        active,
        metadata,
        checkpoints,
    }))
}

fn taken_positions(taken: &Taken) -> Result<Positions> {
    let names = |column| taken.column(column).filter_map(|array| array.as_string_opt::<i32>());
    let bytes = |column| taken.column(column).filter_map(|array| array.as_binary_opt::<i32>());
    let ids = names("source_name").zip(names("instance_name"));
    let mut positions = Positions::new();
    for ((sources, instances), (lsns, seqs)) in ids.zip(bytes("last_consumed_lsn").zip(bytes("last_seq"))) {
        for row in 0..sources.len() {
            let id = CaptureId::new(sources.value(row), instances.value(row));
            positions.insert(id, Position::from_slices(lsns.value(row), seqs.value(row))?);
        }
    }
    if positions.len() != taken.rows() {
        let cause = "a row has columns of other types than this program writes";
        return Err(Error::new(ErrorKind::Corrupt, "read", CHECKPOINTS, cause));
    }
    Ok(positions)
}

pub(super) fn checkpoint(session: &Session, projection: &str) -> Result<Option<Checkpoint>> {
    session.transaction(CHECKPOINTS, |session| {
        let Some(positions) = positions(session, projection)? else { return Ok(None) };
        let times = session.rows(SELECT_AS_OF, &[text(projection)], METADATA, |row| get_time(row, 0))?;
        Ok(Some(Checkpoint { positions, as_of_time: times.first().copied().flatten().unwrap_or_default() }))
    })
}

/// Puts the taken rows back as `next` says, within the caller's transaction.
pub(super) fn put_checkpoint(
    session: &Session,
    projection: &str,
    taken: Taken,
    stored: Option<&Positions>,
    next: &Positions,
) -> Result<()> {
    let set = |position: &Position| {
        let [lsn, seq] = position_values(position);
        [("last_consumed_lsn", lsn), ("last_seq", seq), ("updated_at", time(now()))]
    };
    if let Some(position) = stored.and_then(|stored| one_position(stored, next)) {
        return taken.put(session, &set(&position));
    }
    taken.put(session, &[])?;
    let is_standing = |id: &CaptureId| stored.is_some_and(|stored| stored.contains_key(id));
    for (id, position) in next.iter().filter(|(id, _)| is_standing(id)) {
        let condition = "projection_name = ? and source_name = ? and instance_name = ?";
        let values = [text(projection), text(&id.source), text(&id.instance)];
        rewrite(session, CHECKPOINTS_TABLE, &set(position), condition, &values)?;
    }
    let mut sources: Vec<&str> = next.keys().map(|id| &*id.source).collect();
    sources.dedup();
    for (id, position) in next.iter().filter(|(id, _)| !is_standing(id)) {
        let shown = if sources.len() > 1 { id.to_string() } else { id.instance.to_string() };
        let [lsn, seq] = position_values(position);
        let (source, instance) = (text(&id.source), text(&id.instance));
        let values = [lsn, seq, source, instance, time(now()), text(projection), text(&shown)];
        session.execute(INSERT_CHECKPOINT, &values, CHECKPOINTS)?;
    }
    for id in stored.into_iter().flat_map(Positions::keys).filter(|id| !next.contains_key(*id)) {
        let values = [text(projection), text(&id.source), text(&id.instance)];
        session.execute(DELETE_CHECKPOINT, &values, CHECKPOINTS)?;
    }
    Ok(())
}

/// Where all captures are in `next`, if that is one position and the captures are those that stand already.
fn one_position(stored: &Positions, next: &Positions) -> Option<Position> {
    let first = *next.values().next()?;
    (stored.keys().eq(next.keys()) && next.values().all(|position| *position == first)).then_some(first)
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
