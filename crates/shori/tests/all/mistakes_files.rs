//! Files that are missing, locked, damaged, replaced, restored or out of space.

use crate::harness::{Running, World, until};
use crate::small::{CONFIGURATION, FILES, SOURCE, names, small};
use crate::small_disk::SmallDisk;

/// Leaves no write-ahead log beside the source, so that the file can be copied.
fn settle(world: &World) {
    world.source().query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(())).unwrap();
}

#[test]
fn a_source_that_is_no_database_is_told() {
    let mut world = small();
    let verbs: [&[&str]; 3] = [&["run"], &["init"], &["check"]];
    let missing = CONFIGURATION.replace("source.db", "none.db");
    let directory = CONFIGURATION.replace("source.db", "folder");
    let text = CONFIGURATION.replace("source.db", "notes.txt");
    std::fs::create_dir(world.path("folder")).unwrap();
    world.put("notes.txt", &"only words ".repeat(1000));
    for verb in verbs {
        world.configure(&missing);
        world.shori(verb).tells(2, &["none.db", "does not exist", "correct the path"]);
        assert!(!world.path("none.db").exists(), "it is not created");
        world.configure(&directory);
        world.shori(verb).tells(2, &["folder", "it is a directory", "give the path of the file"]);
        world.configure(&text);
        world.shori(verb).tells(1, &["notes.txt", "not a database", "give the path of a SQLite database"]);
    }
    world.configure(CONFIGURATION);
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn a_source_that_may_not_be_read_is_told() {
    if rustix::process::getuid().is_root() {
        println!("skipped: permissions do not bind root");
        return;
    }
    let world = small();
    let readable = |mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(world.path("source.db"), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    readable(0o000);
    world.shori(&["run"]).tells(2, &["source.db", "let this user read and write"]);
    readable(0o600);
    world.succeed(&["run", "--once"]);
}

#[test]
fn a_locked_source_is_tried_again_until_it_is_free() {
    let world = small();
    let holder = world.source();
    holder.execute_batch("begin exclusive").unwrap();
    world.shori(&["init"]).tells(1, &["source.db", "locked"]);
    let mut running = world.start(&["run"]);
    until("tries", || {
        running.assert_running();
        (running.err().matches("trying again").count() >= 2).then_some(())
    });
    assert!(running.err().contains("locked"), "{}", running.err());
    holder.execute_batch("commit").unwrap();
    world.catch_up(&mut running);
    // A writer that keeps the lock does not stop reading.
    holder.execute_batch("begin exclusive; insert into things values (3, 'three', '3.30');").unwrap();
    world.succeed(&["status"]);
    assert_eq!(names(&world), ["one", "two"]);
    holder.execute_batch("commit").unwrap();
    world.catch_up(&mut running);
    assert_eq!(names(&world), ["one", "two", "three"]);
    running.stop();
    world.verify();
}

#[test]
fn a_locked_source_does_not_hold_up_the_end() {
    let world = small();
    let holder = world.source();
    holder.execute_batch("begin exclusive").unwrap();
    let mut running = world.start(&["run"]);
    until("a try", || {
        running.assert_running();
        running.err().contains("trying again").then_some(())
    });
    running.stop();
    holder.execute_batch("commit").unwrap();
}

#[test]
fn a_source_replaced_by_another_file_stops_the_pipeline() {
    let world = small();
    world.succeed(&["run", "--once"]);
    settle(&world);
    let captured = std::fs::read(world.path("source.db")).unwrap();
    let replace = |content: &[u8]| {
        for beside in ["source.db-wal", "source.db-shm"] {
            let _ = std::fs::remove_file(world.path(beside));
        }
        std::fs::remove_file(world.path("source.db")).unwrap();
        std::fs::write(world.path("source.db"), content).unwrap();
    };
    replace(&[]);
    world.write(SOURCE);
    world.shori(&["run"]).tells(1, &["timeline here", "connect to the former source, or start with a new store"]);
    replace(&captured);
    world.write("insert into things values (3, 'three', '3.30');");
    world.succeed(&["run", "--once"]);
    assert_eq!(names(&world), ["one", "two", "three"]);
    // An older copy: changes of the log are not in it, also when its own have come past them.
    replace(&captured);
    world.shori(&["run"]).tells(1, &["source.db", "put the captured file back"]);
    let status = world.shori(&["status"]);
    assert!(status.status == Some(1) && status.out.contains("put the captured file back"), "{status:?}");
    world.write("insert into things values (4, 'four', '4.40'), (5, 'five', '5.50');");
    world.shori(&["run"]).tells(1, &["source.db", "an older copy, written to since", "put the captured file back"]);
    assert_eq!(names(&world), ["one", "two", "three"], "what is served stays");
}

#[test]
fn a_source_replaced_while_it_is_read_stops_the_pipeline() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    std::fs::rename(world.path("source.db"), world.path("aside.db")).unwrap();
    world.write(SOURCE);
    running.end().tells(1, &["source.db", "another file took its place", "put the captured file back"]);
}

#[test]
fn a_damaged_serving_file_is_told_and_a_damaged_cache_is_made_anew() {
    let world = small();
    world.succeed(&["run", "--once"]);
    let serving = std::fs::read(world.path("serving.duckdb")).unwrap();
    let settled = std::fs::read(world.path("source.db")).unwrap();
    for content in [&serving[..serving.len() / 3], &settled[..], b"words, and not many of them"] {
        std::fs::write(world.path("serving.duckdb"), content).unwrap();
        world.shori(&["run", "--once"]).tells(1, &["serving.duckdb", "restore the file from a copy"]);
        assert_eq!(std::fs::read(world.path("serving.duckdb")).unwrap(), content, "it is left as it is");
    }
    std::fs::write(world.path("serving.duckdb"), &serving).unwrap();
    let cache = std::fs::read(world.path(".shori/state.sqlite")).unwrap();
    for (number, content) in [&cache[..cache.len() / 3], &serving[..], b"words", b""].into_iter().enumerate() {
        std::fs::write(world.path(".shori/state.sqlite"), content).unwrap();
        world.write(&format!(
            "insert into things values ({}, 'more', '1'); update things set amount = '{number}' where id = 1;",
            number + 10
        ));
        let done = world.succeed(&["run", "--once"]);
        println!("{number}: {}", done.err);
        world.verify();
    }
    std::fs::remove_dir_all(world.path(".shori")).unwrap();
    world.write("delete from things where id = 10;");
    world.succeed(&["run", "--once"]);
    world.verify();
}

/// Waits until the capture of things stands still, and returns why.
fn stands_still(world: &World, running: &mut Running) -> String {
    until("the gap", || {
        running.assert_running();
        let query = "select failed_reason from ctl_ingestion_watermarks where capture_instance = 'things'";
        world.try_query(query).ok()?.first()?.first()?.clone()
    })
}

#[test]
fn spec4_05_changes_pruned_unread_are_a_named_gap_and_a_resnapshot_heals() {
    let world = small();
    world.succeed(&["run", "--once"]);
    world.write(
        "insert into things values (3, 'three', '3.30');
        delete from things where id = 1;
        update _shori_captures set pruned_to = (select max(id) from _shori_changes) where table_name = 'things';
        delete from _shori_changes;
        insert into others values (2, 'later');",
    );
    let mut running = world.run();
    let reason = stands_still(&world, &mut running);
    assert!(reason.contains("table things") && reason.contains("run shori resnapshot things"), "{reason}");
    until("the neighbours", || {
        let rows = world.try_query("select count(*) from others_latest").ok()?;
        (rows[0][0].as_deref() == Some("2")).then_some(())
    });
    assert_eq!(names(&world), ["one", "two"], "what is served stays");
    let status = world.shori(&["status"]);
    assert!(status.status == Some(1) && status.out.contains("run shori resnapshot things"), "{status:?}");
    world.succeed(&["resnapshot", "things"]);
    until("the table read anew", || {
        running.assert_running();
        (names(&world) == ["two", "three"]).then_some(())
    });
    world.catch_up(&mut running);
    world.verify();
    running.stop();
    world.verify();
}

#[test]
fn spec4_05_a_log_restored_from_an_older_copy_is_a_named_gap() {
    let mut world = small();
    world.configure(&CONFIGURATION.replace("busy_timeout_ms", "keep_changes_seconds = 0\nbusy_timeout_ms"));
    world.succeed(&["run", "--once"]);
    std::fs::copy(world.path("serving.duckdb"), world.path("older.duckdb")).unwrap();
    let mut running = world.run();
    for id in 10..20 {
        world.write(&format!(
            "insert into things values ({id}, 'later', '1'); delete from things where id = {};",
            id - 9
        ));
    }
    world.write("insert into others values (2, 'later');");
    world.catch_up(&mut running);
    until("pruning", || {
        running.assert_running();
        world.write("update others set name = 'again';");
        let pruned = "select pruned_to from _shori_captures where table_name = 'things'";
        (world.source().query_row(pruned, [], |row| row.get::<_, i64>(0)).unwrap() > 0).then_some(())
    });
    running.stop();
    std::fs::copy(world.path("older.duckdb"), world.path("serving.duckdb")).unwrap();
    let mut running = world.run();
    let reason = stands_still(&world, &mut running);
    assert!(reason.contains("run shori resnapshot things"), "{reason}");
    running.stop();
    // Not running: the request runs the pipeline itself.
    world.succeed(&["resnapshot", "things"]);
    world.succeed(&["resnapshot", "others"]);
    let status = world.shori(&["status", "--json"]).json();
    assert!(status["captures"].as_array().unwrap().iter().all(|capture| capture["failed"].is_null()), "{status}");
    world.succeed(&["run", "--once"]);
    world.verify();
}

/// Rows that do not compress.
const FILL: &str = "
with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < 2000)
insert into things (name, amount) select hex(randomblob(1000)), '1.00' from numbers;";

/// Runs until the disk of `folder` is full, makes room, and goes on.
fn fills_up(folder: &str, configuration: &str, mib: u32) {
    let world = World::configured(configuration, &FILES, SOURCE);
    let path = world.path(folder);
    std::fs::create_dir(&path).unwrap();
    let Some(disk) = SmallDisk::mount(&path, mib) else { return };
    let mut running = world.start(&["run"]);
    for _ in 0..12 {
        if running.has_ended() {
            break;
        }
        world.write(FILL);
    }
    let done = running.end();
    println!("{}", done.err);
    done.tells(1, &["free some space and start again"]);
    let again = world.shori(&["run", "--once"]);
    println!("{}", again.err);
    assert_eq!(again.status, Some(1), "still full: {again:?}");
    disk.resize(1000);
    world.succeed(&["run", "--once"]);
    let things: i64 = world.source().query_row("select count(*) from things", [], |row| row.get(0)).unwrap();
    let served = world.command(&["query", "--json", "select count(*) as n from things_latest"]);
    assert_eq!(crate::harness::run(served).json()["n"].as_i64(), Some(things));
    world.verify();
    drop(disk);
}

#[test]
fn a_full_disk_under_the_store_stops_and_loses_nothing() {
    fills_up("full", &CONFIGURATION.replace("serving.duckdb", "full/serving.duckdb"), 16);
}

#[test]
fn a_full_disk_under_the_cache_stops_and_loses_nothing() {
    fills_up("full", &CONFIGURATION.replace("name = \"small\"", "name = \"small\"\ndir = \"full\""), 16);
}

#[test]
fn a_large_value_goes_through() {
    let world = small();
    world.write("insert into things values (3, hex(randomblob(4000000)), '1');");
    world.succeed(&["run", "--once"]);
    assert_eq!(world.value("select length(name) from things_latest where id = 3"), "8000000");
    world.verify();
}
