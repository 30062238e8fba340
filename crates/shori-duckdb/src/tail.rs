//! The end of a large table, where what changed last lies.
//!
//! DuckDB rules out parts of a table by the lowest and highest of what is looked for, and by every single value where those
//! are few. A few old rows among many new ones defeat both: everything is read. So rows near the end are looked for by
//! themselves, which takes a tenth of the time, and the others, few by then, after them.

use duckdb::Connection;

/// Join values that are compared with the lowest and highest of each part of a table: comparing more costs more than
/// reading.
pub(crate) const JOIN_VALUES_MAX: i64 = 1_024;

/// Tests have small tables: where they run, these bounds lie within their sizes.
const fn or_tested(bound: i64, tested: i64) -> i64 {
    if cfg!(debug_assertions) { tested } else { bound }
}

/// Rows of the end: two of DuckDB's row groups.
const TAIL_ROWS: i64 = or_tested(262_144, 12);
/// Smaller tables are searched as a whole.
const LARGE_FROM_ROWS: i64 = or_tested(1_000_000, 24);
/// So few rows are read faster by their ids than by their keys.
pub(crate) const FEW_ROWS: i64 = or_tested(JOIN_VALUES_MAX, 6);

/// Rows of a table of schema `main`, deleted ones among them until they are swept up.
pub(crate) fn rows_of(connection: &Connection, catalog: &str, table: &str) -> duckdb::Result<i64> {
    let size = "select estimated_size from duckdb_tables()
                where database_name = ? and schema_name = 'main' and table_name = ?";
    connection.query_row(size, [catalog, table], |row| row.get(0))
}

/// The row id that the end of a large table begins at. It is an estimate: only speed may depend on it.
pub(crate) fn start_of(connection: &Connection, catalog: &str, table: &str) -> duckdb::Result<Option<i64>> {
    let rows = rows_of(connection, catalog, table)?;
    Ok((rows >= LARGE_FROM_ROWS).then_some(rows - TAIL_ROWS))
}

/// Statements that delete from `table` the row ids in `column` of `found`.
pub(crate) fn deletions(table: &str, found: &str, column: &str, tail: Option<i64>) -> Vec<String> {
    match tail {
        None => vec![format!("delete from {table} where rowid in (select {column} from {found})")],
        Some(tail) => vec![
            format!(
                "delete from {table} where rowid >= {tail}
                 and rowid in (select {column} from {found} where {column} >= {tail})"
            ),
            format!("delete from {table} where rowid in (select {column} from {found} where {column} < {tail})"),
        ],
    }
}
