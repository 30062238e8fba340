//! A captured database, and a reader of it that keeps what a log would.

use std::collections::BTreeMap;
use std::time::Duration;

use arrow::array::{Array, AsArray};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::source::{BatchLimit, Resume, SnapshotProgress, Source, SourceBatch};
use shori_core::testing::memory_log::{LogRow, log_rows};
use shori_core::{Error, Result};
use shori_postgres::{PostgresConfig, PostgresSource, PostgresTable, Server as Address, Tls};
use tokio_postgres::Client;

use crate::server::Server;

pub const LIMIT: BatchLimit = BatchLimit { rows: 1000, bytes: 1 << 20 };
/// Reading that brings nothing new for so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

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
        tables: tables
            .iter()
            .map(|name| PostgresTable { name: name.to_string(), ..PostgresTable::default() })
            .collect(),
        publication: "shori".into(),
        // Slots are named for the server, not for the database.
        slot: format!("shori_{database}"),
        manage: true,
        snapshot_chunk_rows: 1000,
    }
}

/// Reads as an ingestor does.
pub struct Reader {
    pub config: PostgresConfig,
    pub client: Client,
    pub source: Option<PostgresSource>,
    pub known: BTreeMap<CaptureId, Resume>,
    pub watermark: Watermark,
    pub log: BTreeMap<CaptureId, Vec<LogRow>>,
    pub failed: Vec<(CaptureId, Error)>,
    pub rejected: Vec<(CaptureId, String)>,
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
            known: BTreeMap::new(),
            watermark: Watermark::ZERO,
            log: BTreeMap::new(),
            failed: Vec::new(),
            rejected: Vec::new(),
        }
    }

    pub async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
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
        let mut source = PostgresSource::new(self.config.clone());
        let started = source.start(&self.known).await?;
        self.failed.extend(started.failed);
        for capture in started.captures {
            let fresh = Resume {
                watermark: Watermark::ZERO,
                snapshot: SnapshotProgress::requested(1),
                schema: Some(capture.schema.clone()),
            };
            self.known.entry(capture.id).or_insert(fresh).schema = Some(capture.schema);
        }
        for (id, _) in &self.failed {
            self.known.remove(id);
        }
        self.watermark = self.known.values().map(|known| known.watermark).min_by_key(|mark| mark.staged).unwrap();
        self.source = Some(source);
        Ok(())
    }

    pub async fn step(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let batch = self.source.as_mut().unwrap().next(limit).await?;
        let mark = batch.watermark;
        assert!(mark.boundary <= mark.staged && mark.staged >= self.watermark.staged, "{mark:?}");
        assert!(mark.boundary >= self.watermark.boundary, "{mark:?}");
        for changes in &batch.changes {
            for row in log_rows(changes, 0).unwrap() {
                assert!(
                    row.position > self.watermark.staged && row.position <= mark.staged,
                    "{} is out of place",
                    row.position
                );
                self.log.entry(changes.capture.clone()).or_default().push(row.as_ref().clone());
            }
        }
        for (id, progress) in &batch.snapshots {
            self.known.get_mut(id).unwrap().snapshot = progress.clone();
        }
        for info in &batch.schemas {
            self.known.get_mut(&info.id).unwrap().schema = Some(info.schema.clone());
        }
        for known in self.known.values_mut() {
            known.watermark = mark;
        }
        self.watermark = mark;
        self.rejected.extend(batch.rejected.iter().map(|rejected| (rejected.capture.clone(), rejected.reason.clone())));
        Ok(batch)
    }

    /// Reads and acknowledges up to what is committed now; the batches that were read.
    pub async fn read(&mut self) -> Vec<ChangeBatch> {
        self.try_read(LIMIT).await.unwrap()
    }

    pub async fn try_read(&mut self, limit: BatchLimit) -> Result<Vec<ChangeBatch>> {
        let head = self.source.as_mut().unwrap().head().await?.boundary;
        let reading = async {
            let mut read = Vec::new();
            loop {
                let batch = self.step(limit).await?;
                let (more, staged) = (batch.more, batch.watermark.staged);
                read.extend(batch.changes);
                for (id, error) in batch.failed {
                    self.known.remove(&id);
                    self.failed.push((id, error));
                }
                self.source.as_mut().unwrap().acknowledge(&staged).await?;
                if !more && self.watermark.boundary >= head {
                    return Ok(read);
                }
                if !more {
                    self.source.as_mut().unwrap().wait(Duration::from_millis(100)).await?;
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("reading reaches what is committed")
    }

    /// The newest image of each key, as text, with its columns in the table's order.
    pub fn rows(&self, table: &str) -> Vec<String> {
        self.rows_at(table, &self.watermark.boundary)
    }

    pub fn rows_at(&self, table: &str, boundary: &Position) -> Vec<String> {
        let snapshot = &self.known[&self.capture(table)].snapshot;
        let mut rows = BTreeMap::new();
        for row in self.log.get(&self.capture(table)).into_iter().flatten().filter(|row| row.position <= *boundary) {
            match row.op {
                Op::Truncate => rows.clear(),
                op if op.leaves_row() => {
                    let before: Option<&(Position, LogRow)> = rows.get(&row.key());
                    let mut whole = row.clone();
                    if !row.unchanged.is_empty() {
                        let before = before.unwrap_or_else(|| panic!("{row:?} lacks what no row before it has"));
                        let values = (0..row.row.len()).map(|index| match row.unchanged.contains(&index) {
                            true => before.1.row[index].clone(),
                            false => row.row[index].clone(),
                        });
                        whole.row = values.collect();
                    }
                    rows.insert(row.key(), (row.position, whole));
                }
                _ => drop(rows.remove(&row.key())),
            }
        }
        if snapshot.is_done() && snapshot.end <= *boundary {
            rows.retain(|_, (touched, _)| *touched > snapshot.start);
        }
        rows.values().map(|(_, row)| format!("{:?}", row.row)).collect()
    }

    /// Ops of a table's log, in order.
    pub fn ops(&self, table: &str) -> Vec<Op> {
        self.log.get(&self.capture(table)).into_iter().flatten().map(|row| row.op).collect()
    }

    /// How many rows the source's table has.
    pub async fn count(&self, query: &str) -> i64 {
        self.client.query_one(query, &[]).await.unwrap().get(0)
    }
}

/// Whole numbers of a column, over all batches.
pub fn numbers(batches: &[ChangeBatch], column: &str) -> Vec<i64> {
    let of = |batch: &ChangeBatch| {
        let index = batch.schema.columns.index_of(column).unwrap();
        let array = batch.columns[index].as_primitive::<arrow::datatypes::Int64Type>().clone();
        (0..array.len()).map(|row| array.value(row)).collect::<Vec<_>>()
    };
    batches.iter().flat_map(of).collect()
}
