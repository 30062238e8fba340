//! The local socket of a running pipeline, and who speaks to it.
//!
//! A DuckDB file admits one process. While a pipeline runs, other commands reach its files through a Unix socket in its
//! folder; only the owner of the folder may connect. A request is one line of JSON, and so is the answer. The answer to a
//! query has rows behind it, if its line says so: an Arrow stream in [`frames`], then a line that tells whether it is all.
//!
//! Rows go out while the statement runs, and only as fast as they are taken, so neither side's memory grows with them. An
//! answer that nobody takes is given up: while it stands, the store keeps what it sees.

mod frames;
pub mod logged;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use shori_core::change::ChangeBatch;
use shori_core::pipeline::Handle;
use shori_core::position::{CaptureId, Position};
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::store;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedWriteHalf;

use frames::Frames;
use logged::{LoggedCapture, Told};

use crate::stores::{self, OpenStore};

/// Longest request, in bytes.
const REQUEST_MAX_BYTES: u64 = 1 << 20;
/// How long rows wait to be taken.
const TAKEN_WITHIN: Duration = Duration::from_secs(120);
/// How long a request waits for a pipeline that has just begun.
const START_WAIT: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    Query {
        store: String,
        sql: String,
    },
    /// What the log of a store knows of its captures.
    Captures {
        store: String,
    },
    /// Changes of a capture with `after < position <= up_to`.
    Log {
        store: String,
        source: String,
        instance: String,
        after: logged::Place,
        up_to: logged::Place,
    },
    Rebuild {
        projection: String,
    },
    Resnapshot {
        table: String,
        retyped: bool,
    },
    Compact,
    Pid,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    /// Whether rows follow, and another answer behind them.
    #[serde(default)]
    has_rows: bool,
    #[serde(default)]
    number: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    captures: Option<Vec<logged::Told>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    kind: ErrorKind,
    operation: String,
    object: String,
    cause: String,
    remedy: Option<String>,
}

/// What the server answers from.
pub struct Server {
    pub handle: Handle,
    pub stores: std::collections::BTreeMap<String, OpenStore>,
}

/// Removes the socket's file when the pipeline ends.
pub struct Listening(PathBuf);

impl Drop for Listening {
    fn drop(&mut self) {
        // A file left behind is replaced at the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

pub fn socket_path(state_directory: &Path) -> PathBuf {
    state_directory.join("socket")
}

/// Longest path that a socket's address holds on every system.
const ADDRESS_MAX_BYTES: usize = 100;

/// A path to a socket that its address holds: a long one goes by way of the open folder, where the system has that.
struct Near {
    path: PathBuf,
    _folder: Option<File>,
}

impl Near {
    fn to(path: &Path) -> std::io::Result<Self> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(Self { path: path.into(), _folder: None });
        };
        if !cfg!(target_os = "linux") || path.as_os_str().len() <= ADDRESS_MAX_BYTES {
            return Ok(Self { path: path.into(), _folder: None });
        }
        let folder = File::open(folder)?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        Ok(Self { path, _folder: Some(folder) })
    }
}

fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let near = Near::to(path)?;
    UnixStream::connect(&near.path)
}

impl Server {
    /// Serves until the returned guard is dropped with the runtime's task. The folder's lock must be held.
    pub fn listen(self, state_directory: &Path) -> Result<Listening> {
        let path = socket_path(state_directory);
        let fail = |cause| {
            Error::new(ErrorKind::Usage, "listen at", format!("socket {}", path.display()), cause)
                .with_remedy("choose a folder with a shorter path on a local disk")
        };
        if path.exists() {
            std::fs::remove_file(&path).map_err(fail)?;
        }
        let near = Near::to(&path).map_err(fail)?;
        let listener = tokio::net::UnixListener::bind(&near.path).map_err(fail)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        let server = Arc::new(self);
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { break };
                let server = server.clone();
                tokio::spawn(async move {
                    if let Err(error) = server.serve(stream).await {
                        tracing::debug!(%error, "a client of the socket went away");
                    }
                });
            }
        });
        Ok(Listening(path))
    }

    async fn serve(&self, stream: tokio::net::UnixStream) -> std::io::Result<()> {
        let (mut read, mut write) = stream.into_split();
        let mut line = String::new();
        let limited = (&mut read).take(REQUEST_MAX_BYTES);
        tokio::io::BufReader::new(limited).read_line(&mut line).await?;
        let request = serde_json::from_str::<Request>(&line)
            .map_err(|cause| Error::new(ErrorKind::Usage, "read", "a request on the socket", cause));
        let answered = match request {
            Ok(request @ (Request::Query { .. } | Request::Log { .. })) => {
                let mut gone = [0];
                tokio::select! {
                    // A client says nothing after its request: what comes is its end. Then the statement is for nobody.
                    _ = read.read(&mut gone) => return Ok(()),
                    answered = self.rows(request, &mut write) => answered?,
                }
            }
            Ok(request) => self.answer(request).await,
            Err(error) => Err(error),
        };
        let failed = |error: Error| Answer { error: Some(failure(&error)), ..Answer::default() };
        tell(&mut write, &answered.unwrap_or_else(failed)).await?;
        write.shutdown().await
    }

    async fn answer(&self, request: Request) -> Result<Answer> {
        let mut answer = Answer::default();
        match request {
            Request::Query { .. } | Request::Log { .. } => {}
            Request::Captures { store } => {
                let captures = LoggedCapture::all(self.store(&store)?.store().captures().await?);
                answer.captures = Some(captures.iter().map(Told::of).collect());
            }
            Request::Rebuild { projection } => self.handle.rebuild(&projection).await?,
            Request::Resnapshot { table, retyped } => {
                self.begun().await?;
                self.handle.resnapshot(&table, retyped).await?;
            }
            Request::Compact => answer.number = self.handle.compact().await?,
            Request::Pid => answer.number = u64::from(std::process::id()),
        }
        Ok(answer)
    }

    /// A pipeline that has just begun does not know its tables yet. A source that is not there is not waited for longer.
    async fn begun(&self) -> Result<()> {
        match tokio::time::timeout(START_WAIT, self.handle.ready()).await {
            Ok(ready) => ready,
            Err(_) => Ok(()),
        }
    }

    fn store(&self, name: &str) -> Result<&OpenStore> {
        let unknown = || Error::new(ErrorKind::Usage, "query", format!("store {name}"), "there is none of that name");
        self.stores.get(name).ok_or_else(unknown)
    }

    /// Answers with rows, all but the last line. The outer error is that of the connection.
    async fn rows(&self, request: Request, write: &mut OwnedWriteHalf) -> std::io::Result<Result<Answer>> {
        let opened = match request {
            Request::Query { store, sql } => self.query(&store, &sql).await,
            Request::Log { store, source, instance, after, up_to } => {
                self.log(&store, &CaptureId::new(&source, &instance), &after, &up_to).await
            }
            _ => return Ok(Ok(Answer::default())),
        };
        let (schema, mut rows) = match opened {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(error)),
        };
        tell(write, &Answer { has_rows: true, ..Answer::default() }).await?;
        let sent = send(&schema, &mut rows, write).await?;
        frames::end(write).await?;
        Ok(sent.map(|()| Answer::default()))
    }

    async fn query(&self, store: &str, sql: &str) -> Result<(SchemaRef, Rows)> {
        let answer = self.store(store)?.stream(sql).await?;
        let schema = answer.schema().clone();
        let next = |mut answer: stores::Answer| async move { Some((answer.next().await?, answer)) };
        Ok((schema, futures::stream::unfold(answer, next).boxed()))
    }

    async fn log(
        &self,
        store: &str,
        capture: &CaptureId,
        after: &logged::Place,
        up_to: &logged::Place,
    ) -> Result<(SchemaRef, Rows)> {
        let store = self.store(store)?.store();
        let unknown = || Error::new(ErrorKind::Usage, "read", format!("the log of {capture}"), "there is none");
        let schema = store.captures().await?.remove(capture).ok_or_else(unknown)?.schema;
        let schema = logged::rows_schema(&schema);
        let changes = store.read_log(capture, &after.position()?, &up_to.position()?).await?;
        let of = schema.clone();
        Ok((schema, changes.map(move |batch| logged::to_rows(&batch?, &of)).boxed()))
    }
}

/// Rows on their way out.
type Rows = BoxStream<'static, Result<RecordBatch>>;

async fn tell(write: &mut OwnedWriteHalf, answer: &Answer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Sends rows in frames. The outer error is that of the connection.
async fn send(schema: &SchemaRef, rows: &mut Rows, write: &mut OwnedWriteHalf) -> std::io::Result<Result<()>> {
    let mut encoded = match StreamWriter::try_new(Vec::new(), schema) {
        Ok(encoded) => encoded,
        Err(error) => return Ok(Err(error.into())),
    };
    loop {
        let next = rows.next().await;
        let ended = next.is_none();
        let written = match next {
            Some(Ok(batch)) => encoded.write(&batch),
            Some(Err(error)) => return Ok(Err(error)),
            None => encoded.finish(),
        };
        if let Err(error) = written {
            return Ok(Err(error.into()));
        }
        let bytes = std::mem::take(encoded.get_mut());
        tokio::time::timeout(TAKEN_WITHIN, frames::write(write, &bytes)).await??;
        if ended {
            return Ok(Ok(()));
        }
    }
}

fn failure(error: &Error) -> Failure {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    Failure {
        kind: error.kind(),
        operation: error.operation().into(),
        object: error.object().into(),
        cause,
        remedy: error.remedy().map(String::from),
    }
}

/// Speaks to a running pipeline.
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// `None` if no pipeline runs in this folder.
    pub fn connect(state_directory: &Path) -> Option<Self> {
        let path = socket_path(state_directory);
        connect(&path).ok().map(|_| Self { path })
    }

    /// The answer to a query for few rows. An empty one is one batch without rows.
    pub fn query(&self, store: &str, sql: &str) -> Result<Vec<RecordBatch>> {
        let (mut batches, mut rows) = (Vec::new(), 0);
        let schema = self.scan(store, sql, &mut |batch| {
            rows += batch.num_rows();
            batches.push(batch);
            if rows > store::ANSWER_ROWS_MAX { Err(store::too_many()) } else { Ok(()) }
        })?;
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        Ok(batches)
    }

    /// Hands the rows of a query to `take` as they come, in memory that does not grow with them. Returns their columns.
    pub fn scan(&self, store: &str, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<SchemaRef> {
        self.rows(&Request::Query { store: store.into(), sql: sql.into() }, take)
    }

    /// What the log of a store knows of its captures.
    pub fn captures(&self, store: &str) -> Result<Vec<LoggedCapture>> {
        let (answer, _) = self.ask(&Request::Captures { store: store.into() })?;
        answer.captures.ok_or_else(other_version)?.into_iter().map(Told::read).collect()
    }

    /// Hands the changes of a capture with `after < position <= up_to` to `take` as they come.
    pub fn log(
        &self,
        store: &str,
        capture: &CaptureId,
        (after, up_to): (&Position, &Position),
        take: &mut dyn FnMut(ChangeBatch) -> Result<()>,
    ) -> Result<()> {
        let request = Request::Log {
            store: store.into(),
            source: capture.source.to_string(),
            instance: capture.instance.to_string(),
            after: logged::Place::of(after),
            up_to: logged::Place::of(up_to),
        };
        self.rows(&request, &mut |rows| take(logged::from_rows(capture, &rows)?)).map(|_| ())
    }

    fn rows(&self, request: &Request, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<SchemaRef> {
        let (answer, reader) = self.ask(request)?;
        if !answer.has_rows {
            return Err(other_version());
        }
        let mut frames = Frames::new(reader);
        let mut refused = None;
        let read = read_rows(&mut frames, &mut |batch| {
            refused = take(batch).err();
            refused.is_none()
        });
        if let Some(error) = refused {
            return Err(error);
        }
        // What the pipeline tells explains what was met here.
        read_answer(&mut frames.rest().map_err(lost)?)?;
        Ok(read?)
    }

    /// A number where the request has one for an answer.
    pub fn request(&self, request: &Request) -> Result<u64> {
        self.ask(request).map(|(answer, _)| answer.number)
    }

    /// The answer's line, and what the rest is read from.
    fn ask(&self, request: &Request) -> Result<(Answer, BufReader<UnixStream>)> {
        let connect = || {
            let mut stream = connect(&self.path)?;
            stream.write_all(&serde_json::to_vec(request)?)?;
            stream.write_all(b"\n")?;
            Ok(BufReader::new(stream))
        };
        let mut reader = connect().map_err(lost)?;
        Ok((read_answer(&mut reader)?, reader))
    }
}

/// Hands rows to `take` until it wants no more.
fn read_rows(
    frames: &mut Frames<BufReader<UnixStream>>,
    take: &mut dyn FnMut(RecordBatch) -> bool,
) -> std::result::Result<SchemaRef, ArrowError> {
    let reader = StreamReader::try_new(frames, None)?;
    let schema = reader.schema();
    for batch in reader {
        if !take(batch?) {
            break;
        }
    }
    Ok(schema)
}

fn other_version() -> Error {
    let cause = "it is of another version of shori";
    Error::new(ErrorKind::Usage, "query", "the running pipeline", cause).with_remedy("restart it")
}

fn lost(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "reach", "the running pipeline", cause).with_remedy("is it still running?")
}

fn read_answer(reader: &mut impl BufRead) -> Result<Answer> {
    let mut line = String::new();
    reader.read_line(&mut line).map_err(lost)?;
    let answer: Answer = serde_json::from_str(&line).map_err(|cause| lost(cause.into()))?;
    let Some(failure) = answer.error else { return Ok(answer) };
    let error = Error::new(failure.kind, failure.operation, failure.object, failure.cause);
    Err(match failure.remedy {
        Some(remedy) => error.with_remedy(remedy),
        None => error,
    })
}
