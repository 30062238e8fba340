//! Tables whose shape changes between files, tables side by side, and snapshots in a log.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::Array;
use arrow::datatypes::{DataType, Field};
use shori_core::ErrorKind;
use shori_core::position::Position;
use shori_core::schema::TableSchema;
use shori_core::source::{SnapshotProgress, SnapshotState, Source};
use shori_core::testing::value::{Value, row};

use crate::harness::{Logs, Reader, at, boundary, changes};

fn table(name: &str, extra: &[(&str, DataType)]) -> Arc<TableSchema> {
    let mut fields = vec![Field::new("id", DataType::Int64, false)];
    fields.extend(extra.iter().map(|(name, data_type)| Field::new(*name, data_type.clone(), true)));
    Arc::new(TableSchema::new(name, fields, &["id"]).unwrap())
}

fn done(generation: u32, start: u64, end: u64) -> SnapshotProgress {
    SnapshotProgress {
        state: SnapshotState::Done,
        start: if start == 0 { Position::ZERO } else { at(start) },
        end: at(end),
        end_time: 9,
        rows: 3,
        ..SnapshotProgress::requested(generation)
    }
}

fn running(generation: u32, start: u64) -> SnapshotProgress {
    SnapshotProgress { state: SnapshotState::Running, start: at(start), ..SnapshotProgress::requested(generation) }
}

#[tokio::test]
async fn columns_come_and_go_between_files() {
    let logs = Logs::new(100);
    let (old, new) = (table("t", &[("a", DataType::Utf8)]), table("t", &[("b", DataType::Int64)]));
    logs.write(&old, &[changes(&old, &[(1, row([1.into(), "x".into()]))])], &boundary(2), &[]);
    logs.write(&new, &[changes(&new, &[(3, row([1.into(), 7.into()]))])], &boundary(4), &[]);
    let (mut source, mut reader) = (logs.source(&["t"]), Reader::default());
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 100).await.unwrap();
    let read = &reader.changes.values().next().unwrap();
    assert_eq!(read.iter().map(|batch| batch.schema.clone()).collect::<Vec<_>>(), [old, new.clone()]);
    assert_eq!(reader.schemas.iter().map(|info| info.schema.clone()).collect::<Vec<_>>(), [new]);
}

#[tokio::test]
async fn a_retyped_column_stops_the_table_until_it_is_read_anew_from_there() {
    let logs = Logs::new(100);
    let (old, new) = (table("t", &[("a", DataType::Utf8)]), table("t", &[("a", DataType::Int64)]));
    logs.write(&old, &[changes(&old, &[(1, row([1.into(), "x".into()]))])], &boundary(2), &[done(1, 0, 2)]);
    let rows = [(4, row([1.into(), 7.into()])), (5, row([2.into(), Value::Null]))];
    logs.write(&new, &[changes(&new, &rows)], &boundary(6), &[done(2, 3, 6)]);
    let (mut source, mut reader) = (logs.source(&["t"]), Reader::default());
    reader.start(&mut source).await.unwrap();
    let error = reader.read(&mut source, 100).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Schema);
    assert!(error.to_string().contains("shori resnapshot --retyped t"), "{error}");
    assert_eq!(reader.watermark.unwrap().boundary, at(2));
    let known = reader.known.values_mut().next().unwrap();
    (known.snapshot, known.schema) = (SnapshotProgress::requested(2), None);
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 100).await.unwrap();
    assert_eq!(reader.changes.values().flatten().last().unwrap().columns[1].null_count(), 1);
    let known = reader.known.values().next().unwrap();
    assert!(known.snapshot.is_done() && known.snapshot.generation == 2, "{:?}", known.snapshot);
}

#[tokio::test]
async fn rows_that_are_in_the_log_cannot_be_asked_for_again() {
    let logs = Logs::new(100);
    let one = table("t", &[]);
    logs.write(&one, &[changes(&one, &[(1, row([1.into()]))])], &boundary(2), &[done(1, 0, 2)]);
    let (mut source, mut reader) = (logs.source(&["t"]), Reader::default());
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 100).await.unwrap();
    reader.known.values_mut().next().unwrap().snapshot = SnapshotProgress::requested(2);
    let error = reader.start(&mut source).await.unwrap_err();
    assert!(error.remedy().is_some_and(|remedy| remedy.contains("new pipeline")), "{error}");
}

#[tokio::test]
async fn tables_become_visible_together() {
    let logs = Logs::new(2);
    let (one, other) = (table("one", &[]), table("other", &[]));
    let rows: Vec<_> = [1, 3, 5, 7, 12].map(|lsn| (lsn, row([1.into()]))).into();
    logs.write(&one, &[changes(&one, &rows[..4])], &boundary(8), &[]);
    let (mut source, mut reader) = (logs.source(&["one", "other"]), Reader::default());
    assert!(reader.start(&mut source).await.is_err(), "a table without files is told");
    // The writer was killed before it came to the other table; the next range is a longer one there.
    logs.write(&one, &[changes(&one, &rows)], &boundary(14), &[]);
    let others: Vec<_> = [2, 4, 6, 11].map(|lsn| (lsn, row([2.into()]))).into();
    logs.write(&other, &[changes(&other, &others)], &boundary(14), &[]);
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 3).await.unwrap();
    assert_eq!(reader.boundaries.last(), Some(&at(14)));
    assert!(reader.boundaries.contains(&at(8)), "a boundary of one table is one of all: {:?}", reader.boundaries);
    assert_eq!(reader.positions().len(), 9);
    // Nothing came for the one: its file without changes takes the place of the one before.
    for lsn in 15..20 {
        logs.write(&other, &[changes(&other, &[(lsn, row([3.into()]))])], &boundary(lsn), &[]);
        reader.read(&mut source, 3).await.unwrap();
        assert_eq!(reader.watermark.unwrap().boundary, at(lsn - 1).max(at(14)), "the one is not known to be at {lsn}");
        logs.write(&one, &[], &boundary(lsn), &[]);
        source.wait(Duration::from_secs(10)).await.unwrap();
        reader.read(&mut source, 3).await.unwrap();
        assert_eq!(reader.watermark.unwrap().boundary, at(lsn));
    }
    assert_eq!(logs.files("one").iter().filter(|file| file.display().to_string().contains("000013-0")).count(), 1);
    assert_eq!(logs.files("one").len(), 4);
}

#[tokio::test]
async fn a_resnapshot_in_the_log_begins_and_ends_where_it_did() {
    let logs = Logs::new(100);
    let one = table("t", &[]);
    let rows: Vec<_> = (1..=9).map(|lsn| (lsn, row([(lsn as i64).into()]))).collect();
    let write = |end, snapshots: &[SnapshotProgress]| {
        logs.write(&one, &[changes(&one, &rows)], &boundary(end), snapshots);
    };
    // The log's first generation is the fourth: it was compacted.
    write(3, &[done(4, 0, 2)]);
    write(6, &[done(4, 0, 2), running(5, 4)]);
    let (mut source, mut reader) = (logs.source(&["t"]), Reader::default());
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 2).await.unwrap();
    let seen = |reader: &Reader| {
        let state = |progress: &SnapshotProgress| (progress.generation, progress.is_done(), progress.start);
        reader.snapshots.iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(seen(&reader), [(1, false, Position::ZERO), (1, true, Position::ZERO), (2, false, at(4))]);
    write(8, &[done(5, 4, 7), SnapshotProgress::requested(6)]);
    // A source that starts anew knows which one is meant.
    let mut source = logs.source(&["t"]);
    reader.start(&mut source).await.unwrap();
    reader.read(&mut source, 2).await.unwrap();
    assert_eq!(seen(&reader).last(), Some(&(2, true, at(4))));
    assert_eq!(reader.snapshots.len(), 4);
    assert_eq!(reader.known.values().next().unwrap().snapshot.end, at(7));
    // One that reads all at once sees the same.
    let (mut source, mut anew) = (logs.source(&["t"]), Reader::default());
    anew.start(&mut source).await.unwrap();
    anew.read(&mut source, 100).await.unwrap();
    assert_eq!(seen(&anew), seen(&reader));
}
