//! `shori verify` where not everything is as it should be: what it can still tell, it tells.

use crate::harness::World;

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
    world.serving().execute_batch("update t_latest set n = 7 where id = 3").unwrap();
    let done = world.shori(&["verify"]);
    assert!(done.status == Some(1) && done.out.contains("id=3: n should be 3 and is 7"), "{done:?}");
}
