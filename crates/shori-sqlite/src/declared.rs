//! What a declared column type stands for in Arrow.
//!
//! SQLite keeps any declared type as text and gives it no meaning of its own; this is the meaning that capture gives it.
//!
//! | declared | Arrow | accepted values |
//! |---|---|---|
//! | contains `INT` | `int64` | integers |
//! | contains `CHAR`, `CLOB`, `TEXT`; `JSON`, `UUID` | `text` | UTF-8 text |
//! | contains `BLOB` | `binary` | blobs |
//! | contains `REAL`, `FLOA`, `DOUB` | `float64` | reals, and integers that a double holds exactly |
//! | `BOOLEAN`, `BOOL` | `boolean` | 0 and 1 |
//! | `DATE` | `date` | text `2026-01-02` |
//! | `TIME` | `time` | text `03:04:05.123456` |
//! | `DATETIME`, `TIMESTAMP` | `timestamp` | ISO-8601 text; an offset is taken off, so the value is UTC |
//! | `TIMESTAMPTZ`, `TIMESTAMP WITH TIME ZONE` | `timestamptz` | the same; without an offset it is UTC |
//! | `DECIMAL(p,s)`, `NUMERIC(p,s)` | `decimal(p,s)` | decimal text, integers, reals that are nearest to a value of `s` places |
//!
//! Numbers are not accepted as times: nothing says whether they count days, seconds or milliseconds. Such a column is
//! captured as `int64` or `float64` by naming that type. Every other declared type, and none, needs a type by name too.

use arrow::datatypes::{DataType, TimeUnit};
use shori_core::schema::is_carried;

/// `None` when the declared type stands for nothing.
pub(crate) fn arrow_type(declared: &str) -> Option<DataType> {
    let name = declared.trim().to_ascii_uppercase();
    let bare = name.split('(').next().unwrap_or_default().trim();
    let micros = |zone: Option<&str>| DataType::Timestamp(TimeUnit::Microsecond, zone.map(Into::into));
    match bare {
        "BOOLEAN" | "BOOL" => return Some(DataType::Boolean),
        "DATE" => return Some(DataType::Date32),
        "TIME" => return Some(DataType::Time64(TimeUnit::Microsecond)),
        "DATETIME" | "TIMESTAMP" => {
            return Some(micros(name.ends_with("WITH TIME ZONE").then_some("UTC")));
        }
        "TIMESTAMPTZ" | "TIMESTAMP WITH TIME ZONE" => return Some(micros(Some("UTC"))),
        "DECIMAL" | "NUMERIC" => return decimal(&name),
        "JSON" | "UUID" => return Some(DataType::Utf8),
        _ => {}
    }
    let has = |parts: &[&str]| parts.iter().any(|part| bare.contains(part));
    if has(&["INT"]) {
        Some(DataType::Int64)
    } else if has(&["CHAR", "CLOB", "TEXT"]) {
        Some(DataType::Utf8)
    } else if has(&["BLOB"]) {
        Some(DataType::Binary)
    } else if has(&["REAL", "FLOA", "DOUB"]) {
        Some(DataType::Float64)
    } else {
        None
    }
}

fn decimal(name: &str) -> Option<DataType> {
    let inside = name.split_once('(')?.1.split_once(')')?.0;
    let (precision, scale) = inside.split_once(',').unwrap_or((inside, "0"));
    let data_type = DataType::Decimal128(precision.trim().parse().ok()?, scale.trim().parse().ok()?);
    let DataType::Decimal128(precision, scale) = data_type else { return None };
    (is_carried(&data_type) && precision > 0 && scale as i16 <= precision as i16).then_some(data_type)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shori_core::schema::type_name;

    #[test]
    fn declared_types_stand_for_arrow_types() {
        let cases = [
            ("INTEGER", "int64"),
            ("bigint", "int64"),
            ("UNSIGNED BIG INT", "int64"),
            ("varchar(20)", "text"),
            ("NVARCHAR(50)", "text"),
            ("CLOB", "text"),
            ("JSON", "text"),
            ("BLOB", "binary"),
            ("double precision", "float64"),
            ("REAL", "float64"),
            ("Boolean", "boolean"),
            ("DATE", "date"),
            ("TIME", "time"),
            ("DATETIME", "timestamp"),
            ("TIMESTAMP(6)", "timestamp"),
            ("timestamp with time zone", "timestamptz"),
            ("timestamp(6) with time zone", "timestamptz"),
            ("DECIMAL(18, 2)", "decimal(18,2)"),
            ("numeric(10)", "decimal(10,0)"),
        ];
        for (declared, expected) in cases {
            assert_eq!(arrow_type(declared).map(|found| type_name(&found)).as_deref(), Some(expected), "{declared}");
        }
        for declared in ["", "NUMERIC", "DECIMAL", "DECIMAL(99,2)", "DECIMAL(2,4)", "ANY", "MONEY"] {
            assert_eq!(arrow_type(declared), None, "{declared}");
        }
    }
}
