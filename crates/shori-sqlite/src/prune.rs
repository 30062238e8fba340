//! Letting go of change rows that are in the log.
//!
//! The newest row always stays: after a statement that ended by `or fail`, `sqlite_sequence` lags behind the rows, and
//! only the newest row keeps its id from being given again.

use std::time::Duration;

use rusqlite::{TransactionBehavior, params};
use shori_core::Result;

use crate::connection::{Database, is_busy};
use crate::install::BEFORE;
use crate::triggers::NOW;

/// Change rows deleted in one transaction: bounds how long the application waits for the lock.
const DELETE_MAX_ROWS: u32 = 5_000;

/// Transactions of one pruning.
const DELETES_MAX: usize = 100;

/// The last of the oldest rows, all of which are acknowledged and old enough.
const PRUNABLE: &str = "
with oldest as materialized (
    select id, at_us from _shori_changes
    where id <= ?1 and id < (select max(id) from _shori_changes)
    order by id limit ?2
)
select ifnull((select min(id) - 1 from oldest where at_us > ?3), (select max(id) from oldest))
";

/// Only a lost change is a gap: a before image may go ahead of its own.
const REMEMBER: &str = "
update _shori_captures
set pruned_to = pruned.id
from (select capture, max(id) as id from _shori_changes where id <= ?1 and op <> ?2 group by capture) as pruned
where pruned.capture = number and pruned.id > pruned_to
";

/// Deletes change rows at or below `acknowledged` that are older than `keep`. Returns their number. When another
/// connection writes, the rest waits for the next time.
pub(crate) fn prune(
    database: &mut Database,
    acknowledged: i64,
    keep: Duration,
    busy_timeout: Duration,
) -> Result<usize> {
    let fail = database.fail("prune changes of");
    database.connection.busy_timeout(Duration::ZERO).map_err(&fail)?;
    let pruned = delete(database, acknowledged, keep);
    database.connection.busy_timeout(busy_timeout).map_err(&fail)?;
    match pruned {
        Err(cause) if is_busy(&cause) => Ok(0),
        pruned => pruned.map_err(&fail),
    }
}

fn delete(database: &mut Database, acknowledged: i64, keep: Duration) -> rusqlite::Result<usize> {
    let now: i64 = database.connection.query_row(&format!("select {NOW}"), [], |row| row.get(0))?;
    let younger_than = now.saturating_sub(i64::try_from(keep.as_micros()).unwrap_or(i64::MAX));
    let mut deleted = 0;
    for _ in 0..DELETES_MAX {
        let transaction = database.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let up_to: Option<i64> = transaction
            .prepare_cached(PRUNABLE)?
            .query_row(params![acknowledged, DELETE_MAX_ROWS, younger_than], |row| row.get(0))?;
        let Some(up_to) = up_to else { break };
        transaction.prepare_cached(REMEMBER)?.execute([up_to, BEFORE])?;
        let rows = transaction.prepare_cached("delete from _shori_changes where id <= ?1")?.execute([up_to])?;
        transaction.commit()?;
        deleted += rows;
        if rows < DELETE_MAX_ROWS as usize {
            break;
        }
    }
    Ok(deleted)
}
