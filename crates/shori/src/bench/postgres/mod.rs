//! Suite `postgres`: a PostgreSQL source, its log and its history.
//!
//! [`server`] is a database server, [`pipeline`] what reads it.

mod freshness;
mod history;
mod memory;
mod pipeline;
mod server;
mod snapshot;
mod stream;

use super::{Bound, Figure, Suite};

pub(super) const SUITE: Suite = Suite {
    name: "postgres",
    figures: FIGURES,
    shared: &[],
    shared_stands: |_| true,
    helpers: &[(freshness::WRITE, freshness::write)],
};

const FIGURES: &[Figure] = &[
    Figure {
        name: "postgres.stream_pg",
        unit: "s",
        bound: Bound::RatioAtMost(2.0),
        prepare: Some(stream::prepare_postgres),
        measure: stream::measure_postgres,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.stream_duckdb",
        unit: "s",
        bound: Bound::RatioAtMost(1.5),
        prepare: Some(stream::prepare_duckdb),
        measure: stream::measure_duckdb,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.stream_cpu",
        unit: "s",
        bound: Bound::RatioAtMost(1.0),
        prepare: Some(stream::prepare_duckdb),
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
        name: "postgres.history_insert",
        unit: "changes/s",
        bound: Bound::RatioAtLeast(0.25),
        prepare: Some(history::prepare_insert),
        measure: history::measure_insert,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.history_update",
        unit: "changes/s",
        bound: Bound::RatioAtLeast(0.5),
        prepare: Some(history::prepare_update),
        measure: history::measure_update,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.history_update_small",
        unit: "changes/s",
        bound: Bound::RatioAtLeast(0.5),
        prepare: Some(history::prepare_update_small),
        measure: history::measure_update_small,
        folder: pipeline::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "postgres.freshness",
        unit: "ms",
        bound: Bound::AtMost(500.0),
        prepare: Some(freshness::prepare),
        measure: freshness::measure,
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
