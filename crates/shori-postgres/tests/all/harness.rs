//! A captured database, and a reader of it that keeps what a log would.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{DataType, Field};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::source::{BatchLimit, Resume, SnapshotProgress, SnapshotState, Source, SourceBatch};
use shori_core::testing::memory_log::{LogRow, log_rows};
use shori_core::testing::value::{Row, Value};
use shori_core::{Error, Result};
use shori_postgres::{
    PollSource, Polls, PostgresConfig, PostgresSource, PostgresTable, READ_TIMEOUT, Server as Address, Tls,
};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::replay::Replay;
use crate::server::Server;

pub const LIMIT: BatchLimit = BatchLimit { rows: 1000, bytes: 1 << 20 };
/// Reading that is not at its end after so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// A row as the server prints it.
pub type Printed = Vec<Option<String>>;

pub fn address(server: &Server, database: &str) -> Address {
    Address {
        host: "127.0.0.1".into(),
        port: server.port(),
        database: database.into(),
        user: "postgres".into(),
        password: None,
        tls: Tls::Off,
        connect_timeout: Duration::from_secs(10),
        statement_timeout: Duration::from_secs(30),
    }
}

pub fn config(server: &Server, database: &str, tables: &[&str]) -> PostgresConfig {
    PostgresConfig {
        server: address(server, database),
        source_name: "shop".into(),
        schema: "public".into(),
        tables: tables.iter().map(|name| table(name)).collect(),
        publication: "shori".into(),
        // Slots are named for the server, not for the database.
        slot: format!("shori_{database}"),
        manage: true,
        snapshot_chunk_rows: 1000,
        read_timeout: READ_TIMEOUT,
        polls: None,
    }
}

/// Has all tables polled by `column`, as often as is asked; nothing but what is known of transactions makes a poll look
/// further back than to the last one.
pub fn polled(config: &mut PostgresConfig, column: &str) {
    config.polls = Some(Polls { every: Duration::ZERO, overlap: Duration::ZERO });
    config.tables.iter_mut().for_each(|table| table.changed_at = Some(column.into()));
}

pub fn table(name: &str) -> PostgresTable {
    PostgresTable { name: name.to_string(), ..PostgresTable::default() }
}

/// What a store holds.
#[derive(Clone, Default)]
pub struct Stored {
    pub known: BTreeMap<CaptureId, Resume>,
    pub log: BTreeMap<CaptureId, Vec<LogRow>>,
    /// Snapshots that have ended.
    pub ended: BTreeMap<CaptureId, Vec<SnapshotProgress>>,
    /// Captures that stand still, each with the reason.
    pub stopped: BTreeMap<CaptureId, String>,
}

/// Reads as an ingestor does.
pub struct Reader {
    pub config: PostgresConfig,
    pub client: Client,
    pub source: Option<Box<dyn Source>>,
    pub stored: Stored,
    pub watermark: Watermark,
    pub acknowledges: bool,
    /// Every place that was ever told to be between two commits.
    pub boundaries: BTreeSet<Position>,
    pub failed: Vec<(CaptureId, Error)>,
    pub rejected: Vec<(CaptureId, String)>,
    /// Images of the stream as they were first told: they are the same on every reading.
    told: BTreeMap<(CaptureId, Position), (Op, Row, Micros)>,
}

impl Reader {
    /// Over a fresh database of the shared server, with what `sql` makes in it.
    pub async fn fresh(sql: &str, tables: &[&str]) -> Self {
        let server = Server::shared();
        let database = server.create_database().await;
        Self::over(server, &database, sql, tables).await
    }

    pub async fn over(server: &Server, database: &str, sql: &str, tables: &[&str]) -> Self {
        let client = server.connect(database).await;
        client.batch_execute(sql).await.unwrap();
        Self {
            config: config(server, database, tables),
            client,
            source: None,
            stored: Stored::default(),
            watermark: Watermark::ZERO,
            acknowledges: true,
            boundaries: BTreeSet::new(),
            failed: Vec::new(),
            rejected: Vec::new(),
            told: BTreeMap::new(),
        }
    }

    pub async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|cause| panic!("{sql}: {cause:?}"));
    }

    pub fn capture(&self, table: &str) -> CaptureId {
        CaptureId::new(&self.config.source_name, table)
    }

    /// Starts a new source where the log stands.
    pub async fn start(&mut self) {
        self.try_start().await.unwrap();
    }

    pub async fn try_start(&mut self) -> Result<()> {
        self.source = None;
        self.source = Some(match self.config.polls {
            Some(_) => Box::new(PollSource::new(self.config.clone())),
            None => Box::new(PostgresSource::new(self.config.clone())),
        });
        self.start_again().await
    }

    /// Starts the source that there is.
    pub async fn start_again(&mut self) -> Result<()> {
        let furthest = self.stored.known.values().map(|known| known.watermark).max_by_key(|mark| mark.staged);
        let resume = self.stored.known.iter().map(|(id, known)| {
            let stands = self.stored.stopped.contains_key(id);
            let watermark = furthest.filter(|_| stands).unwrap_or(known.watermark);
            (id.clone(), Resume { watermark, ..known.clone() })
        });
        let resume = resume.collect();
        let started = self.source.as_mut().unwrap().start(&resume).await?;
        for capture in started.captures {
            let fresh = Resume {
                watermark: Watermark::ZERO,
                snapshot: SnapshotProgress::requested(1),
                schema: Some(capture.schema.clone()),
            };
            self.stored.known.entry(capture.id).or_insert(fresh).schema = Some(capture.schema);
        }
        for (id, error) in started.failed {
            self.stop(id, error);
        }
        self.watermark =
            self.active().map(|(_, known)| known.watermark).min_by_key(|mark| mark.staged).unwrap_or(Watermark::ZERO);
        Ok(())
    }

    fn active(&self) -> impl Iterator<Item = (&CaptureId, &Resume)> {
        self.stored.known.iter().filter(|(id, _)| !self.stored.stopped.contains_key(id))
    }

    fn stop(&mut self, id: CaptureId, error: Error) {
        self.stored.stopped.insert(id.clone(), error.to_string());
        self.failed.push((id, error));
    }

    /// What `shori resnapshot` does: the next start reads the table whole.
    pub fn resnapshot(&mut self, table: &str, retyped: bool) {
        let id = self.capture(table);
        let known = self.stored.known.get_mut(&id).unwrap();
        known.snapshot = SnapshotProgress::requested(known.snapshot.generation + 1);
        if retyped {
            known.schema = None;
        }
        self.stored.stopped.remove(&id);
    }

    pub async fn step(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let batch = self.source.as_mut().unwrap().next(limit).await?;
        let mark = batch.watermark;
        assert!(mark.boundary <= mark.staged && mark.staged >= self.watermark.staged, "{mark:?}");
        assert!(mark.boundary >= self.watermark.boundary, "{mark:?} is behind {:?}", self.watermark);
        assert!(batch.rows() <= limit.rows + 2, "{} rows, where {} are the limit", batch.rows(), limit.rows);
        let mut places = BTreeSet::new();
        for changes in &batch.changes {
            let id = &changes.capture;
            if self.stored.stopped.contains_key(id) {
                continue;
            }
            let staged = self.stored.known[id].watermark.staged;
            for row in log_rows(changes, 0).unwrap() {
                let at = row.position;
                assert!(at > self.watermark.staged && at <= mark.staged, "{at} is out of place: {mark:?}");
                assert!(places.insert(at), "{at} is there twice");
                if row.op != Op::Snapshot {
                    let is = (row.op, row.row.clone(), row.commit_time);
                    let was = self.told.entry((id.clone(), at)).or_insert_with(|| is.clone());
                    assert!(*was == is || !row.unchanged.is_empty(), "{at} was {was:?} and is {is:?}");
                }
                if at > staged {
                    let log = self.stored.log.entry(id.clone()).or_default();
                    assert!(log.last().is_none_or(|last| last.position < at), "{at} comes after a later one");
                    log.push(row.as_ref().clone());
                }
            }
        }
        for (id, error) in &batch.failed {
            self.stop(id.clone(), Error::repeated(error.kind(), error.to_string()));
        }
        for (id, progress) in &batch.snapshots {
            if self.stored.stopped.contains_key(id) {
                continue;
            }
            self.stored.known.get_mut(id).unwrap().snapshot = progress.clone();
            if progress.is_done() {
                assert!(progress.start < progress.end && progress.end <= mark.boundary, "{progress:?} at {mark:?}");
                self.stored.ended.entry(id.clone()).or_default().push(progress.clone());
            }
        }
        for info in &batch.schemas {
            self.stored.known.get_mut(&info.id).unwrap().schema = Some(info.schema.clone());
        }
        for (id, known) in &mut self.stored.known {
            if !self.stored.stopped.contains_key(id) {
                known.watermark = Watermark { staged: known.watermark.staged.max(mark.staged), ..mark };
            }
        }
        self.watermark = mark;
        self.boundaries.insert(mark.boundary);
        self.rejected.extend(batch.rejected.iter().map(|rejected| (rejected.capture.clone(), rejected.reason.clone())));
        if self.acknowledges {
            self.source.as_mut().unwrap().acknowledge(&mark.staged).await?;
        }
        Ok(batch)
    }

    /// Reads up to what is committed now; the batches that were read.
    pub async fn read(&mut self) -> Vec<ChangeBatch> {
        self.try_read(LIMIT).await.unwrap()
    }

    pub async fn try_read(&mut self, limit: BatchLimit) -> Result<Vec<ChangeBatch>> {
        let head = self.source.as_mut().unwrap().head().await?.boundary;
        let reading = async {
            let mut read = Vec::new();
            loop {
                let batch = self.step(limit).await?;
                read.extend(batch.changes);
                if !batch.more {
                    if self.watermark.boundary >= head && self.is_whole() {
                        return Ok(read);
                    }
                    self.source.as_mut().unwrap().wait(Duration::from_millis(100)).await?;
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("reading reaches what is committed")
    }

    /// Whether every table that does not stand still has been read whole: a chunk may wait for open transactions.
    fn is_whole(&self) -> bool {
        let mut known = self.stored.known.iter();
        known.all(|(id, known)| known.snapshot.is_done() || self.stored.stopped.contains_key(id))
    }

    /// Reads until `is_so`.
    pub async fn read_until(&mut self, what: &str, is_so: impl FnMut(&Self) -> bool) {
        self.read_until_with(LIMIT, what, is_so).await;
    }

    pub async fn read_until_with(&mut self, limit: BatchLimit, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let reading = async {
            while !is_so(self) {
                let more = self.step(limit).await.unwrap().more;
                if !more && !is_so(self) {
                    self.source.as_mut().unwrap().wait(Duration::from_millis(100)).await.unwrap();
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.unwrap_or_else(|_| panic!("waited until {what}"));
    }

    /// The error that reading ends with.
    pub async fn read_until_error(&mut self) -> Error {
        let reading = async {
            loop {
                match self.step(LIMIT).await {
                    Err(error) => return error,
                    Ok(batch) if batch.more => {}
                    // Where waiting fails, so does the next step.
                    Ok(_) => drop(self.source.as_mut().unwrap().wait(Duration::from_millis(100)).await),
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("reading fails")
    }

    pub fn snapshot(&self, table: &str) -> &SnapshotProgress {
        &self.stored.known[&self.capture(table)].snapshot
    }

    pub fn has_begun(&self, table: &str) -> bool {
        self.snapshot(table).state != SnapshotState::Requested
    }

    pub fn log(&self, table: &str) -> &[LogRow] {
        self.stored.log.get(&self.capture(table)).map_or(&[], Vec::as_slice)
    }

    /// Ops of a table's log, in order.
    pub fn ops(&self, table: &str) -> Vec<Op> {
        self.log(table).iter().map(|row| row.op).collect()
    }

    pub fn replay(&self, table: &str) -> Replay<'_> {
        let snapshots = self.stored.ended.get(&self.capture(table));
        Replay::new(self.log(table), snapshots.map_or(&[], Vec::as_slice))
    }

    /// What the log leaves of a table at a boundary, printed, in order.
    pub fn rows_at(&self, table: &str, boundary: &Position) -> Vec<Printed> {
        let mut replay = self.replay(table);
        replay.advance(boundary);
        let schema = self.stored.known[&self.capture(table)].schema.as_ref().unwrap();
        let mut rows: Vec<Printed> =
            replay.rows.values().map(|(_, row)| row.in_schema(schema).row.iter().map(printed).collect()).collect();
        rows.sort();
        rows
    }

    pub fn rows(&self, table: &str) -> Vec<Printed> {
        self.rows_at(table, &self.watermark.boundary)
    }

    /// The table as the source has it, in the columns of the capture.
    pub async fn source_rows(&self, table: &str) -> Vec<Printed> {
        let schema = self.stored.known[&self.capture(table)].schema.as_ref().unwrap();
        let column = |field: &Arc<Field>| match field.data_type() {
            // As `printed` has it.
            DataType::Timestamp(..) => {
                format!("'Time(' || (extract(epoch from \"{}\") * 1000000)::int8 || ')'", field.name())
            }
            DataType::Decimal128(_, scale) => {
                format!("'Decimal(' || (\"{}\" * 10 ^ {scale})::int8 || ')'", field.name())
            }
            _ => format!("\"{}\"", field.name()),
        };
        let columns: Vec<String> = schema.columns.fields().iter().map(column).collect();
        self.printed(&format!("select {} from {table}", columns.join(", "))).await
    }

    /// What a query answers, in order.
    pub async fn printed(&self, query: &str) -> Vec<Printed> {
        let answers = self.client.simple_query(query).await.unwrap();
        let rows = answers.iter().filter_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|index| row.get(index).map(String::from)).collect())
            }
            _ => None,
        });
        let mut rows: Vec<Printed> = rows.collect();
        rows.sort();
        rows
    }

    /// The log's newest images are the table's rows.
    pub async fn assert_equal(&self, table: &str) {
        let (is, should) = (self.rows(table), self.source_rows(table).await);
        let odd = |rows: &[Printed], others: &[Printed]| {
            let others: BTreeSet<&Printed> = others.iter().collect();
            let odd: Vec<&Printed> = rows.iter().filter(|row| !others.contains(row)).take(5).collect();
            format!("{odd:?}").chars().take(1000).collect::<String>()
        };
        let (extra, missing) = (odd(&is, &should), odd(&should, &is));
        let (snapshot, mark, stopped) = (self.snapshot(table), self.watermark, &self.stored.stopped);
        let log = self.log(table);
        let log = format!("{:?}", &log[log.len().saturating_sub(10)..]);
        assert!(
            is == should,
            "{table}: {} rows for {}; extra {extra}, missing {missing}, at {mark:?}, {snapshot:?}, stopped {stopped:?}, log {log}",
            is.len(),
            should.len()
        );
    }

    /// The only value of a query.
    pub async fn value(&self, query: &str) -> String {
        self.printed(query).await.pop().unwrap().pop().unwrap().unwrap()
    }

    /// Waits for the server to say that `query`, a condition, holds.
    pub async fn wait_for(&self, condition: &str) {
        let waiting = async {
            while self.value(&format!("select {condition}")).await != "t" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited until {condition}"));
    }
}

fn printed(value: &Value) -> Option<String> {
    Some(match value {
        Value::Null => return None,
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => text.to_string(),
        Value::Boolean(is) => if *is { "t" } else { "f" }.into(),
        other => format!("{other:?}"),
    })
}

/// Columns of the rows, `-` for null: `1,a 2,-`.
pub fn shown(rows: &[Printed]) -> String {
    let cell = |cell: &Option<String>| cell.clone().unwrap_or("-".into());
    let rows: Vec<String> = rows.iter().map(|row| row.iter().map(cell).collect::<Vec<_>>().join(",")).collect();
    rows.join(" ")
}
