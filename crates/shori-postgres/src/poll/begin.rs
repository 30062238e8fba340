//! Where a poll stands: who still writes, which transaction reads, what it shows.

use shori_core::position::Micros;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::PostgresConfig;
use crate::catalog::Layout;
use crate::column_types::oid;
use crate::connect::{quoted, sql_error};
use crate::visibility::Visibility;

/// Who was writing just before a poll.
pub(super) struct Activity {
    pub time: Micros,
    /// When the oldest open transaction began that the role may know of.
    pub oldest: Option<Micros>,
    /// Whether it may know of all.
    pub is_all: bool,
    /// Whether there are prepared ones, of which nobody tells when they began.
    pub has_prepared: bool,
}

/// To be asked before the poll's snapshot is taken: whatever that does not show, and is not told here, begins later.
pub(super) async fn activity(client: &Client) -> Result<Activity> {
    let query = "
        select
            (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8,
            (
                select (extract(epoch from min(xact_start)) * 1000000)::int8
                from pg_catalog.pg_stat_activity
                where
                    datname = pg_catalog.current_database()
                    and pid <> pg_catalog.pg_backend_pid()
                    and backend_type is distinct from 'autovacuum worker'
            ),
            pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'usage'),
            exists (select from pg_catalog.pg_prepared_xacts)";
    let row = client.query_one(query, &[]).await.map_err(|cause| sql_error("look at", "open transactions", cause))?;
    Ok(Activity { time: row.get(0), oldest: row.get(1), is_all: row.get(2), has_prepared: row.get(3) })
}

pub(super) async fn clock(client: &Client) -> Result<Micros> {
    let query = "select (extract(epoch from pg_catalog.clock_timestamp()) * 1000000)::int8";
    let row = client.query_one(query, &[]).await.map_err(|cause| sql_error("read", "the server's clock", cause))?;
    Ok(row.get(0))
}

/// Begins the transaction that a poll reads in. Its snapshot is taken by the first query: by then, all tables are locked
/// against changes of their shape.
pub(super) async fn transaction(client: &Client, config: &PostgresConfig) -> Result<()> {
    let statements = format!(
        "begin isolation level repeatable read read only;
        set local statement_timeout = {};
        set local idle_in_transaction_session_timeout = 0;
        set local lock_timeout = {}",
        config.read_timeout.as_millis(),
        config.server.statement_timeout.as_millis()
    );
    client.batch_execute(&statements).await.map_err(|cause| sql_error("begin", "a poll", cause))
}

/// An error of kind `Unavailable` is of all tables.
pub(super) async fn lock(client: &Client, config: &PostgresConfig, table: &str) -> Result<()> {
    let name = format!("{}.{}", quoted(&config.schema), quoted(table));
    let statements = format!("savepoint poll; lock table {name} in access share mode; release savepoint poll");
    let Err(cause) = client.batch_execute(&statements).await else { return Ok(()) };
    let object = format!("table {}", config.qualified(table));
    let code = cause.code().cloned();
    if code.is_some() {
        back(client, "poll").await?;
    }
    if code == Some(SqlState::UNDEFINED_TABLE) || code == Some(SqlState::INVALID_SCHEMA_NAME) {
        let error = Error::new(ErrorKind::Schema, "poll", object, "it does not exist");
        return Err(error.with_remedy("correct its name, or the schema of the source"));
    }
    let error = sql_error("poll", &object, cause);
    if code != Some(SqlState::INSUFFICIENT_PRIVILEGE) {
        return Err(error);
    }
    let user = quoted(&config.server.user);
    Err(error.with_remedy(format!("run: grant select on {} to {user}", config.qualified(table))))
}

/// Undoes what failed since a savepoint, so that other tables can be read.
pub(super) async fn back(client: &Client, savepoint: &str) -> Result<()> {
    let statement = format!("rollback to savepoint {savepoint}");
    client.batch_execute(&statement).await.map_err(|cause| sql_error("go on with", "a poll", cause))
}

/// What the transaction shows, and the first id that was not given by then.
pub(super) async fn visibility(client: &Client) -> Result<(Visibility, u64)> {
    // The first id that any transaction may have is 3: its age is counted from the next one.
    let row = client.query_one("select pg_catalog.pg_current_snapshot()::text, pg_catalog.age('3'::xid)", &[]).await;
    let row = row.map_err(|cause| sql_error("look at", "the server's snapshot", cause))?;
    let visibility = Visibility::read(row.get(0))?;
    let given = visibility.whole_id(row.get::<_, i32>(1).cast_unsigned().wrapping_add(3));
    Ok((visibility, given))
}

/// The column by which a table is polled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Column {
    pub name: String,
    pub has_zone: bool,
    pub nullable: bool,
}

impl Column {
    pub fn of(config: &PostgresConfig, table: &crate::PostgresTable, layout: &Layout) -> Result<Self> {
        let refuse = |cause: String| {
            let object = format!("table {}", config.qualified(&table.name));
            Error::new(ErrorKind::Schema, "poll", object, cause)
                .with_remedy("name as changed_at the timestamp column that every insert and update sets")
        };
        let name = table.changed_at.as_ref().ok_or_else(|| refuse("it has no changed_at".into()))?;
        let column = layout.columns.iter().find(|column| column.name == *name);
        let column = column.ok_or_else(|| refuse(format!("it has no column {name}, which is its changed_at")))?;
        if column.as_text {
            return Err(refuse(format!("column {name}, its changed_at, is configured as text")));
        }
        match column.resolved.oid {
            oid::TIMESTAMP | oid::TIMESTAMPTZ => Ok(Self {
                name: name.clone(),
                has_zone: column.resolved.oid == oid::TIMESTAMPTZ,
                nullable: column.nullable,
            }),
            _ => Err(refuse(format!("column {name}, its changed_at, is of type {}", column.resolved.name))),
        }
    }

    /// `time`, which is the column's own, as SQL.
    pub fn literal(&self, time: Micros) -> String {
        let epoch =
            if self.has_zone { "timestamptz '1970-01-01 00:00:00+00'" } else { "timestamp '1970-01-01 00:00:00'" };
        format!("({epoch} + interval '{time} microseconds')")
    }

    /// How far the column's own time is from UTC at a moment. Without a zone it is taken to be that of the database, as
    /// its sessions find it.
    pub async fn offset(&self, client: &Client, at: Micros) -> Result<Micros> {
        if self.has_zone {
            return Ok(0);
        }
        let query = "
            with moments as (
                select timestamptz '1970-01-01 00:00:00+00' + $1 * interval '1 microsecond' as at, reset_val as zone
                from pg_catalog.pg_settings
                where name = 'TimeZone'
            )
            select (extract(epoch from (at at time zone zone) - (at at time zone 'UTC')) * 1000000)::int8 from moments";
        let row = client.query_one(query, &[&(at as f64)]).await;
        Ok(row.map_err(|cause| sql_error("look at", "the time zone of the database", cause))?.get(0))
    }
}
