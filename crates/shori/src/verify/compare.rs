//! Compares expected rows with found ones, key by key.

use shori_core::Result;
use shori_core::projection::SOURCE_LSN;

use super::TableInput;
use super::asof::LSN;
use super::report::{Finding, FindingKind, ProjectionReport};
use super::scratch::{Scratch, quote_name, quote_text};

pub(super) fn sql(
    scratch: &Scratch,
    schema: &str,
    file: &str,
    text: &str,
    key: &[String],
    hidden: &[String],
    report: &mut ProjectionReport,
) -> Result<()> {
    let name = quote_name(&report.projection);
    let text = text.trim_end().trim_end_matches(';');
    scratch.execute(&format!("set schema = {}", quote_text(schema)))?;
    let computed = scratch.execute_projection(&format!("create table expected.{name} as\n"), text, file);
    scratch.execute("set schema = 'main'")?;
    computed?;
    rows(scratch, key, hidden, report)
}

pub(super) fn latest(scratch: &Scratch, schema: &str, table: &TableInput, report: &mut ProjectionReport) -> Result<()> {
    let name = quote_name(&report.projection);
    let columns = table.columns.iter().map(|column| quote_name(&column.name)).collect::<Vec<_>>().join(", ");
    scratch.execute(&format!(
        "create view expected.{name} as select {columns}, {LSN} as {SOURCE_LSN} from {schema}.{}",
        quote_name(&table.name)
    ))?;
    rows(scratch, &table.key, &[], report)
}

/// `expected.<projection>` against `found.<projection>`.
fn rows(scratch: &Scratch, key: &[String], hidden: &[String], report: &mut ProjectionReport) -> Result<()> {
    let name = quote_name(&report.projection);
    report.rows_expected = scratch.number(&format!("select count(*) from expected.{name}"))?;
    report.rows_found = scratch.number(&format!("select count(*) from found.{name}"))?;
    let columns = matching_columns(scratch, hidden, report)?;
    if key.iter().any(|part| !columns.contains(part)) {
        return Ok(());
    }
    let same_key = same(key.iter().map(|part| (part.as_str(), part.as_str())), "e", "f");
    let key_list = key.iter().map(|part| quote_name(part)).collect::<Vec<_>>().join(", ");
    let (label_e, label_f) = (label(key, "e"), label(key, "f"));
    let differences = columns.iter().filter(|column| !key.contains(column));
    let newest = report.as_of_change;
    let differences: Vec<_> = differences.map(|column| difference(column, newest)).collect();
    let mut queries = vec![
        (
            FindingKind::Missing,
            format!("select {label_e} from expected.{name} e anti join found.{name} f on {same_key}"),
        ),
        (FindingKind::Extra, format!("select {label_f} from found.{name} f anti join expected.{name} e on {same_key}")),
        (
            FindingKind::Duplicated,
            format!(
                "select {label_f} from (select {key_list} from found.{name} group by {key_list} having count(*) > 1) f"
            ),
        ),
    ];
    if !differences.is_empty() {
        queries.push((FindingKind::Differing, differing(&name, &same_key, &label_e, &differences)));
    }
    for (kind, query) in queries {
        report.findings.extend(scratch.finding(kind, &query)?);
    }
    Ok(())
}

fn differing(name: &str, same_key: &str, label: &str, differences: &[Difference]) -> String {
    let conditions = differences.iter().map(|one| one.condition.as_str()).collect::<Vec<_>>().join(" or ");
    let texts = differences.iter().map(|one| one.text.as_str()).collect::<Vec<_>>().join(", ");
    format!(
        "select {label} || ': ' || concat_ws(', ', {texts})
        from expected.{name} e
        join found.{name} f on {same_key}
        where {conditions}"
    )
}

/// Expected columns that can be compared; names those that cannot.
fn matching_columns(scratch: &Scratch, hidden: &[String], report: &mut ProjectionReport) -> Result<Vec<String>> {
    let found = scratch.columns("found", &report.projection)?;
    let mut wrong = Vec::new();
    let mut columns = Vec::new();
    for (name, expected_type) in scratch.columns("expected", &report.projection)? {
        if hidden.contains(&name) {
            continue;
        }
        let is_decimal = |data_type: &str| data_type.starts_with("DECIMAL");
        match found.iter().find(|(found, _)| *found == name) {
            None => wrong.push(format!("{name} is missing")),
            Some((_, found_type)) if is_decimal(&expected_type) && !is_decimal(found_type) => {
                wrong.push(format!("{name} should be {expected_type} and is {found_type}"));
            }
            Some(_) => columns.push(name),
        }
    }
    if !wrong.is_empty() {
        report.findings.push(Finding { kind: FindingKind::Columns, count: wrong.len() as u64, examples: wrong });
    }
    Ok(columns)
}

/// How a column differs between `e` (expected) and `f` (found).
pub(super) struct Difference {
    pub condition: String,
    /// Null where it does not.
    pub text: String,
}

pub(super) fn difference(column: &str, newest: u64) -> Difference {
    let quoted = quote_name(column);
    let condition = if column == SOURCE_LSN || column == LSN {
        // The last change of a row is only known while the source keeps it, and a snapshot may have read the row later.
        format!(
            "(e.{quoted} is not null and (f.{quoted} is null or f.{quoted} < e.{quoted} \
             or f.{quoted} > unhex('{newest:016x}')))"
        )
    } else {
        format!("e.{quoted} is distinct from f.{quoted}")
    };
    let value = |side: &str| format!("coalesce(cast({side}.{quoted} as varchar), 'null')");
    let text = format!(
        "case when {condition} then {} || {} || ' and is ' || {} end",
        quote_text(&format!("{column} should be ")),
        value("e"),
        value("f")
    );
    Difference { condition, text }
}

/// The condition that columns of the one side and the other agree.
pub(super) fn same<'n>(pairs: impl Iterator<Item = (&'n str, &'n str)>, left: &str, right: &str) -> String {
    let one = |(of_left, of_right): (&str, &str)| {
        format!("{left}.{} is not distinct from {right}.{}", quote_name(of_left), quote_name(of_right))
    };
    pairs.map(one).collect::<Vec<_>>().join(" and ")
}

/// Names a row by its key: `order_id=17`.
pub(super) fn label(key: &[String], side: &str) -> String {
    let part = |name: &String| {
        let text = format!("coalesce(cast({side}.{} as varchar), 'null')", quote_name(name));
        format!("{} || {text}", quote_text(&format!("{name}=")))
    };
    format!("concat_ws(', ', {})", key.iter().map(part).collect::<Vec<_>>().join(", "))
}
