//! Computes what takes a target from its checkpoint to the applied position.
//!
//! An output is laid out in the work catalog, so that it stays as it is while state goes on: `out_<n>_rows`, and
//! `out_<n>_keys` for keys that lose their row or whose open version ends. Only the replacement of a `latest` target is
//! read from state itself, in a transaction that its reader holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use shori_core::position::{CaptureId, Micros, Positions};
use shori_core::projection::{
    Derivation, HistoryProjection, Maintenance, Measures, Projection, SqlProjection, history,
};
use shori_core::store::OutputKind;
use shori_core::transform::Applied;
use shori_core::{Error, ErrorKind, Result};

use super::advance::LEAVES_ROW;
use super::entity::{Scope, Sets, schema_after, schema_before};
use super::layout::{LIVE, Layout, result_table};
use super::query::{self, Shape};
use super::reader::{Part, PartKind};
use super::session::{Session, WORK};
use super::settle;
use super::steps::{self, Need, Ranges, Standing};
use super::tables::{Table, comma, lsn_bytes};
use crate::database::{quote_name, quote_text};

/// An output as it lies there.
pub(super) struct Laid {
    pub kind: OutputKind,
    pub parts: Vec<Part>,
    /// It is read in the transaction that it was computed in.
    pub holds_transaction: bool,
}

pub(super) enum Outcome {
    UpToDate,
    Behind,
    NeedsReplay,
    Output { positions: Positions, as_of_time: Micros, laid: Laid },
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

pub(super) struct Computation<'a> {
    pub session: &'a Session,
    pub layout: &'a Layout,
    pub projection: &'a Projection,
    pub since: Option<&'a Positions>,
    pub place: &'a Place,
}

impl Computation<'_> {
    /// Runs in a transaction, so that all of it sees one state. `shape` and `sets` are for `sql` projections.
    pub fn run(&self, shape: Option<&Shape>, sets: &mut Sets) -> Result<Outcome> {
        let tables = self.layout.tables_of(self.projection)?;
        let applied = steps::applied(self.session, self.layout)?;
        let need =
            if matches!(self.projection.derivation, Derivation::History(_)) { Need::Versions } else { Need::Nets };
        let ranges = match steps::standing(self.session, &tables, &applied, self.since, need)? {
            Standing::Level => return Ok(Outcome::UpToDate),
            Standing::Behind => return Ok(Outcome::Behind),
            Standing::Covered(ranges) => Some(ranges),
            Standing::Gone => None,
        };
        let laid = match (&self.projection.derivation, ranges) {
            (Derivation::History(_), None) => return Ok(Outcome::NeedsReplay),
            (Derivation::History(of), Some(ranges)) => self.history(of, &tables[0], &ranges)?,
            (Derivation::Latest { .. }, Some(ranges)) if self.since.is_some() => self.latest(&tables[0], &ranges)?,
            (Derivation::Latest { .. }, _) => self.whole_table(&tables[0])?,
            (Derivation::Sql(sql), ranges) => {
                let Some(shape) = shape else { return Ok(Outcome::UpToDate) };
                self.query(sql, shape, ranges.filter(|_| self.since.is_some()), sets)?
            }
        };
        let (positions, as_of_time) = target(&tables, &applied);
        Ok(Outcome::Output { positions, as_of_time, laid })
    }

    /// Returns how many rows there are.
    fn lay(&self, table: &str, query: &str) -> Result<i64> {
        self.session.made(&format!("create or replace table {table} as {query}"))
    }

    fn latest(&self, table: &Table, ranges: &Ranges) -> Result<Laid> {
        let range = ranges.of_nets(table);
        let keys = table.keys("");
        self.session.run(&format!(
            "create or replace temp table __touched as
             select {keys}, min(__at) as __low, max(__at) as __high from {} where {range} group by {keys}",
            table.net()
        ))?;
        let rows = self.lay(
            &self.place.rows(),
            &format!(
                "select {}, {} as __source_lsn from {} n join __touched t on {} and n.__at = t.__high
                 where n.__at % 2 = 1",
                table.list("n"),
                lsn_bytes("n"),
                table.net(),
                table.key_match("n", "t")
            ),
        )?;
        let gone = self
            .lay(&self.place.keys(), &format!("select {keys} from __touched where __low % 2 = 0 and __high % 2 = 0"))?;
        let columns = query::latest_columns(table);
        let parts = vec![
            Part::of_table(PartKind::Upsert, self.place.rows(), columns.clone(), rows),
            Part::of_table(PartKind::Delete, self.place.keys(), key_columns(table), gone),
        ];
        Ok(Laid { kind: OutputKind::Merge, parts, holds_transaction: false })
    }

    fn whole_table(&self, table: &Table) -> Result<Laid> {
        let select = format!("{}, {} as __source_lsn", table.list(""), lsn_bytes(""));
        let part = Part::of_state(self.session, select, table.state(), query::latest_columns(table))?;
        Ok(Laid { kind: OutputKind::Replace, parts: vec![part], holds_transaction: true })
    }

    fn history(&self, of: &HistoryProjection, table: &Table, ranges: &Ranges) -> Result<Laid> {
        let range = ranges.of_versions(table);
        let of_changes = range.replace("__step", "d.__step").replace("__capture", "d.__capture");
        let renamed = table.key.iter().zip(&of.key);
        let keys = comma(renamed.map(|(&index, name)| format!("d.{} as {}", table.name_of(index), quote_name(name))));
        let matches = format!("{} and d.__boundary = e.__boundary", table.key_match("d", "e"));
        self.session.run(&format!(
            "create or replace temp table __ends as
             select {keys}, __boundary,
                 lead(__boundary) over (partition by {keys} order by __boundary) as __end,
                 lag(__boundary) over (partition by {keys} order by __boundary) is null as __is_first
             from {} where {range}",
            table.delta(),
            keys = table.keys(""),
        ))?;
        let published = |index: usize| quote_name(&history::published_name(table.columns[index].name()));
        let tracked = query::tracked(table).into_iter();
        let tracked: String =
            tracked.map(|index| format!("d.{} as {}, ", table.name_of(index), published(index))).collect();
        let versions = self.lay(
            &self.place.rows(),
            &format!(
                "select {keys}, {tracked} make_timestamp(d.__boundary) as valid_from,
                     make_timestamp(e.__end) as valid_to, e.__end is null as is_current,
                     case d.__op when 0 then 'SNAPSHOT' when 2 then 'INSERT' else 'UPDATE' end as cdc_operation,
                     make_timestamp(d.__time) as cdc_timestamp, {} as __source_lsn
                 from {} d join __ends e on {matches}
                 where {of_changes} and d.{LEAVES_ROW}",
                lsn_bytes("d"),
                table.delta(),
            ),
        )?;
        let columns = query::history_columns(table, &of.key);
        let rows = Part::of_table(PartKind::Version, self.place.rows(), columns.clone(), versions);
        if self.since.is_none() {
            return Ok(Laid { kind: OutputKind::ReplaceVersions, parts: vec![rows], holds_transaction: false });
        }
        let ended = self.lay(
            &self.place.keys(),
            &format!(
                "select {keys}, make_timestamp(d.__boundary) as valid_to
                 from {} d join __ends e on {matches}
                 where {of_changes} and e.__is_first and d.__existed",
                table.delta(),
            ),
        )?;
        let mut fields: Vec<_> = columns.fields()[..of.key.len()].to_vec();
        fields.extend(columns.fields().iter().filter(|field| field.name() == history::VALID_TO).cloned());
        let closed = Arc::new(arrow::datatypes::Schema::new(fields));
        let ends = Part::of_table(PartKind::Close, self.place.keys(), closed, ended);
        Ok(Laid { kind: OutputKind::Versions, parts: vec![ends, rows], holds_transaction: false })
    }

    fn query(&self, sql: &SqlProjection, shape: &Shape, ranges: Option<Ranges>, sets: &mut Sets) -> Result<Laid> {
        let settled = settle::settled(self.session, self.projection)?;
        let stands = settled.is_some() && (settled.as_ref() == self.since || !settle::keeps_result(sql));
        let (Some(ranges), true) = (ranges, stands) else {
            let create = format!("create or replace table {} as select * from {{query}}", self.place.rows());
            query::run(self.session, sql, LIVE, &create)?;
            let rows = self.session.number(&format!("select count(*) from {}", self.place.rows()))?;
            return self.laid(shape, OutputKind::Replace, (rows, 0));
        };
        let counts = match &sql.maintenance {
            Maintenance::Recompute => self.recomputed(sql, shape)?,
            Maintenance::ByEntity { entity, measures } => {
                let scope = Scope { ranges, step: steps::last(self.session)? };
                let (set, any) = sets.get(self.session, self.layout, entity, scope)?;
                if !any {
                    let counts = self.nothing(shape)?;
                    return self.laid(shape, OutputKind::Merge, counts);
                }
                for (table, schema) in [("__before", schema_before(set)), ("__after", schema_after(set))] {
                    let statement = format!("create or replace temp table {table} as select * from {{query}}");
                    query::run(self.session, sql, &schema, &statement)?;
                }
                match measures {
                    Measures::PerEntity => self.compared(shape, "__before", "__after")?,
                    Measures::Additive { .. } if shape.has_others => self.touched(sql, shape)?,
                    Measures::Additive { .. } => self.added(shape)?,
                }
            }
        };
        self.laid(shape, OutputKind::Merge, counts)
    }

    /// Fails when a key comes twice: the target could not tell its rows apart, and would keep one that is gone.
    fn check_key(&self, shape: &Shape) -> Result<()> {
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

    fn laid(&self, shape: &Shape, kind: OutputKind, (rows, gone): Counts) -> Result<Laid> {
        if rows > 0 {
            self.check_key(shape)?;
        }
        let rows = Part::of_table(PartKind::Upsert, self.place.rows(), shape.published.clone(), rows);
        let mut parts = vec![rows];
        if kind == OutputKind::Merge {
            let fields = shape.key.iter().filter_map(|name| shape.fields.iter().find(|field| field.name() == name));
            let keys = Arc::new(arrow::datatypes::Schema::new(fields.cloned().collect::<Vec<_>>()));
            parts.push(Part::of_table(PartKind::Delete, self.place.keys(), keys, gone));
        }
        Ok(Laid { kind, parts, holds_transaction: false })
    }

    fn nothing(&self, shape: &Shape) -> Result<Counts> {
        let typed = |name: &String| shape.type_of(name).map(|of| format!("null::{of} as {}", quote_name(name)));
        let all: Result<Vec<_>> = shape.fields.iter().map(|field| typed(field.name())).collect();
        let keys: Result<Vec<_>> = shape.key.iter().map(typed).collect();
        let rows = self.lay(&self.place.rows(), &format!("select {} where false", all?.join(", ")))?;
        Ok((rows, self.lay(&self.place.keys(), &format!("select {} where false", keys?.join(", ")))?))
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
        let counts = self.compared(shape, &result_table(&self.projection.name), "__after")?;
        self.session.run("drop table temp.main.__after")?;
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
            result_table(&self.projection.name),
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
        self.session.run(&format!(
            "create or replace temp table __stood as select r.* from {} r semi join __moved m on {}",
            result_table(&self.projection.name),
            shape.key_match("r", "m")
        ))?;
        self.compared(shape, "__stood", "__whole")
    }
}

fn key_columns(table: &Table) -> arrow::datatypes::SchemaRef {
    let fields: Vec<_> = table.key.iter().map(|&index| table.columns[index].clone()).collect();
    Arc::new(arrow::datatypes::Schema::new(fields))
}

/// Where an output of `tables` takes its target.
pub(super) fn target(tables: &[Arc<Table>], applied: &BTreeMap<CaptureId, Applied>) -> (Positions, Micros) {
    let of = |id: &CaptureId| Some((id.clone(), *applied.get(id)?));
    let reached: BTreeMap<_, _> =
        tables.iter().flat_map(|table| &table.captures).filter_map(|(_, id)| of(id)).collect();
    let time = reached.values().map(|applied| applied.time).min().unwrap_or(0);
    (reached.into_iter().map(|(id, applied)| (id, applied.position)).collect(), time)
}
