//! A DuckDB file as a store: the log of a pipeline, its results, or both.
//!
//! The file is attached to the instance that all embedded work shares. Each call takes a connection of its own and runs
//! off the async threads, so a call whose future is dropped still ends whole: done, or rolled back. DuckDB flushes its
//! write-ahead log at every commit.

mod append;
mod captures;
mod compact;
mod fold;
mod history;
mod layers;
mod layout;
mod output;
mod query;
mod question;
mod read;
mod rewrite;
mod runs;
mod session;
mod target;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::projection::Target;
use shori_core::source::{CaptureInfo, SnapshotProgress};
use shori_core::store::{
    Append, Appended, CaptureState, Checkpoint, Committed, Compacted, LogStream, OutputCommit, RunRecord, Store,
};
use shori_core::{Error, ErrorKind, Result};

use crate::database::Database;
use fold::Folder;
pub use layout::is_reserved_table;
pub use query::{ANSWER_ROWS_MAX, Answer, too_many};
pub use question::{Question, after_comments};
use session::{Session, Sessions, now, text, time};
pub use target::ProjectionStatus;

const SELECT_STORE: &str = "
select store_id, layout_version
from ctl_store";

const INSERT_STORE: &str = "
insert into ctl_store
values (true, ?, ?, ?)";

/// A store in a DuckDB file. Handles to one file on one [`Database`] may be several.
pub struct DuckdbStore {
    /// First, so that the fold under way has ended before anything else goes.
    folder: Folder,
    sessions: Arc<Sessions>,
}

impl DuckdbStore {
    /// Attaches the file as `catalog`, creating it if missing.
    pub fn open(database: &Database, path: &Path, catalog: &str) -> Result<Self> {
        database.attach(path, catalog)?;
        let sessions = Arc::new(Sessions::new(database.clone(), catalog));
        Ok(Self { folder: Folder::start(&sessions), sessions })
    }

    /// The answer to one reading statement, of [`ANSWER_ROWS_MAX`] rows at most; anything else is refused. An empty answer
    /// is one batch without rows.
    pub async fn query(&self, sql: &str) -> Result<Vec<RecordBatch>> {
        let sql = sql.to_string();
        self.run(move |session| query::query(session, &sql)).await
    }

    /// The answer to one reading statement, of any number of rows, in memory that does not grow with them. It sees one
    /// state of the store, which the store keeps as long as the answer is held.
    pub async fn stream(&self, sql: &str) -> Result<Answer> {
        query::stream(&self.sessions, sql).await
    }

    /// Where every projection with a target here stands.
    pub async fn projection_statuses(&self) -> Result<Vec<ProjectionStatus>> {
        self.run(target::statuses).await
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Session) -> Result<T> + Send + 'static) -> Result<T> {
        let sessions = self.sessions.clone();
        let run = move || {
            let session = sessions.session()?;
            let result = work(&session);
            // A connection that failed may be in any state: it is closed instead.
            if result.is_ok() {
                session.give_back();
            }
            result
        };
        self.sessions.database.run(run).await
    }
}

#[async_trait]
impl Store for DuckdbStore {
    async fn bootstrap(&self) -> Result<String> {
        self.run(|session| session.transaction("control tables", bootstrap)).await
    }

    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        let (timeline, identity, infos) = (timeline.to_string(), identity.to_string(), captures.to_vec());
        self.run(move |session| captures::prepare(session, &timeline, &identity, &infos)).await
    }

    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>> {
        self.run(captures::states).await
    }

    async fn append(&self, append: &Append<'_>) -> Result<Appended> {
        let owned = append::OwnedAppend::of(append);
        self.run(move |session| append::append(session, &owned)).await
    }

    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream> {
        read::read_log(&self.sessions, capture, *after, *up_to).await
    }

    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
        let id = capture.clone();
        self.run(move |session| captures::request_snapshot(session, &id, retyped)).await
    }

    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()> {
        let (id, reason) = (capture.clone(), reason.to_string());
        self.run(move |session| captures::mark_failed(session, &id, &reason)).await
    }

    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
        let (id, horizon) = (capture.clone(), *horizon);
        self.run(move |session| compact::compact(session, &id, &horizon, keep_deletes)).await
    }

    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position> {
        let id = capture.clone();
        self.run(move |session| read::retention_horizon(session, &id, staged_before, keep_rows)).await
    }

    async fn prepare_target(&self, target: &Target) -> Result<()> {
        let target = target.clone();
        self.run(move |session| target::prepare(session, &target)).await
    }

    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>> {
        let projection = projection.to_string();
        self.run(move |session| target::checkpoint(session, &projection)).await
    }

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed> {
        let step = output::Step::of(&commit);
        // Each change of threads may wait for a processor: a small output makes one.
        let mut gathered = output::Gathered::from(commit.output).await?;
        let mut output = output::Unfinished::New(Box::new(step));
        let finished = loop {
            let (sessions, database) = (self.sessions.clone(), &self.sessions.database);
            match database.run(move || output.load(&sessions, gathered)).await? {
                output::Loaded::Ended(finished) => break finished,
                output::Loaded::Open(open) => output = output::Unfinished::Open(open),
            }
            gathered = output::Gathered::from(commit.output).await?;
        };
        if let Some(target) = &finished.to_fold {
            self.folder.ask(&self.sessions, target);
        }
        Ok(finished.committed)
    }

    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()> {
        let (projection, message) = (projection.to_string(), message.map(String::from));
        let record = move |session: &Session| match message {
            Some(message) => target::record_error(session, &projection, &message),
            None => target::clear_error(session, &projection),
        };
        self.run(record).await
    }

    async fn reset_projection(&self, projection: &str) -> Result<()> {
        let projection = projection.to_string();
        self.run(move |session| target::reset(session, &projection)).await
    }

    async fn start_run(&self, run: &RunRecord) -> Result<()> {
        let run = run.clone();
        self.run(move |session| runs::start(session, &run)).await
    }

    async fn update_run(&self, run: &RunRecord) -> Result<()> {
        let run = run.clone();
        self.run(move |session| runs::update(session, &run)).await
    }
}

/// The version is looked at before anything else is made: a file of a newer one is left as it is.
fn bootstrap(session: &Session) -> Result<String> {
    let object = "control tables";
    session.batch(layout::CREATE_STORE_TABLE, object)?;
    let rows = session.rows(SELECT_STORE, &[], object, |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?;
    if let Some((_, version)) = rows.first().filter(|(_, version)| *version > layout::LAYOUT_VERSION) {
        let cause = format!("its layout is {version}, and this program knows layouts up to {}", layout::LAYOUT_VERSION);
        return Err(Error::new(ErrorKind::Usage, "open", format!("store {}", session.catalog()), cause)
            .with_remedy("use the newer version of shori that wrote it"));
    }
    session.batch(layout::CREATE_CONTROL_TABLES, object)?;
    if let Some((id, _)) = rows.into_iter().next() {
        return Ok(id);
    }
    let id = uuid::Uuid::new_v4().to_string();
    let version = duckdb::types::Value::BigInt(layout::PLAIN_LAYOUT_VERSION);
    session.execute(INSERT_STORE, &[text(&id), version, time(now())], object)?;
    Ok(id)
}
