//! Computes what takes a target from its checkpoint to the applied position.
//!
//! What a query gives is laid out in the work catalog, so that it stays as it is while state goes on: `out_<n>_rows`, and
//! `out_<n>_keys` for keys that lose their row. Current rows and versions come straight from the state file: see
//! [`direct`](super::direct) and [`history`](super::history).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use rusqlite::Connection;
use shori_core::position::{CaptureId, Micros, Positions};
use shori_core::projection::{Derivation, Maintenance, Measures, Projection, SqlProjection};
use shori_core::store::{OutputKind, OutputReader, OutputRows};
use shori_core::transform::Applied;
use shori_core::{Error, ErrorKind, Result};

use super::adding::{Adding, Sums};
use super::difference;
use super::direct;
use super::entity::{Scope, Sets, Touched, schema_after, schema_before};
use super::file::{self, StateFile};
use super::hands::{Hands, Second};
use super::held::{HeldResult, HeldResults};
use super::history;
use super::layout::Layout;
use super::mirror::{LIVE, Mirrors};
use super::query::{self, Shape};
use super::reader::{Part, PartKind, READY_ROWS_MAX, Ready, Tables, stream};
use super::results::{self, Change};
use super::session::{Session, WORK, WorkTable, comma};
use super::steps::{self, Need, Ranges, Standing};
use super::tables::Table;
use crate::database::{Database, quote_name, quote_text};

/// What a query came to.
enum Made {
    /// It is at hand, and this becomes of what is kept.
    Held {
        parts: VecDeque<OutputRows>,
        change: Change,
    },
    Laid(Laid),
}

/// An output as it lies at its place.
struct Laid {
    kind: OutputKind,
    parts: Vec<Part>,
}

pub(super) enum Outcome {
    UpToDate,
    Behind,
    NeedsReplay,
    Output { positions: Positions, as_of_time: Micros, reader: Box<dyn OutputReader>, change: Change },
}

/// Rows of an output, and keys that lose theirs.
pub(super) type Counts = (i64, i64);

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

    pub fn rows_table(&self, columns: SchemaRef) -> WorkTable {
        WorkTable { schema: "main".into(), name: format!("out_{}_rows", self.0), columns }
    }

    pub fn keys_table(&self, columns: SchemaRef) -> WorkTable {
        WorkTable { schema: "main".into(), name: format!("out_{}_keys", self.0), columns }
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
    pub held: HeldResults,
    /// Let go of with the rest when something fails.
    pub second: Option<Session>,
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
        let need = match &self.projection.derivation {
            Derivation::History(of) if self.since.is_some() && history::needs_before(of) => Need::Both,
            Derivation::History(_) => Need::Versions,
            _ => Need::Nets,
        };
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
                let read = move |give: Give<'_>| history::output(&view, &table, &of, &ranges, is_whole, give);
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
                let reader;
                (reader, change) = match self.query(sql, shape, ranges.filter(|_| self.since.is_some()), working)? {
                    Made::Held { parts, change } => (ready(OutputKind::Merge, parts), change),
                    Made::Laid(laid) => {
                        let change = if laid.kind == OutputKind::Replace { Change::Whole } else { Change::Difference };
                        (self.read(laid)?, change)
                    }
                };
                reader
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
        Ok(ready(laid.kind, parts))
    }

    /// Returns how many rows there are.
    fn lay(&self, table: &str, query: &str) -> Result<i64> {
        self.session.made(&format!("create or replace table {table} as {query}"))
    }

    fn query(&self, sql: &SqlProjection, shape: &Shape, ranges: Option<Ranges>, working: &mut Working) -> Result<Made> {
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
                let hands = Hands { session: self.session, view: self.connection };
                let mut second = self.second(&mut working.second)?;
                let (set, touched) = working.sets.get(hands, &mut second, self.layout, entity, scope)?;
                let bytes = match touched {
                    Touched::Nothing => return Ok(Made::Held { parts: VecDeque::new(), change: Change::Nothing }),
                    Touched::TooMany => return self.whole(sql, shape, working),
                    Touched::Some(bytes) => bytes,
                };
                let (before, after) = (schema_before(set), schema_after(set));
                let adds_up = !shape.has_others;
                let result = match measures {
                    Measures::Additive { .. } if adds_up => {
                        working.held.load(self.connection, &self.projection.name)?
                    }
                    _ => None,
                };
                if (matches!(measures, Measures::PerEntity) || adds_up) && bytes <= difference::HELD_BYTES_MAX {
                    // Most steps are small.
                    if let Some(pairs) = difference::pairs(hands, &mut second, sql, shape, (&before, &after))? {
                        return match measures {
                            Measures::PerEntity => {
                                let parts = difference::output(shape, pairs)?;
                                Ok(Made::Held { parts, change: Change::Nothing })
                            }
                            Measures::Additive { .. } => {
                                let (parts, rows) = self.sums(shape).hold(hands, &mut second, result, pairs)?;
                                Ok(Made::Held { parts, change: Change::Rows(rows) })
                            }
                        };
                    }
                }
                let make = |table: &str| format!("create or replace temp table {table} as select * from {{query}}");
                query::run(self.session, sql, &before, &make("__before"))?;
                match measures {
                    Measures::Additive { .. } if adds_up => self.adding(shape, result).lay(sql, &after)?,
                    Measures::Additive { .. } => {
                        query::run(self.session, sql, &after, &make("__after"))?;
                        working.mirrors.fill(self.session, self.connection, self.layout, sql)?;
                        self.touched(sql, shape)?
                    }
                    Measures::PerEntity => {
                        query::run(self.session, sql, &after, &make("__after"))?;
                        self.compared(shape, "__before", "__after")?
                    }
                }
            }
        };
        // Of a large step; the next ones may be small and have no need of them.
        self.session.run(
            "drop table if exists temp.main.__before; drop table if exists temp.main.__after;
             drop table if exists temp.main.__moved",
        )?;
        self.check_key(shape, counts.0)?;
        Ok(Made::Laid(self.laid(shape, OutputKind::Merge, counts)))
    }

    /// Runs the query in full.
    fn whole(&self, sql: &SqlProjection, shape: &Shape, working: &mut Working) -> Result<Made> {
        working.mirrors.fill(self.session, self.connection, self.layout, sql)?;
        let create = format!("create or replace table {} as select * from {{query}}", self.place.rows());
        let rows = query::run(self.session, sql, LIVE, &create)?;
        self.check_key(shape, rows)?;
        Ok(Made::Laid(self.laid(shape, OutputKind::Replace, (rows, 0))))
    }

    /// Opened when it is first needed; where order must be the same in every run, there is one pair only.
    fn second<'s>(&self, session: &'s mut Option<Session>) -> Result<Option<Second<'s>>> {
        if self.database.is_inline() {
            return Ok(None);
        }
        if session.is_none() {
            *session = Some(Session::open(self.database)?);
        }
        let view = self.file.view()?;
        Ok(session.as_mut().map(|session| Second::new(session, view)))
    }

    fn sums<'a>(&'a self, shape: &'a Shape) -> Sums<'a> {
        Sums { projection: &self.projection.name, shape }
    }

    fn adding<'a>(&'a self, shape: &'a Shape, result: Option<&'a HeldResult>) -> Adding<'a> {
        let (session, connection, sums) = (self.session, self.connection, self.sums(shape));
        Adding { session, connection, sums, result, place: self.place }
    }

    /// Fails when a key comes twice: the target could not tell its rows apart, and would keep one that is gone.
    fn check_key(&self, shape: &Shape, rows: i64) -> Result<()> {
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
            parts.push(Part::of_table(PartKind::Delete, self.place.keys(), shape.key_columns(), gone));
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

fn ready(kind: OutputKind, parts: VecDeque<OutputRows>) -> Box<dyn OutputReader> {
    Box::new(Ready { kind, parts })
}

/// Where an output of `tables` takes its target.
pub(super) fn target(tables: &[Arc<Table>], applied: &BTreeMap<CaptureId, Applied>) -> (Positions, Micros) {
    let of = |id: &CaptureId| Some((id.clone(), *applied.get(id)?));
    let reached: BTreeMap<_, _> =
        tables.iter().flat_map(|table| &table.captures).filter_map(|(_, id)| of(id)).collect();
    let time = reached.values().map(|applied| applied.time).min().unwrap_or(0);
    (reached.into_iter().map(|(id, applied)| (id, applied.position)).collect(), time)
}
