//! A schema of a PostgreSQL database as a store: the log of a pipeline, its results, or both.
//!
//! # Constraints
//!
//! - Of PostgreSQL 14 or newer, with the right to create tables in the schema and temporary ones in the database. Session
//!   settings and locks are used: a pooler between must keep sessions.
//! - A call is one transaction. Rows go in by binary copy, never one by one: into the log, into a target where there is
//!   nothing to compare with, else into temporary tables whose rows one statement brings in.
//! - Writers are fenced by row locks on the control rows that they decide by (contract 6).
//! - Types are kept exactly; a value that PostgreSQL has no place for (text with a NUL, a date before its calendar) fails
//!   with the name of its column.
//!
//! # Layout
//!
//! `layout` has all names and definitions. `session` makes connections; `copy_in` and `copy_out` are between Arrow and
//! the binary format. `captures`, `append`, `read`, `retention` and `compact` are the log; `target`, `output` and
//! `history` results; `runs` the records of runs; `query` questions of people.

mod append;
mod captures;
mod compact;
mod copy_in;
mod copy_out;
mod history;
mod layout;
mod output;
mod query;
mod read;
mod retention;
mod runs;
mod session;
mod target;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use shori_core::position::{CaptureId, Micros, Position};
use shori_core::projection::Target;
use shori_core::source::{CaptureInfo, SnapshotProgress};
use shori_core::store::{
    Append, Appended, CaptureState, Checkpoint, Committed, Compacted, LogStream, OutputCommit, RunRecord, Store,
};
use shori_core::{Error, ErrorKind, Result};

use crate::connect::{Server, literal, quoted};
pub use layout::is_reserved_table;
pub use query::Answer;
use runs::Leases;
use session::{Link, Links, Time, now};

const CONTROL: &str = "control tables";

const SELECT_STORE: &str = "
select store_id, layout_version
from ctl_store";

const INSERT_STORE: &str = "
insert into ctl_store
    (only_row, store_id, layout_version, created_at)
values (true, gen_random_uuid()::text, $1, $2)
returning store_id";

/// A store in a schema of a database. Stores of one schema may be several, in one process or many.
pub struct PostgresStore {
    links: Arc<Links>,
    leases: Leases,
}

impl PostgresStore {
    /// Connects when it is first used. The schema is made if it is missing.
    pub fn new(server: Server, schema: String) -> Self {
        Self { links: Arc::new(Links::new(server, schema)), leases: Leases::default() }
    }
}

/// Runs a call's work in a transaction of its own.
macro_rules! transaction {
    ($store:expr, $object:expr, $link:ident => $work:expr) => {{
        let object = $object;
        let connection = $store.links.begin(object).await?;
        let $link = &connection;
        let result = $work.await;
        $store.links.end(connection, object, result).await
    }};
}

#[async_trait]
impl Store for PostgresStore {
    async fn bootstrap(&self) -> Result<String> {
        transaction!(self, CONTROL, link => bootstrap(link, &self.links.schema))
    }

    async fn prepare_captures(&self, timeline: &str, identity: &str, captures: &[CaptureInfo]) -> Result<()> {
        let schema = &self.links.schema;
        transaction!(self, timeline, link => captures::prepare(link, schema, timeline, identity, captures))
    }

    async fn captures(&self) -> Result<BTreeMap<CaptureId, CaptureState>> {
        transaction!(self, CONTROL, link => captures::states(link))
    }

    async fn append(&self, append: &Append<'_>) -> Result<Appended> {
        transaction!(self, "the log", link => append::append(link, append))
    }

    async fn read_log(&self, capture: &CaptureId, after: &Position, up_to: &Position) -> Result<LogStream> {
        read::read_log(&self.links, capture, after, up_to).await
    }

    async fn request_snapshot(&self, capture: &CaptureId, retyped: bool) -> Result<SnapshotProgress> {
        transaction!(self, CONTROL, link => captures::request_snapshot(link, capture, retyped))
    }

    async fn mark_failed(&self, capture: &CaptureId, reason: &str) -> Result<()> {
        transaction!(self, CONTROL, link => captures::mark_failed(link, capture, reason))
    }

    async fn compact(&self, capture: &CaptureId, horizon: &Position, keep_deletes: bool) -> Result<Compacted> {
        let schema = &self.links.schema;
        transaction!(self, "the log", link => compact::compact(link, schema, capture, horizon, keep_deletes))
    }

    async fn retention_horizon(
        &self,
        capture: &CaptureId,
        staged_before: Option<Micros>,
        keep_rows: Option<u64>,
    ) -> Result<Position> {
        transaction!(self, "the log", link => retention::horizon(link, capture, staged_before, keep_rows))
    }

    async fn prepare_target(&self, target: &Target) -> Result<()> {
        transaction!(self, &target.projection, link => target::prepare(link, &self.links.schema, target))
    }

    async fn checkpoint(&self, projection: &str) -> Result<Option<Checkpoint>> {
        transaction!(self, projection, link => target::checkpoint(link, projection))
    }

    async fn commit_output(&self, commit: OutputCommit<'_>) -> Result<Committed> {
        output::commit(&self.links, commit).await
    }

    async fn record_error(&self, projection: &str, message: Option<&str>) -> Result<()> {
        transaction!(self, projection, link => target::record_error(link, projection, message))
    }

    async fn reset_projection(&self, projection: &str) -> Result<()> {
        transaction!(self, projection, link => target::reset(link, projection))
    }

    async fn start_run(&self, run: &RunRecord) -> Result<()> {
        runs::start(&self.links, &self.leases, run).await
    }

    async fn update_run(&self, run: &RunRecord) -> Result<()> {
        runs::update(&self.links, &self.leases, run).await
    }
}

/// The version is looked at before anything else is made: a store of a newer one is left as it is.
async fn bootstrap(link: &Link, schema: &str) -> Result<String> {
    captures::lock_shapes(link, schema).await?;
    let missing = format!("select count(*) from pg_namespace where nspname = {}", literal(schema));
    if link.number(&missing, CONTROL).await? == 0 {
        link.run(&format!("create schema {}", quoted(schema)), &format!("schema {schema}")).await?;
    }
    link.run(layout::CREATE_STORE_TABLE, CONTROL).await?;
    let rows = link.rows(SELECT_STORE, &[], CONTROL).await?;
    if let Some(version) = rows.first().map(|row| row.get::<_, i64>(1)).filter(|known| *known > layout::LAYOUT_VERSION)
    {
        let cause = format!("its layout is {version}, and this program knows layouts up to {}", layout::LAYOUT_VERSION);
        return Err(Error::new(ErrorKind::Usage, "open", format!("the store in schema {schema}"), cause)
            .with_remedy("use the newer version of shori that wrote it"));
    }
    link.run(layout::CREATE_CONTROL_TABLES, CONTROL).await?;
    if let Some(row) = rows.first() {
        return Ok(row.get(0));
    }
    let rows = link.rows(INSERT_STORE, &[&layout::LAYOUT_VERSION, &Time(now())], CONTROL).await?;
    rows.first()
        .map(|row| row.get(0))
        .ok_or_else(|| Error::new(ErrorKind::Internal, "write", "the store's id", "no row came"))
}
