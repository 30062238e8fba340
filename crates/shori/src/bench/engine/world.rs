//! The large state: 10,000,000 orders and 8,000,000 payments of 10,000 customers over 30 days.
//!
//! The source is written first, without capture, as a database that an application has used for long; then the
//! production pipeline takes it over by its initial snapshot, until every projection of the demo shows it. So log, state,
//! targets and source agree as they do in use, and figures may go on from there.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use chrono::DateTime;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use shori_core::event::{Event, Events};
use shori_core::pipeline::now;
use shori_core::position::Micros;
use shori_core::{Error, ErrorKind, Result};

use crate::bench::drive::{self, source_error};
use crate::bench::machine::peak_resident_mb;
use crate::bench::{Measured, Place};
use crate::config::Loaded;
use crate::{assemble, cli};

const FOLDER: &str = "world";
const ORDERS: u64 = 10_000_000;
const CUSTOMERS: u64 = 10_000;
pub(super) const DAYS: u64 = 30;
/// Of so many orders, one has no payment.
const UNPAID_ONE_IN: u64 = 5;
const DAY_US: i64 = 86_400_000_000;
/// A payment comes so long after its order at most.
const PAID_WITHIN_US: u64 = 600_000_000;
const TRANSACTION_ROWS: u64 = 1_000_000;
const SEGMENTS: [&str; 4] = ["consumer", "business", "enterprise", "public"];

const INSERT_CUSTOMER: &str = "
insert into customers (customer_id, segment, updated_at)
values (?1, ?2, ?3)
";
const INSERT_ORDER: &str = "
insert into orders (order_id, customer_id, amount, status, created_at, updated_at)
values (?1, ?2, ?3, ?4, ?5, ?5)
";
const INSERT_PAYMENT: &str = "
insert into payments (payment_id, order_id, paid_amount, paid_at)
values (?1, ?2, ?3, ?4)
";

/// What the state holds; written when it is complete.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct World {
    pub scale: f64,
    pub orders: u64,
    /// Creation time of the newest order.
    pub end: Micros,
    pub seconds: f64,
    pub peak_resident_mb: f64,
}

impl World {
    pub fn folder(place: &Place) -> PathBuf {
        place.folder(FOLDER)
    }

    pub fn loaded(place: &Place) -> Result<Loaded> {
        Loaded::demo(&Self::folder(place))
    }

    pub fn read(place: &Place) -> Result<Self> {
        let file = Self::folder(place).join("world.json");
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Usage, "use", format!("the benchmark's state in {}", file.display()), cause)
        };
        let text = std::fs::read(&file).map_err(|cause| fail(cause.into()))?;
        serde_json::from_slice(&text).map_err(|cause| fail(cause.into()))
    }

    fn write(&self, place: &Place) -> Result<()> {
        let file = Self::folder(place).join("world.json");
        let fail = |cause: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Refused, "write", format!("file {}", file.display()), cause)
        };
        let text = serde_json::to_vec(self).map_err(|cause| fail(cause.into()))?;
        std::fs::write(&file, text).map_err(|cause| fail(cause.into()))
    }

    /// When order `id` was created: ids rise with time, evenly.
    pub fn created(&self, id: u64) -> Micros {
        let span = i128::from(DAYS) * i128::from(DAY_US);
        let before_end = span * i128::from(self.orders - id.min(self.orders)) / i128::from(self.orders);
        self.end - before_end as Micros
    }
}

/// Whether a complete state of this scale stands in the work folder.
pub(super) fn stands(place: &Place) -> bool {
    World::read(place).is_ok_and(|world| world.scale == place.scale && world.peak_resident_mb > 0.0)
}

/// Writes the source.
pub(super) fn make_source(place: &Place) -> Result<Measured> {
    let begun = Instant::now();
    place.fresh(FOLDER)?;
    let loaded = World::loaded(place)?;
    drive::sample(&loaded)?;
    let world =
        World { scale: place.scale, orders: place.rows(ORDERS), end: now(), seconds: 0.0, peak_resident_mb: 0.0 };
    let connection = drive::open_source(&loaded)?;
    let fill = || {
        connection.pragma_update(None, "journal_mode", "off")?;
        connection.pragma_update(None, "synchronous", "off")?;
        customers(&connection, &world)?;
        orders(&connection, &world)?;
        payments(&connection, &world)?;
        connection.pragma_update(None, "journal_mode", "wal")
    };
    fill().map_err(source_error("fill"))?;
    world.write(place)?;
    eprintln!("  {} orders written in {:.0} s", world.orders, begun.elapsed().as_secs_f64());
    Ok(Measured::new(begun.elapsed().as_secs_f64()))
}

fn customers(connection: &Connection, world: &World) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    let mut statement = transaction.prepare(INSERT_CUSTOMER)?;
    let mut time = TimeText::default();
    for id in 1..=CUSTOMERS {
        let segment = SEGMENTS[mixed(id, 1) as usize % SEGMENTS.len()];
        statement.execute(params![id as i64, segment, time.format(world.created(0))])?;
    }
    drop(statement);
    transaction.commit()
}

fn orders(connection: &Connection, world: &World) -> rusqlite::Result<()> {
    let (mut time, mut amount) = (TimeText::default(), String::new());
    for first in (1..=world.orders).step_by(TRANSACTION_ROWS as usize) {
        let transaction = connection.unchecked_transaction()?;
        let mut statement = transaction.prepare_cached(INSERT_ORDER)?;
        for id in first..=world.orders.min(first + TRANSACTION_ROWS - 1) {
            let customer = mixed(id, 2) % CUSTOMERS + 1;
            let status = match mixed(id, 3) % 10 {
                0..7 => "open",
                7..9 => "paid",
                _ => "cancelled",
            };
            write_amount(id, &mut amount);
            statement.execute(params![id as i64, customer as i64, amount, status, time.format(world.created(id))])?;
        }
        drop(statement);
        transaction.commit()?;
    }
    Ok(())
}

fn payments(connection: &Connection, world: &World) -> rusqlite::Result<()> {
    let (mut time, mut amount, mut payment) = (TimeText::default(), String::new(), 0);
    for first in (1..=world.orders).step_by(TRANSACTION_ROWS as usize) {
        let transaction = connection.unchecked_transaction()?;
        let mut statement = transaction.prepare_cached(INSERT_PAYMENT)?;
        let last = world.orders.min(first + TRANSACTION_ROWS - 1);
        for order in (first..=last).filter(|order| order % UNPAID_ONE_IN != 0) {
            payment += 1;
            let paid = world.created(order) + (mixed(order, 4) % PAID_WITHIN_US) as Micros;
            write_amount(order, &mut amount);
            statement.execute(params![payment, order as i64, amount, time.format(paid)])?;
        }
        drop(statement);
        transaction.commit()?;
    }
    Ok(())
}

/// Takes the source over, as `shori run --once` does.
pub(super) fn make_state(place: &Place) -> Result<Measured> {
    let begun = Instant::now();
    let loaded = World::loaded(place)?;
    let mut world = World::read(place)?;
    let opened = assemble::open(&loaded)?;
    let events = Events::new(move |event| match event {
        Event::Snapshot { capture, rows, done: true } => {
            eprintln!("  {:.0} s: {capture} read, {rows} rows", begun.elapsed().as_secs_f64());
        }
        Event::ProjectionFailed { projection, reason } => eprintln!("  {projection}: {reason}"),
        Event::Projected { projection, rows, took, .. } if *rows > 100_000 => {
            let at = begun.elapsed().as_secs_f64();
            eprintln!("  {at:.0} s: {projection}, {rows} rows in {:.1} s", took.as_secs_f64());
        }
        _ => {}
    });
    let pipeline = assemble::pipeline(&loaded, &opened, true, events)?;
    cli::block_on(pipeline.prepare().run())?;
    world.seconds = begun.elapsed().as_secs_f64();
    world.peak_resident_mb = peak_resident_mb();
    eprintln!("  state made in {:.0} s, peak {:.0} MB", world.seconds, world.peak_resident_mb);
    world.write(place)?;
    Ok(Measured::new(world.seconds))
}

/// An amount between 1.00 and 999.99, always the same for an order.
fn write_amount(order: u64, text: &mut String) {
    let cents = mixed(order, 5) % 99_900 + 100;
    text.clear();
    // Writing to a string cannot fail.
    let _ = write!(text, "{}.{:02}", cents / 100, cents % 100);
}

/// A number that looks random (the finisher of SplitMix64): the same data in every run.
fn mixed(number: u64, purpose: u64) -> u64 {
    let mut bits = number.wrapping_mul(8).wrapping_add(purpose).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Writes times as the sample source holds them. The part up to the minute is kept from call to call.
#[derive(Default)]
pub(super) struct TimeText {
    minute: i64,
    prefix_length: usize,
    text: String,
}

impl TimeText {
    pub fn format(&mut self, time: Micros) -> &str {
        let minute = time.div_euclid(60_000_000);
        if minute != self.minute || self.text.is_empty() {
            self.minute = minute;
            let moment = DateTime::from_timestamp(minute * 60, 0).unwrap_or_default();
            self.text = moment.format("%Y-%m-%dT%H:%M:").to_string();
            self.prefix_length = self.text.len();
        }
        self.text.truncate(self.prefix_length);
        let micros = time.rem_euclid(60_000_000);
        // Writing to a string cannot fail.
        let _ = write!(self.text, "{:02}.{:06}Z", micros / 1_000_000, micros % 1_000_000);
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_spread_over_the_days_before_the_end() {
        let world = World { scale: 1.0, orders: 1_000, end: 40 * DAY_US, seconds: 0.0, peak_resident_mb: 0.0 };
        assert_eq!(world.created(1_000), 40 * DAY_US);
        assert_eq!(world.created(0), 10 * DAY_US);
        assert!((1..1_000).all(|id| world.created(id) < world.created(id + 1)));
    }

    #[test]
    fn times_are_text_with_microseconds() {
        let mut text = TimeText::default();
        assert_eq!(text.format(1_767_323_045_000_007), "2026-01-02T03:04:05.000007Z");
        assert_eq!(text.format(1_767_323_046_123_456), "2026-01-02T03:04:06.123456Z");
        assert_eq!(text.format(0), "1970-01-01T00:00:00.000000Z");
    }
}
