//! Run records: one row per run of a pipeline, closed even after a crash.
//!
//! While a run is alive, a connection of its own holds an advisory lock that its record is named by. When the process
//! ends, however it does, the server ends the connection and the lock with it: a record whose lock is free has no owner.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use shori_core::store::{RunRecord, RunStatus};
use shori_core::{Error, ErrorKind, Result};

use super::session::{Link, Links, Time, lock_name, now};

const RUNS: &str = "pipeline_metadata";
/// How often the lock of an open record is asked for: a server takes a moment to see that a process has ended.
const LEASE_TRIES: u32 = 10;
const LEASE_PAUSE: Duration = Duration::from_millis(50);

/// A machine that is gone lets its connection stand; the server asks for it this often.
const LEASE_SETTINGS: &str = "
set statement_timeout = 0;
set tcp_keepalives_idle = 30;
set tcp_keepalives_interval = 10;
set tcp_keepalives_count = 3";

const SELECT_OPEN: &str = "
select run_id
from pipeline_metadata
where pipeline_name = $1 and run_id <> $2 and status = 'running'";

const CLOSE: &str = "
update pipeline_metadata
set end_time = $1, status = 'failed', error_message = 'the process ended without closing this run'
where pipeline_name = $2 and run_id = $3 and status = 'running'";

const PUT_RUN: &str = "
insert into pipeline_metadata
    (pipeline_name, run_id, start_time, end_time, status, records_processed, records_successful, records_failed,
     error_message, performance_metrics)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
on conflict (pipeline_name, run_id) do update
set start_time = excluded.start_time, end_time = excluded.end_time, status = excluded.status,
    records_processed = excluded.records_processed, records_successful = excluded.records_successful,
    records_failed = excluded.records_failed, error_message = excluded.error_message,
    performance_metrics = excluded.performance_metrics";

/// The leases of this process's runs, by the names of their locks.
#[derive(Default)]
pub(super) struct Leases(Mutex<HashMap<String, Link>>);

impl Leases {
    /// Whether the lease is held by a connection that stands.
    fn is_held(&self, lock: &str) -> bool {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(lock).is_some_and(|link| !link.is_closed())
    }

    async fn take(&self, links: &Links, lock: String, run: &RunRecord) -> Result<()> {
        if self.is_held(&lock) {
            return Ok(());
        }
        self.give_up(&lock);
        let link = links.connect().await?;
        link.run(LEASE_SETTINGS, RUNS).await?;
        if !try_lock(&link, &lock, "pg_try_advisory_lock").await? {
            let cause = "another process that is alive has a run of that id";
            return Err(Error::new(ErrorKind::InUse, "open", format!("run {}", run.run_id), cause)
                .with_remedy("start the pipeline again"));
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(lock, link);
        Ok(())
    }

    fn give_up(&self, lock: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(lock);
    }
}

fn lock_of(links: &Links, pipeline: &str, run_id: &str) -> String {
    lock_name(&links.schema, &format!("run {pipeline} {run_id}"))
}

/// Asks a few times. `function` holds the lock for the session, or for the transaction.
async fn try_lock(link: &Link, lock: &str, function: &str) -> Result<bool> {
    let sql = format!("select {function}(hashtextextended({lock}, 0))");
    for _ in 0..LEASE_TRIES {
        let rows = link.rows_of(&sql, &[], RUNS).await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(true);
        }
        tokio::time::sleep(LEASE_PAUSE).await;
    }
    Ok(false)
}

pub(super) async fn start(links: &Links, leases: &Leases, run: &RunRecord) -> Result<()> {
    leases.take(links, lock_of(links, &run.pipeline, &run.run_id), run).await?;
    let link = links.begin(RUNS).await?;
    let started = async {
        for row in link.rows(SELECT_OPEN, &[&run.pipeline, &run.run_id], RUNS).await? {
            let left: String = row.get(0);
            let lock = lock_of(links, &run.pipeline, &left);
            if !leases.is_held(&lock) && try_lock(&link, &lock, "pg_try_advisory_xact_lock").await? {
                link.execute(CLOSE, &[&Time(now()), &run.pipeline, &left], RUNS).await?;
            }
        }
        put(&link, run).await
    };
    let started = started.await;
    links.end(link, RUNS, started).await
}

pub(super) async fn update(links: &Links, leases: &Leases, run: &RunRecord) -> Result<()> {
    debug_assert!(run.ended.is_none() || run.status != RunStatus::Running);
    let lock = lock_of(links, &run.pipeline, &run.run_id);
    if run.ended.is_none() {
        // The server may have been started anew since.
        leases.take(links, lock, run).await?;
        return write(links, run).await;
    }
    write(links, run).await?;
    leases.give_up(&lock);
    Ok(())
}

async fn write(links: &Links, run: &RunRecord) -> Result<()> {
    let link = links.begin(RUNS).await?;
    let put = put(&link, run).await;
    links.end(link, RUNS, put).await
}

async fn put(link: &Link, run: &RunRecord) -> Result<()> {
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let status = run.status.name();
    link.execute(
        PUT_RUN,
        &[
            &run.pipeline,
            &run.run_id,
            &Time(run.started),
            &run.ended.map(Time),
            &status,
            &count(run.records_processed),
            &count(run.records_successful),
            &count(run.records_failed),
            &run.error,
            &run.metrics,
        ],
        RUNS,
    )
    .await
    .map(drop)
}
