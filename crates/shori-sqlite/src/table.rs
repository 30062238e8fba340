//! What a table is: columns and their types, the key, and the unique indexes through which a row can be evicted.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use rusqlite::{Connection, OptionalExtension};
use serde::Serialize;
use shori_core::schema::{TableSchema, parse_type};
use shori_core::{Error, ErrorKind, Result};

use crate::connection::quote_name;
use crate::{SqliteTable, declared, index_sql};

/// A table as it stands in the file.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub name: String,
    pub columns: Vec<Column>,
    pub key: Vec<KeyColumn>,
    /// The key is the rowid under another name.
    pub key_is_rowid: bool,
    /// How the rowid is called, where it is a second, hidden key.
    pub rowid: Option<&'static str>,
    /// Ways in which a row of another key may conflict.
    pub uniques: Vec<Unique>,
    pub schema: Arc<TableSchema>,
}

#[derive(Clone, Debug)]
pub(crate) struct Column {
    pub name: String,
    declared: String,
    not_null: bool,
    /// What `or replace` puts in place of NULL.
    pub default_for_null: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct KeyColumn {
    pub column: usize,
    pub collation: String,
    pub nullable: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Unique {
    pub terms: Vec<Term>,
    pub filter: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Term {
    /// Index into the table's columns, or an expression's text.
    pub value: TermValue,
    pub collation: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) enum TermValue {
    Column(usize),
    Expression(String),
}

struct Index {
    name: String,
    origin: String,
    partial: bool,
}

const BINARY: &str = "BINARY";

/// Fails with [`ErrorKind::Schema`] when the table cannot be captured.
pub(crate) fn inspect(connection: &Connection, wanted: &SqliteTable) -> Result<Table> {
    let refuse = |cause: String| refused(&wanted.name, cause);
    let fail = |cause| crate::connection::sqlite_error("read", format!("table {}", wanted.name), cause);
    check_name(&wanted.name)?;
    let without_rowid = kind_of(connection, &wanted.name)?;
    let (columns, primary_key) = columns(connection, &wanted.name).map_err(fail)?;
    let indexes = indexes(connection, &wanted.name).map_err(fail)?;
    let mut uniques = Vec::with_capacity(indexes.len());
    for index in &indexes {
        uniques.push(unique(connection, &wanted.name, index, &columns)?);
    }
    let has_key_index = indexes.iter().any(|index| index.origin == "pk");
    let key_is_rowid = !without_rowid && primary_key.len() == 1 && !has_key_index;
    let key = if key_is_rowid {
        vec![KeyColumn { column: primary_key[0], collation: BINARY.into(), nullable: false }]
    } else {
        let found = key_index(&indexes, &uniques, &columns);
        let at = found.ok_or_else(|| refuse("it has no key".into()).with_remedy(NO_KEY_REMEDY))?;
        let key = key_columns(&uniques[at], &columns, without_rowid);
        // Rows that conflict under BINARY have the same key: the new row takes its place anyhow.
        if key.iter().all(|column| column.collation == BINARY) {
            uniques.remove(at);
        }
        key
    };
    check_defaults(&wanted.name, &columns, &uniques)?;
    let types = types(wanted, &columns)?;
    check_key_types(&wanted.name, &columns, &types, &key)?;
    let fields = (columns.iter().zip(&types).enumerate())
        .map(|(at, (column, data_type))| {
            let is_key = key.iter().any(|key| key.column == at);
            Field::new(&column.name, data_type.clone(), !column.not_null && !is_key)
        })
        .collect();
    let key_names: Vec<&str> = key.iter().map(|key| columns[key.column].name.as_str()).collect();
    let schema = Arc::new(TableSchema::new(&wanted.name, fields, &key_names)?);
    let rowid = if without_rowid || key_is_rowid { None } else { rowid_name(&columns) };
    Ok(Table { name: wanted.name.clone(), columns, key, key_is_rowid, rowid, uniques, schema })
}

const NO_KEY_REMEDY: &str = "give it a primary key, or a unique index over columns that are not null";

pub(crate) fn refused(table: &str, cause: String) -> Error {
    Error::new(ErrorKind::Schema, "capture", format!("table {table}"), cause)
}

fn check_name(name: &str) -> Result<()> {
    let lower = name.to_ascii_lowercase();
    if lower == "new" || lower == "old" {
        return Err(refused(name, "triggers cannot tell a table of this name from their row".into())
            .with_remedy("rename the table"));
    }
    if lower.starts_with("sqlite_") || lower.starts_with("_shori_") {
        return Err(refused(name, "it belongs to SQLite or to Shori".into()));
    }
    Ok(())
}

/// Whether the table is `without rowid`.
fn kind_of(connection: &Connection, name: &str) -> Result<bool> {
    let fail = |cause| crate::connection::sqlite_error("read", format!("table {name}"), cause);
    let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get::<_, bool>(1)?));
    let query = "select type, wr from pragma_table_list(?1) where schema = 'main'";
    let found = connection.query_row(query, [name], row).optional().map_err(fail)?;
    match found {
        Some((kind, without_rowid)) if kind == "table" => Ok(without_rowid),
        Some((kind, _)) => {
            let what = if kind == "view" { kind } else { format!("{kind} table") };
            Err(refused(name, format!("it is a {what}, which has no triggers after each row"))
                .with_remedy("capture the tables behind it"))
        }
        None => Err(refused(name, "there is no such table".into())
            .with_remedy("create it, or take it out of the configuration")),
    }
}

/// Columns, and the indexes of those in the primary key in its order.
fn columns(connection: &Connection, table: &str) -> rusqlite::Result<(Vec<Column>, Vec<usize>)> {
    let mut statement = connection
        .prepare("select name, type, \"notnull\", dflt_value, pk from pragma_table_xinfo(?1) where hidden <> 1")?;
    let (mut columns, mut primary_key) = (Vec::new(), BTreeMap::new());
    let mut rows = statement.query([table])?;
    while let Some(row) = rows.next()? {
        let not_null: bool = row.get(2)?;
        let place: i64 = row.get(4)?;
        if place > 0 {
            primary_key.insert(place, columns.len());
        }
        let default: Option<String> = row.get(3)?;
        columns.push(Column {
            name: row.get(0)?,
            declared: row.get(1)?,
            not_null,
            default_for_null: default.filter(|_| not_null),
        });
    }
    Ok((columns, primary_key.into_values().collect()))
}

fn indexes(connection: &Connection, table: &str) -> rusqlite::Result<Vec<Index>> {
    let query = "select name, origin, partial from pragma_index_list(?1) where \"unique\" order by name";
    let mut statement = connection.prepare(query)?;
    let rows = statement
        .query_map([table], |row| Ok(Index { name: row.get(0)?, origin: row.get(1)?, partial: row.get(2)? }))?;
    rows.collect()
}

/// A term's column, where it is one, and its collation.
type NamedTerm = (Option<String>, String);

/// The terms of a unique index; expressions and filter come from its statement.
fn unique(connection: &Connection, table: &str, index: &Index, columns: &[Column]) -> Result<Unique> {
    let fail = |cause| crate::connection::sqlite_error("read", format!("index {}", index.name), cause);
    let read = || -> rusqlite::Result<(Vec<NamedTerm>, Option<String>)> {
        let mut statement =
            connection.prepare("select name, coll from pragma_index_xinfo(?1) where key order by seqno")?;
        let terms =
            statement.query_map([&index.name], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
        let query = "select sql from sqlite_schema where type = 'index' and name = ?1";
        Ok((terms, connection.query_row(query, [&index.name], |row| row.get(0)).optional()?.flatten()))
    };
    let (named, sql) = read().map_err(fail)?;
    let has_expression = named.iter().any(|(name, _)| name.is_none());
    let text = match sql.as_deref() {
        Some(sql) if has_expression || index.partial => {
            let unread = || refused(table, format!("its unique index {} cannot be read: {sql}", index.name));
            Some(index_sql::parse(sql).filter(|text| text.terms.len() == named.len()).ok_or_else(unread)?)
        }
        _ => None,
    };
    let mut terms = Vec::with_capacity(named.len());
    for (at, (name, collation)) in named.into_iter().enumerate() {
        let column = name.as_ref().and_then(|name| columns.iter().position(|column| column.name == *name));
        let expression = || text.as_ref().map(|text| TermValue::Expression(text.terms[at].clone()));
        let unknown = || refused(table, format!("its unique index {} has a term that cannot be read", index.name));
        let value = column.map(TermValue::Column).or_else(expression).ok_or_else(unknown)?;
        terms.push(Term { value, collation: collation.to_ascii_uppercase() });
    }
    Ok(Unique { terms, filter: text.and_then(|text| text.filter) })
}

/// The primary key's index, else the first unique index that holds every row under whole, non-null columns.
fn key_index(indexes: &[Index], uniques: &[Unique], columns: &[Column]) -> Option<usize> {
    let names_every_row = |at: &usize| {
        let not_null = |term: &Term| matches!(term.value, TermValue::Column(column) if columns[column].not_null);
        !indexes[*at].partial && uniques[*at].terms.iter().all(not_null)
    };
    (indexes.iter().position(|index| index.origin == "pk")).or_else(|| (0..indexes.len()).find(names_every_row))
}

fn key_columns(unique: &Unique, columns: &[Column], without_rowid: bool) -> Vec<KeyColumn> {
    let column_of = |term: &Term| match term.value {
        TermValue::Column(column) => Some((column, term.collation.clone())),
        TermValue::Expression(_) => None,
    };
    let key = unique.terms.iter().filter_map(column_of);
    key.map(|(column, collation)| KeyColumn {
        column,
        collation,
        nullable: !without_rowid && !columns[column].not_null,
    })
    .collect()
}

/// `or replace` puts a NOT NULL column's default in place of NULL, after BEFORE triggers have run: they compute it again.
fn check_defaults(table: &str, columns: &[Column], uniques: &[Unique]) -> Result<()> {
    let changes = |default: &String| default.to_ascii_lowercase().contains("random");
    let uses = |column: usize| {
        uniques.iter().flat_map(|unique| &unique.terms).any(|term| match term.value {
            TermValue::Column(used) => used == column,
            TermValue::Expression(_) => true,
        })
    };
    match columns
        .iter()
        .enumerate()
        .find(|(at, column)| column.default_for_null.as_ref().is_some_and(changes) && uses(*at))
    {
        Some((_, column)) => Err(refused(table, format!("column {} is unique and has a random default", column.name))
            .with_remedy("drop the default, or the unique index")),
        None => Ok(()),
    }
}

fn types(wanted: &SqliteTable, columns: &[Column]) -> Result<Vec<DataType>> {
    if let Some(name) = wanted.columns.keys().find(|name| !columns.iter().any(|column| column.name == **name)) {
        let cause = format!("column {name} is given a type, but the table has no such column");
        return Err(refused(&wanted.name, cause).with_remedy("correct the column's name in the configuration"));
    }
    let type_of = |column: &Column| match wanted.columns.get(&column.name) {
        Some(name) => parse_type(name).ok_or_else(|| {
            refused(&wanted.name, format!("column {} is given the unknown type {name:?}", column.name))
                .with_remedy("give one of boolean, int64, float64, text, binary, date, time, timestamp, decimal(18,2)")
        }),
        None => declared::arrow_type(&column.declared).ok_or_else(|| {
            let cause = format!("column {} has the declared type {:?}", column.name, column.declared);
            refused(&wanted.name, format!("{cause}, which stands for no type"))
                .with_remedy("give the column a type in the configuration")
        }),
    };
    columns.iter().map(type_of).collect()
}

/// A key's value must have one spelling: two rows of the file must never be one key of the log.
fn check_key_types(table: &str, columns: &[Column], types: &[DataType], key: &[KeyColumn]) -> Result<()> {
    let one_spelling = |data_type: &DataType| {
        matches!(
            data_type,
            DataType::Boolean
                | DataType::Int16
                | DataType::Int32
                | DataType::Int64
                | DataType::Utf8
                | DataType::Binary
                | DataType::Date32
        )
    };
    match key.iter().find(|key| !one_spelling(&types[key.column])) {
        Some(key) => {
            let (name, data_type) = (&columns[key.column].name, shori_core::schema::type_name(&types[key.column]));
            Err(refused(table, format!("key column {name} is {data_type}, whose values have several spellings"))
                .with_remedy(format!("capture {name} as text or int64, by naming that type")))
        }
        None => Ok(()),
    }
}

fn rowid_name(columns: &[Column]) -> Option<&'static str> {
    ["rowid", "_rowid_", "oid"]
        .into_iter()
        .find(|name| !columns.iter().any(|column| column.name.eq_ignore_ascii_case(name)))
}

impl Table {
    pub fn quoted(&self) -> String {
        quote_name(&self.name)
    }

    pub fn key_names(&self) -> Vec<String> {
        self.key.iter().map(|key| quote_name(&self.columns[key.column].name)).collect()
    }

    pub fn key_is_binary(&self, key: &KeyColumn) -> bool {
        key.collation == BINARY
    }

    /// What decides which triggers the table needs, beside its columns.
    pub fn shape(&self) -> String {
        serde_json::json!({ "key": self.key, "uniques": self.uniques, "rowid": self.rowid }).to_string()
    }
}
