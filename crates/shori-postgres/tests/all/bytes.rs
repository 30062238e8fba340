//! Bytes as PostgreSQL writes them, and bytes as nobody does.

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bytes of a message or a value, put together in order.
#[derive(Default, Clone)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    pub fn message(tag: u8) -> Self {
        Self(vec![tag])
    }

    /// A message of a streamed block has the transaction id after its tag.
    pub fn in_transaction(self, xid: Option<u32>) -> Self {
        match xid {
            Some(xid) => self.u32(xid),
            None => self,
        }
    }

    pub fn u8(self, number: u8) -> Self {
        self.raw(&[number])
    }

    pub fn u16(self, number: u16) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub fn u32(self, number: u32) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub fn i32(self, number: i32) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub fn u64(self, number: u64) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub fn i64(self, number: i64) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub fn string(self, text: &str) -> Self {
        self.raw(text.as_bytes()).u8(0)
    }

    pub fn counted(self, bytes: &[u8]) -> Self {
        self.i32(bytes.len() as i32).raw(bytes)
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

/// The generator of a random test; a failing test shows the seed that it printed.
pub fn seeded(seed: u64) -> ChaCha8Rng {
    println!("seed {seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Up to `length_max` random bytes.
pub fn random_bytes(rng: &mut ChaCha8Rng, length_max: usize) -> Vec<u8> {
    let mut bytes = vec![0; rng.random_range(0..=length_max)];
    rng.fill_bytes(&mut bytes);
    bytes
}
