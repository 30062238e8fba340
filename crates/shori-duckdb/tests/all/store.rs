//! What the tests of the DuckDB store share: a store on a real file, and batches to append.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type};
use futures::TryStreamExt;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, SortKey, Watermark};
use shori_core::schema::TableSchema;
use shori_core::source::CaptureInfo;
use shori_core::store::{Append, Appended, Store};
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::store::DuckdbStore;

pub fn database(directory: &Path) -> Database {
    let settings =
        Settings { memory_limit_mib: 256, threads: 2, spill_directory: directory.join("spill"), inline: false };
    Database::open(&settings).unwrap()
}

pub fn open(directory: &Path) -> DuckdbStore {
    DuckdbStore::open(&database(directory), &directory.join("serving.duckdb"), "serving").unwrap()
}

pub fn at(lsn: u64, seq: u64) -> Position {
    Position::new(SortKey::from_u64(lsn), SortKey::from_u64(seq))
}

pub fn id(instance: &str) -> CaptureId {
    CaptureId::new("source1", instance)
}

/// Two columns, id and text, keyed by id.
pub fn schema(table: &str) -> Arc<TableSchema> {
    let fields = vec![Field::new("id", DataType::Int64, false), Field::new("text", DataType::Utf8, true)];
    Arc::new(TableSchema::new(table, fields, &["id"]).unwrap())
}

pub fn info(instance: &str) -> CaptureInfo {
    CaptureInfo { id: id(instance), schema: schema(instance) }
}

/// One image; `text` is `None` where it is unchanged and not sent (`is_marked`) or null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub position: Position,
    pub op: Op,
    pub time: i64,
    pub id: i64,
    pub text: Option<String>,
    pub is_marked: bool,
}

pub fn image(lsn: u64, seq: u64, op: Op, id: i64, text: &str) -> Image {
    Image { position: at(lsn, seq), op, time: lsn as i64 * 10, id, text: Some(text.into()), is_marked: false }
}

pub fn batch(instance: &str, images: &[Image]) -> ChangeBatch {
    let mut head = ChangeHeadBuilder::default();
    for image in images {
        head.push(&image.position, image.op, image.time);
    }
    let ids = Int64Array::from_iter(images.iter().map(|image| (image.op != Op::Truncate).then_some(image.id)));
    let texts: StringArray = images.iter().map(|image| image.text.clone()).collect();
    let columns: Vec<ArrayRef> = vec![Arc::new(ids), Arc::new(texts)];
    let mut batch = head.finish(id(instance), schema(instance), columns).unwrap();
    if images.iter().any(|image| image.is_marked) {
        let masks: BinaryArray = images.iter().map(|image| image.is_marked.then_some([0b10u8])).collect();
        batch.unchanged = Some(masks);
    }
    batch
}

pub fn images(batches: &[ChangeBatch]) -> Vec<Image> {
    let mut images = Vec::new();
    for batch in batches {
        let (ids, texts) = (batch.columns[0].as_primitive::<Int64Type>(), batch.columns[1].as_string::<i32>());
        for row in 0..batch.len() {
            images.push(Image {
                position: batch.position(row).unwrap(),
                op: Op::from_u8(batch.op.value(row)).unwrap(),
                time: batch.commit_time(row),
                id: ids.value(row),
                text: texts.is_valid(row).then(|| texts.value(row).to_string()),
                is_marked: batch.unchanged.as_ref().is_some_and(|masks| masks.is_valid(row)),
            });
        }
    }
    images
}

pub async fn log(store: &DuckdbStore, instance: &str, after: Position, up_to: Position) -> Vec<Image> {
    let stream = store.read_log(&id(instance), &after, &up_to).await.unwrap();
    images(&stream.try_collect::<Vec<_>>().await.unwrap())
}

pub async fn whole_log(store: &DuckdbStore, instance: &str) -> Vec<Image> {
    log(store, instance, Position::ZERO, Position::new(SortKey::MAX, SortKey::MAX)).await
}

pub fn watermark(staged: Position) -> Watermark {
    Watermark { staged, boundary: staged, boundary_time: 7 }
}

pub async fn append(
    store: &DuckdbStore,
    expected: &[(&str, Position)],
    changes: &[ChangeBatch],
    to: Position,
) -> shori_core::Result<Appended> {
    let expected: BTreeMap<_, _> = expected.iter().map(|(instance, position)| (id(instance), *position)).collect();
    let append = Append {
        timeline: "t",
        expected: &expected,
        changes,
        watermark: watermark(to),
        snapshots: &[],
        schemas: &[],
        rejected: &[],
    };
    store.append(&append).await
}
