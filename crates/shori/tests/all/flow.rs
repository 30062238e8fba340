//! What a person asks of a pipeline while changes flow.

use std::process::Command;

use crate::harness::{Running, World, run, until};

const PROJECTIONS: [&str; 4] =
    ["proj_orders_kpi_by_minute_segment", "proj_orders_latest", "customers_latest", "dim_orders_history"];

/// A demo pipeline that keeps nothing of the log that nobody needs.
struct Busy {
    world: World,
    application: Running,
    pipeline: Running,
}

impl Busy {
    fn start() -> Self {
        let world = World::demo();
        let rate =
            ["generate", "--rate", "1500", "--customers", "300", "--transaction-max-rows", "200", "--seed", "11"];
        let application = world.start(&rate);
        let mut pipeline = world.reached(Running::start(forgetful(&world, &["run"])));
        let begun = "select count(*) from ctl_projection_metadata where status = 'OK' and as_of_lsn is not null";
        until("all projections", || {
            pipeline.assert_running();
            (world.try_query(begun).ok()?[0][0].as_deref() == Some("4")).then_some(())
        });
        Self { world, application, pipeline }
    }

    /// Waits until the projections have gone on.
    fn goes_on(&mut self) {
        let newest = self.world.newest_change();
        let shown = format!(
            "select count(*) from ctl_projection_metadata where status = 'OK' and as_of_lsn >= unhex('{newest:016x}')"
        );
        until("later changes", || {
            self.pipeline.assert_running();
            self.application.assert_running();
            (self.world.try_query(&shown).ok()?[0][0].as_deref() == Some("4")).then_some(())
        });
    }

    /// Ends the application; nothing may be missing, running or not.
    fn end(mut self) -> World {
        self.application.stop();
        self.world.catch_up(&mut self.pipeline);
        self.world.verify();
        self.pipeline.stop();
        self.world.verify();
        self.world
    }
}

/// With a retention of nothing but what is needed.
fn forgetful(world: &World, words: &[&str]) -> Command {
    let mut command = world.command(words);
    command.env("SHORI_KEEP_HOURS", "0.0");
    command
}

#[test]
fn tables_are_read_anew_while_changes_flow() {
    let mut busy = Busy::start();
    for table in ["orders", "customers", "payments", "orders"] {
        let done = busy.world.succeed(&["resnapshot", table]);
        assert!(done.err.contains(table), "{done:?}");
        busy.goes_on();
    }
    let world = busy.end();
    let snapshots = "select count(*) from ctl_snapshots where capture_instance = 'orders' and state = 'done'";
    assert!(world.value(snapshots).parse::<u64>().unwrap() >= 3, "{}", world.value(snapshots));
    world.shori(&["resnapshot", "nothing"]).tells(2, &["table nothing", "not captured"]);
}

#[test]
fn projections_are_built_anew_while_changes_flow() {
    let mut busy = Busy::start();
    for projection in PROJECTIONS {
        busy.world.succeed(&["rebuild", projection]);
        busy.goes_on();
    }
    let world = busy.end();
    for projection in PROJECTIONS {
        world.succeed(&["rebuild", projection]);
    }
    world.verify();
    world.shori(&["rebuild", "nothing"]).tells(2, &["projection nothing", "none of that name"]);
}

#[test]
fn the_log_is_compacted_while_changes_flow() {
    let mut busy = Busy::start();
    let mut gone = 0;
    for _ in 0..5 {
        busy.goes_on();
        gone += busy.world.succeed(&["compact", "--json"]).json()["rows_removed"].as_u64().unwrap();
    }
    assert!(gone > 0);
    busy.world.succeed(&["rebuild", "proj_orders_latest"]);
    busy.end();
}

#[test]
fn a_history_built_anew_keeps_the_versions_below_the_horizon() {
    let world = World::demo();
    world.write(
        "insert into orders values (1, 1, '1.00', 'new', '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z'),
            (2, 1, '2.00', 'new', '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z');",
    );
    world.succeed(&["run", "--once"]);
    for round in 0..20 {
        world.write(&format!("update orders set status = 'at {round}' where order_id = 1;"));
    }
    world.write("delete from orders where order_id = 2;");
    world.succeed(&["run", "--once"]);
    let compacted = run(forgetful(&world, &["compact", "--json"]));
    assert_eq!(compacted.status, Some(0), "{compacted:?}");
    assert!(compacted.json()["rows_removed"].as_u64().unwrap() >= 19, "{compacted:?}");
    let versions = "select * exclude (surrogate_key, batch_id, created_at, updated_at)
        from dim_orders_history order by order_key, valid_from";
    let before = world.query(versions);
    assert_eq!(before.len(), 22);
    world.write("update orders set status = 'last' where order_id = 1;");
    world.succeed(&["rebuild", "dim_orders_history"]);
    let after = world.query(versions);
    assert_eq!(after.len(), 23);
    world.verify();
    // Nothing of what stood changes but the end of the version that was current.
    let ended = |rows: &crate::harness::Rows| {
        rows.iter().filter(|row| row.contains(&Some("false".into()))).cloned().collect::<Vec<_>>()
    };
    assert!(ended(&before).iter().all(|row| after.contains(row)));
}

#[test]
fn once_catches_up_and_the_sample_may_be_made_twice() {
    let world = World::demo();
    world.succeed(&["generate", "--changes", "500", "--customers", "50", "--json"]);
    world.succeed(&["init", "--sample"]);
    let orders: i64 = world.source().query_row("select count(*) from orders", [], |row| row.get(0)).unwrap();
    assert!(orders > 0, "the sample's rows stay");
    let done = world.succeed(&["run", "--once"]);
    assert!(done.out.is_empty() && done.err.is_empty(), "{done:?}");
    assert_eq!(world.value("select count(*) from proj_orders_latest"), orders.to_string());
    assert_eq!(world.runs(), ["completed"]);
    world.verify();
    world.succeed(&["run", "--once"]);
    assert_eq!(world.runs(), ["completed", "completed"]);
}

#[test]
fn a_released_table_may_lose_a_column() {
    let world = World::demo();
    world.write(
        "insert into customers values (1, 'gold', 1, '2026-01-01T00:00:00Z'), (2, 'iron', 0, '2026-01-01T00:00:00Z');",
    );
    world.succeed(&["run", "--once"]);
    assert!(world.source().execute_batch("alter table customers drop column is_active").is_err(), "a trigger names it");
    let done = world.succeed(&["init", "--release", "customers"]);
    assert!(done.err.contains("customers"), "{done:?}");
    world.write(
        "alter table customers drop column is_active; update customers set segment = 'tin' where customer_id = 2;",
    );
    let mut running = world.run();
    world.write("insert into customers (customer_id, segment) values (3, 'lead');");
    let row = |id: &str, segment: &str| vec![Some(id.to_string()), Some(segment.to_string()), None];
    until("what was written meanwhile", || {
        running.assert_running();
        let rows = world.try_query("select customer_id, segment, is_active from customers_latest order by 1").ok()?;
        (rows == [row("1", "gold"), row("2", "tin"), row("3", "lead")]).then_some(())
    });
    world.catch_up(&mut running);
    running.stop();
    world.verify();
    world.shori(&["init", "--release", "nothing"]).tells(2, &["table nothing", "no source has that table"]);
}

#[test]
fn an_added_column_flows_through() {
    let world = World::demo();
    let order = "(order_id, customer_id, amount, status) values";
    world.write(&format!("insert into orders {order} (1, 1, '1.00', 'new'), (2, 1, '2.00', 'new');"));
    world.write("insert into customers (customer_id, segment) values (1, 'gold');");
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write("alter table orders add column note text; update orders set note = 'first' where order_id = 1;");
    world.write("alter table customers add column grade integer not null default 7;");
    world.write("insert into customers (customer_id, segment, grade) values (2, 'iron', 8);");
    until("the new columns", || {
        running.assert_running();
        let notes = world.try_query("select note from dim_orders_history where order_key = 1 and is_current").ok()?;
        let grades = world.try_query("select grade from customers_latest order by customer_id").ok()?;
        let grade = |text: &str| vec![Some(text.to_string())];
        (notes == [grade("first")] && grades == [grade("7"), grade("8")]).then_some(())
    });
    let versions = "select order_key, note from dim_orders_history where order_key = 1 order by valid_from";
    assert_eq!(world.query(versions)[0][1], None, "older versions had none");
    world.catch_up(&mut running);
    world.verify();
    running.stop();
    world.verify();
}

#[test]
fn a_query_has_one_answer_running_or_not() {
    let world = World::demo();
    world.write("insert into customers (customer_id, segment) values (1, 'gold'), (2, 'a \"b\" ü');");
    let mut running = world.run();
    world.catch_up(&mut running);
    let sql = "select * exclude (updated_at) from customers_latest order by customer_id";
    let ask = || (world.succeed(&["query", sql]).out, world.succeed(&["query", "--json", sql]).out);
    let (table, lines) = ask();
    assert!(table.contains("customer_id") && table.contains("gold"), "{table}");
    assert_eq!(lines.lines().count(), 2, "{lines}");
    let first: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((first["customer_id"].as_i64(), first["is_active"].as_bool()), (Some(1), Some(true)));
    for (wrong, parts) in [("select * from nothing", ["nothing"]), ("delete from customers_latest", ["read"])] {
        world.shori(&["query", wrong]).tells(if parts == ["read"] { 2 } else { 1 }, &parts);
    }
    running.stop();
    assert_eq!(ask(), (table, lines));
    for (wrong, parts) in [("select * from nothing", ["nothing"]), ("delete from customers_latest", ["read"])] {
        world.shori(&["query", wrong]).tells(if parts == ["read"] { 2 } else { 1 }, &parts);
    }
    assert_eq!(world.value("select count(*) from customers_latest"), "2");
    world.shori(&["query", "--store", "srving", "select 1"]).tells(2, &["store srving", "did you mean serving?"]);
}

#[test]
fn status_tells_how_far_everything_is() {
    let world = World::demo();
    world.write("insert into customers (customer_id, segment) values (1, 'gold');");
    let mut running = world.run();
    world.catch_up(&mut running);
    let status = world.succeed(&["status", "--json"]).json();
    assert_eq!((status["pipeline"].as_str(), status["running"].as_bool()), (Some("demo"), Some(true)));
    assert_eq!(status["captures"].as_array().unwrap().len(), 3);
    assert_eq!(status["captures"][0]["changes_waiting"].as_u64(), Some(0));
    assert_eq!(status["projections"].as_array().unwrap().len(), 4);
    assert!(status["projections"][0]["age_seconds"].as_f64().unwrap() >= 0.0, "{status}");
    let mut watching = world.start(&["status", "--watch", "--json"]);
    until("two looks", || {
        watching.assert_running();
        (watching.out().lines().count() >= 2).then_some(())
    });
    drop(watching);
    running.stop();
    world.write("insert into customers (customer_id, segment) values (2, 'iron');");
    let status = world.succeed(&["status", "--json"]).json();
    assert_eq!(status["running"].as_bool(), Some(false));
    assert_eq!(status["captures"][0]["changes_waiting"].as_u64(), Some(1));
    let text = world.succeed(&["status"]).out;
    assert!(text.contains("pipeline demo is not running") && text.contains("customers_latest"), "{text}");
}

#[test]
fn bash_completes_every_verb() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shori"));
    command.args(["completions", "bash"]);
    let done = run(command);
    assert_eq!(done.status, Some(0));
    let verbs = [
        "demo",
        "init",
        "check",
        "run",
        "status",
        "generate",
        "rebuild",
        "resnapshot",
        "verify",
        "compact",
        "bench",
        "query",
    ];
    for verb in verbs {
        assert!(done.out.contains(verb), "{verb}");
        let mut help = Command::new(env!("CARGO_BIN_EXE_shori"));
        help.args([verb, "--help"]);
        let help = run(help);
        assert!(help.status == Some(0) && help.out.contains("Example"), "{verb}: {help:?}");
    }
}
