//! Rows of a table in the state file: written by a step, found by key or by what a column holds.

use rusqlite::{CachedStatement, Connection, OptionalExtension, params};
use shori_core::position::Micros;
use shori_core::{Error, Result};

use super::advance::{Entry, Row, Version};
use super::cells::{Cell, Cells};
use super::file::failure;
use super::key::Key;
use super::tables::{CaptureNumber, Head, Table};

/// What a step needs to read and write of one table.
pub(super) struct Writer<'c> {
    connection: &'c Connection,
    table: &'c Table,
    get: CachedStatement<'c>,
    put: CachedStatement<'c>,
    delete: CachedStatement<'c>,
    tombs: Option<Tombs<'c>>,
    net: CachedStatement<'c>,
    version: CachedStatement<'c>,
    indexes: Vec<IndexWriter<'c>>,
    buffer: Vec<u8>,
}

/// What is kept of keys for their versions' sake.
struct Tombs<'c> {
    get: CachedStatement<'c>,
    note: CachedStatement<'c>,
    noted: CachedStatement<'c>,
    put: CachedStatement<'c>,
    delete: CachedStatement<'c>,
    /// None stands yet: nothing has to be looked for.
    is_empty: bool,
}

struct IndexWriter<'c> {
    column: usize,
    insert: CachedStatement<'c>,
    delete: CachedStatement<'c>,
    inserts: Vec<(Key, Key)>,
    deletes: Vec<(Key, Key)>,
}

fn prepared<'c>(connection: &'c Connection, sql: &str) -> Result<CachedStatement<'c>> {
    connection.prepare_cached(sql).map_err(|cause| failure("read", cause))
}

fn updating(cause: rusqlite::Error) -> Error {
    failure("update", cause)
}

impl<'c> Writer<'c> {
    pub fn new(connection: &'c Connection, table: &'c Table) -> Result<Self> {
        let number = table.number;
        let statement = |sql: String| prepared(connection, &sql);
        let index = |index: &super::tables::Index| {
            Ok(IndexWriter {
                column: index.column,
                insert: statement(format!("insert or replace into index_{} values (?, ?)", index.number))?,
                delete: statement(format!("delete from index_{} where v = ? and k = ?", index.number))?,
                inserts: Vec::new(),
                deletes: Vec::new(),
            })
        };
        let tombs = match table.has_history {
            false => None,
            true => Some(Tombs {
                note: statement("insert or replace into temp.open_commit values (?, ?, ?)".into())?,
                noted: statement("select existed, boundary from temp.open_commit where k = ?".into())?,
                get: statement(format!("select boundary from tomb_{number} where k = ?"))?,
                put: statement(format!("insert or replace into tomb_{number} values (?, ?)"))?,
                delete: statement(format!("delete from tomb_{number} where k = ?"))?,
                is_empty: !statement(format!("select 1 from tomb_{number} limit 1"))?.exists([]).map_err(updating)?,
            }),
        };
        Ok(Self {
            connection,
            table,
            get: statement(format!("select v, generation from state_{number} where k = ?"))?,
            put: statement(format!("insert or replace into state_{number} values (?, ?, ?, ?)"))?,
            delete: statement(format!("delete from state_{number} where k = ?"))?,
            tombs,
            net: statement(format!("insert into net_{number} values (?, ?, ?, ?, ?)"))?,
            version: statement(format!("insert into version_{number} values (?, ?, ?, ?, ?, ?, ?)"))?,
            indexes: table.indexes.iter().map(index).collect::<Result<_>>()?,
            buffer: Vec::new(),
        })
    }

    /// What the file holds of a key.
    pub fn read(&mut self, key: &Key) -> Result<Entry> {
        let mut entry = Entry::unknown();
        let mut rows = self.get.query([key]).map_err(updating)?;
        if let Some(row) = rows.next().map_err(updating)? {
            let stands = Row::read(blob(row, 0)?)?;
            entry.stored_generation = row.get(1).map_err(updating)?;
            entry.generation = entry.stored_generation;
            entry.boundary = Some(stands.head.boundary.unwrap_or(stands.head.time));
            entry.before = Some(stands.clone());
            entry.now = Some(stands);
            return Ok(entry);
        }
        if let Some(tombs) = self.tombs.as_mut().filter(|tombs| !tombs.is_empty) {
            let mut rows = tombs.get.query([key]).map_err(updating)?;
            if let Some(row) = rows.next().map_err(updating)? {
                entry.boundary = Some(row.get(0).map_err(updating)?);
                entry.has_tomb = true;
            }
        }
        Ok(entry)
    }

    pub fn keep_version(&mut self, id: i64, key: &Key, version: &Version) -> Result<()> {
        version.row.write(&mut self.buffer);
        let values =
            params![id, version.capture, key, version.boundary, version.op as u8, version.existed, self.buffer];
        self.version.execute(values).map(|_| ()).map_err(updating)
    }

    /// Notes how the commit that touches a key found it: what was written of it is not all.
    pub fn note(&mut self, key: &Key, existed: bool, boundary: Option<Micros>) -> Result<()> {
        match &mut self.tombs {
            Some(tombs) => tombs.note.execute(params![key, existed, boundary]).map(|_| ()).map_err(updating),
            None => Ok(()),
        }
    }

    /// How the commit that goes on found the key.
    pub fn noted(&mut self, key: &Key) -> Result<Option<(bool, Option<Micros>)>> {
        let Some(tombs) = &mut self.tombs else { return Ok(None) };
        let found = tombs.noted.query_row([key], |row| Ok((row.get(0)?, row.get(1)?)));
        found.optional().map_err(updating)
    }

    /// What was noted is of a commit that goes on no more.
    pub fn end_commit(&mut self) -> Result<()> {
        super::file::run(self.connection, "delete from temp.open_commit")
    }

    pub fn keep_net(&mut self, id: i64, key: &Key, entry: &Entry) -> Result<()> {
        let written = |row: &Option<Row>| {
            row.as_ref().map(|row| {
                let mut bytes = Vec::with_capacity(row.cells.len() + 32);
                row.write(&mut bytes);
                bytes
            })
        };
        let values = params![id, entry.capture, key, written(&entry.before), written(&entry.now)];
        self.net.execute(values).map(|_| ()).map_err(updating)
    }

    /// Writes what has changed, in the order in which it comes.
    pub fn write(&mut self, held: &[(Key, Entry)]) -> Result<()> {
        for (key, entry) in held {
            match &entry.now {
                Some(row) if entry.changed || entry.generation != entry.stored_generation => {
                    row.write(&mut self.buffer);
                    let values = params![key, entry.capture, entry.generation, self.buffer];
                    self.put.execute(values).map_err(updating)?;
                }
                None if entry.before.is_some() => drop(self.delete.execute([key]).map_err(updating)?),
                _ => {}
            }
            if entry.changed {
                self.write_tomb(key, entry)?;
                self.note_indexes(key, entry)?;
            }
        }
        self.indexes.iter_mut().try_for_each(IndexWriter::write)
    }

    fn write_tomb(&mut self, key: &Key, entry: &Entry) -> Result<()> {
        let Some(tombs) = &mut self.tombs else { return Ok(()) };
        match (&entry.now, entry.boundary) {
            (None, Some(boundary)) => {
                tombs.put.execute(params![key, boundary]).map_err(updating)?;
                tombs.is_empty = false;
            }
            (Some(_), _) if entry.has_tomb => drop(tombs.delete.execute([key]).map_err(updating)?),
            _ => {}
        }
        Ok(())
    }

    fn note_indexes(&mut self, key: &Key, entry: &Entry) -> Result<()> {
        if self.indexes.is_empty() {
            return Ok(());
        }
        let mut cells = (Vec::new(), Vec::new());
        let columns = self.table.columns.len();
        if let Some(row) = &entry.before {
            Cells(&row.cells).collect(columns, &mut cells.0)?;
        }
        if let Some(row) = &entry.now {
            Cells(&row.cells).collect(columns, &mut cells.1)?;
        }
        for index in &mut self.indexes {
            let value = |cells: &[Cell<'_>]| match cells.is_empty() {
                true => Ok(None),
                false => self.table.value_of(index.column, cells).map(Some),
            };
            let (old, new) = (value(&cells.0)?, value(&cells.1)?);
            if old == new {
                continue;
            }
            index.deletes.extend(old.map(|value| (value, key.clone())));
            index.inserts.extend(new.map(|value| (value, key.clone())));
        }
        Ok(())
    }

    /// The next rows of a capture behind `after` in key order, with `below` only those of lower generations.
    pub fn page(
        &self,
        capture: CaptureNumber,
        below: Option<u32>,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Vec<(Key, Row)>> {
        let sql = format!(
            "select k, v from state_{} where capture = ?1 and generation < ?2 {} order by k limit ?3",
            self.table.number,
            if after.is_some() { "and k > ?4" } else { "" }
        );
        let mut statement = prepared(self.connection, &sql)?;
        let below = below.map_or(i64::MAX, i64::from);
        let mut rows = match after {
            None => statement.query(params![capture, below, limit as i64]),
            Some(after) => statement.query(params![capture, below, limit as i64, after]),
        }
        .map_err(updating)?;
        let mut page = Vec::new();
        while let Some(row) = rows.next().map_err(updating)? {
            page.push((row.get(0).map_err(updating)?, Row::read(blob(row, 1)?)?));
        }
        Ok(page)
    }
}

impl IndexWriter<'_> {
    fn write(&mut self) -> Result<()> {
        for (statement, entries) in [(&mut self.delete, &mut self.deletes), (&mut self.insert, &mut self.inserts)] {
            entries.sort_unstable();
            for (value, key) in entries.drain(..) {
                statement.execute(params![value, key]).map_err(updating)?;
            }
        }
        Ok(())
    }
}

pub(super) fn blob<'r>(row: &'r rusqlite::Row<'_>, index: usize) -> Result<&'r [u8]> {
    let value = row.get_ref(index).map_err(|cause| failure("read", cause))?;
    value.as_blob().map_err(|cause| {
        failure("read", rusqlite::Error::FromSqlConversionFailure(index, value.data_type(), Box::new(cause)))
    })
}

/// Finds current rows of one table.
pub(super) struct Finder<'c> {
    by_key: CachedStatement<'c>,
    connection: &'c Connection,
    table: &'c Table,
}

impl<'c> Finder<'c> {
    pub fn new(connection: &'c Connection, table: &'c Table) -> Result<Self> {
        let by_key = prepared(connection, &format!("select k, v from state_{} where k = ?", table.number))?;
        Ok(Self { by_key, connection, table })
    }

    /// Gives `take` the row of each of `values` of `column`: those of one value one after the other.
    pub fn find<'v>(
        &mut self,
        column: usize,
        values: impl IntoIterator<Item = &'v Key>,
        mut take: impl FnMut(Key, &[u8]) -> Result<()>,
    ) -> Result<()> {
        if self.table.key == [column] {
            return values.into_iter().try_for_each(|value| each(&mut self.by_key, value, &mut take));
        }
        let (number, index) = (self.table.number, self.index_on(column)?);
        let sql =
            format!("select s.k, s.v from index_{index} i cross join state_{number} s on s.k = i.k where i.v = ?");
        let mut statement = prepared(self.connection, &sql)?;
        values.into_iter().try_for_each(|value| each(&mut statement, value, &mut take))
    }

    /// Gives `take` the keys of the rows alone: an index has them side by side.
    pub fn find_keys<'v>(
        &mut self,
        column: usize,
        values: impl IntoIterator<Item = &'v Key>,
        mut take: impl FnMut(Key),
    ) -> Result<()> {
        if self.table.key == [column] {
            return self.find(column, values, |key, _| {
                take(key);
                Ok(())
            });
        }
        let sql = format!("select k from index_{} where v = ?", self.index_on(column)?);
        let mut statement = prepared(self.connection, &sql)?;
        let reading = |cause| failure("read", cause);
        for value in values {
            let mut rows = statement.query([value]).map_err(reading)?;
            while let Some(row) = rows.next().map_err(reading)? {
                take(row.get(0).map_err(reading)?);
            }
        }
        Ok(())
    }

    /// The number of the index by which rows are found.
    fn index_on(&self, column: usize) -> Result<i64> {
        let object = || format!("rows of {} by {}", self.table.name, self.table.columns[column].name());
        let missing = || Error::new(shori_core::ErrorKind::Internal, "find", object(), "they have no index");
        self.table.index_on(column).map(|index| index.number).ok_or_else(missing)
    }
}

fn each(
    statement: &mut CachedStatement<'_>,
    value: &Key,
    take: &mut impl FnMut(Key, &[u8]) -> Result<()>,
) -> Result<()> {
    let reading = |cause| failure("read", cause);
    let mut rows = statement.query([value]).map_err(reading)?;
    while let Some(row) = rows.next().map_err(reading)? {
        take(row.get(0).map_err(reading)?, blob(row, 1)?)?;
    }
    Ok(())
}

/// Gives `take` all rows of `table` in key order.
pub(super) fn scan(
    connection: &Connection,
    table: &Table,
    mut take: impl FnMut(Head, Cells<'_>) -> Result<()>,
) -> Result<()> {
    let reading = |cause| failure("read", cause);
    let mut statement = prepared(connection, &format!("select v from state_{} order by k", table.number))?;
    let mut rows = statement.query([]).map_err(reading)?;
    while let Some(row) = rows.next().map_err(reading)? {
        let (head, cells) = Head::read(blob(row, 0)?)?;
        take(head, cells)?;
    }
    Ok(())
}
