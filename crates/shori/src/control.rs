//! The local socket of a running pipeline, and who speaks to it.
//!
//! A DuckDB file admits one process. While a pipeline runs, other commands reach its files through a Unix socket in its
//! folder; only the owner of the folder may connect. A request is one line of JSON; the answer is one line of JSON,
//! followed by as many bytes of an Arrow stream as the line says.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::RecordBatch;
use serde::{Deserialize, Serialize};
use shori_core::pipeline::Handle;
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::store::DuckdbStore;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

/// Longest request, in bytes.
const REQUEST_MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    Query { store: String, sql: String },
    Rebuild { projection: String },
    Resnapshot { table: String, retyped: bool },
    Compact,
    Pid,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    /// Bytes of Arrow stream that follow.
    #[serde(default)]
    bytes: usize,
    #[serde(default)]
    number: u64,
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
    pub stores: std::collections::BTreeMap<String, Arc<DuckdbStore>>,
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
        let listener = tokio::net::UnixListener::bind(&path).map_err(fail)?;
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
        let (read, mut write) = stream.into_split();
        let mut line = String::new();
        let limited = tokio::io::AsyncReadExt::take(read, REQUEST_MAX_BYTES);
        tokio::io::BufReader::new(limited).read_line(&mut line).await?;
        let request = serde_json::from_str::<Request>(&line)
            .map_err(|cause| Error::new(ErrorKind::Usage, "read", "a request on the socket", cause));
        let answered = match request {
            Ok(request) => self.answer(request).await,
            Err(error) => Err(error),
        };
        let (answer, bytes) = match answered {
            Ok(answered) => answered,
            Err(error) => (Answer { error: Some(failure(&error)), ..Answer::default() }, Vec::new()),
        };
        let mut head = serde_json::to_vec(&answer)?;
        head.push(b'\n');
        write.write_all(&head).await?;
        write.write_all(&bytes).await?;
        write.shutdown().await
    }

    async fn answer(&self, request: Request) -> Result<(Answer, Vec<u8>)> {
        let mut answer = Answer::default();
        let mut bytes = Vec::new();
        match request {
            Request::Query { store, sql } => {
                let unknown =
                    || Error::new(ErrorKind::Usage, "query", format!("store {store}"), "there is none of that name");
                let store = self.stores.get(&store).ok_or_else(unknown)?.clone();
                bytes = encode(&store.query(&sql).await?)?;
                answer.bytes = bytes.len();
            }
            Request::Rebuild { projection } => self.handle.rebuild(&projection).await?,
            Request::Resnapshot { table, retyped } => self.handle.resnapshot(&table, retyped).await?,
            Request::Compact => answer.number = self.handle.compact().await?,
            Request::Pid => answer.number = u64::from(std::process::id()),
        }
        Ok((answer, bytes))
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

fn encode(batches: &[RecordBatch]) -> Result<Vec<u8>> {
    let Some(first) = batches.first() else { return Ok(Vec::new()) };
    let mut writer = arrow::ipc::writer::StreamWriter::try_new(Vec::new(), &first.schema())?;
    for batch in batches {
        writer.write(batch)?;
    }
    writer.finish()?;
    Ok(writer.into_inner()?)
}

/// Speaks to a running pipeline.
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// `None` if no pipeline runs in this folder.
    pub fn connect(state_directory: &Path) -> Option<Self> {
        let path = socket_path(state_directory);
        UnixStream::connect(&path).ok().map(|_| Self { path })
    }

    pub fn query(&self, store: &str, sql: &str) -> Result<Vec<RecordBatch>> {
        let (_, bytes) = self.ask(&Request::Query { store: store.into(), sql: sql.into() })?;
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        let reader = arrow::ipc::reader::StreamReader::try_new(bytes.as_slice(), None)?;
        Ok(reader.collect::<std::result::Result<_, _>>()?)
    }

    /// A number where the request has one for an answer.
    pub fn request(&self, request: &Request) -> Result<u64> {
        self.ask(request).map(|(answer, _)| answer.number)
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Vec<u8>)> {
        let lost = |cause: std::io::Error| {
            Error::new(ErrorKind::Unavailable, "reach", "the running pipeline", cause)
                .with_remedy("is it still running?")
        };
        let exchange = || {
            let mut stream = UnixStream::connect(&self.path)?;
            stream.write_all(&serde_json::to_vec(request)?)?;
            stream.write_all(b"\n")?;
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let answer: Answer = serde_json::from_str(&line)?;
            let mut bytes = vec![0; answer.bytes];
            reader.read_exact(&mut bytes)?;
            Ok((answer, bytes))
        };
        let (answer, bytes) = exchange().map_err(lost)?;
        match answer.error {
            None => Ok((answer, bytes)),
            Some(failure) => {
                let error = Error::new(failure.kind, failure.operation, failure.object, failure.cause);
                Err(match failure.remedy {
                    Some(remedy) => error.with_remedy(remedy),
                    None => error,
                })
            }
        }
    }
}
