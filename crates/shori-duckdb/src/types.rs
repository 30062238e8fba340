//! How the column types of the core are spelled in DuckDB.

use arrow::datatypes::{DataType, TimeUnit};
use shori_core::{Error, ErrorKind, Result};

/// The DuckDB type that takes every value of `data_type` and gives it back unchanged. Fails for a type that
/// [`is_carried`](shori_core::schema::is_carried) refuses, except unsigned bytes, which the log's `op` needs.
pub fn duckdb_type(data_type: &DataType) -> Result<String> {
    Ok(match data_type {
        DataType::Boolean => "boolean".into(),
        DataType::UInt8 => "utinyint".into(),
        DataType::Int16 => "smallint".into(),
        DataType::Int32 => "integer".into(),
        DataType::Int64 => "bigint".into(),
        DataType::Float32 => "float".into(),
        DataType::Float64 => "double".into(),
        DataType::Utf8 => "varchar".into(),
        DataType::Binary => "blob".into(),
        DataType::Date32 => "date".into(),
        DataType::Time64(TimeUnit::Microsecond) => "time".into(),
        DataType::Timestamp(TimeUnit::Microsecond, None) => "timestamp".into(),
        DataType::Timestamp(TimeUnit::Microsecond, Some(zone)) if zone.as_ref() == "UTC" => "timestamptz".into(),
        DataType::Decimal128(precision, scale) if *precision <= 38 && *scale >= 0 => {
            format!("decimal({precision},{scale})")
        }
        other => {
            return Err(Error::new(
                ErrorKind::Schema,
                "carry",
                format!("a column of type {other}"),
                "DuckDB has no type for it here",
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_carried_type_has_a_duckdb_type_and_others_have_none() {
        let time = |zone: Option<&str>| DataType::Timestamp(TimeUnit::Microsecond, zone.map(Into::into));
        assert_eq!(duckdb_type(&DataType::Decimal128(18, 2)).unwrap(), "decimal(18,2)");
        assert_eq!(duckdb_type(&time(None)).unwrap(), "timestamp");
        assert_eq!(duckdb_type(&time(Some("UTC"))).unwrap(), "timestamptz");
        assert!(duckdb_type(&time(Some("Europe/Zurich"))).is_err());
        assert!(duckdb_type(&DataType::Decimal128(39, 0)).is_err());
        assert!(duckdb_type(&DataType::Duration(TimeUnit::Second)).is_err());
    }
}
