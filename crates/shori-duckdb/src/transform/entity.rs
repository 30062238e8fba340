//! The rows of touched entities, before and after: what a query is run over when its result is maintained by entity.
//!
//! A table leads to the entity by a column of its own, or through another table. Touched entities are those that changed
//! rows lead to, before or after. A projection whose ways to the entity are among those of another is served by that
//! one's set: an entity that is not touched has the same rows before and after, and adds nothing.
//!
//! Layout, per set and table, in memory: `changed_<set>_<table>` (rows that steps changed, as they were and as they are),
//! `led_<set>_<table>` (join values of changed rows that lead through another table), `same_<set>_<table>` (rows of
//! touched entities that stand unchanged). Views over them make two schemas, `set_<set>_before` and `set_<set>_after`, in
//! which every table has its own name; a table that leads through another shows the rows that those of the other join.
//!
//! State is scanned with only the columns that a query can mean. Where rows lead through another table that holds the
//! entity as its key, one scan finds both the entities and their rows.

use std::sync::Arc;

use shori_core::Result;
use shori_core::projection::{Derivation, Entity, EntityPath, Maintenance, SqlProjection};

use super::layout::Layout;
use super::query::{used_columns, uses_lsn};
use super::session::{Session, WORK};
use super::steps::Ranges;
use super::tables::{Table, comma, lsn_bytes, lsn_parts, qualified};
use crate::database::quote_name;

/// What changed, as seen from a checkpoint: what a set of rows belongs to.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub ranges: Ranges,
    pub step: i64,
}

pub(super) fn schema_before(set: usize) -> String {
    format!("set_{set}_before")
}

pub(super) fn schema_after(set: usize) -> String {
    format!("set_{set}_after")
}

struct Builder<'a> {
    session: &'a Session,
    layout: &'a Layout,
    entity: &'a Entity,
    ranges: &'a Ranges,
    set: usize,
    /// The views are yet to be made.
    is_new: bool,
}

impl Builder<'_> {
    /// Returns whether any entity is touched; if none is, there is nothing to run.
    fn build(&self) -> Result<bool> {
        for name in self.entity.paths.keys() {
            self.changed(self.layout.table(name)?)?;
        }
        let found = self.entities()?;
        if found == 0 {
            return Ok(false);
        }
        if self.is_new {
            for schema in [schema_before(self.set), schema_after(self.set)] {
                self.session
                    .run(&format!("drop schema if exists {WORK}.{schema} cascade; create schema {WORK}.{schema}"))?;
            }
        }
        let mut order: Vec<(usize, &Arc<str>, &EntityPath)> =
            self.entity.paths.iter().map(|(table, path)| (self.depth(path), table, path)).collect();
        order.sort_by_key(|(depth, ..)| *depth);
        for (_, table, path) in order {
            let table = self.layout.table(table)?;
            match path {
                EntityPath::Column(column) => self.rows_by_entity(table, column)?,
                EntityPath::Through { table: other, own_column, their_column } => {
                    let joined = self.joined(other, own_column, their_column);
                    self.rows_by_join(table, &joined)?;
                }
            }
        }
        Ok(true)
    }

    fn temporary(&self, kind: &str, table: &Table) -> String {
        format!("temp.main.{}", quote_name(&format!("{kind}_{}_{}", self.set, table.name)))
    }

    fn depth(&self, path: &EntityPath) -> usize {
        let (mut depth, mut at) = (0, Some(path));
        while let Some(EntityPath::Through { table, .. }) = at {
            depth += 1;
            at = self.entity.paths.get(table).filter(|_| depth <= self.entity.paths.len());
        }
        depth
    }

    /// Rows of touched keys at the checkpoint and now.
    fn changed(&self, table: &Table) -> Result<()> {
        let names = format!("{}, {}", self.names(table, ""), lsn_parts(""));
        self.session.run(&format!(
            "create or replace temp table {} as
             select {names}, __at % 2 = 0 as __is_old
             from (
                 select {names}, __at, min(__at) over of_key as __low, max(__at) over of_key as __high
                 from {} where {}
                 window of_key as (partition by {})
             )
             where __at = case when __at % 2 = 0 then __low else __high end",
            self.temporary("changed", table),
            table.net(),
            self.ranges.of_nets(table),
            table.keys("")
        ))
    }

    /// Makes `entities` and returns how many there are. Rows that are met on the way stay in `same`.
    fn entities(&self) -> Result<i64> {
        let mut parts = Vec::new();
        for (name, path) in &self.entity.paths {
            let table = self.layout.table(name)?;
            match path {
                EntityPath::Column(column) => {
                    let changed = self.temporary("changed", table);
                    parts.push(format!("select {} as entity from {changed}", quote_name(column)));
                    if is_key(table, column) {
                        parts.push(format!("select {} from {}", quote_name(column), self.temporary("same", table)));
                        self.lay_same(table, "where false")?;
                    }
                }
                EntityPath::Through { .. } => {}
            }
        }
        for (name, path) in &self.entity.paths {
            if let EntityPath::Through { table: other, own_column, their_column } = path {
                let led = self.led(self.layout.table(name)?, own_column)?;
                let (Some(led), Some(next)) = (led, self.entity.paths.get(other)) else { continue };
                let other = self.layout.table(other)?;
                match next {
                    EntityPath::Column(column) if is_key(other, column) => {
                        let semi = format!("semi join {led} l on s.{} = l.value", quote_name(their_column));
                        self.add_same(other, &semi)?;
                    }
                    _ => parts.push(self.reached(path, format!("from {led}"))?),
                }
            }
        }
        self.session.made(&format!(
            "create or replace temp table {} as select distinct entity from ({})",
            self.all_entities(),
            parts.join(" union all ")
        ))
    }

    fn all_entities(&self) -> String {
        format!("temp.main.entities_{}", self.set)
    }

    /// Join values of the rows in which something changed that a query can mean: a row that leads to many entities should
    /// not touch them all for a change that none of them shows. `None` if there are none.
    fn led(&self, table: &Table, own: &str) -> Result<Option<String>> {
        let mut names = self.names(table, "");
        if self.queries().any(|sql| uses_lsn(sql, table)) {
            names = format!("{names}, {}", lsn_parts(""));
        }
        let led = self.temporary("led", table);
        // A row that is the same before and after comes twice.
        let rows = self.session.made(&format!(
            "create or replace temp table {led} as
             select distinct value from (
                 select {} as value from {} group by {names} having count(*) = 1
             ) where value is not null",
            quote_name(own),
            self.temporary("changed", table),
        ))?;
        Ok((rows > 0).then_some(led))
    }

    /// The queries that this set serves.
    fn queries(&self) -> impl Iterator<Item = &SqlProjection> {
        self.layout.projections.values().filter_map(|projection| match &projection.derivation {
            Derivation::Sql(sql) => match &sql.maintenance {
                Maintenance::ByEntity { entity, .. } if serves(self.entity, entity) => Some(sql),
                _ => None,
            },
            _ => None,
        })
    }

    /// The entities that rows with these join `values` lead to.
    fn reached(&self, path: &EntityPath, values: String) -> Result<String> {
        let (mut at, mut values) = (Some(path), values);
        while let Some(EntityPath::Through { table, their_column, .. }) = at {
            at = self.entity.paths.get(table);
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
        Ok(format!("select value as entity from ({values})"))
    }

    fn rows_by_entity(&self, table: &Table, column: &str) -> Result<()> {
        let (entities, name) = (self.all_entities(), quote_name(column));
        if is_key(table, column) {
            // Changed rows and those met on the way are at hand: only the other entities' rows are looked for.
            let known = |kind: &str| {
                let own = quote_name(column);
                format!("anti join {} {kind} on e.entity = {kind}.{own}", self.temporary(kind, table))
            };
            let sought = format!("select e.entity from {entities} e {} {}", known("changed"), known("same"));
            self.add_same(table, &format!("semi join ({sought}) e on s.{name} = e.entity"))?;
        } else {
            let nulls = self.session.number(&format!("select count(*) from {entities} where entity is null"))?;
            let same = if nulls == 0 { "=" } else { "is not distinct from" };
            let semi = format!("semi join {entities} e on s.{name} {same} e.entity");
            self.lay_same(table, &format!("{semi} {}", self.without_changed(table)))?;
        }
        self.show(table, "")
    }

    /// Rows of `table` that the rows of another join, before or after.
    fn rows_by_join(&self, table: &Table, joined: &str) -> Result<()> {
        self.lay_same(table, &format!("{joined} {}", self.without_changed(table)))?;
        self.show(table, joined)
    }

    fn joined(&self, other: &str, own: &str, their: &str) -> String {
        let (own, their, other) = (quote_name(own), quote_name(their), quote_name(other));
        format!(
            "semi join (
                 select {their} as value from {WORK}.{}.{other} union all select {their} from {WORK}.{}.{other}
             ) j on s.{own} = j.value",
            schema_before(self.set),
            schema_after(self.set)
        )
    }

    fn without_changed(&self, table: &Table) -> String {
        format!("anti join {} c on {}", self.temporary("changed", table), table.key_match("s", "c"))
    }

    fn of_state(&self, table: &Table) -> String {
        format!("select {}, {} from {} s", self.names(table, "s"), lsn_parts("s"), table.state())
    }

    fn lay_same(&self, table: &Table, condition: &str) -> Result<()> {
        self.session.run(&format!(
            "create or replace temp table {} as {} {condition}",
            self.temporary("same", table),
            self.of_state(table)
        ))
    }

    /// Adds rows that are not there yet.
    fn add_same(&self, table: &Table, condition: &str) -> Result<()> {
        let same = self.temporary("same", table);
        self.session.run(&format!(
            "insert into {same} {} {condition} {} anti join {same} k on {}",
            self.of_state(table),
            self.without_changed(table),
            table.key_match("s", "k")
        ))
    }

    /// Makes the table seen in both schemas: unchanged rows from state, changed ones as they were and are.
    fn show(&self, table: &Table, of_changed: &str) -> Result<()> {
        if !self.is_new {
            return Ok(());
        }
        let (names, parts) = (self.names(table, ""), lsn_parts(""));
        for (schema, side) in [(schema_before(self.set), "s.__is_old"), (schema_after(self.set), "not s.__is_old")] {
            self.session.run(&format!(
                "create view {WORK}.{schema}.{} as
                 select {names}, {} as __lsn from (
                     select {names}, {parts} from {}
                     union all
                     select {}, {} from {} s {of_changed} where {side}
                 )",
                quote_name(&table.name),
                lsn_bytes(""),
                self.temporary("same", table),
                self.names(table, "s"),
                lsn_parts("s"),
                self.temporary("changed", table),
            ))?;
        }
        Ok(())
    }

    fn names(&self, table: &Table, alias: &str) -> String {
        comma(self.columns(table).into_iter().map(|index| qualified(alias, &table.name_of(index))))
    }

    /// Columns that a query or a path can mean, and the key.
    fn columns(&self, table: &Table) -> Vec<usize> {
        let mut used: Vec<bool> = (0..table.columns.len()).map(|index| table.key.contains(&index)).collect();
        let mut mark = |name: &str| {
            if let Some(index) = table.index_of(name) {
                used[index] = true;
            }
        };
        for (name, path) in &self.entity.paths {
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

fn is_key(table: &Table, column: &str) -> bool {
    matches!(table.key.as_slice(), [only] if table.columns[*only].name() == column)
}

/// Whether a set made for `whole` serves those who are maintained by `part`.
fn serves(whole: &Entity, part: &Entity) -> bool {
    part.paths.iter().all(|(table, path)| whole.paths.get(table) == Some(path))
}

/// The sets that were made last, one for each entity. Their numbers name their tables.
#[derive(Default)]
pub(super) struct Sets(Vec<Made>);

struct Made {
    entity: Entity,
    /// Of what its tables hold, with whether any entity is touched.
    scope: Option<(Scope, bool)>,
    has_views: bool,
}

impl Sets {
    /// The set of what changed in `scope`, and whether any entity is touched; made if it does not stand.
    pub fn get(&mut self, session: &Session, layout: &Layout, entity: &Entity, scope: Scope) -> Result<(usize, bool)> {
        let stands = |made: &Made| match &made.scope {
            Some((known, any)) if known.step == scope.step && known.ranges.agree_with(&scope.ranges) => {
                serves(&made.entity, entity).then_some(*any)
            }
            _ => None,
        };
        if let Some(found) = self.0.iter().enumerate().find_map(|(set, made)| Some((set, stands(made)?))) {
            return Ok(found);
        }
        let set = match self.0.iter().position(|made| made.entity == *entity) {
            Some(set) => set,
            None => {
                self.0.push(Made { entity: entity.clone(), scope: None, has_views: false });
                self.0.len() - 1
            }
        };
        let made = &mut self.0[set];
        made.scope = None;
        let is_new = !made.has_views;
        let any = Builder { session, layout, entity, ranges: &scope.ranges, set, is_new }.build()?;
        made.has_views |= any;
        made.scope = Some((scope, any));
        Ok((set, any))
    }

    /// What was made may be gone with a transaction, or be of another layout: all is made anew.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
