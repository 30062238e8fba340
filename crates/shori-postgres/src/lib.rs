//! PostgreSQL as a source, by logical replication (`pgoutput`) or by polling a timestamp column, and as a store (see
//! [`store`]).
//!
//! # Constraints of the source
//!
//! - Nothing is needed on the source but a publication and a slot, of PostgreSQL 14 or newer. What the server may forget
//!   it is told only after it is in the log (contract 5).
//! - Any bytes end in a value or an error, and what is allocated is bounded by the bytes that came: servers, proxies
//!   and networks fail in the middle of a message.
//! - A value is carried exactly, or refused: nothing is coerced or rounded. A value read as text and the same value
//!   read as binary are one.
//! - Transactions are sent when they are committed, whole: the server keeps large ones on its own disk until then
//!   (`logical_decoding_work_mem`), and nothing of one that is rolled back is sent.
//!
//! # Layout
//!
//! `message` decodes what the `pgoutput` plugin sends. `column_types` says what a column is carried as, and
//! `column_builder` turns values into Arrow: `numeric`, `date_time` and `plain_values` read both formats of each type.
//! `positions` holds the stored encoding of positions.
//!
//! `connect` makes connections and `replication` reads one; `setup` and `catalog` ask the server what it is and has.
//! `start` finds where reading goes on, `stream` places row images and gathers them into a `batch`, `snapshot` reads
//! tables whole, `generated` has columns computed that are not sent, `copied` cuts what is copied out into rows, and `source` joins
//! them under the contract of [`shori_core::source::Source`]. `visibility` tells which
//! transactions a snapshot shows. `poll` is the other source, for servers that give no slot. `look` is for verbs that do
//! not read.

mod batch;
mod catalog;
pub mod column_builder;
pub mod column_types;
mod connect;
mod copied;
mod date_time;
mod generated;
mod look;
pub mod message;
mod numeric;
mod plain_values;
mod poll;
pub mod positions;
mod reader;
mod replication;
mod setup;
mod snapshot;
mod source;
mod start;
pub mod store;
mod stream;
mod visibility;

use std::collections::BTreeMap;
use std::time::Duration;

pub use connect::{Server, Session, Tls, sql_error};
pub use look::{Inspected, execute, inspect, install, log_bytes_above, sample};
pub use poll::PollSource;
pub use source::PostgresSource;
pub use store::PostgresStore;

/// What to capture, and how.
#[derive(Clone, Debug)]
pub struct PostgresConfig {
    pub server: Server,
    /// The timeline's name, and the source's in capture ids.
    pub source_name: String,
    /// The database schema that the tables are in.
    pub schema: String,
    pub tables: Vec<PostgresTable>,
    pub publication: String,
    pub slot: String,
    /// Whether publication and slot are made, and made whole, where they are missing; else they are used as found.
    pub manage: bool,
    /// Most rows that one snapshot chunk holds.
    pub snapshot_chunk_rows: usize,
    /// How long a statement may take that may read a table whole; after as long without an answer, the server is given up.
    pub read_timeout: Duration,
    /// If given, tables are polled by a timestamp column: publication and slot are not used.
    pub polls: Option<Polls>,
}

/// [`PostgresConfig::read_timeout`] where nobody says otherwise: a table that no index helps to look through may be large.
pub const READ_TIMEOUT: Duration = Duration::from_secs(3600);

/// How tables are polled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Polls {
    /// From the beginning of one poll to that of the next.
    pub every: Duration,
    /// How far before a poll the next one looks, beyond what is known of open transactions.
    pub overlap: Duration,
}

impl Default for Polls {
    fn default() -> Self {
        Self { every: Duration::from_secs(10), overlap: Duration::from_secs(60) }
    }
}

impl PostgresConfig {
    /// A table's name with its schema, for SQL and for messages.
    pub(crate) fn qualified(&self, table: &str) -> String {
        let plain = |name: &str| {
            let mut letters = name.chars();
            letters.next().is_some_and(|first| first.is_ascii_lowercase() || first == '_')
                && letters.all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
        };
        let shown = |name: &str| if plain(name) { name.to_string() } else { connect::quoted(name) };
        format!("{}.{}", shown(&self.schema), shown(table))
    }
}

/// A captured table.
#[derive(Clone, Debug, Default)]
pub struct PostgresTable {
    pub name: String,
    /// `text` by column, for those that are carried as the server prints them.
    pub columns: BTreeMap<String, String>,
    /// Of polled tables: the timestamp column that every insert and update sets.
    pub changed_at: Option<String>,
}
