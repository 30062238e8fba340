//! Questions of people to a store: one reading statement each.
//!
//! What keeps a question from writing: it is prepared, so it is one statement, it stands within a select of ours, and its
//! transaction is read only. It has a connection of its own: who goes away ends it.

use std::pin::Pin;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use futures::TryStreamExt;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::types::{Kind as TypeKind, Type};
use tokio_postgres::{Column, RowStream};

use super::PostgresStore;
use super::session::{Link, failed};
use crate::column_builder::ColumnBuilder;
use crate::column_types::{Kind, PostgresType, arrow_type};
use crate::connect::quoted;
use crate::message::Value;
use crate::snapshot::Raw;

/// Rows and bytes in a batch that is handed out.
const BATCH_ROWS: usize = 8_192;
const BATCH_BYTES: usize = 4 << 20;
/// Rows that an answer given at once holds at most.
const ANSWER_ROWS_MAX: usize = 1_000_000;

const QUESTION: &str = "the question";

/// An answer being given.
pub struct Answer {
    schema: SchemaRef,
    types: Vec<PostgresType>,
    rows: Pin<Box<RowStream>>,
    ended: bool,
    _link: Link,
}

impl PostgresStore {
    /// Begins to answer. Columns of types that are not carried come as text.
    pub async fn stream(&self, question: &str) -> Result<Answer> {
        let fail = |cause| failed("answer", QUESTION, cause);
        let question = question.trim_end_matches(|letter: char| letter.is_whitespace() || letter == ';');
        let link = self.links.connect().await?;
        link.run("begin read only; set local statement_timeout = 0", QUESTION).await?;
        let described = link.client().prepare(question).await.map_err(fail)?;
        if described.columns().is_empty() {
            let cause = "it is no select, and has no columns";
            return Err(Error::new(ErrorKind::Usage, "answer", QUESTION, cause));
        }
        let carried: Vec<Carried> = described.columns().iter().map(Carried::of).collect();
        let places: Vec<String> = (0..carried.len()).map(|place| format!("c{place}")).collect();
        let shown = carried.iter().zip(&places).map(|(column, place)| column.shown(place));
        let wrapped = format!(
            "select {} from (\n{question}\n) as q({})",
            shown.collect::<Vec<_>>().join(", "),
            places.join(", ")
        );
        let none: [&str; 0] = [];
        let rows = link.client().query_raw(&wrapped, none).await.map_err(fail)?;
        let fields = carried.iter().map(|column| Field::new(&column.name, column.data_type.clone(), true));
        Ok(Answer {
            schema: Arc::new(Schema::new(fields.collect::<Vec<_>>())),
            types: carried.into_iter().map(|column| column.sent).collect(),
            rows: Box::pin(rows),
            ended: false,
            _link: link,
        })
    }

    /// All of an answer, which must not have many rows. An empty one is one batch without rows.
    pub async fn query(&self, question: &str) -> Result<Vec<RecordBatch>> {
        let mut answer = self.stream(question).await?;
        let (mut batches, mut rows) = (Vec::new(), 0);
        while let Some(batch) = answer.next().await {
            let batch = batch?;
            rows += batch.num_rows();
            if rows > ANSWER_ROWS_MAX {
                let cause = format!("it has more than {ANSWER_ROWS_MAX} rows");
                return Err(Error::new(ErrorKind::Usage, "answer", QUESTION, cause).with_remedy("add a limit"));
            }
            batches.push(batch);
        }
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(answer.schema.clone()));
        }
        Ok(batches)
    }

    /// Whether a pipeline has ever made its tables here.
    pub async fn has_tables(&self) -> Result<bool> {
        let link = self.links.take().await?;
        let table = format!("{}.ctl_ingestion_watermarks", quoted(&self.links.schema));
        let rows = link.rows("select to_regclass($1) is not null", &[&table], "control tables").await?;
        self.links.give_back(link);
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }
}

impl Answer {
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next rows. After an error there are none.
    pub async fn next(&mut self) -> Option<Result<RecordBatch>> {
        if self.ended {
            return None;
        }
        let batch = self.read().await;
        self.ended |= batch.is_err();
        batch.transpose()
    }

    async fn read(&mut self) -> Result<Option<RecordBatch>> {
        let fields = self.schema.fields();
        let builders = fields.iter().zip(&self.types).map(|(field, sent)| ColumnBuilder::new(field.data_type(), sent));
        let mut builders: Vec<ColumnBuilder> = builders.collect::<Result<_>>()?;
        let (mut rows, mut bytes) = (0, 0);
        while rows < BATCH_ROWS && bytes < BATCH_BYTES {
            let row = self.rows.try_next().await.map_err(|cause| failed("answer", QUESTION, cause))?;
            let Some(row) = row else {
                self.ended = true;
                break;
            };
            for (index, builder) in builders.iter_mut().enumerate() {
                let value = row.try_get::<_, Option<Raw<'_>>>(index);
                let value = value.map_err(|cause| failed("answer", QUESTION, cause))?;
                bytes += value.as_ref().map_or(0, |Raw(value)| value.len());
                let value = value.map_or(Value::Null, |Raw(value)| Value::Binary(value));
                if let Err(misfit) = builder.append(value) {
                    let object = format!("column {} of the answer", self.schema.field(index).name());
                    return Err(Error::new(ErrorKind::Data, "read", object, misfit).with_remedy("cast it to text"));
                }
            }
            rows += 1;
        }
        if rows == 0 {
            return Ok(None);
        }
        let columns = builders.into_iter().map(ColumnBuilder::finish).collect();
        Ok(Some(RecordBatch::try_new(self.schema.clone(), columns)?))
    }
}

/// A column of an answer, and as what it is sent.
struct Carried {
    name: String,
    data_type: DataType,
    sent: PostgresType,
    as_text: bool,
}

impl Carried {
    fn of(column: &Column) -> Self {
        let own = type_of(column.type_(), column.type_modifier());
        let (name, data_type) = (column.name().to_string(), arrow_type(&own, false));
        match data_type {
            Ok(data_type) => Self { name, data_type, sent: own, as_text: false },
            Err(_) => Self { name, data_type: DataType::Utf8, sent: type_of(&Type::TEXT, -1), as_text: true },
        }
    }

    fn shown(&self, place: &str) -> String {
        match self.as_text {
            true => format!("case when {place} is not null then pg_catalog.format('%s', {place}) end"),
            false => place.into(),
        }
    }
}

fn type_of(known: &Type, modifier: i32) -> PostgresType {
    let kind = match known.kind() {
        TypeKind::Enum(_) => Kind::Enum,
        TypeKind::Array(_) => Kind::Array,
        TypeKind::Range(_) | TypeKind::Multirange(_) => Kind::Range,
        // A domain is told as its base type, if ever.
        TypeKind::Composite(_) | TypeKind::Domain(_) => Kind::Composite,
        _ => Kind::Base,
    };
    PostgresType { oid: known.oid(), modifier, kind, name: known.name().into() }
}
