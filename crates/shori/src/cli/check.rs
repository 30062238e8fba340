//! `shori check`

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use shori_core::transform::{StateTable, Transform};
use shori_core::{Error, Result};
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::transform::DuckdbTransform;

use super::Which;
use crate::assemble;
use crate::config::Loaded;

/// Check configuration, source and queries; change nothing.
#[derive(Args)]
#[command(after_help = "Example:\n  shori check -c pipelines/demo/shori.toml")]
pub struct Check {
    #[command(flatten)]
    which: Which,
}

impl Check {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load()?;
        let mut problems = Vec::new();
        let tables = tables(&loaded, &mut problems);
        super::block_on(projections(&loaded, &tables, &mut problems))?;
        for problem in &problems {
            eprintln!("error: {problem}");
        }
        if problems.is_empty() {
            println!("{}: {} tables, {} projections: no problem found", loaded.file.display(), tables.len(), loaded.config.projections.len());
            return Ok(ExitCode::SUCCESS);
        }
        Ok(ExitCode::from(1))
    }
}

/// The tables that can be captured; for each other one, a problem.
fn tables(loaded: &Loaded, problems: &mut Vec<Error>) -> Vec<StateTable> {
    let mut tables = Vec::new();
    for source in &loaded.config.sources {
        match shori_sqlite::inspect(&assemble::sqlite_config(loaded, source)) {
            Ok(inspected) => {
                tables.extend(inspected.captures.into_iter().map(|info| StateTable { capture: info.id, schema: info.schema }));
                problems.extend(inspected.failed.into_iter().map(|(_, error)| error));
            }
            Err(error) => problems.push(error),
        }
    }
    tables
}

/// Binds every projection's query against empty tables, in a database of its own.
async fn projections(loaded: &Loaded, tables: &[StateTable], problems: &mut Vec<Error>) -> Result<()> {
    let mut projections = BTreeMap::new();
    for configured in &loaded.config.projections {
        match assemble::projection(loaded, configured) {
            Ok(projection) => drop(projections.insert(configured.name.clone(), projection)),
            Err(error) => problems.push(error),
        }
    }
    let scratch = tempfile::tempdir()
        .map_err(|cause| Error::new(shori_core::ErrorKind::Refused, "create", "a temporary folder", cause))?;
    let spill_directory = scratch.path().join("spill");
    let database = Database::open(&Settings { memory_limit_mib: 128, threads: 1, spill_directory, inline: true })?;
    let transform = DuckdbTransform::open(&database, &scratch.path().join("check.duckdb"))?;
    let known: Vec<_> = projections.values().cloned().collect();
    transform.open("check", tables, &known).await?;
    for name in projections.keys() {
        if let Err(error) = transform.describe(name).await {
            problems.push(error);
        }
    }
    Ok(())
}
