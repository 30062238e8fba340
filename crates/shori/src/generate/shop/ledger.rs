//! What was generated, by table and operation: in memory for the report, and in the database for an independent check.
//!
//! `generator_ledger(table_name, op, captured, rows)` is written in the transaction of the changes that it counts, so it
//! holds exactly what was committed. It is no captured table. `captured` is 1 for changes made while the table had
//! triggers, which is how a capture is recognised here.

use rusqlite::{Connection, Statement, params};
use shori_core::Result;

use super::database_error;
use crate::generate::counts::{OPERATIONS, Operation, OperationCounts, TableCounts};

pub(super) const CREATE: &str = "
create table if not exists generator_ledger (
    table_name text not null,
    op text not null,
    captured integer not null,
    rows integer not null,
    primary key (table_name, op, captured)
) without rowid
";

const ADD: &str = "
insert into generator_ledger (table_name, op, captured, rows)
values (?1, ?2, ?3, ?4)
on conflict (table_name, op, captured)
do update set rows = rows + excluded.rows
";

const CAPTURED: &str = "
select count(*)
from sqlite_schema
where type = 'trigger'
    and tbl_name = ?1
";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Table {
    Customers = 0,
    Orders = 1,
    Payments = 2,
}

pub(super) const TABLES: [(Table, &str); 3] =
    [(Table::Customers, "customers"), (Table::Orders, "orders"), (Table::Payments, "payments")];

/// Counts changes; those of the open transaction apart.
pub(super) struct Ledger<'c> {
    connection: &'c Connection,
    add: Statement<'c>,
    captured: [bool; TABLES.len()],
    schema_version: Option<i64>,
    open: [[u64; OPERATIONS.len()]; TABLES.len()],
    committed: [[u64; OPERATIONS.len()]; TABLES.len()],
}

impl<'c> Ledger<'c> {
    pub(super) fn new(connection: &'c Connection) -> Result<Self> {
        let add = connection.prepare(ADD).map_err(|cause| database_error("write", "table generator_ledger", cause))?;
        Ok(Self {
            connection,
            add,
            captured: [false; TABLES.len()],
            schema_version: None,
            open: Default::default(),
            committed: Default::default(),
        })
    }

    /// Looks again for captures if the schema is another one; to be called in the open transaction.
    pub(super) fn begin(&mut self, schema_version: i64) -> Result<()> {
        if self.schema_version == Some(schema_version) {
            return Ok(());
        }
        for (table, name) in TABLES {
            let triggers: i64 = self
                .connection
                .query_row(CAPTURED, params![name], |row| row.get(0))
                .map_err(|cause| database_error("read", "the schema", cause))?;
            self.captured[table as usize] = triggers > 0;
        }
        self.schema_version = Some(schema_version);
        Ok(())
    }

    pub(super) fn count(&mut self, table: Table, operation: Operation) {
        self.open[table as usize][operation as usize] += 1;
    }

    /// Writes the open transaction's counts into it.
    pub(super) fn write(&mut self) -> Result<()> {
        for (table, name) in TABLES {
            for (operation, operation_name) in OPERATIONS {
                let rows = self.open[table as usize][operation as usize];
                if rows > 0 {
                    self.add
                        .execute(params![name, operation_name, self.captured[table as usize], rows as i64])
                        .map_err(|cause| database_error("write", "table generator_ledger", cause))?;
                }
            }
        }
        Ok(())
    }

    /// The open transaction has been committed.
    pub(super) fn committed(&mut self) {
        for (sums, rows) in self.committed.iter_mut().flatten().zip(self.open.iter_mut().flatten()) {
            *sums += std::mem::take(rows);
        }
    }

    pub(super) fn counts(&self) -> TableCounts {
        let of = |(table, name): (Table, _)| {
            let [inserts, updates, deletes, key_updates] = self.committed[table as usize];
            (name, OperationCounts { inserts, updates, deletes, key_updates })
        };
        TableCounts(TABLES.map(of).into())
    }
}
