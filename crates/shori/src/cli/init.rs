//! `shori init`

use std::process::ExitCode;

use clap::Args;
use rusqlite::Connection;
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use crate::assemble;
use crate::config::Loaded;

/// Make a source ready for capture: install the change table and the triggers. May be repeated.
///
/// A trigger holds a table: SQLite refuses to drop a column that one names. --release frees the table; the next run
/// captures it again.
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
        let loaded = self.which.load()?;
        if let Some(table) = &self.release {
            let unknown = || loaded.wrong(&format!("table {table}"), "no source has that table");
            let source =
                loaded.config.sources.iter().find(|source| source.tables.contains_key(table)).ok_or_else(unknown)?;
            shori_sqlite::release(&loaded.resolve(&source.path), table)?;
            eprintln!("table {table} is free; the next run captures it again");
            return Ok(ExitCode::SUCCESS);
        }
        if self.sample {
            sample(&loaded)?;
        }
        install(&loaded)?;
        Ok(ExitCode::SUCCESS)
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

/// Installs capture on every source.
pub fn install(loaded: &Loaded) -> Result<()> {
    for source in &loaded.config.sources {
        shori_sqlite::install(&assemble::sqlite_config(loaded, source))?;
        let tables: Vec<&str> = source.tables.keys().map(String::as_str).collect();
        eprintln!("{} captures {}", loaded.resolve(&source.path).display(), tables.join(", "));
    }
    Ok(())
}
