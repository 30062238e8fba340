//! `shori verify`

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use arrow::array::RecordBatch;
use clap::Args;
use duckdb::Connection;
use shori_core::schema::type_name;
use shori_core::{Error, Result};
use shori_duckdb::database::{Database, quote_text};

use super::Which;
use super::reach::{self, Reach};
use crate::config::{DeletesConfig, Loaded, ProjectionConfig, ProjectionKind, SourceConfig, SourceKind, StoreKind};
use crate::systems::System;
use crate::verify::{
    self as check, ColumnInput, DerivationInput, PostgresPlace, ProjectionInput, ProjectionReport, ReadBy, Report,
    Serving, SourceInput, State, TableInput, VerifyInput,
};

/// Recompute every projection from the source's tables, and compare.
///
/// Shares no code with what keeps the projections. Each is compared as of its own checkpoint, so a running pipeline can
/// be verified too: a note tells where the source has gone on since, and a projection that has failed is no match. Exit
/// status 1 names the keys that differ.
#[derive(Args)]
#[command(after_help = "Example:\n  shori verify --dir demo")]
pub struct Verify {
    #[command(flatten)]
    pub(super) which: Which,
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
    client: &'a Reach,
    store: String,
}

impl Serving for Served<'_> {
    fn kind(&self) -> StoreKind {
        kind_of(self.loaded, &self.store)
    }

    fn choose(&mut self, store: &str) -> Result<()> {
        self.store = store.into();
        Ok(())
    }

    fn query(&mut self, sql: &str) -> Result<Vec<RecordBatch>> {
        self.client.query(self.loaded, Some(&self.store), sql)
    }

    fn waits(&mut self, projections: &[&str]) {
        let (names, seconds) = (projections.join(", "), CATCH_UP.as_secs());
        eprintln!("waiting up to {seconds} s for what is behind the source: {names}");
    }

    fn scan(&mut self, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        self.client.scan(self.loaded, Some(&self.store), sql, take)
    }
}

fn kind_of(loaded: &Loaded, store: &str) -> StoreKind {
    loaded.store(store).map_or(StoreKind::Duckdb, |store| store.kind)
}

/// Reads what is served from the stores themselves, part by part, in memory that does not grow with the rows.
struct Files<'a> {
    loaded: &'a Loaded,
    reach: &'a Reach,
    database: &'a Database,
    store: String,
    /// Of a DuckDB store.
    connection: Option<Connection>,
}

impl Serving for Files<'_> {
    fn kind(&self) -> StoreKind {
        kind_of(self.loaded, &self.store)
    }

    fn choose(&mut self, store: &str) -> Result<()> {
        if self.store != store {
            self.store = store.into();
            let is_file = self.kind() == StoreKind::Duckdb;
            self.connection = if is_file { Some(self.database.connect(store)?) } else { None };
        }
        Ok(())
    }

    fn scan(&mut self, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        match &mut self.connection {
            Some(connection) => connection.scan(sql, take),
            None => self.reach.scan(self.loaded, Some(&self.store), sql, take),
        }
    }

    fn query(&mut self, sql: &str) -> Result<Vec<RecordBatch>> {
        match &mut self.connection {
            Some(connection) => connection.query(sql),
            None => self.reach.query(self.loaded, Some(&self.store), sql),
        }
    }

    fn hold(&mut self) -> Result<()> {
        self.connection.as_mut().map_or(Ok(()), Serving::hold)
    }

    fn release(&mut self) -> Result<()> {
        self.connection.as_mut().map_or(Ok(()), Serving::release)
    }
}

pub fn verify(loaded: &Loaded) -> Result<Report> {
    let reach = Reach::to_look(loaded)?;
    reach.must_have_run(loaded)?;
    let staging = loaded.staging()?.name.clone();
    let mut serving: Box<dyn Serving> = match &reach {
        Reach::Files(opened) => {
            let (database, store) = (&opened.database, String::new());
            let mut files = Files { loaded, reach: &reach, database, store, connection: None };
            files.choose(&staging)?;
            Box::new(files)
        }
        Reach::Running(_) => Box::new(Served { loaded, client: &reach, store: staging }),
    };
    let looked: Vec<Looked<'_>> =
        loaded.config.sources.iter().map(|source| look(loaded, source)).collect::<Result<_>>()?;
    let mut reports = BTreeMap::new();
    for configured in enabled(loaded) {
        if let Some(report) = incomparable(loaded, &reach, &looked, configured)? {
            reports.insert(configured.name.clone(), report);
        }
    }
    for one in looked.iter().filter(|one| one.source.kind != SourceKind::Files) {
        let of_it = enabled(loaded).filter(|projection| !reports.contains_key(&projection.name) && one.has(projection));
        let input = input(loaded, one, of_it, reach.is_running())?;
        if !input.projections.is_empty() {
            let report = check::verify(&input, serving.as_mut())?;
            reports.extend(report.projections.into_iter().map(|one| (one.projection.clone(), one)));
        }
    }
    let projections = enabled(loaded).filter_map(|configured| reports.remove(&configured.name)).collect();
    Ok(Report { projections })
}

fn enabled(loaded: &Loaded) -> impl Iterator<Item = &ProjectionConfig> {
    loaded.config.projections.iter().filter(|projection| projection.enabled)
}

/// A source: its tables that can be captured, and why others cannot.
struct Looked<'a> {
    source: &'a SourceConfig,
    tables: Vec<TableInput>,
    failed: BTreeMap<String, Error>,
}

impl Looked<'_> {
    /// Whether all that a projection reads is here.
    fn has(&self, projection: &ProjectionConfig) -> bool {
        read_by(projection).all(|name| self.tables.iter().any(|table| table.name == *name))
    }
}

fn read_by(projection: &ProjectionConfig) -> impl Iterator<Item = &String> {
    projection.tables.iter().chain(&projection.table)
}

fn look<'a>(loaded: &Loaded, source: &'a SourceConfig) -> Result<Looked<'a>> {
    let inspected = super::block_on(async { System::of(loaded, source)?.inspect().await })?;
    let tables = inspected.captures.iter().map(|capture| TableInput {
        name: capture.schema.table.to_string(),
        key: capture.schema.key_names().into_iter().map(String::from).collect(),
        columns: (capture.schema.columns.fields().iter())
            .map(|field| ColumnInput::new(field.name(), type_name(field.data_type())))
            .collect(),
    });
    let failed = inspected.failed.into_iter().map(|(id, error)| (id.instance.to_string(), error));
    Ok(Looked { source, tables: tables.collect(), failed: failed.collect() })
}

/// The report of a projection that cannot be compared, its neighbours notwithstanding; `None` where it can.
fn incomparable(
    loaded: &Loaded,
    reach: &Reach,
    looked: &[Looked<'_>],
    configured: &ProjectionConfig,
) -> Result<Option<ProjectionReport>> {
    let store = reach::target(loaded, configured)?;
    let failed = read_by(configured).find_map(|name| looked.iter().find_map(|one| one.failed.get(name)));
    let (state, why) = if !reach.has_run(loaded, store)? {
        (State::NotBuilt, "it has not been built yet: start the pipeline and let it catch up".into())
    } else if let Some(error) = failed {
        (
            if is_built(loaded, reach, store, configured)? { State::NotCompared } else { State::NotBuilt },
            error.to_string(),
        )
    } else if looked.iter().any(|one| one.source.kind == SourceKind::Files && one.has(configured)) {
        (State::NotCompared, FILES_HOLD_NO_TABLES.into())
    } else if looked.iter().any(|one| one.has(configured)) {
        return Ok(None);
    } else {
        (State::NotCompared, "its tables are of several sources, which cannot be verified together".into())
    };
    let input = projection_input(loaded, configured, &[])?;
    Ok(Some(ProjectionReport::of(&input).not(state, why)))
}

const FILES_HOLD_NO_TABLES: &str = "it is made from change log files, which have no tables to compare with: verify the \
                                    pipeline that wrote them, and compare its result with this one";

/// Whether a projection has ever been built, as its store tells.
fn is_built(loaded: &Loaded, reach: &Reach, store: &str, configured: &ProjectionConfig) -> Result<bool> {
    let name = quote_text(&configured.name);
    let sql = format!("select 1 from ctl_projection_checkpoints where projection_name = {name}");
    Ok(reach.query(loaded, Some(store), &sql)?.iter().any(|batch| batch.num_rows() > 0))
}

/// Of one source: its tables, and projections that read no others.
fn input<'a>(
    loaded: &Loaded,
    looked: &Looked<'_>,
    projections: impl Iterator<Item = &'a ProjectionConfig>,
    running: bool,
) -> Result<VerifyInput> {
    let tables = &looked.tables;
    Ok(VerifyInput {
        source: source_input(loaded, looked.source)?,
        source_name: looked.source.name.clone(),
        staging: loaded.staging()?.name.clone(),
        projections: projections.map(|one| projection_input(loaded, one, tables)).collect::<Result<_>>()?,
        tables: tables.clone(),
        scratch_directory: Some(loaded.state_directory()),
        memory_limit_mib: loaded.config.memory.limit_mib,
        threads: loaded.config.memory.threads,
        catch_up: if running { CATCH_UP } else { Duration::ZERO },
    })
}

fn source_input(loaded: &Loaded, source: &SourceConfig) -> Result<SourceInput> {
    Ok(match System::of(loaded, source)? {
        System::Sqlite(config) => SourceInput::Sqlite(config.path),
        System::Files(_) => {
            return Err(loaded.wrong(&format!("source {}", source.name), FILES_HOLD_NO_TABLES));
        }
        System::Postgres(config) => SourceInput::Postgres(Box::new(PostgresPlace {
            server: config.server,
            schema: config.schema,
            read_by: match config.polls {
                None => ReadBy::Slot { publication: config.publication, slot: config.slot },
                Some(_) => {
                    let tables = config.tables.into_iter();
                    ReadBy::Timestamps(tables.filter_map(|table| Some((table.name, table.changed_at?))).collect())
                }
            },
        })),
    })
}

fn projection_input(loaded: &Loaded, configured: &ProjectionConfig, tables: &[TableInput]) -> Result<ProjectionInput> {
    let missing = |what: &str| loaded.wrong(&format!("projection {}", configured.name), what);
    let table = || configured.table.clone().ok_or_else(|| missing("it names no table"));
    let derivation = match configured.kind {
        ProjectionKind::Sql => {
            let file = configured.sql.as_ref().ok_or_else(|| missing("it has no sql"))?;
            DerivationInput::Sql {
                file: loaded.resolve(file).display().to_string(),
                text: loaded.read_query(file)?,
                tables: configured.tables.clone(),
                key: configured.key.clone(),
                hidden: configured.weight.iter().filter(|_| !configured.publish_weight).cloned().collect(),
            }
        }
        ProjectionKind::Latest => DerivationInput::Latest { table: table()? },
        ProjectionKind::History => {
            let table = table()?;
            let of_table = tables.iter().find(|one| one.name == table);
            let own_key = of_table.map(|one| one.key.clone()).unwrap_or_default();
            let columns = of_table.iter().flat_map(|one| &one.columns).map(|column| column.name.clone());
            let is_left_out = |name: &String| match (&configured.tracked, &configured.untracked) {
                (Some(tracked), _) => !own_key.contains(name) && !tracked.contains(name),
                (None, Some(untracked)) => untracked.contains(name),
                (None, None) => false,
            };
            let left_out = columns.filter(is_left_out).collect();
            let key = if configured.key.is_empty() { own_key } else { configured.key.clone() };
            let tombstones = configured.deletes == Some(DeletesConfig::Tombstone);
            DerivationInput::History { table, key, left_out, tombstones }
        }
    };
    let store = reach::target(loaded, configured)?.to_string();
    Ok(ProjectionInput { name: configured.name.clone(), store, derivation })
}
