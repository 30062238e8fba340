//! Results held in memory: every step looks for many of their rows and changes them.
//!
//! Rows that change lie anywhere in a result, so writing each to its place would write most of a table's pages. In the
//! file, what a step changed is added to the end of a log instead. When as much was added as the result takes, the log is
//! written anew; when the result is held no more, its rows go into its table. Each row of the log holds some keys, each as
//! its number or its bytes, and their rows, as cells.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arrow::datatypes::DataType;
use rusqlite::Connection;
use shori_core::Result;

use super::cells::{Cells, write_cell, write_number};
use super::file::{self, execute, failure};
use super::key::Key;
use super::results::{self, Keeper, KeptRow, Row};
use super::rows::blob;

/// All results that are held, at most.
const HELD_BYTES_MAX: usize = 40 << 20;
/// What a row takes beside its bytes: its place in the map, and what the allocator adds.
const ROW_BYTES: usize = 96;
/// About what a row of the log holds at most.
const ENTRY_BYTES: usize = 1 << 20;

/// A result, all of it.
pub(super) struct HeldResult {
    number: i64,
    rows: HashMap<Key, Row>,
    bytes: usize,
    /// Added to the log since it was last written anew.
    added: usize,
}

/// How a step goes into the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    Added,
    /// The log is written anew.
    Anew,
    /// All goes into the table: it is too large to be held.
    IntoTable,
}

impl HeldResult {
    /// None where there is no result in the file, or it takes more than `most`.
    fn load(connection: &Connection, projection: &str, most: usize) -> Result<Option<Self>> {
        let Some(number) = results::number_of(connection, projection)? else { return Ok(None) };
        let mut held = Self { number, rows: HashMap::new(), bytes: 0, added: 0 };
        let reading = |cause| failure("read", cause);
        let logged = file::number(connection, "select sum(length(rows)) from result_log where number = ?", &[&number])?;
        let mut all = connection.prepare_cached(&format!("select k, v from result_{number}")).map_err(reading)?;
        let mut rows = all.query([]).map_err(reading)?;
        while let Some(row) = rows.next().map_err(reading)? {
            held.put(row.get(0).map_err(reading)?, Some(blob(row, 1)?.into()));
            // What was logged is nowhere but here.
            if held.bytes > most && logged == 0 {
                return Ok(None);
            }
        }
        let sql = "select rows from result_log where number = ? order by id";
        let mut log = connection.prepare_cached(sql).map_err(reading)?;
        let mut entries = log.query([number]).map_err(reading)?;
        while let Some(entry) = entries.next().map_err(reading)? {
            held.read_entry(blob(entry, 0)?)?;
        }
        held.added = usize::try_from(logged).unwrap_or_default();
        Ok(Some(held))
    }

    fn put(&mut self, key: Key, row: Option<Row>) {
        let key_bytes = key.heap_bytes() + ROW_BYTES;
        self.bytes += row.as_ref().map_or(0, |row| row.len() + key_bytes);
        let before = match row {
            Some(row) => self.rows.insert(key, row),
            None => self.rows.remove(&key),
        };
        self.bytes -= before.map_or(0, |row| row.len() + key_bytes);
    }

    pub fn find(&self, key: &Key) -> Option<&[u8]> {
        self.rows.get(key).map(|row| &**row)
    }

    /// Brings rows into the file; within a transaction, at whose end they are [taken](HeldResults::take).
    pub fn write(&self, connection: &Connection, rows: &[KeptRow], way: Way) -> Result<()> {
        let changed = rows.iter().map(|(key, row)| (key, row.as_deref()));
        if way == Way::Added {
            return self.log(connection, changed);
        }
        self.clear(connection)?;
        let mut last: HashMap<&Key, Option<&[u8]>> = changed.collect();
        let mut all: Vec<_> =
            self.rows.iter().map(|(key, row)| last.remove_entry(key).unwrap_or((key, Some(&**row)))).collect();
        all.extend(last);
        all.retain(|(_, row)| row.is_some());
        if way == Way::Anew {
            return self.log(connection, all.into_iter());
        }
        all.sort_unstable_by_key(|(key, _)| *key);
        let mut keeper = Keeper::new(connection, &format!("result_{}", self.number))?;
        all.into_iter().try_for_each(|(key, row)| keeper.keep(key, row))
    }

    /// Nothing of it stays in the file.
    fn clear(&self, connection: &Connection) -> Result<()> {
        file::run(connection, &format!("delete from result_{}", self.number))?;
        execute(connection, "delete from result_log where number = ?", &[&self.number]).map(|_| ())
    }

    fn log<'r>(
        &self,
        connection: &Connection,
        mut rows: impl Iterator<Item = (&'r Key, Option<&'r [u8]>)>,
    ) -> Result<()> {
        loop {
            let mut entry = Vec::new();
            for (key, row) in rows.by_ref() {
                write_key(key, &mut entry);
                write_cell(&mut entry, row);
                if entry.len() >= ENTRY_BYTES {
                    break;
                }
            }
            if entry.is_empty() {
                return Ok(());
            }
            execute(connection, "insert into result_log (number, rows) values (?, ?)", &[&self.number, &entry])?;
        }
    }

    fn read_entry(&mut self, entry: &[u8]) -> Result<()> {
        let mut cells = Cells(entry);
        while !cells.0.is_empty() {
            let (number, bytes, row) = (cells.next()?, cells.next()?, cells.next()?);
            let key = match number {
                Some(_) => Key::of_one(&DataType::Int64, number)?,
                None => Key::Bytes(bytes.unwrap_or_default().into()),
            };
            self.put(key, row.map(Row::from));
        }
        Ok(())
    }

    fn take(&mut self, rows: Vec<KeptRow>, way: Way) {
        self.added = if way == Way::Added { self.added + logged_bytes(&rows) } else { 0 };
        rows.into_iter().for_each(|(key, row)| self.put(key, row));
    }

    /// Whether the table is not all there is of a result.
    pub fn is_logged(connection: &Connection, projection: &str) -> Result<bool> {
        let Some(number) = results::number_of(connection, projection)? else { return Ok(false) };
        let sql = "select exists (select 1 from result_log where number = ?)";
        Ok(file::number(connection, sql, &[&number])? > 0)
    }

    /// What was logged of a result means nothing any more; within a transaction.
    pub fn drop_log(connection: &Connection, projection: &str) -> Result<()> {
        let Some(number) = results::number_of(connection, projection)? else { return Ok(()) };
        execute(connection, "delete from result_log where number = ?", &[&number]).map(|_| ())
    }
}

/// Two cells, one of them null.
fn write_key(key: &Key, out: &mut Vec<u8>) {
    match key {
        Key::Number(number) => {
            write_number(*number, out);
            write_cell(out, None);
        }
        Key::Bytes(bytes) => {
            write_cell(out, None);
            write_cell(out, Some(bytes));
        }
    }
}

/// About what the log takes for `rows`.
fn logged_bytes(rows: &[KeptRow]) -> usize {
    rows.iter().map(|(key, row)| key.heap_bytes() + row.as_ref().map_or(0, |row| row.len()) + 8).sum()
}

#[derive(Default)]
pub(super) struct HeldResults {
    results: BTreeMap<Arc<str>, HeldResult>,
    /// Those for which there was no room.
    too_large: BTreeSet<Arc<str>>,
}

impl HeldResults {
    pub fn get(&self, projection: &str) -> Option<&HeldResult> {
        self.results.get(projection)
    }

    /// How rows that a step changed go into the file.
    pub fn way(&self, result: &HeldResult, rows: &[KeptRow]) -> Way {
        match result.added + logged_bytes(rows) > result.bytes {
            _ if self.bytes() > HELD_BYTES_MAX => Way::IntoTable,
            true => Way::Anew,
            false => Way::Added,
        }
    }

    fn bytes(&self) -> usize {
        self.results.values().map(|held| held.bytes).sum()
    }

    /// The projection's result, read from the file if it is not held; none where there is no room for it.
    pub fn load(&mut self, connection: &Connection, projection: &str) -> Result<Option<&HeldResult>> {
        if !self.results.contains_key(projection) && !self.too_large.contains(projection) {
            match HeldResult::load(connection, projection, HELD_BYTES_MAX.saturating_sub(self.bytes()))? {
                Some(held) => drop(self.results.insert(projection.into(), held)),
                None => drop(self.too_large.insert(projection.into())),
            }
        }
        Ok(self.results.get(projection))
    }

    /// Takes rows over that were written this way.
    pub fn take(&mut self, projection: &str, rows: Vec<KeptRow>, way: Way) {
        if way == Way::IntoTable {
            self.results.remove(projection);
            self.too_large.insert(projection.into());
        } else if let Some(held) = self.results.get_mut(projection) {
            held.take(rows, way);
        }
    }

    pub fn let_go(&mut self, projection: &str) {
        self.results.remove(projection);
        self.too_large.remove(projection);
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::file::StateFile;
    use super::*;

    fn random_key(rng: &mut ChaCha8Rng) -> Key {
        let number: i64 = rng.random_range(-40..40);
        match rng.random() {
            true => Key::Number(number),
            false => Key::Bytes(vec![0; number.unsigned_abs() as usize % 9].into()),
        }
    }

    fn shown(held: &HeldResult) -> BTreeMap<Key, Row> {
        held.rows.iter().map(|(key, row)| (key.clone(), row.clone())).collect()
    }

    /// Whenever it is lost, it comes back, and the log stays in proportion.
    #[test]
    fn what_was_taken_comes_back_from_table_and_log() {
        let folder = tempfile::tempdir().unwrap();
        let (_, file) = StateFile::open(&folder.path().join("state.sqlite")).unwrap();
        let of_result = "insert into results values (1, 'p', '', '[]'), (2, 'q', '', '[]');
             create table result_1 (k primary key, v blob) without rowid;
             create table result_2 (k primary key, v blob) without rowid";
        file.execute_batch(of_result).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut held, mut model) = (HeldResults::default(), BTreeMap::new());
        let (mut ways, mut most) = ([0; 3], 0);
        for turn in 0..500 {
            held.load(&file, "p").unwrap();
            let result = held.get("p").unwrap();
            assert_eq!(shown(result), model, "turn {turn}");
            let bytes: usize = model.iter().map(|(key, row)| key.heap_bytes() + row.len() + ROW_BYTES).sum();
            assert_eq!(result.bytes, bytes, "turn {turn}");
            most = most.max(bytes);
            let logged = |sql| usize::try_from(file::number(&file, sql, &[]).unwrap()).unwrap();
            let logged = || logged("select sum(length(rows)) from result_log");
            assert!(logged() <= 2 * most, "turn {turn}: {} for a result of {most}", logged());
            let mut rows = BTreeMap::new();
            for _ in 0..rng.random_range(0..6) {
                let length = rng.random_range(0..200);
                rows.insert(random_key(&mut rng), rng.random_bool(0.7).then(|| Row::from(vec![turn as u8; length])));
            }
            let rows: Vec<KeptRow> = rows.into_iter().collect();
            let way = match rng.random_bool(0.02) {
                true => Way::IntoTable,
                false => held.way(result, &rows),
            };
            ways[way as usize] += 1;
            result.write(&file, &rows, way).unwrap();
            assert!(way != Way::IntoTable || logged() == 0, "turn {turn}");
            match rng.random() {
                true => held.take("p", rows.clone(), way),
                false => held.let_go("p"),
            }
            assert_eq!(held.load(&file, "p").unwrap().is_none(), held.too_large.contains("p"));
            held.too_large.clear();
            for (key, row) in rows {
                match row {
                    Some(row) => drop(model.insert(key, row)),
                    None => drop(model.remove(&key)),
                }
            }
        }
        assert!(ways.iter().all(|count| *count > 4), "{ways:?}");
        HeldResult::drop_log(&file, "q").unwrap();
        assert!(shown(held.load(&file, "q").unwrap().unwrap()).is_empty(), "another's log means nothing to it");
        held.clear();
        assert_eq!(shown(held.load(&file, "p").unwrap().unwrap()), model);
    }
}
