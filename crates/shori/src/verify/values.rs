//! SQLite values on their way into the scratch database: as numbers, text or bytes, made what their column declares by
//! DuckDB's own casts, so that no decoder of the engine takes part.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder, BooleanBuilder, Float64Builder, Int64Builder, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use rusqlite::types::ValueRef;
use shori_core::{Error, ErrorKind, Result};

use super::ColumnInput;
use super::scratch::{Scratch, quote_name};

/// Rows moved at once.
const BATCH_ROWS: usize = 122_880;

enum Builder {
    Integer(Int64Builder),
    Real(Float64Builder),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
}

impl Builder {
    fn of(type_name: &str) -> Self {
        match type_name {
            "boolean" | "int16" | "int32" | "int64" => Builder::Integer(Int64Builder::new()),
            "float32" | "float64" => Builder::Real(Float64Builder::new()),
            "binary" => Builder::Bytes(BinaryBuilder::new()),
            _ => Builder::Text(StringBuilder::new()),
        }
    }

    fn data_type(&self) -> DataType {
        match self {
            Builder::Integer(_) => DataType::Int64,
            Builder::Real(_) => DataType::Float64,
            Builder::Text(_) => DataType::Utf8,
            Builder::Bytes(_) => DataType::Binary,
        }
    }

    fn duckdb_type(&self) -> &'static str {
        match self {
            Builder::Integer(_) => "bigint",
            Builder::Real(_) => "double",
            Builder::Text(_) => "varchar",
            Builder::Bytes(_) => "blob",
        }
    }

    fn push_null(&mut self) {
        match self {
            Builder::Integer(builder) => builder.append_null(),
            Builder::Real(builder) => builder.append_null(),
            Builder::Text(builder) => builder.append_null(),
            Builder::Bytes(builder) => builder.append_null(),
        }
    }

    /// False where the value is of a kind that the column does not take; null stands for it then.
    fn push(&mut self, value: ValueRef<'_>, type_name: &str) -> bool {
        let takes_numbers = type_name.starts_with("decimal");
        match (&mut *self, value) {
            (_, ValueRef::Null) => self.push_null(),
            (Builder::Integer(builder), ValueRef::Integer(number)) => builder.append_value(number),
            (Builder::Real(builder), ValueRef::Real(number)) => builder.append_value(number),
            (Builder::Real(builder), ValueRef::Integer(number))
                if type_name == "float64" && number.unsigned_abs() <= DOUBLE_EXACT_TO =>
            {
                builder.append_value(number as f64);
            }
            (Builder::Text(builder), ValueRef::Integer(number)) if takes_numbers => {
                builder.append_value(number.to_string());
            }
            (Builder::Text(builder), ValueRef::Real(number)) if takes_numbers && is_exact(number, type_name) => {
                builder.append_value(number.to_string());
            }
            (Builder::Text(builder), ValueRef::Text(text)) => match std::str::from_utf8(text) {
                Ok(text) => builder.append_value(text),
                Err(_) => {
                    self.push_null();
                    return false;
                }
            },
            (Builder::Bytes(builder), ValueRef::Blob(bytes)) => builder.append_value(bytes),
            _ => {
                self.push_null();
                return false;
            }
        }
        true
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Builder::Integer(builder) => Arc::new(builder.finish()),
            Builder::Real(builder) => Arc::new(builder.finish()),
            Builder::Text(builder) => Arc::new(builder.finish()),
            Builder::Bytes(builder) => Arc::new(builder.finish()),
        }
    }
}

/// The DuckDB type of a column, from its name in the configuration: `decimal(18,2)`.
pub(super) fn duckdb_type(type_name: &str) -> &str {
    match type_name {
        "int16" => "smallint",
        "int32" => "integer",
        "int64" => "bigint",
        "float32" => "float",
        "float64" => "double",
        "text" => "varchar",
        "binary" => "blob",
        // boolean, date, time, timestamp, timestamptz and decimals are called the same.
        other => other,
    }
}

/// The value of a column of the raw table in its type; null where the text is none of those that docs/sqlite.md names,
/// or does not fit. DuckDB's casts take more than those, round decimals, and leave offsets out.
fn cast(column: &ColumnInput) -> String {
    let (name, wanted) = (quote_name(&column.name), duckdb_type(&column.type_name));
    let when = |condition: String, value: String| format!("case when {condition} then {value} end");
    let matches = |pattern: &str| format!("regexp_full_match({name}, '{pattern}')");
    match column.type_name.as_str() {
        "boolean" => when(format!("{name} in (0, 1)"), format!("{name} = 1")),
        "float32" => when(format!("{name}::float::double = {name}"), format!("{name}::float")),
        "date" => when(matches(DATE), format!("try_cast({name} as date)")),
        "time" => when(matches(TIME), format!("try_cast({name} as time)")),
        "timestamp" | "timestamptz" => {
            // Seconds may be left out only where there is no offset, and a space before that is none of its own.
            let text = format!(
                "regexp_replace(regexp_replace(upper({name}), '^(.{{11}}..:..)( ?[Z+-].*)?$', '\\1:00\\2'),
                ' ([Z+-])', '\\1')"
            );
            // In the zone that the scratch database is set to: UTC.
            when(
                matches(&format!("{DATE}([Tt ]{TIME}( ?([Zz]|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?))?)?")),
                format!("try_cast(try_cast({text} as timestamptz) as {wanted})"),
            )
        }
        decimal if decimal.starts_with("decimal") => {
            let places = match scale_of(decimal) {
                0 => "0+".to_string(),
                scale => format!("[0-9]{{1,{scale}}}0*"),
            };
            when(matches(&format!("[+-]?[0-9]+(\\.{places})?")), format!("try_cast({name} as {wanted})"))
        }
        _ => format!("try_cast({name} as {wanted})"),
    }
}

/// The places of `decimal(precision,scale)`.
fn scale_of(decimal: &str) -> u8 {
    decimal.trim_end_matches(')').rsplit(',').next().and_then(|scale| scale.trim().parse().ok()).unwrap_or(0)
}

/// Whether a double stands for one decimal alone: it does up to 15 significant digits.
fn is_exact(number: f64, decimal: &str) -> bool {
    (number * 10f64.powi(i32::from(scale_of(decimal)))).round().abs() < DECIMAL_UNIQUE_BELOW
}

const DECIMAL_UNIQUE_BELOW: f64 = 1e15;
/// Integers up to here are doubles exactly.
const DOUBLE_EXACT_TO: u64 = 1 << 53;
const DATE: &str = "[0-9]{4}-[0-9]{2}-[0-9]{2}";
const TIME: &str = "([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\\.([0-9]{1,5}|[0-9]{6}0{0,3}))?)?";
/// Of a row of which the key alone counts: whether it could be carried whole.
pub(super) const WHOLE: &str = "__whole";
/// Columns of the raw table beside the source's: whether all values, and whether those of the key, are of kinds that
/// their columns take.
const FITS: &str = "__fits";
const KEY_FITS: &str = "__key_fits";

/// Writes rows of SQLite values to a table of the scratch database, a batch at a time. A row that cannot be carried is
/// left out.
pub(super) struct Loader<'s> {
    scratch: &'s Scratch,
    schema: &'static str,
    table: String,
    columns: Vec<ColumnInput>,
    is_key: Vec<bool>,
    builders: Vec<Builder>,
    fits: BooleanBuilder,
    key_fits: BooleanBuilder,
    rows: usize,
    /// A condition on rows of which the key alone counts; their other values are null where they do not fit, and `WHOLE`
    /// tells whether they all do.
    key_counts: Option<&'static str>,
    misfits: u64,
    keeps_keys: bool,
}

impl<'s> Loader<'s> {
    /// Creates `schema.table` with `columns`, and with [`WHOLE`] where of some rows the key alone counts.
    pub(super) fn new(
        scratch: &'s Scratch,
        schema: &'static str,
        table: &str,
        columns: Vec<ColumnInput>,
        key: &[String],
        key_counts: Option<&'static str>,
    ) -> Result<Self> {
        let builders: Vec<_> = columns.iter().map(|column| Builder::of(&column.type_name)).collect();
        let is_key: Vec<_> = columns.iter().map(|column| key.contains(&column.name)).collect();
        let target = |column: &ColumnInput| format!("{} {}", quote_name(&column.name), duckdb_type(&column.type_name));
        let raw: Vec<_> = columns
            .iter()
            .zip(&builders)
            .map(|(column, builder)| format!("{} {}", quote_name(&column.name), builder.duckdb_type()))
            .collect();
        let keys = columns.iter().zip(&is_key).filter(|(_, is_key)| **is_key).map(|(column, _)| target(column));
        let keys = keys.collect::<Vec<_>>().join(", ");
        scratch.execute(&format!(
            "create table {schema}.{name} ({}{whole});
            create table if not exists misfits.{name} ({keys});
            create or replace table main.raw ({}, {FITS} boolean, {KEY_FITS} boolean);",
            columns.iter().map(target).collect::<Vec<_>>().join(", "),
            raw.join(", "),
            name = quote_name(table),
            whole = if key_counts.is_some() { format!(", {WHOLE} boolean") } else { String::new() }
        ))?;
        Ok(Self {
            scratch,
            schema,
            table: table.to_string(),
            columns,
            is_key,
            builders,
            fits: BooleanBuilder::new(),
            key_fits: BooleanBuilder::new(),
            rows: 0,
            key_counts,
            misfits: 0,
            keeps_keys: false,
        })
    }

    /// Writes the keys of rows that are left out to `misfits.<table>`.
    pub(super) fn keeping_keys(mut self) -> Self {
        self.keeps_keys = true;
        self
    }

    /// Adds one row; `value` gives the value of each column.
    pub(super) fn push<'v>(&mut self, mut value: impl FnMut(usize) -> rusqlite::Result<ValueRef<'v>>) -> Result<()> {
        let (mut fits, mut key_fits) = (true, true);
        for index in 0..self.builders.len() {
            let column = &self.columns[index];
            let object = || format!("column {} of table {}", column.name, self.table);
            let value = value(index).map_err(|cause| Error::new(ErrorKind::Refused, "read", object(), cause))?;
            let taken = self.builders[index].push(value, &column.type_name);
            let taken = taken && !(self.is_key[index] && matches!(value, ValueRef::Null));
            fits &= taken;
            key_fits &= taken || !self.is_key[index];
        }
        self.fits.append_value(fits);
        self.key_fits.append_value(key_fits);
        self.rows += 1;
        if self.rows == BATCH_ROWS { self.flush() } else { Ok(()) }
    }

    /// Returns how many rows were left out.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.flush()?;
        self.scratch.execute("drop table main.raw")?;
        Ok(self.misfits)
    }

    fn flush(&mut self) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        self.rows = 0;
        let mut fields: Vec<_> = self
            .columns
            .iter()
            .zip(&self.builders)
            .map(|(column, builder)| Field::new(&column.name, builder.data_type(), true))
            .collect();
        fields.extend([FITS, KEY_FITS].map(|name| Field::new(name, DataType::Boolean, false)));
        let mut arrays: Vec<_> = self.builders.iter_mut().map(Builder::finish).collect();
        arrays.push(Arc::new(self.fits.finish()));
        arrays.push(Arc::new(self.key_fits.finish()));
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?;
        self.scratch.append("main", "raw", batch)?;
        self.cast()
    }

    /// Moves the raw rows on.
    fn cast(&mut self) -> Result<()> {
        let (table, columns) = (quote_name(&self.table), || self.columns.iter().zip(&self.is_key));
        let casts: Vec<_> = columns().map(|(column, _)| cast(column)).collect();
        // A value that is there and has no cast does not fit.
        let fit = |column: &ColumnInput| {
            let name = quote_name(&column.name);
            format!("({name} is null or ({}) is not null)", cast(column))
        };
        let all = |flag: &str, keys_only: bool| {
            let wanted = columns().filter(|(_, is_key)| **is_key || !keys_only);
            wanted.map(|(column, _)| fit(column)).fold(flag.to_string(), |all, one| format!("{all} and {one}"))
        };
        let key_counts = self.key_counts.unwrap_or("false");
        let (fits, key_fits) = (all(FITS, false), all(KEY_FITS, true));
        self.scratch.execute(&format!(
            "insert into {}.{table} select {}{} from main.raw where ({fits}) or ({key_counts} and {key_fits})",
            self.schema,
            casts.join(", "),
            if self.key_counts.is_some() { format!(", {fits}") } else { String::new() }
        ))?;
        let left_out = format!("from main.raw where not (({fits}) or ({key_counts} and {key_fits}))");
        let misfits = self.scratch.number(&format!("select count(*) {left_out}"))?;
        self.misfits += misfits;
        if misfits > 0 && self.keeps_keys {
            let keys: Vec<_> = columns().filter(|(_, is_key)| **is_key).map(|(column, _)| cast(column)).collect();
            self.scratch.execute(&format!(
                "insert into misfits.{table} select {} {left_out} and {key_fits}",
                keys.join(", ")
            ))?;
        }
        self.scratch.execute("truncate main.raw")
    }
}
