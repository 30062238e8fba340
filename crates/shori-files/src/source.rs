//! The [`Source`] over a folder of change logs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use shori_core::position::{CaptureId, Position};
use shori_core::source::{BatchLimit, Head, Resume, Source, SourceBatch, Started};
use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use crate::FilesConfig;
use crate::cursor::{self, Cursor};
use crate::stream;

/// Shortest and longest pause between two looks for new files.
const POLL_MIN: Duration = Duration::from_millis(5);
const POLL_MAX: Duration = Duration::from_millis(200);

/// Reads what [`LogFolder`](crate::LogFolder) has written. See the crate's documentation.
pub struct FilesSource {
    config: Arc<FilesConfig>,
    timeline: Arc<str>,
    cursor: Option<Cursor>,
}

impl FilesSource {
    pub fn new(config: FilesConfig) -> Self {
        let timeline = config.source_name.as_str().into();
        Self { config: Arc::new(config), timeline, cursor: None }
    }

    /// Runs blocking work off the async threads, on a copy of where reading stands.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(Cursor) -> Result<T> + Send + 'static) -> Result<T> {
        let cursor = self.cursor.clone().ok_or_else(|| {
            Error::new(ErrorKind::Internal, "read", format!("source {}", self.timeline), "it was not started")
        })?;
        blocking(move || work(cursor)).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(cause) => Err(Error::new(ErrorKind::Internal, "finish", "reading a change log", cause)),
    }
}

#[async_trait]
impl Source for FilesSource {
    fn timeline(&self) -> Arc<str> {
        self.timeline.clone()
    }

    async fn start(&mut self, resume: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        self.cursor = None;
        let (config, resume) = (self.config.clone(), resume.clone());
        let (started, cursor) = blocking(move || cursor::start(&config, &resume)).await?;
        self.cursor = Some(cursor);
        Ok(started)
    }

    async fn next(&mut self, limit: BatchLimit) -> Result<SourceBatch> {
        let (batch, cursor) = self.run(move |cursor| stream::step(cursor, limit)).await?;
        self.cursor = Some(cursor);
        Ok(batch)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        let mut pause = POLL_MIN;
        loop {
            let waits =
                self.run(|cursor| Ok(cursor.target.is_some() || cursor::next_target(&cursor)?.is_some())).await?;
            let now = Instant::now();
            if waits || now >= until {
                return Ok(());
            }
            tokio::time::sleep(pause.min(until - now)).await;
            pause = (pause * 2).min(POLL_MAX);
        }
    }

    /// Files are nobody's to remove.
    async fn acknowledge(&mut self, _durable: &Position) -> Result<()> {
        Ok(())
    }

    async fn head(&mut self) -> Result<Head> {
        self.run(|cursor| {
            let mark = cursor.watermark;
            let last = cursor::last_target(&cursor)?;
            let (boundary, time) = last.map_or((mark.boundary, mark.boundary_time), |last| (last.position, last.time));
            Ok(Head { boundary: boundary.max(mark.boundary), time, changes_waiting: None })
        })
        .await
    }
}
