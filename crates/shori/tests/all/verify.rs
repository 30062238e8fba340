//! `shori verify` where not everything is as it should be: what it can still tell, it tells.

use crate::harness::{World, damage, until};

const SOURCE: &str = "
create table t (id integer primary key, n int, g text, made timestamp);
insert into t values
    (1, 1, 'a', '2026-01-01T00:00:00+14:00'),
    (2, 2, 'b', '2026-01-01 00:00:00 -0230'),
    (3, 3, 'a', '2026-01-01t00:00:00z'),
    (4, 4, 'b', '2026-01-01 00:00+02'),
    (5, 5, 'a', '2026-01-01');
";

const CONFIGURATION: &str = r#"
[pipeline]
name = "checked"
[[source]]
name = "s"
kind = "sqlite"
path = "source.db"
[source.tables.t]
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"

[[projection]]
name = "t_latest"
kind = "latest"
table = "t"

[[projection]]
name = "t_history"
kind = "history"
table = "t"

[[projection]]
name = "sums"
kind = "sql"
sql = "sums.sql"
tables = ["t"]
key = ["g"]
additive = ["n"]
weight = "w"
[projection.entity]
t = "id"
"#;

const SUMS: &str = "select g, cast(sum(n) as bigint) as n, count(*) as w from t group by g";

fn world() -> World {
    let world = World::configured(CONFIGURATION, &[("sums.sql", SUMS)], SOURCE);
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    world
}

#[test]
fn times_with_offsets_are_as_documented() {
    let world = world();
    world.verify();
    assert_eq!(world.value("select made from t_latest where id = 1"), "2025-12-31 10:00:00");
    assert_eq!(world.value("select made from t_latest where id = 2"), "2026-01-01 02:30:00");
    assert_eq!(world.value("select made from t_latest where id = 4"), "2025-12-31 22:00:00");
    world.write("update t set made = '2026-02-01T00:00:00.5-02' where id = 5;");
    world.succeed(&["run", "--once"]);
    world.verify();
}

#[test]
fn a_rejected_value_is_told_and_stands_in_nobody_s_way() {
    let world = world();
    let told = "t_latest: note: 1 rows of table t cannot be carried and are left out; see ctl_rejected_changes";
    world.write("update t set n = 'bad' where id = 1;");
    world.succeed(&["run", "--once"]);
    world.verify();
    assert!(world.succeed(&["verify"]).out.contains(told));
    // Behind the source, as where capture stands still.
    world.write("update t set n = 10 where id = 1; insert into t values (6, 'worse', 'a', null);");
    world.verify();
    world.succeed(&["run", "--once"]);
    world.verify();
    assert!(world.succeed(&["verify"]).out.contains(told));
    world.write("delete from t where id = 6; update t set made = '26-1-1' where id = 2; delete from t where id = 2;");
    world.verify();
    world.succeed(&["run", "--once"]);
    world.verify();
    assert!(!world.succeed(&["verify"]).out.contains("note: 1 rows"));
    // What is really wrong is still found.
    world.write("update t set n = 'bad' where id = 3;");
    world.succeed(&["run", "--once"]);
    world.damage("t_latest", "update TARGET set n = 7 where id = 3");
    let done = world.shori(&["verify"]);
    assert!(done.status == Some(1) && done.out.contains("id=3: n should be 3 and is 7"), "{done:?}");
}

#[test]
fn a_double_that_is_no_one_decimal_is_rejected_by_capture_and_verify_alike() {
    let prices = "create table prices (id integer primary key, price decimal(18,2));
                  insert into prices values (1, 123456789012.34), (2, 10000000000000.5), (3, '1000000000000000');";
    let more = "[source.tables.t]\n[source.tables.prices]";
    let latest = "\n[[projection]]\nname = \"prices_latest\"\nkind = \"latest\"\ntable = \"prices\"\n";
    let configuration = format!("{}{latest}", CONFIGURATION.replace("[source.tables.t]", more));
    let world = World::configured(&configuration, &[("sums.sql", SUMS)], &format!("{SOURCE}{prices}"));
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    world.verify();
    assert_eq!(world.value("select string_agg(id, ',' order by id) from prices_latest"), "1,3");
    assert_eq!(world.value("select price from prices_latest where id = 1"), "123456789012.34");
}

#[test]
fn a_projection_that_fails_does_not_hide_the_others() {
    let world = world();
    world.put("sums.sql", &SUMS.replace("from t", "from t where g + 1 > 0"));
    let mut running = world.run();
    world.write("update t set n = 100 where id = 1;");
    until("the query's error", || {
        running.assert_running();
        let rows = world.try_query("select 1 from ctl_projection_metadata where status = 'ERROR'").ok()?;
        let shown = world.try_query("select 1 from t_latest where n = 100").ok()?;
        (rows.len() == 1 && shown.len() == 1).then_some(())
    });
    let done = world.shori(&["verify"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert_eq!(done.out.matches(" ok\n").count(), 2, "{}", done.out);
    assert!(done.out.contains("sums: note: it has failed: "), "{}", done.out);
    running.stop();
}

#[test]
fn rows_are_compared_as_of_where_capture_stopped() {
    let world = world();
    world.write("update t set n = 6 where id = 1;");
    world.serving().execute_batch("update ctl_ingestion_watermarks set failed_reason = 'gone'").unwrap();
    let done = world.succeed(&["verify"]);
    assert!(done.out.contains("t_latest: note: the capture of table t stands still"), "{}", done.out);
}

/// `small` beside `t`, in a file of its own.
const TWO_SOURCES: &str = r#"
[[source]]
name = "second"
kind = "sqlite"
path = "second.db"
[source.tables.small]
[[store]]
name = "other"
kind = "duckdb"
path = "other.duckdb"

[[projection]]
name = "small_latest"
kind = "latest"
table = "small"
target = "other"
"#;

#[test]
fn every_source_and_every_store_is_verified() {
    let mut world = World::configured(CONFIGURATION, &[("sums.sql", SUMS)], SOURCE);
    let configuration = CONFIGURATION.replace("name = \"checked\"", "name = \"checked\"\nstaging = \"serving\"");
    let moved = configuration.replace("name = \"t_latest\"", "name = \"t_latest\"\ntarget = \"other\"");
    world.configure(&format!("{moved}{TWO_SOURCES}"));
    let second = rusqlite::Connection::open(world.path("second.db")).unwrap();
    second.execute_batch("create table small (id integer primary key, name text);").unwrap();
    second.execute_batch("insert into small values (1, 'one');").unwrap();
    world.succeed(&["init"]);
    world.succeed(&["run", "--once"]);
    world.verify();
    second.execute_batch("insert into small values (2, 'two');").unwrap();
    world.write("update t set n = 50 where id = 5;");
    let mut running = world.run();
    until("the second source", || {
        running.assert_running();
        let client = world.client()?;
        let rows = client.query("other", "select 1 from small_latest where id = 2").ok()?;
        (rows[0].num_rows() == 1).then_some(())
    });
    world.verify();
    running.stop();
    let other = duckdb::Connection::open(world.path("other.duckdb")).unwrap();
    damage(&other, "t_latest", "update TARGET set n = 8 where id = 5");
    damage(&other, "small_latest", "delete from TARGET where id = 1");
    drop(other);
    let done = world.shori(&["verify"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.out.contains("id=5: n should be 50 and is 8"), "{}", done.out);
    assert!(done.out.contains("small_latest: 1 missing"), "{}", done.out);
}

#[test]
fn a_table_that_cannot_be_captured_does_not_hide_its_neighbours() {
    let bad = "[source.tables.t]\n[source.tables.bad]";
    let over_bad = "
[[projection]]
name = \"bad_latest\"
kind = \"latest\"
table = \"bad\"
[[projection]]
name = \"both\"
kind = \"sql\"
sql = \"both.sql\"
tables = [\"t\", \"bad\"]
key = [\"g\"]
";
    let configuration = format!("{}{over_bad}", CONFIGURATION.replace("[source.tables.t]", bad));
    let files = [("sums.sql", SUMS), ("both.sql", "select g, count(*) as n from t join bad on t.g = bad.v group by g")];
    let world = World::configured(&configuration, &files, &format!("{SOURCE}create table bad (v text);"));
    let ran = world.shori(&["run", "--once"]);
    assert_eq!(ran.status, Some(1), "{ran:?}");
    let told = |done: &crate::harness::Done, compared: usize| {
        assert_eq!((done.status, done.err.as_str()), (Some(1), ""), "{done:?}");
        assert_eq!(done.out.matches(" ok\n").count(), compared, "{}", done.out);
        assert_eq!(done.out.matches(" NOT BUILT\n").count(), 2, "{}", done.out);
        for name in ["bad_latest", "both"] {
            let note = format!("{name}: note: cannot capture table bad: ");
            assert!(done.out.contains(&note) && done.out.contains("it has no key"), "{}", done.out);
        }
    };
    told(&world.shori(&["verify"]), 3);
    // What is wrong beside it is found.
    world.damage("t_latest", "update TARGET set n = 7 where id = 3");
    let done = world.shori(&["verify"]);
    assert!(done.out.contains("id=3: n should be 3 and is 7"), "{done:?}");
    told(&done, 2);
    world.damage("t_latest", "update TARGET set n = 3 where id = 3");
    let running = world.run();
    until("its neighbours", || (world.try_query("from t_latest").ok()?.len() == 5).then_some(()));
    told(&world.shori(&["verify"]), 3);
    running.stop();
}

/// What was built while it was captured is still there, but cannot be compared.
#[test]
fn a_table_that_can_no_longer_be_captured_is_told() {
    let world = world();
    world.write("create table kept as select * from t; drop table t; alter table kept rename to t;");
    let done = world.shori(&["verify"]);
    assert_eq!((done.status, done.err.as_str()), (Some(1), ""), "{done:?}");
    assert_eq!(done.out.matches(" NOT COMPARED\n").count(), 3, "{}", done.out);
}

#[test]
fn a_store_that_no_run_has_made_is_not_built() {
    let mut world = world();
    let configuration = CONFIGURATION.replace("name = \"checked\"", "name = \"checked\"\nstaging = \"serving\"");
    let moved = configuration.replace("name = \"t_latest\"", "name = \"t_latest\"\ntarget = \"other\"");
    let store = "[[store]]\nname = \"other\"\nkind = \"duckdb\"\npath = \"other.duckdb\"\n";
    world.configure(&moved.replacen("\n[[projection]]", &format!("{store}\n[[projection]]"), 1));
    let done = world.shori(&["verify"]);
    assert_eq!((done.status, done.err.as_str()), (Some(1), ""), "{done:?}");
    assert_eq!(done.out.matches(" ok\n").count(), 2, "{}", done.out);
    assert_eq!(done.out.matches(" NOT BUILT\n").count(), 1, "{}", done.out);
}
