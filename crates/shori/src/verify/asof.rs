//! Tables as they stood when the newest change was a given one.
//!
//! The copies hold the tables at one moment. For a later one, the images since take their rows' place. For an earlier one,
//! rows touched between are put back to their last image before; where that is no longer kept, an insert or a
//! key update tells that there was no row, and a deletion which row there was.
//!
//! A row image that cannot be carried is as if it had not been: the row stays what it was carried as last.

use std::collections::BTreeMap;

use shori_core::Result;

use super::scratch::{Scratch, quote_name};
use super::serving::Checkpoint;
use super::source::catch_up_first;
use super::values::WHOLE;
use super::{TableInput, VerifyInput};

/// The column of every table that tells the last change of a row, as far as that is known: else null.
pub(super) const LSN: &str = "__lsn";

pub(super) struct AsOf<'a> {
    input: &'a VerifyInput,
    scratch: &'a Scratch,
    /// The newest change in the copies.
    head: u64,
    schemas: BTreeMap<Vec<(String, u64)>, String>,
    /// Those that could not be completed are not among them.
    begun: usize,
}

impl<'a> AsOf<'a> {
    pub(super) fn new(input: &'a VerifyInput, scratch: &'a Scratch, head: u64) -> Self {
        Self { input, scratch, head, schemas: BTreeMap::new(), begun: 0 }
    }

    /// The schema that holds the checkpoint's tables under their own names.
    pub(super) fn schema(&mut self, checkpoint: &Checkpoint) -> Result<String> {
        let wanted: Vec<_> = checkpoint.iter().map(|(table, id)| (table.clone(), *id)).collect();
        if let Some(schema) = self.schemas.get(&wanted) {
            return Ok(schema.clone());
        }
        let schema = format!("asof_{}", self.begun);
        self.begun += 1;
        self.scratch.execute(&format!("create schema {schema}"))?;
        for (table, id) in &wanted {
            self.make(&schema, self.input.table(table)?, *id)?;
        }
        self.schemas.insert(wanted, schema.clone());
        Ok(schema)
    }

    fn make(&self, schema: &str, table: &TableInput, id: u64) -> Result<()> {
        let name = quote_name(&table.name);
        let key = table.key.iter().map(|column| quote_name(column)).collect::<Vec<_>>().join(", ");
        let columns = table.columns.iter().map(|column| quote_name(&column.name)).collect::<Vec<_>>().join(", ");
        let moved = format!("{schema}.{}", quote_name(&format!("{} moved", table.name)));
        let last = format!("{schema}.{}", quote_name(&format!("{} last", table.name)));
        if id >= self.head {
            self.scratch.execute(&forward(&moved, &name, &key, &columns, self.head, id))?;
        } else {
            self.scratch.execute(&back(&moved, &name, &key, table, self.head, id))?;
            let unknown = self.scratch.number(&format!("select count(*) from {moved} where stands is null"))?;
            if unknown > 0 {
                return Err(catch_up_first(&table.name));
            }
        }
        self.scratch.execute(&uncarried(&moved, &name, &key, &columns, id))?;
        let unknown = format!("{schema}.{}", quote_name(&unknown(&table.name)));
        self.scratch.execute(&format!(
            "
            create table {unknown} as
            select distinct {key}
            from misfits.{name}
            anti join {moved} using ({key});

            create table {last} as
            select {key}, unhex(printf('%016x', max(change_id))) as {LSN}
            from touched.{name}
            where change_id <= {id}
            group by {key};

            create table {schema}.{name} as
            with standing as (
                select {columns}
                from base.{name}
                anti join {moved} using ({key})
                union all
                select {columns}
                from {moved}
                where stands
            )
            select {columns}, {LSN}
            from standing
            left join {last} using ({key});
            "
        ))
    }
}

/// The table of those keys whose row cannot be carried, and of which it is not known what was carried last, if anything.
pub(super) fn unknown(table: &str) -> String {
    format!("{table} unknown")
}

/// Every key whose row cannot be carried, as it was carried last up to `id`, or else as the first update found it.
fn uncarried(moved: &str, name: &str, key: &str, columns: &str, id: u64) -> String {
    format!(
        "
        insert into {moved} by name
        with known as (
            select *, change_op <> 8 as is_carried, if(change_op = 8, -change_id, change_id) as rank
            from (from touched.{name} where change_id <= {id} union all by name from before.{name})
            semi join misfits.{name} using ({key})
            anti join {moved} using ({key})
        )
        select {columns}, change_op <> 1 and change_op <> 3 as stands
        from known
        qualify row_number() over (partition by {key} order by is_carried desc, rank desc) = 1
        "
    )
}

/// The last image of every key between.
fn forward(moved: &str, name: &str, key: &str, columns: &str, head: u64, id: u64) -> String {
    format!(
        "
        create table {moved} as
        select {columns}, change_op in (2, 4) as stands
        from touched.{name}
        where change_id > {head} and change_id <= {id}
        qualify row_number() over (partition by {key} order by change_id desc) = 1
        "
    )
}

/// Every key between as it stood before; `stands` is null where that cannot be told.
fn back(moved: &str, name: &str, key: &str, table: &TableInput, head: u64, id: u64) -> String {
    let values = table
        .columns
        .iter()
        .map(|column| quote_name(&column.name))
        .map(|column| match table.key.iter().any(|part| quote_name(part) == column) {
            true => column,
            false => {
                format!(
                    "case
                        when before.change_op is not null then before.{column}
                        when earlier.change_op is not null then earlier.{column}
                        else after.{column}
                    end as {column}"
                )
            }
        })
        .collect::<Vec<_>>()
        .join(", ");
    format!(
        "
        create table {moved} as
        with after as (
            select *, change_op = 4 and change_id - 1 in (
                select change_id from touched.{name} where change_op = 3
            ) as by_key_update
            from touched.{name}
            where change_id > {id} and change_id <= {head}
            qualify row_number() over (partition by {key} order by change_id) = 1
        ),
        before as (
            select *
            from touched.{name}
            where change_id <= {id}
            qualify row_number() over (partition by {key} order by change_id desc) = 1
        ),
        earlier as (
            select found.*
            from before.{name} as found
            join after using ({key})
            where found.change_id < after.change_id
            qualify row_number() over (partition by {key} order by found.change_id) = 1
        )
        select
            {values},
            case
                when before.change_op is not null then before.change_op in (2, 4)
                when earlier.change_op is not null then true
                when after.change_op = 2 or after.by_key_update then false
                when after.change_op in (1, 3) then after.{WHOLE}
            end as stands
        from after
        left join before using ({key})
        left join earlier using ({key})
        "
    )
}
