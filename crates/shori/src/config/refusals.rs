//! What a configuration may not say although it can be read: every verb refuses it before it opens anything.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use shori_core::Error;
use shori_core::schema::parse_type;
use shori_duckdb::store::is_reserved_table;

use super::{CaptureKind, Loaded, ServerConfig, SourceConfig, SourceKind, StoreKind, TableConfig, TlsMode, nearest};

/// Names under which the embedded DuckDB has databases of its own.
const RESERVED_STORES: [&str; 5] = ["cache", "cache_work", "memory", "system", "temp"];

/// As the configuration's reference has them.
const TYPES: &str = "boolean, int16, int32, int64, float32, float64, text, binary, date, time, timestamp, timestamptz, \
                     decimal(precision,scale)";
/// No store has more digits.
const DECIMAL_PRECISION_MAX: i64 = 38;

/// With less, a transaction of some hundred thousand rows finds no room, however often it is tried.
const MEMORY_MIN_MIB: u64 = 96;
const MEMORY_MAX_MIB: u64 = 1 << 24;
const THREADS_MAX: usize = 256;
const SECONDS_MAX: u64 = 10 * 365 * 24 * 3600;
const HOURS_MAX: f64 = (SECONDS_MAX / 3600) as f64;
const INTERVAL_MIN_SECONDS: f64 = 0.001;
const INTERVAL_MAX_SECONDS: f64 = SECONDS_MAX as f64;

/// All that is found.
pub(super) fn of(loaded: &Loaded) -> Vec<Error> {
    let mut found = Vec::new();
    names(loaded, &mut found);
    kinds(loaded, &mut found);
    paths(loaded, &mut found);
    types(loaded, &mut found);
    tables(loaded, &mut found);
    columns(loaded, &mut found);
    numbers(loaded, &mut found);
    found
}

fn names(loaded: &Loaded, found: &mut Vec<Error>) {
    let config = &loaded.config;
    distinct(loaded, "source", config.sources.iter().map(|source| source.name.as_str()), found);
    distinct(loaded, "store", config.stores.iter().map(|store| store.name.as_str()), found);
    distinct(loaded, "projection", config.projections.iter().map(|projection| projection.name.as_str()), found);
    let reserved = |name: &&str| RESERVED_STORES.contains(&name.to_lowercase().as_str());
    for name in config.stores.iter().map(|store| store.name.as_str()).filter(reserved) {
        found.push(loaded.wrong(&format!("store {name}"), "DuckDB has a database of that name: give another"));
    }
    for projection in &config.projections {
        if is_reserved_table(&projection.name) {
            let cause = "the name is that of a table of the store's own: give another";
            found.push(loaded.wrong(&format!("projection {}", projection.name), cause));
        }
        found.extend(projection.target.as_ref().and_then(|target| loaded.store(target).err()));
    }
    found.extend(loaded.staging().err());
}

/// DuckDB's names are the same in any case, and these become such.
fn distinct<'a>(loaded: &Loaded, what: &str, names: impl Iterator<Item = &'a str>, found: &mut Vec<Error>) {
    let mut before = BTreeSet::new();
    for name in names {
        if name.trim().is_empty() {
            found.push(loaded.wrong(&format!("{what} {name:?}"), "its name is empty: give it one"));
        } else if !before.insert(name.to_lowercase()) {
            let cause = format!("another {what} has that name, in this case of letters or another: rename one");
            found.push(loaded.wrong(&format!("{what} {name}"), &cause));
        }
    }
}

/// Keys that a kind of source needs, or does not have.
fn kinds(loaded: &Loaded, found: &mut Vec<Error>) {
    let config = &loaded.config;
    for source in &config.sources {
        let path = ("path", source.path.is_some());
        let of_sqlite = [
            ("busy_timeout_ms", source.busy_timeout_ms.is_some()),
            ("keep_changes_seconds", source.keep_changes_seconds.is_some()),
        ];
        let server = ("server", source.server.is_some());
        let of_postgres = [
            ("schema", source.schema.is_some()),
            ("publication", source.publication.is_some()),
            ("slot", source.slot.is_some()),
            ("manage", source.manage.is_some()),
            ("capture", source.capture.is_some()),
            ("poll_seconds", source.poll_seconds.is_some()),
            ("overlap_seconds", source.overlap_seconds.is_some()),
        ];
        let object = format!("source {}", source.name);
        let foreign: &[(Keys<'_>, &str)] = match source.kind {
            SourceKind::Sqlite => &[(&[server], "postgres"), (&of_postgres, "postgres")],
            SourceKind::Postgres => &[(&[path], "sqlite"), (&of_sqlite, "sqlite")],
            SourceKind::Files => &[(&of_sqlite, "sqlite"), (&[server], "postgres"), (&of_postgres, "postgres")],
        };
        let needed = if source.kind == SourceKind::Postgres { server } else { path };
        keys(loaded, &object, &[needed], &[], "", found);
        for (theirs, kind) in foreign {
            keys(loaded, &object, &[], theirs, kind, found);
        }
        captures(loaded, source, found);
        if let Some(slot) = source.slot.as_ref().filter(|slot| !is_slot_name(slot)) {
            let cause = format!("slot {slot:?} is no name of a slot: use a to z, 0 to 9 and _, 63 letters at most");
            found.push(loaded.wrong(&object, &cause));
        }
        found.extend(source.server.as_ref().into_iter().flat_map(|server| contradictions(loaded, &object, server)));
    }
    for store in &config.stores {
        let object = format!("store {}", store.name);
        let of_duckdb = [("path", store.path.is_some())];
        let of_postgres = [("server", store.server.is_some()), ("schema", store.schema.is_some())];
        let (own, foreign, kind) = match store.kind {
            StoreKind::Duckdb => (&of_duckdb[..], &of_postgres[..], "postgres"),
            StoreKind::Postgres => (&of_postgres[..], &of_duckdb[..], "duckdb"),
        };
        keys(loaded, &object, own, foreign, kind, found);
        found.extend(store.server.as_ref().into_iter().flat_map(|server| contradictions(loaded, &object, server)));
    }
}

/// Keys that one way to capture needs, or does not have.
fn captures(loaded: &Loaded, source: &SourceConfig, found: &mut Vec<Error>) {
    let object = format!("source {}", source.name);
    let is_timestamp = source.capture() == CaptureKind::Timestamp;
    let of_timestamp =
        [("poll_seconds", source.poll_seconds.is_some()), ("overlap_seconds", source.overlap_seconds.is_some())];
    let of_logical = [
        ("publication", source.publication.is_some()),
        ("slot", source.slot.is_some()),
        ("manage", source.manage.is_some()),
    ];
    let (foreign, other): (Keys<'_>, _) =
        if is_timestamp { (&of_logical, "logical") } else { (&of_timestamp, "timestamp") };
    if source.kind == SourceKind::Postgres {
        for (key, _) in foreign.iter().filter(|(_, is_given)| *is_given) {
            found.push(loaded.wrong(&object, &format!("it has {key}, which is for capture \"{other}\": leave it out")));
        }
    }
    for (name, table) in &source.tables {
        let cause = match (&table.changed_at, is_timestamp) {
            (None, true) => {
                "it has no changed_at, which names the timestamp column that every insert and update sets: its source is \
                 captured by timestamp"
            }
            (Some(_), false) => "it has changed_at, which is for capture \"timestamp\": leave it out",
            _ => continue,
        };
        found.push(loaded.wrong(&format!("table {name} of source {}", source.name), cause));
    }
}

/// Keys with whether they are given.
type Keys<'a> = &'a [(&'a str, bool)];

/// The first of a kind's own keys is the one that it cannot be without; `kind` has the foreign ones.
fn keys(loaded: &Loaded, object: &str, own: Keys<'_>, foreign: Keys<'_>, kind: &str, found: &mut Vec<Error>) {
    if let Some((key, _)) = own.first().filter(|(_, is_given)| !is_given) {
        found.push(loaded.wrong(object, &format!("it has no {key}, which says where it is")));
    }
    for (key, _) in foreign.iter().filter(|(_, is_given)| *is_given) {
        found.push(loaded.wrong(object, &format!("it has {key}, which is for kind \"{kind}\": leave it out")));
    }
}

/// What a server's settings say twice, or against each other.
fn contradictions(loaded: &Loaded, object: &str, server: &ServerConfig) -> Vec<Error> {
    let mut found = Vec::new();
    if server.password.is_some() && server.password_file.is_some() {
        found.push(loaded.wrong(object, "its server has password and password_file: give one of them"));
    }
    if server.tls == Some(TlsMode::Off) && server.tls_roots.is_some() {
        found.push(loaded.wrong(object, "its server has tls_roots, and tls is off: leave out one of them"));
    }
    let seconds = 1..=SECONDS_MAX;
    let key = |key: &str| format!("{key} of {object}");
    found.extend(within(loaded, &key("connect_timeout_seconds"), server.connect_timeout_seconds, seconds.clone()));
    found.extend(within(loaded, &key("statement_timeout_seconds"), server.statement_timeout_seconds, seconds));
    found
}

/// As the server accepts it (PostgreSQL documentation, "Replication Slots").
fn is_slot_name(name: &str) -> bool {
    let fits = |letter: u8| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == b'_';
    (1..=63).contains(&name.len()) && name.bytes().all(fits)
}

/// A file belongs to one: a store that took the source's file would be the end of it.
fn paths(loaded: &Loaded, found: &mut Vec<Error>) {
    let config = &loaded.config;
    let files = config.sources.iter().filter_map(|source| Some((source, source.path.as_ref()?)));
    let sources = files.map(|(source, path)| ("source", &source.name, path));
    let stores = config.stores.iter().filter_map(|store| Some(("store", &store.name, store.path.as_ref()?)));
    let mut before: Vec<(PathBuf, String)> = Vec::new();
    for (what, name, path) in sources.chain(stores) {
        let file = real(&loaded.resolve(path));
        if path.as_os_str().is_empty() {
            found.push(loaded.wrong(&format!("{what} {name}"), "its path is empty: name its file"));
            continue;
        }
        if let Some((_, other)) = before.iter().find(|(known, _)| *known == file) {
            let cause = format!("its path {} is that of {other}: give each a file of its own", path.display());
            found.push(loaded.wrong(&format!("{what} {name}"), &cause));
        }
        before.push((file, format!("{what} {name}")));
    }
}

/// The file behind a path, as far as there is one.
fn real(path: &Path) -> PathBuf {
    let beside = || {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(parent.canonicalize().ok()?.join(path.file_name()?))
    };
    path.canonicalize().ok().or_else(beside).unwrap_or_else(|| path.to_path_buf())
}

/// What is no type in any source; whether one fits its column, the source tells.
fn types(loaded: &Loaded, found: &mut Vec<Error>) {
    let tables = loaded.config.sources.iter().flat_map(|source| &source.tables);
    for (table, (column, name)) in tables.flat_map(|(table, config)| config.columns.iter().map(move |one| (table, one)))
    {
        if let Some((cause, remedy)) = no_type(name) {
            found.push(loaded.wrong(&format!("column {column} of table {table}"), &cause).with_remedy(remedy));
        }
    }
}

/// Why a name is that of no type, and what to do.
fn no_type(name: &str) -> Option<(String, String)> {
    let numbers = name.strip_prefix("decimal(").and_then(|rest| rest.strip_suffix(')')?.split_once(','));
    let number = |text: &str| text.trim().parse::<i64>().ok();
    if let Some((precision, scale)) = numbers.and_then(|(left, right)| Some((number(left)?, number(right)?))) {
        let cause = if !(1..=DECIMAL_PRECISION_MAX).contains(&precision) {
            format!("the precision of {name} is {precision}")
        } else if !(0..=precision).contains(&scale) {
            format!("the scale of {name} is {scale}")
        } else {
            return None;
        };
        let remedy = format!(
            "give a precision of 1 to {DECIMAL_PRECISION_MAX}, and a scale that is at least 0 and at most the precision"
        );
        return Some((cause, remedy));
    }
    parse_type(name).is_none().then(|| (format!("unknown type {name:?}"), format!("give one of {TYPES}")))
}

/// Whether the configuration gives a column of the table what is no type.
pub(super) fn is_mistyped(table: &TableConfig) -> bool {
    table.columns.values().any(|name| no_type(name).is_some())
}

/// A projection of a table that no source names waits for ever.
fn tables(loaded: &Loaded, found: &mut Vec<Error>) {
    let captured: Vec<&str> =
        loaded.config.sources.iter().flat_map(|source| source.tables.keys()).map(String::as_str).collect();
    for projection in loaded.config.projections.iter().filter(|projection| projection.enabled) {
        let read = projection.tables.iter().chain(&projection.table);
        for name in read.filter(|name| !captured.contains(&name.as_str())) {
            let near = match nearest(name, captured.iter().copied()) {
                near if near.is_empty() => format!("; those named are {}", captured.join(", ")),
                near => near,
            };
            let cause = format!("it reads table {name}, which no source names{near}");
            found.push(loaded.wrong(&format!("projection {}", projection.name), &cause));
        }
    }
}

/// Columns that a history names twice: one of them was to be another.
fn columns(loaded: &Loaded, found: &mut Vec<Error>) {
    for projection in &loaded.config.projections {
        for (key, names) in [("tracked", &projection.tracked), ("untracked", &projection.untracked)] {
            let mut before = BTreeSet::new();
            for name in names.iter().flatten().filter(|name| !before.insert(name.as_str())) {
                let cause = format!("{key} names column {name} twice: leave one out");
                found.push(loaded.wrong(&format!("projection {}", projection.name), &cause));
            }
        }
    }
}

fn numbers(loaded: &Loaded, found: &mut Vec<Error>) {
    let config = &loaded.config;
    for source in &config.sources {
        let key = |key: &str| format!("{key} of source {}", source.name);
        found.extend(within(
            loaded,
            &key("snapshot_chunk_rows"),
            source.snapshot_chunk_rows.unwrap_or(1),
            1..=usize::MAX,
        ));
        if let Some(seconds) = source.keep_changes_seconds {
            found.extend(within(loaded, &key("keep_changes_seconds"), seconds, 0..=SECONDS_MAX));
        }
        if let Some(seconds) = source.poll_seconds {
            found.extend(within(loaded, &key("poll_seconds"), seconds, 1..=SECONDS_MAX));
        }
        if let Some(seconds) = source.overlap_seconds {
            found.extend(within(loaded, &key("overlap_seconds"), seconds, 1..=SECONDS_MAX));
        }
    }
    found.extend(within(loaded, "ingest.batch_max_rows", config.ingest.batch_max_rows, 1..=usize::MAX));
    found.extend(within(loaded, "ingest.batch_max_bytes", config.ingest.batch_max_bytes, 1..=usize::MAX));
    found.extend(within(loaded, "ingest.poll_interval_ms", config.ingest.poll_interval_ms, 1..=SECONDS_MAX));
    found.extend(within(loaded, "ingest.linger_ms", config.ingest.linger_ms, 0..=SECONDS_MAX));
    found.extend(within(loaded, "project.interval_ms", config.project.interval_ms, 1..=SECONDS_MAX));
    found.extend(within(loaded, "project.debounce_ms", config.project.debounce_ms, 0..=SECONDS_MAX));
    found.extend(within(loaded, "retention.keep_hours", config.retention.keep_hours, 0.0..=HOURS_MAX));
    found.extend(within(loaded, "retention.every_seconds", config.retention.every_seconds, 1..=SECONDS_MAX));
    if let Some(seconds) = config.generate.interval_seconds {
        found.extend(within(loaded, "generate.interval_seconds", seconds, INTERVAL_MIN_SECONDS..=INTERVAL_MAX_SECONDS));
    }
    found.extend(within(loaded, "memory.limit_mib", config.memory.limit_mib, MEMORY_MIN_MIB..=MEMORY_MAX_MIB));
    found.extend(within(loaded, "memory.threads", config.memory.threads, 0..=THREADS_MAX));
}

fn within<T: PartialOrd + Display>(loaded: &Loaded, key: &str, value: T, range: RangeInclusive<T>) -> Option<Error> {
    if range.contains(&value) {
        return None;
    }
    let (least, most) = range.into_inner();
    let bound = if value < least || value.partial_cmp(&least).is_none() {
        format!("at least {least}")
    } else {
        format!("at most {most}")
    };
    Some(loaded.wrong(key, &format!("it is {value}, and must be {bound}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_told_are_those_documented_and_read() {
        let documented = include_str!("../../../../docs/configuration.md").replace('`', "");
        let documented = documented.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(documented.contains(&format!("Types: {TYPES}.")), "{TYPES}");
        for name in TYPES.split(", ") {
            let name = name.replace("precision,scale", "18,2");
            assert!(parse_type(&name).is_some() && no_type(&name).is_none(), "{name}");
        }
    }

    #[test]
    fn a_decimal_out_of_bounds_is_told_by_its_bounds() {
        for (name, cause) in [
            ("decimal(40,2)", "precision"),
            ("decimal(0,0)", "precision"),
            ("decimal(300,2)", "precision"),
            ("decimal(5,6)", "scale"),
            ("decimal(5,-1)", "scale"),
            ("decimal(5)", "unknown type"),
            ("money", "unknown type"),
        ] {
            assert!(no_type(name).is_some_and(|(told, _)| told.contains(cause)), "{name}");
        }
        assert!(["decimal(38,38)", "decimal(1,0)", "decimal(18, 2)"].into_iter().all(|name| no_type(name).is_none()));
    }
}
