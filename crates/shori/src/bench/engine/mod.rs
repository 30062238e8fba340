//! Suite `engine`: the embedded pipeline, SQLite to DuckDB.
//!
//! [`world`] is the large state that most figures share; [`flow`] is a whole pipeline under load.

mod backlog;
mod demo_build;
mod flow;
mod freshness;
mod history;
mod memory;
mod refresh;
mod start;
mod world;

use super::{Bound, Figure, Suite};

pub(super) const SUITE: Suite = Suite {
    name: "engine",
    figures: FIGURES,
    shared: &[("engine.world/source", world::make_source), ("engine.world/state", world::make_state)],
    shared_stands: world::stands,
    helpers: &[("engine.start/first_poll", start::first_poll)],
};

const RATE: &str = "changes/s";
const SECONDS: &str = "s";
const MEGABYTES: &str = "MB";

/// In the order that they are measured in: what adds to the shared state comes after what wants it at rest.
const FIGURES: &[Figure] = &[
    Figure {
        name: "engine.backlog",
        unit: RATE,
        bound: Bound::AtLeast(150_000.0),
        prepare: Some(backlog::prepare),
        measure: backlog::measure,
        folder: backlog::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "engine.history",
        unit: RATE,
        bound: Bound::AtLeast(150_000.0),
        prepare: Some(history::prepare),
        measure: history::measure,
        folder: history::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "engine.memory_transaction",
        unit: MEGABYTES,
        bound: Bound::AtMost(512.0),
        prepare: Some(memory::prepare_transaction),
        measure: memory::measure_transaction,
        folder: memory::FOLDER,
        shared: false,
        on_request: false,
    },
    Figure {
        name: "engine.start",
        unit: SECONDS,
        bound: Bound::AtMost(1.0),
        prepare: None,
        measure: start::measure,
        folder: "",
        shared: true,
        on_request: false,
    },
    Figure {
        name: "engine.refresh_recent",
        unit: SECONDS,
        bound: Bound::RatioAtMost(0.10),
        prepare: None,
        measure: refresh::measure_recent,
        folder: "",
        shared: true,
        on_request: false,
    },
    Figure {
        name: "engine.refresh_random",
        unit: SECONDS,
        bound: Bound::RatioAtMost(0.30),
        prepare: None,
        measure: refresh::measure_random,
        folder: "",
        shared: true,
        on_request: false,
    },
    Figure {
        name: "engine.freshness",
        unit: "ms",
        bound: Bound::AtMost(500.0),
        prepare: None,
        measure: freshness::measure,
        folder: "",
        shared: true,
        on_request: false,
    },
    Figure {
        name: "engine.memory_state",
        unit: MEGABYTES,
        bound: Bound::AtMost(512.0),
        prepare: None,
        measure: memory::measure_state,
        folder: "",
        shared: true,
        on_request: false,
    },
    Figure {
        name: "engine.demo_build",
        unit: SECONDS,
        bound: Bound::AtMost(720.0),
        prepare: None,
        measure: demo_build::measure,
        folder: demo_build::FOLDER,
        shared: false,
        on_request: true,
    },
];
