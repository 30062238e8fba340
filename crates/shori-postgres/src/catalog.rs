//! What the server's catalogs say of tables and types.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::datatypes::Field;
use shori_core::schema::TableSchema;
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::{Client, Row};

use crate::column_types::{Kind, PostgresType, arrow_type, needs_text};
use crate::connect::sql_error;
use crate::{PostgresConfig, PostgresTable, generated};

/// How often domains over domains are followed.
const DOMAIN_DEPTH_MAX: usize = 32;

/// A captured table as it is sent: the columns of its messages, in their order, and behind them generated ones, which are
/// not sent.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub oid: u32,
    pub columns: Vec<Column>,
    pub schema: Arc<TableSchema>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Column {
    pub name: String,
    /// As messages name it: a domain's is its own, not its base type's.
    pub type_oid: u32,
    pub modifier: i32,
    pub resolved: PostgresType,
    /// Configured as text.
    pub as_text: bool,
    pub nullable: bool,
    /// How it is computed, where it is not sent.
    pub generated: Option<Generated>,
}

/// How the server computes a column of the others of its row.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Generated {
    pub expression: String,
    /// The columns that it is made of, each with its type as SQL has it.
    pub inputs: Vec<(String, String)>,
}

impl Column {
    /// Whether only what the server prints can be decoded.
    pub fn needs_text(&self) -> bool {
        needs_text(&self.resolved, self.as_text)
    }
}

/// Types by object id, as far as they were asked for.
#[derive(Default)]
pub(crate) struct Types(HashMap<u32, Type>);

#[derive(Clone)]
struct Type {
    name: String,
    kind: char,
    category: char,
    base: u32,
    base_modifier: i32,
}

impl Types {
    /// Learns of all of `wanted`, and of what they are made of.
    pub async fn learn(&mut self, client: &Client, wanted: impl IntoIterator<Item = u32>) -> Result<()> {
        let mut wanted: Vec<u32> = wanted.into_iter().filter(|oid| !self.0.contains_key(oid)).collect();
        for _ in 0..DOMAIN_DEPTH_MAX {
            if wanted.is_empty() {
                return Ok(());
            }
            let query = "
                select oid, typname::text, typtype::text, typcategory::text, typbasetype, typtypmod
                from pg_catalog.pg_type
                where oid = any($1)";
            let rows = client.query(query, &[&wanted]).await.map_err(|cause| sql_error("read", "types", cause))?;
            let letter = |text: String| text.chars().next().unwrap_or(' ');
            for row in &rows {
                let found = Type {
                    name: row.get(1),
                    kind: letter(row.get(2)),
                    category: letter(row.get(3)),
                    base: row.get(4),
                    base_modifier: row.get(5),
                };
                self.0.insert(row.get(0), found);
            }
            let bases = wanted.iter().filter_map(|oid| self.0.get(oid)).map(|found| found.base);
            wanted = bases.filter(|base| *base != 0 && !self.0.contains_key(base)).collect();
        }
        Ok(())
    }

    /// A column's type with domains followed; a type that is unknown has a name that tells so.
    pub fn resolve(&self, oid: u32, modifier: i32) -> PostgresType {
        let (mut oid, mut modifier) = (oid, modifier);
        for _ in 0..DOMAIN_DEPTH_MAX {
            match self.0.get(&oid) {
                Some(domain) if domain.kind == 'd' => {
                    if domain.base_modifier != -1 {
                        modifier = domain.base_modifier;
                    }
                    oid = domain.base;
                }
                Some(found) => {
                    let kind = match (found.kind, found.category) {
                        ('e', _) => Kind::Enum,
                        ('r' | 'm', _) => Kind::Range,
                        ('c', _) => Kind::Composite,
                        (_, 'A') => Kind::Array,
                        _ => Kind::Base,
                    };
                    return PostgresType { oid, modifier, kind, name: found.name.clone() };
                }
                None => break,
            }
        }
        PostgresType { oid, modifier, kind: Kind::Composite, name: format!("with object id {oid}") }
    }
}

/// What a table's rows are told apart by, and why not.
pub(crate) async fn key_of(client: &Client, table: &str, oid: u32, is_polled: bool) -> Result<Vec<String>> {
    let query = "
        select c.relreplident::text, i.indisprimary, i.indisreplident, array(
            select a.attname::text
            from unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
            join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
            where k.place <= i.indnkeyatts
            order by k.place
        )
        from pg_catalog.pg_class c
        left join pg_catalog.pg_index i on i.indrelid = c.oid and i.indisvalid and (i.indisprimary or i.indisreplident)
        where c.oid = $1";
    let rows = client.query(query, &[&oid]).await.map_err(|cause| sql_error("read", "keys", cause))?;
    let refuse = |cause: &str, remedy: String| {
        Err(Error::new(ErrorKind::Schema, "capture", format!("table {table}"), cause).with_remedy(remedy))
    };
    let Some(identity) = rows.first().map(|row| row.get::<_, String>(0)) else {
        return refuse("it is gone", "create it again, or take it out of the configuration".into());
    };
    let of_index = |column: usize| {
        let found = rows.iter().find(|row| row.get::<_, Option<bool>>(column) == Some(true));
        found.map(|row: &Row| row.get::<_, Vec<String>>(3))
    };
    match identity.as_str() {
        "n" if !is_polled => refuse(
            "its replica identity is nothing: updates and deletes do not tell their row",
            format!("alter table {table} replica identity default"),
        ),
        "i" => match of_index(2) {
            Some(key) => Ok(key),
            None => refuse(
                "the index of its replica identity is gone",
                format!("alter table {table} replica identity default"),
            ),
        },
        _ => match of_index(1) {
            Some(key) => Ok(key),
            None => refuse(
                "it has no primary key",
                format!("add one, or name a unique index: alter table {table} replica identity using index …"),
            ),
        },
    }
}

/// Every configured table that can be captured, and the others with the reason.
pub(crate) struct Found {
    pub layouts: Vec<(PostgresTable, Layout)>,
    pub failed: Vec<(PostgresTable, Error)>,
}

pub(crate) async fn tables(client: &Client, config: &PostgresConfig, types: &mut Types) -> Result<Found> {
    let mut found = Found { layouts: Vec::new(), failed: Vec::new() };
    for table in &config.tables {
        let read = async {
            let layout = layout(client, config, table, types).await?;
            generated::prove(client, &config.qualified(&table.name), &layout).await.map(|()| layout)
        };
        match read.await {
            Ok(layout) => found.layouts.push((table.clone(), layout)),
            Err(error) if error.kind() == ErrorKind::Schema => found.failed.push((table.clone(), error)),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A table as the catalogs have it now.
pub(crate) async fn layout(
    client: &Client,
    config: &PostgresConfig,
    table: &PostgresTable,
    types: &mut Types,
) -> Result<Layout> {
    let name = config.qualified(&table.name);
    let fail = |cause| sql_error("look at", &format!("table {name}"), cause);
    let refuse = |cause: String| Error::new(ErrorKind::Schema, "capture", format!("table {name}"), cause);
    let query = "
        select c.oid, c.relkind::text, c.relpersistence::text
        from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = $1 and c.relname = $2";
    let row = client.query_opt(query, &[&config.schema, &table.name]).await.map_err(fail)?;
    let row = row.ok_or_else(|| {
        refuse("it does not exist".into()).with_remedy("correct its name, or the schema of the source")
    })?;
    let (oid, kind, persistence): (u32, String, String) = (row.get(0), row.get(1), row.get(2));
    if !matches!(kind.as_str(), "r" | "p") {
        return Err(refuse("it is no table: views and foreign tables cannot be captured".into()));
    }
    if persistence != "p" {
        return Err(refuse("it is not logged: unlogged and temporary tables are not in the log".into())
            .with_remedy(format!("alter table {name} set logged")));
    }
    let is_polled = config.polls.is_some();
    let key = key_of(client, &name, oid, is_polled).await?;
    let rows = client.query(SENT_COLUMNS, &[&oid, &config.publication, &is_polled]).await.map_err(fail)?;
    let mut sent: Vec<Sent> = rows
        .iter()
        .map(|row| Sent {
            name: row.get(0),
            type_oid: row.get(1),
            modifier: row.get(2),
            nullable: !row.get::<_, bool>(3),
            generated: None,
        })
        .collect();
    if !is_polled {
        let generated = generated::columns(client, oid, &name).await?;
        let computed = generated.into_iter().filter(|column| sent.iter().all(|sent| sent.name != column.name));
        let computed: Vec<Sent> = computed.collect();
        sent.extend(computed);
    }
    types.learn(client, sent.iter().map(|column| column.type_oid)).await?;
    layout_of(table, oid, sent, &key, types)
}

/// Generated columns are not sent, unless the publication says so, which it can from PostgreSQL 18 on: for all tables, and
/// by a list of columns for one. Through JSON, older servers need no query of their own. Those that are polled are read.
const SENT_COLUMNS: &str = "
select attname::text, atttypid, atttypmod, attnotnull
from pg_catalog.pg_attribute a
where attrelid = $1 and attnum > 0 and not attisdropped and (
    attgenerated = '' or $3 or exists (
        select
        from pg_catalog.pg_publication p
        left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = a.attrelid
        where pubname = $2 and case
            when to_jsonb(r) ->> 'prattrs' is null then attgenerated = 's' and to_jsonb(p) ->> 'pubgencols' = 's'
            else attnum = any (string_to_array(to_jsonb(r) ->> 'prattrs', ' ')::int2[])
        end
    )
)
order by attnum";

/// Names, types and modifiers of the columns that would be sent of the table now.
pub(crate) async fn sent_now(
    client: &Client,
    config: &PostgresConfig,
    layout: &Layout,
) -> Result<Vec<(String, u32, i32)>> {
    let is_polled = config.polls.is_some();
    let object = format!("table {}", layout.schema.table);
    let rows = client
        .query(SENT_COLUMNS, &[&layout.oid, &config.publication, &is_polled])
        .await
        .map_err(|cause| sql_error("look at", &object, cause))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
}

impl Layout {
    pub fn sent(&self) -> &[Column] {
        let count = self.columns.iter().take_while(|column| column.generated.is_none()).count();
        &self.columns[..count]
    }

    /// Columns that are computed of those that are sent.
    pub fn generated(&self) -> &[Column] {
        &self.columns[self.sent().len()..]
    }

    /// The table as a publication with a column list sends it.
    pub fn published(self, table: &PostgresTable, columns: Option<&[String]>, types: &Types) -> Result<Self> {
        let is_sent =
            |column: &Column| column.generated.is_some() || columns.is_none_or(|names| names.contains(&column.name));
        self.of_columns(table, is_sent, types)
    }

    /// The table without some of its columns, nor those that are made of them.
    pub fn of_columns(self, table: &PostgresTable, wanted: impl Fn(&Column) -> bool, types: &Types) -> Result<Self> {
        if self.columns.iter().all(&wanted) {
            return Ok(self);
        }
        let key: Vec<String> = self.schema.key_names().into_iter().map(String::from).collect();
        let sent = self.columns.into_iter().filter(wanted).map(Sent::from);
        layout_of(table, self.oid, sent.collect(), &key, types)
    }
}

impl Sent {
    /// Whether it is computed of nothing but these columns.
    pub fn is_made_of(&self, is_sent: impl Fn(&str) -> bool) -> bool {
        self.generated.iter().flat_map(|generated| &generated.inputs).all(|(input, _)| is_sent(input))
    }
}

impl From<Column> for Sent {
    fn from(column: Column) -> Self {
        let Column { name, type_oid, modifier, nullable, generated, .. } = column;
        Self { name, type_oid, modifier, nullable, generated }
    }
}

/// Whether one of these columns, which were added, may hold values in rows that were there before: such rows are not sent
/// for it.
pub(crate) async fn hold_values(client: &Client, oid: u32, columns: &[String]) -> Result<bool> {
    if columns.is_empty() {
        return Ok(false);
    }
    let query = "
        select exists (
            select
            from pg_catalog.pg_attribute
            where attrelid = $1 and attname = any($2) and (atthasdef or atthasmissing or attnotnull)
        )";
    let row = client.query_one(query, &[&oid, &columns]).await.map_err(|cause| sql_error("read", "columns", cause))?;
    Ok(row.get(0))
}

/// Columns of `layout` that the table has no more, as the statement's snapshot shows it: what is read of the table now
/// lacks them. Fails where one has another type now, unless it is carried as its text, whatever it is.
pub(crate) async fn columns_gone(client: &impl tokio_postgres::GenericClient, layout: &Layout) -> Result<Vec<bool>> {
    let query = "
        select attname::text, atttypid
        from pg_catalog.pg_attribute
        where attrelid = $1 and attnum > 0 and not attisdropped";
    let table = &layout.schema.table;
    let fail = |cause| sql_error("look at", &format!("table {table}"), cause);
    let rows = client.query(query, &[&layout.oid]).await.map_err(fail)?;
    let now: HashMap<String, u32> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let is_gone = |column: &Column| match now.get(&column.name) {
        None => Ok(true),
        Some(oid) if *oid == column.type_oid || column.as_text => Ok(false),
        Some(_) => {
            let cause = format!("column {} has another type now", column.name);
            Err(Error::new(ErrorKind::Schema, "capture", format!("table {table}"), cause)
                .with_remedy(format!("run shori resnapshot --retyped {table}")))
        }
    };
    layout.columns.iter().map(is_gone).collect()
}

/// A column as it is sent, or computed.
pub(crate) struct Sent {
    pub name: String,
    pub type_oid: u32,
    pub modifier: i32,
    pub nullable: bool,
    pub generated: Option<Generated>,
}

pub(crate) fn layout_of(
    table: &PostgresTable,
    oid: u32,
    sent: Vec<Sent>,
    key: &[String],
    types: &Types,
) -> Result<Layout> {
    let refuse = |cause: String| Error::new(ErrorKind::Schema, "capture", format!("table {}", table.name), cause);
    if let Some(unknown) = table.columns.keys().find(|name| !sent.iter().any(|column| column.name == **name)) {
        return Err(refuse(format!("the configuration gives a type to column {unknown}, which it does not have")));
    }
    let mut columns = Vec::with_capacity(sent.len());
    let mut fields = Vec::with_capacity(sent.len());
    let (sent, mut computed): (Vec<Sent>, Vec<Sent>) = sent.into_iter().partition(|column| column.generated.is_none());
    // One that is made of what is not sent cannot be computed: a column list leaves it out, too.
    computed.retain(|column| column.is_made_of(|input| sent.iter().any(|column| column.name == input)));
    if let Some(column) = computed.iter().find(|column| key.contains(&column.name)) {
        return Err(refuse(format!("its key column {} is generated, and is not in the stream", column.name)));
    }
    for Sent { name, type_oid, modifier, nullable, generated } in sent.into_iter().chain(computed) {
        let resolved = types.resolve(type_oid, modifier);
        let as_text = as_text(table, &name, &resolved).map_err(refuse)?;
        let data_type = arrow_type(&resolved, as_text).map_err(|reason| refuse(format!("column {name}: {reason}")))?;
        fields.push(Field::new(&name, data_type, nullable));
        columns.push(Column { name, type_oid, modifier, resolved, as_text, nullable, generated });
    }
    let key: Vec<&str> = key.iter().map(String::as_str).collect();
    let schema = TableSchema::new(&table.name, fields, &key)?;
    Ok(Layout { oid, columns, schema: Arc::new(schema) })
}

/// Whether a column is configured as text; any other type is refused, unless it is its own.
fn as_text(table: &PostgresTable, column: &str, resolved: &PostgresType) -> std::result::Result<bool, String> {
    let wanted: &BTreeMap<String, String> = &table.columns;
    match wanted.get(column).map(String::as_str) {
        None => Ok(false),
        Some("text") => Ok(true),
        Some(other) => match arrow_type(resolved, false) {
            Ok(own) if shori_core::schema::parse_type(other).as_ref() == Some(&own) => Ok(false),
            _ => Err(format!(
                "column {column} of type {} is configured as {other}; leave it out, or configure it as text",
                resolved.name
            )),
        },
    }
}
