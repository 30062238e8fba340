//! postgres.history_insert, postgres.history_update, postgres.history_update_small: changes that wait in a slot, through the
//! log in another server, into the history there.
//!
//! Timed from the start of the pipeline to the commit of the last version. The floors write the same versions into a table
//! like the history: all in one binary copy; or, a source's transaction at a time, by copy into a temporary table, one
//! statement that closes and one that inserts.

use std::time::Instant;

use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::Client;

use super::pipeline::{self, HISTORY, Results};
use super::server::{SOURCE, Server, WAREHOUSE, refused};
use super::stream::{TABLE, insert, row};
use crate::bench::drive;
use crate::bench::{Measured, Place};
use crate::cli;
use crate::config::Loaded;

const INSERTS: u64 = 1_000_000;
const KEYS: u64 = 200_000;
const UPDATES: u64 = 1_000_000;
const BATCH: u64 = 100_000;
const SMALL_BATCH: u64 = 10_000;

struct Both {
    source: Server,
    warehouse: Server,
}

impl Both {
    fn make(place: &Place) -> Result<Self> {
        let both = Self { source: Server::make(place, SOURCE)?, warehouse: Server::make(place, WAREHOUSE)? };
        place.fresh(pipeline::FOLDER)?;
        cli::block_on(both.source.run(&[TABLE]))?;
        Ok(both)
    }

    fn again(place: &Place) -> Result<Self> {
        Ok(Self { source: Server::again(place, SOURCE)?, warehouse: Server::again(place, WAREHOUSE)? })
    }

    fn loaded(&self, place: &Place) -> Result<Loaded> {
        pipeline::loaded(&place.folder(pipeline::FOLDER), &self.source, &Results::HistoryIn(&self.warehouse))
    }

    /// Changes a second, if so many versions stand afterwards.
    fn measure(&self, place: &Place, changes: u64, versions: u64) -> Result<f64> {
        let loaded = self.loaded(place)?;
        let begun = Instant::now();
        drive::run_once(&loaded)?;
        let rate = changes as f64 / begun.elapsed().as_secs_f64();
        let came = cli::block_on(async {
            let client = &self.warehouse.connect().await?.client;
            number(client, &format!("select count(*) from {HISTORY}")).await
        })?;
        if came != versions {
            let cause = format!("{came} versions came of {versions}");
            return Err(Error::new(ErrorKind::Internal, "read", HISTORY, cause));
        }
        Ok(rate)
    }
}

pub(super) fn prepare_insert(place: &Place) -> Result<Measured> {
    let both = Both::make(place)?;
    // The empty table is taken over, so that nothing but changes is read.
    drive::run_once(&both.loaded(place)?)?;
    cli::block_on(insert(&both.source, place.rows(INSERTS)))?;
    Ok(Measured::default())
}

pub(super) fn measure_insert(place: &Place) -> Result<Measured> {
    let both = Both::again(place)?;
    let rows = place.rows(INSERTS);
    let rate = both.measure(place, rows, rows)?;
    let seconds = cli::block_on(async {
        let floor = Floor::make(&both.warehouse).await?;
        floor.save("versions", "true").await?;
        floor.client().batch_execute("checkpoint").await.map_err(refused)?;
        let begun = Instant::now();
        floor.copy("versions", "floor").await?;
        Ok(begun.elapsed().as_secs_f64())
    })?;
    Ok(Measured { floor: Some(rows as f64 / seconds), ..Measured::new(rate) })
}

pub(super) fn prepare_update(place: &Place) -> Result<Measured> {
    update(place, BATCH)
}

pub(super) fn prepare_update_small(place: &Place) -> Result<Measured> {
    update(place, SMALL_BATCH)
}

pub(super) fn measure_update(place: &Place) -> Result<Measured> {
    measure_batches(place, BATCH)
}

pub(super) fn measure_update_small(place: &Place) -> Result<Measured> {
    measure_batches(place, SMALL_BATCH)
}

/// Each transaction changes as many keys, whichever.
fn update(place: &Place, batch: u64) -> Result<Measured> {
    let both = Both::make(place)?;
    let (keys, batch) = (place.rows(KEYS), place.rows(batch));
    let fill = format!("insert into orders select {} from generate_series(1, {keys}) as n", row("n"));
    cli::block_on(both.source.run(&[&fill, "vacuum analyze orders"]))?;
    drive::run_once(&both.loaded(place)?)?;
    let update = |number: u64| {
        format!(
            "update orders set amount = amount + 1, status = 'batch {number}' where order_id in (
                select order_id from orders order by md5(order_id::text || '/{number}') limit {batch}
            )"
        )
    };
    let updates: Vec<String> = (0..place.rows(UPDATES) / batch).map(update).collect();
    let mut statements: Vec<&str> = updates.iter().map(String::as_str).collect();
    statements.push("checkpoint");
    cli::block_on(async {
        both.source.run(&statements).await?;
        both.warehouse.run(&[&format!("vacuum analyze {HISTORY}"), "checkpoint"]).await
    })?;
    Ok(Measured::default())
}

fn measure_batches(place: &Place, batch: u64) -> Result<Measured> {
    let both = Both::again(place)?;
    let batch = place.rows(batch);
    let changes = place.rows(UPDATES) / batch * batch;
    let rate = both.measure(place, changes, place.rows(KEYS) + changes)?;
    let seconds = cli::block_on(replay(&both.warehouse))?;
    Ok(Measured { floor: Some(changes as f64 / seconds), ..Measured::new(rate) })
}

/// The same versions once more, by bare statements.
async fn replay(warehouse: &Server) -> Result<f64> {
    let floor = Floor::make(warehouse).await?;
    let client = floor.client();
    let query = format!("select distinct valid_from::text from {HISTORY} order by 1");
    let times = client.query(&query, &[]).await.map_err(refused)?;
    let times: Vec<String> = times.iter().map(|row| row.get(0)).collect();
    for (index, time) in times.iter().enumerate() {
        floor.save(&format!("batch{index}"), &format!("valid_from = '{time}'")).await?;
    }
    floor.copy("batch0", "floor").await?;
    let open = "update floor set is_current = true, valid_to = null";
    client.batch_execute(open).await.map_err(refused)?;
    client.batch_execute("vacuum full analyze floor").await.map_err(refused)?;
    client.batch_execute("checkpoint").await.map_err(refused)?;
    let columns = &floor.columns;
    let opened = columns.replace("valid_to", "null").replace("is_current", "true");
    // Else the planner reads the whole table for each of the small batches.
    client.batch_execute("set enable_seqscan = off; set jit = off").await.map_err(refused)?;
    let begun = Instant::now();
    for index in 1..times.len() {
        let begin = format!(
            "begin; create temporary table loaded (like {HISTORY}) on commit drop; alter table loaded alter surrogate_key drop not null"
        );
        client.batch_execute(&begin).await.map_err(refused)?;
        floor.copy(&format!("batch{index}"), "loaded").await?;
        let bring_in = format!(
            "analyze loaded;
            update floor as t set valid_to = l.valid_from, is_current = false, updated_at = l.created_at
            from loaded as l where t.is_current and t.order_key = l.order_key;
            insert into floor ({columns}) select {opened} from loaded;
            commit"
        );
        client.batch_execute(&bring_in).await.map_err(refused)?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// A table like the history, and files of versions in the server's folder.
struct Floor<'a> {
    session: shori_postgres::Session,
    server: &'a Server,
    /// All but the key that the table gives itself.
    columns: String,
}

impl<'a> Floor<'a> {
    async fn make(server: &'a Server) -> Result<Self> {
        let session = server.connect().await?;
        let make = format!("create table floor (like {HISTORY} including all)");
        session.client.batch_execute(&make).await.map_err(refused)?;
        let query = "
            select string_agg(attname, ', ' order by attnum)
            from pg_attribute
            where attrelid = 'floor'::regclass and attnum > 0 and not attisdropped and attname <> 'surrogate_key'";
        let columns = session.client.query_one(query, &[]).await.map_err(refused)?.get(0);
        Ok(Self { session, server, columns })
    }

    fn client(&self) -> &Client {
        &self.session.client
    }

    fn file(&self, name: &str) -> String {
        format!("'{}'", self.server.folder().join(name).display())
    }

    async fn save(&self, name: &str, condition: &str) -> Result<()> {
        let copy = format!(
            "copy (select {} from {HISTORY} where {condition}) to {} (format binary)",
            self.columns,
            self.file(name)
        );
        self.client().batch_execute(&copy).await.map_err(refused)
    }

    async fn copy(&self, name: &str, table: &str) -> Result<()> {
        let copy = format!("copy {table} ({}) from {} (format binary)", self.columns, self.file(name));
        self.client().batch_execute(&copy).await.map_err(refused)
    }
}

async fn number(client: &Client, query: &str) -> Result<u64> {
    let row = client.query_one(&format!("select ({query})::bigint"), &[]).await.map_err(refused)?;
    Ok(row.get::<_, i64>(0).unsigned_abs())
}
