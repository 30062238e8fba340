//! The vocabulary and the rules of Shori: no driver, no network, no file.
//!
//! Committed changes flow one way: a [`source::Source`] reads them, [`ingest`] appends them to the log of a
//! [`store::Store`], [`project`] applies the log to a [`transform::Transform`] (current rows and what changed in them)
//! and commits what each projection derives from that to its target store.
//!
//! The numbered contracts that these parts keep are listed in `ARCHITECTURE.md`; code that enforces one cites it.

pub mod change;
pub mod error;
pub mod event;
pub mod failpoint;
pub mod ingest;
pub mod pipeline;
pub mod position;
pub mod project;
pub mod projection;
pub mod recent;
pub mod retry;
pub mod schema;
pub mod secret;
pub mod source;
pub mod step;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transform;

pub use error::{Error, ErrorKind, Result};
