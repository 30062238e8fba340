//! What the tests of the store share: a store in a fresh database, batches to append, and what a target holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BinaryArray, Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, TimeUnit};
use futures::TryStreamExt;
use shori_core::change::{ChangeBatch, ChangeHeadBuilder, Op};
use shori_core::position::{CaptureId, Position, SortKey, Watermark};
use shori_core::projection::{Target, TargetShape, history};
use shori_core::schema::TableSchema;
use shori_core::source::CaptureInfo;
use shori_core::store::{Append, Appended, Store};
use shori_core::testing::value::{Row, Value};
use shori_postgres::PostgresStore;
use tokio_postgres::Client;

use crate::harness::address;
use crate::server::Server;

/// A bootstrapped store in a database of its own, and a client that looks at it.
pub struct Stored {
    pub store: PostgresStore,
    pub client: Client,
    pub database: String,
}

impl Stored {
    pub async fn fresh() -> Self {
        Self::on(Server::shared()).await
    }

    pub async fn on(server: &Server) -> Self {
        let database = server.create_database().await;
        let stored = Self { store: open(server, &database), client: server.connect(&database).await, database };
        stored.store.bootstrap().await.unwrap();
        stored
    }
}

pub fn open(server: &Server, database: &str) -> PostgresStore {
    PostgresStore::new(address(server, database), "public".into())
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

pub async fn log(store: &dyn Store, instance: &str, after: Position, up_to: Position) -> Vec<Image> {
    let stream = store.read_log(&id(instance), &after, &up_to).await.unwrap();
    images(&stream.try_collect::<Vec<_>>().await.unwrap())
}

pub async fn whole_log(store: &dyn Store, instance: &str) -> Vec<Image> {
    log(store, instance, Position::ZERO, Position::new(SortKey::MAX, SortKey::MAX)).await
}

pub async fn append(
    store: &dyn Store,
    expected: &[(&str, Position)],
    changes: &[ChangeBatch],
    to: Position,
) -> shori_core::Result<Appended> {
    let expected: BTreeMap<_, _> = expected.iter().map(|(instance, position)| (id(instance), *position)).collect();
    let append = Append {
        timeline: "t",
        expected: &expected,
        changes,
        watermark: Watermark { staged: to, boundary: to, boundary_time: 7 },
        snapshots: &[],
        schemas: &[],
        rejected: &[],
    };
    store.append(&append).await
}

/// What a target holds, in its own columns and any order, by the text of each value.
pub async fn rows_of(client: &Client, schema: &str, target: &Target) -> Vec<Row> {
    let fields = target.columns.fields();
    let column = |field: &Arc<Field>| {
        let own = [history::SURROGATE_KEY, history::BATCH_ID, history::CREATED_AT, history::UPDATED_AT];
        let is_moved = target.shape == TargetShape::Versions && own.contains(&field.name().as_str());
        let name = format!("\"{}{}\"", field.name().replace('"', "\"\""), if is_moved { "__source" } else { "" });
        match field.data_type() {
            DataType::Timestamp(..) => format!("(extract(epoch from {name}) * 1000000)::bigint::text"),
            DataType::Date32 => format!("({name} - date '1970-01-01')::text"),
            DataType::Time64(TimeUnit::Microsecond) => format!("(extract(epoch from {name}) * 1000000)::bigint::text"),
            DataType::Decimal128(_, scale) => format!("trunc({name} * 1{})::text", "0".repeat(*scale as usize)),
            DataType::Binary => format!("encode({name}, 'hex')"),
            _ => format!("{name}::text"),
        }
    };
    let columns: Vec<String> = fields.iter().map(column).collect();
    let sql = format!("select {} from \"{schema}\".\"{}\"", columns.join(", "), target.projection);
    let rows = client.query(&sql, &[]).await.unwrap();
    let value = |text: &str, data_type: &DataType| match data_type {
        DataType::Boolean => Value::Boolean(text == "true"),
        DataType::Int16 | DataType::Int32 | DataType::Int64 => Value::Integer(text.parse().unwrap()),
        DataType::Float32 => Value::Float(f64::from(text.parse::<f32>().unwrap()).to_bits()),
        DataType::Float64 => Value::Float(text.parse::<f64>().unwrap().to_bits()),
        DataType::Utf8 => Value::Text(text.into()),
        DataType::Decimal128(..) => Value::Decimal(text.parse().unwrap()),
        DataType::Binary => Value::Binary(
            text.as_bytes()
                .chunks(2)
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
                .collect(),
        ),
        _ => Value::Time(text.parse().unwrap()),
    };
    let row = |row: &tokio_postgres::Row| -> Row {
        let texts = (0..fields.len()).map(|index| row.get::<_, Option<String>>(index));
        texts
            .zip(fields)
            .map(|(text, field)| text.map_or(Value::Null, |text| value(&text, field.data_type())))
            .collect()
    };
    rows.iter().map(row).collect()
}
