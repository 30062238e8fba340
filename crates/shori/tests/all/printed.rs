//! What verbs print: answers of every type, to whoever reads them for as long as they do.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use crate::harness::World;
use crate::small::{CONFIGURATION, FILES, SOURCE, small};

/// Reads a line and closes the pipe.
#[track_caller]
fn leaves_after_a_line(world: &World, words: &[&str]) {
    let mut command = world.command(words);
    if words[0] == "completions" {
        command = std::process::Command::new(env!("CARGO_BIN_EXE_shori"));
        command.args(words);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(!line.contains('\u{1b}'), "{line:?}");
    let ended = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && err.is_empty(), "{words:?}: {} {err}", ended.status);
}

#[test]
fn a_json_row_is_whole_whatever_its_columns_are_called() {
    let world = small();
    world.succeed(&["run", "--once"]);
    for name in ["q", "Q", "qq", "qqq", "line", "row", "c0", "s", "a b", "\u{fc}", "columns"] {
        let sql = format!("select 1 as \"{name}\", 'x' as other");
        let row = world.succeed(&["query", "--json", &sql]).json();
        assert_eq!(row, serde_json::json!({ name: 1, "other": "x" }));
    }
    let row = world.succeed(&["query", "--json", "select 1 as q, 2 as qq, 3 as qqq, 'x' as qqqq"]).json();
    assert_eq!(row, serde_json::json!({ "q": 1, "qq": 2, "qqq": 3, "qqqq": "x" }));
    // What names no columns of its own, and what names one twice.
    assert_eq!(world.succeed(&["query", "--json", "values (1)"]).json(), serde_json::json!({ "col0": 1 }));
    let twice = world.succeed(&["query", "--json", "select 1 as q, 2 as q"]).json();
    assert_eq!(twice.as_object().unwrap().len(), 2, "{twice}");
}

#[test]
fn who_closes_the_pipe_ends_the_program_quietly() {
    let world = small();
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    let many = "select range as n, repeat('x', 100) as filler from range(100000)";
    for words in [&["query", many][..], &["query", "--json", many], &["status", "--watch"], &["completions", "bash"]] {
        leaves_after_a_line(&world, words);
    }
    let mut running = world.run();
    leaves_after_a_line(&world, &["query", "--json", many]);
    world.catch_up(&mut running);
    running.stop();
}

#[test]
fn values_of_every_type_are_shown() {
    let world = small();
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    let sql = "select
        timestamptz '2026-01-02 03:04:05+00' as at,
        340282366920938463463374607431768211455::uhugeint as huge,
        'infinity'::timestamp as never,
        '\\xAB'::blob as bytes,
        'nan'::double as no_number,
        [1.5, '-infinity'::double] as numbers,
        1 as twice,
        'NaN' as twice
        -- and a comment at the end";
    let table = world.succeed(&["query", sql]).out;
    for shown in
        ["2026-01-02 03:04:05+00", "340282366920938463463374607431768211455", "infinity", "| ab ", "[1.5, -inf]"]
    {
        assert!(table.contains(shown), "{shown}: {table}");
    }
    assert!(!table.contains("ERROR"), "{table}");
    let row = world.succeed(&["query", "--json", sql]).json();
    assert_eq!((&row["no_number"], &row["numbers"][1]), (&serde_json::Value::Null, &serde_json::Value::Null));
    assert_eq!(row["numbers"][0].as_f64(), Some(1.5));
    for other in
        ["show tables", "describe things_latest", "summarize things_latest", "values (1, 2);", "from things_latest"]
    {
        world.succeed(&["query", other]);
    }
}

#[test]
fn a_pipeline_that_has_not_run_says_so() {
    let world = small();
    world.succeed(&["init"]);
    for verb in ["status", "verify"] {
        world.shori(&[verb]).tells(1, &["pipeline small", "has not run yet", "shori run"]);
    }
}

#[test]
fn status_tells_of_rejected_rows_and_of_what_is_configured_only() {
    let mut world = small();
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    world.write("update things set amount = 'much' where id = 1;");
    world.succeed(&["run", "--once"]);
    let status = world.succeed(&["status", "--json"]).json();
    let rejected: Vec<_> = status["captures"].as_array().unwrap().iter().map(|one| one["rejected"].as_u64()).collect();
    assert_eq!(rejected, [Some(0), Some(1)]);
    let shown = world.succeed(&["status"]).out;
    assert!(shown.contains("rejected: 1 rows, see ctl_rejected_changes"), "{shown}");
    world
        .serving()
        .execute_batch(
            "update ctl_projection_metadata set as_of_time = 'epoch' where projection_name = 'others_latest';
            insert into ctl_projection_metadata by name
            select * replace ('gone' as projection_name, 'ERROR' as status) from ctl_projection_metadata limit 1;",
        )
        .unwrap();
    let shown = world.succeed(&["status"]).out;
    assert!(!shown.contains("gone") && !shown.contains("1970-"), "{shown}");
    // The projection's other store is where its rows are now.
    let moved = CONFIGURATION.replacen(
        "[project]",
        "[[store]]\nname = \"other\"\nkind = \"duckdb\"\npath = \"other.duckdb\"\n[project]",
        1,
    );
    let moved = moved.replacen("name = \"small\"", "name = \"small\"\nstaging = \"serving\"", 1);
    let moved = moved.replacen("name = \"others_latest\"", "name = \"others_latest\"\ntarget = \"other\"", 1);
    world.configure(&moved);
    world.succeed(&["run", "--once"]);
    let status = world.succeed(&["status", "--json"]).json();
    let names = status["projections"].as_array().unwrap().iter().map(|one| one["projection"].as_str().unwrap());
    assert_eq!(names.collect::<Vec<_>>(), ["amount_by_name", "others_latest", "things_history", "things_latest"]);
}

#[test]
fn an_unknown_name_is_told_with_the_nearest_one() {
    let world = World::configured(CONFIGURATION, &FILES, SOURCE);
    world.shori(&["rebuild", "others_lates"]).tells(2, &["projection others_lates", "did you mean others_latest?"]);
    world.shori(&["resnapshot", "thing"]).tells(2, &["table thing", "did you mean things?"]);
}
