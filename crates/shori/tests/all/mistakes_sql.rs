//! Queries that fail, and values that do not fit: kept, named, and in nobody's way.

use crate::harness::{Running, World, until};
use crate::small::{CONFIGURATION, FILES, QUERY, SOURCE, names, small};

/// Waits until the query's projection shows an error with all of these parts.
#[track_caller]
fn fails_with(world: &World, running: &mut Running, parts: &[&str]) {
    until("the query's error", || {
        running.assert_running();
        let query = "select last_error from ctl_projection_metadata where projection_name = 'amount_by_name' and status = 'ERROR'";
        let error = world.try_query(query).ok()?.first()?.first()?.clone()?;
        parts.iter().all(|part| error.contains(part)).then_some(())
    });
}

#[test]
fn a_query_that_does_not_parse_or_bind_is_named_by_file_and_line() {
    let cases: [(&str, &str, &[&str]); 4] = [
        ("group by name", "grup by name", &["amount_by_name.sql, line 6"]),
        ("from things", "from thngs", &["amount_by_name.sql, line 5", "thngs"]),
        ("    name,", "    nam,", &["amount_by_name.sql, line 3", "nam"]),
        ("as amount", "as total), (", &["amount_by_name.sql"]),
    ];
    for (right, wrong, parts) in cases {
        let world = small();
        world.put("amount_by_name.sql", &QUERY.replacen(right, wrong, 1));
        world.shori(&["check"]).tells(1, parts);
        let mut running = world.run();
        fails_with(&world, &mut running, parts);
        world.write("insert into things values (3, 'three', '3.30');");
        until("the neighbours", || {
            let rows = world.try_query("select count(*) from things_history where is_current").ok()?;
            (rows[0][0].as_deref() == Some("3")).then_some(())
        });
        // Each neighbour commits by itself.
        until("the other neighbour", || (names(&world) == ["one", "two", "three"]).then_some(()));
        let status = world.shori(&["status"]);
        assert_eq!(status.status, Some(1), "{status:?}");
        assert!(parts.iter().all(|part| status.out.contains(part)), "{}", status.out);
        running.stop();
        world.put("amount_by_name.sql", QUERY);
        let mut running = world.run();
        world.catch_up(&mut running);
        running.stop();
        world.verify();
        assert_eq!(world.value("select count(*) from amount_by_name"), "3");
    }
}

#[test]
fn a_file_without_a_query_is_told() {
    let world = small();
    for text in ["", " \n;\n", "-- Nothing but words.\n", "/* Nothing /* but */ words. */;"] {
        world.put("amount_by_name.sql", text);
        for verb in [&["check"][..], &["run"], &["run", "--once"]] {
            world.shori(verb).tells(2, &["file ", "amount_by_name.sql", "it holds no query", "write a select"]);
        }
    }
    world.put("amount_by_name.sql", &format!("/* Words. */\n-- More.\n{QUERY};\n"));
    world.succeed(&["check"]);
    world.succeed(&["run", "--once"]);
    world.verify();
    world.put("amount_by_name.sql", "-- Nothing.");
    world.shori(&["verify"]).tells(2, &["amount_by_name.sql", "it holds no query"]);
}

/// Also where DuckDB names no line.
#[test]
fn a_query_that_fails_names_its_file_wherever_it_is_run() {
    let world = small();
    world.succeed(&["run", "--once"]);
    let text = |verb: &[&str]| {
        let done = world.shori(verb);
        assert_eq!(done.status, Some(1), "{done:?}");
        let lines = format!("{}{}", done.out, done.err);
        lines.lines().find(|line| line.contains("the query in ")).unwrap_or_else(|| panic!("{done:?}")).to_string()
    };
    let cases: [(&str, &str, &[&str]); 4] = [
        ("    name,", "    error('boom') as name,", &["amount_by_name.sql: ", "boom"]),
        ("    name,", "    nam,", &["amount_by_name.sql, line 3: ", "nam"]),
        ("    name,", "    cast(name as integer) as name,", &["amount_by_name.sql, line 3: ", "Could not convert"]),
        ("group by name", "grup by name", &["amount_by_name.sql, line 6: ", "syntax error"]),
    ];
    for (right, wrong, parts) in cases {
        world.put("amount_by_name.sql", &QUERY.replacen(right, wrong, 1));
        for verb in [&["verify"][..], &["check"], &["run", "--once"]] {
            let line = text(verb);
            assert!(parts.iter().all(|part| line.contains(part)), "{verb:?}: {line}");
            assert!(!line.contains("Unknown error code"), "{line}");
        }
        world.put("amount_by_name.sql", QUERY);
        world.succeed(&["run", "--once"]);
    }
}

#[test]
fn a_query_without_its_key_or_with_a_key_twice_tells() {
    let world = small();
    world.put("amount_by_name.sql", "select name as other, amount from things");
    world.shori(&["check"]).tells(1, &["amount_by_name", "name"]);
    world.put("amount_by_name.sql", "select name, amount from things");
    world.succeed(&["check"]);
    world.write("insert into things values (3, 'two', '3.30');");
    world
        .shori(&["run", "--once"])
        .tells(1, &["error: cannot refresh projection amount_by_name: its key is not unique"]);
    let mut running = world.run();
    fails_with(&world, &mut running, &["amount_by_name", "key is not unique", "name=two"]);
    world.write("delete from things where id = 3;");
    world.catch_up(&mut running);
    world.verify();
}

/// Sums of which one does not add: `check` tries it out on sampled rows.
#[test]
fn a_declaration_that_does_not_fit_its_query_is_found_by_check() {
    let entity =
        "key = [\"name\"]\nadditive = [\"amount\"]\nweight = \"weight\"\n[projection.entity]\nthings = \"id\"\n";
    let configuration = CONFIGURATION.replace("key = [\"name\"]\n", entity);
    let sum = "cast(sum(amount) as decimal(18, 2)) as amount";
    let weighed = QUERY.replace(sum, "cast(sum(amount) as decimal(18, 2)) as amount, count(*) as weight");
    let more: String =
        (3..60).map(|id| format!("insert into things values ({id}, 'n{}', '{id}.00');\n", id % 5)).collect();
    let world = World::configured(&configuration, &FILES, &format!("{SOURCE}{more}"));
    world.put("amount_by_name.sql", &weighed);
    world.succeed(&["check"]);
    world.put("amount_by_name.sql", &weighed.replace("sum(amount)", "max(amount)"));
    world.shori(&["check"]).tells(1, &["amount_by_name", "tried on sampled rows", "additive"]);
    world.put("amount_by_name.sql", &weighed.replace(sum, "max(name) as amount"));
    world.shori(&["check"]).tells(1, &["amount_by_name.sql", "column amount is no number", "leave it out of them"]);
}

#[test]
fn a_query_that_fails_when_run_keeps_its_rows_and_heals_with_the_data() {
    let world = small();
    let number = QUERY.replace("sum(amount)", "sum(case when amount > 100 then cast(name as integer) else amount end)");
    world.put("amount_by_name.sql", &number);
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write("update things set amount = '200' where id = 2; insert into others values (2, 'later');");
    fails_with(&world, &mut running, &["amount_by_name.sql", "two"]);
    assert_eq!(world.value("select amount from amount_by_name where name = 'two'"), "2.20", "its rows stay");
    until("the neighbours", || {
        let rows = world.try_query("select count(*) from others_latest").ok()?;
        (rows[0][0].as_deref() == Some("2")).then_some(())
    });
    let once = {
        running.stop();
        world.shori(&["run", "--once"])
    };
    once.tells(1, &["error: cannot refresh projection amount_by_name: cannot run the query", "two"]);
    let verified = world.shori(&["verify"]);
    assert_eq!(verified.status, Some(1), "{verified:?}");
    for part in [" FAILED\n", "amount_by_name: note: it has failed", "compared as of the source's change"] {
        assert!(verified.out.contains(part), "{}", verified.out);
    }
    let mut running = world.run();
    world.write("update things set amount = '3' where id = 2;");
    world.catch_up(&mut running);
    world.verify();
    running.stop();
}

#[test]
fn spec4_13_a_value_that_does_not_fit_is_kept_with_reason_and_bytes() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write(
        "insert into things values (3, 'three', 'abc');
        insert into things values (4, 'four', '4.4444');
        insert into things values (5, 'five', '5.50');",
    );
    until("the rejected changes", || {
        running.assert_running();
        (world.try_query("select count(*) from ctl_rejected_changes").ok()?[0][0].as_deref() == Some("2")).then_some(())
    });
    world.catch_up(&mut running);
    assert_eq!(names(&world), ["one", "two", "five"]);
    let kept =
        world.query("select capture_instance, reason, cast(raw as varchar) from ctl_rejected_changes order by lsn");
    for (row, raw) in kept.iter().zip(["abc", "4.4444"]) {
        let [capture, reason, bytes] = [0, 1, 2].map(|index| row[index].clone().unwrap());
        assert_eq!(capture, "things");
        assert!(reason.contains("column amount: "), "{reason}");
        assert!(bytes.contains(raw), "{bytes}");
    }
    world.write("update things set amount = '3.30' where id = 3; delete from things where id = 4;");
    world.catch_up(&mut running);
    assert_eq!(names(&world), ["one", "two", "three", "five"], "a value that fits heals the row");
    running.stop();
    assert_eq!(world.value("select records_failed from pipeline_metadata"), "2");
    world.verify();
}

#[test]
fn spec4_13_values_that_do_not_fit_in_a_snapshot_are_kept_too() {
    let world = small();
    world.write("insert into things values (3, 'three', x'00ff'), (4, 'four', 'nought');");
    let mut running = world.run();
    world.catch_up(&mut running);
    assert_eq!(names(&world), ["one", "two"]);
    assert_eq!(world.value("select count(*) from ctl_rejected_changes where capture_instance = 'things'"), "2");
    running.stop();
    world.succeed(&["run", "--once"]);
    assert_eq!(world.value("select count(*) from ctl_rejected_changes"), "2", "told once");
}

#[test]
fn a_type_named_for_a_column_that_is_not_there_is_refused() {
    let mut world = small();
    world.configure(&CONFIGURATION.replace("amount = \"decimal(18,2)\"", "amunt = \"decimal(18,2)\""));
    let done = world.shori(&["check"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.err.contains("table things") && done.err.contains("no such column"), "{done:?}");
}

/// Rows of the former query would stay wherever nothing touches them.
#[test]
fn a_query_that_has_changed_is_run_over_everything() {
    let world = small();
    world.succeed(&["run", "--once"]);
    for changed in ["sum(amount * 2)", "max(amount)", "min(amount)"] {
        world.put("amount_by_name.sql", &QUERY.replace("sum(amount)", changed));
        world.succeed(&["run", "--once"]);
        world.verify();
    }
    let by_entity =
        CONFIGURATION.replace("key = [\"name\"]\n", "key = [\"name\"]\n[projection.entity]\nthings = \"id\"\n");
    world.put("shori.toml", &by_entity);
    world.put("amount_by_name.sql", &QUERY.replace("from things", "from things where id <> 1"));
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(world.value("select count(*) from amount_by_name"), "1");
    world.serving().execute_batch("drop table amount_by_name").unwrap();
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(world.value("select count(*) from amount_by_name"), "1");
}

/// Rows that were not touched since would keep what the column held, and others have nothing.
#[test]
fn a_column_that_a_query_gives_no_more_goes_from_its_table() {
    let world = small();
    world.succeed(&["run", "--once"]);
    let columns = || {
        let sql = "select string_agg(column_name, ' ' order by column_index) from duckdb_columns()
                   where table_name = 'amount_by_name'";
        world.value(sql)
    };
    let given = "cast(sum(amount) as decimal(18, 2)) as amount";
    let base = "select count(*) from duckdb_tables() where table_name = 'amount_by_name__base'";
    let more: String = (3..9).map(|id| format!("insert into things values ({id}, 'n{id}', '1');")).collect();
    world.write(&more);
    for (gives, stand) in [
        ("count(*) as things", "name things"),
        ("count(*) as things, sum(amount) as amount", "name things amount"),
        ("count(*) as Things", "name Things"),
        (given, "name amount"),
    ] {
        world.put("amount_by_name.sql", &QUERY.replace(given, gives));
        world.write("update things set amount = amount + 1 where id = 1;");
        world.succeed(&["run", "--once"]);
        assert_eq!(columns(), stand);
        world.verify();
        // By then it is kept in layers.
        world.write("update things set amount = amount + 1, name = name || 'x' where id = 2;");
        world.succeed(&["run", "--once"]);
        assert_eq!(world.value(base), "1");
        world.verify();
    }
}

/// The source keeps no record of what wrote a row before it was captured.
#[test]
fn a_query_that_gives_the_commit_of_its_rows_is_verified() {
    let world = small();
    world.put("amount_by_name.sql", "select * from things");
    world.succeed(&["run", "--once"]);
    world.verify();
    world.write("update things set amount = '7.70' where id = 2;");
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(world.value("select count(__lsn) from amount_by_name"), "2");
}

#[test]
fn an_instant_is_tried_out_like_other_columns() {
    let mut world = small();
    world.configure(
        &CONFIGURATION.replace("[source.tables.others]", "[source.tables.times]\n[source.tables.others]").replace(
            "sql = \"amount_by_name.sql\"\ntables = [\"things\"]\nkey = [\"name\"]",
            "sql = \"amount_by_name.sql\"\ntables = [\"times\"]\nkey = [\"id\"]",
        ),
    );
    world.put("amount_by_name.sql", "select id, moment from times");
    world.write(
        "create table times (id integer primary key, moment timestamptz);
         insert into times values (1, '2026-01-02T03:04:05Z'), (2, '2026-01-02T03:04:05+01:00');",
    );
    world.succeed(&["check"]);
    world.succeed(&["run", "--once"]);
    world.verify();
}

/// Its key's type has changed: what the log holds of it is of another shape.
#[test]
fn a_retyped_table_is_read_anew_when_that_is_said() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    let retype = |id: &str, rows: &str| {
        format!(
            "begin; drop table things; create table things (id {id} primary key, name text, amount text);
             insert into things values {rows}; commit;"
        )
    };
    world.write(&retype("text", "('a', 'one', '1.10'), ('b', 'two', '2.20'), ('c', 'three', '3.30')"));
    until("the retyped table to stand still", || {
        let status = world.shori(&["status"]);
        status.out.contains("run shori resnapshot --retyped things").then_some(())
    });
    running.stop();
    let refused = world.shori(&["resnapshot", "things"]);
    let last = refused.err.lines().last().unwrap_or_default();
    assert!(refused.status == Some(1) && last.ends_with("run shori resnapshot --retyped things"), "{refused:?}");
    let read = world.shori(&["resnapshot", "--retyped", "things"]);
    assert_eq!(read.status, Some(0), "{read:?}");
    // The history's table is of the former type: what it holds is nowhere else.
    let once = world.shori(&["run", "--once"]);
    assert!(once.status == Some(1) && once.err.contains("rename or drop the table"), "{once:?}");
    world.serving().execute_batch("alter table things_history rename to things_history_before").unwrap();
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(names(&world), ["one", "two", "three"]);
    // In a running pipeline too.
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write(&retype("integer", "(7, 'seven', '7.00')"));
    until("the retyped table to stand still again", || {
        let status = world.shori(&["status"]);
        status.out.contains("run shori resnapshot --retyped things").then_some(())
    });
    world.succeed(&["resnapshot", "--retyped", "things"]);
    until("the table as it is now", || {
        (world.try_query("select name from things_latest").ok()?.len() == 1).then_some(())
    });
    assert_eq!(names(&world), ["seven"]);
    running.stop();
}

/// What it missed is to be read, and the error says so.
#[test]
fn a_table_renamed_and_back_is_read_anew_when_that_is_said() {
    let world = small();
    world.succeed(&["run", "--once"]);
    world.write("alter table things rename to elsewhere;");
    let refused = world.shori(&["run", "--once"]);
    assert!(refused.status == Some(1) && refused.err.contains("then run shori resnapshot things"), "{refused:?}");
    world.write("alter table elsewhere rename to things; insert into things values (3, 'three', '3.30');");
    world.shori(&["run", "--once"]);
    let status = world.shori(&["status"]);
    assert!(status.status == Some(1) && status.out.contains("then run shori resnapshot things"), "{status:?}");
    world.shori(&["resnapshot", "things"]);
    world.succeed(&["run", "--once"]);
    assert_eq!(names(&world), ["one", "two", "three"]);
    world.verify();
}
