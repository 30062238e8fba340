//! A projection's query: how it is run over one set of tables or another, what it returns, and its errors.

use std::borrow::Cow;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use shori_core::projection::{
    Derivation, EntityPath, HistoryProjection, Maintenance, Measures, Projection, SqlProjection, history,
};
use shori_core::schema::is_carried;
use shori_core::{Error, ErrorKind, Result, projection};

use super::layout::Layout;
use super::mirror::LIVE;
use super::session::{Session, WORK, comma};
use super::tables::Table;
use crate::database::{duckdb_error, one_line, quote_name, traced};

/// What a query returns, and what its columns are for.
#[derive(Debug)]
pub(super) struct Shape {
    pub fields: Vec<FieldRef>,
    pub published: SchemaRef,
    pub key: Vec<String>,
    /// Columns that are added up over entities; the weight is one.
    pub sums: Vec<String>,
    pub weight: Option<String>,
    /// Some column is neither key nor sum.
    pub has_others: bool,
}

impl Shape {
    pub fn keys(&self, alias: &str) -> String {
        comma(self.key.iter().map(|name| format!("{alias}.{}", quote_name(name))))
    }

    /// Where the key's columns stand among all.
    pub fn key_indexes(&self) -> Vec<usize> {
        let place = |name: &String| self.fields.iter().position(|field| field.name() == name);
        self.key.iter().filter_map(place).collect()
    }

    /// Where the sums stand among all columns.
    pub fn sum_indexes(&self) -> impl Iterator<Item = usize> {
        self.sums.iter().filter_map(|name| self.fields.iter().position(|field| field.name() == name))
    }

    pub fn key_columns(&self) -> SchemaRef {
        let fields = self.key_indexes().into_iter().map(|index| self.fields[index].clone());
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }

    /// Null is a key like any other.
    pub fn key_match(&self, left: &str, right: &str) -> String {
        let same = |name: &String| format!("{left}.{0} is not distinct from {right}.{0}", quote_name(name));
        self.key.iter().map(same).collect::<Vec<_>>().join(" and ")
    }

    pub fn type_of(&self, column: &str) -> Result<&DataType> {
        let field = self.fields.iter().find(|field| field.name() == column);
        let missing = || Error::new(ErrorKind::Internal, "find", format!("column {column}"), "the query has none");
        field.map(|field| field.data_type()).ok_or_else(missing)
    }
}

/// Runs `statement`, which makes a table, with the query in place of `{query}`, where tables are those of `schema` in the
/// work catalog. Returns how many rows were made.
pub(super) fn run(session: &Session, sql: &SqlProjection, schema: &str, statement: &str) -> Result<i64> {
    let text = statement.replace("{query}", &format!("(\n{}\n) as query", trimmed(&sql.text)));
    over(session, sql, schema, || traced(&text, || session.connection.query_row(&text, [], |row| row.get(0))))
}

/// Gives `take` what the query returns over the tables of `schema`, at most `limit` rows.
pub(super) fn each(
    session: &Session,
    sql: &SqlProjection,
    schema: &str,
    limit: i64,
    take: impl FnMut(RecordBatch) -> Result<()>,
) -> Result<()> {
    let text = format!("select * from (\n{}\n) as query limit {limit}", trimmed(&sql.text));
    let read = || Ok(session.connection.prepare(&text)?.query_arrow([])?.collect::<Vec<_>>());
    over(session, sql, schema, || traced(&text, read))?.into_iter().try_for_each(take)
}

/// Runs `work` where names are those of `schema`.
fn over<T>(
    session: &Session,
    sql: &SqlProjection,
    schema: &str,
    work: impl FnOnce() -> duckdb::Result<T>,
) -> Result<T> {
    session.run(&format!("use {WORK}.{}", quote_name(schema)))?;
    // The query begins on a line of its own, the second: its line numbers are those of the message less one.
    match work().map_err(|cause| query_error(sql, "run", cause)) {
        Ok(made) => session.run(&format!("use {WORK}")).map(|()| made),
        Err(error) => {
            // Fails inside of a broken transaction; the next statement that matters runs after its rollback.
            let _ = session.run(&format!("use {WORK}"));
            Err(error)
        }
    }
}

fn trimmed(text: &str) -> &str {
    text.trim_end().trim_end_matches(';')
}

fn query_error(sql: &SqlProjection, operation: &str, cause: duckdb::Error) -> Error {
    let text = cause.to_string();
    let object = match line_of(&text) {
        Some(line) => format!("the query in {}, line {line}", sql.file),
        None => format!("the query in {}", sql.file),
    };
    let general = duckdb_error(operation, object.clone(), cause);
    if general.kind() == ErrorKind::Refused && general.remedy().is_none() {
        // The excerpt's line number is that of the statement, not of the file.
        let message = text.split("\n\nLINE ").next().unwrap_or(&text);
        Error::new(ErrorKind::Projection, operation, object, one_line(message))
    } else {
        general
    }
}

fn line_of(message: &str) -> Option<u64> {
    let digits = message.split("LINE ").nth(1)?.split(':').next()?;
    digits.parse::<u64>().ok()?.checked_sub(1).filter(|&line| line > 0)
}

fn misfit(sql: &SqlProjection, cause: String) -> Error {
    Error::new(ErrorKind::Projection, "use", format!("the query in {}", sql.file), cause)
}

/// Columns of a projection's output; fails where a table cannot have them.
pub(super) fn output_columns(session: &Session, layout: &Layout, projection: &Projection) -> Result<SchemaRef> {
    let columns = match &projection.derivation {
        Derivation::Sql(sql) => shape(session, layout, sql)?.published,
        Derivation::Latest { table } => latest_columns(layout.table(table)?),
        Derivation::History(of) => {
            let table = layout.table(&of.table)?;
            check_history(&projection.name, table, of)?;
            history_columns(table, of)
        }
    };
    let names: Vec<String> = columns.fields().iter().map(|field| field.name().to_lowercase()).collect();
    let wrong = (names.iter().enumerate()).find(|(index, name)| *name == "rowid" || names[..*index].contains(name));
    match wrong {
        Some((_, name)) if name == "rowid" => {
            Err(refused(&projection.name, "no column of it may be called rowid".into()))
        }
        Some((_, name)) => Err(refused(&projection.name, format!("two of its columns would be called {name}"))),
        None => Ok(columns),
    }
}

fn check_history(projection: &str, table: &Table, of: &HistoryProjection) -> Result<()> {
    let own: Vec<&str> = table.key.iter().map(|&index| table.columns[index].name().as_str()).collect();
    if of.key.len() != table.key.len() {
        let cause = format!("its key names {} columns, and the table's key is ({})", of.key.len(), own.join(", "));
        let remedy = "give a name for each column of the table's key, in its order, or leave key out";
        return Err(refused(projection, cause).with_remedy(remedy));
    }
    let is_own = |name: &str| !own.contains(&name) && table.columns.iter().any(|column| column.name() == name);
    match of.unknown_columns(is_own).first() {
        None => Ok(()),
        Some(name) if own.contains(name) => {
            Err(refused(projection, format!("column {name} is of the key, which every version has")))
        }
        Some(name) => {
            let cause = format!("it names column {name}, which table {} does not have", table.name);
            let known: Vec<&str> =
                table.columns.iter().map(|column| column.name().as_str()).filter(|name| is_own(name)).collect();
            Err(refused(projection, cause).with_remedy(format!("its columns are {}", known.join(", "))))
        }
    }
}

fn refused(projection: &str, cause: String) -> Error {
    Error::new(ErrorKind::Projection, "build", format!("projection {projection}"), cause)
}

pub(super) fn latest_columns(table: &Table) -> SchemaRef {
    let mut fields: Vec<_> = (0..table.columns.len()).map(|index| carried(table, index)).collect();
    fields.push(Arc::new(Field::new(projection::SOURCE_LSN, DataType::Binary, false)));
    Arc::new(Schema::new(fields))
}

/// A column that may be null unless it is part of the key: one that the source dropped is null from then on.
fn carried(table: &Table, index: usize) -> FieldRef {
    let field = &table.columns[index];
    if table.key.contains(&index) { field.clone() } else { Arc::new(field.as_ref().clone().with_nullable(true)) }
}

/// Indexes of a history's tracked columns.
pub(super) fn tracked(table: &Table, of: &HistoryProjection) -> Vec<usize> {
    let is_tracked = |index: &usize| !table.key.contains(index) && of.tracks(table.columns[*index].name());
    (0..table.columns.len()).filter(is_tracked).collect()
}

pub(super) fn history_columns(table: &Table, of: &HistoryProjection) -> SchemaRef {
    let renamed = |(&index, name): (&usize, &String)| table.columns[index].as_ref().clone().with_name(name);
    let mut fields: Vec<Field> = table.key.iter().zip(&of.key).map(renamed).collect();
    fields.extend(tracked(table, of).into_iter().map(|index| {
        let field = carried(table, index);
        let name = history::published_name(field.name());
        field.as_ref().clone().with_name(name)
    }));
    fields.extend(history::fields());
    Arc::new(Schema::new(fields))
}

/// Binds the query and checks that its declarations fit it.
pub(super) fn shape(session: &Session, layout: &Layout, sql: &SqlProjection) -> Result<Shape> {
    for table in &sql.tables {
        layout.table(table)?;
    }
    let fields = bind(session, sql)?;
    let named = |name: &String| fields.iter().find(|field| field.name() == name);
    for (index, field) in fields.iter().enumerate() {
        if !is_carried(field.data_type()) {
            let cause = format!("column {} is of type {}: cast it", field.name(), field.data_type());
            return Err(misfit(sql, cause));
        }
        if fields[..index].iter().any(|other| other.name() == field.name()) {
            return Err(misfit(sql, format!("it returns two columns {}", field.name())));
        }
    }
    let (mut sums, mut hidden, mut its_weight) = (Vec::new(), None, None);
    if let Maintenance::ByEntity { entity, measures } = &sql.maintenance {
        check_paths(layout, sql, &entity.paths)?;
        if let Measures::Additive { additive, weight, publish_weight } = measures {
            sums.clone_from(additive);
            if !sums.contains(weight) {
                sums.push(weight.clone());
            }
            hidden = (!publish_weight).then(|| weight.clone());
            its_weight = Some(weight.clone());
        }
    }
    if sql.key.is_empty() {
        return Err(misfit(sql, "its key is empty".into()));
    }
    if let Some(name) = sql.key.iter().chain(&sums).find(|name| named(name).is_none()) {
        return Err(misfit(sql, format!("it returns no column {name}, which its declaration names")));
    }
    let is_number = |field: &FieldRef| field.data_type().is_numeric();
    if let Some(field) = sums.iter().filter_map(named).find(|field| !is_number(field)) {
        let cause =
            format!("column {} is no number, and additive columns are sums: leave it out of them", field.name());
        return Err(misfit(sql, cause));
    }
    // Differences of floating sums drift: such columns are recomputed for the keys touched.
    sums.retain(|name| named(name).is_some_and(|field| !field.data_type().is_floating()));
    if its_weight.as_ref().is_some_and(|weight| !sums.contains(weight)) {
        return Err(misfit(sql, "its weight is a floating number: count rows".into()));
    }
    let has_others = fields.iter().any(|field| !sql.key.contains(field.name()) && !sums.contains(field.name()));
    let published = fields.iter().filter(|field| Some(field.name()) != hidden.as_ref()).cloned().collect::<Vec<_>>();
    let published = Arc::new(Schema::new(published));
    Ok(Shape { fields, published, key: sql.key.clone(), sums, weight: its_weight, has_others })
}

fn bind(session: &Session, sql: &SqlProjection) -> Result<Vec<FieldRef>> {
    session.run(&format!("use {WORK}.{LIVE}"))?;
    let read = || {
        let text = format!("select * from (\n{}\n) as query limit 0", trimmed(&sql.text));
        let mut statement = session.connection.prepare(&text)?;
        let schema = statement.query_arrow([])?.get_schema();
        Ok(schema.fields().iter().cloned().collect())
    };
    let fields = read().map_err(|cause| query_error(sql, "bind", cause));
    session.run(&format!("use {WORK}"))?;
    fields
}

fn check_paths(
    layout: &Layout,
    sql: &SqlProjection,
    paths: &std::collections::BTreeMap<Arc<str>, EntityPath>,
) -> Result<()> {
    let has = |table: &str, column: &str| -> Result<()> {
        if layout.table(table)?.index_of(column).is_none() {
            return Err(misfit(sql, format!("its entity names column {column}, which table {table} lacks")));
        }
        Ok(())
    };
    if let Some(table) = sql.tables.iter().find(|table| !paths.contains_key(*table)) {
        return Err(misfit(sql, format!("its entity says nothing of table {table}")));
    }
    for (name, path) in paths {
        match path {
            EntityPath::Column(column) => has(name, column)?,
            EntityPath::Through { table, own_column, their_column } => {
                has(name, own_column)?;
                has(table, their_column)?;
            }
        }
        let mut at = path;
        for _ in 0..=paths.len() {
            match at {
                EntityPath::Column(_) => break,
                EntityPath::Through { table, .. } => match paths.get(table) {
                    Some(next) => at = next,
                    None => return Err(misfit(sql, format!("its entity says nothing of table {table}"))),
                },
            }
        }
        if matches!(at, EntityPath::Through { .. }) {
            return Err(misfit(sql, format!("its entity cannot be reached from table {name}: the way is a circle")));
        }
    }
    Ok(())
}

/// What a query's text can mean, told from its words: enough to leave out what it cannot.
pub(super) struct Words {
    words: Vec<String>,
    tables: Vec<String>,
    /// All columns are meant.
    whole: bool,
}

impl Words {
    pub fn of(sql: &SqlProjection) -> Self {
        let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
        let text = without_comments(&sql.text).to_lowercase();
        let pieces = text.split_inclusive(|c: char| !is_part(c)).flat_map(|piece| {
            let end = piece.trim_end_matches(|c: char| !is_part(c));
            [end, &piece[end.len()..]]
        });
        let words: Vec<String> = pieces.filter(|piece| !piece.trim().is_empty()).map(String::from).collect();
        let opens_star = |before: &str| matches!(before.trim(), "select" | "," | "." | "(" | "distinct" | "all");
        let star = words.windows(2).enumerate().any(|(at, pair)| {
            let counts = at > 0 && words[at - 1] == "count" && pair[0].trim() == "(";
            pair[1].trim() == "*" && opens_star(&pair[0]) && !counts
        });
        let whole = star || words.iter().any(|word| matches!(word.as_str(), "natural" | "columns"));
        let tables = sql.tables.iter().map(|table| table.to_lowercase()).collect();
        Self { words, tables, whole }
    }

    /// Whether `column` of `table` can be meant.
    pub fn mean(&self, table: &str, column: &str) -> bool {
        let (table, column) = (table.to_lowercase(), column.to_lowercase());
        let odd = column.contains(|c: char| !(c.is_alphanumeric() || c == '_'));
        let here = |at: &usize| self.words[*at] == column && !self.is_of_another(*at, &table);
        self.whole || odd || (0..self.words.len()).any(|at| here(&at))
    }

    /// Whether the column at `at` is written as that of another table, by that one's own name.
    fn is_of_another(&self, at: usize, table: &str) -> bool {
        if at < 2 || self.words[at - 1].trim() != "." {
            return false;
        }
        let named = &self.words[at - 2];
        named != table && self.tables.contains(named) && !self.is_alias(named, table)
    }

    /// Whether `table` goes by the name of another one.
    fn is_alias(&self, name: &str, table: &str) -> bool {
        let follows = |at: usize, word: &str| self.words.get(at).is_some_and(|found| found == word);
        (0..self.words.len())
            .filter(|&at| self.words[at] == table)
            .any(|at| follows(at + 1, name) || (follows(at + 1, "as") && follows(at + 2, name)))
    }
}

/// A comment means nothing: a column named there would make rows of other tables count as touched that are not. Left
/// whole where strings are written in a way that could be taken for the begin or end of one.
fn without_comments(text: &str) -> Cow<'_, str> {
    if text.contains('\\') || text.contains('$') || text.contains("/*") {
        return Cow::Borrowed(text);
    }
    let (mut kept, mut quote, mut rest) = (String::with_capacity(text.len()), None, text);
    while let Some(next) = rest.chars().next() {
        if quote.is_none() && rest.starts_with("--") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
            continue;
        }
        match quote {
            None if matches!(next, '\'' | '"') => quote = Some(next),
            Some(open) if open == next => quote = None,
            _ => {}
        }
        kept.push(next);
        rest = &rest[next.len_utf8()..];
    }
    Cow::Owned(kept)
}

/// Columns of `table` that the query can mean; all of them where it uses a star.
pub(super) fn used_columns(sql: &SqlProjection, table: &Table) -> Vec<bool> {
    let words = Words::of(sql);
    table.columns.iter().map(|field| words.mean(&table.name, field.name())).collect()
}

/// Whether the query can mean the commit that left a row of `table` as it is.
pub(super) fn uses_lsn(sql: &SqlProjection, table: &Table) -> bool {
    Words::of(sql).mean(&table.name, "__lsn")
}

#[cfg(test)]
mod tests {
    use shori_core::projection::Maintenance;

    use super::*;

    fn words(text: &str) -> Words {
        Words::of(&SqlProjection {
            file: "test.sql".into(),
            text: text.into(),
            tables: vec!["orders".into(), "customers".into()],
            key: vec!["id".into()],
            maintenance: Maintenance::Recompute,
        })
    }

    #[test]
    fn a_column_written_as_that_of_another_table_is_not_meant() {
        let query = words("select orders.id, orders.updated_at, Segment from orders left join customers using (id)");
        assert!(query.mean("orders", "updated_at") && !query.mean("customers", "updated_at"));
        assert!(query.mean("customers", "segment") && query.mean("orders", "segment"));
        assert!(query.mean("customers", "id") && !query.mean("customers", "__lsn"));
    }

    #[test]
    fn aliases_stars_and_quotes_mean_more() {
        assert!(words("select orders.at from customers orders").mean("customers", "at"));
        assert!(words("select orders.at from customers as orders").mean("customers", "at"));
        assert!(words("select o.at from orders o, customers c").mean("customers", "at"));
        assert!(words("select \"orders\".\"at\" from orders").mean("customers", "at"));
        assert!(words("select orders.* from orders").mean("customers", "at"));
        assert!(!words("select count(*) from orders").mean("customers", "at"));
    }

    #[test]
    fn comments_mean_nothing() {
        assert!(!words("-- at is the customer's\nselect id from orders -- at\n").mean("customers", "at"));
        assert!(words("select id -- the customer's\n, at from customers").mean("customers", "at"));
        assert!(words("select '--', at, \"a--\" from customers").mean("customers", "at"));
        assert!(words("select e'\\'--', at from customers").mean("customers", "at"));
    }
}
