//! Configuration: one TOML file a pipeline, strict, with the environment's values where the file asks for them.
//!
//! `${NAME}` and `${NAME:-default}` are replaced before parsing, from the environment, then from a `.env` file beside the
//! configuration. Every key has its default here, in one place; a key that is not known is refused, with the nearest one
//! that is.

mod entity_path;
mod environment;
mod generate;
mod places;
mod refusals;
mod server;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::store::after_comments;

pub use entity_path::{EntityPathConfig, ThroughConfig};
pub use environment::beside;
pub use generate::GenerateConfig;
pub use server::{ServerConfig, TlsMode};
pub use source::{CaptureKind, SourceConfig, SourceKind, TableConfig};

/// A pipeline, as configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub pipeline: PipelineConfig,
    #[serde(rename = "source")]
    pub sources: Vec<SourceConfig>,
    #[serde(rename = "store")]
    pub stores: Vec<StoreConfig>,
    #[serde(rename = "projection", default)]
    pub projections: Vec<ProjectionConfig>,
    #[serde(default)]
    pub ingest: IngestConfig,
    #[serde(default)]
    pub project: ProjectConfig,
    #[serde(default)]
    pub retention: RetentionConfig,
    #[serde(default)]
    pub memory: MemoryConfig,
    #[serde(default)]
    pub generate: GenerateConfig,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfig {
    pub name: String,
    /// The store that keeps the log; may be left out where there is one store.
    pub staging: Option<String>,
    /// Where Shori keeps its cache, lock and socket; beside the configuration if not given.
    pub dir: Option<PathBuf>,
    /// SQL file that makes the pipeline's sample source tables (`shori init --sample`).
    pub sample: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    Duckdb,
    Postgres,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    pub name: String,
    pub kind: StoreKind,
    /// Of `duckdb`: its file.
    pub path: Option<PathBuf>,
    /// Of `postgres`: where it is, and the database schema of its tables.
    pub server: Option<ServerConfig>,
    pub schema: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProjectionKind {
    Sql,
    Latest,
    History,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectionConfig {
    pub name: String,
    pub kind: ProjectionKind,
    /// Store of the result; the staging store if not given.
    pub target: Option<String>,
    /// Of `latest` and `history`.
    pub table: Option<String>,
    /// Of `sql`: the query's file, the tables it reads, how it is maintained.
    pub sql: Option<PathBuf>,
    #[serde(default)]
    pub tables: Vec<String>,
    #[serde(default)]
    pub key: Vec<String>,
    /// Of `history`: the columns that it has beside the key, or all but which; and what a deletion does.
    pub tracked: Option<Vec<String>>,
    pub untracked: Option<Vec<String>>,
    pub deletes: Option<DeletesConfig>,
    pub entity: Option<BTreeMap<String, EntityPathConfig>>,
    #[serde(default)]
    pub additive: Vec<String>,
    pub weight: Option<String>,
    #[serde(default)]
    pub publish_weight: bool,
    #[serde(default = "defaults::enabled")]
    pub enabled: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeletesConfig {
    Close,
    Tombstone,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IngestConfig {
    pub batch_max_rows: usize,
    pub batch_max_bytes: usize,
    pub poll_interval_ms: u64,
    /// Shortest time from one append to the next while the source is level.
    pub linger_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProjectConfig {
    pub interval_ms: u64,
    pub debounce_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// Hours for which the log is kept whole; 0 keeps no more than what projections still need.
    pub keep_hours: f64,
    /// Changes kept whole per table at most; 0 means no such bound.
    pub keep_rows: u64,
    pub every_seconds: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Memory of the embedded DuckDB for data, in MiB; the process takes about as much again at most.
    pub limit_mib: u64,
    /// Threads of the embedded DuckDB; 0 means one fewer than there are cores, at least one: reading and state need one, too.
    pub threads: usize,
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self { batch_max_rows: 122_880, batch_max_bytes: 24 << 20, poll_interval_ms: 1_000, linger_ms: 25 }
    }
}

impl Default for ProjectConfig {
    fn default() -> Self {
        Self { interval_ms: 5_000, debounce_ms: 20 }
    }
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { keep_hours: 168.0, keep_rows: 0, every_seconds: 600 }
    }
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { limit_mib: 256, threads: 0 }
    }
}

mod defaults {
    pub const SCHEMA: &str = "public";

    pub fn enabled() -> bool {
        true
    }
}

/// A configuration with the folder that its paths are relative to, and where its SQL comes from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// For messages.
    pub file: PathBuf,
    pub base: PathBuf,
    files: Files,
}

/// Where files that a configuration names are read from.
#[derive(Clone, Debug)]
enum Files {
    Disk,
    /// Built into the program.
    Embedded(&'static [(&'static str, &'static str)]),
}

/// The demo pipeline's files, built in so that `shori demo` needs nothing but the program.
const DEMO: &[(&str, &str)] = &[
    ("sql/sample_source.sql", include_str!("../../../pipelines/demo/sql/sample_source.sql")),
    (
        "sql/proj_orders_kpi_by_minute_segment.sql",
        include_str!("../../../pipelines/demo/sql/proj_orders_kpi_by_minute_segment.sql"),
    ),
    ("sql/proj_orders_latest.sql", include_str!("../../../pipelines/demo/sql/proj_orders_latest.sql")),
];
const DEMO_CONFIG: &str = include_str!("../../../pipelines/demo/shori.toml");

impl Loaded {
    pub fn from_file(file: &Path) -> Result<Self> {
        let loaded = Self::as_written(file)?;
        loaded.refusals().into_iter().next().map_or(Ok(loaded), Err)
    }

    /// What a file says, whether or not it can be meant: for whoever tells all that is wrong with it.
    pub fn as_written(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|cause| {
            Error::new(ErrorKind::Usage, "read", format!("configuration {}", file.display()), cause)
                .with_remedy("name the file with -c, or use --dir for the demo pipeline")
        })?;
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let config = parse(&text, file, &environment::read(parent)?)?;
        Ok(Self { config, file: file.to_path_buf(), base: parent.to_path_buf(), files: Files::Disk })
    }

    /// The demo pipeline, with its files in `directory`.
    pub fn demo(directory: &Path) -> Result<Self> {
        let config = parse(DEMO_CONFIG, Path::new("the demo pipeline"), &BTreeMap::new())?;
        Ok(Self {
            config,
            file: PathBuf::from("the demo pipeline"),
            base: directory.to_path_buf(),
            files: Files::Embedded(DEMO),
        })
    }

    /// The demo pipeline in a folder that somebody has made.
    pub fn made_demo(directory: &Path) -> Result<Self> {
        places::must_be_made(directory)?;
        Self::demo(directory)
    }

    /// What it says and cannot be meant.
    pub fn refusals(&self) -> Vec<Error> {
        refusals::of(self)
    }

    /// Why stores can neither be opened nor made where the configuration wants them.
    pub fn misplaced_stores(&self) -> Vec<Error> {
        places::of_stores(self)
    }

    /// `path` as the configuration means it.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        self.base.join(path)
    }

    /// Shori's own folder: cache, lock, socket.
    pub fn state_directory(&self) -> PathBuf {
        self.resolve(self.config.pipeline.dir.as_deref().unwrap_or(Path::new("."))).join(".shori")
    }

    pub fn read(&self, path: &Path) -> Result<String> {
        let missing = |cause: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Usage, "read", format!("file {}", self.resolve(path).display()), cause)
                .with_remedy(format!("it is named in {}", self.file.display()))
        };
        match self.files {
            Files::Disk => std::fs::read_to_string(self.resolve(path)).map_err(|cause| missing(cause.into())),
            Files::Embedded(files) => {
                let found = files.iter().find(|(name, _)| Path::new(name) == path);
                found.map(|(_, text)| text.to_string()).ok_or_else(|| missing("it is not built in".into()))
            }
        }
    }

    /// The query in a file; refuses one that holds none.
    pub fn read_query(&self, path: &Path) -> Result<String> {
        let text = self.read(path)?;
        if !after_comments(&text).is_empty() {
            return Ok(text);
        }
        let object = format!("file {}", self.resolve(path).display());
        Err(Error::new(ErrorKind::Usage, "use", object, "it holds no query").with_remedy(format!(
            "write a select into it, or take out the projection that names it in {}",
            self.file.display()
        )))
    }

    pub fn staging(&self) -> Result<&StoreConfig> {
        let stores = &self.config.stores;
        match &self.config.pipeline.staging {
            Some(name) => self.store(name),
            None if stores.len() == 1 => Ok(&stores[0]),
            None => Err(self.wrong("pipeline.staging", "there are several stores, and none is named as staging")),
        }
    }

    pub fn store(&self, name: &str) -> Result<&StoreConfig> {
        let found = self.config.stores.iter().find(|store| store.name == name);
        found.ok_or_else(|| {
            let names = self.config.stores.iter().map(|store| store.name.as_str());
            self.wrong(&format!("store {name}"), &format!("no [[store]] has that name{}", nearest(name, names)))
        })
    }

    pub fn wrong(&self, object: &str, cause: &str) -> Error {
        Error::new(ErrorKind::Usage, "use", format!("{object} in {}", self.file.display()), cause.to_string())
    }
}

impl StoreConfig {
    /// Of `duckdb`.
    pub fn file(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    pub fn schema(&self) -> &str {
        self.schema.as_deref().unwrap_or(defaults::SCHEMA)
    }
}

impl RetentionConfig {
    pub fn keep(&self) -> Duration {
        Duration::from_secs_f64((self.keep_hours * 3600.0).max(0.0))
    }
}

fn parse(text: &str, file: &Path, environment: &BTreeMap<String, String>) -> Result<Config> {
    let filled = environment::fill(text, file, environment)?;
    toml::from_str(&filled.text).map_err(|cause| {
        let line = cause.span().map_or(0, |span| filled.line_of(span.start));
        let object = format!("configuration {} line {line}", file.display());
        let message = filled.without_values(cause.message(), cause.span().as_ref());
        let hint = unknown_key(&message).map(|(key, known)| nearest(&key, known.iter().map(String::as_str)));
        let message = message.replace('\n', " ");
        Error::new(ErrorKind::Usage, "read", object, format!("{message}{}", hint.unwrap_or_default()))
    })
}

/// Key and known keys of serde's message about an unknown one.
fn unknown_key(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.strip_prefix("unknown field ").or_else(|| message.strip_prefix("unknown variant "))?;
    let mut names = rest.split('`').skip(1).step_by(2).map(String::from);
    Some((names.next()?, names.collect()))
}

/// `; did you mean x?`, or nothing if no name is near.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let scored = known.map(|known| (strsim::jaro_winkler(name, known), known)).filter(|(score, _)| *score > 0.75);
    let best = scored.max_by(|(left, _), (right, _)| left.total_cmp(right));
    best.map(|(_, known)| format!("; did you mean {known}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "[pipeline]\nname = \"p\"\n[[source]]\nname = \"s\"\nkind = \"sqlite\"\npath = \"${SHORI_TEST_PATH:-a.db}\"\n[source.tables.orders]\n[[store]]\nname = \"d\"\nkind = \"duckdb\"\npath = \"d.duckdb\"\n";

    fn read(text: &str) -> Result<Config> {
        parse(text, Path::new("test.toml"), &BTreeMap::new())
    }

    #[test]
    fn the_demo_pipeline_is_read() {
        let demo = Loaded::demo(Path::new("/somewhere")).unwrap();
        assert_eq!(demo.config.projections.len(), 4);
        for projection in demo.config.projections.iter().filter_map(|projection| projection.sql.as_ref()) {
            assert!(demo.read(projection).unwrap().contains("select"));
        }
    }

    #[test]
    fn defaults_and_the_environment_fill_what_is_asked_for() {
        assert_eq!(read(SMALL).unwrap().sources[0].file(), Path::new("a.db"));
        let environment = BTreeMap::from([("SHORI_TEST_PATH".to_string(), "b.db".to_string())]);
        let config = parse(SMALL, Path::new("test.toml"), &environment).unwrap();
        assert_eq!(config.sources[0].file(), Path::new("b.db"));
        let unset = SMALL.replace(":-a.db", "");
        let message = read(&unset).unwrap_err().to_string();
        assert!(message.contains("line 6") && message.contains("SHORI_TEST_PATH"), "{message}");
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_known_one() {
        let message = read(&SMALL.replace("kind = \"duckdb\"", "knd = \"duckdb\"")).unwrap_err().to_string();
        assert!(message.contains("line 10") && message.contains("did you mean kind?"), "{message}");
        let message = read(&SMALL.replace("\"duckdb\"", "\"duckdbb\"")).unwrap_err().to_string();
        assert!(message.contains("did you mean duckdb?"), "{message}");
    }

    #[test]
    fn comments_alone_are_no_statement() {
        for text in
            ["", " \n;\t;", "-- only", "-- a\n-- b\n", "/* a */ -- b\n;", "/* a /* b */ select */;", "\u{feff}\n"]
        {
            assert!(after_comments(text).is_empty(), "{text:?}");
        }
        for text in ["select 1", "-- a\nselect 1", "/* a */select 1 -- b", "/* a", "/* a /* b */", "'--'", "- 1"] {
            assert!(!after_comments(text).is_empty(), "{text:?}");
        }
    }

    #[test]
    fn a_missing_key_is_named() {
        let message = read(&SMALL.replace("name = \"p\"\n", "")).unwrap_err().to_string();
        assert!(message.contains("missing field `name`"), "{message}");
    }

    #[test]
    fn no_error_tells_a_value_of_the_environment() {
        let secret = "hunter2, expected \"x\"\n# y";
        let environment = BTreeMap::from([
            ("SHORI_TEST_SECRET".to_string(), "hunter2".to_string()),
            ("SHORI_TEST_LINES".to_string(), secret.to_string()),
        ]);
        let memory = [
            "limit_mib = \"${SHORI_TEST_SECRET}\"",
            "limit_mib = ${SHORI_TEST_SECRET}",
            "limit_mib = '''${SHORI_TEST_LINES}'''",
            "limit_mib = \"${SHORI_TEST_LINES}\"",
            "${SHORI_TEST_SECRET} = 1",
            "\"a${SHORI_TEST_SECRET}\" = 1",
            "limit_mib = 1\nlimit_mib = \"${SHORI_TEST_SECRET}\"",
        ];
        for line in memory {
            let text = format!("{SMALL}[memory]\n{line}\n");
            let message = parse(&text, Path::new("test.toml"), &environment).unwrap_err().to_string();
            assert!(!message.contains("hunter2") && !message.contains('\n'), "{message}");
            assert!(message.contains("${SHORI_TEST_"), "{message}");
            assert!(message.contains("line 13") || message.contains("line 14"), "{message}");
        }
        let text = format!("{SMALL}[memory]\nlimit_mib = \"${{SHORI_TEST_SECRET}}\"");
        let message = parse(&text, Path::new("test.toml"), &environment).unwrap_err().to_string();
        assert!(message.contains("${SHORI_TEST_SECRET}, expected u64"), "{message}");
        let text = format!("{}x = 1", SMALL.replace("name = \"p\"", "name = '''${SHORI_TEST_LINES}'''"));
        let message = parse(&text, Path::new("test.toml"), &environment).unwrap_err().to_string();
        assert!(message.contains("line 12") && message.contains("unknown field `x`"), "{message}");
    }

    #[test]
    fn an_environment_file_that_is_not_understood_is_told_without_its_content() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".env"), "# names\nA=1\nSECRET=hunter2\"x\nB=2\n").unwrap();
        let message = environment::read(folder.path()).unwrap_err().to_string();
        assert!(message.contains(".env line 3") && !message.contains("hunter2"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}
