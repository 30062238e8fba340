//! Suite `postgres`: a PostgreSQL source, logged in DuckDB.
//!
//! [`server`] is the database server, [`pipeline`] what reads it.

mod memory;
mod pipeline;
mod server;
mod snapshot;
mod stream;

use super::{Bound, Figure, Suite};

pub(super) const SUITE: Suite =
    Suite { name: "postgres", figures: FIGURES, shared: &[], shared_stands: |_| true, helpers: &[] };

const FIGURES: &[Figure] = &[
    Figure {
        name: "postgres.stream_duckdb",
        unit: "s",
        bound: Bound::RatioAtMost(1.5),
        prepare: Some(stream::prepare),
        measure: stream::measure_wall,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.stream_cpu",
        unit: "s",
        bound: Bound::RatioAtMost(1.0),
        prepare: Some(stream::prepare),
        measure: stream::measure_processor,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.snapshot",
        unit: "s",
        bound: Bound::RatioAtMost(2.5),
        prepare: Some(snapshot::prepare),
        measure: snapshot::measure,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.memory",
        unit: "MB",
        bound: Bound::AtMost(256.0),
        prepare: None,
        measure: memory::measure,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.memory_transaction",
        unit: "MB",
        bound: Bound::AtMost(256.0),
        prepare: Some(memory::prepare_transaction),
        measure: memory::measure_transaction,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
];
