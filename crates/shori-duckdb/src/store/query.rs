//! Questions of people to a store: one reading statement each.
//!
//! What keeps a question from writing: it is one statement (a semicolon within is refused, wherever it stands), it
//! begins like a reading one, and its transaction is read only, so that DuckDB refuses writes that hide inside. It may
//! read files with the rights of the process: a question comes from who runs the pipeline.

use arrow::array::RecordBatch;
use shori_core::{Error, ErrorKind, Result};

use super::session::Session;
use crate::database::duckdb_error;

const READING_WORDS: [&str; 7] = ["select", "with", "from", "values", "describe", "show", "summarize"];
/// Rows that an answer holds at most.
const ANSWER_ROWS_MAX: usize = 1_000_000;

pub(super) fn query(session: &Session, sql: &str) -> Result<Vec<RecordBatch>> {
    let statement = reading_statement(sql)?;
    session.batch("begin transaction read only", "a question")?;
    let answer = run(session, statement);
    session.roll_back();
    answer
}

fn run(session: &Session, sql: &str) -> Result<Vec<RecordBatch>> {
    let fail = |cause| duckdb_error("answer", "the question", cause);
    let mut statement = session.connection.prepare(sql).map_err(fail)?;
    let schema = statement.stream_arrow([]).map_err(fail)?.get_schema();
    let mut batches = Vec::new();
    let mut rows = 0;
    while let Some(array) = statement.step().map_err(fail)? {
        let batch = RecordBatch::from(&array);
        rows += batch.num_rows();
        batches.push(batch);
        if rows > ANSWER_ROWS_MAX {
            let cause = format!("it has more than {ANSWER_ROWS_MAX} rows");
            return Err(Error::new(ErrorKind::Usage, "answer", "the question", cause).with_remedy("add a limit"));
        }
    }
    if batches.is_empty() {
        batches.push(RecordBatch::new_empty(schema));
    }
    Ok(batches)
}

/// The statement without the semicolon that ends it.
fn reading_statement(sql: &str) -> Result<&str> {
    let refuse = |cause: &str| Err(Error::new(ErrorKind::Usage, "answer", "the question", cause));
    let statement = sql.trim();
    let statement = statement.strip_suffix(';').unwrap_or(statement).trim_end();
    if statement.contains(';') {
        return refuse("only one statement is taken, and no semicolon within (chr(59) makes one)");
    }
    let word: String = statement.chars().take_while(|letter| letter.is_ascii_alphabetic()).collect();
    if !READING_WORDS.contains(&word.to_lowercase().as_str()) {
        return refuse(&format!("only reading statements are taken: {}", READING_WORDS.join(", ")));
    }
    Ok(statement)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reading_statement_is_taken_and_nothing_else() {
        assert_eq!(reading_statement(" select 1 ;\n").unwrap(), "select 1");
        for refused in ["", "drop table t", "select 1; drop table t", "select ';'", "copy t to 'f'", "(select 1)", ";;"]
        {
            assert!(reading_statement(refused).is_err(), "{refused}");
        }
    }
}
