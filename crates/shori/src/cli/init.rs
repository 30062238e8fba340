//! `shori init`

use std::process::ExitCode;

use clap::Args;
use shori_core::{Error, ErrorKind, Result};

use super::Which;
use crate::config::{Loaded, SourceKind};
use crate::control::Client;
use crate::systems::System;

/// Make a source ready for capture. May be repeated.
///
/// SQLite: the change table and the triggers. PostgreSQL: the publication and the replication slot. Change logs need
/// nothing.
///
/// In SQLite a trigger holds a table: it refuses to drop a column that one names. --release frees the table; the next run
/// captures it again. The pipeline must be stopped for it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori init --dir demo --sample\n  shori init -c shori.toml\n  shori init -c shori.toml --release orders"
)]
pub struct Init {
    #[command(flatten)]
    pub(super) which: Which,
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
            if source.kind == SourceKind::Files {
                return Err(loaded.wrong(&format!("table {table}"), "it is read from files, and nothing holds it"));
            }
            if source.kind != SourceKind::Sqlite {
                let remedy = "take it out of the configuration, and out of the publication";
                return Err(loaded
                    .wrong(&format!("table {table}"), "nothing but a publication names it")
                    .with_remedy(remedy));
            }
            shori_sqlite::release(&loaded.resolve(source.file()), table)?;
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

/// Creates the sample tables, and the source's file if it is one; existing ones stay as they are.
pub fn sample(loaded: &Loaded) -> Result<()> {
    let file = loaded.config.pipeline.sample.as_ref();
    let file = file.ok_or_else(|| loaded.wrong("pipeline.sample", "this pipeline has no sample tables"))?;
    let script = loaded.read(file)?;
    for source in &loaded.config.sources {
        let system = System::of(loaded, source)?;
        super::block_on(system.make_sample(&script))?;
    }
    Ok(())
}

/// Installs capture on every source; returns why tables cannot be captured.
fn install(loaded: &Loaded) -> Result<Vec<Error>> {
    let mut failed = Vec::new();
    for source in &loaded.config.sources {
        let system = System::of(loaded, source)?;
        let installed = super::block_on(system.install())?;
        let tables = if installed.tables.is_empty() { "no table".into() } else { installed.tables.join(", ") };
        eprintln!("{} captures {tables}", installed.source);
        failed.extend(installed.failed);
    }
    Ok(failed)
}
