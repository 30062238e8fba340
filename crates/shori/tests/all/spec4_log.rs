//! What the log keeps, through crashes too: the items of the specification's list of what others got wrong.

use shori_core::failpoint;

use crate::harness::{Running, World, until};
use crate::small::{CONFIGURATION, small};

/// The staging table of things.
fn staging(world: &World) -> String {
    world.value("select staging_table from ctl_ingestion_watermarks where capture_instance = 'things'")
}

#[test]
fn spec4_06_delete_and_insert_of_one_key_keep_both_in_order() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write(
        "begin; delete from things where id = 1; insert into things values (1, 'anew', '5.00'); commit;
        insert or replace into things values (2, 'replaced', '6.00');",
    );
    world.catch_up(&mut running);
    let log = format!("select id, op, name from {} where op > 0 order by lsn, seqval", staging(&world));
    let lines: Vec<String> =
        world.query(&log).into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect();
    let ids_and_ops: Vec<&str> = lines.iter().map(|line| &line[..3]).collect();
    assert_eq!(ids_and_ops[..2], ["1 1", "1 2"], "{lines:?}");
    assert!(lines[1].ends_with("anew") && lines.last().unwrap().ends_with("replaced"), "{lines:?}");
    let versions = "select id, name, is_current from things_history order by id, valid_from";
    let versions: Vec<String> =
        world.query(versions).into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(versions, ["1 one false", "1 anew true", "2 two false", "2 replaced true"]);
    world.verify();
}

#[test]
fn spec4_09_staging_is_bounded_and_projections_are_rebuilt_from_what_is_kept() {
    let mut world = small();
    let retention = "[retention]\nkeep_hours = 0.0\nevery_seconds = 1\n";
    world.configure(&format!(
        "{}{retention}",
        CONFIGURATION.replace("busy_timeout_ms", "keep_changes_seconds = 0\nbusy_timeout_ms")
    ));
    let mut running = world.run();
    world.catch_up(&mut running);
    for round in 0..30 {
        let updates: String = (0..100)
            .map(|n| format!("update things set amount = '{round}.{n:02}' where id = {};", n % 2 + 1))
            .collect();
        world.write(&format!("begin; {updates} commit;"));
    }
    world.write("delete from things where id = 2;");
    world.catch_up(&mut running);
    until("compaction", || {
        running.assert_running();
        let rows = world.try_query(&format!("select count(*) from {}", staging(&world))).ok()?;
        (rows[0][0].as_ref()?.parse::<u64>().ok()? <= 4).then_some(())
    });
    until("pruning of the source", || {
        running.assert_running();
        world.write("update others set name = 'again';");
        let kept = "select count(*) from _shori_changes";
        (world.source().query_row(kept, [], |row| row.get::<_, i64>(0)).unwrap() < 3000).then_some(())
    });
    let versions = world.value("select count(*) from things_history");
    assert_eq!(versions, "3002");
    for projection in ["things_latest", "others_latest", "amount_by_name", "things_history"] {
        world.succeed(&["rebuild", projection]);
    }
    world.catch_up(&mut running);
    running.stop();
    world.verify();
    assert_eq!(world.value("select count(*) from things_history"), versions);
    // The cache is made again from the compacted log.
    std::fs::remove_dir_all(world.path(".shori")).unwrap();
    world.write("update things set amount = '7.00';");
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(world.value("select amount from things_latest"), "7.00");
}

/// Projections left out of the configuration miss what compaction takes away meanwhile: deletions above all.
#[test]
fn spec4_09_projections_that_missed_what_was_compacted_are_built_anew() {
    for forgetful in [false, true] {
        let mut world = small();
        let all = format!("{CONFIGURATION}[retention]\nkeep_hours = 0.0\n");
        world.configure(&all);
        world.write("insert into things values (3, 'three', '3.30'), (4, 'four', '4.40');");
        world.succeed(&["run", "--once"]);
        let others = all.find("[[projection]]\nname = \"things_latest\"").unwrap();
        world.configure(&format!("{}[retention]\nkeep_hours = 0.0\n", &all[..others]));
        world.write(
            "delete from things where id = 2; update things set amount = '1.11' where id = 1; delete from things where id = 3;",
        );
        world.write("insert into things values (3, 'three', '3.33');");
        world.succeed(&["run", "--once"]);
        world.succeed(&["compact"]);
        world.write("update things set amount = '1.12' where id = 1;");
        if forgetful {
            std::fs::remove_dir_all(world.path(".shori")).unwrap();
        }
        world.configure(&all);
        world.succeed(&["run", "--once"]);
        let query = |sql: &str| -> Vec<String> {
            world.query(sql).into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect()
        };
        let rows = ["1 1.12", "3 3.33", "4 4.40"];
        assert_eq!(query("select id, amount from things_latest order by id"), rows, "{forgetful}");
        assert_eq!(query("select id, amount from things_history where is_current order by id"), rows, "{forgetful}");
        // What stood before is there still, and ended.
        let ended = "select id, amount from things_history where not is_current order by id, valid_from";
        assert_eq!(query(ended), ["1 1.10", "1 1.11", "2 2.20", "3 3.30"], "{forgetful}");
        world.verify();
    }
}

#[test]
fn spec4_10_backlog_is_counted_at_the_source() {
    let world = small();
    world.succeed(&["run", "--once"]);
    world.write("update things set amount = '3.00'; insert into others values (2, 'more');");
    let status = world.succeed(&["status", "--json"]).json();
    assert_eq!(status["captures"][0]["changes_waiting"].as_u64(), Some(3), "{status}");
    world.succeed(&["run", "--once"]);
    let status = world.succeed(&["status", "--json"]).json();
    assert_eq!(status["captures"][0]["changes_waiting"].as_u64(), Some(0), "{status}");
}

/// Runs with an armed failpoint until that has ended the process.
fn dies_at(world: &World, place: &str, count: u32, round: u32) {
    let mut command = world.command(&["run"]);
    command.env("SHORI_FAILPOINT", format!("{place}:{count}"));
    let mut running = Running::start(command);
    let mut number = 0;
    let mut asked: Option<Running> = None;
    until(place, || {
        if running.has_ended() {
            return Some(());
        }
        number += 1;
        // Some places are reached at rest only.
        if number % 30 != 1 {
            return None;
        }
        world.write(&format!(
            "begin; insert or replace into things values ({}, 'round {round}', '{number}.00');
            delete from things where id = {}; update others set name = '{round} {number}'; commit;",
            number % 17 + 3,
            (number * 5) % 17 + 3
        ));
        let verb: Option<&[&str]> = match place {
            failpoint::COMPACT_BETWEEN => Some(&["compact"]),
            failpoint::INGEST_AFTER_REQUEST => Some(&["resnapshot", "things"]),
            _ => None,
        };
        // Only of the running pipeline: without one, the command would run one itself.
        if let Some(verb) = verb.filter(|_| asked.as_mut().is_none_or(Running::has_ended) && world.client().is_some()) {
            asked = Some(world.start(verb));
        }
        None
    });
    assert_eq!(running.wait().code(), None, "{place}: {}", running.err());
    if let Some(mut asked) = asked {
        asked.wait();
    }
}

#[test]
fn spec4_12_a_crash_between_any_two_writes_leaves_no_duplicate() {
    let mut world = small();
    world.configure(&format!("{CONFIGURATION}\n[retention]\nkeep_hours = 0.0\n"));
    for (round, place) in failpoint::ALL.iter().enumerate() {
        for count in [1, 3] {
            dies_at(&world, place, count, round as u32);
        }
        if round % 4 == 3 {
            world.succeed(&["run", "--once"]);
            world.verify();
        }
    }
    world.succeed(&["run", "--once"]);
    world.verify();
    let twice = format!("select count(*) - count(distinct (lsn, seqval)) from {}", staging(&world));
    assert_eq!(world.value(&twice), "0");
    let runs = world.runs();
    assert!(!runs.contains(&"running".to_string()), "{runs:?}");
}

#[test]
fn spec4_16_a_key_may_have_thousands_of_versions() {
    let mut world = small();
    world.configure(&format!("{CONFIGURATION}\n[ingest]\nbatch_max_rows = 500\n"));
    let mut running = world.run();
    world.catch_up(&mut running);
    let mut versions = 1;
    for round in 0..40 {
        let mut statements = String::from("begin;");
        for n in 0..100 {
            match (round * 100 + n) % 50 {
                0 => statements.push_str("delete from things where id = 1;"),
                1 => {
                    versions += 1;
                    statements.push_str(&format!("insert into things values (1, 'again', '{round}.{n:02}');"));
                }
                _ => {
                    versions += 1;
                    statements.push_str(&format!("update things set amount = '{round}.{n:02}' where id = 1;"));
                }
            }
        }
        world.write(&format!("{statements} commit;"));
    }
    world.catch_up(&mut running);
    let found =
        "select count(*), count(*) filter (is_current), count(distinct valid_from) from things_history where id = 1";
    let row = world.query(found).remove(0);
    let expected = [versions.to_string(), "1".to_string(), versions.to_string()];
    assert_eq!(row.into_iter().flatten().collect::<Vec<_>>(), expected);
    running.stop();
    world.verify();
}

#[test]
fn spec4_17_every_committed_version_between_two_looks_is_in_the_history() {
    let world = small();
    world.succeed(&["run", "--once"]);
    for number in 0..60 {
        world.write(&format!("update things set amount = '{number}.00' where id = 1;"));
    }
    world.succeed(&["run", "--once"]);
    let amounts = world.query(
        "select amount::bigint from things_history where id = 1 and cdc_operation = 'UPDATE' order by valid_from",
    );
    let amounts: Vec<String> = amounts.into_iter().map(|mut row| row.remove(0).unwrap()).collect();
    assert_eq!(amounts, (0..60).map(|number| number.to_string()).collect::<Vec<_>>());
    let joined = "select count(*) from things_history one join things_history two
        on one.id = two.id and one.valid_to = two.valid_from where one.id = 1";
    assert_eq!(world.value(joined), "60", "each version ends where the next begins");
    world.verify();
}

#[test]
fn spec4_18_every_run_record_is_closed() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    running.kill();
    assert_eq!(world.runs(), ["running"]);
    let running = world.run();
    until("the killed run's end", || (world.runs() == ["failed", "running"]).then_some(()));
    running.stop();
    world.succeed(&["run", "--once"]);
    assert_eq!(world.runs(), ["failed", "cancelled", "completed"]);
    let times = "select count(*) from pipeline_metadata where end_time >= start_time";
    assert_eq!(world.value(times), "3");
    // A run that fails by itself says why.
    std::fs::rename(world.path("source.db"), world.path("aside.db")).unwrap();
    assert_eq!(world.shori(&["run"]).status, Some(2));
    assert_eq!(world.runs(), ["failed", "cancelled", "completed", "failed"]);
    let told = "select count(*) from pipeline_metadata where error_message like '%source.db%'";
    assert_eq!(world.value(told), "1");
}
