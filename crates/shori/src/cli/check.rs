//! `shori check`

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use shori_core::position::CaptureId;
use shori_core::projection::Derivation;
use shori_core::transform::{StateTable, Transform};
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::{Database, Settings};
use shori_duckdb::transform::DuckdbTransform;

use super::Which;
use super::syntax;
use super::trial::{Trial, Tried};
use crate::assemble;
use crate::config::{Loaded, TableConfig};
use crate::systems::System;

/// Check configuration, source and queries; change nothing.
///
/// What a projection declares of its query is tried on sampled rows.
#[derive(Args)]
#[command(after_help = "Example:\n  shori check -c pipelines/demo/shori.toml")]
pub struct Check {
    #[command(flatten)]
    pub(super) which: Which,
}

impl Check {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = self.which.load_as_written()?;
        let mut problems = loaded.refusals();
        problems.extend(loaded.misplaced_stores());
        let checked = super::block_on(async {
            let tables = tables(&loaded, &mut problems).await;
            if let Err(error) = projections(&loaded, &tables, &mut problems).await {
                problems.push(error);
            }
            Ok(tables.len())
        });
        let tables = checked?;
        for problem in &problems {
            eprintln!("error: {problem}");
        }
        if problems.is_empty() {
            println!(
                "{}: {} tables, {} projections: no problem found",
                loaded.file.display(),
                tables,
                loaded.config.projections.len()
            );
            return Ok(ExitCode::SUCCESS);
        }
        let usage = problems.iter().any(|problem| problem.kind() == ErrorKind::Usage);
        Ok(ExitCode::from(if usage { 2 } else { 1 }))
    }
}

/// Rows of each table that projections are tried on.
const SAMPLE_ROWS: usize = 2_000;

/// The tables that can be captured; for each other one, or for a source that cannot be read, a problem.
async fn tables(loaded: &Loaded, problems: &mut Vec<Error>) -> Vec<StateTable> {
    let mut tables = Vec::new();
    for source in &loaded.config.sources {
        // What it lacks has been told with the refusals.
        let Ok(system) = System::of(loaded, source) else { continue };
        match system.inspect().await {
            Ok(inspected) => {
                problems.extend(inspected.problems);
                inspected.notes.iter().for_each(|note| println!("note: {note}"));
                // Of a type that is none, enough has been told.
                let is_told = |id: &CaptureId| source.tables.get(&*id.instance).is_some_and(TableConfig::is_mistyped);
                let known = inspected.captures.into_iter().filter(|info| !is_told(&info.id));
                tables.extend(known.map(|info| StateTable { capture: info.id, schema: info.schema }));
                problems.extend(inspected.failed.into_iter().filter(|(id, _)| !is_told(id)).map(|(_, error)| error));
            }
            Err(error) => problems.push(error),
        }
    }
    tables
}

/// Binds every projection's query and tries it, in a database of its own.
async fn projections(loaded: &Loaded, tables: &[StateTable], problems: &mut Vec<Error>) -> Result<()> {
    let mut projections = BTreeMap::new();
    let is_known = |name: &Arc<str>| tables.iter().any(|table| table.schema.table == *name);
    for configured in &loaded.config.projections {
        match assemble::projection(loaded, configured) {
            // Of a table that is not there, or cannot be captured, enough has been told.
            Ok(projection) if !projection.tables().iter().all(is_known) => {
                if let Derivation::Sql(sql) = &projection.derivation {
                    problems.extend(syntax::problem(sql)?);
                }
            }
            Ok(projection) => drop(projections.insert(configured.name.clone(), projection)),
            Err(error) => problems.push(error),
        }
    }
    if projections.is_empty() {
        return Ok(());
    }
    let scratch =
        tempfile::tempdir().map_err(|cause| Error::new(ErrorKind::Refused, "create", "a temporary folder", cause))?;
    let spill_directory = scratch.path().join("spill");
    let database = Database::open(&Settings { memory_limit_mib: 128, threads: 1, spill_directory, inline: true })?;
    let transform = DuckdbTransform::open(&database, &scratch.path().join("check.duckdb"))?;
    let key_of = |name: &str| {
        let table = tables.iter().find(|table| &*table.schema.table == name);
        table.map(|table| table.schema.key_names().into_iter().map(String::from).collect()).unwrap_or_default()
    };
    let known: Vec<_> = projections.values().map(|projection| projection.with_key_names(key_of)).collect();
    transform.open("check", tables, &known).await?;
    let mut tried = Vec::new();
    for (name, projection) in &projections {
        match (transform.describe(name).await, &projection.derivation) {
            (Err(error), _) => problems.push(error),
            (Ok(_), Derivation::Sql(sql)) => {
                tried.push(Tried { name: name.clone(), key: sql.key.clone(), tables: sql.tables.clone() });
            }
            (Ok(_), _) => {}
        }
    }
    let mut sample = Vec::new();
    for source in &loaded.config.sources {
        // That the source cannot be read has been told already.
        if let Ok(system) = System::of(loaded, source) {
            sample.extend(system.sample(SAMPLE_ROWS).await.unwrap_or_default());
        }
    }
    sample.retain(|batch| tables.iter().any(|table| table.capture == batch.capture));
    if sample.is_empty() {
        println!("the source has no rows yet: how projections are kept by change was not tried");
        return Ok(());
    }
    problems.extend(Trial { transform: &transform, tables, sample: &sample }.run(&tried).await?);
    Ok(())
}
