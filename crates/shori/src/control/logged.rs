//! A pipeline's log, as the socket tells of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType, UInt8Type};
use serde::{Deserialize, Serialize};
use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::{SnapshotProgress, SnapshotState};
use shori_core::store::CaptureState;
use shori_core::{Error, ErrorKind, Result};

/// A capture as the log has it.
#[derive(Clone, Debug)]
pub struct LoggedCapture {
    pub id: CaptureId,
    pub schema: Arc<TableSchema>,
    pub boundary: Watermark,
    pub horizon: Position,
    /// By generation.
    pub snapshots: Vec<SnapshotProgress>,
    pub failed: Option<String>,
}

impl LoggedCapture {
    pub fn all(captures: BTreeMap<CaptureId, CaptureState>) -> Vec<Self> {
        let one = |(id, state): (CaptureId, CaptureState)| Self {
            id,
            schema: state.schema,
            boundary: state.watermark,
            horizon: state.horizon,
            snapshots: state.earlier_snapshots.into_iter().chain([state.snapshot]).collect(),
            failed: state.failed,
        };
        captures.into_iter().map(one).collect()
    }
}

/// A position's two keys, byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place(Vec<u8>, Vec<u8>);

impl Place {
    pub fn of(position: &Position) -> Self {
        Self(position.lsn.as_slice().to_vec(), position.seq.as_slice().to_vec())
    }

    pub fn position(&self) -> Result<Position> {
        Position::from_slices(&self.0, &self.1)
    }
}

/// [`LoggedCapture`] on its way.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    source: String,
    instance: String,
    schema: String,
    boundary: Place,
    boundary_time: Micros,
    horizon: Place,
    snapshots: Vec<ToldSnapshot>,
    failed: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ToldSnapshot {
    generation: u32,
    is_running: bool,
    start: Place,
    /// With its time, of one that is done.
    end: Option<(Place, Micros)>,
    rows: u64,
}

impl Told {
    pub fn of(capture: &LoggedCapture) -> Self {
        let snapshot = |progress: &SnapshotProgress| ToldSnapshot {
            generation: progress.generation,
            is_running: progress.state == SnapshotState::Running,
            start: Place::of(&progress.start),
            end: progress.is_done().then(|| (Place::of(&progress.end), progress.end_time)),
            rows: progress.rows,
        };
        Self {
            source: capture.id.source.to_string(),
            instance: capture.id.instance.to_string(),
            schema: capture.schema.to_json(),
            boundary: Place::of(&capture.boundary.boundary),
            boundary_time: capture.boundary.boundary_time,
            horizon: Place::of(&capture.horizon),
            snapshots: capture.snapshots.iter().map(snapshot).collect(),
            failed: capture.failed.clone(),
        }
    }

    pub fn read(self) -> Result<LoggedCapture> {
        let boundary = self.boundary.position()?;
        Ok(LoggedCapture {
            id: CaptureId::new(&self.source, &self.instance),
            schema: Arc::new(TableSchema::from_json(&self.schema)?),
            boundary: Watermark { staged: boundary, boundary, boundary_time: self.boundary_time },
            horizon: self.horizon.position()?,
            snapshots: self.snapshots.into_iter().map(ToldSnapshot::read).collect::<Result<_>>()?,
            failed: self.failed,
        })
    }
}

impl ToldSnapshot {
    fn read(self) -> Result<SnapshotProgress> {
        let requested = SnapshotProgress::requested(self.generation);
        let mut progress = SnapshotProgress { start: self.start.position()?, rows: self.rows, ..requested };
        if self.is_running {
            progress.state = SnapshotState::Running;
        }
        if let Some((end, time)) = self.end {
            (progress.state, progress.end, progress.end_time) = (SnapshotState::Done, end.position()?, time);
        }
        Ok(progress)
    }
}

/// Where a table's schema stands in that of its rows.
const TABLE: &str = "shori.table";
/// Columns before the table's own. All are known by their place: a table may have columns of any name.
const HEAD: usize = 5;

/// Changes of this schema, as rows.
pub fn rows_schema(schema: &TableSchema) -> SchemaRef {
    let mut fields = vec![
        Field::new("lsn", DataType::Binary, false),
        Field::new("seq", DataType::Binary, false),
        Field::new("op", DataType::UInt8, false),
        Field::new("commit_time", DataType::Timestamp(TimeUnit::Microsecond, None), false),
        Field::new("unchanged", DataType::Binary, true),
    ];
    fields.extend(schema.columns.fields().iter().map(|field| field.as_ref().clone().with_nullable(true)));
    let metadata = [(TABLE.to_string(), schema.to_json())].into();
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// Fails when the table's schema has become another than `rows` has.
pub fn to_rows(batch: &ChangeBatch, rows: &SchemaRef) -> Result<RecordBatch> {
    let own = rows_schema(&batch.schema);
    if own != *rows {
        let object = format!("the log of {}", batch.capture);
        let cause = "the table's columns have changed meanwhile";
        return Err(Error::new(ErrorKind::Unavailable, "read", object, cause).with_remedy("try again"));
    }
    let unchanged: ArrayRef = match &batch.unchanged {
        Some(masks) => Arc::new(masks.clone()),
        None => Arc::new(BinaryArray::new_null(batch.len())),
    };
    let mut arrays: Vec<ArrayRef> = vec![
        Arc::new(batch.lsn.clone()),
        Arc::new(batch.seq.clone()),
        Arc::new(batch.op.clone()),
        Arc::new(batch.commit_time.clone()),
        unchanged,
    ];
    arrays.extend(batch.columns.iter().cloned());
    Ok(RecordBatch::try_new(own, arrays)?)
}

/// The inverse of [`to_rows`].
pub fn from_rows(capture: &CaptureId, rows: &RecordBatch) -> Result<ChangeBatch> {
    let misfit = || {
        let cause = "it is of another version of shori";
        Error::new(ErrorKind::Usage, "read the log of", "the running pipeline", cause).with_remedy("restart it")
    };
    let schema = rows.schema();
    let schema = TableSchema::from_json(schema.metadata().get(TABLE).ok_or_else(misfit)?)?;
    if rows.num_columns() != HEAD + schema.columns.fields().len() {
        return Err(misfit());
    }
    let binary = |index: usize| rows.column(index).as_binary_opt::<i32>().cloned().ok_or_else(misfit);
    let unchanged = binary(4)?;
    Ok(ChangeBatch {
        capture: capture.clone(),
        schema: Arc::new(schema),
        lsn: binary(0)?,
        seq: binary(1)?,
        op: rows.column(2).as_primitive_opt::<UInt8Type>().cloned().ok_or_else(misfit)?,
        commit_time: rows.column(3).as_primitive_opt::<TimestampMicrosecondType>().cloned().ok_or_else(misfit)?,
        unchanged: (unchanged.null_count() < unchanged.len()).then_some(unchanged),
        columns: rows.columns()[HEAD..].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::Int64Array;
    use shori_core::change::{ChangeHeadBuilder, Op};
    use shori_core::position::SortKey;

    #[test]
    fn a_capture_and_its_changes_come_back() {
        let at = |lsn| Position::new(SortKey::from_u64(lsn), SortKey::EMPTY);
        // Columns may be called as those of the log.
        let fields = vec![Field::new("lsn", DataType::Int64, false), Field::new("op", DataType::Int64, true)];
        let schema = Arc::new(TableSchema::new("t", fields, &["lsn"]).unwrap());
        let id = CaptureId::new("s", "t");
        let done =
            SnapshotProgress { state: SnapshotState::Done, end: at(3), end_time: 7, ..SnapshotProgress::requested(1) };
        let capture = LoggedCapture {
            id: id.clone(),
            schema: schema.clone(),
            boundary: Watermark { staged: at(9), boundary: at(9), boundary_time: 5 },
            horizon: at(2),
            snapshots: vec![done, SnapshotProgress::requested(2)],
            failed: Some("why".into()),
        };
        let told = serde_json::to_string(&Told::of(&capture)).unwrap();
        let back = serde_json::from_str::<Told>(&told).unwrap().read().unwrap();
        assert_eq!(format!("{back:?}"), format!("{capture:?}"));
        let mut head = ChangeHeadBuilder::default();
        head.push(&at(4), Op::Insert, 5);
        let columns: Vec<ArrayRef> = vec![Arc::new(Int64Array::from(vec![1])), Arc::new(Int64Array::from(vec![2]))];
        let batch = head.finish(id.clone(), schema.clone(), columns).unwrap();
        let rows = to_rows(&batch, &rows_schema(&schema)).unwrap();
        assert_eq!(format!("{:?}", from_rows(&id, &rows).unwrap()), format!("{batch:?}"));
    }
}
