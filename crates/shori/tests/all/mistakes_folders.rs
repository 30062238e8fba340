//! Folders that are not there, or hold nothing yet: told, and left as they are.

use std::process::Command;

use crate::harness::{Done, World, run};
use crate::small::{CONFIGURATION, FILES, SOURCE, small};

const VERBS: [&[&str]; 12] = [
    &["query", "select 1"],
    &["query", "--json", "select 1"],
    &["status"],
    &["status", "--json"],
    &["verify"],
    &["check"],
    &["compact"],
    &["resnapshot", "orders"],
    &["rebuild", "proj_orders_latest"],
    &["run"],
    &["run", "--once"],
    &["generate", "--changes", "1"],
];

fn in_directory(world: &World, words: &[&str], directory: &str) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shori"));
    command.args(words).args(["--dir", directory]).current_dir(world.folder.path());
    run(command)
}

fn entries(world: &World) -> Vec<String> {
    let entries = std::fs::read_dir(world.folder.path()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_mistyped_folder_is_told_and_not_made() {
    let world = World::empty_demo();
    for words in VERBS {
        let remedy = "shori init --sample --dir nosuch, or shori demo --dir nosuch";
        in_directory(&world, words, "nosuch").tells(2, &["folder nosuch", "does not exist", remedy]);
        assert!(entries(&world).is_empty(), "{words:?} makes {:?}", entries(&world));
    }
    in_directory(&world, &["init"], "nosuch").tells(2, &["folder nosuch", "shori init --sample"]);
    world.put("file", "words");
    in_directory(&world, &["run", "--once"], "file").tells(2, &["folder file", "it is a file"]);
    assert_eq!(entries(&world), ["file"]);
    let made = in_directory(&world, &["init", "--sample"], "such");
    assert_eq!(made.status, Some(0), "{made:?}");
    assert_eq!(in_directory(&world, &["run", "--once"], "such").status, Some(0));
    assert_eq!(in_directory(&world, &["verify"], "such").status, Some(0));
}

#[test]
fn reading_a_pipeline_that_has_not_run_makes_nothing() {
    let reading = &VERBS[..5];
    let world = World::empty_demo();
    for words in reading {
        world.shori(words).tells(1, &["pipeline demo", "has not run yet", "shori run"]);
        assert!(entries(&world).is_empty(), "{words:?} makes {:?}", entries(&world));
    }
    for words in [&["run"][..], &["run", "--once"], &["compact"], &["resnapshot", "orders"]] {
        world.shori(words).tells(2, &["source.db", "does not exist", "shori init --sample"]);
        assert!(entries(&world).is_empty(), "{words:?} makes {:?}", entries(&world));
    }
    let mut world = World::configured(CONFIGURATION, &FILES, SOURCE);
    for words in reading {
        world.shori(words).tells(1, &["pipeline small", "has not run yet", "shori run"]);
        assert!(!world.path(".shori").exists() && !world.path("serving.duckdb").exists(), "{words:?}");
    }
    world.succeed(&["run", "--once"]);
    world.succeed(&["query", "select 1"]);
    // A store that is configured now, and that no run has made yet.
    let more = "[[store]]\nname = \"other\"\nkind = \"duckdb\"\npath = \"other.duckdb\"\n[project]";
    let configuration = CONFIGURATION.replace("name = \"small\"", "name = \"small\"\nstaging = \"serving\"");
    world.configure(&configuration.replace("[project]", more));
    world.succeed(&["status"]);
    world.shori(&["query", "--store", "other", "select 1"]).tells(1, &["store other", "has not run yet"]);
    world.shori(&["query", "--store", "othr", "select 1"]).tells(2, &["store othr", "did you mean other?"]);
    world.verify();
    assert!(!world.path("other.duckdb").exists());
}

#[test]
fn a_store_in_a_folder_that_is_not_there_is_told() {
    let mut world = small();
    world.put("file", "words");
    let cases: [(&str, &[&str]); 3] = [
        ("no/such/x.duckdb", &["store serving", "no/such does not exist", "create the folder"]),
        ("file/x.duckdb", &["store serving", "file is no folder", "correct the store's path"]),
        (".", &["store serving", "is a folder", "give the path of a file"]),
    ];
    for (path, parts) in cases {
        world.configure(&CONFIGURATION.replace("serving.duckdb", path));
        for words in [&["check"][..], &["run"], &["run", "--once"], &["status"], &["query", "select 1"], &["compact"]] {
            world.shori(words).tells(2, parts);
        }
        assert!(!world.path(".shori").exists() && !world.path("no").exists());
    }
}
