//! Control rows of captures: what the log knows of each, and the shape of its staging table.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::Field;
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::{CaptureInfo, SnapshotProgress, SnapshotState};
use shori_core::store::CaptureState;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::Row;

use super::layout;
use super::session::{Link, Time, get_position, lock_name, now, storable};
use crate::connect::quoted;

const CAPTURES: &str = "the log's captures";
const SNAPSHOTS: &str = "snapshot progress";

const SELECT_CAPTURES: &str = "
select w.source_name, w.capture_instance, w.timeline, w.identity, w.staging_table, w.staging_columns, w.table_schema,
    w.schema_forgotten, w.failed_reason, w.last_ingested_lsn, w.last_seq, w.boundary_lsn, w.boundary_seq,
    w.boundary_time, coalesce(h.horizon_lsn, ''), coalesce(h.horizon_seq, '')
from ctl_ingestion_watermarks w
left join ctl_horizons h using (source_name, capture_instance)
order by w.source_name, w.capture_instance";

const SELECT_CAPTURE: &str = "
select w.source_name, w.capture_instance, w.timeline, w.identity, w.staging_table, w.staging_columns, w.table_schema,
    w.schema_forgotten, w.failed_reason, w.last_ingested_lsn, w.last_seq, w.boundary_lsn, w.boundary_seq,
    w.boundary_time, coalesce(h.horizon_lsn, ''), coalesce(h.horizon_seq, '')
from ctl_ingestion_watermarks w
left join ctl_horizons h using (source_name, capture_instance)
where w.source_name = $1 and w.capture_instance = $2";

/// Before a row that is decided by is read: another writer is waited for.
const LOCK_CAPTURE: &str = "
select 1
from ctl_ingestion_watermarks
where source_name = $1 and capture_instance = $2
for update";

const SELECT_SNAPSHOTS: &str = "
select source_name, capture_instance, generation, state, start_lsn, start_seq, end_lsn, end_seq, end_time, row_count,
    resume
from ctl_snapshots
order by generation";

const INSERT_CAPTURE: &str = "
insert into ctl_ingestion_watermarks
    (source_name, capture_instance, last_ingested_lsn, updated_at, last_seq, boundary_lsn, boundary_seq, boundary_time,
     timeline, identity, staging_table, staging_columns, table_schema, schema_forgotten)
values ($1, $2, '', $3, '', '', '', $4, $5, $6, $7, $8, $9, false)";

const UPDATE_SCHEMA: &str = "
update ctl_ingestion_watermarks
set staging_columns = $1, table_schema = $2, schema_forgotten = false, updated_at = $3
where source_name = $4 and capture_instance = $5";

/// Progress of a generation that is not the newest any more is of no use.
const PUT_SNAPSHOT: &str = "
insert into ctl_snapshots
    (source_name, capture_instance, generation, state, start_lsn, start_seq, end_lsn, end_seq, end_time, row_count,
     resume, updated_at)
select $1::text, $2::text, $3::bigint, $4::text, $5::bytea, $6::bytea, $7::bytea, $8::bytea, $9::timestamp,
    $10::bigint, $11::bytea, $12::timestamp
where not exists (
    select 1
    from ctl_snapshots newer
    where newer.source_name = $1 and newer.capture_instance = $2 and newer.generation > $3
)
on conflict (source_name, capture_instance, generation) do update
set state = excluded.state, start_lsn = excluded.start_lsn, start_seq = excluded.start_seq,
    end_lsn = excluded.end_lsn, end_seq = excluded.end_seq, end_time = excluded.end_time,
    row_count = excluded.row_count, resume = excluded.resume, updated_at = excluded.updated_at";

const SELECT_GENERATION: &str = "
select coalesce(max(generation), 0)
from ctl_snapshots
where source_name = $1 and capture_instance = $2";

const SET_FAILED: &str = "
update ctl_ingestion_watermarks
set failed_reason = $1, schema_forgotten = schema_forgotten or $2, updated_at = $3
where source_name = $4 and capture_instance = $5";

const PUT_HORIZON: &str = "
insert into ctl_horizons
    (source_name, capture_instance, horizon_lsn, horizon_seq, updated_at)
values ($1, $2, $3, $4, $5)
on conflict (source_name, capture_instance) do update
set horizon_lsn = excluded.horizon_lsn, horizon_seq = excluded.horizon_seq, updated_at = excluded.updated_at";

/// A capture's control row.
#[derive(Clone)]
pub(super) struct Capture {
    pub id: CaptureId,
    timeline: String,
    identity: String,
    pub staging_table: String,
    /// The source's columns in the order in which they came to the staging table.
    pub staging_columns: Vec<String>,
    pub schema: Arc<TableSchema>,
    schema_forgotten: bool,
    failed: Option<String>,
    watermark: Watermark,
    pub horizon: Position,
}

fn capture(row: &Row) -> Result<Capture> {
    let id = CaptureId::new(row.get(0), row.get(1));
    let staging_columns = serde_json::from_str(row.get(5))
        .map_err(|cause| Error::new(ErrorKind::Corrupt, "read", format!("the columns of {id}"), cause))?;
    Ok(Capture {
        id,
        timeline: row.get(2),
        identity: row.get(3),
        staging_table: row.get(4),
        staging_columns,
        schema: Arc::new(TableSchema::from_json(row.get(6))?),
        schema_forgotten: row.get(7),
        failed: row.get(8),
        watermark: Watermark {
            staged: get_position(row, 9)?,
            boundary: get_position(row, 11)?,
            boundary_time: row.get::<_, Time>(13).0,
        },
        horizon: get_position(row, 14)?,
    })
}

async fn all(link: &Link) -> Result<Vec<Capture>> {
    link.rows(SELECT_CAPTURES, &[], CAPTURES).await?.iter().map(capture).collect()
}

/// Fails when the log does not know the capture.
pub(super) async fn one(link: &Link, id: &CaptureId) -> Result<Capture> {
    let rows = link.rows(SELECT_CAPTURE, &[&&*id.source, &&*id.instance], CAPTURES).await?;
    rows.first().map(capture).unwrap_or_else(|| Err(unknown(id)))
}

pub(super) fn unknown(id: &CaptureId) -> Error {
    Error::new(ErrorKind::Internal, "find", format!("capture {id}"), "the log does not know it")
}

/// Per capture, its snapshots by generation.
pub(super) async fn snapshots(link: &Link) -> Result<BTreeMap<CaptureId, Vec<SnapshotProgress>>> {
    let mut by_capture: BTreeMap<CaptureId, Vec<SnapshotProgress>> = BTreeMap::new();
    for row in link.rows(SELECT_SNAPSHOTS, &[], SNAPSHOTS).await? {
        let progress = SnapshotProgress {
            generation: row.get::<_, i64>(2) as u32,
            state: match row.get::<_, &str>(3) {
                "requested" => SnapshotState::Requested,
                "running" => SnapshotState::Running,
                _ => SnapshotState::Done,
            },
            start: get_position(&row, 4)?,
            end: get_position(&row, 6)?,
            end_time: row.get::<_, Time>(8).0,
            rows: row.get::<_, i64>(9) as u64,
            resume: row.get(10),
        };
        by_capture.entry(CaptureId::new(row.get(0), row.get(1))).or_default().push(progress);
    }
    Ok(by_capture)
}

/// Both queries see one state of the log, in a transaction of isolation level repeatable read.
pub(super) async fn states(link: &Link) -> Result<BTreeMap<CaptureId, CaptureState>> {
    link.run("set transaction isolation level repeatable read, read only", CAPTURES).await?;
    let mut snapshots = snapshots(link).await?;
    let mut states = BTreeMap::new();
    for capture in all(link).await? {
        let mut earlier = snapshots.remove(&capture.id).unwrap_or_default();
        let newest = earlier.pop().unwrap_or_else(|| SnapshotProgress::requested(1));
        earlier.retain(|progress| progress.is_done() && progress.end > capture.horizon);
        let state = CaptureState {
            timeline: capture.timeline.as_str().into(),
            schema: capture.schema,
            watermark: capture.watermark,
            snapshot: newest,
            earlier_snapshots: earlier,
            horizon: capture.horizon,
            failed: capture.failed,
            schema_forgotten: capture.schema_forgotten,
        };
        states.insert(capture.id, state);
    }
    Ok(states)
}

pub(super) async fn prepare(
    link: &Link,
    schema: &str,
    timeline: &str,
    identity: &str,
    captures: &[CaptureInfo],
) -> Result<()> {
    lock_shapes(link, schema).await?;
    let mut known = all(link).await?;
    if let Some(capture) = known.iter().find(|known| known.timeline == timeline && known.identity != identity) {
        return Err(source_replaced(timeline, &capture.identity, identity));
    }
    for info in captures {
        match known.iter().find(|capture| capture.id == info.id) {
            Some(capture) if capture.identity != identity => {
                return Err(source_replaced(timeline, &capture.identity, identity));
            }
            Some(_) => {
                link.rows(LOCK_CAPTURE, &[&&*info.id.source, &&*info.id.instance], CAPTURES).await?;
                take_schema(link, &one(link, &info.id).await?, &info.schema).await?;
            }
            None => {
                create(link, timeline, identity, info, &known).await?;
                known.push(one(link, &info.id).await?);
            }
        }
    }
    Ok(())
}

/// One at a time makes tables: who comes second sees what the first has made.
pub(super) async fn lock_shapes(link: &Link, schema: &str) -> Result<()> {
    let sql = format!("select pg_advisory_xact_lock(hashtextextended({}, 0))", lock_name(schema, "shapes"));
    link.run(&sql, "the lock of the store's tables").await.map(drop)
}

fn source_replaced(timeline: &str, stored: &str, given: &str) -> Error {
    let cause = format!("the log was read from {stored}, and this is {given}");
    Error::new(ErrorKind::SourceReplaced, "capture", format!("timeline {timeline}"), cause)
        .with_remedy("connect to the former source, or start with a new store")
}

async fn create(link: &Link, timeline: &str, identity: &str, info: &CaptureInfo, known: &[Capture]) -> Result<()> {
    let staging_table = staging_table(info, known);
    link.run(&layout::create_staging_table(&staging_table, fields(&info.schema))?, &staging_table).await?;
    let columns = serde_json::json!(column_names(&info.schema)).to_string();
    let (source, instance, now) = (&*info.id.source, &*info.id.instance, Time(now()));
    let schema = info.schema.to_json();
    link.execute(
        INSERT_CAPTURE,
        &[&source, &instance, &now, &Time(0), &timeline, &identity, &staging_table, &columns, &schema],
        CAPTURES,
    )
    .await?;
    put_snapshot(link, &info.id, &SnapshotProgress::requested(1)).await
}

fn fields(schema: &TableSchema) -> impl Iterator<Item = &Field> {
    schema.columns.fields().iter().map(|field| field.as_ref())
}

fn column_names(schema: &TableSchema) -> Vec<&str> {
    fields(schema).map(|field| field.name().as_str()).collect()
}

/// The table's name alone where it is free, else with as much of the capture as it takes.
fn staging_table(info: &CaptureInfo, known: &[Capture]) -> String {
    let (source, instance, table) = (&info.id.source, &info.id.instance, &info.schema.table);
    let names =
        [format!("stg_cdc_{table}"), format!("stg_cdc_{source}_{table}"), format!("stg_cdc_{source}_{instance}")];
    let is_free = |name: &String| !known.iter().any(|capture| capture.staging_table == *name);
    let longest = format!("stg_cdc_{source}_{instance}_{}", known.len());
    names.into_iter().find(is_free).unwrap_or(longest)
}

/// Makes the staging table take images of `next`, and keeps it as the capture's schema. The capture's row is locked.
pub(super) async fn take_schema(link: &Link, capture: &Capture, next: &Arc<TableSchema>) -> Result<()> {
    let table = quoted(&capture.staging_table);
    let mut columns = capture.staging_columns.clone();
    if capture.schema_forgotten {
        let create = layout::create_staging_table(&capture.staging_table, fields(next))?;
        link.run(&format!("drop table if exists {table}; {create}"), &capture.staging_table).await?;
        columns = column_names(next).into_iter().map(String::from).collect();
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
                    add_column(link, &capture.staging_table, &mut columns, &field).await?;
                }
            }
        }
    }
    let columns = serde_json::json!(columns).to_string();
    let (source, instance) = (&*capture.id.source, &*capture.id.instance);
    link.execute(UPDATE_SCHEMA, &[&columns, &next.to_json(), &Time(now()), &source, &instance], CAPTURES)
        .await
        .map(drop)
}

/// A column that was dropped and comes back is another one: the former values move aside.
async fn add_column(link: &Link, table: &str, columns: &mut Vec<String>, field: &Field) -> Result<()> {
    let alter = format!("alter table {}", quoted(table));
    if let Some(index) = columns.iter().position(|known| known == field.name()) {
        let aside = layout::with_suffix(field.name(), &format!("__dropped_{}", columns.len()));
        let former = quoted(&layout::staging_column(&columns[index]));
        link.run(&format!("{alter} rename column {former} to {}", quoted(&aside)), table).await?;
        columns[index] = aside;
    }
    link.run(&format!("{alter} add column {}", layout::staging_definition(table, field)?), table).await?;
    columns.push(field.name().clone());
    Ok(())
}

pub(super) async fn put_snapshot(link: &Link, id: &CaptureId, progress: &SnapshotProgress) -> Result<()> {
    let state = match progress.state {
        SnapshotState::Requested => "requested",
        SnapshotState::Running => "running",
        SnapshotState::Done => "done",
    };
    link.execute(
        PUT_SNAPSHOT,
        &[
            &&*id.source,
            &&*id.instance,
            &i64::from(progress.generation),
            &state,
            &progress.start.lsn.as_slice(),
            &progress.start.seq.as_slice(),
            &progress.end.lsn.as_slice(),
            &progress.end.seq.as_slice(),
            &Time(progress.end_time),
            &i64::try_from(progress.rows).unwrap_or(i64::MAX),
            &progress.resume,
            &Time(now()),
        ],
        SNAPSHOTS,
    )
    .await
    .map(drop)
}

pub(super) async fn request_snapshot(link: &Link, id: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
    let (source, instance) = (&*id.source, &*id.instance);
    if link.rows(LOCK_CAPTURE, &[&source, &instance], CAPTURES).await?.is_empty() {
        return Err(unknown(id));
    }
    let newest = link.rows(SELECT_GENERATION, &[&source, &instance], SNAPSHOTS).await?;
    let newest: i64 = newest.first().map_or(0, |row| row.get(0));
    let progress = SnapshotProgress::requested(newest as u32 + 1);
    put_snapshot(link, id, &progress).await?;
    set_failed(link, id, None, retyped).await?;
    if retyped {
        let table = one(link, id).await?.staging_table;
        // Readers that have begun see what was there, which they would not after a truncation.
        link.run(&format!("set local statement_timeout = 0; delete from {}", quoted(&table)), &table).await?;
    }
    Ok(progress)
}

async fn set_failed(link: &Link, id: &CaptureId, reason: Option<&str>, retyped: bool) -> Result<u64> {
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&reason.map(storable), &retyped, &Time(now()), &&*id.source, &&*id.instance];
    link.execute(SET_FAILED, &values, CAPTURES).await
}

pub(super) async fn mark_failed(link: &Link, id: &CaptureId, reason: &str) -> Result<()> {
    match set_failed(link, id, Some(reason), false).await? {
        0 => Err(unknown(id)),
        _ => Ok(()),
    }
}

pub(super) async fn put_horizon(link: &Link, id: &CaptureId, horizon: &Position) -> Result<()> {
    let (lsn, seq) = (horizon.lsn.as_slice(), horizon.seq.as_slice());
    link.execute(PUT_HORIZON, &[&&*id.source, &&*id.instance, &lsn, &seq, &Time(now())], CAPTURES).await.map(drop)
}
