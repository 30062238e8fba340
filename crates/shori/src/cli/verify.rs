//! `shori verify`

use std::process::ExitCode;
use std::time::Duration;

use arrow::array::RecordBatch;
use clap::Args;
use shori_core::Result;
use shori_core::schema::type_name;

use super::Which;
use super::reach::Reach;
use crate::assemble;
use crate::config::{Loaded, ProjectionConfig, ProjectionKind};
use crate::verify::{
    self as check, ColumnInput, DerivationInput, ProjectionInput, Report, Serving, TableInput, VerifyInput,
};

/// Recompute every projection from the source's tables, and compare.
///
/// Shares no code with what keeps the projections. Each is compared as of its own checkpoint, so a running pipeline can
/// be verified too. Exit status 1 names the keys that differ.
#[derive(Args)]
#[command(after_help = "Example:\n  shori verify --dir demo")]
pub struct Verify {
    #[command(flatten)]
    which: Which,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub fn act(self) -> Result<ExitCode> {
        let report = verify(&self.which.load()?)?;
        if self.json {
            super::print_json(&report)?;
        } else {
            super::print(format_args!("{report}\n"))?;
        }
        Ok(ExitCode::from(u8::from(!report.ok())))
    }
}

/// How long a running pipeline is given to show what the source holds.
const CATCH_UP: Duration = Duration::from_secs(60);

/// Reads what is served through the pipeline's process.
struct Served<'a> {
    loaded: &'a Loaded,
    reach: Reach,
}

impl Serving for Served<'_> {
    fn scan(&mut self, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        self.reach.scan(self.loaded, None, sql, take)
    }
}

pub fn verify(loaded: &Loaded) -> Result<Report> {
    let reach = Reach::new(loaded)?;
    reach.must_have_run(loaded)?;
    let input = input(loaded, reach.is_running())?;
    match &reach {
        // A connection reads part by part, in memory that does not grow with the rows.
        Reach::Files(opened) => check::verify(&input, &mut opened.database.connect(&loaded.staging()?.name)?),
        Reach::Running(_) => check::verify(&input, &mut Served { loaded, reach }),
    }
}

fn input(loaded: &Loaded, running: bool) -> Result<VerifyInput> {
    let none = || loaded.wrong("source", "there is none to verify against");
    let source = loaded.config.sources.first().ok_or_else(none)?;
    let inspected = shori_sqlite::inspect(&assemble::sqlite_config(loaded, source))?;
    let tables = inspected.captures.iter().map(|capture| TableInput {
        name: capture.schema.table.to_string(),
        key: capture.schema.key_names().into_iter().map(String::from).collect(),
        columns: (capture.schema.columns.fields().iter())
            .map(|field| ColumnInput::new(field.name(), type_name(field.data_type())))
            .collect(),
    });
    let tables: Vec<TableInput> = tables.collect();
    let enabled = loaded.config.projections.iter().filter(|projection| projection.enabled);
    let state_directory = loaded.state_directory();
    Ok(VerifyInput {
        source: loaded.resolve(&source.path),
        projections: enabled.map(|projection| projection_input(loaded, projection, &tables)).collect::<Result<_>>()?,
        tables,
        scratch_directory: Some(state_directory),
        memory_limit_mib: loaded.config.memory.limit_mib,
        threads: loaded.config.memory.threads,
        catch_up: if running { CATCH_UP } else { Duration::ZERO },
    })
}

fn projection_input(loaded: &Loaded, configured: &ProjectionConfig, tables: &[TableInput]) -> Result<ProjectionInput> {
    let missing = |what: &str| loaded.wrong(&format!("projection {}", configured.name), what);
    let table = || configured.table.clone().ok_or_else(|| missing("it names no table"));
    let derivation = match configured.kind {
        ProjectionKind::Sql => DerivationInput::Sql {
            text: loaded.read(configured.sql.as_ref().ok_or_else(|| missing("it has no sql"))?)?,
            tables: configured.tables.clone(),
            key: configured.key.clone(),
            hidden: configured.weight.iter().filter(|_| !configured.publish_weight).cloned().collect(),
        },
        ProjectionKind::Latest => DerivationInput::Latest { table: table()? },
        ProjectionKind::History => {
            let table = table()?;
            let of_table =
                || tables.iter().find(|one| one.name == table).map(|one| one.key.clone()).unwrap_or_default();
            let key = if configured.key.is_empty() { of_table() } else { configured.key.clone() };
            DerivationInput::History { table, key }
        }
    };
    Ok(ProjectionInput { name: configured.name.clone(), derivation })
}
