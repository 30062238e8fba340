//! Run records: one row per run of a pipeline, closed even after a crash.

use duckdb::types::Value;
use shori_core::Result;
use shori_core::store::{RunRecord, RunStatus};

use super::session::{Session, now, text, time};

const RUNS: &str = "pipeline_metadata";

const CLOSE_STALE: &str = "
update pipeline_metadata
set end_time = ?, status = 'failed', error_message = 'the process ended without closing this run'
where pipeline_name = ? and run_id <> ? and status = 'running'";

const INSERT_RUN: &str = "
insert into pipeline_metadata
    (start_time, end_time, status, records_processed, records_successful, records_failed, error_message,
     performance_metrics, pipeline_name, run_id)
values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

const UPDATE_RUN: &str = "
update pipeline_metadata
set start_time = ?, end_time = ?, status = ?, records_processed = ?, records_successful = ?, records_failed = ?,
    error_message = ?, performance_metrics = ?
where pipeline_name = ? and run_id = ?";

fn values(run: &RunRecord) -> [Value; 10] {
    let count = |number: u64| Value::BigInt(i64::try_from(number).unwrap_or(i64::MAX));
    [
        time(run.started),
        run.ended.map_or(Value::Null, time),
        text(run.status.name()),
        count(run.records_processed),
        count(run.records_successful),
        count(run.records_failed),
        run.error.as_deref().map_or(Value::Null, text),
        text(&run.metrics),
        text(&run.pipeline),
        text(&run.run_id),
    ]
}

/// A DuckDB file admits one process, so any other run that is open has no owner any more.
pub(super) fn start(session: &Session, run: &RunRecord) -> Result<()> {
    session.transaction(RUNS, |session| {
        session.execute(CLOSE_STALE, &[time(now()), text(&run.pipeline), text(&run.run_id)], RUNS)?;
        put(session, run)
    })
}

pub(super) fn update(session: &Session, run: &RunRecord) -> Result<()> {
    debug_assert!(run.ended.is_none() || run.status != RunStatus::Running);
    session.transaction(RUNS, |session| put(session, run))
}

fn put(session: &Session, run: &RunRecord) -> Result<()> {
    if session.execute(UPDATE_RUN, &values(run), RUNS)? == 0 {
        session.execute(INSERT_RUN, &values(run), RUNS)?;
    }
    Ok(())
}
