//! Carries out actions, each as the one statement that an application would issue.
//!
//! Ids that live are never listed: an id is drawn from a range, and a statement that meets no row is drawn again. Only
//! of deleted ids a bounded number is kept, so that some come back.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rusqlite::{Connection, Statement, params};
use shori_core::Result;

use super::clock::{Clock, Readings};
use super::database_error;
use super::ledger::Table;
use super::mix::{Action, draw_action, draw_segment, draw_status};
use crate::generate::amount::draw_amount;
use crate::generate::counts::Operation;

/// Orders whose updates and payments are likely.
const RECENT_IDS: i64 = 10_000;
/// Deleted ids that may come back.
const DELETED_IDS_MAX: usize = 10_000;
/// Draws until an order is inserted instead.
const DRAWS_MAX: usize = 16;
/// Share of customer updates that move the customer to another segment.
const SEGMENT_CHANGES: f64 = 0.1;
/// Of so many customers of orders, one does not exist.
const UNKNOWN_CUSTOMER_ONE_IN: u32 = 500;
const MINUTE_US: i64 = 60_000_000;

const INSERT_CUSTOMER: &str = "
insert or ignore into customers (customer_id, segment, is_active, updated_at)
values (?1, ?2, ?3, ?4)
";
const UPDATE_SEGMENT: &str = "
update customers
set segment = ?2, updated_at = ?3
where customer_id = ?1
";
const UPDATE_ACTIVITY: &str = "
update customers
set is_active = 1 - is_active, updated_at = ?2
where customer_id = ?1
";
const DELETE_CUSTOMER: &str = "
delete from customers
where customer_id = ?1
";
const INSERT_ORDER: &str = "
insert or ignore into orders (order_id, customer_id, amount, status, created_at, updated_at)
values (?1, ?2, ?3, ?4, ?5, ?5)
";
const UPDATE_STATUS: &str = "
update orders
set status = ?2, updated_at = ?3
where order_id = ?1
";
const UPDATE_AMOUNT: &str = "
update orders
set amount = ?2, updated_at = ?3
where order_id = ?1
";
const MOVE_ORDER: &str = "
update orders
set created_at = ?2, updated_at = ?3
where order_id = ?1
";
const CHANGE_ORDER_KEY: &str = "
update orders
set order_id = ?2, updated_at = ?3
where order_id = ?1
";
const DELETE_ORDER: &str = "
delete from orders
where order_id = ?1
";
const INSERT_PAYMENT: &str = "
insert or ignore into payments (payment_id, order_id, paid_amount, paid_at)
values (?1, ?2, ?3, ?4)
";
const MOVE_PAYMENT: &str = "
update payments
set paid_at = ?2
where payment_id = ?1
";
const DELETE_PAYMENT: &str = "
delete from payments
where payment_id = ?1
";

/// Ids of one table: all are below `next`.
#[derive(Default)]
struct Ids {
    next: i64,
    deleted: Vec<i64>,
}

impl Ids {
    fn any(&self, rng: &mut ChaCha8Rng) -> i64 {
        if self.next > 1 { rng.random_range(1..self.next) } else { 0 }
    }

    fn recent(&self, rng: &mut ChaCha8Rng) -> i64 {
        if self.next > 1 { rng.random_range((self.next - RECENT_IDS).max(1)..self.next) } else { 0 }
    }

    fn keep_deleted(&mut self, id: i64, rng: &mut ChaCha8Rng) {
        if self.deleted.len() < DELETED_IDS_MAX {
            self.deleted.push(id);
        } else {
            let index = rng.random_range(0..self.deleted.len());
            self.deleted[index] = id;
        }
    }

    /// Often the newest: a key that is deleted and comes back within one transaction.
    fn take_deleted(&mut self, rng: &mut ChaCha8Rng) -> Option<i64> {
        if self.deleted.is_empty() {
            None
        } else if rng.random_bool(0.5) {
            self.deleted.pop()
        } else {
            let index = rng.random_range(0..self.deleted.len());
            Some(self.deleted.swap_remove(index))
        }
    }
}

struct Statements<'c> {
    insert_customer: Statement<'c>,
    update_segment: Statement<'c>,
    update_activity: Statement<'c>,
    delete_customer: Statement<'c>,
    insert_order: Statement<'c>,
    update_status: Statement<'c>,
    update_amount: Statement<'c>,
    move_order: Statement<'c>,
    change_order_key: Statement<'c>,
    delete_order: Statement<'c>,
    insert_payment: Statement<'c>,
    move_payment: Statement<'c>,
    delete_payment: Statement<'c>,
}

impl<'c> Statements<'c> {
    fn prepare(connection: &'c Connection) -> rusqlite::Result<Self> {
        Ok(Self {
            insert_customer: connection.prepare(INSERT_CUSTOMER)?,
            update_segment: connection.prepare(UPDATE_SEGMENT)?,
            update_activity: connection.prepare(UPDATE_ACTIVITY)?,
            delete_customer: connection.prepare(DELETE_CUSTOMER)?,
            insert_order: connection.prepare(INSERT_ORDER)?,
            update_status: connection.prepare(UPDATE_STATUS)?,
            update_amount: connection.prepare(UPDATE_AMOUNT)?,
            move_order: connection.prepare(MOVE_ORDER)?,
            change_order_key: connection.prepare(CHANGE_ORDER_KEY)?,
            delete_order: connection.prepare(DELETE_ORDER)?,
            insert_payment: connection.prepare(INSERT_PAYMENT)?,
            move_payment: connection.prepare(MOVE_PAYMENT)?,
            delete_payment: connection.prepare(DELETE_PAYMENT)?,
        })
    }
}

pub(super) struct Application<'c> {
    statements: Statements<'c>,
    rng: ChaCha8Rng,
    readings: Readings,
    customers: Ids,
    orders: Ids,
    payments: Ids,
    amount: String,
    time: String,
    other_time: String,
}

/// What an action was to the tables; `None` where it met no row.
type Outcome = rusqlite::Result<Option<(Table, Operation)>>;

impl<'c> Application<'c> {
    pub(super) fn new(connection: &'c Connection, rng: ChaCha8Rng, clock: Clock) -> Result<Self> {
        let statements = Statements::prepare(connection).map_err(|cause| {
            database_error("write to", "the sample tables", cause).with_remedy("run shori init --sample to create them")
        })?;
        Ok(Self {
            statements,
            rng,
            readings: Readings::new(clock),
            customers: Ids::default(),
            orders: Ids::default(),
            payments: Ids::default(),
            amount: String::new(),
            time: String::new(),
            other_time: String::new(),
        })
    }

    /// Another writer may have been here: new ids are above all that are there.
    pub(super) fn read_ids(&mut self, connection: &Connection) -> Result<()> {
        let newest = "
            select
                (select coalesce(max(customer_id), 0) from customers),
                (select coalesce(max(order_id), 0) from orders),
                (select coalesce(max(payment_id), 0) from payments)
        ";
        let (customer, order, payment): (i64, i64, i64) = connection
            .query_row(newest, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .map_err(|cause| database_error("read ids of", "the sample tables", cause))?;
        self.customers.next = self.customers.next.max(customer + 1);
        self.orders.next = self.orders.next.max(order + 1);
        self.payments.next = self.payments.next.max(payment + 1);
        Ok(())
    }

    pub(super) fn rng(&mut self) -> &mut ChaCha8Rng {
        &mut self.rng
    }

    /// How many customers there have ever been.
    pub(super) fn customers(&self) -> i64 {
        self.customers.next - 1
    }

    pub(super) fn insert_customer(&mut self) -> Result<(Table, Operation)> {
        let id = self.customers.next;
        self.customers.next += 1;
        match self.write_customer(id) {
            Ok(_) => Ok((Table::Customers, Operation::Insert)),
            Err(cause) => Err(database_error("insert into", "table customers", cause)),
        }
    }

    /// Makes exactly one row change.
    pub(super) fn act(&mut self) -> Result<(Table, Operation)> {
        let fail = |cause| database_error("change", "the sample tables", cause);
        for _ in 0..DRAWS_MAX {
            let action = draw_action(&mut self.rng);
            if let Some(change) = self.perform(action).map_err(fail)? {
                return Ok(change);
            }
        }
        loop {
            if let Some(change) = self.perform(Action::InsertOrder).map_err(fail)? {
                return Ok(change);
            }
        }
    }

    fn perform(&mut self, action: Action) -> Outcome {
        match action {
            Action::InsertOrder => {
                let id = self.orders.next;
                self.orders.next += 1;
                self.write_order(id)
            }
            Action::UpdateOrder => {
                let id = self.orders.recent(&mut self.rng);
                self.update_order(id)
            }
            Action::UpdateOldOrder => {
                let id = self.orders.any(&mut self.rng);
                if self.rng.random_bool(0.25) { self.move_order(id) } else { self.update_order(id) }
            }
            Action::DeleteOrder => self.delete_order(),
            Action::ReinsertOrder => match self.orders.take_deleted(&mut self.rng) {
                Some(id) => self.write_order(id),
                None => Ok(None),
            },
            Action::ChangeOrderKey => self.change_order_key(),
            Action::InsertPayment => self.insert_payment(),
            Action::MovePayment => self.move_payment(),
            Action::DeletePayment => {
                let id = self.payments.any(&mut self.rng);
                let rows = self.statements.delete_payment.execute(params![id])?;
                Ok((rows == 1).then_some((Table::Payments, Operation::Delete)))
            }
            Action::UpdateCustomer => self.update_customer(),
            Action::DeleteCustomer => {
                let id = self.customers.any(&mut self.rng);
                let rows = self.statements.delete_customer.execute(params![id])?;
                if rows == 1 {
                    self.customers.keep_deleted(id, &mut self.rng);
                }
                Ok((rows == 1).then_some((Table::Customers, Operation::Delete)))
            }
            Action::ReinsertCustomer => match self.customers.take_deleted(&mut self.rng) {
                Some(id) => self.write_customer(id),
                None => Ok(None),
            },
        }
    }

    fn read_time(&mut self) -> i64 {
        let now = self.readings.next();
        self.readings.format(now, &mut self.time);
        now
    }

    /// A time up to an hour before now: another minute than most.
    fn read_other_time(&mut self) {
        let now = self.read_time();
        let minutes = self.rng.random_range(1..=60);
        self.readings.format(now - minutes * MINUTE_US, &mut self.other_time);
    }

    fn write_customer(&mut self, id: i64) -> Outcome {
        self.read_time();
        let segment = draw_segment(&mut self.rng);
        let active = self.rng.random_bool(0.95);
        let rows = self.statements.insert_customer.execute(params![id, segment, active, self.time])?;
        Ok((rows == 1).then_some((Table::Customers, Operation::Insert)))
    }

    fn update_customer(&mut self) -> Outcome {
        let id = self.customers.any(&mut self.rng);
        self.read_time();
        let rows = if self.rng.random_bool(SEGMENT_CHANGES) {
            let segment = draw_segment(&mut self.rng);
            self.statements.update_segment.execute(params![id, segment, self.time])?
        } else {
            self.statements.update_activity.execute(params![id, self.time])?
        };
        Ok((rows == 1).then_some((Table::Customers, Operation::Update)))
    }

    fn write_order(&mut self, id: i64) -> Outcome {
        self.read_time();
        let unknown = self.rng.random_range(0..UNKNOWN_CUSTOMER_ONE_IN) == 0;
        let customer = if unknown { i64::from(i32::MAX) } else { self.customers.any(&mut self.rng) };
        draw_amount(&mut self.rng, &mut self.amount);
        let status = draw_status(&mut self.rng);
        let rows = self.statements.insert_order.execute(params![id, customer, self.amount, status, self.time])?;
        Ok((rows == 1).then_some((Table::Orders, Operation::Insert)))
    }

    fn update_order(&mut self, id: i64) -> Outcome {
        self.read_time();
        let rows = if self.rng.random_bool(0.6) {
            let status = draw_status(&mut self.rng);
            self.statements.update_status.execute(params![id, status, self.time])?
        } else {
            draw_amount(&mut self.rng, &mut self.amount);
            self.statements.update_amount.execute(params![id, self.amount, self.time])?
        };
        Ok((rows == 1).then_some((Table::Orders, Operation::Update)))
    }

    fn move_order(&mut self, id: i64) -> Outcome {
        self.read_other_time();
        let rows = self.statements.move_order.execute(params![id, self.other_time, self.time])?;
        Ok((rows == 1).then_some((Table::Orders, Operation::Update)))
    }

    fn delete_order(&mut self) -> Outcome {
        let id = self.orders.any(&mut self.rng);
        let rows = self.statements.delete_order.execute(params![id])?;
        if rows == 1 {
            self.orders.keep_deleted(id, &mut self.rng);
        }
        Ok((rows == 1).then_some((Table::Orders, Operation::Delete)))
    }

    /// The order's payments stay behind: they are those of a dead order.
    fn change_order_key(&mut self) -> Outcome {
        let (old, new) = (self.orders.recent(&mut self.rng), self.orders.next);
        self.read_time();
        let rows = self.statements.change_order_key.execute(params![old, new, self.time])?;
        if rows == 1 {
            self.orders.next += 1;
            self.orders.keep_deleted(old, &mut self.rng);
        }
        Ok((rows == 1).then_some((Table::Orders, Operation::KeyUpdate)))
    }

    fn insert_payment(&mut self) -> Outcome {
        let order = self.orders.recent(&mut self.rng);
        if order == 0 {
            return Ok(None);
        }
        let id = self.payments.next;
        self.payments.next += 1;
        self.read_time();
        draw_amount(&mut self.rng, &mut self.amount);
        let rows = self.statements.insert_payment.execute(params![id, order, self.amount, self.time])?;
        Ok((rows == 1).then_some((Table::Payments, Operation::Insert)))
    }

    fn move_payment(&mut self) -> Outcome {
        let id = self.payments.any(&mut self.rng);
        self.read_other_time();
        let rows = self.statements.move_payment.execute(params![id, self.other_time])?;
        Ok((rows == 1).then_some((Table::Payments, Operation::Update)))
    }
}
