//! How often a source that fails is tried.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{IngestSettings, Ingestor, LogState};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::position::{CaptureId, Position, Watermark};
use crate::recent::Recent;
use crate::retry::RetryPolicy;
use crate::source::{BatchLimit, Head, Resume, Source, SourceBatch, Started};
use crate::store::Store;
use crate::testing::faults::Faults;
use crate::testing::memory_store::MemoryStorage;

/// Can be started, has nothing to tell, and is gone when it is waited for.
struct Gone;

#[async_trait]
impl Source for Gone {
    fn timeline(&self) -> Arc<str> {
        "gone".into()
    }

    async fn start(&mut self, _: &BTreeMap<CaptureId, Resume>) -> Result<Started> {
        Ok(Started { identity: "gone".into(), captures: Vec::new(), failed: Vec::new() })
    }

    async fn next(&mut self, _: BatchLimit) -> Result<SourceBatch> {
        Ok(SourceBatch::empty(Watermark::ZERO))
    }

    async fn wait(&mut self, _: Duration) -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, "read", "a source", "it is gone"))
    }

    async fn acknowledge(&mut self, _: &Position) -> Result<()> {
        Ok(())
    }

    async fn head(&mut self) -> Result<Head> {
        Err(Error::new(ErrorKind::Unavailable, "look at", "a source", "it is gone"))
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_right_after_each_start_is_tried_more_and_more_seldom() {
    let pauses = Arc::new(Mutex::new(Vec::new()));
    let stop = CancellationToken::new();
    let (told, enough) = (pauses.clone(), stop.clone());
    let events = Events::new(move |event| {
        if let Event::Retrying { after, .. } = event {
            let mut pauses = told.lock().unwrap();
            pauses.push(after.as_millis());
            if pauses.len() == 6 {
                enough.cancel();
            }
        }
    });
    let settings = IngestSettings {
        batch: BatchLimit { rows: 10, bytes: 1 << 10 },
        poll_interval: Duration::from_millis(10),
        linger: Duration::ZERO,
        retry: RetryPolicy { first: Duration::from_millis(100), longest: Duration::from_secs(1) },
        once: false,
    };
    let store = Arc::new(MemoryStorage::new("store").open(Faults::none()));
    store.bootstrap().await.unwrap();
    let (log, _log) = watch::channel(LogState::default());
    let (_requests, requests) = mpsc::channel(1);
    let ingestor = Ingestor::new(Box::new(Gone), store, Recent::default(), Arc::new(log), requests, events, settings);
    ingestor.run(stop).await.unwrap();
    assert_eq!(*pauses.lock().unwrap(), [100, 200, 400, 800, 1000, 1000]);
}
