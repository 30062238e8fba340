//! `shori query`

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use arrow::array::{AsArray, RecordBatch};
use arrow::util::pretty::pretty_format_batches;
use clap::Args;
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use super::reach::Reach;

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
    /// DuckDB SQL, one statement that reads
    sql: String,
}

impl Query {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let reach = Reach::new(&loaded)?;
        let store = self.store.as_deref();
        if self.json {
            // DuckDB itself knows best how its values read as JSON.
            let inner = self.sql.trim().trim_end_matches(';');
            let sql = format!("select to_json(q)::varchar as line from ({inner}) as q");
            let mut out = BufWriter::new(std::io::stdout().lock());
            reach.scan(&loaded, store, &sql, &mut |batch| print_lines(&batch, &mut out))?;
            out.flush().map_err(unprinted)?;
        } else {
            // A column is as wide as its widest value: all of them must be known before the first line.
            let batches = reach.query(&loaded, store, &self.sql)?;
            println!("{}", pretty_format_batches(&batches)?);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print_lines(batch: &RecordBatch, out: &mut impl Write) -> Result<()> {
    for line in batch.column(0).as_string::<i32>().iter().flatten() {
        writeln!(out, "{line}").map_err(unprinted)?;
    }
    Ok(())
}

fn unprinted(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Refused, "print", "the answer", cause)
}
