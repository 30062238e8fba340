//! What a step touched, as entities: the rows that belong to them, before and after, for the queries that are kept up
//! to date by them.
//!
//! A set lies in the work catalog: per table `now_<set>_<table>` (rows of touched entities as they stand) and
//! `old_<set>_<table>` (touched rows as they were; only their key where there was none). Two schemas of views show
//! queries the one state and the other. Everything is found by key or index: a set costs what it holds.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};
use shori_core::projection::{Derivation, Entity, EntityPath, Maintenance, SqlProjection};
use shori_core::{Error, ErrorKind, Result};

use super::cells::Cell;
use super::cells::Cells;
use super::hands::{Hands, Second, both, worth_sharing};
use super::kept::{self, Net};
use super::key::Key;
use super::layout::Layout;
use super::query::{used_columns, uses_lsn};
use super::rows::Finder;
use super::session::{Loader, WORK, WorkTable, comma};
use super::steps::Ranges;
use super::tables::{Head, Table};
use crate::database::{quote_name, traced};

/// Entities of a set at most: they are held in memory. Where more are touched, the query runs in full.
const ENTITIES_MAX: usize = 2_000_000;

/// What changed, as seen from a checkpoint: what a set of rows belongs to.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub ranges: Ranges,
    pub step: i64,
}

/// What a step means to the queries that a set serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Touched {
    Nothing,
    /// Rows of so many bytes, before and after.
    Some(usize),
    TooMany,
}

pub(super) fn schema_before(set: usize) -> String {
    format!("set_{set}_before")
}

pub(super) fn schema_after(set: usize) -> String {
    format!("set_{set}_after")
}

type Values = HashSet<Key>;

struct Builder<'a> {
    hands: Hands<'a>,
    layout: &'a Layout,
    entity: &'a Entity,
    ranges: &'a Ranges,
    set: usize,
}

impl Builder<'_> {
    fn build(&self, second: &mut Option<Second<'_>>) -> Result<Touched> {
        let entities = traced("entities", || self.entities())?;
        if entities.is_empty() || entities.len() > ENTITIES_MAX {
            return Ok(if entities.is_empty() { Touched::Nothing } else { Touched::TooMany });
        }
        let mut order: Vec<(usize, &Arc<str>, &EntityPath)> =
            self.entity.paths.iter().map(|(table, path)| (self.depth(path), table, path)).collect();
        order.sort_by_key(|(depth, ..)| *depth);
        let (mut joined, mut bytes): (BTreeMap<&str, Values>, usize) = Default::default();
        for (_, name, path) in order {
            let table = self.layout.table(name)?;
            let (column, values) = match path {
                EntityPath::Column(column) => (column, None),
                EntityPath::Through { own_column, .. } => {
                    (own_column, Some(joined.remove(&**name).unwrap_or_default()))
                }
            };
            let column = column_of(table, column)?;
            let mut leads = self.leads(name)?;
            let joined_by = values.as_ref().map(|values| (column, values));
            bytes += traced("rows before", || self.old_rows(table, joined_by, &mut leads))?;
            let wanted = values.as_ref().unwrap_or(&entities);
            bytes += traced("rows now", || self.rows_now(second, table, column, wanted, &mut leads))?;
            for lead in leads {
                joined.entry(lead.to).or_default().extend(lead.values);
            }
        }
        Ok(Touched::Some(bytes))
    }

    fn depth(&self, path: &EntityPath) -> usize {
        let (mut depth, mut at) = (0, Some(path));
        while let Some(EntityPath::Through { table, .. }) = at {
            depth += 1;
            at = self.entity.paths.get(table).filter(|_| depth <= self.entity.paths.len());
        }
        depth
    }

    /// The tables whose rows are reached through those of `name`.
    fn leads(&self, name: &str) -> Result<Vec<Lead<'_>>> {
        let mut leads = Vec::new();
        for (to, path) in &self.entity.paths {
            if let EntityPath::Through { table, their_column, .. } = path
                && **table == *name
            {
                let column = column_of(self.layout.table(name)?, their_column)?;
                leads.push(Lead { to, column, values: Values::new() });
            }
        }
        Ok(leads)
    }

    /// Entities of all touched rows, as they were and are.
    fn entities(&self) -> Result<Values> {
        let mut entities = Values::new();
        for (name, path) in &self.entity.paths {
            let table = self.layout.table(name)?;
            match path {
                EntityPath::Column(column) => {
                    let column = column_of(table, column)?;
                    self.each_net(table, |net| {
                        for row in [&net.before, &net.after].into_iter().flatten() {
                            entities.insert(value(table, column, &row.cells)?);
                        }
                        Ok(())
                    })?;
                }
                EntityPath::Through { own_column, .. } => {
                    let led = self.led(table, column_of(table, own_column)?)?;
                    self.reach(path, led, &mut entities)?;
                }
            }
            if entities.len() > ENTITIES_MAX {
                break;
            }
        }
        Ok(entities)
    }

    fn each_net(&self, table: &Table, take: impl FnMut(Net) -> Result<()>) -> Result<()> {
        kept::nets(self.hands.view, table, self.ranges, take)
    }

    /// What touched rows hold in `own`, where something changed that a query can mean: a row that leads to many entities
    /// should not touch them all for a change that none of them shows.
    fn led(&self, table: &Table, own: usize) -> Result<Values> {
        let columns = self.columns(table);
        let by_lsn = self.queries().any(|sql| uses_lsn(sql, table));
        let mut led = Values::new();
        self.each_net(table, |net| {
            if let (Some(before), Some(after)) = (&net.before, &net.after) {
                let (mut old, mut new) = (Vec::new(), Vec::new());
                Cells(&before.cells).collect(table.columns.len(), &mut old)?;
                Cells(&after.cells).collect(table.columns.len(), &mut new)?;
                let same = columns.iter().all(|&column| old[column] == new[column]);
                if same && !(by_lsn && before.head.lsn != after.head.lsn) {
                    return Ok(());
                }
            }
            for row in [&net.before, &net.after].into_iter().flatten() {
                led.extend(joinable(table, own, &row.cells)?);
            }
            Ok(())
        })?;
        Ok(led)
    }

    /// Adds the entities that rows with these join values lead to.
    fn reach(&self, path: &EntityPath, led: Values, entities: &mut Values) -> Result<()> {
        let (mut at, mut values) = (Some(path), led);
        while let Some(EntityPath::Through { table, their_column, .. }) = at {
            let other = self.layout.table(table)?;
            at = self.entity.paths.get(table);
            let (next, is_last) = match at {
                Some(EntityPath::Column(column)) => (column_of(other, column)?, true),
                Some(EntityPath::Through { own_column, .. }) => (column_of(other, own_column)?, false),
                None => break,
            };
            let mut found = Values::new();
            let mut finder = Finder::new(self.hands.view, other)?;
            let theirs = column_of(other, their_column)?;
            if is_last && other.key == [next] {
                finder.find_keys(theirs, sorted(&values), |key| {
                    found.insert(key);
                })?;
                values = found;
                continue;
            }
            finder.find(theirs, sorted(&values), |_, row| {
                let (_, cells) = Head::read(row)?;
                match is_last {
                    true => drop(found.insert(value(other, next, cells.0)?)),
                    false => found.extend(joinable(other, next, cells.0)?),
                }
                Ok(())
            })?;
            values = found;
        }
        entities.extend(values);
        Ok(())
    }

    /// Lays the touched rows of a table as they were, those alone that `joined` leads to.
    fn old_rows(&self, table: &Table, joined: Option<(usize, &Values)>, leads: &mut [Lead<'_>]) -> Result<usize> {
        let columns = self.columns(table);
        let old = self.old(table);
        self.hands.session.create(&old)?;
        let mut loader = Loader::new(self.hands.session, old)?;
        let mut bytes = 0;
        self.each_net(table, |net| {
            let mut cells = Vec::with_capacity(table.columns.len());
            let before = match &net.before {
                Some(row) => {
                    Cells(&row.cells).collect(table.columns.len(), &mut cells)?;
                    match joined {
                        Some((own, values)) => values.contains(&table.value_of(own, &cells)?).then_some(row),
                        None => Some(row),
                    }
                }
                None => {
                    let row = net.after.as_ref().map(|row| &*row.cells).unwrap_or_default();
                    Cells(row).collect(table.columns.len(), &mut cells)?;
                    None
                }
            };
            if before.is_some() {
                leads.iter_mut().try_for_each(|lead| lead.note(table, &cells))?;
            }
            bytes += before.map_or(0, |row| row.cells.len());
            let lsn = before.map(|row| row.head.lsn);
            let shown = columns.iter().map(|&column| cells[column]);
            loader.push(shown.chain([lsn.as_ref().map(|lsn| lsn.as_slice()), Some(&[u8::from(before.is_some())])]))
        })?;
        loader.finish()?;
        Ok(bytes)
    }

    /// Lays the rows that hold one of `values` in `column`, as they stand.
    fn rows_now(
        &self,
        second: &mut Option<Second<'_>>,
        table: &Table,
        column: usize,
        values: &Values,
        leads: &mut [Lead<'_>],
    ) -> Result<usize> {
        let (columns, now, values) = (self.columns(table), self.now(table), sorted(values));
        self.hands.session.create(&now)?;
        let rows = RowsNow { table, now, columns, column };
        let second = worth_sharing(second, values.len());
        let (own, others) = values.split_at(if second.is_some() { values.len() / 2 } else { values.len() });
        let mut led: Vec<Lead<'_>> = leads.iter().map(Lead::to_same).collect();
        let lay_others = |hands: Hands<'_>| rows.lay(hands, others, &mut led);
        let (own, others) = both(self.hands, second, |hands| rows.lay(hands, own, leads), lay_others)?;
        leads.iter_mut().zip(led).for_each(|(lead, led)| lead.values.extend(led.values));
        Ok(own + others)
    }

    fn now(&self, table: &Table) -> WorkTable {
        let mut fields: Vec<Field> = self.columns(table).into_iter().map(|index| nullable(table, index)).collect();
        fields.push(Field::new("__lsn", DataType::Binary, true));
        self.work_table("now", table, fields)
    }

    fn old(&self, table: &Table) -> WorkTable {
        let mut fields: Vec<Field> = self.columns(table).into_iter().map(|index| nullable(table, index)).collect();
        fields.push(Field::new("__lsn", DataType::Binary, true));
        fields.push(Field::new("__stood", DataType::Boolean, true));
        self.work_table("old", table, fields)
    }

    fn work_table(&self, kind: &str, table: &Table, fields: Vec<Field>) -> WorkTable {
        let name = format!("{kind}_{}_{}", self.set, table.name);
        WorkTable { schema: "main".into(), name, columns: Arc::new(Schema::new(fields)) }
    }

    /// Makes every table seen in both schemas.
    fn make_views(&self) -> Result<()> {
        for schema in [schema_before(self.set), schema_after(self.set)] {
            self.hands
                .session
                .run(&format!("drop schema if exists {WORK}.{schema} cascade; create schema {WORK}.{schema}"))?;
        }
        for name in self.entity.paths.keys() {
            let table = self.layout.table(name)?;
            let (now, old) = (self.now(table), self.old(table));
            self.hands.session.create(&now)?;
            self.hands.session.create(&old)?;
            let names = comma(now.columns.fields().iter().map(|field| quote_name(field.name())));
            let (now, old, name) = (now.full_name(), old.full_name(), quote_name(name));
            let same = |&index: &usize| format!("n.{0} = o.{0}", quote_name(table.columns[index].name()));
            let same = table.key.iter().map(same).collect::<Vec<_>>().join(" and ");
            self.hands.session.run(&format!(
                "create view {WORK}.{}.{name} as select {names} from {now};
                 create view {WORK}.{}.{name} as
                 select {names} from {now} n anti join {old} o on {same}
                 union all
                 select {names} from {old} where __stood",
                schema_after(self.set),
                schema_before(self.set)
            ))?;
        }
        Ok(())
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

/// Where rows of a table that stand are laid.
struct RowsNow<'a> {
    table: &'a Table,
    now: WorkTable,
    columns: Vec<usize>,
    /// They are found by it.
    column: usize,
}

impl RowsNow<'_> {
    fn lay(&self, hands: Hands<'_>, values: &[&Key], leads: &mut [Lead<'_>]) -> Result<usize> {
        let mut bytes = 0;
        let mut loader = Loader::new(hands.session, self.now.clone())?;
        Finder::new(hands.view, self.table)?.find(self.column, values.iter().copied(), |_, row| {
            bytes += row.len();
            let (head, rest) = Head::read(row)?;
            let mut cells = Vec::with_capacity(self.table.columns.len());
            rest.collect(self.table.columns.len(), &mut cells)?;
            leads.iter_mut().try_for_each(|lead| lead.note(self.table, &cells))?;
            loader.push(self.columns.iter().map(|&column| cells[column]).chain([Some(head.lsn.as_slice())]))
        })?;
        loader.finish()?;
        Ok(bytes)
    }
}

/// Values by which rows of one table lead to those of another.
struct Lead<'a> {
    to: &'a str,
    column: usize,
    values: Values,
}

impl Lead<'_> {
    /// One that leads to the same and has no values.
    fn to_same(&self) -> Self {
        Self { to: self.to, column: self.column, values: Values::new() }
    }

    fn note(&mut self, table: &Table, cells: &[Cell<'_>]) -> Result<()> {
        if cells[self.column].is_some() {
            self.values.insert(table.value_of(self.column, cells)?);
        }
        Ok(())
    }
}

fn column_of(table: &Table, name: &str) -> Result<usize> {
    table.index_of(name).ok_or_else(|| {
        Error::new(ErrorKind::Internal, "find", format!("column {name} of {}", table.name), "the table lacks it")
    })
}

fn nullable(table: &Table, index: usize) -> Field {
    table.columns[index].as_ref().clone().with_nullable(true)
}

fn cell<'r>(column: usize, row: &'r [u8]) -> Result<Cell<'r>> {
    let mut cells = Cells(row);
    for _ in 0..column {
        cells.next()?;
    }
    cells.next()
}

fn value(table: &Table, column: usize, row: &[u8]) -> Result<Key> {
    Key::of_one(table.type_of(column), cell(column, row)?)
}

/// As [`value`]; null joins nothing.
fn joinable(table: &Table, column: usize, row: &[u8]) -> Result<Option<Key>> {
    let cell = cell(column, row)?;
    cell.map(|cell| Key::of_one(table.type_of(column), Some(cell))).transpose()
}

/// Neighbours are looked for one after the other.
fn sorted(values: &Values) -> Vec<&Key> {
    let mut sorted: Vec<&Key> = values.iter().collect();
    sorted.sort_unstable();
    sorted
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
    /// Of what its tables hold, with what is touched.
    scope: Option<(Scope, Touched)>,
    has_views: bool,
}

impl Sets {
    /// The set of what changed in `scope`, made if it does not stand.
    pub fn get(
        &mut self,
        hands: Hands<'_>,
        second: &mut Option<Second<'_>>,
        layout: &Layout,
        entity: &Entity,
        scope: Scope,
    ) -> Result<(usize, Touched)> {
        let stands = |made: &Made| match &made.scope {
            Some((known, touched)) if known.step == scope.step && known.ranges.agree_with(&scope.ranges) => {
                serves(&made.entity, entity).then_some(*touched)
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
        let builder = Builder { hands, layout, entity, ranges: &scope.ranges, set };
        if !made.has_views {
            builder.make_views()?;
            made.has_views = true;
        }
        let touched = builder.build(second)?;
        made.scope = Some((scope, touched));
        Ok((set, touched))
    }

    /// What was made may be gone, or be of another layout: all is made anew.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
