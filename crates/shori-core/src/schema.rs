//! The shape of a captured table, and what may change in it.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// Columns of a captured table in source order, and the indexes of those that make its key (never empty).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableSchema {
    pub table: Arc<str>,
    pub columns: SchemaRef,
    pub key: Vec<usize>,
}

/// What a table's new schema is to its old one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SchemaChange {
    Same,
    /// Columns came or went; all others keep their type. Rows staged before hold null in an added column; a dropped
    /// column stays in the log and in state, and is null in rows changed after.
    Evolved {
        added: Vec<Arc<Field>>,
        dropped: Vec<Arc<Field>>,
    },
    /// The key or a column's type is another one: the capture stops and needs a resnapshot.
    Incompatible {
        reason: String,
    },
}

/// Column names that mean something else where rows are kept: DuckDB finds rows by `rowid`, and a query's tables have the
/// commit of each row as `__lsn`. Whatever their case.
const TAKEN_NAMES: [&str; 2] = ["rowid", "__lsn"];

impl TableSchema {
    /// Fails when the key is empty, a type is none that [`is_carried`], or a column has a name that cannot be kept.
    pub fn new(table: &str, fields: Vec<Field>, key: &[&str]) -> Result<Self> {
        let refuse = |cause: String| Err(Error::new(ErrorKind::Schema, "capture", format!("table {table}"), cause));
        if key.is_empty() {
            return refuse("it has no key".into());
        }
        let mut indexes = Vec::with_capacity(key.len());
        for name in key {
            match fields.iter().position(|field| field.name() == name) {
                Some(index) => indexes.push(index),
                None => return refuse(format!("its key column {name} is not among its columns")),
            }
        }
        if let Some(field) = fields.iter().find(|field| !is_carried(field.data_type())) {
            return refuse(format!(
                "column {} has type {}, which no store carries",
                field.name(),
                type_name(field.data_type())
            ));
        }
        let is_taken = |field: &&Field| TAKEN_NAMES.contains(&field.name().to_lowercase().as_str());
        if let Some(field) = fields.iter().find(is_taken) {
            let cause =
                format!("column {} has a name that stands for something else where rows are kept", field.name());
            return refuse(cause).map_err(|error| error.with_remedy("rename the column in the source"));
        }
        Ok(Self { table: table.into(), columns: Arc::new(Schema::new(fields)), key: indexes })
    }

    pub fn key_names(&self) -> Vec<&str> {
        self.key.iter().map(|&index| self.columns.field(index).name().as_str()).collect()
    }

    /// What changes when `self` is followed by `next`.
    pub fn change_to(&self, next: &TableSchema) -> SchemaChange {
        if self.key_names() != next.key_names() {
            return SchemaChange::Incompatible {
                reason: format!(
                    "its key was ({}) and is ({})",
                    self.key_names().join(", "),
                    next.key_names().join(", ")
                ),
            };
        }
        let mut added = Vec::new();
        for field in next.columns.fields() {
            match self.columns.field_with_name(field.name()) {
                Ok(old) if old.data_type() == field.data_type() => {}
                Ok(old) => {
                    return SchemaChange::Incompatible {
                        reason: format!(
                            "column {} was {} and is {}",
                            field.name(),
                            type_name(old.data_type()),
                            type_name(field.data_type())
                        ),
                    };
                }
                Err(_) => added.push(field.clone()),
            }
        }
        let gone = |field: &&Arc<Field>| next.columns.field_with_name(field.name()).is_err();
        let dropped: Vec<_> = self.columns.fields().iter().filter(gone).cloned().collect();
        if added.is_empty() && dropped.is_empty() {
            SchemaChange::Same
        } else {
            SchemaChange::Evolved { added, dropped }
        }
    }
}

/// The Arrow types that every source may make and every store must take. Times are microseconds; `Timestamp` without a
/// zone is wall time as the source holds it, with "UTC" it is an instant.
pub fn is_carried(data_type: &DataType) -> bool {
    match data_type {
        DataType::Boolean
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::Binary
        | DataType::Date32
        | DataType::Time64(TimeUnit::Microsecond)
        | DataType::Timestamp(TimeUnit::Microsecond, None) => true,
        DataType::Timestamp(TimeUnit::Microsecond, Some(zone)) => zone.as_ref() == "UTC",
        DataType::Decimal128(precision, scale) => *precision <= 38 && *scale >= 0,
        _ => false,
    }
}

/// The name a column type has in control tables and messages: `decimal(18,2)`. Permanent: logs keep it.
pub fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Boolean => "boolean".into(),
        DataType::Int16 => "int16".into(),
        DataType::Int32 => "int32".into(),
        DataType::Int64 => "int64".into(),
        DataType::Float32 => "float32".into(),
        DataType::Float64 => "float64".into(),
        DataType::Utf8 => "text".into(),
        DataType::Binary => "binary".into(),
        DataType::Date32 => "date".into(),
        DataType::Time64(_) => "time".into(),
        DataType::Timestamp(_, None) => "timestamp".into(),
        DataType::Timestamp(_, Some(_)) => "timestamptz".into(),
        DataType::Decimal128(precision, scale) => format!("decimal({precision},{scale})"),
        other => other.to_string(),
    }
}

/// The inverse of [`type_name`]; `None` for anything else.
pub fn parse_type(name: &str) -> Option<DataType> {
    Some(match name {
        "boolean" => DataType::Boolean,
        "int16" => DataType::Int16,
        "int32" => DataType::Int32,
        "int64" => DataType::Int64,
        "float32" => DataType::Float32,
        "float64" => DataType::Float64,
        "text" => DataType::Utf8,
        "binary" => DataType::Binary,
        "date" => DataType::Date32,
        "time" => DataType::Time64(TimeUnit::Microsecond),
        "timestamp" => DataType::Timestamp(TimeUnit::Microsecond, None),
        "timestamptz" => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        _ => {
            let (precision, scale) = name.strip_prefix("decimal(")?.strip_suffix(')')?.split_once(',')?;
            let decimal = DataType::Decimal128(precision.trim().parse().ok()?, scale.trim().parse().ok()?);
            return is_carried(&decimal).then_some(decimal);
        }
    })
}

/// How a [`TableSchema`] is kept in a control table, as JSON. Permanent: logs keep it.
#[derive(Serialize, Deserialize)]
struct StoredSchema {
    table: String,
    columns: Vec<StoredColumn>,
    key: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct StoredColumn {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    nullable: bool,
}

impl TableSchema {
    pub fn to_json(&self) -> String {
        let stored = StoredSchema {
            table: self.table.to_string(),
            columns: (self.columns.fields().iter())
                .map(|field| StoredColumn {
                    name: field.name().clone(),
                    type_name: type_name(field.data_type()),
                    nullable: field.is_nullable(),
                })
                .collect(),
            key: self.key_names().into_iter().map(String::from).collect(),
        };
        serde_json::json!(stored).to_string()
    }

    pub fn from_json(json: &str) -> Result<Self> {
        let corrupt = |cause: String| Error::new(ErrorKind::Corrupt, "read", "a stored table schema", cause);
        let stored: StoredSchema = serde_json::from_str(json).map_err(|cause| corrupt(cause.to_string()))?;
        let mut fields = Vec::with_capacity(stored.columns.len());
        for column in &stored.columns {
            let data_type =
                parse_type(&column.type_name).ok_or_else(|| corrupt(format!("unknown type {}", column.type_name)))?;
            fields.push(Field::new(&column.name, data_type, column.nullable));
        }
        let key: Vec<&str> = stored.key.iter().map(String::as_str).collect();
        TableSchema::new(&stored.table, fields, &key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(extra: &[(&str, DataType)]) -> TableSchema {
        let mut fields = vec![Field::new("id", DataType::Int64, false)];
        fields.extend(extra.iter().map(|(name, data_type)| Field::new(*name, data_type.clone(), true)));
        TableSchema::new("orders", fields, &["id"]).unwrap()
    }

    #[test]
    fn columns_may_come_and_go_but_not_change_type() {
        let old = orders(&[("a", DataType::Utf8), ("b", DataType::Int64)]);
        assert_eq!(old.change_to(&old), SchemaChange::Same);
        match old.change_to(&orders(&[("b", DataType::Int64), ("c", DataType::Utf8)])) {
            SchemaChange::Evolved { added, dropped } => {
                assert_eq!((added[0].name().as_str(), dropped[0].name().as_str()), ("c", "a"));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(old.change_to(&orders(&[("a", DataType::Int64)])), SchemaChange::Incompatible { .. }));
    }

    #[test]
    fn a_table_without_key_or_with_an_unknown_type_is_refused() {
        let field = || Field::new("id", DataType::Int64, false);
        assert!(TableSchema::new("t", vec![field()], &[]).is_err());
        assert!(TableSchema::new("t", vec![field()], &["other"]).is_err());
        let odd = Field::new("odd", DataType::Duration(TimeUnit::Second), true);
        assert!(TableSchema::new("t", vec![field(), odd], &["id"]).is_err());
    }

    #[test]
    fn a_schema_comes_back_from_its_json() {
        let schema = orders(&[
            ("a", DataType::Decimal128(18, 2)),
            ("b", DataType::Timestamp(TimeUnit::Microsecond, None)),
            ("c", DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))),
            ("d", DataType::Binary),
        ]);
        assert_eq!(TableSchema::from_json(&schema.to_json()).unwrap(), schema);
        assert!(TableSchema::from_json("{}").is_err());
        assert!(TableSchema::from_json(&schema.to_json().replace("decimal(18,2)", "decimal(99,2)")).is_err());
    }
}
