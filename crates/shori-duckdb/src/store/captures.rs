//! Control rows of captures: what the log knows of each, and the shape of its staging table.

use std::collections::BTreeMap;
use std::sync::Arc;

use duckdb::types::Value;
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::{CaptureInfo, SnapshotProgress, SnapshotState};
use shori_core::store::CaptureState;
use shori_core::{Error, ErrorKind, Result};

use super::layout;
use super::session::{Session, blob, get_position, get_time, now, position_values, text, time};
use crate::database::quote_name;
use crate::types::duckdb_type;

const CAPTURES: &str = "the log's captures";

const SELECT_CAPTURES: &str = "
select w.source_name, w.capture_instance, w.timeline, w.identity, w.staging_table, w.staging_columns, w.table_schema,
    w.schema_forgotten, w.failed_reason, w.last_ingested_lsn, w.last_seq, w.boundary_lsn, w.boundary_seq,
    w.boundary_time, coalesce(h.horizon_lsn, ''::blob), coalesce(h.horizon_seq, ''::blob)
from ctl_ingestion_watermarks w
left join ctl_horizons h using (source_name, capture_instance)";

const SELECT_SNAPSHOTS: &str = "
select source_name, capture_instance, generation, state, start_lsn, start_seq, end_lsn, end_seq, end_time, row_count,
    resume
from ctl_snapshots
order by generation";

const INSERT_CAPTURE: &str = "
insert into ctl_ingestion_watermarks
values (?, ?, ''::blob, ?, ''::blob, ''::blob, ''::blob, ?, ?, ?, ?, ?, ?, false, null)";

const UPDATE_SCHEMA: &str = "
update ctl_ingestion_watermarks
set staging_columns = ?, table_schema = ?, schema_forgotten = false, updated_at = ?
where source_name = ? and capture_instance = ?";

const UPDATE_SNAPSHOT: &str = "
update ctl_snapshots
set state = ?, start_lsn = ?, start_seq = ?, end_lsn = ?, end_seq = ?, end_time = ?, row_count = ?, resume = ?,
    updated_at = ?
where source_name = ? and capture_instance = ? and generation = ?";

const INSERT_SNAPSHOT: &str = "
insert into ctl_snapshots
    (state, start_lsn, start_seq, end_lsn, end_seq, end_time, row_count, resume, updated_at, source_name,
     capture_instance, generation)
values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

const SET_FAILED: &str = "
update ctl_ingestion_watermarks
set failed_reason = ?, schema_forgotten = schema_forgotten or ?, updated_at = ?
where source_name = ? and capture_instance = ?";

const INSERT_HORIZON: &str = "
insert into ctl_horizons
values (?, ?, ?, ?, ?)";

const UPDATE_HORIZON: &str = "
update ctl_horizons
set horizon_lsn = ?, horizon_seq = ?, updated_at = ?
where source_name = ? and capture_instance = ?";

/// A capture's control row.
#[derive(Clone)]
pub(super) struct Capture {
    pub id: CaptureId,
    pub timeline: String,
    identity: String,
    pub staging_table: String,
    /// The source's columns in the order in which they came to the staging table.
    pub staging_columns: Vec<String>,
    pub schema: Arc<TableSchema>,
    schema_forgotten: bool,
    failed: Option<String>,
    pub watermark: Watermark,
    pub horizon: Position,
}

pub(super) fn id_values(id: &CaptureId) -> [Value; 2] {
    [text(&id.source), text(&id.instance)]
}

fn read_capture(row: &duckdb::Row<'_>) -> duckdb::Result<(Capture, String, String)> {
    let (source, instance): (String, String) = (row.get(0)?, row.get(1)?);
    let capture = Capture {
        id: CaptureId::new(&source, &instance),
        timeline: row.get(2)?,
        identity: row.get(3)?,
        staging_table: row.get(4)?,
        staging_columns: Vec::new(),
        schema: no_schema(),
        schema_forgotten: row.get(7)?,
        failed: row.get(8)?,
        watermark: Watermark {
            staged: get_position(row, 9)?,
            boundary: get_position(row, 11)?,
            boundary_time: get_time(row, 13)?.unwrap_or_default(),
        },
        horizon: get_position(row, 14)?,
    };
    Ok((capture, row.get(5)?, row.get(6)?))
}

/// Stands in until the stored schema has been decoded.
fn no_schema() -> Arc<TableSchema> {
    Arc::new(TableSchema { table: "".into(), columns: Arc::new(arrow::datatypes::Schema::empty()), key: Vec::new() })
}

fn decode(rows: Vec<(Capture, String, String)>) -> Result<Vec<Capture>> {
    let decode_one = |(mut capture, columns, schema): (Capture, String, String)| {
        capture.schema = Arc::new(TableSchema::from_json(&schema)?);
        capture.staging_columns = serde_json::from_str(&columns)
            .map_err(|cause| Error::new(ErrorKind::Corrupt, "read", format!("the columns of {}", capture.id), cause))?;
        Ok(capture)
    };
    rows.into_iter().map(decode_one).collect()
}

pub(super) fn all(session: &Session) -> Result<Vec<Capture>> {
    decode(session.rows(SELECT_CAPTURES, &[], CAPTURES, read_capture)?)
}

/// Fails when the log does not know the capture.
pub(super) fn one(session: &Session, id: &CaptureId) -> Result<Capture> {
    let sql = format!("{SELECT_CAPTURES} where w.source_name = ? and w.capture_instance = ?");
    let found = decode(session.rows(&sql, &id_values(id), CAPTURES, read_capture)?)?;
    found.into_iter().next().ok_or_else(|| unknown(id))
}

pub(super) fn unknown(id: &CaptureId) -> Error {
    Error::new(ErrorKind::Internal, "find", format!("capture {id}"), "the log does not know it")
}

/// Per capture, its snapshots by generation.
pub(super) fn snapshots(session: &Session) -> Result<BTreeMap<CaptureId, Vec<SnapshotProgress>>> {
    let rows = session.rows(SELECT_SNAPSHOTS, &[], "snapshot progress", |row| {
        let (source, instance, state): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(3)?);
        let progress = SnapshotProgress {
            generation: row.get::<_, i64>(2)? as u32,
            state: match state.as_str() {
                "requested" => SnapshotState::Requested,
                "running" => SnapshotState::Running,
                _ => SnapshotState::Done,
            },
            start: get_position(row, 4)?,
            end: get_position(row, 6)?,
            end_time: get_time(row, 8)?.unwrap_or_default(),
            rows: row.get::<_, i64>(9)? as u64,
            resume: row.get(10)?,
        };
        Ok((CaptureId::new(&source, &instance), progress))
    })?;
    let mut by_capture: BTreeMap<CaptureId, Vec<SnapshotProgress>> = BTreeMap::new();
    for (id, progress) in rows {
        by_capture.entry(id).or_default().push(progress);
    }
    Ok(by_capture)
}

pub(super) fn states(session: &Session) -> Result<BTreeMap<CaptureId, CaptureState>> {
    session.transaction(CAPTURES, |session| {
        let mut snapshots = snapshots(session)?;
        let mut states = BTreeMap::new();
        for capture in all(session)? {
            let mut earlier = snapshots.remove(&capture.id).unwrap_or_default();
            let newest = earlier.pop().unwrap_or_else(|| SnapshotProgress::requested(1));
            earlier.retain(|progress| progress.is_done() && progress.end > capture.horizon);
            let state = CaptureState {
                timeline: capture.timeline.as_str().into(),
                schema: capture.schema.clone(),
                watermark: capture.watermark,
                snapshot: newest,
                earlier_snapshots: earlier,
                horizon: capture.horizon,
                failed: capture.failed.clone(),
                schema_forgotten: capture.schema_forgotten,
            };
            states.insert(capture.id, state);
        }
        Ok(states)
    })
}

pub(super) fn prepare(session: &Session, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
    session.transaction(CAPTURES, |session| {
        let mut known = all(session)?;
        let replaced = known.iter().find(|capture| capture.timeline == timeline && capture.identity != identity);
        if let Some(capture) = replaced {
            return Err(source_replaced(timeline, &capture.identity, identity));
        }
        for info in captures {
            match known.iter().find(|capture| capture.id == info.id) {
                Some(capture) if capture.identity != identity => {
                    return Err(source_replaced(timeline, &capture.identity, identity));
                }
                Some(capture) => take_schema(session, capture, &info.schema)?,
                None => {
                    let created = create(session, timeline, identity, info, &known)?;
                    known.push(created);
                }
            }
        }
        Ok(())
    })
}

fn source_replaced(timeline: &str, stored: &str, given: &str) -> Error {
    let cause = format!("the log was read from {stored}, and this is {given}");
    Error::new(ErrorKind::SourceReplaced, "capture", format!("timeline {timeline}"), cause)
        .with_remedy("connect to the former source, or start with a new store")
}

fn create(session: &Session, timeline: &str, identity: &str, info: &CaptureInfo, known: &[Capture]) -> Result<Capture> {
    let staging_table = staging_table(info, known);
    let fields = info.schema.columns.fields().iter().map(|field| field.as_ref());
    session.batch(&layout::create_staging_table(&staging_table, fields)?, &staging_table)?;
    let staging_columns = column_names(&info.schema);
    let [source, instance] = id_values(&info.id);
    let values = [
        source,
        instance,
        time(now()),
        time(0),
        text(timeline),
        text(identity),
        text(&staging_table),
        text(&serde_json::json!(staging_columns).to_string()),
        text(&info.schema.to_json()),
    ];
    session.execute(INSERT_CAPTURE, &values, CAPTURES)?;
    put_snapshot(session, &info.id, &SnapshotProgress::requested(1))?;
    Ok(Capture {
        id: info.id.clone(),
        timeline: timeline.to_string(),
        identity: identity.to_string(),
        staging_table,
        staging_columns,
        schema: info.schema.clone(),
        schema_forgotten: false,
        failed: None,
        watermark: Watermark::ZERO,
        horizon: Position::ZERO,
    })
}

fn column_names(schema: &TableSchema) -> Vec<String> {
    schema.columns.fields().iter().map(|field| field.name().clone()).collect()
}

/// The table's name alone where it is free, else with as much of the capture as it takes.
fn staging_table(info: &CaptureInfo, known: &[Capture]) -> String {
    let (source, instance, table) = (&info.id.source, &info.id.instance, &info.schema.table);
    let names =
        [format!("stg_cdc_{table}"), format!("stg_cdc_{source}_{table}"), format!("stg_cdc_{source}_{instance}")];
    let is_free = |name: &String| !known.iter().any(|capture| capture.staging_table.eq_ignore_ascii_case(name));
    let longest = format!("stg_cdc_{source}_{instance}_{}", known.len());
    names.into_iter().find(is_free).unwrap_or(longest)
}

/// Makes the staging table take images of `next`, and keeps it as the capture's schema.
pub(super) fn take_schema(session: &Session, capture: &Capture, next: &Arc<TableSchema>) -> Result<()> {
    let table = quote_name(&capture.staging_table);
    let mut columns = capture.staging_columns.clone();
    if capture.schema_forgotten {
        let fields = next.columns.fields().iter().map(|field| field.as_ref());
        session.batch(&format!("drop table if exists {table}"), &capture.staging_table)?;
        session.batch(&layout::create_staging_table(&capture.staging_table, fields)?, &capture.staging_table)?;
        columns = column_names(next);
    } else {
        match capture.schema.change_to(next) {
            SchemaChange::Same if capture.schema.to_json() == next.to_json() => return Ok(()),
            SchemaChange::Same => {}
            SchemaChange::Incompatible { reason } => {
                return Err(Error::new(ErrorKind::Schema, "capture", format!("table {}", next.table), reason)
                    .with_remedy(format!("run shori resnapshot --retyped {}", next.table)));
            }
            SchemaChange::Evolved { added, .. } => {
                for field in added {
                    add_column(session, &table, &mut columns, field.name(), &duckdb_type(field.data_type())?)?;
                }
            }
        }
    }
    let [source, instance] = id_values(&capture.id);
    let columns = serde_json::json!(columns).to_string();
    let values = [text(&columns), text(&next.to_json()), time(now()), source, instance];
    session.execute(UPDATE_SCHEMA, &values, CAPTURES)?;
    Ok(())
}

/// A column that was dropped and comes back is another one: the former values move aside.
fn add_column(session: &Session, table: &str, columns: &mut Vec<String>, name: &str, duckdb_type: &str) -> Result<()> {
    let column = layout::staging_column(name);
    if let Some(index) = columns.iter().position(|known| known.eq_ignore_ascii_case(name)) {
        let aside = format!("{name}__dropped_{}", columns.len());
        let former = quote_name(&layout::staging_column(&columns[index]));
        session.batch(&format!("alter table {table} rename column {former} to {}", quote_name(&aside)), table)?;
        columns[index] = aside;
    }
    session.batch(&format!("alter table {table} add column {} {duckdb_type}", quote_name(&column)), table)?;
    columns.push(name.to_string());
    Ok(())
}

pub(super) fn put_snapshot(session: &Session, id: &CaptureId, progress: &SnapshotProgress) -> Result<()> {
    let state = match progress.state {
        SnapshotState::Requested => "requested",
        SnapshotState::Running => "running",
        SnapshotState::Done => "done",
    };
    let [start_lsn, start_seq] = position_values(&progress.start);
    let [end_lsn, end_seq] = position_values(&progress.end);
    let [source, instance] = id_values(id);
    let values = [
        text(state),
        start_lsn,
        start_seq,
        end_lsn,
        end_seq,
        time(progress.end_time),
        Value::BigInt(progress.rows as i64),
        blob(&progress.resume),
        time(now()),
        source,
        instance,
        Value::BigInt(i64::from(progress.generation)),
    ];
    if session.execute(UPDATE_SNAPSHOT, &values, "snapshot progress")? == 0 {
        session.execute(INSERT_SNAPSHOT, &values, "snapshot progress")?;
    }
    Ok(())
}

pub(super) fn request_snapshot(session: &Session, id: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
    session.transaction("snapshot progress", |session| {
        let capture = one(session, id)?;
        let newest = snapshots(session)?.get(id).and_then(|known| known.last().map(|newest| newest.generation));
        let progress = SnapshotProgress::requested(newest.unwrap_or(0) + 1);
        put_snapshot(session, id, &progress)?;
        let [source, instance] = id_values(id);
        session.execute(
            SET_FAILED,
            &[Value::Null, Value::Boolean(retyped), time(now()), source, instance],
            CAPTURES,
        )?;
        if retyped {
            let table = &capture.staging_table;
            session.batch(&format!("delete from {}", quote_name(table)), table)?;
        }
        Ok(progress)
    })
}

pub(super) fn put_horizon(session: &Session, id: &CaptureId, horizon: &Position) -> Result<()> {
    let [source, instance] = id_values(id);
    let [lsn, seq] = position_values(horizon);
    let values = [lsn.clone(), seq.clone(), time(now()), source.clone(), instance.clone()];
    if session.execute(UPDATE_HORIZON, &values, CAPTURES)? == 0 {
        session.execute(INSERT_HORIZON, &[source, instance, lsn, seq, time(now())], CAPTURES)?;
    }
    Ok(())
}

pub(super) fn mark_failed(session: &Session, id: &CaptureId, reason: &str) -> Result<()> {
    let [source, instance] = id_values(id);
    let values = [text(reason), Value::Boolean(false), time(now()), source, instance];
    let known = session.transaction(CAPTURES, |session| session.execute(SET_FAILED, &values, CAPTURES))?;
    if known == 0 { Err(unknown(id)) } else { Ok(()) }
}
