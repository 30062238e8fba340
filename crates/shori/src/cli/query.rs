//! `shori query`

use std::process::ExitCode;

use arrow::util::pretty::pretty_format_batches;
use clap::Args;
use shori_core::Result;

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
        if self.json {
            // DuckDB itself knows best how its values read as JSON.
            let inner = self.sql.trim().trim_end_matches(';');
            let sql = format!("select to_json(q)::varchar as line from ({inner}) as q");
            for batch in reach.query(&loaded, self.store.as_deref(), &sql)? {
                use arrow::array::AsArray;
                for line in batch.column(0).as_string::<i32>().iter().flatten() {
                    println!("{line}");
                }
            }
        } else {
            let batches = reach.query(&loaded, self.store.as_deref(), &self.sql)?;
            println!("{}", pretty_format_batches(&batches)?);
        }
        Ok(ExitCode::SUCCESS)
    }
}
