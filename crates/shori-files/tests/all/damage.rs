//! Files that are damaged, missing or of another log: told by name, and read on once they are put right.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use shori_core::schema::TableSchema;
use shori_core::source::Source;
use shori_core::testing::value::row;
use shori_core::{Error, ErrorKind};
use shori_files::{LogFolder, Origin};

use crate::harness::{Logs, Reader, at, boundary, changes, origin};

fn orders() -> Arc<TableSchema> {
    let fields = vec![Field::new("id", DataType::Int64, false), Field::new("note", DataType::Utf8, true)];
    Arc::new(TableSchema::new("orders", fields, &["id"]).unwrap())
}

/// Four files of two changes each.
fn written() -> Logs {
    let logs = Logs::new(2);
    for range in 0..4 {
        let rows: Vec<_> = (1..=2).map(|n| (range * 10 + n, row([(n as i64).into(), "note".into()]))).collect();
        logs.write(&orders(), &[changes(&orders(), &rows)], &boundary(range * 10 + 5), &[]);
    }
    logs
}

async fn read(logs: &Logs, reader: &mut Reader) -> Result<(), Error> {
    let mut source = logs.source(&["orders"]);
    reader.start(&mut source).await?;
    reader.read(&mut source, 3).await
}

#[tokio::test]
async fn a_damaged_file_is_told_by_name_and_line_and_read_once_it_is_put_back() {
    let whole = std::fs::read(&written().files("orders")[1]).unwrap();
    let text = String::from_utf8(whole.clone()).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let cut = |bytes: usize| text[..text.len() - bytes].to_string();
    for (damaged, line, told) in [
        (cut(3), 4, "cut off"),
        (lines[..3].concat(), 4, "cut off"),
        (text.replacen("insert", "ins\"rt", 1), 2, "line 1 column"),
        (text.replacen("\"note\":\"note\"", "\"note\":7", 1), 2, "column note does not take 7"),
        (text.replacen(",\"note\":\"note\"", "", 1), 2, "column note has no value"),
        (text.replacen("\"note\":\"note\"", "\"note\":\"note\",\"more\":1", 1), 2, "column more"),
        ([lines[0], lines[2], lines[1], lines[3]].concat(), 3, "out of order"),
        ([lines[0], lines[2], lines[3]].concat(), 3, "the file has 1 changes, and had 2"),
        (text.replacen("\"id\"", "\"ix\"", 1), 1, "key column"),
        (text.replacen("\"version\":1", "\"version\":2", 1), 1, "version 2"),
    ] {
        let logs = written();
        let file = logs.files("orders")[1].clone();
        std::fs::write(&file, &damaged).unwrap();
        let mut reader = Reader::default();
        let error = read(&logs, &mut reader).await.unwrap_err();
        let message = error.to_string();
        let place = format!("file {}", file.display());
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{message}");
        assert!(message.contains(&place) && message.contains(told), "{told}: {message}");
        let at_end = message.contains("its end is missing");
        assert!(at_end || message.contains(&format!("line {line}:")), "line {line}: {message}");
        // What stands before is read.
        assert_eq!(reader.watermark.map(|mark| mark.boundary), Some(at(5)), "{message}");
        std::fs::write(&file, &whole).unwrap();
        read(&logs, &mut reader).await.unwrap();
        assert_eq!(reader.positions(), [1, 2, 11, 12, 21, 22, 31, 32].map(at), "{told}");
    }
}

#[tokio::test]
async fn a_missing_file_is_a_gap_and_read_once_it_is_put_back() {
    for missing in 0..3 {
        let logs = written();
        let file = logs.files("orders")[missing].clone();
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let mut reader = Reader::default();
        let error = read(&logs, &mut reader).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
        assert!(error.remedy().is_some_and(|remedy| remedy.contains("put the missing files back")), "{error}");
        match logs.try_write(&orders(), &[], &boundary(50), &[]) {
            Err(error) => assert!(error.kind() == ErrorKind::Gap && missing > 0, "{error}"),
            // What is missing at the beginning may have been taken away on purpose: new files follow the last one.
            Ok(_) => assert_eq!(missing, 0),
        }
        std::fs::write(&file, bytes).unwrap();
        read(&logs, &mut reader).await.unwrap();
        assert_eq!(reader.positions().len(), 8);
    }
}

#[tokio::test]
async fn files_that_were_read_may_be_taken_away() {
    let logs = written();
    let mut reader = Reader::default();
    read(&logs, &mut reader).await.unwrap();
    for file in &logs.files("orders")[..3] {
        std::fs::remove_file(file).unwrap();
    }
    logs.write(&orders(), &[changes(&orders(), &[(41, row([1.into(), "more".into()]))])], &boundary(45), &[]);
    read(&logs, &mut reader).await.unwrap();
    assert_eq!(reader.positions().len(), 9);
}

#[tokio::test]
async fn a_folder_that_is_gone_for_a_while_marks_no_table() {
    let logs = written();
    let mut reader = Reader::default();
    read(&logs, &mut reader).await.unwrap();
    let (folder, aside) = (logs.path().join("orders"), logs.path().join("aside"));
    std::fs::rename(&folder, &aside).unwrap();
    let error = logs.source(&["orders"]).start(&reader.known).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Gap && error.to_string().contains("put the files back"), "{error}");
    std::fs::rename(&aside, &folder).unwrap();
    read(&logs, &mut reader).await.unwrap();
}

#[tokio::test]
async fn another_logs_folder_is_neither_written_to_nor_read() {
    let logs = written();
    let other = LogFolder::open(logs.path(), Origin { store: "other".into(), ..origin() }).unwrap();
    let error = other.table(&shori_core::position::CaptureId::new("shop", "orders")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::SourceReplaced, "{error}");
    let error = LogFolder::open(logs.path(), origin()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    drop(other);
    let strange = Logs::new(9);
    let schema = Arc::new(TableSchema { table: "strange".into(), ..orders().as_ref().clone() });
    let folder = LogFolder::open(strange.path(), Origin { store: "other".into(), ..origin() }).unwrap();
    let table = folder.table(&shori_core::position::CaptureId::new("shop", "strange")).unwrap();
    table.write(at(0), &[]).finish(&boundary(5), &schema).unwrap().publish().unwrap();
    std::fs::rename(strange.path().join("strange"), logs.path().join("strange")).unwrap();
    let mut source = logs.source(&["orders", "strange"]);
    let error = Reader::default().start(&mut source).await.unwrap_err();
    assert!(error.to_string().contains("store other"), "{error}");
    let mut source = logs.source(&["nothing"]);
    let error = Reader::default().start(&mut source).await.unwrap_err();
    assert!(error.to_string().contains("there are no files of it"), "{error}");
}

#[tokio::test]
async fn a_writer_that_ends_anywhere_leaves_nothing_half_done() {
    let logs = written();
    let capture = shori_core::position::CaptureId::new("shop", "orders");
    let rows: Vec<_> = (41..=47).map(|n| (n, row([1.into(), "more".into()]))).collect();
    let batch = changes(&orders(), &rows);
    let folder = logs.open();
    let table = folder.table(&capture).unwrap();
    let mut writer = table.write(at(0), &[]);
    writer.push(&batch.slice(0, 5)).unwrap();
    drop(writer);
    let mut writer = table.write(at(0), &[]);
    writer.push(&batch).unwrap();
    drop(writer.finish(&boundary(50), &orders()).unwrap());
    drop((table, folder));
    let mut reader = Reader::default();
    read(&logs, &mut reader).await.unwrap();
    assert_eq!(reader.positions().len(), 8, "nothing is visible that was not published");
    logs.write(&orders(), &[batch], &boundary(50), &[]);
    assert_eq!(logs.files("orders").len(), 8, "what was left is cleared");
    read(&logs, &mut reader).await.unwrap();
    assert_eq!(reader.positions().len(), 15);
    assert_eq!(reader.boundaries, [5, 15, 25, 35, 50].map(at));
}
