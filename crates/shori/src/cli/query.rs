//! `shori query`

use std::borrow::Cow;
use std::io::{BufWriter, Write};
use std::process::ExitCode;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Schema};
use arrow::util::pretty::pretty_format_batches;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Timelike};
use clap::Args;
use shori_core::projection::history;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::store::Question;

use super::Which;
use super::printed::unprinted;
use super::reach::{self, Reach};
use super::status::rows;
use crate::config::{Loaded, ProjectionKind, StoreKind};

/// Run a query over a store, also while the pipeline runs. Reads only.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori query --dir demo \"select * from customers_latest limit 5\"\n  shori query --dir demo --json \"select count(*) as orders from proj_orders_latest\"\n  shori query --dir demo --as-of 2026-11-27T18:00:00Z \"select status, count(*) from dim_orders_history group by all\""
)]
pub struct Query {
    #[command(flatten)]
    pub(super) which: Which,
    /// The store; the staging store if not given
    #[arg(long)]
    store: Option<String>,
    /// Histories as they were at this time: only versions that were current then, of rows that were not deleted. Other
    /// tables are as they are now
    #[arg(long, value_name = "TIME", value_parser = time)]
    as_of: Option<NaiveDateTime>,
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
        let at = |question: &str| match self.as_of {
            None => Ok(question.to_string()),
            Some(time) => as_of(&loaded, store, time, question),
        };
        if reach::kind(&loaded, store)? == StoreKind::Postgres {
            let question = self.sql.trim_end_matches(|letter: char| letter.is_whitespace() || letter == ';');
            return ask_postgres(&loaded, &reach, store, &at(question)?, self.json);
        }
        // Asked within a statement of ours, it would be refused less clearly.
        let question = Question::read(&self.sql, &mut |sql| told(&reach.query(&loaded, store, sql)?))?;
        let select = at(question.select)?;
        if question.explain.is_empty() {
            ask_duckdb(&loaded, &reach, store, &select, self.json)?;
        } else {
            explain(&reach.query(&loaded, store, &Question { select: &select, ..question }.sql())?, self.json)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The text that is the only value of an answer.
fn told(answer: &[RecordBatch]) -> Result<String> {
    let value = rows(answer).into_iter().flatten().next().flatten();
    value.ok_or_else(|| Error::new(ErrorKind::Internal, "read", "the question", "DuckDB did not tell its kind"))
}

fn ask_duckdb(loaded: &Loaded, reach: &Reach, store: Option<&str>, question: &str, json: bool) -> Result<()> {
    let described = reach.query(loaded, store, &format!("describe select * from (\n{question}\n) as q"))?;
    let columns = rows(&described);
    if json {
        let sql = as_json(question, &columns);
        let mut out = BufWriter::new(std::io::stdout().lock());
        reach.scan(loaded, store, &sql, &mut |batch| print_lines(&batch, &mut out))?;
        return out.flush().map_err(unprinted);
    }
    // As text made by DuckDB, which has types and values that nothing else can show.
    let sql = as_text(question, &columns);
    // A column is as wide as its widest value: all of them must be known before the first line.
    let batches = reach.query(loaded, store, &sql)?;
    super::print(format_args!("{}\n", pretty_format_batches(&batches)?))
}

/// What DuckDB says of how it answers, which it says in no statement of ours: texts alone.
fn explain(told: &[RecordBatch], json: bool) -> Result<()> {
    if !json {
        return super::print(format_args!("{}\n", pretty_format_batches(told)?));
    }
    let names: Vec<String> = told
        .iter()
        .take(1)
        .flat_map(|batch| batch.schema().fields().iter().map(|field| field.name().clone()).collect::<Vec<_>>())
        .collect();
    for row in rows(told) {
        let values = row.into_iter().map(serde_json::Value::from);
        let line: serde_json::Map<_, _> = names.iter().cloned().zip(values).collect();
        super::print(format_args!("{}\n", serde_json::Value::Object(line)))?;
    }
    Ok(())
}

/// A question in PostgreSQL's own SQL. The row's name is one that no column has.
fn ask_postgres(loaded: &Loaded, reach: &Reach, store: Option<&str>, question: &str, json: bool) -> Result<ExitCode> {
    if json {
        let sql = format!("select to_jsonb(__shori_row)::text as line from (\n{question}\n) as __shori_row");
        let mut out = BufWriter::new(std::io::stdout().lock());
        reach.scan(loaded, store, &sql, &mut |batch| print_lines(&batch, &mut out))?;
        out.flush().map_err(unprinted)?;
    } else {
        let batches = reach.query(loaded, store, question)?;
        let batches = batches.iter().map(with_offsets).collect::<Result<Vec<_>>>()?;
        super::print(format_args!("{}\n", pretty_format_batches(&batches)?))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Times in UTC by its offset: names of zones are not known to what prints them.
fn with_offsets(batch: &RecordBatch) -> Result<RecordBatch> {
    let shown = |field: &FieldRef| match field.data_type() {
        DataType::Timestamp(unit, Some(_)) => {
            let data_type = DataType::Timestamp(*unit, Some("+00:00".into()));
            Arc::new(field.as_ref().clone().with_data_type(data_type))
        }
        _ => field.clone(),
    };
    let schema = Arc::new(Schema::new(batch.schema().fields().iter().map(shown).collect::<Vec<_>>()));
    let columns = batch.columns().iter().zip(schema.fields());
    let columns: Vec<_> = columns.map(|(column, field)| cast(column, field.data_type())).collect::<Result<_, _>>()?;
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

/// Of a second; a leap second has more.
const NANOSECONDS: u32 = 1_000_000_000;

/// A time as people write it; without a zone it is UTC.
fn time(text: &str) -> Result<NaiveDateTime, String> {
    const FORMATS: [&str; 2] = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M"];
    let plain = text.replacen(['T', 't'], " ", 1);
    // Its minutes may be left out.
    let zoned = |format: &&str| DateTime::parse_from_str(&plain, &format!("{format} %#z")).ok();
    let zoned = FORMATS.iter().find_map(zoned).map(|time| time.naive_utc());
    let plain = || FORMATS.iter().find_map(|format| NaiveDateTime::parse_from_str(&plain, format).ok());
    let day = || NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().map(|day| day.and_time(NaiveTime::MIN));
    let read = zoned.or_else(plain).or_else(day);
    let read = read.ok_or("it is no time: write 2026-11-27T18:00:00Z, or 2026-11-27T20:00+02, or 2026-11-27")?;
    if read.nanosecond() >= NANOSECONDS {
        return Err("it has second 60, and no store has one: write second 59, or the minute after".into());
    }
    Ok(read)
}

/// The question with each history of the store cut to what was current at `time`: the rows have the history's name
/// within it, and hide the table.
fn as_of(loaded: &Loaded, store: Option<&str>, time: NaiveDateTime, question: &str) -> Result<String> {
    let asked = reach::name(loaded, store)?;
    let literal = format!("timestamp '{}'", time.format("%Y-%m-%d %H:%M:%S%.6f"));
    let mut views = Vec::new();
    for projection in &loaded.config.projections {
        if projection.enabled
            && projection.kind == ProjectionKind::History
            && reach::target(loaded, projection)? == asked
        {
            refuse_qualified(question, &projection.name)?;
            let name = format!("\"{}\"", projection.name.replace('"', "\"\""));
            let schema = match loaded.store(asked)? {
                store if store.kind == StoreKind::Postgres => store.schema(),
                _ => "main",
            };
            let schema = format!("\"{}\"", schema.replace('"', "\"\""));
            let condition = history::as_of_condition(&literal);
            views.push(format!("{name} as (select * from {schema}.{name} where {condition})"));
        }
    }
    if views.is_empty() {
        let cause = "it has no projection of kind history, which alone knows what was";
        return Err(Error::new(ErrorKind::Usage, "ask", format!("store {asked} as of {time}"), cause)
            .with_remedy("name another store with --store, or leave --as-of out"));
    }
    Ok(format!("with {} select * from (\n{question}\n) as __shori_then", views.join(", ")))
}

/// With its schema before it, a name means the table, as it is now.
fn refuse_qualified(question: &str, history: &str) -> Result<()> {
    let (question, name) = (question.to_lowercase(), history.to_lowercase());
    let found = [format!(".{name}"), format!(".\"{name}\"")].into_iter().any(|qualified| {
        question.match_indices(&qualified).any(|(at, _)| {
            let after = question[at + qualified.len()..].chars().next();
            after.is_none_or(|letter| !(letter.is_alphanumeric() || letter == '_'))
        })
    });
    if !found {
        return Ok(());
    }
    let cause = format!("it names {history} with what it is in, which means the table as it is now");
    Err(Error::new(ErrorKind::Usage, "ask", "a question as of a time", cause)
        .with_remedy(format!("write {history} alone, or ask without --as-of")))
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
    fn a_time_is_told_with_and_without_zone() {
        let read = |text: &str| time(text).unwrap().to_string();
        assert_eq!(read("2026-11-27T18:00:00+02:00"), "2026-11-27 16:00:00");
        assert_eq!(read("2026-11-27 18:00:00.123456Z"), "2026-11-27 18:00:00.123456");
        assert_eq!(read("2026-11-27T18:00:00.5"), "2026-11-27 18:00:00.500");
        assert_eq!(read("2026-11-27 18:00"), "2026-11-27 18:00:00");
        assert_eq!(read("2026-11-27"), "2026-11-27 00:00:00");
        for offset in ["+02", "+0200", "+02:00", " +02"] {
            for text in ["2026-11-27T18:00:00", "2026-11-27 18:00:00.000", "2026-11-27 18:00"] {
                assert_eq!(read(&format!("{text}{offset}")), "2026-11-27 16:00:00", "{text}{offset}");
            }
        }
        assert_eq!(read("2026-11-27t18:00:00z"), "2026-11-27 18:00:00");
        assert_eq!(read("2026-11-27 18:00-0330"), "2026-11-27 21:30:00");
        for text in ["yesterday", "18:00", "2026-13-01", "2026-11-27 18:00+2", "2026-11-27T18:00:61Z", ""] {
            assert!(time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn second_60_is_refused() {
        for text in ["2016-12-31T23:59:60Z", "2016-12-31 23:59:60.5", "2016-12-31T18:59:60-05"] {
            assert!(time(text).unwrap_err().contains("second 60"), "{text}");
        }
        assert_eq!(time("2016-12-31T23:59:59.999999Z").unwrap().to_string(), "2016-12-31 23:59:59.999999");
    }

    #[test]
    fn what_is_no_number_is_null_outside_text_only() {
        let line = r#"{"a":Infinity,"b":[-Infinity,NaN],"NaN":"a \"NaN\" Infinity","ü":"\\","c":NaN}"#;
        let kept = r#"{"a":null,"b":[null,null],"NaN":"a \"NaN\" Infinity","ü":"\\","c":null}"#;
        assert_eq!(without_infinities(line), kept);
        assert_eq!(without_infinities(kept), kept);
    }
}
