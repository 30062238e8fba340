//! The pipeline that is measured: one table of the benchmark's server, and what is made of it.

use std::path::Path;
use std::time::Instant;

use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use shori_core::event::Events;
use shori_core::{Error, ErrorKind, Result};

use super::server::{DATABASE, Server};
use crate::bench::drive;
use crate::config::Loaded;
use crate::{assemble, cli};

pub(super) const FOLDER: &str = "pipeline";
pub(super) const PUBLICATION: &str = "bench";

/// What is made of the changes.
pub(super) enum Results<'a> {
    LogInDuckdb,
    LogIn(&'a Server),
    /// With the log there, too.
    HistoryIn(&'a Server),
}

pub(super) const HISTORY: &str = "dim_orders_history";

const IN_DUCKDB: &str = "
[[store]]
name = \"log\"
kind = \"duckdb\"
path = \"log.duckdb\"
";

const PROJECTION: &str = "
[[projection]]
name = \"dim_orders_history\"
kind = \"history\"
table = \"orders\"
key = [\"order_key\"]
";

pub(super) fn loaded(folder: &Path, source: &Server, results: &Results<'_>) -> Result<Loaded> {
    let file = folder.join("shori.toml");
    let server = |server: &Server| {
        format!(
            "server = {{ host = \"127.0.0.1\", port = {}, database = \"{DATABASE}\", user = \"postgres\" }}",
            server.port()
        )
    };
    let store = |warehouse| format!("[[store]]\nname = \"warehouse\"\nkind = \"postgres\"\n{}\n", server(warehouse));
    let results = match results {
        Results::LogInDuckdb => IN_DUCKDB.to_string(),
        Results::LogIn(warehouse) => store(warehouse),
        Results::HistoryIn(warehouse) => format!("{}{PROJECTION}", store(warehouse)),
    };
    let text = format!(
        "[pipeline]
        name = \"bench\"

        [[source]]
        name = \"bench\"
        kind = \"postgres\"
        {}
        publication = \"{PUBLICATION}\"
        slot = \"shori\"
        tables.orders = {{}}

        [memory]
        limit_mib = 96
        {results}",
        server(source)
    );
    std::fs::write(&file, text)
        .map_err(|cause| Error::new(ErrorKind::Refused, "write", file.display().to_string(), cause))?;
    Loaded::from_file(&file)
}

/// Reads everything that the source holds into the log. Returns the changes, rows of snapshots left out, and the seconds
/// from connecting to the last commit.
pub(super) fn read(loaded: &Loaded) -> Result<(u64, f64)> {
    let opened = assemble::open(loaded)?;
    let pipeline = assemble::pipeline(loaded, &opened, true, Events::nowhere())?;
    cli::block_on(async {
        pipeline.staging.bootstrap().await?;
        let begun = Instant::now();
        let changes = drive::ingest(loaded, &pipeline).await?;
        Ok((changes, begun.elapsed().as_secs_f64()))
    })
}

pub(super) fn rows_in_log(loaded: &Loaded) -> Result<u64> {
    let opened = assemble::open(loaded)?;
    let batches = cli::block_on(async { opened.staging.query("select count(*) from stg_cdc_orders").await })?;
    let count = batches.first().map(|batch| batch.column(0).as_primitive::<Int64Type>().value(0));
    Ok(count.unwrap_or(0).unsigned_abs())
}
