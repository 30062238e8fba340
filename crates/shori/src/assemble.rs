//! Makes a pipeline from its configuration.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shori_core::event::Events;
use shori_core::ingest::IngestSettings;
use shori_core::pipeline::{Pipeline, Retention, Settings};
use shori_core::project::ProjectSettings;
use shori_core::projection::{
    Deletes, Derivation, Entity, EntityPath, HistoryProjection, Maintenance, Measures, Projection, SqlProjection,
    Tracked,
};
use shori_core::retry::RetryPolicy;
use shori_core::source::{BatchLimit, Source};
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::database::{self, Database};
use shori_duckdb::transform::DuckdbTransform;

use crate::config::{
    DeletesConfig, EntityPathConfig, Loaded, ProjectionConfig, ProjectionKind, StoreConfig, StoreKind,
};
use crate::control::Client;
use crate::stores::OpenStore;
use crate::systems::System;

/// A pipeline's files, held by this process alone until dropped.
pub struct Opened {
    pub database: Database,
    pub stores: BTreeMap<String, OpenStore>,
    pub staging: OpenStore,
    _lock: Lock,
}

/// How long another process may hold a folder without running its pipeline before that is an error.
const HELD_BRIEFLY: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Holds a pipeline's folder against other processes.
pub struct Lock(#[expect(dead_code, reason = "held, not read: dropping it unlocks")] File);

impl Lock {
    pub fn take(directory: &Path) -> Result<Self> {
        let object = || format!("folder {}", directory.display());
        std::fs::create_dir_all(directory).map_err(|cause| Error::new(ErrorKind::Usage, "create", object(), cause))?;
        let file = File::create(directory.join("lock"))
            .map_err(|cause| Error::new(ErrorKind::Usage, "write to", object(), cause))?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                // One that only looks has soon done so, and one that starts can soon be asked.
                Err(TryLockError::WouldBlock)
                    if begun.elapsed() < HELD_BRIEFLY && Client::connect(directory).is_none() =>
                {
                    thread::sleep(LOCK_POLL);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::new(ErrorKind::InUse, "open", object(), "another shori process holds it")
                        .with_remedy("stop that process, or name another folder"));
                }
                Err(TryLockError::Error(cause)) => {
                    return Err(Error::new(ErrorKind::Refused, "lock", object(), cause));
                }
            }
        }
    }
}

/// Opens the stores of a pipeline, and makes those that are not there yet. Nothing runs yet.
pub fn open(loaded: &Loaded) -> Result<Opened> {
    open_some(loaded, &|_| true)
}

/// Opens the stores that are there, for reading: whoever only looks makes nothing. `None` without the staging store.
pub fn open_made(loaded: &Loaded) -> Result<Option<Opened>> {
    must_be_placed(loaded)?;
    if !is_made(loaded, loaded.staging()?) {
        return Ok(None);
    }
    open_some(loaded, &|store| is_made(loaded, store)).map(Some)
}

/// Refuses a first run whose source's file is not there: a pipeline that cannot begin makes nothing. Later ones keep a
/// record of why they failed.
pub fn must_be_able_to_begin(loaded: &Loaded) -> Result<()> {
    if is_made(loaded, loaded.staging()?) {
        return Ok(());
    }
    for source in &loaded.config.sources {
        System::of(loaded, source)?.must_be_there()?;
    }
    Ok(())
}

fn is_made(loaded: &Loaded, store: &StoreConfig) -> bool {
    match store.kind {
        StoreKind::Duckdb => loaded.resolve(store.file()).exists(),
        // What is in it, only it can tell.
        StoreKind::Postgres => true,
    }
}

/// Before anything is made.
fn must_be_placed(loaded: &Loaded) -> Result<()> {
    loaded.misplaced_stores().into_iter().next().map_or(Ok(()), Err)
}

fn open_some(loaded: &Loaded, wanted: &dyn Fn(&StoreConfig) -> bool) -> Result<Opened> {
    must_be_placed(loaded)?;
    let directory = loaded.state_directory();
    let lock = Lock::take(&directory)?;
    let memory = &loaded.config.memory;
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let database = Database::open(&database::Settings {
        memory_limit_mib: memory.limit_mib,
        threads: if memory.threads == 0 { (cores - 1).max(1) } else { memory.threads },
        spill_directory: directory.join("spill"),
        inline: false,
    })?;
    let mut stores = BTreeMap::new();
    for store in loaded.config.stores.iter().filter(|store| wanted(store)) {
        stores.insert(store.name.clone(), OpenStore::open(loaded, store, &database)?);
    }
    let staging = stores.get(&loaded.staging()?.name).cloned();
    let staging = staging.ok_or_else(|| loaded.wrong("pipeline.staging", "no such store"))?;
    Ok(Opened { database, stores, staging, _lock: lock })
}

/// Connects an opened pipeline's parts.
pub fn pipeline(loaded: &Loaded, opened: &Opened, once: bool, events: Events) -> Result<Pipeline> {
    let transform = DuckdbTransform::open(&opened.database, &loaded.state_directory().join("state.sqlite"))?;
    let mut projections = Vec::new();
    for configured in loaded.config.projections.iter().filter(|projection| projection.enabled) {
        let name = configured.target.as_ref().unwrap_or(&loaded.staging()?.name);
        loaded.store(name)?;
        let store = opened.stores.get(name).ok_or_else(|| loaded.wrong(name, "the store is not open"))?;
        projections.push((projection(loaded, configured)?, store.store()));
    }
    Ok(Pipeline {
        name: loaded.config.pipeline.name.clone(),
        run_id: uuid::Uuid::new_v4().to_string(),
        sources: sources(loaded)?,
        staging: opened.staging.store(),
        transform: Arc::new(transform),
        projections,
        settings: settings(loaded, once),
        events,
    })
}

pub fn sources(loaded: &Loaded) -> Result<Vec<Box<dyn Source>>> {
    loaded.config.sources.iter().map(|source| Ok(System::of(loaded, source)?.source())).collect()
}

fn settings(loaded: &Loaded, once: bool) -> Settings {
    let (ingest, project, retention) = (&loaded.config.ingest, &loaded.config.project, &loaded.config.retention);
    let retry = RetryPolicy::default();
    Settings {
        ingest: IngestSettings {
            batch: BatchLimit { rows: ingest.batch_max_rows, bytes: ingest.batch_max_bytes },
            poll_interval: Duration::from_millis(ingest.poll_interval_ms),
            linger: Duration::from_millis(ingest.linger_ms),
            retry,
            once,
        },
        project: ProjectSettings {
            interval: Duration::from_millis(project.interval_ms),
            debounce: Duration::from_millis(project.debounce_ms),
            retry,
            once,
        },
        retention: Retention {
            keep: Some(retention.keep()),
            keep_rows: (retention.keep_rows > 0).then_some(retention.keep_rows),
            every: (!once).then(|| Duration::from_secs(retention.every_seconds.max(1))),
        },
    }
}

/// A projection as the engine knows it; refuses keys that its kind does not have, and missing ones.
pub fn projection(loaded: &Loaded, configured: &ProjectionConfig) -> Result<Projection> {
    let wrong = |cause: &str| loaded.wrong(&format!("projection {}", configured.name), cause);
    let table = || configured.table.as_deref().ok_or_else(|| wrong("it names no table"));
    let is_sql = matches!(configured.kind, ProjectionKind::Sql);
    let is_history = configured.kind == ProjectionKind::History;
    let has_measures = configured.weight.is_some() || !configured.additive.is_empty() || configured.publish_weight;
    let foreign = [
        (
            "table",
            is_sql && configured.table.is_some(),
            "which is for kinds \"latest\" and \"history\": name its tables",
        ),
        ("tables", !is_sql && !configured.tables.is_empty(), "which is for kind \"sql\": name its table"),
        ("entity", !is_sql && configured.entity.is_some(), "which is for kind \"sql\": leave it out"),
        (
            "tracked or untracked columns",
            !is_history && (configured.tracked.is_some() || configured.untracked.is_some()),
            "which are for kind \"history\": leave them out",
        ),
        ("deletes", !is_history && configured.deletes.is_some(), "which is for kind \"history\": leave it out"),
        ("additive columns or a weight", !is_sql && has_measures, "which are for kind \"sql\": leave them out"),
    ];
    if let Some((key, _, cause)) = foreign.iter().find(|(_, is_given, _)| *is_given) {
        return Err(wrong(&format!("it has {key}, {cause}")));
    }
    let derivation = match configured.kind {
        ProjectionKind::Sql => Derivation::Sql(sql_projection(loaded, configured)?),
        _ if configured.sql.is_some() => return Err(wrong("only kind \"sql\" has a query")),
        ProjectionKind::Latest => Derivation::Latest { table: table()?.into() },
        ProjectionKind::History => Derivation::History(HistoryProjection {
            table: table()?.into(),
            key: configured.key.clone(),
            tracked: match (&configured.tracked, &configured.untracked) {
                (None, None) => Tracked::All,
                (Some(columns), None) => Tracked::Only(columns.clone()),
                (None, Some(columns)) => Tracked::AllBut(columns.clone()),
                (Some(_), Some(_)) => return Err(wrong("it has tracked and untracked columns: leave one out")),
            },
            deletes: match configured.deletes {
                None | Some(DeletesConfig::Close) => Deletes::Close,
                Some(DeletesConfig::Tombstone) => Deletes::Tombstone,
            },
        }),
    };
    Ok(Projection { name: configured.name.as_str().into(), derivation })
}

fn sql_projection(loaded: &Loaded, configured: &ProjectionConfig) -> Result<SqlProjection> {
    let wrong = |cause: &str| loaded.wrong(&format!("projection {}", configured.name), cause);
    let file: &PathBuf = configured.sql.as_ref().ok_or_else(|| wrong("it has no sql"))?;
    if configured.tables.is_empty() {
        return Err(wrong("it names no tables"));
    }
    if configured.key.is_empty() {
        return Err(wrong("it has no key"));
    }
    let measures = match (&configured.weight, configured.additive.is_empty()) {
        (Some(weight), _) => Measures::Additive {
            additive: configured.additive.clone(),
            weight: weight.clone(),
            publish_weight: configured.publish_weight,
        },
        (None, true) => Measures::PerEntity,
        (None, false) => return Err(wrong("additive columns need a weight, so that empty rows can be told")),
    };
    let maintenance = match &configured.entity {
        None if configured.weight.is_some() || !configured.additive.is_empty() => {
            return Err(wrong("additive columns and a weight are kept by entity: name its entity, or leave them out"));
        }
        None => Maintenance::Recompute,
        Some(paths) => {
            if let Some(table) = paths.keys().find(|table| !configured.tables.contains(table)) {
                return Err(wrong(&format!("its entity names table {table}, which is not among its tables")));
            }
            if let Some(table) = configured.tables.iter().find(|table| !paths.contains_key(*table)) {
                return Err(wrong(&format!("its entity does not say how table {table} leads to it")));
            }
            let path = |(table, path): (&String, &EntityPathConfig)| (table.as_str().into(), entity_path(path));
            Maintenance::ByEntity { entity: Entity { paths: paths.iter().map(path).collect() }, measures }
        }
    };
    Ok(SqlProjection {
        file: loaded.resolve(file).display().to_string(),
        text: loaded.read_query(file)?,
        tables: configured.tables.iter().map(|table| table.as_str().into()).collect(),
        key: configured.key.clone(),
        maintenance,
    })
}

fn entity_path(path: &EntityPathConfig) -> EntityPath {
    match path {
        EntityPathConfig::Column(column) => EntityPath::Column(column.clone()),
        EntityPathConfig::Through(through) => EntityPath::Through {
            table: through.through.as_str().into(),
            own_column: through.column.clone(),
            their_column: through.their_column.clone().unwrap_or_else(|| through.column.clone()),
        },
    }
}
