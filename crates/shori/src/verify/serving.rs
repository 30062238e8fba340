//! The tables to be verified, as they are served, and how far they say they have come.
//!
//! Of what the store says of itself, only the checkpoints are taken: they say what the rows claim to be.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, TimeUnit};
use duckdb::Connection;
use shori_core::{Error, ErrorKind, Result};

use super::scratch::{Scratch, quote_name, quote_text, scratch_error};
use super::{ProjectionInput, VerifyInput};
use crate::config::StoreKind;
use crate::stores::duckdb_type;

/// How often a projection is read again because it moved meanwhile.
const READS_MAX: usize = 5;
/// Time between two looks at a checkpoint.
const CATCH_UP_POLL: Duration = Duration::from_millis(100);

/// Reads the store that serves the projections: the file itself, or the process that has it open.
pub trait Serving {
    /// Reads are of this store from here on; where there is one only, it is that.
    fn choose(&mut self, _store: &str) -> Result<()> {
        Ok(())
    }

    /// The kind of the chosen store.
    fn kind(&self) -> StoreKind {
        StoreKind::Duckdb
    }

    /// Columns of a table of the chosen store, with DuckDB's names of their types.
    fn describe(&mut self, table: &str) -> Result<Vec<[String; 2]>> {
        let table = quote_name(table);
        if self.kind() == StoreKind::Duckdb {
            let described = self.query(&format!("describe select * from {table}"))?;
            return described.iter().map(texts::<2>).collect::<Result<Vec<_>>>().map(|rows| rows.concat());
        }
        let empty = self.query(&format!("select * from {table} limit 0"))?;
        let fields = empty.iter().take(1).flat_map(|batch| batch.schema().fields().iter().cloned().collect::<Vec<_>>());
        fields.map(|field| Ok([field.name().clone(), duckdb_type(field.data_type())?])).collect()
    }

    /// Told once, before projections that are behind the source are waited for.
    fn waits(&mut self, _projections: &[&str]) {}

    /// The rows of a query, part by part, in memory that does not grow with them.
    fn scan(&mut self, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()>;

    /// The rows of a query, all at once: for few rows.
    fn query(&mut self, sql: &str) -> Result<Vec<RecordBatch>> {
        let mut batches = Vec::new();
        self.scan(sql, &mut |batch| {
            batches.push(batch);
            Ok(())
        })?;
        Ok(batches)
    }

    /// From here to [`release`](Serving::release), all reads see one state, where the store can do that. Where it
    /// cannot, a projection that moved while it was read is read again.
    fn hold(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Serving for Connection {
    fn scan(&mut self, sql: &str, take: &mut dyn FnMut(RecordBatch) -> Result<()>) -> Result<()> {
        let fail = |cause| scratch_error("read", sql, cause);
        let mut statement = self.prepare(sql).map_err(fail)?;
        // The stream's iterator panics on an error; stepping returns it.
        drop(statement.stream_arrow([]).map_err(fail)?);
        while let Some(part) = statement.step().map_err(fail)? {
            take(RecordBatch::from(&part))?;
        }
        Ok(())
    }

    fn hold(&mut self) -> Result<()> {
        self.execute_batch("begin transaction").map_err(|cause| scratch_error("read", "the serving database", cause))
    }

    fn release(&mut self) -> Result<()> {
        self.execute_batch("rollback").map_err(|cause| scratch_error("release", "the serving database", cause))
    }
}

/// The newest change of each table, by id, that a projection has consumed.
pub(super) type Checkpoint = BTreeMap<String, u64>;

/// Waits until all projections hold the change `head`, for `at_most`; that some do not is no error. What has failed is not
/// waited for: it comes no further.
pub(super) fn wait(serving: &mut dyn Serving, input: &VerifyInput, head: u64) -> Result<()> {
    let deadline = Instant::now() + input.catch_up;
    let mut behind: Vec<_> = input.projections.iter().collect();
    let mut told = false;
    while Instant::now() < deadline {
        let mut still = Vec::new();
        for projection in behind {
            serving.choose(&projection.store)?;
            let checkpoint = read_checkpoint(serving, projection)?;
            let is_there = checkpoint.is_some_and(|checkpoint| checkpoint.values().all(|id| *id >= head));
            if !is_there
                && failure(serving, projection).is_none()
                && standing_still(serving, input, projection)?.is_empty()
            {
                still.push(projection);
            }
        }
        behind = still;
        if behind.is_empty() {
            return Ok(());
        }
        if !told {
            serving.waits(&behind.iter().map(|projection| projection.name.as_str()).collect::<Vec<_>>());
            told = true;
        }
        thread::sleep(CATCH_UP_POLL);
    }
    Ok(())
}

/// Why a projection has failed, as the store tells it. Nothing is compared with that.
pub(super) fn failure(serving: &mut dyn Serving, projection: &ProjectionInput) -> Option<String> {
    let query = format!(
        "
        select coalesce(last_error, '')
        from ctl_projection_metadata
        where status = 'ERROR' and projection_name = {}
        ",
        quote_text(&projection.name)
    );
    first_texts(serving, &query).into_iter().next()
}

/// The tables of a projection whose capture stands still.
pub(super) fn standing_still(
    serving: &mut dyn Serving,
    input: &VerifyInput,
    projection: &ProjectionInput,
) -> Result<Vec<String>> {
    serving.choose(&input.staging)?;
    let query = format!(
        "
        select capture_instance
        from ctl_ingestion_watermarks
        where failed_reason is not null and source_name = {}
        ",
        quote_text(&input.source_name)
    );
    let captures = first_texts(serving, &query);
    serving.choose(&projection.store)?;
    let tables = projection.tables().into_iter();
    let fails = |table: &&str| captures.iter().any(|capture| capture.rsplit('/').next() == Some(table));
    Ok(tables.filter(fails).map(String::from).collect())
}

/// Empty where the store does not tell.
fn first_texts(serving: &mut dyn Serving, query: &str) -> Vec<String> {
    let batches = serving.query(query).unwrap_or_default();
    let rows = batches.iter().filter_map(|batch| texts::<1>(batch).ok()).flatten();
    rows.map(|[text]| text).collect()
}

/// Copies the projection's rows to `found.<projection>`; returns the checkpoint that they stand at, none where it has not
/// been built.
pub(super) fn load(
    serving: &mut dyn Serving,
    scratch: &Scratch,
    projection: &ProjectionInput,
) -> Result<Option<Checkpoint>> {
    serving.choose(&projection.store)?;
    for _ in 0..READS_MAX {
        serving.hold()?;
        let loaded = load_once(serving, scratch, projection);
        serving.release()?;
        match loaded? {
            Read::At(checkpoint) => return Ok(Some(checkpoint)),
            Read::NotBuilt => return Ok(None),
            Read::Moved => {}
        }
    }
    let object = format!("projection {}", projection.name);
    Err(Error::new(ErrorKind::Unavailable, "verify", object, "it moved on whenever it was read")
        .with_remedy("verify while there are fewer changes"))
}

enum Read {
    At(Checkpoint),
    NotBuilt,
    Moved,
}

fn load_once(serving: &mut dyn Serving, scratch: &Scratch, projection: &ProjectionInput) -> Result<Read> {
    let Some(checkpoint) = read_checkpoint(serving, projection)? else { return Ok(Read::NotBuilt) };
    let table = quote_name(&projection.name);
    scratch.execute(&format!("drop table if exists found.{table}"))?;
    // An empty answer has no batch that tells the columns: the description does.
    let columns = serving.describe(&projection.name)?;
    let definitions: Vec<_> =
        columns.iter().map(|[name, data_type]| format!("{} {data_type}", quote_name(name))).collect();
    scratch.execute(&format!("create table found.{table} ({})", definitions.join(", ")))?;
    serving.scan(&format!("select * from {table}"), &mut |batch| {
        check_types(&batch, &projection.name)?;
        scratch.append("found", &projection.name, batch)
    })?;
    let after = read_checkpoint(serving, projection)?;
    Ok(if after.as_ref() == Some(&checkpoint) { Read::At(checkpoint) } else { Read::Moved })
}

/// None where the projection has not been built.
fn read_checkpoint(serving: &mut dyn Serving, projection: &ProjectionInput) -> Result<Option<Checkpoint>> {
    let object = || format!("projection {}", projection.name);
    // A position without a sequence stands before its change.
    let query = format!(
        "
        select capture_instance, {}, {}
        from ctl_projection_checkpoints
        where projection_name = {}
        ",
        serving.kind().hex("last_consumed_lsn"),
        serving.kind().hex("last_seq"),
        quote_text(&projection.name)
    );
    let mut stored = BTreeMap::new();
    for batch in serving.query(&query)? {
        for [capture, lsn, seq] in texts(&batch)? {
            let id = if lsn.is_empty() { Ok(0) } else { u64::from_str_radix(&lsn, 16) };
            let id = id.map_err(|cause| Error::new(ErrorKind::Corrupt, "read the checkpoint of", object(), cause))?;
            stored.insert(capture, if seq.is_empty() { id.saturating_sub(1) } else { id });
        }
    }
    let mut checkpoint = Checkpoint::new();
    for table in projection.tables() {
        // Where there are several sources, the capture's name is behind that of its source.
        let found = stored.iter().find(|(capture, _)| capture.rsplit('/').next() == Some(table));
        let Some((_, id)) = found else { return Ok(None) };
        checkpoint.insert(table.to_string(), *id);
    }
    Ok(Some(checkpoint))
}

/// The first columns of a batch.
fn texts<const COLUMNS: usize>(batch: &RecordBatch) -> Result<Vec<[String; COLUMNS]>> {
    let misfit = || Error::new(ErrorKind::Internal, "read", "the serving database", "a column is no text");
    let mut columns = Vec::with_capacity(COLUMNS);
    for index in 0..COLUMNS {
        let array = batch.columns().get(index).and_then(|array| array.as_string_opt::<i32>());
        columns.push(array.ok_or_else(misfit)?);
    }
    let value = |row: usize| std::array::from_fn(|column| columns[column].value(row).to_string());
    Ok((0..batch.num_rows()).map(value).collect())
}

/// The appender takes fewer types than DuckDB has.
fn check_types(batch: &RecordBatch, projection: &str) -> Result<()> {
    for field in batch.schema().fields() {
        let taken = match field.data_type() {
            DataType::Timestamp(unit, _) => *unit == TimeUnit::Microsecond,
            DataType::List(_) | DataType::Struct(_) | DataType::Map(_, _) | DataType::Union(_, _) => false,
            _ => true,
        };
        if !taken {
            let object = format!("column {} of projection {projection}", field.name());
            return Err(Error::new(ErrorKind::Refused, "verify", object, format!("its type is {}", field.data_type())));
        }
    }
    Ok(())
}
