//! Computes what takes a target from its checkpoint to the applied position.
//!
//! What a query gives is laid out in the work catalog, so that it stays as it is while state goes on: `out_<n>_rows`, and
//! `out_<n>_keys` for keys that lose their row. Current rows and versions come straight from the state file: see
//! [`direct`](super::direct).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rusqlite::Connection;
use shori_core::position::{CaptureId, Micros, Positions};
use shori_core::projection::{Derivation, Maintenance, Measures, Projection, SqlProjection};
use shori_core::store::{OutputKind, OutputReader};
use shori_core::transform::Applied;
use shori_core::{Error, ErrorKind, Result};

use super::direct;
use super::entity::{Scope, Sets, Touched, schema_after, schema_before};
use super::file::{self, StateFile};
use super::layout::Layout;
use super::mirror::{LIVE, Mirrors};
use super::query::{self, Shape};
use super::reader::{Part, PartKind, READY_ROWS_MAX, Ready, Tables, stream};
use super::results::{self, Change};
use super::session::{Session, WORK, comma};
use super::steps::{self, Need, Ranges, Standing};
use super::tables::Table;
use crate::database::{Database, quote_name, quote_text};

/// An output as it lies there.
pub(super) struct Laid {
    pub kind: OutputKind,
    pub parts: Vec<Part>,
}

pub(super) enum Outcome {
    UpToDate,
    Behind,
    NeedsReplay,
    Output { positions: Positions, as_of_time: Micros, reader: Box<dyn OutputReader>, change: Change },
}

/// Rows of an output, and keys that lose theirs.
type Counts = (i64, i64);

/// Where the parts of one output lie.
#[derive(Clone)]
pub(super) struct Place(pub u64);

impl Place {
    pub fn rows(&self) -> String {
        format!("{WORK}.main.out_{}_rows", self.0)
    }

    pub fn keys(&self) -> String {
        format!("{WORK}.main.out_{}_keys", self.0)
    }

    pub fn drop_tables(&self, session: &Session) -> Result<()> {
        session.run(&format!("drop table if exists {}; drop table if exists {}", self.rows(), self.keys()))
    }
}

/// What is kept from one output to the next.
#[derive(Default)]
pub(super) struct Working {
    pub sets: Sets,
    pub mirrors: Mirrors,
}

type Give<'g> = &'g mut dyn FnMut(shori_core::store::OutputRows) -> Result<()>;

pub(super) struct Computation<'a> {
    pub database: &'a Database,
    pub session: &'a Session,
    /// What writes the state file; held, so that nothing moves. It knows the pages that were written last.
    pub connection: &'a Connection,
    pub file: &'a StateFile,
    pub layout: &'a Arc<Layout>,
    pub projection: &'a Projection,
    pub since: Option<&'a Positions>,
    pub place: &'a Place,
}

impl Computation<'_> {
    /// `shape` is for `sql` projections.
    pub fn run(&self, shape: Option<&Shape>, working: &mut Working) -> Result<Outcome> {
        // One transaction, so that the file is not locked anew for each statement.
        file::run(self.connection, "begin")?;
        let outcome = self.outcome(shape, working);
        file::roll_back(self.connection);
        outcome
    }

    fn outcome(&self, shape: Option<&Shape>, working: &mut Working) -> Result<Outcome> {
        let tables = self.layout.tables_of(self.projection)?;
        let applied = steps::applied(self.connection, self.layout)?;
        let need =
            if matches!(self.projection.derivation, Derivation::History(_)) { Need::Versions } else { Need::Nets };
        let ranges = match steps::standing(self.connection, &tables, &applied, self.since, need)? {
            Standing::Level => return Ok(Outcome::UpToDate),
            Standing::Behind => return Ok(Outcome::Behind),
            Standing::Covered(ranges) => Some(ranges),
            Standing::Gone => None,
        };
        let (positions, as_of_time) = target(&tables, &applied);
        let table = tables.first().cloned();
        let mut change = Change::Nothing;
        let reader = match (&self.projection.derivation, ranges, table) {
            (Derivation::History(_), None, _) => return Ok(Outcome::NeedsReplay),
            (Derivation::History(of), Some(ranges), Some(table)) => {
                let (of, is_whole) = (of.clone(), self.since.is_none());
                let kind = if is_whole { OutputKind::ReplaceVersions } else { OutputKind::Versions };
                let view = self.file.view()?;
                let read = move |give: Give<'_>| direct::history(&view, &table, &of, &ranges, is_whole, give);
                stream(self.database, kind, read)?
            }
            (Derivation::Latest { .. }, Some(ranges), Some(table)) if self.since.is_some() => {
                let view = self.file.view()?;
                stream(self.database, OutputKind::Merge, move |give| direct::latest(&view, &table, &ranges, give))?
            }
            (Derivation::Latest { .. }, _, Some(table)) => {
                let view = self.file.view()?;
                stream(self.database, OutputKind::Replace, move |give| direct::whole_table(&view, &table, give))?
            }
            (Derivation::Sql(sql), ranges, _) => {
                let Some(shape) = shape else { return Ok(Outcome::UpToDate) };
                let laid = self.query(sql, shape, ranges.filter(|_| self.since.is_some()), working)?;
                change = match laid.kind {
                    OutputKind::Replace => Change::Whole,
                    _ if laid.parts.is_empty() => Change::Nothing,
                    _ => Change::Difference,
                };
                self.read(laid)?
            }
            (_, _, None) => return Ok(Outcome::UpToDate),
        };
        Ok(Outcome::Output { positions, as_of_time, reader, change })
    }

    fn read(&self, laid: Laid) -> Result<Box<dyn OutputReader>> {
        let rows: i64 = laid.parts.iter().map(|part| part.rows).sum();
        if rows > READY_ROWS_MAX {
            return Ok(Box::new(Tables::new(self.database, laid.kind, laid.parts)?));
        }
        let mut parts = VecDeque::new();
        for part in &laid.parts {
            parts.extend(part.read_all(self.session)?);
        }
        Ok(Box::new(Ready { kind: laid.kind, rows: rows as u64, parts }))
    }

    /// Returns how many rows there are.
    fn lay(&self, table: &str, query: &str) -> Result<i64> {
        self.session.made(&format!("create or replace table {table} as {query}"))
    }

    fn query(&self, sql: &SqlProjection, shape: &Shape, ranges: Option<Ranges>, working: &mut Working) -> Result<Laid> {
        let settled = results::settled(self.connection, &self.projection.name)?;
        let stands = settled.is_some() && (settled.as_ref() == self.since || !results::keeps_result(sql));
        let (Some(ranges), true) = (ranges, stands) else { return self.whole(sql, shape, working) };
        let counts = match &sql.maintenance {
            Maintenance::Recompute => {
                working.mirrors.fill(self.session, self.connection, self.layout, sql)?;
                self.recomputed(sql, shape)?
            }
            Maintenance::ByEntity { entity, measures } => {
                let scope = Scope { ranges, step: steps::last(self.connection)? };
                let (set, touched) = working.sets.get(self.session, self.connection, self.layout, entity, scope)?;
                match touched {
                    Touched::Nothing => return Ok(Laid { kind: OutputKind::Merge, parts: Vec::new() }),
                    Touched::TooMany => return self.whole(sql, shape, working),
                    Touched::Some => {}
                }
                for (table, schema) in [("__before", schema_before(set)), ("__after", schema_after(set))] {
                    let statement = format!("create or replace temp table {table} as select * from {{query}}");
                    query::run(self.session, sql, &schema, &statement)?;
                }
                match measures {
                    // Its keys are those of groups, and so unique.
                    Measures::Additive { .. } if !shape.has_others => {
                        let counts = self.added(shape)?;
                        return Ok(self.laid(shape, OutputKind::Merge, counts));
                    }
                    Measures::PerEntity => self.compared(shape, "__before", "__after")?,
                    Measures::Additive { .. } => {
                        working.mirrors.fill(self.session, self.connection, self.layout, sql)?;
                        self.touched(sql, shape)?
                    }
                }
            }
        };
        self.check_key(shape, counts)?;
        Ok(self.laid(shape, OutputKind::Merge, counts))
    }

    /// Runs the query in full.
    fn whole(&self, sql: &SqlProjection, shape: &Shape, working: &mut Working) -> Result<Laid> {
        working.mirrors.fill(self.session, self.connection, self.layout, sql)?;
        let create = format!("create or replace table {} as select * from {{query}}", self.place.rows());
        query::run(self.session, sql, LIVE, &create)?;
        let rows = self.session.number(&format!("select count(*) from {}", self.place.rows()))?;
        self.check_key(shape, (rows, 0))?;
        Ok(self.laid(shape, OutputKind::Replace, (rows, 0)))
    }

    /// Fails when a key comes twice: the target could not tell its rows apart, and would keep one that is gone.
    fn check_key(&self, shape: &Shape, (rows, _): Counts) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let keys: Vec<String> = shape.key.iter().map(|name| quote_name(name)).collect();
        let named = shape.key.iter().zip(&keys).map(|(name, quoted)| {
            format!("{} || coalesce({quoted}::varchar, 'null')", quote_text(&format!("{name}=")))
        });
        let twice = self.session.rows(
            &format!(
                "select concat_ws(', ', {}) from {} group by {} having count(*) > 1 limit 1",
                comma(named),
                self.place.rows(),
                keys.join(", ")
            ),
            |row| row.get::<_, String>(0),
        )?;
        let Some(key) = twice.first() else { return Ok(()) };
        let cause = format!("its key is not unique: {key} comes more than once");
        Err(Error::new(ErrorKind::Projection, "refresh", format!("projection {}", self.projection.name), cause)
            .with_remedy("name more columns in its key, or group by it"))
    }

    fn laid(&self, shape: &Shape, kind: OutputKind, (rows, gone): Counts) -> Laid {
        let rows = Part::of_table(PartKind::Upsert, self.place.rows(), shape.published.clone(), rows);
        let mut parts = vec![rows];
        if kind == OutputKind::Merge {
            let fields = shape.key.iter().filter_map(|name| shape.fields.iter().find(|field| field.name() == name));
            let keys = Arc::new(arrow::datatypes::Schema::new(fields.cloned().collect::<Vec<_>>()));
            parts.push(Part::of_table(PartKind::Delete, self.place.keys(), keys, gone));
        }
        Laid { kind, parts }
    }

    /// Rows of `after` that `before` has not, and keys of `before` that `after` has not.
    fn compared(&self, shape: &Shape, before: &str, after: &str) -> Result<Counts> {
        let rows = self.lay(&self.place.rows(), &format!("select * from (from {after} except from {before})"))?;
        let gone = self.lay(
            &self.place.keys(),
            &format!("select {} from {before} b anti join {after} a on {}", shape.keys("b"), shape.key_match("b", "a")),
        )?;
        Ok((rows, gone))
    }

    fn recomputed(&self, sql: &SqlProjection, shape: &Shape) -> Result<Counts> {
        query::run(self.session, sql, LIVE, "create or replace temp table __after as select * from {query}")?;
        let stood = results::load_all(self.session, self.connection, &self.projection.name, shape)?;
        let counts = self.compared(shape, &stood.full_name(), "__after")?;
        self.session.run(&format!("drop table temp.main.__after; drop table {}", stood.full_name()))?;
        Ok(counts)
    }

    /// Adds the difference between after and before to what stands.
    fn added(&self, shape: &Shape) -> Result<Counts> {
        let keys = shape.keys("x");
        let mut sums = Vec::new();
        let mut moved = Vec::new();
        for name in &shape.sums {
            let column = quote_name(name);
            sums.push(format!(
                "coalesce(sum(x.{column}) filter (x.__sign), 0) - coalesce(sum(x.{column}) filter (not x.__sign), 0)
                     as {column}"
            ));
            moved.push(format!("{column} <> 0"));
        }
        self.session.run(&format!(
            "create or replace temp table __moved as
             select * from (
                 select {keys}, {} from (
                     select *, true as __sign from __after union all select *, false from __before
                 ) x
                 group by {keys}
             ) where {}",
            sums.join(", "),
            moved.join(" or ")
        ))?;
        let stood = results::load(self.session, self.connection, &self.projection.name, shape, "temp.main.__moved")?;
        let mut columns = Vec::new();
        for field in &shape.fields {
            let column = quote_name(field.name());
            columns.push(if shape.key.contains(field.name()) {
                format!("d.{column}")
            } else {
                format!("(d.{column} + coalesce(r.{column}, 0))::{} as {column}", shape.type_of(field.name())?)
            });
        }
        let weight = quote_name(shape.weight.as_deref().unwrap_or_default());
        self.session.run(&format!(
            "create or replace temp table __sums as
             select {}, r.{weight} is not null as __stood from __moved d left join {} r on {}",
            columns.join(", "),
            stood.full_name(),
            shape.key_match("d", "r")
        ))?;
        let rows =
            self.lay(&self.place.rows(), &format!("select {} from __sums s where s.{weight} > 0", shape.list("s")))?;
        let gone = self.lay(
            &self.place.keys(),
            &format!("select {} from __sums s where s.{weight} <= 0 and s.__stood", shape.keys("s")),
        )?;
        Ok((rows, gone))
    }

    /// Recomputes the keys of touched entities in full, where some column does not add up.
    fn touched(&self, sql: &SqlProjection, shape: &Shape) -> Result<Counts> {
        self.session.run(&format!(
            "create or replace temp table __moved as
             select {} from __before b union select {} from __after a",
            shape.keys("b"),
            shape.keys("a")
        ))?;
        query::run(
            self.session,
            sql,
            LIVE,
            &format!(
                "create or replace temp table __whole as
                 select query.* from {{query}} semi join temp.main.__moved m on {}",
                shape.key_match("query", "m")
            )
            .replace('\n', " "),
        )?;
        let stood = results::load(self.session, self.connection, &self.projection.name, shape, "temp.main.__moved")?;
        self.compared(shape, &stood.full_name(), "__whole")
    }
}

/// Where an output of `tables` takes its target.
pub(super) fn target(tables: &[Arc<Table>], applied: &BTreeMap<CaptureId, Applied>) -> (Positions, Micros) {
    let of = |id: &CaptureId| Some((id.clone(), *applied.get(id)?));
    let reached: BTreeMap<_, _> =
        tables.iter().flat_map(|table| &table.captures).filter_map(|(_, id)| of(id)).collect();
    let time = reached.values().map(|applied| applied.time).min().unwrap_or(0);
    (reached.into_iter().map(|(id, applied)| (id, applied.position)).collect(), time)
}
