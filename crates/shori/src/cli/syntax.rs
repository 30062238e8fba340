//! What is wrong with a query's text by itself: all that can be told of it where its tables are not known.

use duckdb::Connection;
use serde::Deserialize;
use shori_core::projection::SqlProjection;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::duckdb_error;

/// How DuckDB answers when it is asked to read a text as statements.
#[derive(Deserialize)]
struct Parsed {
    #[serde(default)]
    error_type: String,
    #[serde(default)]
    error_message: String,
    /// The byte of the text that the message is about.
    position: Option<String>,
}

/// Why the query cannot be parsed. That it parses says nothing of its tables and columns.
pub fn problem(sql: &SqlProjection) -> Result<Option<Error>> {
    let object = format!("the query in {}", sql.file);
    let text = sql.text.trim_end().trim_end_matches(';');
    let parse = || {
        let connection = Connection::open_in_memory()?;
        connection.query_row("select json_serialize_sql(?::varchar)::varchar", [text], |row| row.get::<_, String>(0))
    };
    let answer = parse().map_err(|cause| duckdb_error("parse", object.clone(), cause))?;
    let parsed: Parsed = serde_json::from_str(&answer)
        .map_err(|cause| Error::new(ErrorKind::Internal, "parse", object.clone(), cause))?;
    // Some queries parse and cannot be shown.
    if parsed.error_type != "parser" {
        return Ok(None);
    }
    let position = parsed.position.and_then(|position| position.parse::<usize>().ok());
    let object = match position.and_then(|position| text.as_bytes().get(..position)) {
        Some(before) => format!("{object}, line {}", 1 + before.iter().filter(|byte| **byte == b'\n').count()),
        None => object,
    };
    Ok(Some(Error::new(ErrorKind::Projection, "parse", object, parsed.error_message)))
}
