//! Connections that write while a test reads, each from a seed of its own.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinHandle;

use crate::server::Server;

/// The seed of a test's random choices, printed; `SEED` gives one to repeat.
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().map(|seed| seed.parse().expect("a seed"));
    let seed = given.unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish());
    println!("seed {seed}: repeat with SEED={seed}");
    seed
}

pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Writers that run until told to stop.
pub struct Writers {
    tasks: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
}

impl Writers {
    /// `transaction` makes the statements of the next one; one that the server gives up (a deadlock, a conflict) is
    /// forgotten.
    pub async fn start(
        server: &Server,
        database: &str,
        count: u64,
        seed: u64,
        transaction: impl Fn(&mut ChaCha8Rng) -> String + Clone + Send + Sync + 'static,
    ) -> Self {
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for writer in 0..count {
            let client = server.connect(database).await;
            let (stop, committed, transaction) = (stop.clone(), committed.clone(), transaction.clone());
            let mut random = random(seed.wrapping_add(writer + 1));
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let statements = transaction(&mut random);
                    match client.batch_execute(&format!("begin; {statements}; commit")).await {
                        Ok(()) => drop(committed.fetch_add(1, Ordering::Relaxed)),
                        Err(cause) => {
                            let code = cause.code().map_or("", |code| code.code());
                            assert!(code.starts_with("40") || code.starts_with("23"), "{statements}: {cause:?}");
                            client.batch_execute("rollback").await.unwrap();
                        }
                    }
                }
            }));
        }
        Self { tasks, stop, committed }
    }

    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    pub async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// Moves money between two accounts of `accounts (id, owner, balance, note)`, so that their sum stays; now and then a
/// row gets longer or shorter, or its indexed column another value, so that it moves in the table.
pub fn transfer(random: &mut ChaCha8Rng, accounts: i64) -> String {
    let (from, to, amount) =
        (random.random_range(0..accounts), random.random_range(0..accounts), random.random_range(1..100));
    let more = match random.random_range(0..4) {
        0 => format!(", note = repeat('x', {})", random.random_range(0..400)),
        1 => format!(", owner = {}", random.random_range(0..1000)),
        _ => String::new(),
    };
    // In the order of their keys: deadlocks only cost time.
    let (low, high) = ((from, -amount), (to, amount));
    let (low, high) = if low.0 <= high.0 { (low, high) } else { (high, low) };
    let update =
        |(id, amount): (i64, i64)| format!("update accounts set balance = balance + {amount}{more} where id = {id}");
    format!("{}; {}", update(low), update(high))
}
