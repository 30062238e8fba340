//! What a person gets wrong: one clear line, the right status, nothing lost.

use rustix::process::Signal;

use crate::harness::{World, run, until};
use crate::small::{CONFIGURATION, FILES, SOURCE, names, small};

const VERBS: [&[&str]; 4] = [&["check"], &["run", "--once"], &["status"], &["verify"]];

#[test]
fn a_wrong_configuration_is_one_line_and_status_2() {
    let mut world = small();
    let cases: [(&str, &str, &[&str]); 8] = [
        ("kind = \"latest\"", "knd = \"latest\"", &["shori.toml line", "unknown field `knd`", "did you mean kind?"]),
        ("kind = \"latest\"", "kind = \"lates\"", &["shori.toml line", "did you mean latest?"]),
        ("name = \"small\"\n", "", &["shori.toml line", "missing field `name`"]),
        (
            "path = \"source.db\"",
            "path = \"${SHORI_TEST_NONE}\"",
            &["shori.toml line", "SHORI_TEST_NONE", "put it in .env"],
        ),
        ("name = \"small\"", "name = \"small", &["shori.toml line"]),
        ("busy_timeout_ms = 200", "busy_timeout_ms = \"long\"", &["shori.toml line", "invalid type"]),
        (
            "path = \"serving.duckdb\"\n",
            "",
            &["store serving in", "shori.toml", "it has no path, which says where it is"],
        ),
        ("[project]\ninterval_ms", "[projects]\ninterval_ms", &["shori.toml line", "did you mean project"]),
    ];
    for (right, wrong, parts) in cases {
        assert!(CONFIGURATION.contains(right), "{right}");
        world.configure(&CONFIGURATION.replacen(right, wrong, 1));
        for verb in VERBS {
            world.shori(verb).tells(2, parts);
        }
    }
    assert!(!world.path("serving.duckdb").exists());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_shori"));
    command.args(["run", "-c", "nothing.toml"]).current_dir(world.folder.path());
    run(command).tells(2, &["configuration nothing.toml", "-c"]);
}

#[test]
fn a_wrong_way_to_an_entity_is_told_by_its_key() {
    let mut world = small();
    let cases: [(&str, &[&str]); 4] = [
        ("{ throgh = \"others\", column = \"id\" }", &["unknown field `throgh`", "did you mean through?"]),
        ("{ through = \"others\", colum = \"id\" }", &["unknown field `colum`", "did you mean column?"]),
        ("{ through = \"others\" }", &["missing field `column`"]),
        ("5", &["a column's name, or { through = \"table\", column = \"name\" }"]),
    ];
    for (way, parts) in cases {
        world.configure(&format!("{CONFIGURATION}[projection.entity]\nthings = {way}\n"));
        world.shori(&["check"]).tells(2, &[parts, &["shori.toml line"]].concat());
    }
}

#[test]
fn a_key_of_another_kind_of_projection_is_refused() {
    let mut world = small();
    let (latest, sql) = ("kind = \"latest\"\ntable = \"things\"", "kind = \"sql\"");
    let cases: [(&str, &str, &[&str]); 4] = [
        (latest, "tables = [\"things\"]", &["projection things_latest", "it has tables", "name its table"]),
        (latest, "additive = [\"amount\"]", &["projection things_latest", "it has additive columns or a weight"]),
        (sql, "table = \"things\"", &["projection amount_by_name", "it has table", "name its tables"]),
        (sql, "weight = \"weight\"", &["projection amount_by_name", "name its entity, or leave them out"]),
    ];
    for (kind, more, parts) in cases {
        world.configure(&CONFIGURATION.replacen(kind, &format!("{kind}\n{more}"), 1));
        for verb in [&["check"][..], &["run", "--once"]] {
            world.shori(verb).tells(2, parts);
        }
    }
}

/// Whoever only looks holds the files for a moment.
#[test]
fn who_looks_keeps_nobody_from_starting() {
    let world = small();
    world.succeed(&["run", "--once"]);
    for words in [&["status"][..], &["query", "select 1"], &["resnapshot", "things"], &["verify"]] {
        for _ in 0..3 {
            let beside = world.start(words);
            let mut running = world.run();
            let ended = beside.end();
            assert_eq!(ended.status, Some(0), "{words:?}: {ended:?}");
            running.assert_running();
            world.catch_up(&mut running);
            running.stop();
        }
    }
    world.verify();
}

const HISTORY_TRACKED: &str = "[[projection]]\nname = \"h\"\nkind = \"history\"\ntable = \"things\"\n\
     tracked = [\"name\", \"name\"]\n[[projection]]\nname = \"things_latest\"";
const HISTORY_UNTRACKED: &str = "[[projection]]\nname = \"h\"\nkind = \"history\"\ntable = \"things\"\n\
     untracked = [\"name\", \"amount\", \"name\"]\n[[projection]]\nname = \"things_latest\"";

#[test]
fn what_cannot_be_meant_is_refused_by_every_verb() {
    let mut world = small();
    let latest = "[[projection]]\nname = \"things_latest\"";
    let store = "[[store]]\nname = \"serving\"";
    let end = "[project]\ninterval_ms = 500\n";
    let cases: [(&str, &str, &[&str]); 24] = [
        (latest, "[[projection]]\nname = \"others_latest\"", &["projection others_latest", "rename one"]),
        (latest, "[[projection]]\nname = \"OTHERS_latest\"", &["projection OTHERS_latest", "rename one"]),
        (latest, "[[projection]]\nname = \"\"", &["projection \"\"", "its name is empty"]),
        (latest, "[[projection]]\nname = \"ctl_store\"", &["projection ctl_store", "store's own"]),
        (latest, "[[projection]]\nname = \"STG_cdc_t\"", &["projection STG_cdc_t", "store's own"]),
        (latest, "[[projection]]\ntarget = \"srving\"\nname = \"a\"", &["srving", "did you mean serving?"]),
        (latest, HISTORY_TRACKED, &["projection h", "tracked names column name twice", "leave one out"]),
        (latest, HISTORY_UNTRACKED, &["projection h", "untracked names column name twice"]),
        ("name = \"small\"", "name = \"small\"\nstaging = \"x\"", &["store x", "no [[store]] has that name"]),
        (store, "[[store]]\nname = \"Temp\"", &["store Temp", "DuckDB has"]),
        ("path = \"serving.duckdb\"", "path = \"./source.db\"", &["store serving", "./source.db", "source here"]),
        ("path = \"serving.duckdb\"", "path = \"\"", &["store serving", "its path is empty"]),
        (end, "[memory]\nlimit_mib = 0\n", &["memory.limit_mib", "it is 0", "at least 96"]),
        (end, "[memory]\nlimit_mib = 99999999999999\n", &["memory.limit_mib", "at most"]),
        (end, "[memory]\nthreads = 1000\n", &["memory.threads", "it is 1000", "at most 256"]),
        (end, "[ingest]\nbatch_max_rows = 0\n", &["ingest.batch_max_rows", "it is 0", "at least 1"]),
        (end, "[ingest]\nbatch_max_bytes = 0\n", &["ingest.batch_max_bytes", "it is 0"]),
        (end, "[ingest]\npoll_interval_ms = 0\n", &["ingest.poll_interval_ms", "it is 0"]),
        (end, "[project]\ninterval_ms = 0\n", &["project.interval_ms", "it is 0"]),
        (end, "[retention]\nkeep_hours = -1.0\n", &["retention.keep_hours", "it is -1", "at least 0"]),
        (end, "[retention]\nkeep_hours = nan\n", &["retention.keep_hours", "NaN"]),
        (end, "[retention]\nkeep_hours = 1e300\n", &["retention.keep_hours", "at most"]),
        (end, "[retention]\nevery_seconds = 0\n", &["retention.every_seconds", "it is 0"]),
        ("busy_timeout_ms = 200", "snapshot_chunk_rows = 0", &["snapshot_chunk_rows", "it is 0", "at least 1"]),
    ];
    for (right, wrong, parts) in cases {
        assert!(CONFIGURATION.contains(right), "{right}");
        world.configure(&CONFIGURATION.replacen(right, wrong, 1));
        for verb in VERBS {
            world.shori(verb).tells(2, &[parts, &["shori.toml"]].concat());
        }
    }
    world.configure(&CONFIGURATION.replace(end, "[memory]\nlimit_mib = 96\nthreads = 0\n"));
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn a_type_that_is_none_is_told_with_what_there_is() {
    let mut world = small();
    let precision = "give a precision of 1 to 38";
    let cases = [
        ("decimal(40,2)", "the precision of decimal(40,2) is 40", precision),
        ("decimal(18,20)", "the scale of decimal(18,20) is 20", "at most the precision"),
        ("money", "unknown type \"money\"", "boolean, int16, int32, int64, float32, float64, text, binary, date, time"),
        ("decimal(18)", "unknown type", "timestamp, timestamptz, decimal(precision,scale)"),
    ];
    for (name, cause, remedy) in cases {
        world.configure(&CONFIGURATION.replace("decimal(18,2)", name));
        for verb in VERBS {
            world.shori(verb).tells(2, &["column amount of table things", "shori.toml", cause, remedy]);
        }
    }
}

#[test]
fn a_projection_of_a_table_that_no_source_names_is_told() {
    let mut world = small();
    let cases: [(&str, &str, &[&str]); 4] = [
        (
            "table = \"others\"",
            "table = \"other\"",
            &["projection others_latest", "table other,", "did you mean others?"],
        ),
        ("table = \"others\"", "table = \"Others\"", &["projection others_latest", "did you mean others?"]),
        ("table = \"others\"", "table = \"zzz\"", &["projection others_latest", "table zzz,", "others, things"]),
        ("tables = [\"things\"]", "tables = [\"thing\"]", &["projection amount_by_name", "did you mean things?"]),
    ];
    for (right, wrong, parts) in cases {
        world.configure(&CONFIGURATION.replacen(right, wrong, 1));
        for verb in VERBS {
            world.shori(verb).tells(2, &[parts, &["shori.toml"]].concat());
        }
    }
    // One that is switched off waits for nothing.
    world.configure(&CONFIGURATION.replacen("table = \"others\"", "table = \"other\"\nenabled = false", 1));
    world.succeed(&["check"]);
    world.succeed(&["run", "--once"]);
}

#[test]
fn check_tells_all_that_is_wrong_at_once() {
    let mut world = small();
    let wrong = CONFIGURATION
        .replace("path = \"source.db\"", "path = \"none.db\"")
        .replace("path = \"serving.duckdb\"", "path = \"none/serving.duckdb\"")
        .replace("decimal(18,2)", "decimal(40,2)")
        .replace("\"amount_by_name.sql\"", "\"amount.sql\"")
        .replace("table = \"others\"", "table = \"other\"")
        .replace("interval_ms = 500", "interval_ms = 0");
    world.configure(&wrong);
    let told = |world: &World, parts: &[&str]| {
        let done = world.shori(&["check"]);
        assert_eq!(done.status, Some(2), "{done:?}");
        assert_eq!((done.err.lines().count(), done.out.as_str()), (parts.len(), ""), "{}", done.err);
        for part in parts {
            assert_eq!(done.err.matches(part).count(), 1, "{part}: {}", done.err);
        }
    };
    told(
        &world,
        &["none.db", "none does not exist", "decimal(40,2) is 40", "amount.sql", "table other,", "project.interval_ms"],
    );
    // What is wrong with a query whose tables are not known.
    world.configure(&CONFIGURATION.replace("path = \"source.db\"", "path = \"none.db\""));
    told(&world, &["none.db"]);
    world.put("amount_by_name.sql", "select\n    nam frm things x y");
    told(&world, &["none.db", "amount_by_name.sql, line 2: syntax error"]);
    world.put("amount_by_name.sql", "pivot things on name using count(*)");
    told(&world, &["none.db"]);
    // A source that can be read does not hide what another lacks, and a query over it is tried.
    let second = "[[source]]\nname = \"gone\"\nkind = \"sqlite\"\npath = \"gone.db\"\n[source.tables.more]\n[[store]]";
    world.configure(&CONFIGURATION.replace("[[store]]", second));
    world.put("amount_by_name.sql", "select nam from things");
    told(&world, &["gone.db", "amount_by_name.sql"]);
}

#[test]
fn a_projection_that_does_not_fit_its_kind_is_refused() {
    let mut world = small();
    let cases: [(&str, &str, &[&str]); 6] = [
        ("table = \"others\"\n", "", &["projection others_latest", "names no table"]),
        ("sql = \"amount_by_name.sql\"\n", "", &["projection amount_by_name", "has no sql"]),
        ("sql = \"amount_by_name.sql\"", "sql = \"none.sql\"", &["none.sql", "named in"]),
        ("key = [\"name\"]", "", &["projection amount_by_name", "has no key"]),
        ("key = [\"name\"]", "key = [\"name\"]\ntarget = \"srving\"", &["srving", "did you mean serving?"]),
        (
            "key = [\"name\"]",
            "key = [\"name\"]\nadditive = [\"amount\"]",
            &["projection amount_by_name", "need a weight"],
        ),
    ];
    for (right, wrong, parts) in cases {
        world.configure(&CONFIGURATION.replacen(right, wrong, 1));
        world.shori(&["run", "--once"]).tells(2, parts);
    }
    assert!(world.shori(&["check"]).status != Some(0));
    world.configure(CONFIGURATION);
    world.succeed(&["check"]);
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn wrong_usage_is_status_2() {
    let world = small();
    let words = [
        &["rn"][..],
        &["run", "--onc"],
        &["demo", "--changes", "many"],
        &["query"],
        &["query", "--jsn", "select 1"],
        &["--log-level", "bogus", "status"],
        &["--log-level", "shori_core=bogus", "status"],
    ];
    for words in words {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_shori"));
        command.args(words).current_dir(world.folder.path());
        let done = run(command);
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.err.starts_with("error: ") && done.err.contains("--help"), "{done:?}");
    }
}

#[test]
fn a_table_that_cannot_be_captured_stops_itself_only() {
    let cases = [
        ("create table loose (name text, amount text);", "loose", "no key"),
        ("create table loose (id integer primary key, price MONEY);", "loose", "price"),
        ("create view loose as select * from things;", "loose", "view"),
        ("", "loose", "no such table"),
    ];
    for (statement, table, reason) in cases {
        let mut world = World::configured(CONFIGURATION, &FILES, &format!("{SOURCE}\n{statement}"));
        world.configure(
            &CONFIGURATION.replace("[source.tables.others]", "[source.tables.others]\n[source.tables.loose]"),
        );
        world.shori(&["check"]).tells(1, &[table, reason, "; "]);
        let mut running = world.run();
        world.catch_up(&mut running);
        world.write("insert into things values (3, 'three', '3.30');");
        world.catch_up(&mut running);
        assert_eq!(names(&world), ["one", "two", "three"], "neighbours go on");
        let status = world.shori(&["status"]);
        let shown = status.out.split_once("/loose ").map(|(_, rest)| rest.lines().nth(1).unwrap_or_default());
        assert!(status.status == Some(1) && shown.is_some_and(|line| line.contains("stands still")), "{status:?}");
        assert!(running.err().contains(reason), "it is told: {}", running.err());
        running.stop();
    }
}

#[test]
fn a_table_that_cannot_be_captured_beside_good_ones_is_an_error_at_the_end() {
    let source = format!("{SOURCE}\ncreate table loose (name text); create virtual table words using fts5(word);");
    let mut world = World::configured(CONFIGURATION, &FILES, &source);
    let more = "[source.tables.others]\n[source.tables.loose]";
    world.configure(&CONFIGURATION.replace("[source.tables.others]", more));
    let done = world.shori(&["init"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.err.contains("captures others, things\n"), "{done:?}");
    assert_eq!(done.err.matches("error: cannot capture table loose: ").count(), 1, "{done:?}");
    for _ in 0..2 {
        world.shori(&["run", "--once"]).tells(1, &["table loose", "no key"]);
        assert_eq!(names(&world), ["one", "two"], "its neighbours are captured");
    }
    let loose = "\n[[projection]]\nname = \"loose_latest\"\nkind = \"latest\"\ntable = \"loose\"\n";
    world.configure(&format!("{}{loose}", CONFIGURATION.replace("[source.tables.others]", more)));
    world.shori(&["check"]).tells(1, &["table loose", "no key"]);
    let done = world.shori(&["run", "--once"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    let lines: Vec<&str> = done.err.lines().collect();
    assert_eq!(lines.len(), 2, "{done:?}");
    assert!(lines[0].contains("no key") && lines[1].contains("shori check tells why"), "{done:?}");
    assert_eq!(lines[1].matches("projection loose_latest").count(), 1, "{done:?}");
    world.configure(&CONFIGURATION.replace("[source.tables.others]", "[source.tables.others]\n[source.tables.words]"));
    world.shori(&["check"]).tells(1, &["table words", "it is a virtual table, which"]);
}

#[test]
fn a_pipeline_in_a_folder_with_a_long_path_is_reached() {
    let mut world = small();
    let long = "a-folder-whose-name-is-long/".repeat(6);
    world.configure(&CONFIGURATION.replace("name = \"small\"", &format!("name = \"small\"\ndir = \"{long}\"")));
    let mut running = world.start(&["run"]);
    let state = world.path(&long).join(".shori");
    until("the socket", || {
        running.assert_running();
        shori::control::Client::connect(&state)
    });
    until("its answer", || {
        let done = world.shori(&["query", "select count(*) as count from things_latest"]);
        (done.status == Some(0) && done.out.contains('2')).then_some(())
    });
    world.shori(&["init", "--release", "things"]).tells(1, &["table things", "stop the pipeline first"]);
    running.stop();
    assert!(!state.join("socket").exists());
    world.succeed(&["init", "--release", "things"]);
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn a_projection_over_a_table_without_a_key_tells_and_holds_nobody_up() {
    let loose = "\n[[projection]]\nname = \"loose_latest\"\nkind = \"latest\"\ntable = \"loose\"\n";
    let source = format!("{SOURCE}\ncreate table loose (name text);");
    let mut world = World::configured(CONFIGURATION, &FILES, &source);
    world.configure(&format!(
        "{}{loose}",
        CONFIGURATION.replace("[source.tables.others]", "[source.tables.others]\n[source.tables.loose]")
    ));
    let mut running = world.run();
    until("its error", || {
        running.assert_running();
        let query = "select last_error from ctl_projection_metadata where projection_name = 'loose_latest' and status = 'ERROR'";
        let rows = world.try_query(query).ok()?;
        rows.first()?.first()?.clone().filter(|error| error.contains("loose"))
    });
    world.write("insert into things values (3, 'three', '3.30');");
    until("the neighbours", || (names_if_any(&world)? == ["one", "two", "three"]).then_some(()));
    assert_eq!(world.shori(&["status"]).status, Some(1), "something stands still");
    running.stop();
    // With a key, it is captured.
    world.write("create unique index loose_name on loose (name); drop table loose; create table loose (name text primary key not null);");
    let mut running = world.run();
    world.catch_up(&mut running);
    world.verify();
}

fn names_if_any(world: &World) -> Option<Vec<String>> {
    let rows = world.try_query("select name from things_latest order by id").ok()?;
    Some(rows.into_iter().map(|row| row[0].clone().unwrap_or_default()).collect())
}

#[test]
fn a_second_process_in_one_folder_is_told_who_holds_it() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    world.shori(&["run"]).tells(1, &["folder", ".shori", "another shori process holds it", "stop that process"]);
    world.shori(&["run", "--once"]).tells(1, &["another shori process holds it"]);
    running.assert_running();
    running.stop();
    world.succeed(&["run", "--once"]);
}

#[test]
fn the_second_interrupt_ends_at_once_and_nothing_is_lost() {
    let mut world = small();
    world.configure(&CONFIGURATION.replace("busy_timeout_ms = 200", "busy_timeout_ms = 600000"));
    let holder = world.source();
    holder.execute_batch("begin exclusive").unwrap();
    let mut command = world.command(&["run"]);
    command.env("LOG_LEVEL", "info");
    let mut running = crate::harness::Running::start(command);
    until("its start", || {
        running.assert_running();
        running.err().contains("running").then_some(())
    });
    running.signal(Signal::INT);
    until("what it says to the first", || running.err().contains("a second signal ends at once").then_some(()));
    running.assert_running();
    running.signal(Signal::INT);
    assert_eq!(running.end().status, Some(130));
    holder.execute_batch("commit").unwrap();
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn a_pipeline_of_which_no_table_can_be_captured_says_so_and_ends() {
    let source = "create table things (name text, amount text); create table others (name text);";
    let world = World::configured(CONFIGURATION, &FILES, source);
    let done = world.shori(&["run", "--once"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.err.contains("table things: it has no key"), "{done:?}");
    assert!(!done.err.contains("steps"), "{done:?}");
}
