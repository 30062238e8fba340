//! `shori init`

use std::process::ExitCode;

use clap::Args;
use rusqlite::Connection;
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use crate::assemble;
use crate::config::Loaded;
use crate::control::Client;

/// Make a source ready for capture: install the change table and the triggers. May be repeated.
///
/// A trigger holds a table: SQLite refuses to drop a column that one names. --release frees the table; the next run
/// captures it again. The pipeline must be stopped for it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori init --dir demo --sample\n  shori init -c shori.toml\n  shori init -c shori.toml --release orders"
)]
pub struct Init {
    #[command(flatten)]
    which: Which,
    /// Create the source and the pipeline's sample tables first
    #[arg(long)]
    sample: bool,
    /// Remove the triggers from this table instead
    #[arg(long, value_name = "TABLE", conflicts_with = "sample")]
    release: Option<String>,
}

impl Init {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = if self.sample { self.which.load_to_make()? } else { self.which.load()? };
        if let Some(table) = &self.release {
            let unknown = || loaded.wrong(&format!("table {table}"), "no source has that table");
            let source =
                loaded.config.sources.iter().find(|source| source.tables.contains_key(table)).ok_or_else(unknown)?;
            if Client::connect(&loaded.state_directory()).is_some() {
                let cause = "the pipeline runs, and would capture it again at once";
                return Err(Error::new(ErrorKind::InUse, "release", format!("table {table}"), cause)
                    .with_remedy("stop the pipeline first"));
            }
            shori_sqlite::release(&loaded.resolve(&source.path), table)?;
            eprintln!("table {table} is free; the next run captures it again");
            return Ok(ExitCode::SUCCESS);
        }
        if self.sample {
            sample(&loaded)?;
        }
        let failed = install(&loaded)?;
        for error in &failed {
            eprintln!("error: {error}");
        }
        Ok(ExitCode::from(u8::from(!failed.is_empty())))
    }
}

/// Creates the source file and the sample tables; existing ones stay as they are.
pub fn sample(loaded: &Loaded) -> Result<()> {
    let file = loaded.config.pipeline.sample.as_ref();
    let file = file.ok_or_else(|| loaded.wrong("pipeline.sample", "this pipeline has no sample tables"))?;
    let script = loaded.read(file)?;
    for source in &loaded.config.sources {
        let path = loaded.resolve(&source.path);
        let fail = |cause| Error::new(ErrorKind::Refused, "create sample tables in", path.display().to_string(), cause);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|cause| {
                Error::new(ErrorKind::Usage, "create", format!("folder {}", parent.display()), cause)
            })?;
        }
        let connection = Connection::open(&path).map_err(fail)?;
        connection.execute_batch(&script).map_err(fail)?;
    }
    Ok(())
}

/// Installs capture on every source; returns why tables cannot be captured.
fn install(loaded: &Loaded) -> Result<Vec<Error>> {
    let mut failed = Vec::new();
    for source in &loaded.config.sources {
        let installed = shori_sqlite::install(&assemble::sqlite_config(loaded, source))?;
        let mut tables: Vec<&str> = installed.captures.iter().map(|info| &*info.id.instance).collect();
        tables.sort_unstable();
        let tables = if tables.is_empty() { "no table".into() } else { tables.join(", ") };
        eprintln!("{} captures {tables}", loaded.resolve(&source.path).display());
        failed.extend(installed.failed.into_iter().map(|(_, error)| error));
    }
    Ok(failed)
}
