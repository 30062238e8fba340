//! A replication connection, read by a task of its own.
//!
//! # Constraints
//!
//! - The server hears from us at least every [`STATUS_INTERVAL`], however slow the store is: it ends connections that
//!   keep silent (`wal_sender_timeout`).
//! - What waits to be decoded is bounded by [`BLOCKS_MAX`] blocks of about [`BLOCK_BYTES`]; then nothing more is read,
//!   and the server waits.
//! - A peer that does not answer is given up after [`SILENCE_MAX`]: half-open connections end no other way.
//!
//! Source: PostgreSQL documentation, "Streaming Replication Protocol".

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::FutureExt;
use pg_walstream::{CancellationToken, PgReplicationConnection};
use shori_core::{Error, ErrorKind, Result};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::connect::Server;
use crate::message::WalLocation;

const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// After this much silence the peer is asked for a sign of life.
const SILENCE_ASKED: Duration = Duration::from_secs(10);
const SILENCE_MAX: Duration = Duration::from_secs(25);
const BLOCK_BYTES: usize = 256 << 10;
const BLOCKS_MAX: usize = 16;

/// What the server sent.
pub(crate) enum Item {
    /// A message of the output plugin.
    Message(Bytes),
    /// Everything that ends at or before this has been sent.
    ReadTo(WalLocation),
}

/// How to read: the slot, from where, and the plugin's options.
pub(crate) struct Request {
    pub slot: String,
    pub from: WalLocation,
    pub publication: String,
    pub binary: bool,
}

pub(crate) struct Replication {
    blocks: mpsc::Receiver<Result<Vec<Item>>>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    /// What is durable: the server may forget what ends at or before it.
    durable: AtomicU64,
    /// The server is to tell how far it is.
    asked: AtomicBool,
    changed: Notify,
}

impl Drop for Replication {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Replication {
    pub async fn start(server: &Server, request: Request) -> Result<Self> {
        let mut connection = server.connect_replication().await?;
        let fail = server.fail_replication("start replication from");
        let (server, from) = (server.clone(), request.from);
        let starting = tokio::task::spawn_blocking(move || {
            let publication = format!("\"{}\"", request.publication.replace('"', "\"\""));
            let mut options = vec![("proto_version", "2"), ("publication_names", publication.as_str())];
            if request.binary {
                options.push(("binary", "true"));
            }
            connection.start_replication(&request.slot, request.from, &options).map(|()| connection)
        });
        let connection = match starting.await {
            Ok(started) => started.map_err(fail)?,
            Err(cause) => return Err(Error::new(ErrorKind::Internal, "start replication from", server.name(), cause)),
        };
        let shared = Arc::new(Shared { durable: AtomicU64::new(from), ..Shared::default() });
        let (sender, blocks) = mpsc::channel(BLOCKS_MAX);
        let reader = Reader {
            connection,
            server,
            shared: shared.clone(),
            received: from,
            held: Vec::new(),
            held_bytes: 0,
            heard: Instant::now(),
            status_due: Instant::now() + STATUS_INTERVAL,
        };
        let task = tokio::spawn(reader.run(sender));
        Ok(Self { blocks, shared, task })
    }

    /// What has come, if anything has; does not wait.
    pub fn try_receive(&mut self) -> Result<Option<Vec<Item>>> {
        match self.blocks.try_recv() {
            Ok(block) => block.map(Some),
            Err(mpsc::error::TryRecvError::Empty) => Ok(None),
            Err(mpsc::error::TryRecvError::Disconnected) => Err(ended()),
        }
    }

    /// What comes next. Dropping the future loses nothing.
    pub async fn receive(&mut self) -> Result<Vec<Item>> {
        self.blocks.recv().await.unwrap_or_else(|| Err(ended()))
    }

    pub fn acknowledge(&self, durable: WalLocation) {
        if self.shared.durable.fetch_max(durable, Ordering::Relaxed) < durable {
            self.shared.changed.notify_one();
        }
    }

    /// Asks the server to tell how far it is.
    pub fn ask(&self) {
        self.shared.asked.store(true, Ordering::Relaxed);
        self.shared.changed.notify_one();
    }
}

fn ended() -> Error {
    Error::new(ErrorKind::Unavailable, "read", "the replication connection", "it has ended")
}

struct Reader {
    connection: PgReplicationConnection,
    server: Server,
    shared: Arc<Shared>,
    /// How far the server has sent.
    received: WalLocation,
    held: Vec<Item>,
    held_bytes: usize,
    heard: Instant,
    status_due: Instant,
}

impl Reader {
    async fn run(mut self, blocks: mpsc::Sender<Result<Vec<Item>>>) {
        let token = CancellationToken::new();
        loop {
            let full = self.held_bytes >= BLOCK_BYTES;
            let stepped = tokio::select! {
                biased;
                _ = tokio::time::sleep_until(self.status_due) => self.status_is_due().await,
                _ = self.shared.changed.notified() => self.send_status(false).await,
                permit = blocks.reserve(), if !self.held.is_empty() => {
                    let Ok(permit) = permit else { return };
                    permit.send(Ok(std::mem::take(&mut self.held)));
                    self.held_bytes = 0;
                    Ok(())
                }
                message = self.connection.get_copy_data_async(&token), if !full => match message {
                    Ok(message) => self.take(message, &token).await,
                    Err(cause) => Err(self.server.fail_replication("read changes of")(cause)),
                },
            };
            if let Err(error) = stepped {
                // A receiver that has gone away no longer wants to know.
                let _ = blocks.send(Err(error)).await;
                return;
            }
        }
    }

    /// Takes a message, and whatever else has come already.
    async fn take(&mut self, first: Bytes, token: &CancellationToken) -> Result<()> {
        self.heard = Instant::now();
        let mut wants_answer = self.push(first)?;
        while self.held_bytes < BLOCK_BYTES {
            match self.connection.get_copy_data_async(token).now_or_never() {
                None => break,
                Some(Ok(message)) => wants_answer |= self.push(message)?,
                Some(Err(cause)) => return Err(self.server.fail_replication("read changes of")(cause)),
            }
        }
        if wants_answer { self.send_status(false).await } else { Ok(()) }
    }

    /// Whether the server wants an answer at once.
    fn push(&mut self, mut message: Bytes) -> Result<bool> {
        let odd = || Error::new(ErrorKind::Data, "decode", "a replication message", "it ends early");
        // Kind; then, of changes, where they begin, where the log ends, and a time; of keepalives, the end and a time.
        match message.first() {
            Some(b'w') => {
                if message.len() < 25 {
                    return Err(odd());
                }
                message.advance(25);
                self.held_bytes += message.len() + size_of::<Item>();
                self.held.push(Item::Message(message));
                Ok(false)
            }
            Some(b'k') => {
                if message.len() < 18 {
                    return Err(odd());
                }
                message.advance(1);
                let read_to = message.get_u64();
                message.advance(8);
                self.received = self.received.max(read_to);
                self.held.push(Item::ReadTo(read_to));
                Ok(message.get_u8() != 0)
            }
            _ => Err(Error::new(ErrorKind::Data, "decode", "a replication message", "its kind is unknown")),
        }
    }

    async fn status_is_due(&mut self) -> Result<()> {
        if self.held_bytes >= BLOCK_BYTES {
            // Nothing is read now: silence says nothing.
            self.heard = Instant::now();
        }
        let silence = self.heard.elapsed();
        if silence >= SILENCE_MAX {
            let cause = format!("it has not answered for {} s", silence.as_secs());
            return Err(Error::new(ErrorKind::Unavailable, "read changes of", self.server.name(), cause));
        }
        self.send_status(silence >= SILENCE_ASKED).await
    }

    /// Tells the server what is durable. `ask` wants an answer.
    async fn send_status(&mut self, ask: bool) -> Result<()> {
        self.status_due = Instant::now() + STATUS_INTERVAL;
        let durable = self.shared.durable.load(Ordering::Relaxed);
        let received = self.received.max(durable);
        let ask = self.shared.asked.swap(false, Ordering::Relaxed) || ask;
        let sending = self.connection.send_standby_status_update(received, durable, durable, ask);
        match tokio::time::timeout(SILENCE_MAX, sending).await {
            Ok(sent) => sent.map_err(self.server.fail_replication("acknowledge changes of")),
            Err(_) => {
                let cause = format!("it has taken nothing for {} s", SILENCE_MAX.as_secs());
                Err(Error::new(ErrorKind::Unavailable, "acknowledge changes of", self.server.name(), cause))
            }
        }
    }
}
