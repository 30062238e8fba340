//! Generated columns: the stream lacks them, unless PostgreSQL 18 is told to send them.
//!
//! What generates one is immutable and made of its own row's columns alone (PostgreSQL documentation, 5.4 "Generated
//! Columns"). So the server computes them once more, of the values as they were sent: of every version its own, whatever the
//! row is by now. That the expression gives what is stored is looked at when the table is taken up.

use std::collections::HashMap;
use std::ops::Range;

use shori_core::change::ChangeBatch;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Statement};

use crate::PostgresConfig;
use crate::catalog::{Column, Generated, Layout, Sent};
use crate::column_builder::ColumnBuilder;
use crate::connect::{quoted, sql_error};
use crate::message::Value;
use crate::snapshot::{Parameter, Raw};
use crate::source::answered;

/// Rows of one statement: the next larger one of these, the last row told again where there are fewer.
const ROWS_AT_ONCE: [usize; 3] = [1, 16, 128];
/// A statement has no more parameters than that (PostgreSQL documentation, 55.7 "Message Formats", Bind).
const PARAMETERS_MAX: usize = 65_535;
/// Rows of a table of which what is stored is compared with what the expression gives.
const PROVED_ROWS: usize = 1_000;

/// Of an expression, the server does not print the cast to the column's own type.
const COLUMNS: &str = "
select
    a.attname::text,
    a.atttypid,
    a.atttypmod,
    a.attnotnull,
    pg_catalog.format(
        '(%s)::%s',
        pg_catalog.pg_get_expr(d.adbin, d.adrelid),
        pg_catalog.format_type(a.atttypid, a.atttypmod)
    ),
    input.names,
    input.types
from pg_catalog.pg_attribute a
join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
cross join lateral (
    select
        coalesce(array_agg(i.attname::text order by i.attnum), '{}') as names,
        coalesce(array_agg(pg_catalog.format_type(i.atttypid, i.atttypmod) order by i.attnum), '{}') as types
    from pg_catalog.pg_attribute i
    where i.attrelid = a.attrelid and i.attnum <> a.attnum and i.attnum in (
        select refobjsubid
        from pg_catalog.pg_depend
        where refclassid = 'pg_catalog.pg_class'::regclass and refobjid = a.attrelid and refobjsubid > 0 and (
            classid = 'pg_catalog.pg_attrdef'::regclass and objid = d.oid
            or classid = 'pg_catalog.pg_class'::regclass and objid = a.attrelid and objsubid = a.attnum
        )
    )
) input
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and a.attgenerated <> ''
order by a.attnum";

/// The generated columns of a table as the catalogs have them now, sent or not.
pub(crate) async fn columns(client: &Client, oid: u32, table: &str) -> Result<Vec<Sent>> {
    let rows = client.query(COLUMNS, &[&oid]).await;
    let rows = rows.map_err(|cause| sql_error("look at", &format!("generated columns of table {table}"), cause))?;
    let column = |row: &tokio_postgres::Row| {
        let (names, types): (Vec<String>, Vec<String>) = (row.get(5), row.get(6));
        let inputs = names.into_iter().zip(types).collect();
        Sent {
            name: row.get(0),
            type_oid: row.get(1),
            modifier: row.get(2),
            nullable: !row.get::<_, bool>(3),
            generated: Some(Generated { expression: row.get(4), inputs }),
        }
    };
    Ok(rows.iter().map(column).collect())
}

/// Refuses a table of which some rows hold something else than the expression gives now: what is called immutable may not be.
pub(crate) async fn prove(client: &Client, table: &str, layout: &Layout) -> Result<()> {
    for column in layout.generated() {
        let Some(generated) = &column.generated else { continue };
        let (name, expression) = (quoted(&column.name), &generated.expression);
        let query = format!(
            "select count(*)
             from (select {name} as stored, {expression} as computed from {table} limit {PROVED_ROWS}) compared
             where stored::text is distinct from computed::text"
        );
        let differing: i64 = match client.query_one(&query, &[]).await {
            Ok(row) => row.get(0),
            // That reading the table takes a right is told where rights are.
            Err(cause) if cause.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => return Ok(()),
            Err(cause) => {
                let error = sql_error("compute generated columns of", &format!("table {table}"), cause);
                return Err(match error.kind() {
                    // What is wrong is the expression: one bad table stops itself only (contract 11).
                    ErrorKind::Refused => Error::new(ErrorKind::Schema, "capture", format!("table {table}"), error),
                    _ => error,
                });
            }
        };
        if differing > 0 {
            let cause = format!(
                "generated column {} holds something else than {expression} gives, in {differing} of its first rows",
                column.name
            );
            return Err(Error::new(ErrorKind::Schema, "capture", format!("table {table}"), cause)
                .with_remedy("let it be generated by what is immutable, or publish the other columns alone"));
        }
    }
    Ok(())
}

/// What generated columns are made of, row by row of a batch.
pub(crate) struct Inputs {
    /// The places of the columns among those that are sent.
    columns: Vec<usize>,
    /// Values of the row that is being taken, of each column.
    row: Vec<Input>,
    rows: Vec<InputRow>,
    bytes: Vec<u8>,
}

#[derive(Clone)]
enum Input {
    Null,
    Text(Range<usize>),
    Binary(Range<usize>),
    Unchanged,
}

enum InputRow {
    /// It has no generated values: it is gone.
    Nothing,
    /// What they are made of was not sent: they are as they were.
    Unchanged,
    Given(Vec<Input>),
}

impl Inputs {
    /// `None` where nothing is generated.
    pub fn of(layout: &Layout) -> Option<Self> {
        if layout.generated().is_empty() {
            return None;
        }
        let is_input = |column: &Column| inputs(layout).any(|(name, _)| *name == column.name);
        let columns = layout.sent().iter().enumerate().filter(|(_, column)| is_input(column)).map(|(index, _)| index);
        Some(Self { columns: columns.collect(), row: Vec::new(), rows: Vec::new(), bytes: Vec::new() })
    }

    /// Bytes of memory that it holds.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.len()
            + self.rows.len() * size_of::<InputRow>()
            + self.rows.len() * self.columns.len() * size_of::<Input>()
    }

    /// Takes the value of a column that is sent, in their order.
    pub fn take(&mut self, column: usize, value: Value<'_>) {
        if !self.columns.contains(&column) {
            return;
        }
        let input = match value {
            Value::Null => Input::Null,
            Value::Unchanged => Input::Unchanged,
            Value::Text(bytes) => Input::Text(self.keep(bytes)),
            Value::Binary(bytes) => Input::Binary(self.keep(bytes)),
        };
        self.row.push(input);
    }

    fn keep(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    /// Ends a row of which all columns were taken; whether its generated columns are marked unchanged.
    pub fn end_row(&mut self, leaves_row: bool) -> bool {
        let row = std::mem::take(&mut self.row);
        let is_unchanged = leaves_row && row.iter().any(|input| matches!(input, Input::Unchanged));
        self.rows.push(match (leaves_row, is_unchanged) {
            (false, _) => InputRow::Nothing,
            (true, true) => InputRow::Unchanged,
            (true, false) => InputRow::Given(row),
        });
        is_unchanged
    }

    /// Forgets a row that was begun, or ended last.
    pub fn forget_row(&mut self) {
        self.rows.pop();
    }

    /// Those of some rows of which there is something to compute.
    fn given<'a>(&self, rows: &'a [InputRow]) -> impl Iterator<Item = &'a [Input]> + use<'a> {
        rows.iter().filter_map(|row| match row {
            InputRow::Given(row) => Some(row.as_slice()),
            InputRow::Nothing | InputRow::Unchanged => None,
        })
    }

    fn value(&self, input: &Input) -> Value<'_> {
        match input {
            Input::Null | Input::Unchanged => Value::Null,
            Input::Text(range) => Value::Text(&self.bytes[range.clone()]),
            Input::Binary(range) => Value::Binary(&self.bytes[range.clone()]),
        }
    }
}

/// Whether a generated column is made of this one.
pub(crate) fn is_input(layout: &Layout, column: usize) -> bool {
    layout.sent().get(column).is_some_and(|sent| inputs(layout).any(|(name, _)| *name == sent.name))
}

fn inputs(layout: &Layout) -> impl Iterator<Item = &(String, String)> {
    layout.generated().iter().filter_map(|column| column.generated.as_ref()).flat_map(|generated| &generated.inputs)
}

/// Has the server compute generated columns. Its statements are prepared once.
#[derive(Default)]
pub(crate) struct Evaluator {
    statements: HashMap<(u32, usize), Statement>,
}

impl Evaluator {
    /// The table has other columns.
    pub fn forget(&mut self, layout: &Layout) {
        self.statements.retain(|(oid, _), _| *oid != layout.oid);
    }

    /// Fills in the generated columns of a batch, which are null.
    pub async fn fill(
        &mut self,
        client: &Client,
        config: &PostgresConfig,
        (layout, inputs): (&Layout, &Inputs),
        batch: &mut ChangeBatch,
    ) -> Result<()> {
        let first = layout.sent().len();
        let fields = batch.schema.columns.fields().iter().skip(first);
        let mut builders: Vec<ColumnBuilder> = fields
            .zip(layout.generated())
            .map(|(field, column)| ColumnBuilder::new(field.data_type(), &column.resolved))
            .collect::<Result<_>>()?;
        let at_most = (PARAMETERS_MAX / inputs.columns.len().max(1)).clamp(1, ROWS_AT_ONCE[ROWS_AT_ONCE.len() - 1]);
        let mut left = inputs.given(&inputs.rows).count();
        let mut rest = inputs.rows.as_slice();
        while left > 0 {
            let size = ROWS_AT_ONCE.into_iter().find(|size| *size >= left).unwrap_or(at_most).min(at_most);
            let part: Vec<&[Input]> = inputs.given(rest).take(size).collect();
            // Each statement may take its time; a batch has many.
            let computed = answered(config, self.compute(client, layout, inputs, &part, size)).await?;
            left -= computed.len();
            let mut computed = computed.into_iter();
            while computed.len() > 0 {
                let Some((row, others)) = rest.split_first() else { break };
                let values = if matches!(row, InputRow::Given(_)) { computed.next() } else { None };
                append(layout, &mut builders, values)?;
                rest = others;
            }
        }
        for _ in rest {
            append(layout, &mut builders, None)?;
        }
        batch.columns.truncate(first);
        batch.columns.extend(builders.into_iter().map(ColumnBuilder::finish));
        Ok(())
    }

    /// The generated values of some rows.
    async fn compute(
        &mut self,
        client: &Client,
        layout: &Layout,
        inputs: &Inputs,
        rows: &[&[Input]],
        size: usize,
    ) -> Result<Vec<tokio_postgres::Row>> {
        let fail = |cause| sql_error("compute generated columns of", &format!("table {}", layout.schema.table), cause);
        let statement = match self.statements.get(&(layout.oid, size)) {
            Some(statement) => statement.clone(),
            None => {
                let statement = client.prepare(&query(layout, inputs, size)).await.map_err(fail)?;
                self.statements.insert((layout.oid, size), statement.clone());
                statement
            }
        };
        let Some(last) = rows.last() else { return Ok(Vec::new()) };
        let told = rows.iter().chain(std::iter::repeat_n(last, size - rows.len()));
        let parameters: Vec<Parameter<'_>> =
            told.flat_map(|row| row.iter().map(|input| Parameter(inputs.value(input)))).collect();
        let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            parameters.iter().map(|parameter| parameter as &(dyn tokio_postgres::types::ToSql + Sync)).collect();
        let mut computed = client.query(&statement, &parameters).await.map_err(fail)?;
        if computed.len() != size {
            let cause = format!("{} rows came of {size}", computed.len());
            let object = format!("generated columns of table {}", layout.schema.table);
            return Err(Error::new(ErrorKind::Internal, "compute", object, cause));
        }
        computed.truncate(rows.len());
        Ok(computed)
    }
}

fn append(layout: &Layout, builders: &mut [ColumnBuilder], values: Option<tokio_postgres::Row>) -> Result<()> {
    let object =
        |index: usize| format!("generated column {} of {}", layout.generated()[index].name, layout.schema.table);
    for (index, builder) in builders.iter_mut().enumerate() {
        let Some(row) = &values else {
            builder.append_null();
            continue;
        };
        let value =
            row.try_get::<_, Option<Raw<'_>>>(index).map_err(|cause| sql_error("read", &object(index), cause))?;
        let value = match value {
            None => Value::Null,
            Some(Raw(bytes)) if layout.generated()[index].as_text => Value::Text(bytes),
            Some(Raw(bytes)) => Value::Binary(bytes),
        };
        builder.append(value).map_err(|misfit| Error::new(ErrorKind::Data, "decode", object(index), misfit))?;
    }
    Ok(())
}

/// Computes the generated columns of `size` rows, whose values are its parameters.
fn query(layout: &Layout, inputs: &Inputs, size: usize) -> String {
    let sent = layout.sent();
    let columns: Vec<&Column> = inputs.columns.iter().map(|index| &sent[*index]).collect();
    let types: HashMap<&str, &str> =
        self::inputs(layout).map(|(name, sql_type)| (name.as_str(), sql_type.as_str())).collect();
    let mut number = String::from("row_number");
    while columns.iter().any(|column| column.name == number) {
        number.push('_');
    }
    let parameter = |row: usize, index: usize, column: &Column| {
        let sql_type = types.get(column.name.as_str()).copied().unwrap_or("text");
        format!("${}::{sql_type}", row * columns.len() + index + 1)
    };
    let row = |row: usize| {
        let values = columns.iter().enumerate().map(|(index, column)| parameter(row, index, column));
        let values: Vec<String> = std::iter::once(row.to_string()).chain(values).collect();
        format!("({})", values.join(", "))
    };
    let rows: Vec<String> = (0..size).map(row).collect();
    let names: Vec<String> =
        std::iter::once(number.as_str()).chain(columns.iter().map(|column| column.name.as_str())).map(quoted).collect();
    let computed = layout.generated().iter().filter_map(|column| {
        let expression = &column.generated.as_ref()?.expression;
        Some(match column.as_text {
            // As a snapshot has it.
            true => format!("case when {expression} is not null then pg_catalog.format('%s', {expression}) end"),
            false => expression.clone(),
        })
    });
    format!(
        "select {} from (values {}) as given ({}) order by given.{}",
        computed.collect::<Vec<_>>().join(", "),
        rows.join(", "),
        names.join(", "),
        quoted(&number)
    )
}
