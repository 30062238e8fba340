//! postgres.stream_pg, postgres.stream_duckdb, postgres.stream_cpu: changes that wait in a slot, into the durable log.
//!
//! The floor is `pg_recvlogical`, which writes the same messages of the same transactions to a file, from a slot of its
//! own. Both are timed from connecting to the end of the log.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use shori_core::{Error, ErrorKind, Result};

use super::pipeline::{self, Results};
use super::server::{DATABASE, SOURCE, Server, WAREHOUSE, refused};
use crate::bench::machine::{processor_seconds, processor_seconds_of};
use crate::bench::{Measured, Place};

const CHANGES: u64 = 1_000_000;
const TRANSACTION_ROWS: u64 = 1_000;
/// Between two looks at a process that will have ended soon.
const LOOK: Duration = Duration::from_millis(20);

pub(super) const TABLE: &str = "
create table orders (
    order_id bigint primary key,
    customer_id integer not null,
    amount numeric(18, 2) not null,
    status text not null,
    created_at timestamptz not null
)";

pub(super) fn row(number: &str) -> String {
    format!(
        "{number}, ({number} % 10000)::int, (({number} % 100000) / 100.0)::numeric(18, 2),
        (array['open', 'open', 'paid', 'cancelled'])[1 + {number} % 4],
        '2026-01-01T00:00:00Z'::timestamptz + {number} * interval '1 millisecond'"
    )
}

/// Where the changes are logged.
#[derive(Clone, Copy)]
enum Into {
    Duckdb,
    Postgres,
}

pub(super) fn prepare_duckdb(place: &Place) -> Result<Measured> {
    prepare(place, Into::Duckdb)
}

pub(super) fn prepare_postgres(place: &Place) -> Result<Measured> {
    prepare(place, Into::Postgres)
}

fn prepare(place: &Place, into: Into) -> Result<Measured> {
    let server = Server::make(place, SOURCE)?;
    let warehouse = match into {
        Into::Duckdb => None,
        Into::Postgres => Some(Server::make(place, WAREHOUSE)?),
    };
    let folder = place.fresh(pipeline::FOLDER)?;
    crate::cli::block_on(server.run(&[TABLE]))?;
    // The log takes over the empty table, so that nothing but changes is read.
    pipeline::read(&pipeline::loaded(&folder, &server, &results(warehouse.as_ref()))?)?;
    crate::cli::block_on(async {
        server.run(&["select pg_create_logical_replication_slot('floor', 'pgoutput')"]).await?;
        insert(&server, place.rows(CHANGES)).await
    })?;
    Ok(Measured::default())
}

fn results(warehouse: Option<&Server>) -> Results<'_> {
    warehouse.map_or(Results::LogInDuckdb, Results::LogIn)
}

/// New orders, [`TRANSACTION_ROWS`] at a time.
pub(super) async fn insert(server: &Server, rows: u64) -> Result<()> {
    let client = &server.connect().await?.client;
    let mut first = 0;
    while first < rows {
        let last = (first + TRANSACTION_ROWS).min(rows);
        let insert = format!("insert into orders select {} from generate_series({first}, {}) as n", row("n"), last - 1);
        client.batch_execute(&insert).await.map_err(refused)?;
        first = last;
    }
    client.batch_execute("checkpoint").await.map_err(refused)
}

pub(super) fn measure_duckdb(place: &Place) -> Result<Measured> {
    measure_wall(place, Into::Duckdb)
}

pub(super) fn measure_postgres(place: &Place) -> Result<Measured> {
    measure_wall(place, Into::Postgres)
}

fn measure_wall(place: &Place, into: Into) -> Result<Measured> {
    let Both { ours, floor } = measure(place, into)?;
    let measured = Measured { floor: Some(floor.seconds), ..Measured::new(ours.seconds) };
    let rate = place.rows(CHANGES) as f64 / ours.seconds;
    Ok(measured
        .part("rate_changes_s", rate)
        .part("processor_s", ours.processor)
        .part("floor_processor_s", floor.processor))
}

pub(super) fn measure_processor(place: &Place) -> Result<Measured> {
    let Both { ours, floor } = measure(place, Into::Duckdb)?;
    let measured = Measured { floor: Some(floor.processor), ..Measured::new(ours.processor) };
    Ok(measured.part("seconds_s", ours.seconds).part("floor_seconds_s", floor.seconds))
}

struct Took {
    seconds: f64,
    processor: f64,
}

struct Both {
    ours: Took,
    floor: Took,
}

fn measure(place: &Place, into: Into) -> Result<Both> {
    let server = Server::again(place, SOURCE)?;
    let warehouse = match into {
        Into::Duckdb => None,
        Into::Postgres => Some(Server::again(place, WAREHOUSE)?),
    };
    let floor = receive(place, &server)?;
    let loaded = pipeline::loaded(&place.folder(pipeline::FOLDER), &server, &results(warehouse.as_ref()))?;
    let before = processor_seconds();
    let (changes, seconds) = pipeline::read(&loaded)?;
    let processor = processor_seconds() - before;
    if changes != place.rows(CHANGES) {
        let cause = format!("{changes} changes came of {}", place.rows(CHANGES));
        return Err(Error::new(ErrorKind::Internal, "read", "the slot", cause));
    }
    Ok(Both { ours: Took { seconds, processor }, floor })
}

/// `pg_recvlogical` up to the end of the log; its processor time and that of the process that serves it.
fn receive(place: &Place, server: &Server) -> Result<Took> {
    let fail = |cause: String| Error::new(ErrorKind::Refused, "run", "pg_recvlogical", cause);
    let end: String = crate::cli::block_on(async {
        let client = &server.connect().await?.client;
        let row = client.query_one("select pg_current_wal_lsn()::text", &[]).await.map_err(refused)?;
        Ok(row.get(0))
    })?;
    let file = place.folder(pipeline::FOLDER).join("floor.bin");
    let begun = Instant::now();
    let mut receiver = Command::new(server.program("pg_recvlogical"))
        .args(["-h", "127.0.0.1", "-U", "postgres", "-d", DATABASE, "-p", &server.port().to_string()])
        .args(["--slot", "floor", "--start", "--no-loop", "-o", "proto_version=2", "-o", "binary=true"])
        .args(["-o", &format!("publication_names={}", pipeline::PUBLICATION), "--endpos", &end, "-f"])
        .arg(&file)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|cause| fail(cause.to_string()))?;
    let (mut of_receiver, mut of_sender, mut sender) = (0.0_f64, 0.0_f64, None);
    let status = loop {
        if let Some(status) = receiver.try_wait().map_err(|cause| fail(cause.to_string()))? {
            break status;
        }
        sender = sender.or_else(|| sender_of(server));
        let so_far = |process: u32| processor_seconds_of(&process.to_string()).unwrap_or(0.0);
        // One that has just gone has taken what it had taken before.
        of_receiver = so_far(receiver.id()).max(of_receiver);
        of_sender = sender.map_or(0.0, so_far).max(of_sender);
        std::thread::sleep(LOOK);
    };
    let seconds = begun.elapsed().as_secs_f64();
    if !status.success() {
        return Err(fail(format!("it ended with {status}")));
    }
    Ok(Took { seconds, processor: of_receiver + of_sender })
}

/// The server's process that reads the slot for the floor.
fn sender_of(server: &Server) -> Option<u32> {
    let asked = crate::cli::block_on(async {
        let client = &server.connect().await?.client;
        let query = "select active_pid from pg_replication_slots where slot_name = 'floor' and active";
        let row = client.query_opt(query, &[]).await.map_err(refused)?;
        Ok(row.and_then(|row| row.get::<_, Option<i32>>(0)))
    });
    asked.ok().flatten().map(i32::unsigned_abs)
}
