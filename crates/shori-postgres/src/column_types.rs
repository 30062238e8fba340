//! What a PostgreSQL column is carried as.
//!
//! A type is carried when every value of it has one exact place in an Arrow type of the core, or is refused alone (an
//! infinite date). Any other type is refused with a reason, unless the column is configured as text: then what the
//! server prints is carried. `docs/postgres-types.md` is the table for users.

use arrow::datatypes::{DataType, TimeUnit};

/// Type of a column as the catalogs hold it (`pg_type`, and `atttypmod` in `pg_attribute`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PostgresType {
    pub oid: u32,
    /// What stands in parentheses after the name, encoded by type; -1 for nothing.
    pub modifier: i32,
    pub kind: Kind,
    /// Without its schema.
    pub name: String,
}

/// What a type is made of. A domain is described as its base type, with the modifier that it gives to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Base,
    Enum,
    Array,
    /// Multiranges too.
    Range,
    Composite,
}

/// Object ids of built-in types (`pg_type.dat`): the same in every server.
pub(crate) mod oid {
    pub const BOOL: u32 = 16;
    pub const BYTEA: u32 = 17;
    pub const CHAR: u32 = 18;
    pub const NAME: u32 = 19;
    pub const INT8: u32 = 20;
    pub const INT2: u32 = 21;
    pub const INT4: u32 = 23;
    pub const TEXT: u32 = 25;
    pub const OID: u32 = 26;
    pub const JSON: u32 = 114;
    pub const XML: u32 = 142;
    pub const FLOAT4: u32 = 700;
    pub const FLOAT8: u32 = 701;
    pub const BPCHAR: u32 = 1042;
    pub const VARCHAR: u32 = 1043;
    pub const DATE: u32 = 1082;
    pub const TIME: u32 = 1083;
    pub const TIMESTAMP: u32 = 1114;
    pub const TIMESTAMPTZ: u32 = 1184;
    pub const NUMERIC: u32 = 1700;
    pub const UUID: u32 = 2950;
    pub const JSONB: u32 = 3802;
}

const REMEDY: &str = "configure it as text";

/// The Arrow type that carries the column, one that [`is_carried`](shori_core::schema::is_carried); or why there is
/// none, and what to do about it. `as_text` is whether the column is configured as text.
pub fn arrow_type(column: &PostgresType, as_text: bool) -> Result<DataType, String> {
    if as_text { Ok(DataType::Utf8) } else { native_type(column) }
}

/// Whether only what the server prints can be decoded, so that the stream must be read in text format: the column is
/// configured as text, and its binary format is not text.
pub fn needs_text(column: &PostgresType, as_text: bool) -> bool {
    as_text && native_type(column) != Ok(DataType::Utf8)
}

fn native_type(column: &PostgresType) -> Result<DataType, String> {
    let refuse = |reason: &str| Err(format!("type {} {reason}; {REMEDY}", column.name));
    match column.kind {
        Kind::Enum => return Ok(DataType::Utf8),
        Kind::Base => {}
        Kind::Array => return refuse("is an array, which is not carried"),
        Kind::Range => return refuse("is a range, which is not carried"),
        Kind::Composite => return refuse("is a composite, which is not carried"),
    }
    Ok(match column.oid {
        oid::BOOL => DataType::Boolean,
        oid::INT2 => DataType::Int16,
        oid::INT4 => DataType::Int32,
        // Object ids are 32 bits without a sign.
        oid::INT8 | oid::OID => DataType::Int64,
        oid::FLOAT4 => DataType::Float32,
        oid::FLOAT8 => DataType::Float64,
        oid::NUMERIC => return decimal_type(column.modifier),
        oid::TEXT | oid::VARCHAR | oid::BPCHAR | oid::NAME | oid::CHAR => DataType::Utf8,
        oid::UUID | oid::JSON | oid::JSONB | oid::XML => DataType::Utf8,
        oid::BYTEA => DataType::Binary,
        oid::DATE => DataType::Date32,
        oid::TIME => DataType::Time64(TimeUnit::Microsecond),
        oid::TIMESTAMP => DataType::Timestamp(TimeUnit::Microsecond, None),
        oid::TIMESTAMPTZ => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        // Types of extensions get an id when they are created.
        _ if column.name == "citext" => DataType::Utf8,
        _ => return refuse("is not carried"),
    })
}

/// The modifier of `numeric(p, s)` is `(p << 16 | s) + 4`, with `s` in eleven bits, as a two's complement since
/// PostgreSQL 15 (`make_numeric_typmod` in `numeric.c`).
fn decimal_type(modifier: i32) -> Result<DataType, String> {
    const HEADER: i32 = 4;
    const PRECISION_MAX: i32 = 38;
    if modifier < HEADER {
        return Err(format!("numeric without precision and scale has no exact decimal type; {REMEDY}"));
    }
    let precision = (modifier - HEADER) >> 16;
    let scale = (((modifier - HEADER) & 0x7ff) ^ 0x400) - 0x400;
    let refuse = |reason: &str| Err(format!("numeric({precision},{scale}) {reason}; {REMEDY}"));
    match (u8::try_from(precision), i8::try_from(scale)) {
        _ if scale < 0 => refuse("has a negative scale"),
        _ if scale > precision => refuse("has a scale above its precision"),
        (Ok(precision @ 1..), Ok(scale)) if i32::from(precision) <= PRECISION_MAX => {
            Ok(DataType::Decimal128(precision, scale))
        }
        _ => refuse("has no exact decimal type of up to 38 digits"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shori_core::schema::is_carried;

    fn base(oid: u32, modifier: i32) -> PostgresType {
        PostgresType { oid, modifier, kind: Kind::Base, name: format!("type_{oid}") }
    }

    fn numeric(precision: i32, scale: i32) -> PostgresType {
        base(oid::NUMERIC, (precision << 16 | scale & 0x7ff) + 4)
    }

    #[test]
    fn built_in_types_have_a_type_that_is_carried() {
        for (oid, name) in [
            (oid::BOOL, "boolean"),
            (oid::BYTEA, "binary"),
            (oid::CHAR, "text"),
            (oid::NAME, "text"),
            (oid::INT8, "int64"),
            (oid::INT2, "int16"),
            (oid::INT4, "int32"),
            (oid::TEXT, "text"),
            (oid::OID, "int64"),
            (oid::JSON, "text"),
            (oid::XML, "text"),
            (oid::FLOAT4, "float32"),
            (oid::FLOAT8, "float64"),
            (oid::BPCHAR, "text"),
            (oid::VARCHAR, "text"),
            (oid::DATE, "date"),
            (oid::TIME, "time"),
            (oid::TIMESTAMP, "timestamp"),
            (oid::TIMESTAMPTZ, "timestamptz"),
            (oid::UUID, "text"),
            (oid::JSONB, "text"),
        ] {
            let data_type = arrow_type(&base(oid, -1), false).unwrap();
            assert!(is_carried(&data_type), "{oid}");
            assert_eq!(shori_core::schema::type_name(&data_type), name, "{oid}");
            assert_eq!(needs_text(&base(oid, -1), true), data_type != DataType::Utf8, "{oid}");
            assert!(!needs_text(&base(oid, -1), false), "{oid}");
        }
    }

    #[test]
    fn numeric_is_a_decimal_where_one_is_wide_enough() {
        for (precision, scale) in [(1, 0), (1, 1), (18, 2), (38, 0), (38, 38)] {
            let expected = DataType::Decimal128(precision as u8, scale as i8);
            assert_eq!(arrow_type(&numeric(precision, scale), false), Ok(expected));
            assert!(needs_text(&numeric(precision, scale), true));
        }
        for (column, reason) in [
            (base(oid::NUMERIC, -1), "without precision"),
            (numeric(39, 0), "38 digits"),
            (numeric(1000, 2), "38 digits"),
            (numeric(1000, 1000), "38 digits"),
            (numeric(5, -2), "numeric(5,-2) has a negative scale"),
            (numeric(5, -1000), "negative scale"),
            (numeric(3, 5), "above its precision"),
            (numeric(3, 1000), "above its precision"),
            (base(oid::NUMERIC, 4), "38 digits"),
            (base(oid::NUMERIC, i32::MAX), ""),
            (base(oid::NUMERIC, i32::MIN), ""),
        ] {
            let refused = arrow_type(&column, false).unwrap_err();
            assert!(refused.contains(reason) && refused.ends_with(REMEDY), "{refused}");
            assert_eq!(arrow_type(&column, true), Ok(DataType::Utf8));
            assert!(needs_text(&column, true));
        }
    }

    #[test]
    fn what_is_not_carried_is_refused_and_can_be_text() {
        let of_kind = |kind, oid, name: &str| PostgresType { oid, modifier: -1, kind, name: name.into() };
        for column in [
            of_kind(Kind::Base, 1266, "timetz"),
            of_kind(Kind::Base, 1186, "interval"),
            of_kind(Kind::Base, 790, "money"),
            of_kind(Kind::Base, 869, "inet"),
            of_kind(Kind::Base, 650, "cidr"),
            of_kind(Kind::Base, 829, "macaddr"),
            of_kind(Kind::Base, 1560, "bit"),
            of_kind(Kind::Base, 600, "point"),
            of_kind(Kind::Base, 90_000, "hstore"),
            of_kind(Kind::Array, 1007, "_int4"),
            of_kind(Kind::Range, 3904, "int4range"),
            of_kind(Kind::Composite, 90_001, "address"),
            of_kind(Kind::Composite, 90_002, "citext"),
        ] {
            let refused = arrow_type(&column, false).unwrap_err();
            assert!(refused.contains(&column.name) && refused.ends_with(REMEDY), "{refused}");
            assert_eq!(arrow_type(&column, true), Ok(DataType::Utf8));
            assert!(needs_text(&column, true));
        }
        for column in [of_kind(Kind::Enum, 90_003, "mood"), of_kind(Kind::Base, 90_004, "citext")] {
            assert_eq!(arrow_type(&column, false), Ok(DataType::Utf8));
            assert!(!needs_text(&column, true));
        }
    }
}
