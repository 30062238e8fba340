//! `shori query`

use std::borrow::Cow;
use std::io::{BufWriter, Write};
use std::process::ExitCode;

use arrow::array::{AsArray, RecordBatch};
use arrow::util::pretty::pretty_format_batches;
use clap::Args;
use shori_core::Result;
use shori_duckdb::store::reading_statement;

use super::Which;
use super::printed::unprinted;
use super::reach::{self, Reach};
use super::status::rows;
use crate::config::{Loaded, StoreKind};

/// Run a query over a store, also while the pipeline runs. Reads only.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori query --dir demo \"select * from customers_latest limit 5\"\n  shori query --dir demo --json \"select count(*) as orders from proj_orders_latest\""
)]
pub struct Query {
    #[command(flatten)]
    which: Which,
    /// The store; the staging store if not given
    #[arg(long)]
    store: Option<String>,
    /// Print one JSON object per row
    #[arg(long)]
    json: bool,
    /// One statement that reads, in the store's own SQL: DuckDB's or PostgreSQL's
    sql: String,
}

impl Query {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let reach = Reach::to_look(&loaded)?;
        let store = self.store.as_deref();
        if reach::kind(&loaded, store)? == StoreKind::Postgres {
            return ask_postgres(&loaded, &reach, store, &self.sql, self.json);
        }
        // Asked within a statement of ours, it would be refused less clearly.
        let question = reading_statement(&self.sql)?;
        let described = reach.query(&loaded, store, &format!("describe select * from (\n{question}\n) as q"))?;
        let columns = rows(&described);
        if self.json {
            let sql = as_json(question, &columns);
            let mut out = BufWriter::new(std::io::stdout().lock());
            reach.scan(&loaded, store, &sql, &mut |batch| print_lines(&batch, &mut out))?;
            out.flush().map_err(unprinted)?;
        } else {
            // As text made by DuckDB, which has types and values that nothing else can show.
            let sql = as_text(question, &columns);
            // A column is as wide as its widest value: all of them must be known before the first line.
            let batches = reach.query(&loaded, store, &sql)?;
            super::print(format_args!("{}\n", pretty_format_batches(&batches)?))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A question in PostgreSQL's own SQL. The row's name is one that no column has.
fn ask_postgres(loaded: &Loaded, reach: &Reach, store: Option<&str>, sql: &str, json: bool) -> Result<ExitCode> {
    let question = sql.trim_end_matches(|letter: char| letter.is_whitespace() || letter == ';');
    if json {
        let sql = format!("select to_jsonb(__shori_row)::text as line from (\n{question}\n) as __shori_row");
        let mut out = BufWriter::new(std::io::stdout().lock());
        reach.scan(loaded, store, &sql, &mut |batch| print_lines(&batch, &mut out))?;
        out.flush().map_err(unprinted)?;
    } else {
        let batches = reach.query(loaded, store, question)?;
        super::print(format_args!("{}\n", pretty_format_batches(&batches)?))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The question's rows as JSON: DuckDB itself knows best how its values read. A column hides a row of the same name, so
/// the row's name is longer than any of the columns that `describe` names.
fn as_json(question: &str, described: &[Vec<Option<String>>]) -> String {
    let names = described.iter().filter_map(|column| column.first()?.as_deref());
    let row = "q".repeat(1 + names.map(str::len).max().unwrap_or(0));
    format!("select to_json({row})::varchar as line from (\n{question}\n) as {row}")
}

/// The question with its columns, as `describe` names them, made text. They are called by place, since two may have one
/// name.
fn as_text(question: &str, described: &[Vec<Option<String>>]) -> String {
    let text = |column: &Option<String>| column.clone().unwrap_or_default();
    let places: Vec<_> = (0..described.len()).map(|place| format!("c{place}")).collect();
    let shown: Vec<_> = (described.iter().zip(&places))
        .map(|(column, place)| {
            let shown = match column.get(1).map(text).as_deref() {
                Some("BLOB") => format!("lower(hex({place}))"),
                _ => format!("{place}::varchar"),
            };
            let name = column.first().map(text).unwrap_or_default().replace('"', "\"\"");
            format!("{shown} as \"{name}\"")
        })
        .collect();
    format!("select {} from (\n{question}\n) as q({})", shown.join(", "), places.join(", "))
}

fn print_lines(batch: &RecordBatch, out: &mut impl Write) -> Result<()> {
    for line in batch.column(0).as_string::<i32>().iter().flatten() {
        writeln!(out, "{}", without_infinities(line)).map_err(unprinted)?;
    }
    Ok(())
}

/// DuckDB writes floating-point values that are no numbers as they are, which no reader of JSON takes: null stands for
/// them.
fn without_infinities(line: &str) -> Cow<'_, str> {
    const NO_NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NO_NUMBERS.iter().any(|word| line.contains(word)) {
        return Cow::Borrowed(line);
    }
    let (mut kept, mut rest, mut in_text) = (String::with_capacity(line.len()), line, false);
    while let Some(letter) = rest.chars().next() {
        let word = NO_NUMBERS.iter().find(|word| !in_text && rest.starts_with(**word));
        let taken = match (word, letter) {
            (Some(word), _) => word.len(),
            // What follows ends no text.
            (None, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            _ => letter.len_utf8(),
        };
        in_text ^= letter == '"';
        let (head, tail) = rest.split_at(taken);
        kept.push_str(if word.is_some() { "null" } else { head });
        rest = tail;
    }
    Cow::Owned(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_null_outside_text_only() {
        let line = r#"{"a":Infinity,"b":[-Infinity,NaN],"NaN":"a \"NaN\" Infinity","ü":"\\","c":NaN}"#;
        let kept = r#"{"a":null,"b":[null,null],"NaN":"a \"NaN\" Infinity","ü":"\\","c":null}"#;
        assert_eq!(without_infinities(line), kept);
        assert_eq!(without_infinities(kept), kept);
    }
}
