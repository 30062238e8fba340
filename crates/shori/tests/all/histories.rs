//! What a history can be asked to keep, and how it is asked for the past.

use crate::harness::World;

const SOURCE: &str = "create table items (id integer primary key, name text not null, seen integer);";

const CONFIGURATION: &str = r#"
[pipeline]
name = "items"
[[source]]
name = "shop"
kind = "sqlite"
path = "source.db"
[source.tables.items]
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"
[[projection]]
name = "all_history"
kind = "history"
table = "items"
[[projection]]
name = "names"
kind = "history"
table = "items"
tracked = ["name"]
deletes = "tombstone"
[[projection]]
name = "others"
kind = "history"
table = "items"
untracked = ["seen"]
[[projection]]
name = "items_latest"
kind = "latest"
table = "items"
"#;

/// One commit after the other; in each line those that come to one output.
const STEPS: [&[&str]; 5] = [
    &["insert into items values (1, 'a', 0), (2, 'b', 0)"],
    &["update items set seen = 1", "update items set seen = 2"],
    &["update items set seen = 3, name = 'A' where id = 1", "delete from items where id = 2"],
    &["update items set name = 'x' where id = 1", "update items set name = 'A' where id = 1"],
    &["insert into items values (2, 'b', 9)", "update items set seen = 4"],
];

fn world() -> World {
    let world = World::configured(CONFIGURATION, &[], SOURCE);
    world.succeed(&["init"]);
    // The empty table is taken over, so that what comes is no snapshot.
    world.succeed(&["run", "--once"]);
    world
}

/// Versions of a history, oldest first: `id name operation current`.
fn versions(world: &World, history: &str) -> Vec<String> {
    let sql = format!("select id, name, cdc_operation, is_current from {history} order by id, valid_from");
    let rows = world.query(&sql).into_iter();
    rows.map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect()
}

fn assert_versions(world: &World) {
    assert_eq!(
        versions(world, "names"),
        [
            "1 a INSERT false",
            "1 A UPDATE false",
            "1 x UPDATE false",
            "1 A UPDATE true",
            "2 b INSERT false",
            "2 b DELETE false",
            "2 b INSERT true",
        ]
    );
    let without = ["2 b INSERT false", "2 b INSERT true"];
    assert_eq!(versions(world, "others")[4..], without, "{:?}", versions(world, "others"));
    assert_eq!(world.value("select count(*) from all_history"), "12");
    world.verify();
}

#[test]
fn a_history_has_versions_of_what_it_tracks_and_tombstones() {
    let stepwise = world();
    for step in STEPS {
        step.iter().for_each(|statement| stepwise.write(statement));
        stepwise.succeed(&["run", "--once"]);
        stepwise.verify();
    }
    assert_versions(&stepwise);
    let at_once = world();
    STEPS.iter().flat_map(|step| step.iter()).for_each(|statement| at_once.write(statement));
    at_once.succeed(&["run", "--once"]);
    assert_versions(&at_once);
    at_once.succeed(&["rebuild", "names"]);
    assert_versions(&at_once);
    // Versions follow each other without a gap: the deletion is one of them.
    let gaps = "
        select count(*)
        from names as one
        where valid_to is not null and not exists (
            select 1 from names as next where next.id = one.id and next.valid_from = one.valid_to
        )";
    assert_eq!(stepwise.value(gaps), "0");
}

#[test]
fn tombstones_end_where_they_are_kept_no_more() {
    let mut world = world();
    STEPS[..3].iter().flat_map(|step| step.iter()).for_each(|statement| world.write(statement));
    world.succeed(&["run", "--once"]);
    assert_eq!(world.value("select count(*) from names where is_current and cdc_operation = 'DELETE'"), "1");
    world.configure(&CONFIGURATION.replace("deletes = \"tombstone\"", ""));
    world.write("insert into items values (2, 'again', 0)");
    world.succeed(&["run", "--once"]);
    world.write("update items set name = 'and again' where id = 2");
    world.succeed(&["run", "--once"]);
    assert_eq!(world.value("select count(*) from names where is_current and id = 2"), "1");
    world.verify();
}

#[test]
fn a_history_tells_what_was_at_a_time() {
    let world = world();
    for step in STEPS {
        step.iter().for_each(|statement| world.write(statement));
        world.succeed(&["run", "--once"]);
    }
    let question = "with kept as (select id, name from names) select id, name from kept order by id;";
    let at = |condition: &str| {
        let time = world
            .value(&format!("select strftime(max(valid_from), '%Y-%m-%dT%H:%M:%S.%fZ') from names where {condition}"));
        let told = world.succeed(&["query", "--json", "--as-of", &time, question]).out.replace('\n', " ");
        let function =
            format!("select id, name from names_as_of(timestamp '{}') order by id", time.trim_end_matches('Z'));
        assert_eq!(world.succeed(&["query", "--json", &function]).out.replace('\n', " "), told);
        told
    };
    assert_eq!(at("name = 'a'"), r#"{"id":1,"name":"a"} {"id":2,"name":"b"} "#);
    assert_eq!(at("cdc_operation = 'DELETE'"), r#"{"id":1,"name":"A"} "#);
    assert_eq!(at("name = 'x'"), r#"{"id":1,"name":"x"} "#);
    assert_eq!(at("true"), r#"{"id":1,"name":"A"} {"id":2,"name":"b"} "#);
    let before = world.succeed(&["query", "--json", "--as-of", "2001-01-01", question]);
    assert_eq!(before.out, "");
    let now = world.succeed(&["query", "--as-of", "2100-01-01 00:00", "select count(*) as n from names"]);
    assert!(now.out.contains("| 2 |"), "{now:?}");
    let done = world.shori(&["query", "--as-of", "2100-01-01", "select count(*) from main.names"]);
    assert!(done.err.contains("write names alone"), "{done:?}");
    let how = ["query", "--json", "--as-of", "2100-01-01T00:00+02", "-- how\nexplain select * from names"];
    assert!(world.succeed(&how).json()["explain_value"].as_str().unwrap().contains("valid_to"));
    let done = world.shori(&["query", "--as-of", "noon", question]);
    assert_eq!(done.status, Some(2), "{done:?}");
    assert!(done.err.contains("it is no time: write 2026-"), "{done:?}");
}

#[test]
fn what_a_history_cannot_keep_is_told() {
    let mut world = world();
    for (from, to, cause) in [
        (
            "[\"name\"]",
            "[\"nmae\"]",
            "it names column nmae, which table items does not have; its columns are name, seen",
        ),
        ("[\"name\"]", "[\"id\"]", "column id is of the key, which every version has"),
        ("[\"name\"]", "[\"name\"]\nuntracked = [\"seen\"]", "it has tracked and untracked columns: leave one out"),
        ("\"tombstone\"", "\"forget\"", "unknown variant `forget`, expected `close` or `tombstone`"),
        ("kind = \"latest\"", "kind = \"latest\"\ntracked = [\"name\"]", "which are for kind \"history\""),
        ("kind = \"latest\"", "kind = \"latest\"\ndeletes = \"close\"", "which is for kind \"history\""),
    ] {
        world.configure(&CONFIGURATION.replace(from, to));
        let done = world.shori(&["check"]);
        assert_ne!(done.status, Some(0), "{to}: {done:?}");
        assert!(done.err.contains(cause) || done.out.contains(cause), "{to}: {done:?}");
    }
    let head = CONFIGURATION.split_once("[[projection]]").unwrap().0;
    world.configure(&format!("{head}[[projection]]\nname = \"items_latest\"\nkind = \"latest\"\ntable = \"items\"\n"));
    world.succeed(&["run", "--once"]);
    let done = world.shori(&["query", "--as-of", "2026-01-01", "select 1"]);
    assert!(done.err.contains("it has no projection of kind history"), "{done:?}");
}
