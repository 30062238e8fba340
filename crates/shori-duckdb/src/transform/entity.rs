//! The rows of touched entities, before and after: what a query is run over when its result is maintained by entity.
//!
//! A table leads to the entity by a column of its own, or through another table. Touched entities are those that changed
//! rows lead to, before or after. Their rows make two schemas, `<name>_before` and `<name>_after`, in which every table
//! has its own name; a table that leads through another holds the rows that those of the other one join.
//!
//! State is scanned once per table at most, with only the columns that a query can mean; changed rows come from what
//! the steps kept, and a table whose touched rows are all changed ones is not scanned at all.

use std::collections::BTreeMap;
use std::sync::Arc;

use shori_core::Result;
use shori_core::projection::{Derivation, Entity, EntityPath, Maintenance, SqlProjection};

use super::layout::Layout;
use super::query::{used_columns, uses_lsn};
use super::session::{Session, WORK};
use super::steps::Ranges;
use super::tables::{Table, comma, lsn_bytes, lsn_parts};
use crate::database::quote_name;

/// What one set of such rows belongs to: projections that agree on it share it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub entity: Entity,
    pub ranges: Ranges,
    pub step: i64,
}

pub(super) fn schema_before(name: &str) -> String {
    format!("{name}_before")
}

pub(super) fn schema_after(name: &str) -> String {
    format!("{name}_after")
}

pub(super) fn drop_set(session: &Session, name: &str) -> Result<()> {
    session.run(&format!(
        "drop schema if exists {WORK}.{} cascade; drop schema if exists {WORK}.{} cascade",
        schema_before(name),
        schema_after(name)
    ))
}

struct Builder<'a> {
    session: &'a Session,
    layout: &'a Layout,
    scope: &'a Scope,
    name: &'a str,
}

/// Returns whether any entity is touched; if none is, there is nothing to run.
pub(super) fn build(session: &Session, layout: &Layout, scope: &Scope, name: &str) -> Result<bool> {
    let builder = Builder { session, layout, scope, name };
    for table in scope.entity.paths.keys() {
        builder.changed(layout.table(table)?)?;
    }
    let entities = builder.entities()?;
    session.run(&format!(
        "create schema {WORK}.{}; create schema {WORK}.{}",
        schema_before(name),
        schema_after(name)
    ))?;
    if entities == 0 {
        return Ok(false);
    }
    let mut order: Vec<(usize, &Arc<str>, &EntityPath)> =
        scope.entity.paths.iter().map(|(table, path)| (builder.depth(path), table, path)).collect();
    order.sort_by_key(|(depth, ..)| *depth);
    for (_, table, path) in order {
        let table = layout.table(table)?;
        match path {
            EntityPath::Column(column) => builder.rows_by_entity(table, column)?,
            EntityPath::Through { table: other, own_column, their_column } => {
                builder.rows_by_join(table, layout.table(other)?, own_column, their_column)?;
            }
        }
    }
    Ok(true)
}

fn temporary(kind: &str, table: &Table) -> String {
    quote_name(&format!("__{kind}_{}", table.name))
}

impl Builder<'_> {
    fn depth(&self, path: &EntityPath) -> usize {
        let (mut depth, mut at) = (0, Some(path));
        while let Some(EntityPath::Through { table, .. }) = at {
            depth += 1;
            at = self.scope.entity.paths.get(table).filter(|_| depth <= self.scope.entity.paths.len());
        }
        depth
    }

    /// Touched keys, and their rows at the checkpoint and now.
    fn changed(&self, table: &Table) -> Result<()> {
        let range = self.scope.ranges.of_nets(table);
        let (keys, touched) = (table.keys(""), temporary("touched", table));
        self.session.run(&format!(
            "create or replace temp table {touched} as
             select {keys}, min(__at) as __low, max(__at) as __high from {} where {range} group by {keys}",
            table.net()
        ))?;
        for (kind, end, side) in [("old", "__low", 0), ("new", "__high", 1)] {
            self.session.run(&format!(
                "create or replace temp table {} as
                 select {}, {} from {} n join {touched} t on {} and n.__at = t.{end} and n.__at % 2 = {side}
                 where {}",
                temporary(kind, table),
                table.list("n"),
                lsn_parts("n"),
                table.net(),
                table.key_match("n", "t"),
                range.replace("__at", "n.__at").replace("__capture", "n.__capture"),
            ))?;
        }
        Ok(())
    }

    /// Makes `__entities` and returns how many there are.
    fn entities(&self) -> Result<i64> {
        let mut parts = Vec::new();
        for (name, path) in &self.scope.entity.paths {
            let table = self.layout.table(name)?;
            let (old, new) = (temporary("old", table), temporary("new", table));
            match path {
                EntityPath::Column(column) => {
                    let column = quote_name(column);
                    parts.push(format!("select {column} as entity from {old} union all select {column} from {new}"));
                }
                EntityPath::Through { own_column, .. } => {
                    let own = quote_name(own_column);
                    let values = self.moved(table, &own, &old, &new);
                    parts.extend(self.reached(path, values)?);
                }
            }
        }
        self.session.run(&format!(
            "create or replace temp table __entities as select distinct entity from ({})",
            parts.join(" union all ")
        ))?;
        self.session.number("select count(*) from __entities")
    }

    /// Join values of the rows in which something changed that a query can mean: a row that leads to many entities should
    /// not touch them all for a change that none of them shows.
    fn moved(&self, table: &Table, own: &str, old: &str, new: &str) -> String {
        let mut columns = self.columns(table);
        columns.extend(table.key.iter().copied().filter(|index| !columns.contains(index)).collect::<Vec<_>>());
        let mut names: Vec<String> = columns.iter().map(|&index| table.name_of(index)).collect();
        if self.queries().any(|sql| uses_lsn(sql, table)) {
            names.push(lsn_parts(""));
        }
        let list = comma(names);
        let less = |left: &str, right: &str| format!("(select {list} from {left} except select {list} from {right})");
        format!("select {own} as value from {} union select {own} from {}", less(old, new), less(new, old))
    }

    /// The queries that are maintained by this entity.
    fn queries(&self) -> impl Iterator<Item = &SqlProjection> {
        self.layout.projections.values().filter_map(|projection| match &projection.derivation {
            Derivation::Sql(sql) => {
                let same =
                    matches!(&sql.maintenance, Maintenance::ByEntity { entity, .. } if *entity == self.scope.entity);
                same.then_some(sql)
            }
            _ => None,
        })
    }

    /// The entities that rows with these join `values` lead to; none if there are no values.
    fn reached(&self, path: &EntityPath, values: String) -> Result<Option<String>> {
        let (mut at, mut values) = (Some(path), values);
        if self.session.number(&format!("select count(*) from ({values}) where value is not null"))? == 0 {
            return Ok(None);
        }
        while let Some(EntityPath::Through { table, their_column, .. }) = at {
            at = self.scope.entity.paths.get(table);
            let next = match at {
                Some(EntityPath::Column(column)) => column,
                Some(EntityPath::Through { own_column, .. }) => own_column,
                None => break,
            };
            values = format!(
                "select s.{} as value from {} s semi join ({values}) v on s.{} = v.value",
                quote_name(next),
                self.layout.table(table)?.state(),
                quote_name(their_column)
            );
        }
        Ok(Some(format!("select value as entity from ({values})")))
    }

    fn rows_by_entity(&self, table: &Table, column: &str) -> Result<()> {
        let is_key = matches!(table.key.as_slice(), [only] if table.columns[*only].name() == column);
        let touched = temporary("touched", table);
        let name = quote_name(column);
        let (filter, mut condition) = if is_key {
            // All changed rows are at hand: only the other entities' rows are looked for.
            self.session.run(&format!(
                "create or replace temp table __sought as
                 select e.entity from __entities e anti join {touched} t on e.entity = t.{name}"
            ))?;
            ("__sought", String::new())
        } else {
            ("__entities", format!("anti join {touched} t on {}", table.key_match("s", "t")))
        };
        let sought = self.session.number(&format!("select count(entity) from {filter}"))?;
        let nulls = self.session.number(&format!("select count(*) from {filter} where entity is null"))?;
        condition = match (sought, nulls) {
            (0, 0) => "where false".to_string(),
            (_, 0) => format!("semi join {filter} e on s.{name} = e.entity {condition}"),
            _ => format!("semi join {filter} e on s.{name} is not distinct from e.entity {condition}"),
        };
        self.lay_out(table, &condition, "")
    }

    /// Rows of `table` that the rows of `other` join, before or after.
    fn rows_by_join(&self, table: &Table, other: &Table, own: &str, their: &str) -> Result<()> {
        let (own, their, other) = (quote_name(own), quote_name(their), quote_name(&other.name));
        self.session.run(&format!(
            "create or replace temp table __joined as
             select {their} as value from {WORK}.{}.{other} union select {their} from {WORK}.{}.{other}",
            schema_before(self.name),
            schema_after(self.name)
        ))?;
        let semi = format!("semi join __joined j on s.{own} = j.value");
        let touched = temporary("touched", table);
        let condition = format!("{semi} anti join {touched} t on {}", table.key_match("s", "t"));
        self.lay_out(table, &condition, &semi)
    }

    /// Makes the table in both schemas: unchanged rows from state, changed ones as they were and are.
    fn lay_out(&self, table: &Table, of_state: &str, of_changed: &str) -> Result<()> {
        let used = self.columns(table);
        let names = comma(used.iter().map(|&index| table.name_of(index)));
        let of_row = comma(used.iter().map(|&index| format!("s.{}", table.name_of(index))));
        let same = temporary("same", table);
        self.session.run(&format!(
            "create or replace temp table {same} as select {of_row}, {} from {} s {of_state}",
            lsn_parts("s"),
            table.state()
        ))?;
        for (schema, kind) in [(schema_before(self.name), "old"), (schema_after(self.name), "new")] {
            self.session.run(&format!(
                "create table {WORK}.{schema}.{} as
                 select {names}, {} as __lsn from (
                     select {names}, {parts} from {same}
                     union all
                     select {of_row}, {} from {} s {of_changed}
                 )",
                quote_name(&table.name),
                lsn_bytes(""),
                lsn_parts("s"),
                temporary(kind, table),
                parts = lsn_parts(""),
            ))?;
        }
        Ok(())
    }

    /// Columns that a query of this entity or a path can mean.
    fn columns(&self, table: &Table) -> Vec<usize> {
        let mut used = vec![false; table.columns.len()];
        let mut mark = |name: &str| {
            if let Some(index) = table.index_of(name) {
                used[index] = true;
            }
        };
        for (name, path) in &self.scope.entity.paths {
            match path {
                EntityPath::Column(column) if *name == table.name => mark(column),
                EntityPath::Column(_) => {}
                EntityPath::Through { table: other, own_column, their_column } => {
                    if *name == table.name {
                        mark(own_column);
                    }
                    if *other == table.name {
                        mark(their_column);
                    }
                }
            }
        }
        for sql in self.queries() {
            for (index, is_used) in used_columns(sql, table).into_iter().enumerate() {
                used[index] |= is_used;
            }
        }
        (0..used.len()).filter(|&index| used[index]).collect()
    }
}

/// No set of this step is ever looked for.
const NO_STEP: i64 = -1;

/// Sets of the current step, by name.
#[derive(Default)]
pub(super) struct Sets {
    made: BTreeMap<String, (Scope, bool)>,
    last: u64,
}

impl Sets {
    /// The set of `scope` if it is made, with whether it has any entity.
    pub fn find(&self, scope: &Scope) -> Option<(String, bool)> {
        self.made.iter().find(|(_, (known, _))| known == scope).map(|(name, (_, any))| (name.clone(), *any))
    }

    pub fn next_name(&mut self) -> String {
        self.last += 1;
        format!("entities_{}", self.last)
    }

    pub fn add(&mut self, name: String, scope: Scope, any: bool) {
        self.made.insert(name, (scope, any));
    }

    /// The transaction that made them was rolled back: what was made in it is gone, and the rest is made anew.
    pub fn lost(&mut self) {
        for (scope, _) in self.made.values_mut() {
            scope.step = NO_STEP;
        }
    }

    /// Drops the sets of other steps than `step`.
    pub fn retire(&mut self, session: &Session, step: Option<i64>) -> Result<()> {
        let old = self.made.iter().filter(|(_, (scope, _))| Some(scope.step) != step).map(|(name, _)| name.clone());
        for name in old.collect::<Vec<_>>() {
            drop_set(session, &name)?;
            self.made.remove(&name);
        }
        Ok(())
    }
}
