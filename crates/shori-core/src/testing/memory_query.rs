//! The queries that the in-memory transform knows by name, and how their results are kept up to date.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use super::memory_state::StateRow;
use super::value::{Row, Value, pick, row};
use crate::error::{Error, ErrorKind, Result};
use crate::projection::{Entity, EntityPath, Maintenance, Measures, SqlProjection};
use crate::schema::TableSchema;

/// One table as a query sees it.
#[derive(Clone)]
pub struct QueryTable {
    pub schema: Arc<TableSchema>,
    pub rows: Vec<StateRow>,
}

pub type QueryTables = BTreeMap<Arc<str>, QueryTable>;

/// Result rows by key, the weight included.
pub type QueryResult = BTreeMap<Row, Row>;

/// A query over current rows.
pub struct Query {
    pub columns: SchemaRef,
    pub run: fn(&QueryTables) -> Vec<Row>,
}

/// Orders by the segment of their customer: `segment, orders_count, amount_sum`.
pub const SUM_BY_GROUP: &str = "sum_by_group";
/// Orders with the segment of their customer: `order_id, customer_id, segment, amount, __source_lsn`.
pub const ORDERS_WITH_SEGMENT: &str = "orders_with_segment";
/// Orders and payments by minute and segment: `minute_bucket, segment, orders_count, orders_amount_sum,
/// paid_amount_sum`, and the weight `base_rows`.
pub const KPI: &str = "kpi";

/// Fails when no query has the name.
pub fn query(sql: &SqlProjection) -> Result<Query> {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let number = |name: &str| Field::new(name, DataType::Int64, true);
    let money = |name: &str| Field::new(name, DataType::Decimal128(38, 2), true);
    let (fields, run): (_, fn(&QueryTables) -> Vec<Row>) = match sql.text.as_str() {
        SUM_BY_GROUP => (vec![text("segment"), number("orders_count"), money("amount_sum")], sum_by_group),
        ORDERS_WITH_SEGMENT => (
            vec![
                number("order_id"),
                number("customer_id"),
                text("segment"),
                Field::new("amount", DataType::Decimal128(18, 2), true),
                Field::new("__source_lsn", DataType::Binary, true),
            ],
            orders_with_segment,
        ),
        KPI => {
            let minute = Field::new("minute_bucket", DataType::Timestamp(TimeUnit::Microsecond, None), true);
            let sums = [money("orders_amount_sum"), money("paid_amount_sum"), number("base_rows")];
            ([minute, text("segment"), number("orders_count")].into_iter().chain(sums).collect(), kpi)
        }
        other => {
            let cause = format!("there is no query {other:?}");
            return Err(Error::new(ErrorKind::Projection, "run", sql.file.clone(), cause));
        }
    };
    Ok(Query { columns: Arc::new(Schema::new(fields)), run })
}

impl Query {
    /// Indexes of the columns that are published: all but a hidden weight.
    pub fn published(&self, sql: &SqlProjection) -> Vec<usize> {
        let hidden = match &sql.maintenance {
            Maintenance::ByEntity { measures: Measures::Additive { weight, publish_weight: false, .. }, .. } => {
                self.columns.index_of(weight).ok()
            }
            _ => None,
        };
        (0..self.columns.fields().len()).filter(|index| Some(*index) != hidden).collect()
    }

    pub fn indexes(&self, names: &[String]) -> Result<Vec<usize>> {
        Ok(names.iter().map(|name| self.columns.index_of(name)).collect::<Result<_, _>>()?)
    }

    /// The whole result.
    pub fn result(&self, sql: &SqlProjection, tables: &QueryTables) -> Result<QueryResult> {
        let key = self.indexes(&sql.key)?;
        let mut result = QueryResult::new();
        for row in (self.run)(tables) {
            if let Some(other) = result.insert(pick(&row, &key), row) {
                let cause = format!("{other:?} shares its key with another row");
                return Err(Error::new(ErrorKind::Projection, "run", sql.file.clone(), cause));
            }
        }
        Ok(result)
    }

    /// The next result: from the one that stands, where the maintenance allows, over touched entities alone.
    pub fn refresh(
        &self,
        sql: &SqlProjection,
        stands: &QueryResult,
        old: &QueryTables,
        new: &QueryTables,
        touched: &[(Arc<str>, Row)],
    ) -> Result<QueryResult> {
        let Maintenance::ByEntity { entity, measures } = &sql.maintenance else { return self.result(sql, new) };
        let mut entities = BTreeSet::new();
        for (table, row) in touched {
            entities.extend(entities_of(entity, table, row, old));
            entities.extend(entities_of(entity, table, row, new));
        }
        let before = self.result(sql, &restricted(old, entity, &entities))?;
        let after = self.result(sql, &restricted(new, entity, &entities))?;
        let mut next = stands.clone();
        match measures {
            Measures::PerEntity => {
                next.retain(|key, _| !before.contains_key(key));
                next.extend(after);
            }
            Measures::Additive { additive, weight, .. } => {
                let weight = self.indexes(std::slice::from_ref(weight))?[0];
                let mut sums = self.indexes(additive)?;
                sums.push(weight);
                sums.dedup();
                for (sign, part) in [(-1, &before), (1, &after)] {
                    part.iter().for_each(|(key, row)| add(&mut next, key, row, &sums, sign));
                }
                next.retain(|_, row| row[weight].integer() != 0);
            }
        }
        Ok(next)
    }
}

fn add(result: &mut QueryResult, key: &Row, row: &Row, sums: &[usize], sign: i64) {
    let Some(stands) = result.get(key) else {
        let value = |(index, value): (usize, &Value)| match value {
            Value::Integer(number) if sums.contains(&index) => Value::Integer(sign * number),
            Value::Decimal(number) if sums.contains(&index) => Value::Decimal(i128::from(sign) * number),
            other => other.clone(),
        };
        result.insert(key.clone(), row.iter().enumerate().map(value).collect());
        return;
    };
    let value = |(index, (stands, value)): (usize, (&Value, &Value))| match (stands, value) {
        (Value::Integer(one), Value::Integer(two)) if sums.contains(&index) => Value::Integer(one + sign * two),
        (Value::Decimal(one), Value::Decimal(two)) if sums.contains(&index) => {
            Value::Decimal(one + i128::from(sign) * two)
        }
        (stands, _) => stands.clone(),
    };
    let sum = stands.iter().zip(row.iter()).enumerate().map(value).collect();
    result.insert(key.clone(), sum);
}

/// The entities that a row leads to.
fn entities_of(entity: &Entity, table: &str, row: &Row, tables: &QueryTables) -> BTreeSet<Value> {
    let (Some(path), Some(from)) = (entity.paths.get(table), tables.get(table)) else { return BTreeSet::new() };
    match path {
        EntityPath::Column(name) => [value_of(&from.schema, row, name)].into(),
        EntityPath::Through { table: next, own_column, their_column } => {
            let wanted = value_of(&from.schema, row, own_column);
            let Some(to) = tables.get(next) else { return BTreeSet::new() };
            let joined = to.rows.iter().filter(|other| value_of(&to.schema, &other.row, their_column) == wanted);
            joined.flat_map(|other| entities_of(entity, next, &other.row, tables)).collect()
        }
    }
}

fn restricted(tables: &QueryTables, entity: &Entity, entities: &BTreeSet<Value>) -> QueryTables {
    let mut restricted = tables.clone();
    for (name, table) in &mut restricted {
        if entity.paths.contains_key(name) {
            table.rows.retain(|row| !entities_of(entity, name, &row.row, tables).is_disjoint(entities));
        }
    }
    restricted
}

fn value_of(schema: &TableSchema, row: &Row, column: &str) -> Value {
    schema.columns.index_of(column).map_or(Value::Null, |index| row[index].clone())
}

/// Rows of a table as maps from column to value, with `__lsn`.
fn named<'a>(tables: &'a QueryTables, table: &str) -> impl Iterator<Item = impl Fn(&str) -> Value + 'a> + 'a {
    let table = tables.get(table);
    table.into_iter().flat_map(|table| {
        table.rows.iter().map(move |row| {
            move |column: &str| match column {
                "__lsn" => Value::Binary(row.lsn.as_slice().to_vec()),
                column => value_of(&table.schema, &row.row, column),
            }
        })
    })
}

/// Segments by customer, without those that have none.
fn segments(tables: &QueryTables) -> BTreeMap<Value, Value> {
    let customers = named(tables, "customers").map(|customer| (customer("customer_id"), customer("segment")));
    customers.filter(|(_, segment)| !segment.is_null()).collect()
}

fn sum_by_group(tables: &QueryTables) -> Vec<Row> {
    let segments = segments(tables);
    let mut groups: BTreeMap<Value, (i64, i128)> = BTreeMap::new();
    for order in named(tables, "orders") {
        let segment = segments.get(&order("customer_id")).cloned().unwrap_or_else(|| "UNKNOWN".into());
        let group = groups.entry(segment).or_default();
        *group = (group.0 + 1, group.1 + order("amount").decimal());
    }
    let result = groups.into_iter().map(|(segment, (count, sum))| row([segment, count.into(), Value::Decimal(sum)]));
    result.collect()
}

fn orders_with_segment(tables: &QueryTables) -> Vec<Row> {
    let segments = segments(tables);
    let joined = named(tables, "orders").map(|order| {
        let segment = segments.get(&order("customer_id")).cloned().unwrap_or(Value::Null);
        row([order("order_id"), order("customer_id"), segment, order("amount"), order("__lsn")])
    });
    joined.collect()
}

fn kpi(tables: &QueryTables) -> Vec<Row> {
    let segments = segments(tables);
    let segment = |customer: &Value| segments.get(customer).cloned().unwrap_or_else(|| "UNKNOWN".into());
    let minute = |time: Value| Value::Time(time.integer().div_euclid(60_000_000) * 60_000_000);
    let mut groups: BTreeMap<(Value, Value), (i64, i128, i128, i64)> = BTreeMap::new();
    let mut customers = BTreeMap::new();
    for order in named(tables, "orders") {
        let group = groups.entry((minute(order("created_at")), segment(&order("customer_id")))).or_default();
        *group = (group.0 + 1, group.1 + order("amount").decimal(), group.2, group.3 + 1);
        customers.insert(order("order_id"), order("customer_id"));
    }
    for payment in named(tables, "payments") {
        let Some(customer) = customers.get(&payment("order_id")) else { continue };
        let group = groups.entry((minute(payment("paid_at")), segment(customer))).or_default();
        *group = (group.0, group.1, group.2 + payment("paid_amount").decimal(), group.3 + 1);
    }
    let result = groups.into_iter().map(|((minute, segment), (count, amount, paid, weight))| {
        row([minute, segment, count.into(), Value::Decimal(amount), Value::Decimal(paid), weight.into()])
    });
    result.collect()
}
