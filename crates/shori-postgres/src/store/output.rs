//! Committing an output: rows, checkpoint and metadata in one transaction (contracts 4 and 6).
//!
//! Parts are copied as they come: into temporary tables where they must be compared with what stands, straight into the
//! target where there is nothing to compare with. The statements that bring them into the target follow when all have
//! come, one for all rows. Nothing is held in memory but what is on its way.

use std::collections::BTreeSet;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::Field;
use shori_core::position::{Lsn, Micros, Position, Positions};
use shori_core::projection::Target;
use shori_core::store::{Committed, OutputCommit, OutputKind, OutputReader, OutputRows};
use shori_core::{Error, ErrorKind, Result, failpoint};

use super::copy_in::{Column, CopyIn};
use super::history;
use super::layout;
use super::session::{Link, Links};
use super::target::{self, Built, Nulls, has_null, same_key};
use crate::connect::quoted;

/// Rows to bring into a table whose size nobody has counted yet, up to which its index is the way to them.
const INDEXED_ROWS_MAX: u64 = 100_000;
/// The part of a table above which it is read whole instead.
const INDEXED_PART: u64 = 4;

/// Makes the server look each loaded key up in the index. What it estimates for a temporary table makes it read the whole
/// target too soon.
const BY_INDEX: &str = "
set local enable_seqscan = off;
set local enable_hashjoin = off;
set local enable_mergejoin = off";

const UPSERTS: &str = "pg_temp.ctl_upserts";
const DELETES: &str = "pg_temp.ctl_deletes";

/// What a commit is about, apart from its rows.
pub(super) struct Step<'a> {
    pub target: &'a Target,
    pub kind: OutputKind,
    pub run_id: &'a str,
    pub horizon: Position,
    pub as_of_time: Micros,
    expected: Option<&'a Positions>,
    checkpoint: &'a Positions,
    as_of_lsn: Option<Lsn>,
    complete: bool,
}

impl Step<'_> {
    pub fn table(&self) -> &str {
        &self.target.projection
    }

    /// How the step ends when its target stands at `stored`; `None`: it can be made.
    fn verdict(&self, stored: Option<&Positions>) -> Option<Committed> {
        if stored == Some(self.checkpoint) {
            Some(Committed::AlreadyApplied)
        } else if stored != self.expected {
            Some(Committed::Conflict)
        } else {
            None
        }
    }

    /// A part that does not belong to the output.
    pub fn misplaced(&self, part: &str) -> Error {
        let cause = format!("{part} that do not belong to {:?}, or not here", self.kind);
        Error::new(ErrorKind::Internal, "write", format!("target {}", self.table()), cause)
    }
}

pub(super) async fn commit(links: &Links, commit: OutputCommit<'_>) -> Result<Committed> {
    let step = Step {
        target: commit.target,
        kind: commit.output.kind(),
        run_id: commit.run_id,
        horizon: commit.horizon,
        as_of_time: commit.as_of_time,
        expected: commit.expected,
        checkpoint: commit.checkpoint,
        as_of_lsn: commit.as_of_lsn,
        complete: commit.complete,
    };
    let link = links.begin(step.table()).await?;
    let written = write(&link, &step, commit.output).await;
    links.end(link, step.table(), written).await
}

async fn write(link: &Link, step: &Step<'_>, output: &mut dyn OutputReader) -> Result<Committed> {
    let stored = target::lock(link, step.table()).await?;
    if let Some(verdict) = step.verdict(stored.as_ref()) {
        return Ok(verdict);
    }
    link.run("set local statement_timeout = 0", step.table()).await?;
    let rows = match step.kind {
        OutputKind::Merge | OutputKind::Replace => write_rows(link, step, output).await?,
        OutputKind::Versions => history::add(link, step, output).await?,
        OutputKind::ReplaceVersions => history::replace(link, step, output).await?,
    };
    failpoint::reached(failpoint::STORE_INSIDE_OUTPUT);
    target::put_checkpoint(link, step.table(), stored.as_ref(), step.checkpoint).await?;
    let Step { as_of_lsn, as_of_time, complete, run_id, .. } = *step;
    Built { as_of_lsn, as_of_time, complete, run_id }.put(link, step.table()).await?;
    Ok(Committed::Applied { rows })
}

pub(super) async fn is_empty(link: &Link, table: &str) -> Result<bool> {
    let sql = format!("select count(*) from (select 1 from {} limit 1) as found", quoted(table));
    Ok(link.number(&sql, table).await? == 0)
}

/// Prepares for joining `rows` loaded rows, in temporary tables `loaded`, with the target by its key.
pub(super) async fn plan(link: &Link, table: &str, loaded: &[&str], rows: u64) -> Result<()> {
    let rows_of = format!(
        "select greatest(reltuples, -1)::bigint from pg_class where oid = '{}'::regclass",
        quoted(table).replace('\'', "''")
    );
    let indexed_max = match u64::try_from(link.number(&rows_of, table).await?) {
        Ok(standing) => standing / INDEXED_PART,
        Err(_) => INDEXED_ROWS_MAX,
    };
    if rows <= indexed_max {
        return link.run(BY_INDEX, table).await.map(drop);
    }
    let analyze: Vec<String> = loaded.iter().map(|name| format!("analyze {name}")).collect();
    link.run(&analyze.join(";"), table).await.map(drop)
}

/// Parts on their way into tables: one copy is under way at a time.
pub(super) struct Loader<'a> {
    link: &'a Link,
    /// The table, and columns as they are spelled in it.
    into: Option<(String, Vec<String>)>,
    copy: Option<CopyIn>,
    made: BTreeSet<&'static str>,
}

impl<'a> Loader<'a> {
    pub fn new(link: &'a Link) -> Self {
        Self { link, into: None, copy: None, made: BTreeSet::new() }
    }

    /// Into a temporary table, which is made for the transaction when the first rows come.
    pub async fn load_temporary(&mut self, name: &'static str, step: &Step<'_>, rows: &RecordBatch) -> Result<()> {
        let schema = rows.schema();
        let names = target_names(step.target, rows);
        if self.made.insert(name) {
            self.finish().await?;
            create_temporary(self.link, name, &names, schema.fields().iter().map(AsRef::as_ref)).await?;
        }
        self.load(name, step.table(), &columns(&names, rows)?, rows.num_rows()).await
    }

    pub async fn load(&mut self, table: &str, object: &str, columns: &[Column<'_>], rows: usize) -> Result<()> {
        let names = || columns.iter().map(|column| column.name().to_string());
        let is_same =
            self.into.as_ref().is_some_and(|(into, known)| into == table && names().eq(known.iter().cloned()));
        if !is_same {
            self.finish().await?;
            let names: Vec<String> = names().collect();
            self.copy = Some(CopyIn::begin(self.link, table, &names, object).await?);
            self.into = Some((table.to_string(), names));
        }
        match &mut self.copy {
            Some(copy) => copy.push(columns, rows).await,
            None => Ok(()),
        }
    }

    /// Everything that was loaded is in its table.
    pub async fn finish(&mut self) -> Result<()> {
        self.into = None;
        match self.copy.take() {
            Some(copy) => copy.finish().await.map(drop),
            None => Ok(()),
        }
    }

    pub fn has(&self, name: &'static str) -> bool {
        self.made.contains(name)
    }
}

/// What the columns of a part are called in the target's table.
pub(super) fn target_names(target: &Target, rows: &RecordBatch) -> Vec<String> {
    rows.schema().fields().iter().map(|field| layout::target_column(&target.shape, field.name())).collect()
}

pub(super) fn columns<'a>(names: &'a [String], rows: &'a RecordBatch) -> Result<Vec<Column<'a>>> {
    names.iter().zip(rows.columns()).map(|(name, array)| Column::new(name, array)).collect()
}

async fn create_temporary<'a>(
    link: &Link,
    name: &str,
    names: &[String],
    fields: impl Iterator<Item = &'a Field>,
) -> Result<()> {
    let mut definitions = Vec::new();
    for (name, field) in names.iter().zip(fields) {
        definitions.push(format!("{} {}", quoted(name), layout::sql_type(field.data_type())?));
    }
    let plain = name.trim_start_matches("pg_temp.");
    let sql = format!("create temporary table {plain} ({}) on commit drop", definitions.join(", "));
    link.run(&sql, name).await.map(drop)
}

/// Whether a part has nulls in its key columns.
pub(super) fn has_null_keys(target: &Target, rows: &RecordBatch) -> bool {
    let of = |name: &String| rows.column_by_name(name).is_some_and(|array| array.null_count() > 0);
    target.key.iter().any(of)
}

async fn write_rows(link: &Link, step: &Step<'_>, output: &mut dyn OutputReader) -> Result<u64> {
    let table = quoted(step.table());
    let starts_empty = is_empty(link, step.table()).await?;
    let mut loader = Loader::new(link);
    let (mut loaded, mut null_keys) = (0, false);
    while let Some(part) = output.next().await? {
        match &part {
            OutputRows::Upsert(rows) if starts_empty => {
                let names = target_names(step.target, rows);
                loader.load(&table, step.table(), &columns(&names, rows)?, rows.num_rows()).await?;
            }
            OutputRows::Upsert(rows) => loader.load_temporary(UPSERTS, step, rows).await?,
            OutputRows::Delete(_) if step.kind == OutputKind::Replace => return Err(step.misplaced("deletions")),
            OutputRows::Delete(_) if starts_empty => continue,
            OutputRows::Delete(rows) => loader.load_temporary(DELETES, step, rows).await?,
            OutputRows::Version(_) | OutputRows::Close(_) => return Err(step.misplaced("versions")),
        }
        loaded += part.batch().num_rows() as u64;
        null_keys |= has_null_keys(step.target, part.batch());
    }
    loader.finish().await?;
    match step.kind {
        _ if starts_empty => Ok(loaded),
        OutputKind::Replace => replace(link, step, &loader).await,
        _ if loaded == 0 => Ok(0),
        _ => merge(link, step, &loader, loaded, null_keys).await,
    }
}

async fn merge(link: &Link, step: &Step<'_>, loader: &Loader<'_>, loaded: u64, null_keys: bool) -> Result<u64> {
    let (table, object) = (quoted(step.table()), step.table());
    let made: Vec<&str> = [UPSERTS, DELETES].into_iter().filter(|name| loader.has(name)).collect();
    let mut written = 0;
    if null_keys {
        // No index finds them: what stands goes, and comes again with the others.
        for name in &made {
            let (same, null) = (same_key(step.target, "t", "l", Nulls::Match), has_null(step.target, "l"));
            let sql = format!("delete from {table} as t using {name} as l where {null} and {same}");
            let gone = link.run(&sql, object).await?;
            written += if *name == DELETES { gone } else { 0 };
        }
    }
    plan(link, object, &made, loaded).await?;
    if loader.has(DELETES) {
        let same = same_key(step.target, "t", "l", Nulls::Never);
        written += link.run(&format!("delete from {table} as t using {DELETES} as l where {same}"), object).await?;
    }
    if loader.has(UPSERTS) {
        written += link.run(&upsert(step.target, "true"), object).await?;
    }
    Ok(written)
}

/// Loaded rows that meet `condition` take the place of those with their key.
fn upsert(target: &Target, condition: &str) -> String {
    let table = quoted(&target.projection);
    let key = layout::key_columns(target);
    let columns: Vec<String> = target.columns.fields().iter().map(|field| quoted(field.name())).collect();
    let set: Vec<String> = (columns.iter().filter(|column| !key.contains(column)))
        .map(|column| format!("{column} = excluded.{column}"))
        .collect();
    let update = if set.is_empty() { "nothing".into() } else { format!("update set {}", set.join(", ")) };
    let (columns, key) = (columns.join(", "), key.join(", "));
    format!(
        "insert into {table} as t ({columns}) select {columns} from {UPSERTS} as l where {condition} \
         on conflict ({key}) do {update}"
    )
}

/// Writes only what differs, so that a recomputed result that is the same costs no writes: a row that `on conflict` meets is
/// locked, which is a write.
async fn replace(link: &Link, step: &Step<'_>, loader: &Loader<'_>) -> Result<u64> {
    let (table, object) = (quoted(step.table()), step.table());
    if !loader.has(UPSERTS) {
        return link.run(&format!("delete from {table}"), object).await;
    }
    link.run(&format!("analyze {UPSERTS}"), object).await?;
    let same = same_key(step.target, "t", "l", Nulls::Match);
    let sql = format!("delete from {table} as t where not exists (select 1 from {UPSERTS} as l where {same})");
    let gone = link.run(&sql, object).await?;
    // One with a null in its key that stands with other values has to go first: no index finds it.
    let null = has_null(step.target, "l");
    if null != "false" {
        let sql =
            format!("delete from {table} as t using {UPSERTS} as l where {null} and {same} and {}", differs(step));
        link.run(&sql, object).await?;
    }
    let standing = format!("not exists (select 1 from {table} as t where {same} and not {})", differs(step));
    Ok(gone + link.run(&upsert(step.target, &standing), object).await?)
}

/// Whether the row that stands has other values beside its key than the loaded one.
fn differs(step: &Step<'_>) -> String {
    let rest = step.target.columns.fields().iter().filter(|field| !step.target.key.contains(field.name()));
    let differs: Vec<String> = rest
        .map(|field| quoted(field.name()))
        .map(|column| format!("t.{column} is distinct from l.{column}"))
        .collect();
    if differs.is_empty() { "false".into() } else { format!("({})", differs.join(" or ")) }
}
