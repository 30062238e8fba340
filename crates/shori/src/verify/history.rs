//! The rules of a history: one open version per live key, versions that follow each other without gap or overlap, and
//! as many of them as rows were committed.

use shori_core::Result;
use shori_core::projection::history;

use super::TableInput;
use super::compare::{difference, label, same};
use super::report::{Finding, FindingKind, ProjectionReport};
use super::scratch::{Scratch, quote_name};
use super::source::Source;

/// Names that a history's own columns take here, where the table may have columns of theirs.
const VALID_FROM: &str = "__own_valid_from";
const VALID_TO: &str = "__own_valid_to";
const IS_CURRENT: &str = "__own_is_current";
const CDC_OPERATION: &str = "__own_cdc_operation";
const SOURCE_LSN: &str = "__own_source_lsn";

const OWN: [(&str, &str); 5] = [
    (history::VALID_FROM, VALID_FROM),
    (history::VALID_TO, VALID_TO),
    (history::IS_CURRENT, IS_CURRENT),
    (history::CDC_OPERATION, CDC_OPERATION),
    (history::SOURCE_LSN, SOURCE_LSN),
];
/// Those that are not looked at.
const OTHERS: [&str; 5] =
    [history::SURROGATE_KEY, history::CDC_TIMESTAMP, history::BATCH_ID, history::CREATED_AT, history::UPDATED_AT];

/// Whether a version ended without another that continues it.
const ENDED: &str = "__own_valid_to is not null and __own_valid_to is distinct from next_from";

/// A history, as it is configured.
pub(super) struct Of<'a> {
    pub table: &'a TableInput,
    /// Names of its key columns.
    pub key: &'a [String],
    pub left_out: &'a [String],
    pub tombstones: bool,
}

impl Of<'_> {
    /// Columns beside the key.
    fn tracked(&self) -> impl Iterator<Item = &String> {
        let columns = self.table.columns.iter().map(|column| &column.name);
        columns.filter(|name| !self.table.key.contains(name) && !self.left_out.contains(name))
    }

    /// The condition for a version to be a row that lives.
    fn lives(&self) -> String {
        match self.tombstones {
            true => format!("{IS_CURRENT} and {CDC_OPERATION} <> '{}'", history::DELETE),
            false => IS_CURRENT.into(),
        }
    }
}

pub(super) fn check(
    scratch: &Scratch,
    schema: &str,
    of: &Of<'_>,
    source: &mut Source,
    report: &mut ProjectionReport,
) -> Result<()> {
    let found = format!("found.{}", quote_name(&report.projection));
    let live = format!("{schema}.{}", quote_name(&of.table.name));
    report.rows_expected = scratch.number(&format!("select count(*) from {live}"))?;
    report.rows_found = scratch.number(&format!("select count(*) from {found}"))?;
    own_names_aside(scratch, of.table, of.key, &found, &report.projection)?;
    if !has_columns(scratch, of, report)? {
        return Ok(());
    }
    let mut queries = current_rows(of, &found, &live);
    let versions = format!("expected.{}", quote_name(&report.projection));
    scratch.execute(&chain(&versions, of.key, &found))?;
    queries.extend(chain_rules(&versions, of.key));
    for (kind, query) in queries {
        report.findings.extend(scratch.finding(kind, &query)?);
    }
    count(scratch, &versions, of, source, report)
}

/// A source's column with the name of one of the store's own is published under another name; here it takes its own
/// name again, and the store's another.
fn own_names_aside(scratch: &Scratch, table: &TableInput, key: &[String], found: &str, projection: &str) -> Result<()> {
    let names = scratch.columns("found", projection)?;
    let has = |wanted: &str| names.iter().any(|(name, _)| name == wanted);
    let rename = |from: &str, to: &str| {
        let (from, to) = (quote_name(from), quote_name(to));
        scratch.execute(&format!("alter table {found} rename column {from} to {to}"))
    };
    for (own, aside) in OWN.into_iter().filter(|(own, _)| has(own)) {
        rename(own, aside)?;
    }
    let is_own = |name: &str| {
        let name = name.to_lowercase();
        OWN.iter().any(|(own, _)| *own == name) || OTHERS.contains(&name.as_str())
    };
    let mut wanted: Vec<&String> = table.columns.iter().map(|column| &column.name).chain(key).collect();
    wanted.sort();
    wanted.dedup();
    for name in wanted.into_iter().filter(|name| is_own(name)) {
        let published = format!("{name}__source");
        if has(&published) {
            scratch.execute(&format!("alter table {found} drop column if exists {}", quote_name(name)))?;
            rename(&published, name)?;
        }
    }
    Ok(())
}

fn has_columns(scratch: &Scratch, of: &Of<'_>, report: &mut ProjectionReport) -> Result<bool> {
    let found = scratch.columns("found", &report.projection)?;
    let same = |name: &String| (name.clone(), name.clone());
    let own = OWN.map(|(name, aside)| (name.to_string(), aside.to_string()));
    let wanted = of.key.iter().chain(of.tracked()).map(same).chain(own);
    let missing: Vec<_> = wanted
        .filter(|(_, here)| found.iter().all(|(found, _)| found != here))
        .map(|(name, _)| format!("{name} is missing"))
        .collect();
    let complete = missing.is_empty();
    if !complete {
        report.findings.push(Finding { kind: FindingKind::Columns, count: missing.len() as u64, examples: missing });
    }
    Ok(complete)
}

/// The open versions against the rows that live.
fn current_rows(of: &Of<'_>, found: &str, live: &str) -> Vec<(FindingKind, String)> {
    let Of { table, key, .. } = *of;
    let pairs = || table.key.iter().zip(key).map(|(of_table, of_history)| (of_table.as_str(), of_history.as_str()));
    let same_key = same(pairs(), "e", "f");
    let key_list = key.iter().map(|part| quote_name(part)).collect::<Vec<_>>().join(", ");
    let (label_e, label_f) = (label(&table.key, "e"), label(key, "f"));
    let current = format!("(select * from {found} where {})", of.lives());
    let mut queries = vec![
        (FindingKind::Missing, format!("select {label_e} from {live} e anti join {current} f on {same_key}")),
        (FindingKind::Extra, format!("select {label_f} from {current} f anti join {live} e on {same_key}")),
        (
            FindingKind::Duplicated,
            format!(
                "select {label_f} from (select {key_list} from {current} group by {key_list} having count(*) > 1) f"
            ),
        ),
    ];
    // A source's column of this name is compared as any other, not as the engine's; DuckDB knows it in any case.
    let plain = |name: &str| if name == history::SOURCE_LSN { name.to_uppercase() } else { name.to_string() };
    let differences: Vec<_> = of.tracked().map(|name| difference(&plain(name), 0)).collect();
    if !differences.is_empty() {
        let conditions = differences.iter().map(|one| one.condition.as_str()).collect::<Vec<_>>().join(" or ");
        let texts = differences.iter().map(|one| one.text.as_str()).collect::<Vec<_>>().join(", ");
        queries.push((
            FindingKind::Differing,
            format!(
                "select {label_e} || ': ' || concat_ws(', ', {texts})
                from {live} e
                join {current} f on {same_key}
                where {conditions}"
            ),
        ));
    }
    queries
}

/// Every version with what follows it.
fn chain(versions: &str, key: &[String], found: &str) -> String {
    let key_list = key.iter().map(|part| quote_name(part)).collect::<Vec<_>>().join(", ");
    format!(
        "
        create table {versions} as
        select
            {key_list},
            {VALID_FROM},
            {VALID_TO},
            {IS_CURRENT},
            {CDC_OPERATION},
            {SOURCE_LSN},
            lead({VALID_FROM}) over following as next_from,
            lead({CDC_OPERATION}) over following as next_operation
        from {found}
        window following as (partition by {key_list} order by {VALID_FROM}, {VALID_TO} nulls last)
        "
    )
}

fn chain_rules(versions: &str, key: &[String]) -> Vec<(FindingKind, String)> {
    let named = label(key, "v");
    let select = |what: &str, condition: &str| {
        format!(
            "select {named} || ' from ' || cast({VALID_FROM} as varchar) || {what} from {versions} v where {condition}"
        )
    };
    let ends = format!("' to ' || coalesce(cast({VALID_TO} as varchar), 'now')");
    let next = format!("{ends} || ', the next from ' || cast(next_from as varchar)");
    vec![
        (FindingKind::CurrentFlag, select(&ends, &format!("{IS_CURRENT} is distinct from ({VALID_TO} is null)"))),
        (FindingKind::Backwards, select(&ends, &format!("{VALID_TO} <= {VALID_FROM}"))),
        (
            FindingKind::Overlap,
            select(&next, &format!("next_from is not null and ({VALID_TO} is null or {VALID_TO} > next_from)")),
        ),
        // An update continues what stood before it; after a deletion comes an insert, or what a snapshot found. A row that
        // an update gave this key is no gap: the row of another key ended then.
        (
            FindingKind::Gap,
            select(
                &next,
                &format!(
                    "{VALID_TO} < next_from and next_operation = 'UPDATE'
                    and next_from not in (select {VALID_TO} from {versions} where {ENDED})"
                ),
            ),
        ),
    ]
}

/// Compares the number of versions, and of ended rows, with those that the writer of the source counted itself.
fn count(
    scratch: &Scratch,
    versions: &str,
    of: &Of<'_>,
    source: &mut Source,
    report: &mut ProjectionReport,
) -> Result<()> {
    let skip = |report: &mut ProjectionReport, reason: &str| {
        report.notes.push(format!("the number of versions is not compared: {reason}"));
        Ok(())
    };
    if !of.left_out.is_empty() {
        return skip(report, "commits that change none of its columns make none");
    }
    // Where the first snapshot came after changes, the log may have begun after them.
    let of_snapshot = format!("from {versions} where {CDC_OPERATION} = 'SNAPSHOT'");
    let later =
        scratch.number(&format!("select count(*) {of_snapshot} and {SOURCE_LSN} > unhex('0000000000000000')"))?;
    if later > 0 {
        return skip(report, "rows were found by a snapshot after changes had begun");
    }
    let images = match source.images(&of.table.name, report.as_of_change)? {
        Ok(images) => images,
        Err(reason) => return skip(report, &reason),
    };
    let of_snapshot = scratch.number(&format!("select count(*) {of_snapshot}"))?;
    let tombstones =
        scratch.number(&format!("select count(*) from {versions} where {CDC_OPERATION} = '{}'", history::DELETE))?;
    let opened = report.rows_found - of_snapshot - tombstones;
    let ended = tombstones + scratch.number(&format!("select count(*) from {versions} where {ENDED}"))?;
    let mut compare = |kind: FindingKind, what: &str, found: u64, least: u64, most: u64| {
        if !(least..=most).contains(&found) {
            let off = if found < least { least - found } else { found - most };
            let expected = if least == most { format!("{least}") } else { format!("{least} to {most}") };
            let examples = vec![format!("{found} {what}, {expected} were committed")];
            report.findings.push(Finding { kind, count: off, examples });
        }
    };
    let others = images.by_others;
    compare(FindingKind::VersionCount, "versions", opened, images.opening, images.opening + others);
    // A row from before the capture may have been deleted before the snapshot came to it.
    let least = images.ending.saturating_sub(images.before_capture);
    compare(FindingKind::DeletionCount, "ended rows", ended, least, images.ending + others);
    if others > 0 {
        let what = "change rows are not of the generator's changes";
        report.notes.push(format!("{others} {what}: counts are compared within them"));
    }
    Ok(())
}
