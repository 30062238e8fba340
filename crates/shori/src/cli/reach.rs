//! Reaches a pipeline's stores: through the socket of the process that runs it, else by opening the files.

use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::StreamExt;
use shori_core::change::ChangeBatch;
use shori_core::pipeline::Handle;
use shori_core::position::{CaptureId, Position};
use shori_core::project::Progress;
use shori_core::{Error, ErrorKind, Result};

use super::run;
use crate::assemble::{self, Opened};
use crate::config::{Loaded, ProjectionConfig, StoreKind};
use crate::control::logged::LoggedCapture;
use crate::control::{Client, Request};
use crate::stores::OpenStore;

pub enum Reach {
    Running(Client),
    Files(Box<Opened>),
}

impl Reach {
    /// For what needs the pipeline to run.
    pub fn new(loaded: &Loaded) -> Result<Self> {
        Self::running_or(loaded, || {
            assemble::must_be_able_to_begin(loaded)?;
            Ok(Reach::Files(Box::new(assemble::open(loaded)?)))
        })
    }

    /// One that is just starting holds the files before it can be reached.
    fn running_or(loaded: &Loaded, open: impl FnOnce() -> Result<Self>) -> Result<Self> {
        let connect = || Client::connect(&loaded.state_directory()).map(Reach::Running);
        match connect() {
            Some(running) => Ok(running),
            None => open().or_else(|error| match error.kind() {
                ErrorKind::InUse => connect().ok_or(error),
                _ => Err(error),
            }),
        }
    }

    /// For looking only: makes no file, and refuses a pipeline that has none yet.
    pub fn to_look(loaded: &Loaded) -> Result<Self> {
        Self::running_or(loaded, || match assemble::open_made(loaded)? {
            Some(opened) => Ok(Reach::Files(Box::new(opened))),
            None => Err(has_not_run(loaded)),
        })
    }

    pub fn is_running(&self) -> bool {
        matches!(self, Reach::Running(_))
    }

    /// Whether a pipeline has ever made its tables in a store.
    pub fn has_run(&self, loaded: &Loaded, store: &str) -> Result<bool> {
        if let Reach::Files(opened) = self
            && !opened.stores.contains_key(store)
        {
            return Ok(false);
        }
        let made = loaded.store(store)?.kind.has_tables();
        Ok(self.query(loaded, Some(store), made)?.iter().any(|batch| batch.num_rows() > 0))
    }

    /// Refuses a pipeline that has nothing to tell yet.
    pub fn must_have_run(&self, loaded: &Loaded) -> Result<()> {
        if self.has_run(loaded, &loaded.staging()?.name)? {
            return Ok(());
        }
        Err(has_not_run(loaded))
    }

    /// The answer to a query for few rows.
    pub fn query(&self, loaded: &Loaded, store: Option<&str>, sql: &str) -> Result<Vec<RecordBatch>> {
        let store = name(loaded, store)?;
        match self {
            Reach::Running(client) => client.query(store, sql),
            Reach::Files(opened) => super::block_on(named(opened, store)?.query(sql)),
        }
    }

    /// Hands the rows of a query to `take` as they come, in memory that does not grow with them.
    pub fn scan(
        &self,
        loaded: &Loaded,
        store: Option<&str>,
        sql: &str,
        take: &mut dyn FnMut(RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let store = name(loaded, store)?;
        match self {
            Reach::Running(client) => client.scan(store, sql, take).map(|_| ()),
            Reach::Files(opened) => super::block_on(async {
                let mut answer = named(opened, store)?.stream(sql).await?;
                while let Some(batch) = answer.next().await {
                    take(batch?)?;
                }
                Ok(())
            }),
        }
    }

    /// What the log knows of its captures.
    pub fn captures(&self, loaded: &Loaded) -> Result<Vec<LoggedCapture>> {
        match self {
            Reach::Running(client) => client.captures(&loaded.staging()?.name),
            Reach::Files(opened) => {
                let captures = super::block_on(async { opened.staging.store().captures().await })?;
                Ok(LoggedCapture::all(captures))
            }
        }
    }

    /// Hands the changes of a capture with `after < position <= up_to` to `take` as they come.
    pub fn log(
        &self,
        loaded: &Loaded,
        capture: &CaptureId,
        (after, up_to): (&Position, &Position),
        take: &mut dyn FnMut(ChangeBatch) -> Result<()>,
    ) -> Result<()> {
        match self {
            Reach::Running(client) => client.log(&loaded.staging()?.name, capture, (after, up_to), take),
            Reach::Files(opened) => super::block_on(async {
                let mut changes = opened.staging.store().read_log(capture, after, up_to).await?;
                while let Some(batch) = changes.next().await {
                    take(batch?)?;
                }
                Ok(())
            }),
        }
    }

    /// Asks the running pipeline; without one, runs it once and asks that, so that the request is done when this
    /// returns.
    pub fn request(self, loaded: &Loaded, request: Request) -> Result<u64> {
        match self {
            Reach::Running(client) => client.request(&request),
            Reach::Files(opened) => super::block_on(request_once(loaded, &opened, request)),
        }
    }
}

/// The store that a projection is kept in.
pub fn target<'a>(loaded: &'a Loaded, projection: &'a ProjectionConfig) -> Result<&'a str> {
    name(loaded, projection.target.as_deref())
}

/// What the store of a question is: the named one, or the staging store.
pub fn kind(loaded: &Loaded, store: Option<&str>) -> Result<StoreKind> {
    loaded.store(name(loaded, store)?).map(|store| store.kind)
}

pub fn name<'a>(loaded: &'a Loaded, store: Option<&str>) -> Result<&'a str> {
    Ok(match store {
        Some(name) => &loaded.store(name)?.name,
        None => &loaded.staging()?.name,
    })
}

fn named<'a>(opened: &'a Opened, name: &str) -> Result<&'a OpenStore> {
    opened.stores.get(name).ok_or_else(|| {
        let cause = "the pipeline has not run yet since it was configured";
        Error::new(ErrorKind::Unavailable, "look at", format!("store {name}"), cause).with_remedy("start it: shori run")
    })
}

fn has_not_run(loaded: &Loaded) -> Error {
    let object = format!("pipeline {}", loaded.config.pipeline.name);
    Error::new(ErrorKind::Unavailable, "look at", object, "it has not run yet").with_remedy("start it: shori run")
}

async fn request_once(loaded: &Loaded, opened: &Opened, request: Request) -> Result<u64> {
    // What stands still besides is not what was asked: `status` tells of it.
    let pipeline = assemble::pipeline(loaded, opened, false, run::events(loaded, true))?;
    let projections = pipeline.projections.len();
    let prepared = pipeline.prepare();
    let handle = prepared.handle();
    super::signals::cancel_on_signal(handle.stop.clone())?;
    let running = prepared.run();
    tokio::pin!(running);
    let answer = tokio::select! {
        ended = &mut running => {
            ended?;
            return Err(Error::new(ErrorKind::Unavailable, "finish", "the request", "it was interrupted"));
        }
        answer = ask(&handle, request, projections) => answer,
    };
    handle.stop.cancel();
    running.await?;
    answer
}

async fn ask(handle: &Handle, request: Request, projections: usize) -> Result<u64> {
    handle.ready().await?;
    match request {
        Request::Rebuild { projection } => handle.rebuild(&projection).await.map(|()| 0),
        Request::Resnapshot { table, retyped } => {
            handle.resnapshot(&table, retyped).await?;
            handle.snapshot_done(&table).await.map(|()| 0)
        }
        Request::Compact => {
            // Nothing may be let go before it is known what each projection still needs.
            projections_known(handle, projections).await?;
            handle.compact().await
        }
        Request::Query { .. } | Request::Captures { .. } | Request::Log { .. } | Request::Pid => Ok(0),
    }
}

/// Returns when every projection has been built at least once, or cannot be.
async fn projections_known(handle: &Handle, projections: usize) -> Result<()> {
    let known = |progress: &Progress| {
        let built =
            |(name, checkpoint): (&Arc<str>, &Option<_>)| checkpoint.is_some() || progress.failed.contains_key(name);
        progress.checkpoints.len() >= projections && progress.checkpoints.iter().all(built)
    };
    let ended = || Error::new(ErrorKind::Unavailable, "finish", "the request", "the pipeline has ended");
    let mut progress = handle.progress.clone();
    tokio::select! {
        biased;
        waited = progress.wait_for(known) => waited.map(|_| ()).map_err(|_| ended()),
        _ = handle.stop.cancelled() => Err(ended()),
    }
}
