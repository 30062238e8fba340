//! What a PostgreSQL database holds: its tables under one snapshot, as the server prints them.
//!
//! Nothing keeps the changes between that moment and the one that projections stand at. So the tables are looked at
//! again once the projections are read: those that changed meanwhile cannot be compared.

use std::collections::{BTreeMap, BTreeSet};

use futures::TryStreamExt;
use rusqlite::types::ValueRef;
use shori_core::{Error, ErrorKind, Result};
use shori_postgres::{Server, Session};
use tokio::runtime::Runtime;
use tokio_postgres::types::PgLsn;

use super::scratch::Scratch;
use super::serving::Checkpoint;
use super::source::{catch_up_first, no_changes, used_tables};
use super::values::Loader;
use super::{TableInput, VerifyInput};

/// Where the tables are, and what Shori reads their changes by.
#[derive(Clone, Debug)]
pub struct PostgresPlace {
    pub server: Server,
    pub schema: String,
    pub read_by: ReadBy,
}

/// What changes are found by.
#[derive(Clone, Debug)]
pub enum ReadBy {
    Slot {
        publication: String,
        slot: String,
    },
    /// The timestamp column of each table.
    Timestamps(BTreeMap<String, String>),
}

pub(super) struct PostgresSource {
    runtime: Runtime,
    session: Session,
    place: PostgresPlace,
    /// Above the newest commit that the copies show.
    pub head: u64,
    /// What each table's rows come to, under the snapshot of the copies.
    sums: BTreeMap<String, String>,
    moved: BTreeSet<String>,
    misfits: BTreeMap<String, u64>,
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn fail(object: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Error {
    let object = object.into();
    move |cause| {
        // The error's own text says no more than that the server answered with one.
        let told = cause.as_db_error().map_or_else(|| cause.to_string(), |told| told.message().to_string());
        Error::new(ErrorKind::Refused, "read", object, told)
    }
}

impl PostgresSource {
    pub(super) fn load(place: &PostgresPlace, input: &VerifyInput, scratch: &Scratch) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|cause| Error::new(ErrorKind::Internal, "start", "the async runtime", cause))?;
        let session = runtime.block_on(place.server.connect())?;
        let mut source = Self {
            runtime,
            session,
            place: place.clone(),
            head: 0,
            sums: BTreeMap::new(),
            moved: BTreeSet::new(),
            misfits: BTreeMap::new(),
        };
        source.begin()?;
        source.head = source.end()?;
        for table in used_tables(input)? {
            let misfits = source.load_table(scratch, table)?;
            source.misfits.insert(table.name.clone(), misfits);
            let sum = source.sum(table)?;
            source.sums.insert(table.name.clone(), sum);
        }
        source.execute("commit")?;
        Ok(source)
    }

    fn execute(&self, statement: &str) -> Result<()> {
        self.runtime.block_on(self.session.client.batch_execute(statement)).map_err(fail(self.place.server.name()))
    }

    /// The snapshot is that of the next statement.
    fn begin(&self) -> Result<()> {
        self.execute("set statement_timeout = 0; begin transaction isolation level repeatable read read only")
    }

    /// The newest place in the timeline: in the server's log, or in time.
    fn end(&self) -> Result<u64> {
        let query = "
            select
                pg_current_snapshot()::text,
                pg_current_wal_insert_lsn(),
                (extract(epoch from clock_timestamp()) * 1000000)::int8";
        let row = self.runtime.block_on(self.session.client.query_one(query, &[]));
        let row = row.map_err(fail("the end of the server's log"))?;
        Ok(match self.place.read_by {
            ReadBy::Slot { .. } => u64::from(row.get::<_, PgLsn>(1)).saturating_sub(1),
            ReadBy::Timestamps(_) => row.get::<_, i64>(2).unsigned_abs(),
        })
    }

    fn name(&self, table: &TableInput) -> String {
        format!("{}.{}", quoted(&self.place.schema), quoted(&table.name))
    }

    /// Returns how many rows cannot be carried.
    fn load_table(&self, scratch: &Scratch, table: &TableInput) -> Result<u64> {
        let column = |column: &super::ColumnInput| {
            let name = quoted(&column.name);
            match column.type_name.as_str() {
                "binary" => format!("encode({name}, 'hex')"),
                _ => format!("case when {name} is not null then format('%s', {name}) end"),
            }
        };
        let columns: Vec<String> = table.columns.iter().map(column).collect();
        let query = format!("select {} from {}", columns.join(", "), self.name(table));
        let loader = Loader::new(scratch, "base", &table.name, table.columns.clone(), &table.key, None)?;
        let mut loader = loader.keeping_keys();
        self.runtime.block_on(async {
            let none: [&str; 0] = [];
            let object = || format!("table {}", table.name);
            let rows = self.session.client.query_raw(&query, none).await.map_err(fail(object()))?;
            let mut rows = std::pin::pin!(rows);
            while let Some(row) = rows.try_next().await.map_err(fail(object()))? {
                let mut values = Vec::with_capacity(table.columns.len());
                for (index, column) in table.columns.iter().enumerate() {
                    let text: Option<&str> = row.try_get(index).map_err(fail(object()))?;
                    values.push(Printed::of(text, &column.type_name));
                }
                loader.push(|index| Ok(values[index].as_ref()))?;
            }
            Ok::<_, Error>(())
        })?;
        loader.finish()
    }

    /// What a table's rows come to, in any order.
    fn sum(&self, table: &TableInput) -> Result<String> {
        let query = format!(
            "select count(*)::text || ' ' || coalesce(sum(hashtextextended(t::text, 0)), 0)::text from {} as t",
            self.name(table)
        );
        let row = self.runtime.block_on(self.session.client.query_one(&query, &[]));
        Ok(row.map_err(fail(format!("table {}", table.name)))?.get(0))
    }

    /// Looks which tables have changed since they were copied.
    pub(super) fn look_again(&mut self, input: &VerifyInput, scratch: &Scratch) -> Result<()> {
        self.begin()?;
        for table in used_tables(input)? {
            no_changes(scratch, table)?;
            if self.sums.get(&table.name) != Some(&self.sum(table)?) {
                self.moved.insert(table.name.clone());
            }
        }
        self.execute("commit")
    }

    pub(super) fn must_reach(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        if let Some(table) = checkpoint.keys().find(|table| self.moved.contains(*table)) {
            let cause = "its rows changed while they were compared, and nothing tells how they stood before";
            return Err(Error::new(ErrorKind::Unavailable, "verify", format!("table {table}"), cause)
                .with_remedy("verify while nobody writes to it"));
        }
        match checkpoint.iter().min_by_key(|(_, read_to)| **read_to) {
            Some((table, read_to)) if *read_to < self.head && self.has_more(*read_to)? => Err(catch_up_first(table)),
            _ => Ok(()),
        }
    }

    fn has_more(&self, read_to: u64) -> Result<bool> {
        match &self.place.read_by {
            ReadBy::Slot { publication, slot } => Ok(self.has_commits_above(publication, slot, read_to)),
            ReadBy::Timestamps(columns) => {
                let mut columns = columns.iter().filter(|(table, _)| self.sums.contains_key(*table));
                columns
                    .try_fold(false, |has, (table, column)| Ok(has || self.has_changes_since(table, column, read_to)?))
            }
        }
    }

    /// Whether a table has rows that say to have changed between then and now. One without a zone is in that of the
    /// database.
    fn has_changes_since(&self, table: &str, column: &str, read_to: u64) -> Result<bool> {
        let column = quoted(column);
        let query = format!(
            "with zones as (select reset_val as zone from pg_settings where name = 'TimeZone')
            select exists (
                select
                from {}.{} as t, zones
                where
                    case pg_typeof(t.{column})::text
                        when 'timestamp without time zone' then t.{column}::timestamp at time zone zone
                        else t.{column}::timestamptz
                    end between timestamptz '1970-01-01 00:00:00+00' + $1 * interval '1 microsecond' and now()
            )",
            quoted(&self.place.schema),
            quoted(table)
        );
        let row = self.runtime.block_on(self.session.client.query_one(&query, &[&(read_to as f64)]));
        Ok(row.map_err(fail(format!("table {table}")))?.get(0))
    }

    /// Whether the slot has transactions that end above `read_to`; the server's log grows by itself, too. While the
    /// pipeline reads the slot it cannot be asked.
    fn has_commits_above(&self, publication: &str, slot: &str, read_to: u64) -> bool {
        const COMMIT: i32 = b'C' as i32;
        let query = "
            select exists (
                select
                from pg_logical_slot_peek_binary_changes(
                    $1, null, null, 'proto_version', '1', 'publication_names', $2
                )
                where get_byte(data, 0) = $3 and lsn > $4
            )";
        let publication = quoted(publication);
        let above = PgLsn::from(read_to.saturating_add(1));
        let client = &self.session.client;
        let asked = self.runtime.block_on(client.query_one(query, &[&slot, &publication, &COMMIT, &above]));
        match asked {
            Ok(row) => row.get(0),
            Err(error) => {
                tracing::debug!(%error, "whether the slot has more is not known");
                true
            }
        }
    }

    pub(super) fn misfits(&self, table: &str) -> u64 {
        self.misfits.get(table).copied().unwrap_or(0)
    }
}

/// A value as the server prints it, made a number or bytes where its column is of such.
enum Printed<'a> {
    Null,
    Integer(i64),
    Real(f64),
    Text(&'a str),
    Bytes(Vec<u8>),
}

impl<'a> Printed<'a> {
    fn of(text: Option<&'a str>, type_name: &str) -> Self {
        let Some(text) = text else { return Self::Null };
        let parsed = match type_name {
            "boolean" => Some(Self::Integer(i64::from(text == "t"))),
            "int16" | "int32" | "int64" => text.parse().ok().map(Self::Integer),
            "float32" => text.parse::<f32>().ok().map(|number| Self::Real(f64::from(number))),
            "float64" => text.parse().ok().map(Self::Real),
            "binary" => bytes_of(text).map(Self::Bytes),
            _ => None,
        };
        // What is no such number is text, which its column does not take.
        parsed.unwrap_or(Self::Text(text))
    }

    fn as_ref(&self) -> ValueRef<'_> {
        match self {
            Self::Null => ValueRef::Null,
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Real(number) => ValueRef::Real(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Bytes(bytes) => ValueRef::Blob(bytes),
        }
    }
}

fn bytes_of(hexadecimal: &str) -> Option<Vec<u8>> {
    let (pairs, odd) = hexadecimal.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    if odd.is_empty() { pairs.iter().map(byte).collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_prints_becomes_what_the_column_holds() {
        let of = |text, type_name| format!("{:?}", Printed::of(Some(text), type_name).as_ref());
        assert_eq!(of("t", "boolean"), of("1", "int64"));
        assert_eq!(of("f", "boolean"), of("0", "int64"));
        assert_eq!(of("0.1", "float32"), format!("{:?}", ValueRef::Real(f64::from(0.1_f32))));
        assert_eq!(of("00ff", "binary"), format!("{:?}", ValueRef::Blob(&[0, 255])));
        assert_eq!(of("1.20", "decimal(10,2)"), format!("{:?}", ValueRef::Text(b"1.20")));
        assert_eq!(of("x", "int64"), format!("{:?}", ValueRef::Text(b"x")));
        assert_eq!(bytes_of("0g"), None);
        assert_eq!(bytes_of("000"), None);
    }
}
