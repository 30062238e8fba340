//! The [`Source`] over one SQLite file.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{BatchLimit, Head, Resume, Source, SourceBatch, Started};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::connection::Database;
use crate::cursor::{self, Cursor};
use crate::{SqliteConfig, positions, prune, stream};

/// Shortest and longest pause between two looks for foreign commits.
const POLL_MIN: Duration = Duration::from_millis(2);
const POLL_MAX: Duration = Duration::from_millis(20);

/// Reads a SQLite file's change table. See the crate's documentation for what it can and cannot see.
pub struct SqliteSource {
    config: Arc<SqliteConfig>,
    timeline: Arc<str>,
    open: Option<Open>,
    pruned_at: Option<Instant>,
}

struct Open {
    database: Arc<Mutex<Database>>,
    cursor: Cursor,
}

impl SqliteSource {
    pub fn new(config: SqliteConfig) -> Self {
        let timeline = config.source_name.as_str().into();
        Self { config: Arc::new(config), timeline, open: None, pruned_at: None }
    }

    fn opened(&self) -> Result<&Open> {
        self.open.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Internal, "read", format!("source {}", self.timeline), "it was not started")
        })
    }

    /// Runs blocking work off the async threads.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        if self.config.inline {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(cause) => Err(Error::new(ErrorKind::Internal, "finish", "a SQLite call", cause)),
        }
    }

    async fn run_open<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Database, &SqliteConfig, Cursor) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let open = self.opened()?;
        let (database, cursor, config) = (open.database.clone(), open.cursor.clone(), self.config.clone());
        self.run(move || {
            let mut database = database.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut database, &config, cursor)
        })
        .await
    }
}

#[async_trait]
impl Source for SqliteSource {
    fn timeline(&self) -> Arc<str> {
        self.timeline.clone()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.open = None;
        let (config, resume) = (self.config.clone(), resume.clone());
        let (started, open) = self
            .run(move || {
                let mut database = Database::open(&config.path, config.busy_timeout)?;
                let (started, cursor) = cursor::start(&mut database, &config, &resume)?;
                Ok((started, Open { database: Arc::new(Mutex::new(database)), cursor }))
            })
            .await?;
        self.open = Some(open);
        Ok(started)
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let step =
            move |database: &mut Database, config: &SqliteConfig, cursor| stream::step(database, config, cursor, limit);
        let (batch, cursor) = self.run_open(step).await?;
        if let Some(open) = &mut self.open {
            open.cursor = cursor;
        }
        Ok(batch)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        let mut pause = POLL_MIN;
        loop {
            let cursor = &self.opened()?.cursor;
            let known = cursor.data_version;
            if known.is_none() || cursor.target.is_some() {
                return Ok(());
            }
            let look = move |database: &mut Database, _: &SqliteConfig, _| {
                stream::data_version(&database.connection).map_err(database.fail("read"))
            };
            let now = Instant::now();
            if known != Some(self.run_open(look).await?) || now >= until {
                return Ok(());
            }
            tokio::time::sleep(pause.min(until - now)).await;
            pause = (pause * 2).min(POLL_MAX);
        }
    }

    async fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        let due = self.pruned_at.is_none_or(|at| at.elapsed() >= self.config.prune_interval);
        let acknowledged = positions::change_at(durable)?;
        if !due || acknowledged == 0 {
            return Ok(());
        }
        self.pruned_at = Some(Instant::now());
        let work = move |database: &mut Database, config: &SqliteConfig, _| {
            prune::prune(database, acknowledged, config.keep_changes, config.busy_timeout)
        };
        let pruned = self.run_open(work).await?;
        tracing::debug!(source = %self.timeline, pruned, "pruned changes");
        Ok(())
    }

    async fn head(&mut self) -> Result<Head> {
        self.run_open(|database, _, cursor| {
            let fail = database.fail("read the newest change of");
            let newest = cursor::newest_change(&database.connection).map_err(&fail)?;
            let query = "select ifnull((select at_us from _shori_changes order by id desc limit 1), 0)";
            let time: i64 = database.connection.query_row(query, [], |row| row.get(0)).map_err(&fail)?;
            let watermark = cursor.watermark;
            let staged = positions::change_at(&watermark.staged)?;
            // A snapshot's rows stand above the newest change.
            let boundary = positions::of_change(newest)?.max(watermark.staged);
            // Changes that are pruned were read before.
            let time = if time == 0 { watermark.boundary_time } else { time };
            let count = || cursor::count_changes(&database.connection, staged, newest).map_err(&fail);
            let waiting = if cursor.from_head { None } else { Some(count()?) };
            Ok(Head { boundary, time, changes_waiting: waiting })
        })
        .await
    }
}
