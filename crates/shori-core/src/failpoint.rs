//! Named places between two durable writes, where a test may end the process.
//!
//! In a run without a hook, a place costs one atomic load.

use std::sync::OnceLock;

/// A batch was read; nothing is durable yet.
pub const INGEST_BEFORE_APPEND: &str = "ingest.before_append";
/// The batch is in the log; the source does not know.
pub const INGEST_AFTER_APPEND: &str = "ingest.after_append";
/// The source has let go of the batch.
pub const INGEST_AFTER_ACKNOWLEDGE: &str = "ingest.after_acknowledge";
/// A snapshot was asked for and is stored as wanted.
pub const INGEST_AFTER_REQUEST: &str = "ingest.after_snapshot_request";
/// The log is ahead; state does not know.
pub const PROJECT_BEFORE_ADVANCE: &str = "project.before_advance";
/// State has moved; no output is computed.
pub const PROJECT_AFTER_ADVANCE: &str = "project.after_advance";
/// An output is computed and kept; its store does not know.
pub const PROJECT_BEFORE_COMMIT: &str = "project.before_commit";
/// The store has committed; the cache has not.
pub const PROJECT_AFTER_COMMIT: &str = "project.store_committed_cache_not";
/// Store and cache agree.
pub const PROJECT_AFTER_SETTLE: &str = "project.after_settle";
/// Changes consumed by all are forgotten.
pub const PROJECT_AFTER_FORGET: &str = "project.after_forget";
/// One capture's log is compacted, the next one's is not.
pub const COMPACT_BETWEEN: &str = "compact.between_captures";
/// Part of an append is written, nothing is committed.
pub const STORE_INSIDE_APPEND: &str = "store.inside_append";
/// Rows of an output are written, its checkpoint is not, nothing is committed.
pub const STORE_INSIDE_OUTPUT: &str = "store.inside_output";
/// Part of what waits beside a large target is folded into it, nothing is committed.
pub const STORE_INSIDE_FOLD: &str = "store.inside_fold";
/// State's rows are written, its position is not, nothing is committed.
pub const TRANSFORM_INSIDE_ADVANCE: &str = "transform.inside_advance";
/// Part of a settled result is written, nothing is committed.
pub const TRANSFORM_INSIDE_SETTLE: &str = "transform.inside_settle";
/// A range of a change log is written, and no file of it is visible.
pub const EXPORT_BEFORE_PUBLISH: &str = "export.before_publish";
/// One file of a change log has become visible, the next one is not.
pub const EXPORT_AFTER_FILE: &str = "export.after_file";

/// Every place that a pipeline passes.
pub const ALL: &[&str] = &[
    INGEST_BEFORE_APPEND,
    INGEST_AFTER_APPEND,
    INGEST_AFTER_ACKNOWLEDGE,
    INGEST_AFTER_REQUEST,
    PROJECT_BEFORE_ADVANCE,
    PROJECT_AFTER_ADVANCE,
    PROJECT_BEFORE_COMMIT,
    PROJECT_AFTER_COMMIT,
    PROJECT_AFTER_SETTLE,
    PROJECT_AFTER_FORGET,
    COMPACT_BETWEEN,
    STORE_INSIDE_APPEND,
    STORE_INSIDE_OUTPUT,
    STORE_INSIDE_FOLD,
    TRANSFORM_INSIDE_ADVANCE,
    TRANSFORM_INSIDE_SETTLE,
];

/// Those of what only reads a pipeline's log.
pub const OF_EXPORT: &[&str] = &[EXPORT_BEFORE_PUBLISH, EXPORT_AFTER_FILE];

static HOOK: OnceLock<fn(&'static str)> = OnceLock::new();

/// Sets what happens at every place, once in a process; later calls change nothing.
pub fn set_hook(hook: fn(&'static str)) {
    HOOK.get_or_init(|| hook);
}

/// Whether anything happens at a place: the process is one of a test, with as little data as tests have.
pub fn is_armed() -> bool {
    HOOK.get().is_some()
}

/// Marks a place.
pub fn reached(place: &'static str) {
    if let Some(hook) = HOOK.get() {
        hook(place);
    }
}
