//! What is right passes, and every kind of damage is found and named.

use arrow::array::RecordBatch;
use std::time::Duration;

use super::pipeline::Pipeline;
use crate::verify::{FindingKind, Report, Serving, State, verify};

const KPI: &str = "proj_orders_kpi_by_minute_segment";
const LATEST: &str = "proj_orders_latest";
const CUSTOMERS: &str = "customers_latest";
const HISTORY: &str = "dim_orders_history";

fn assert_clean(report: &Report) {
    assert!(report.ok(), "{report}");
    assert_eq!(report.projections.len(), 4);
    assert!(report.projections.iter().all(|projection| projection.rows_expected > 0), "{report}");
    assert!(report.to_string().contains("ok"));
}

/// Damages a right pipeline; the report must hold exactly these findings of one projection. Returns their examples.
#[track_caller]
fn damaged(statements: &str, projection: &str, kinds: &[FindingKind]) -> Vec<String> {
    let mut pipeline = Pipeline::new(0, 700);
    pipeline.project();
    pipeline.serving.execute_batch(statements).unwrap();
    let report = pipeline.verify();
    assert!(!report.ok());
    let mut examples = Vec::new();
    for found in &report.projections {
        let expected: &[FindingKind] = if found.projection == projection { kinds } else { &[] };
        let found_kinds: Vec<_> = found.findings.iter().map(|finding| finding.kind).collect();
        assert_eq!(found_kinds, expected, "{report}");
        examples.extend(found.findings.iter().flat_map(|finding| finding.examples.clone()));
    }
    let json = serde_json::to_string(&report).unwrap();
    for example in &examples {
        assert!(report.to_string().contains(example), "{report}");
        assert!(json.contains(&serde_json::to_string(example).unwrap()), "{json}");
    }
    examples
}

#[test]
fn a_right_pipeline_passes() {
    for (before, after) in [(0, 1_500), (500, 1_000), (0, 80), (500, 1)] {
        let mut pipeline = Pipeline::new(before, after);
        pipeline.project();
        assert_clean(&pipeline.verify());
    }
}

#[test]
fn a_source_that_has_moved_on_is_brought_back() {
    let mut pipeline = Pipeline::new(0, 700);
    pipeline.project();
    pipeline.generate(300);
    let report = pipeline.verify();
    assert_clean(&report);
    let as_of = report.projections[0].as_of_change;
    assert!(as_of < pipeline.head() as u64, "{as_of}");
}

#[test]
fn a_source_that_has_moved_on_beyond_what_it_keeps_must_be_caught_up_with() {
    let mut pipeline = Pipeline::new(300, 500);
    pipeline.project();
    pipeline.generate(300);
    let newest = pipeline.head();
    pipeline
        .source
        .execute_batch(&format!(
            "delete from _shori_changes where id <= {newest}; update _shori_captures set pruned_to = {newest};"
        ))
        .unwrap();
    let input = pipeline.input();
    let report = verify(&input, &mut pipeline.serving).unwrap();
    assert!(report.projections.iter().all(|projection| projection.state == State::Behind && !projection.ok()));
    assert!(report.to_string().contains("catch up first"), "{report}");
}

/// A pipeline that goes on when it is looked at for the second time.
struct GoesOn {
    pipeline: Pipeline,
    queries: u32,
}

impl Serving for GoesOn {
    fn scan(
        &mut self,
        sql: &str,
        take: &mut dyn FnMut(RecordBatch) -> shori_core::Result<()>,
    ) -> shori_core::Result<()> {
        self.queries += 1;
        if self.queries == 2 {
            self.pipeline.generate(301);
            self.pipeline.project();
        }
        self.pipeline.serving.scan(sql, take)
    }
}

#[test]
fn a_projection_that_is_behind_is_waited_for_and_one_that_is_ahead_is_followed() {
    let mut pipeline = Pipeline::new(200, 400);
    pipeline.project();
    pipeline.generate(300);
    let copied = pipeline.head() as u64;
    let mut input = pipeline.input();
    input.catch_up = Duration::from_secs(60);
    let mut serving = GoesOn { pipeline, queries: 0 };
    let report = verify(&input, &mut serving).unwrap();
    assert_clean(&report);
    assert!(report.projections.iter().all(|projection| projection.as_of_change > copied), "{report}");
}

#[test]
fn changes_that_are_no_longer_kept_are_not_needed_by_a_projection_that_is_up_to_date() {
    let mut pipeline = Pipeline::new(0, 700);
    pipeline.project();
    let newest = pipeline.head();
    pipeline
        .source
        .execute_batch(&format!(
            "delete from _shori_changes where id <= {newest}; update _shori_captures set pruned_to = {newest};"
        ))
        .unwrap();
    assert_clean(&pipeline.verify());
}

#[test]
fn a_projection_that_was_never_built_is_told_beside_the_others() {
    let mut pipeline = Pipeline::new(0, 100);
    pipeline.project();
    let delete = "delete from ctl_projection_checkpoints where projection_name = 'customers_latest'";
    pipeline.serving.execute_batch(delete).unwrap();
    let report = pipeline.verify();
    let states: Vec<_> = report.projections.iter().map(|projection| projection.state).collect();
    assert_eq!(states, [State::Compared, State::Compared, State::NotBuilt, State::Compared]);
    assert_eq!(report.projections.iter().filter(|projection| projection.ok()).count(), 3, "{report}");
    assert!(!report.ok() && report.to_string().contains("NOT BUILT\n"), "{report}");
}

#[test]
fn lost_rows_are_found() {
    let delete = "delete from proj_orders_latest where order_id = (select max(order_id) from proj_orders_latest)";
    let examples = damaged(delete, LATEST, &[FindingKind::Missing]);
    assert!(examples[0].starts_with("order_id="), "{examples:?}");
    damaged("delete from customers_latest where customer_id = 7", CUSTOMERS, &[FindingKind::Missing]);
    let delete = "
        delete from proj_orders_kpi_by_minute_segment
        where rowid = (select min(rowid) from proj_orders_kpi_by_minute_segment)
    ";
    let examples = damaged(delete, KPI, &[FindingKind::Missing]);
    assert!(examples[0].starts_with("minute_bucket=2026-01-0"), "{examples:?}");
}

#[test]
fn rows_too_many_are_found() {
    let twice = "insert into customers_latest from customers_latest where customer_id = 7";
    assert_eq!(damaged(twice, CUSTOMERS, &[FindingKind::Duplicated]), ["customer_id=7"]);
    let foreign = "insert into customers_latest select * replace (4711 as customer_id) from customers_latest limit 1";
    assert_eq!(damaged(foreign, CUSTOMERS, &[FindingKind::Extra]), ["customer_id=4711"]);
}

#[test]
fn changed_values_are_found() {
    let examples = damaged(
        "update customers_latest set segment = 'none' where customer_id = 7",
        CUSTOMERS,
        &[FindingKind::Differing],
    );
    assert!(examples[0].starts_with("customer_id=7: segment should be "), "{examples:?}");
    assert!(examples[0].ends_with(" and is none"), "{examples:?}");
    let cent = "
        update proj_orders_kpi_by_minute_segment
        set paid_amount_sum = paid_amount_sum + 0.01
        where rowid = (select min(rowid) from proj_orders_kpi_by_minute_segment)
    ";
    damaged(cent, KPI, &[FindingKind::Differing]);
    let microsecond = "update proj_orders_latest set updated_at = updated_at + to_microseconds(1)";
    assert_eq!(damaged(microsecond, LATEST, &[FindingKind::Differing]).len(), 10);
    let older = "update customers_latest set __source_lsn = '\\x00'::blob where customer_id = 7";
    damaged(older, CUSTOMERS, &[FindingKind::Differing]);
}

#[test]
fn columns_that_are_missing_or_lost_their_decimals_are_found() {
    let examples = damaged("alter table proj_orders_latest drop column status", LATEST, &[FindingKind::Columns]);
    assert_eq!(examples, ["status is missing"]);
    let examples =
        damaged("alter table proj_orders_latest alter column amount type double", LATEST, &[FindingKind::Columns]);
    assert_eq!(examples, ["amount should be DECIMAL(18,2) and is DOUBLE"]);
}

/// A version that has a successor without a deletion between.
const CONTINUED: &str = "
    select one.surrogate_key
    from dim_orders_history one
    join dim_orders_history two on two.order_key = one.order_key and two.valid_from = one.valid_to
    order by 1
    limit 1
";

#[test]
fn two_current_versions_are_found() {
    let reopen =
        format!("update dim_orders_history set valid_to = null, is_current = true where surrogate_key = ({CONTINUED})");
    let kinds = [FindingKind::Overlap];
    let mut pipeline = Pipeline::new(0, 700);
    pipeline.project();
    pipeline.serving.execute_batch(&reopen).unwrap();
    let report = pipeline.verify();
    let history = &report.projections[3];
    assert!(kinds.iter().all(|kind| history.count(*kind) == 1), "{report}");
    assert!(history.count(FindingKind::Duplicated) + history.count(FindingKind::Extra) == 1, "{report}");
}

#[test]
fn a_live_key_without_a_current_version_is_found() {
    let lose = "delete from dim_orders_history where surrogate_key = (
        select max(surrogate_key) from dim_orders_history where is_current and cdc_operation = 'INSERT'
    )";
    damaged(lose, HISTORY, &[FindingKind::Missing, FindingKind::VersionCount]);
}

#[test]
fn a_current_version_of_a_dead_key_is_found() {
    let revive = "
        update dim_orders_history
        set valid_to = null, is_current = true
        where surrogate_key = (
            select max(surrogate_key)
            from dim_orders_history
            where order_key not in (select order_key from dim_orders_history where is_current)
        )
    ";
    damaged(revive, HISTORY, &[FindingKind::Extra, FindingKind::DeletionCount]);
}

#[test]
fn a_current_version_with_other_values_is_found() {
    let change = "
        update dim_orders_history
        set amount = amount + 0.01
        where surrogate_key = (select max(surrogate_key) from dim_orders_history where is_current)
    ";
    let examples = damaged(change, HISTORY, &[FindingKind::Differing]);
    assert!(examples[0].contains("amount should be "), "{examples:?}");
}

#[test]
fn overlaps_and_gaps_are_found_to_the_microsecond() {
    let longer = format!(
        "update dim_orders_history set valid_to = valid_to + to_microseconds(1) where surrogate_key = ({CONTINUED})"
    );
    damaged(&longer, HISTORY, &[FindingKind::Overlap, FindingKind::DeletionCount]);
    let shorter = format!(
        "update dim_orders_history set valid_to = valid_to - to_microseconds(1) where surrogate_key = ({CONTINUED})"
    );
    damaged(&shorter, HISTORY, &[FindingKind::Gap, FindingKind::DeletionCount]);
    let middle = "
        delete from dim_orders_history
        where surrogate_key = (
            select min(two.surrogate_key)
            from dim_orders_history one
            join dim_orders_history two on two.order_key = one.order_key and two.valid_from = one.valid_to
            join dim_orders_history three on three.order_key = two.order_key and three.valid_from = two.valid_to
        )
    ";
    damaged(middle, HISTORY, &[FindingKind::Gap, FindingKind::VersionCount, FindingKind::DeletionCount]);
}

#[test]
fn a_flag_that_disagrees_and_a_version_that_runs_backwards_are_found() {
    let flag = "
        update dim_orders_history
        set is_current = false
        where surrogate_key = (select max(surrogate_key) from dim_orders_history where is_current)
    ";
    damaged(flag, HISTORY, &[FindingKind::Missing, FindingKind::CurrentFlag]);
    let backwards = "
        update dim_orders_history
        set valid_from = valid_to
        where surrogate_key = (
            select min(surrogate_key) from dim_orders_history where valid_to is not null and cdc_operation = 'INSERT'
        )
    ";
    damaged(backwards, HISTORY, &[FindingKind::Backwards]);
}

#[test]
fn a_first_version_that_was_lost_is_found_by_the_ledger() {
    let lose = format!(
        "
        delete from dim_orders_history
        where surrogate_key = ({CONTINUED})
        "
    );
    damaged(&lose, HISTORY, &[FindingKind::VersionCount]);
}

#[test]
fn changes_by_others_widen_what_the_ledger_tells() {
    let mut pipeline = Pipeline::new(0, 300);
    pipeline
        .source
        .execute_batch("update orders set status = 'by hand' where order_id = (select max(order_id) from orders)")
        .unwrap();
    pipeline.project();
    let report = pipeline.verify();
    assert_clean(&report);
    assert!(report.projections[3].notes[0].contains("2 change rows"), "{report}");
}
