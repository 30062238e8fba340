//! Rows as plain Rust values, and their way to and from Arrow.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array,
    Int16Array, Int32Array, Int64Array, RecordBatch, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Fields, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Schema,
    Time64MicrosecondType, TimeUnit, TimestampMicrosecondType, UInt8Type,
};

/// One value. Dates, times and timestamps are counts (days, microseconds), decimals unscaled: 12.50 of scale 2 is 1250.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Value {
    Null,
    Boolean(bool),
    Integer(i64),
    /// The bits of an `f64`: equality is what tests need, order is not.
    Float(u64),
    Text(Arc<str>),
    Decimal(i128),
    Time(i64),
    Binary(Vec<u8>),
}

pub type Row = Arc<[Value]>;

impl Value {
    pub fn is_null(&self) -> bool {
        *self == Value::Null
    }

    /// The integer, or 0.
    pub fn integer(&self) -> i64 {
        match self {
            Value::Integer(number) | Value::Time(number) => *number,
            _ => 0,
        }
    }

    /// The unscaled decimal, or 0.
    pub fn decimal(&self) -> i128 {
        match self {
            Value::Decimal(number) => *number,
            _ => 0,
        }
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Value::Integer(number)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.into())
    }
}

pub fn row(values: impl IntoIterator<Item = Value>) -> Row {
    values.into_iter().collect()
}

/// The values of some columns of a row.
pub fn pick(row: &Row, columns: &[usize]) -> Row {
    columns.iter().map(|&column| row[column].clone()).collect()
}

/// One value of a column of any carried type.
pub fn value_at(array: &ArrayRef, index: usize) -> Value {
    if array.is_null(index) {
        return Value::Null;
    }
    match array.data_type() {
        DataType::Boolean => Value::Boolean(array.as_boolean().value(index)),
        DataType::UInt8 => Value::Integer(array.as_primitive::<UInt8Type>().value(index).into()),
        DataType::Int16 => Value::Integer(array.as_primitive::<Int16Type>().value(index).into()),
        DataType::Int32 => Value::Integer(array.as_primitive::<Int32Type>().value(index).into()),
        DataType::Int64 => Value::Integer(array.as_primitive::<Int64Type>().value(index)),
        DataType::Float32 => Value::Float(f64::from(array.as_primitive::<Float32Type>().value(index)).to_bits()),
        DataType::Float64 => Value::Float(array.as_primitive::<Float64Type>().value(index).to_bits()),
        DataType::Utf8 => Value::Text(array.as_string::<i32>().value(index).into()),
        DataType::Binary => Value::Binary(array.as_binary::<i32>().value(index).to_vec()),
        DataType::Decimal128(..) => Value::Decimal(array.as_primitive::<Decimal128Type>().value(index)),
        DataType::Date32 => Value::Time(array.as_primitive::<Date32Type>().value(index).into()),
        DataType::Time64(TimeUnit::Microsecond) => {
            Value::Time(array.as_primitive::<Time64MicrosecondType>().value(index))
        }
        DataType::Timestamp(TimeUnit::Microsecond, _) => {
            Value::Time(array.as_primitive::<TimestampMicrosecondType>().value(index))
        }
        other => panic!("type {other} is not carried"),
    }
}

pub fn row_at(columns: &[ArrayRef], index: usize) -> Row {
    columns.iter().map(|column| value_at(column, index)).collect()
}

pub fn rows_of(batch: &RecordBatch) -> Vec<Row> {
    (0..batch.num_rows()).map(|index| row_at(batch.columns(), index)).collect()
}

/// A column of `data_type`. Panics on a value of another type.
pub fn array_of<'a>(data_type: &DataType, values: impl Iterator<Item = &'a Value>) -> ArrayRef {
    macro_rules! collect {
        ($array:ty, $value:ident => $convert:expr, $($variant:pat_param)|+) => {
            Arc::new(values.map(|value| match value {
                Value::Null => None,
                $($variant)|+ => Some($convert),
                other => panic!("{other:?} is no {data_type}"),
            }).collect::<$array>())
        };
    }
    match data_type {
        DataType::Boolean => collect!(BooleanArray, v => *v, Value::Boolean(v)),
        DataType::Int16 => collect!(Int16Array, v => *v as i16, Value::Integer(v)),
        DataType::Int32 => collect!(Int32Array, v => *v as i32, Value::Integer(v)),
        DataType::Int64 => collect!(Int64Array, v => *v, Value::Integer(v)),
        DataType::Float32 => collect!(Float32Array, v => f64::from_bits(*v) as f32, Value::Float(v)),
        DataType::Float64 => collect!(Float64Array, v => f64::from_bits(*v), Value::Float(v)),
        DataType::Utf8 => collect!(StringArray, v => v.to_string(), Value::Text(v)),
        DataType::Binary => collect!(BinaryArray, v => v.clone(), Value::Binary(v)),
        DataType::Date32 => collect!(Date32Array, v => *v as i32, Value::Time(v)),
        DataType::Time64(_) => collect!(Time64MicrosecondArray, v => *v, Value::Time(v)),
        DataType::Timestamp(_, zone) => {
            let values = values.map(|value| match value {
                Value::Null => None,
                Value::Time(time) => Some(*time),
                other => panic!("{other:?} is no {data_type}"),
            });
            Arc::new(values.collect::<TimestampMicrosecondArray>().with_timezone_opt(zone.clone()))
        }
        DataType::Decimal128(precision, scale) => {
            let values = values.map(|value| match value {
                Value::Null => None,
                Value::Decimal(number) => Some(*number),
                other => panic!("{other:?} is no {data_type}"),
            });
            let array = values.collect::<Decimal128Array>();
            Arc::new(array.with_precision_and_scale(*precision, *scale).unwrap())
        }
        other => panic!("type {other} is not carried"),
    }
}

/// One column per field.
pub fn arrays_of(fields: &Fields, rows: &[Row]) -> Vec<ArrayRef> {
    (fields.iter().enumerate())
        .map(|(index, field)| array_of(field.data_type(), rows.iter().map(move |row| &row[index])))
        .collect()
}

pub fn batch_of(fields: &Fields, rows: &[Row]) -> RecordBatch {
    RecordBatch::try_new(Arc::new(Schema::new(fields.clone())), arrays_of(fields, rows)).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::datatypes::Field;

    #[test]
    fn rows_come_back_from_arrow() {
        let fields = Fields::from(vec![
            Field::new("a", DataType::Int64, false),
            Field::new("b", DataType::Utf8, true),
            Field::new("c", DataType::Decimal128(18, 2), true),
            Field::new("d", DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), true),
        ]);
        let rows = vec![
            row([1.into(), "x".into(), Value::Decimal(1250), Value::Time(5)]),
            row([2.into(), Value::Null, Value::Null, Value::Null]),
        ];
        assert_eq!(rows_of(&batch_of(&fields, &rows)), rows);
    }
}
