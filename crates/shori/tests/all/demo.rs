//! `shori demo`: figures, and signals at any moment.

use rustix::process::Signal;

use crate::harness::{Done, Running, World, until};

const KEYS: [&str; 9] = [
    "generated",
    "captured",
    "projected",
    "lost",
    "duplicated",
    "seconds",
    "changes_per_second",
    "freshness_ms",
    "rss_peak_mb",
];

/// Checks the line of figures; returns how many changes were generated.
#[track_caller]
fn assert_nothing_lost(done: &Done) -> u64 {
    assert_eq!(done.status, Some(0), "{done:?}");
    let figures = done.json();
    let keys: Vec<&str> = figures.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, KEYS);
    let percentiles: Vec<&str> = figures["freshness_ms"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(percentiles, ["p50", "p95", "p99"]);
    assert_eq!((figures["lost"].as_u64(), figures["duplicated"].as_u64()), (Some(0), Some(0)), "{figures}");
    for key in ["seconds", "changes_per_second", "rss_peak_mb"] {
        assert!(figures[key].as_f64().unwrap() > 0.0, "{figures}");
    }
    figures["generated"].as_u64().unwrap()
}

/// Waits until the demo has projected more than `changes`.
fn projected(world: &World, running: &mut Running, changes: u64) {
    let at_least = format!("select count(*) from ctl_projection_metadata where as_of_lsn > unhex('{changes:016x}')");
    until("some progress", || {
        running.assert_running();
        world.client()?;
        let rows = world.try_query(&at_least).ok()?;
        (rows[0][0].as_deref() == Some("4")).then_some(())
    });
}

#[test]
fn one_line_of_figures_and_a_second_run_goes_on() {
    let world = World::empty_demo();
    let words = ["demo", "--changes", "20000", "--seed", "7", "--json"];
    let first = world.succeed(&words);
    assert!(first.err.is_empty(), "{}", first.err);
    assert_eq!(assert_nothing_lost(&first), 20_000);
    let figures = first.json();
    assert!(figures["captured"].as_u64().unwrap() >= 20_000, "{figures}");
    assert_eq!(figures["captured"], figures["projected"]);
    let newest = world.newest_change();
    assert_nothing_lost(&world.succeed(&["demo", "--changes", "3000", "--seed", "8", "--json"]));
    assert!(world.newest_change() >= newest + 3_000);
    world.verify();
    assert_eq!(world.runs(), ["cancelled", "cancelled"]);
    planted_damage_is_named(&world);
}

#[test]
fn without_a_terminal_lines_tell_of_progress() {
    let world = World::empty_demo();
    let mut running = world.start(&["demo", "--rate", "500"]);
    until("a line of progress", || {
        running.assert_running();
        running.out().lines().any(|line| line.ends_with(" ms)") && !line.contains(" 0 projected")).then_some(())
    });
    let done = running.stop();
    assert!(done.out.lines().all(|line| !line.contains('\u{1b}')), "{}", done.out);
    assert!(done.out.contains("0 lost, 0 duplicated"), "{}", done.out);
}

fn planted_damage_is_named(world: &World) {
    let order = world.value("select max(order_id) from proj_orders_latest");
    let customer = world.value("select min(customer_id) from customers_latest");
    world.damage("proj_orders_latest", &format!("delete from TARGET where order_id = {order}"));
    let done = world.shori(&["verify"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.out.contains(&format!("order_id={order}")), "{}", done.out);
    let change = format!("update TARGET set segment = 'NOBODY' where customer_id = {customer}");
    world.damage("customers_latest", &change);
    let done = world.shori(&["verify", "--json"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    let report = done.json().to_string();
    assert!(report.contains(&format!("order_id={order}")), "{report}");
    assert!(report.contains(&format!("customer_id={customer}")) && report.contains("NOBODY"), "{report}");
}

#[test]
fn spec4_18_a_killed_demo_goes_on_and_its_run_is_closed_as_failed() {
    let world = World::empty_demo();
    let words = ["demo", "--changes", "400000", "--rate", "4000", "--seed", "3", "--json"];
    let mut running = world.reached(world.start(&words));
    projected(&world, &mut running, 2_000);
    running.kill();
    assert_eq!(world.runs(), ["running"], "nothing has closed it yet");
    assert_nothing_lost(&world.succeed(&["demo", "--changes", "2000", "--seed", "4", "--json"]));
    world.verify();
    assert_eq!(world.runs(), ["failed", "cancelled"]);
    let told = "select count(*) from pipeline_metadata where status = 'failed' and end_time >= start_time
                and error_message like '%without closing%'";
    assert_eq!(world.value(told), "1");
}

#[test]
fn spec4_18_a_terminated_demo_ends_well_and_goes_on() {
    let world = World::empty_demo();
    for (seed, signal) in [("5", Signal::TERM), ("6", Signal::INT)] {
        let mut running = world.reached(world.start(&["demo", "--rate", "4000", "--seed", seed, "--json"]));
        projected(&world, &mut running, world.newest_change() as u64 + 500);
        running.signal(signal);
        assert!(assert_nothing_lost(&running.end()) > 0);
    }
    assert_nothing_lost(&world.succeed(&["demo", "--changes", "1000", "--json"]));
    world.verify();
    assert_eq!(world.runs(), ["cancelled", "cancelled", "cancelled"]);
}
