//! The tables of the model and random transactions over them.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, TimeUnit};
use rand::Rng;

use super::memory_database::{FIRST_COMMIT_TIME, MemoryDatabase, State, Write};
use super::memory_source::next_commit_time;
use super::value::{Row, Value, pick};
use crate::schema::TableSchema;

/// `customers`, `orders`, `payments` (with a key of two columns), and `notes`, which random transactions never touch.
pub fn model_tables() -> Vec<TableSchema> {
    let time = DataType::Timestamp(TimeUnit::Microsecond, None);
    let money = DataType::Decimal128(18, 2);
    let table = |name: &str, fields: Vec<Field>, key: &[&str]| TableSchema::new(name, fields, key).unwrap();
    vec![
        table(
            "customers",
            vec![
                Field::new("customer_id", DataType::Int64, false),
                Field::new("segment", DataType::Utf8, true),
                Field::new("updated_at", time.clone(), true),
            ],
            &["customer_id"],
        ),
        table(
            "orders",
            vec![
                Field::new("order_id", DataType::Int64, false),
                Field::new("customer_id", DataType::Int64, true),
                Field::new("amount", money.clone(), true),
                Field::new("status", DataType::Utf8, true),
                Field::new("created_at", time.clone(), true),
            ],
            &["order_id"],
        ),
        table(
            "payments",
            vec![
                Field::new("order_id", DataType::Int64, false),
                Field::new("part", DataType::Utf8, false),
                Field::new("paid_amount", money, true),
                Field::new("paid_at", time, true),
            ],
            &["order_id", "part"],
        ),
        table(
            "notes",
            vec![Field::new("note_id", DataType::Int64, false), Field::new("body", DataType::Utf8, true)],
            &["note_id"],
        ),
    ]
}

/// How transactions are drawn.
#[derive(Clone, Copy, Debug)]
pub struct TransactionShape {
    /// Keys are below this: the smaller, the more often a key is touched again.
    pub keys: i64,
    /// Statements of a transaction, at most; one in sixteen has eight times as many.
    pub statements: u32,
    /// Truncations in a thousand statements.
    pub truncates: u32,
    /// Key updates in a thousand statements.
    pub key_updates: u32,
}

impl Default for TransactionShape {
    fn default() -> Self {
        Self { keys: 8, statements: 4, truncates: 5, key_updates: 40 }
    }
}

/// Commits one random transaction (it may be empty) and returns its commit number.
pub fn commit_random(database: &MemoryDatabase, shape: &TransactionShape, rng: &mut impl Rng) -> u64 {
    let mut statements = rng.random_range(0..=shape.statements);
    if rng.random_range(0..16) == 0 {
        statements *= 8;
    }
    let state = database.state();
    let tables: Vec<_> = database.tables().iter().filter(|schema| &*schema.table != "notes").cloned().collect();
    let mut writes = Vec::new();
    for _ in 0..statements {
        let schema = &tables[rng.random_range(0..tables.len())];
        random_write(schema, &state, shape, rng, &mut writes);
    }
    let head = database.head();
    let last = (head > 0).then(|| database.commit_time(head));
    database.commit(next_commit_time(last, rng.random()), &writes)
}

/// Writes that fit the state before the transaction; some will no longer fit when they run, and are left out then.
fn random_write(
    schema: &TableSchema,
    state: &State,
    shape: &TransactionShape,
    rng: &mut impl Rng,
    writes: &mut Vec<Write>,
) {
    let table = schema.table.clone();
    let dice = rng.random_range(0..1000);
    if dice < shape.truncates {
        return writes.push(Write::Truncate { table });
    }
    let row = random_row(schema, shape.keys, rng);
    let key = pick(&row, &schema.key);
    if dice < shape.truncates + shape.key_updates {
        let old = pick(&random_row(schema, shape.keys, rng), &schema.key);
        return writes.push(Write::Update { table, key: old, row });
    }
    let stands = state[&table].get(&key);
    match (stands, rng.random_range(0..10)) {
        (None, _) => writes.push(Write::Insert { table, row }),
        (Some(_), 0..2) => writes.push(Write::Delete { table, key }),
        (Some(_), 2) => {
            writes.push(Write::Delete { table: table.clone(), key });
            writes.push(Write::Insert { table, row });
        }
        (Some(before), _) => writes.push(Write::Update { table, key, row: mix(before, &row, &schema.key, rng) }),
    }
}

/// `row` with some columns as they were.
fn mix(before: &Row, row: &Row, key: &[usize], rng: &mut impl Rng) -> Row {
    let mut value = |column: usize| {
        let keep = !key.contains(&column) && rng.random_range(0..2) == 0;
        if keep { before[column].clone() } else { row[column].clone() }
    };
    (0..row.len()).map(&mut value).collect()
}

fn random_row(schema: &TableSchema, keys: i64, rng: &mut impl Rng) -> Row {
    let mut value = |field: &Arc<Field>| {
        let leads = field.name().ends_with("_id");
        if field.is_nullable() && rng.random_range(0..8) == 0 {
            return Value::Null;
        }
        match field.data_type() {
            DataType::Int64 if leads => Value::Integer(rng.random_range(0..keys)),
            DataType::Utf8 => ["a", "b", "c", "d"][rng.random_range(0..4)].into(),
            DataType::Decimal128(..) => Value::Decimal(rng.random_range(-500..10_000)),
            // The more keys, the more minutes.
            _ => Value::Time(FIRST_COMMIT_TIME + rng.random_range(0..keys * 125_000_000)),
        }
    };
    schema.columns.fields().iter().map(&mut value).collect()
}
