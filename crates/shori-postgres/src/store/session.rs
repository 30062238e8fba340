//! Connections of a store: one for each call under way, kept for the next.
//!
//! A call whose future is dropped takes its connection with it: the server rolls back what was not committed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};
use shori_core::position::{Micros, Position};
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};
use tokio_postgres::{Client, Row, SimpleQueryMessage, Statement};

use crate::connect::{Server, Session, literal, quoted, sql_error};
use crate::message::POSTGRES_EPOCH_MICROS;

/// Connections kept open without a call.
const IDLE_CONNECTIONS_MAX: usize = 4;

/// What a session of the store needs beside the settings of every session. A commit is durable when it returns, whatever
/// the server's default; the server notices within a second when a client that waits for it is gone, where it can.
const SETTINGS: &str = "
set standard_conforming_strings = on;
set client_min_messages = warning;
set idle_in_transaction_session_timeout = 0;
set jit = off;
select set_config('synchronous_commit', 'on', false)
where current_setting('synchronous_commit') = 'off';
do $$
begin
    perform set_config('client_connection_check_interval', '1000', false);
exception when others then null;
end $$;";

/// A store's way to its schema.
pub(super) struct Links {
    server: Server,
    pub schema: String,
    idle: Mutex<Vec<Link>>,
}

/// One connection, for one call at a time.
pub(super) struct Link {
    session: Session,
    statements: Mutex<HashMap<&'static str, Statement>>,
}

pub(super) type Values<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Links {
    pub fn new(server: Server, schema: String) -> Self {
        Self { server, schema, idle: Mutex::new(Vec::new()) }
    }

    /// A connection that nobody else uses; most have been used before.
    pub async fn take(&self) -> Result<Link> {
        match self.pop_idle() {
            Some(link) => Ok(link),
            None => self.connect().await,
        }
    }

    fn pop_idle(&self) -> Option<Link> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|link| !link.session.client.is_closed());
        idle.pop()
    }

    pub async fn connect(&self) -> Result<Link> {
        let session = self.server.connect().await?;
        let settings = format!("set search_path = {};{SETTINGS}", quoted(&self.schema));
        session.client.batch_execute(&settings).await.map_err(self.server.fail("set up a session of"))?;
        Ok(Link { session, statements: Mutex::default() })
    }

    /// Only outside of a transaction.
    pub fn give_back(&self, link: Link) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push(link);
        }
    }

    /// Begins a transaction; [`end`](Links::end) ends it.
    pub async fn begin(&self, object: &str) -> Result<Link> {
        const BEGIN: &str = "begin isolation level read committed";
        if let Some(link) = self.pop_idle() {
            // It may be from before the server's last start.
            if link.run(BEGIN, object).await.is_ok() {
                return Ok(link);
            }
        }
        let link = self.connect().await?;
        link.run(BEGIN, object).await?;
        Ok(link)
    }

    /// Commits, or rolls back where there is an error.
    pub async fn end<T>(&self, link: Link, object: &str, result: Result<T>) -> Result<T> {
        let closing = if result.is_ok() { "commit" } else { "rollback" };
        let closed = link.run(closing, object).await;
        match (result, closed) {
            (Ok(done), Ok(_)) => {
                self.give_back(link);
                Ok(done)
            }
            (Ok(_), Err(error)) => Err(error),
            (Err(error), closed) => {
                if closed.is_ok() {
                    self.give_back(link);
                }
                Err(error)
            }
        }
    }
}

impl Link {
    pub fn client(&self) -> &Client {
        &self.session.client
    }

    pub fn is_closed(&self) -> bool {
        self.session.client.is_closed()
    }

    /// Statements without values, one after the other. Returns the rows that the last one touched.
    pub async fn run(&self, sql: &str, object: &str) -> Result<u64> {
        let messages = self.client().simple_query(sql).await.map_err(|cause| failed("write", object, cause))?;
        let touched = messages.iter().rev().find_map(|message| match message {
            SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
            _ => None,
        });
        Ok(touched.unwrap_or(0))
    }

    /// Rows that a statement gives which is prepared once for the connection.
    pub async fn rows(&self, sql: &'static str, values: Values<'_>, object: &str) -> Result<Vec<Row>> {
        let fail = |cause| failed("read", object, cause);
        let statement = self.prepared(sql).await.map_err(fail)?;
        self.client().query(&statement, values).await.map_err(fail)
    }

    pub async fn execute(&self, sql: &'static str, values: Values<'_>, object: &str) -> Result<u64> {
        let fail = |cause| failed("write", object, cause);
        let statement = self.prepared(sql).await.map_err(fail)?;
        self.client().execute(&statement, values).await.map_err(fail)
    }

    /// Rows of a statement that is made for this call.
    pub async fn rows_of(&self, sql: &str, values: Values<'_>, object: &str) -> Result<Vec<Row>> {
        self.client().query(sql, values).await.map_err(|cause| failed("read", object, cause))
    }

    /// Runs a statement that is made for this call.
    pub async fn execute_of(&self, sql: &str, values: Values<'_>, object: &str) -> Result<u64> {
        self.client().execute(sql, values).await.map_err(|cause| failed("write", object, cause))
    }

    /// The number that `sql` gives.
    pub async fn number(&self, sql: &str, object: &str) -> Result<i64> {
        let rows = self.rows_of(sql, &[], object).await?;
        rows.first().map(|row| row.get(0)).ok_or_else(|| Error::new(ErrorKind::Internal, "read", object, "no row came"))
    }

    async fn prepared(&self, sql: &'static str) -> Result<Statement, tokio_postgres::Error> {
        let known = self.statements.lock().unwrap_or_else(PoisonError::into_inner).get(sql).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.client().prepare(sql).await?;
        self.statements.lock().unwrap_or_else(PoisonError::into_inner).insert(sql, statement.clone());
        Ok(statement)
    }
}

/// `operation` on `object` failed in the server, or on the way.
pub(super) fn failed(operation: &str, object: &str, cause: tokio_postgres::Error) -> Error {
    let code = cause.code().map(|code| code.code().to_string()).unwrap_or_default();
    let (kind, remedy) = match code.as_str() {
        // Whoever keeps the server makes room, and need not know of Shori: it is waited for, whether the server goes on or
        // has ended for want of space for its own log.
        "53100" => (ErrorKind::Unavailable, Some("free space where the server keeps its data")),
        // A key that comes twice in one output, or that stands already where it must not.
        "21000" | "23505" => (ErrorKind::Internal, None),
        "2BP01" => (ErrorKind::Schema, Some("drop what depends on it, and create it again when the pipeline runs")),
        // A value longer than an index takes, a table with too many columns.
        code if code.starts_with("54") => (ErrorKind::Data, Some("leave the column out, or out of the key")),
        code if code.starts_with("22") => (ErrorKind::Data, None),
        _ => return sql_error(operation, object, cause),
    };
    let told = match cause.as_db_error() {
        Some(told) => [Some(told.message()), told.detail(), told.where_()].into_iter().flatten().collect::<Vec<_>>(),
        None => Vec::new(),
    };
    let error = Error::new(kind, operation, object, told.join("; "));
    match remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    }
}

pub(super) fn now() -> Micros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// A `timestamp` without a zone, in UTC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Time(pub Micros);

impl ToSql for Time {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.put_i64(self.0.saturating_sub(POSTGRES_EPOCH_MICROS));
        Ok(IsNull::No)
    }

    accepts!(TIMESTAMP);
    to_sql_checked!();
}

impl<'a> FromSql<'a> for Time {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?).saturating_add(POSTGRES_EPOCH_MICROS)))
    }

    accepts!(TIMESTAMP);
}

/// A position that a row holds in two columns.
pub(super) fn get_position(row: &Row, index: usize) -> Result<Position> {
    Position::from_slices(row.get(index), row.get(index + 1))
}

/// Bytes as a constant in a statement that takes no values.
pub(super) fn bytes_literal(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("'\\x{digits}'::bytea")
}

/// `position > bound` over two columns.
pub(super) fn above(lsn: &str, seqval: &str, bound: &Position) -> String {
    compared(lsn, seqval, ">", bound)
}

pub(super) fn at_or_below(lsn: &str, seqval: &str, bound: &Position) -> String {
    compared(lsn, seqval, "<=", bound)
}

pub(super) fn at_or_above(lsn: &str, seqval: &str, bound: &Position) -> String {
    compared(lsn, seqval, ">=", bound)
}

fn compared(lsn: &str, seqval: &str, operator: &str, bound: &Position) -> String {
    let [at_lsn, at_seq] = [bound.lsn, bound.seq].map(|key| bytes_literal(key.as_slice()));
    format!("(({lsn}, {seqval}) {operator} ({at_lsn}, {at_seq}))")
}

/// A name that a lock of this store has, whatever else the database holds.
pub(super) fn lock_name(schema: &str, name: &str) -> String {
    literal(&format!("shori {schema}.{name}"))
}

/// `text` as a column takes it: a message may hold any character, PostgreSQL has no place for NUL.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
