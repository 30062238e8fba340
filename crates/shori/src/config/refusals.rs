//! What a configuration may not say although it can be read: every verb refuses it before it opens anything.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use shori_core::Result;
use shori_duckdb::store::is_reserved_table;

use super::Loaded;

/// Names under which the embedded DuckDB has databases of its own.
const RESERVED_STORES: [&str; 5] = ["cache", "cache_work", "memory", "system", "temp"];

/// With less, a transaction of some hundred thousand rows finds no room, however often it is tried.
const MEMORY_MIN_MIB: u64 = 96;
const MEMORY_MAX_MIB: u64 = 1 << 24;
const THREADS_MAX: usize = 256;
const SECONDS_MAX: u64 = 10 * 365 * 24 * 3600;
const HOURS_MAX: f64 = (SECONDS_MAX / 3600) as f64;

pub(super) fn check(loaded: &Loaded) -> Result<()> {
    names(loaded)?;
    paths(loaded)?;
    numbers(loaded)
}

fn names(loaded: &Loaded) -> Result<()> {
    let config = &loaded.config;
    distinct(loaded, "source", config.sources.iter().map(|source| source.name.as_str()))?;
    distinct(loaded, "store", config.stores.iter().map(|store| store.name.as_str()))?;
    distinct(loaded, "projection", config.projections.iter().map(|projection| projection.name.as_str()))?;
    let reserved = |name: &&str| RESERVED_STORES.contains(&name.to_lowercase().as_str());
    if let Some(name) = config.stores.iter().map(|store| store.name.as_str()).find(reserved) {
        return Err(loaded.wrong(&format!("store {name}"), "DuckDB has a database of that name: give another"));
    }
    for projection in &config.projections {
        if is_reserved_table(&projection.name) {
            let cause = "the name is that of a table of the store's own: give another";
            return Err(loaded.wrong(&format!("projection {}", projection.name), cause));
        }
        if let Some(target) = &projection.target {
            loaded.store(target)?;
        }
    }
    loaded.staging().map(|_| ())
}

/// DuckDB's names are the same in any case, and these become such.
fn distinct<'a>(loaded: &Loaded, what: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut before = BTreeSet::new();
    for name in names {
        if name.trim().is_empty() {
            return Err(loaded.wrong(&format!("{what} {name:?}"), "its name is empty: give it one"));
        }
        if !before.insert(name.to_lowercase()) {
            let cause = format!("another {what} has that name, in this case of letters or another: rename one");
            return Err(loaded.wrong(&format!("{what} {name}"), &cause));
        }
    }
    Ok(())
}

/// A file belongs to one: a store that took the source's file would be the end of it.
fn paths(loaded: &Loaded) -> Result<()> {
    let config = &loaded.config;
    let sources = config.sources.iter().map(|source| ("source", &source.name, &source.path));
    let stores = config.stores.iter().map(|store| ("store", &store.name, &store.path));
    let mut before: Vec<(PathBuf, String)> = Vec::new();
    for (what, name, path) in sources.chain(stores) {
        let file = real(&loaded.resolve(path));
        if path.as_os_str().is_empty() {
            return Err(loaded.wrong(&format!("{what} {name}"), "its path is empty: name its file"));
        }
        if let Some((_, other)) = before.iter().find(|(known, _)| *known == file) {
            let cause = format!("its path {} is that of {other}: give each a file of its own", path.display());
            return Err(loaded.wrong(&format!("{what} {name}"), &cause));
        }
        before.push((file, format!("{what} {name}")));
    }
    Ok(())
}

/// The file behind a path, as far as there is one.
fn real(path: &Path) -> PathBuf {
    let beside = || {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(parent.canonicalize().ok()?.join(path.file_name()?))
    };
    path.canonicalize().ok().or_else(beside).unwrap_or_else(|| path.to_path_buf())
}

fn numbers(loaded: &Loaded) -> Result<()> {
    let config = &loaded.config;
    for source in &config.sources {
        let key = |key: &str| format!("{key} of source {}", source.name);
        within(loaded, &key("snapshot_chunk_rows"), source.snapshot_chunk_rows, 1..=usize::MAX)?;
        within(loaded, &key("keep_changes_seconds"), source.keep_changes_seconds, 0..=SECONDS_MAX)?;
    }
    within(loaded, "ingest.batch_max_rows", config.ingest.batch_max_rows, 1..=usize::MAX)?;
    within(loaded, "ingest.batch_max_bytes", config.ingest.batch_max_bytes, 1..=usize::MAX)?;
    within(loaded, "ingest.poll_interval_ms", config.ingest.poll_interval_ms, 1..=SECONDS_MAX)?;
    within(loaded, "ingest.linger_ms", config.ingest.linger_ms, 0..=SECONDS_MAX)?;
    within(loaded, "project.interval_ms", config.project.interval_ms, 1..=SECONDS_MAX)?;
    within(loaded, "project.debounce_ms", config.project.debounce_ms, 0..=SECONDS_MAX)?;
    within(loaded, "retention.keep_hours", config.retention.keep_hours, 0.0..=HOURS_MAX)?;
    within(loaded, "retention.every_seconds", config.retention.every_seconds, 1..=SECONDS_MAX)?;
    within(loaded, "memory.limit_mib", config.memory.limit_mib, MEMORY_MIN_MIB..=MEMORY_MAX_MIB)?;
    within(loaded, "memory.threads", config.memory.threads, 0..=THREADS_MAX)
}

fn within<T: PartialOrd + Display>(loaded: &Loaded, key: &str, value: T, range: RangeInclusive<T>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    let bound = if value < least || value.partial_cmp(&least).is_none() {
        format!("at least {least}")
    } else {
        format!("at most {most}")
    };
    Err(loaded.wrong(key, &format!("it is {value}, and must be {bound}")))
}
