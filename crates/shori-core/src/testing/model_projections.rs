//! Projections of every kind over the tables of the model.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;

use super::memory_query::{KPI, ORDERS_WITH_SEGMENT, SUM_BY_GROUP};
use crate::position::CaptureId;
use crate::projection::{
    Deletes, Derivation, Entity, EntityPath, HistoryProjection, Maintenance, Measures, Projection, SqlProjection,
    Target, TargetShape, Tracked,
};
use crate::schema::TableSchema;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// By order: a customer leads to the orders that name it.
pub fn order_entity() -> Entity {
    let column = EntityPath::Column("order_id".into());
    let customer = EntityPath::Through {
        table: "orders".into(),
        own_column: "customer_id".into(),
        their_column: "customer_id".into(),
    };
    let paths = [("orders", column.clone()), ("payments", column), ("customers", customer)];
    Entity { paths: paths.map(|(table, path)| (Arc::from(table), path)).into() }
}

fn sql(name: &str, text: &str, tables: &[&str], key: &[&str], measures: Option<Measures>) -> Projection {
    let maintenance = match measures {
        Some(measures) => {
            let mut entity = order_entity();
            entity.paths.retain(|table, _| tables.contains(&&**table));
            Maintenance::ByEntity { entity, measures }
        }
        None => Maintenance::Recompute,
    };
    let sql = SqlProjection {
        file: format!("sql/{name}.sql"),
        text: text.into(),
        tables: tables.iter().map(|table| Arc::from(*table)).collect(),
        key: names(key),
        maintenance,
    };
    Projection { name: name.into(), derivation: Derivation::Sql(sql) }
}

/// Orders by segment, added up by order.
pub fn sums() -> Projection {
    let measures = Measures::Additive {
        additive: names(&["orders_count", "amount_sum"]),
        weight: "orders_count".into(),
        publish_weight: true,
    };
    sql("sums", SUM_BY_GROUP, &["customers", "orders"], &["segment"], Some(measures))
}

/// The same, computed anew each time.
pub fn sums_recomputed() -> Projection {
    sql("sums_recomputed", SUM_BY_GROUP, &["customers", "orders"], &["segment"], None)
}

pub fn orders_joined() -> Projection {
    let tables = ["customers", "orders"];
    sql("orders_joined", ORDERS_WITH_SEGMENT, &tables, &["order_id"], Some(Measures::PerEntity))
}

/// Orders and payments by minute and segment; the weight is not published.
pub fn kpi() -> Projection {
    let measures = Measures::Additive {
        additive: names(&["orders_count", "orders_amount_sum", "paid_amount_sum"]),
        weight: "base_rows".into(),
        publish_weight: false,
    };
    sql("kpi", KPI, &["customers", "orders", "payments"], &["minute_bucket", "segment"], Some(measures))
}

pub fn latest(table: &str) -> Projection {
    Projection { name: format!("{table}_latest").into(), derivation: Derivation::Latest { table: table.into() } }
}

/// `key` names the key columns in the history.
pub fn history(table: &str, key: &[&str]) -> Projection {
    let derivation = HistoryProjection {
        table: table.into(),
        key: names(key),
        tracked: Tracked::default(),
        deletes: Deletes::default(),
    };
    Projection { name: format!("{table}_history").into(), derivation: Derivation::History(derivation) }
}

/// A history that leaves out one column, and says what was deleted.
pub fn payments_history() -> Projection {
    let derivation = HistoryProjection {
        table: "payments".into(),
        key: names(&["order_key", "part"]),
        tracked: Tracked::AllBut(names(&["paid_at"])),
        deletes: Deletes::Tombstone,
    };
    Projection { name: "payments_history".into(), derivation: Derivation::History(derivation) }
}

/// One of each kind over the tables of [`model_tables`](super::transactions::model_tables), an idle table's too.
pub fn model_projections() -> Vec<Projection> {
    vec![
        sums(),
        sums_recomputed(),
        orders_joined(),
        kpi(),
        latest("customers"),
        latest("notes"),
        latest("payments"),
        history("orders", &["order_key"]),
        payments_history(),
    ]
}

/// The target that a projection's output goes to. `columns` is what the transform describes; `tables` are the schemas
/// of the captured tables, by capture.
pub fn target_of(
    projection: &Projection,
    columns: SchemaRef,
    tables: &BTreeMap<CaptureId, Arc<TableSchema>>,
) -> Target {
    let read = projection.tables();
    let of = |schema: &Arc<TableSchema>| read.contains(&schema.table);
    let captures = tables.iter().filter(|(_, schema)| of(schema)).map(|(id, _)| id.clone()).collect();
    let (key, shape) = match &projection.derivation {
        Derivation::Sql(sql) => (sql.key.clone(), TargetShape::Rows),
        Derivation::Latest { table } => {
            let schema = tables.values().find(|schema| schema.table == *table).expect("a captured table");
            (names(&schema.key_names()), TargetShape::Rows)
        }
        Derivation::History(history) => (history.key.clone(), TargetShape::Versions),
    };
    let (definition, keeps_tombstones) = (projection.definition(), projection.keeps_tombstones());
    Target { projection: projection.name.clone(), shape, key, columns, definition, keeps_tombstones, captures }
}
