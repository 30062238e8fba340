//! Row changes as the statements that an application would issue, on one connection.
//!
//! Which orders live is never listed: an update or deletion takes the first living order at or above a drawn id. Several
//! writers share the orders out by the remainder of their ids, so that none waits for another's row.

use futures::future::try_join_all;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use shori_core::{Error, ErrorKind, Result};
use shori_postgres::{Server, Session, sql_error};
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::mix::draw_status;
use crate::generate::amount::draw_amount;
use crate::generate::counts::Operation;

const INSERT: &str = "
insert into ORDERS (customer_id, product_id, quantity, unit_price)
values ($1, $2, $3, $4::text::decimal(10, 2))
returning id::int8
";
const SET_STATUS: &str = "
update ORDERS
set order_status = $4
where id = (FOUND)
returning id::int8
";
const SET_QUANTITY: &str = "
update ORDERS
set quantity = $4
where id = (FOUND)
returning id::int8
";
const SET_PRICE: &str = "
update ORDERS
set unit_price = $4::text::decimal(10, 2)
where id = (FOUND)
returning id::int8
";
const DELETE: &str = "
delete from ORDERS
where id = (FOUND)
returning id::int8
";
const FOUND: &str = "
    select id
    from ORDERS
    where id >= $1::int8 and id % $2::int8 = $3::int8
    order by id
    limit 1
";
const NEWEST: &str = "
select coalesce(max(id), 0)::int8
from ORDERS
";

/// Statements that are under way at once. So few are sent in the order that they are made in.
const PIPELINED_MAX: usize = 25;
/// Times that a change which met no order is drawn again; then an order is inserted instead.
const DRAWS_MAX: usize = 16;
const PRODUCTS: i32 = 1_000;
const QUANTITY_MAX: i32 = 10;
/// Of a hundred updates, those of the status and of the quantity; the rest is of the price.
const STATUS_PERCENT: u32 = 60;
const QUANTITY_PERCENT: u32 = 25;

/// How a statement or a transaction failed.
pub(super) enum Failure {
    /// Another program's transaction was in the way: the same may succeed now.
    Conflict(Error),
    Other(Error),
}

struct Statements {
    insert: Statement,
    set_status: Statement,
    set_quantity: Statement,
    set_price: Statement,
    delete: Statement,
}

/// Which orders are this writer's.
#[derive(Clone, Copy)]
pub(super) struct Share {
    pub writers: i64,
    pub remainder: i64,
}

/// A connection with its statements.
pub(super) struct Desk {
    session: Session,
    statements: Statements,
    object: String,
    share: Share,
    customers: i32,
    /// No order had a larger id when this was last seen.
    newest: i64,
}

/// One change, ready to be sent.
struct Change<'s> {
    statement: &'s Statement,
    values: Vec<Value>,
}

enum Value {
    Id(i64),
    Number(i32),
    Text(String),
}

impl Value {
    fn sql(&self) -> &(dyn ToSql + Sync) {
        match self {
            Self::Id(id) => id,
            Self::Number(number) => number,
            Self::Text(text) => text,
        }
    }
}

impl Desk {
    /// Fails when the server or the sample table is missing.
    pub(super) async fn open(server: &Server, table: &str, share: Share, customers: u32) -> Result<Self> {
        let session = server.connect().await?;
        let object = format!("table {table} of {}", server.name());
        let client = &session.client;
        let fail = |cause: tokio_postgres::Error| {
            let is_missing =
                [Some(&SqlState::UNDEFINED_TABLE), Some(&SqlState::UNDEFINED_COLUMN)].contains(&cause.code());
            let error = sql_error("write to", &object, cause);
            if !is_missing {
                return error;
            }
            Error::new(ErrorKind::Usage, "write to", object.clone(), error.to_string())
                .with_remedy("run shori init --sample to create the sample table")
        };
        let prepare = async |sql: &str| {
            let sql = sql.replace("FOUND", FOUND).replace("ORDERS", table);
            client.prepare(&sql).await.map_err(fail)
        };
        let statements = Statements {
            insert: prepare(INSERT).await?,
            set_status: prepare(SET_STATUS).await?,
            set_quantity: prepare(SET_QUANTITY).await?,
            set_price: prepare(SET_PRICE).await?,
            delete: prepare(DELETE).await?,
        };
        let newest = client.query_one(&NEWEST.replace("ORDERS", table), &[]).await.map_err(fail)?.get(0);
        let customers = i32::try_from(customers).unwrap_or(i32::MAX).max(1);
        Ok(Self { session, statements, object, share, customers, newest })
    }

    /// Commits one transaction that makes each of the changes, and returns what they came to be: where no order is left
    /// to update or delete, one is inserted.
    pub(super) async fn transact(
        &mut self,
        rng: &mut ChaCha8Rng,
        wanted: &[Operation],
    ) -> std::result::Result<Vec<Operation>, Failure> {
        self.execute("begin").await?;
        let mut made = Vec::with_capacity(wanted.len());
        for part in wanted.chunks(PIPELINED_MAX) {
            let mut left = part.to_vec();
            for draw in 0..=DRAWS_MAX {
                if draw == DRAWS_MAX {
                    left.fill(Operation::Insert);
                }
                let ids = self.send(rng, &left).await?;
                self.newest = ids.iter().flatten().copied().fold(self.newest, i64::max);
                let met = |(operation, id): (&Operation, &Option<i64>)| id.is_some().then_some(*operation);
                made.extend(left.iter().zip(&ids).filter_map(met));
                let mut missed = ids.iter().map(Option::is_none);
                left.retain(|_| missed.next().unwrap_or(false));
                if left.is_empty() {
                    break;
                }
            }
        }
        self.execute("commit").await?;
        Ok(made)
    }

    /// Leaves a transaction that failed.
    pub(super) async fn roll_back(&self) -> std::result::Result<(), Failure> {
        self.execute("rollback").await
    }

    async fn execute(&self, statement: &str) -> std::result::Result<(), Failure> {
        self.session.client.batch_execute(statement).await.map_err(|cause| self.failure(cause))
    }

    /// Makes the changes in order, sending each without waiting for the one before; the id of the order that it met.
    async fn send(
        &self,
        rng: &mut ChaCha8Rng,
        operations: &[Operation],
    ) -> std::result::Result<Vec<Option<i64>>, Failure> {
        let changes: Vec<Change<'_>> = operations.iter().map(|operation| self.draw(rng, *operation)).collect();
        let values: Vec<Vec<&(dyn ToSql + Sync)>> =
            changes.iter().map(|change| change.values.iter().map(Value::sql).collect()).collect();
        let sent =
            changes.iter().zip(&values).map(|(change, values)| self.session.client.query_opt(change.statement, values));
        let rows = try_join_all(sent).await.map_err(|cause| self.failure(cause))?;
        Ok(rows.iter().map(|row| row.as_ref().map(|row| row.get(0))).collect())
    }

    fn draw(&self, rng: &mut ChaCha8Rng, operation: Operation) -> Change<'_> {
        let statements = &self.statements;
        if operation == Operation::Insert {
            let numbers = [
                rng.random_range(1..=self.customers),
                rng.random_range(1..=PRODUCTS),
                rng.random_range(1..=QUANTITY_MAX),
            ];
            let mut values: Vec<Value> = numbers.map(Value::Number).into();
            values.push(price(rng));
            return Change { statement: &statements.insert, values };
        }
        let from = rng.random_range(0..=self.newest.max(0));
        let mut values: Vec<Value> = [from, self.share.writers, self.share.remainder].map(Value::Id).into();
        if operation == Operation::Delete {
            return Change { statement: &statements.delete, values };
        }
        let chance = rng.random_range(0..100);
        let (statement, value) = if chance < STATUS_PERCENT {
            (&statements.set_status, Value::Text(draw_status(rng).to_string()))
        } else if chance < STATUS_PERCENT + QUANTITY_PERCENT {
            (&statements.set_quantity, Value::Number(rng.random_range(1..=QUANTITY_MAX)))
        } else {
            (&statements.set_price, price(rng))
        };
        values.push(value);
        Change { statement, values }
    }

    fn failure(&self, cause: tokio_postgres::Error) -> Failure {
        let conflicts = [Some(&SqlState::T_R_DEADLOCK_DETECTED), Some(&SqlState::T_R_SERIALIZATION_FAILURE)];
        let is_conflict = conflicts.contains(&cause.code());
        let error = sql_error("write to", &self.object, cause);
        if is_conflict { Failure::Conflict(error) } else { Failure::Other(error) }
    }
}

fn price(rng: &mut ChaCha8Rng) -> Value {
    let mut text = String::new();
    draw_amount(rng, &mut text);
    Value::Text(text)
}
