//! A pipeline over two small tables, for what goes wrong with one of them.

use crate::harness::World;

pub const SOURCE: &str = "
create table things (id integer primary key, name text, amount text);
create table others (id integer primary key, name text);
insert into things values (1, 'one', '1.10'), (2, 'two', '2.20');
insert into others values (1, 'neighbour');
";

pub const CONFIGURATION: &str = r#"
[pipeline]
name = "small"
[[source]]
name = "here"
kind = "sqlite"
path = "source.db"
busy_timeout_ms = 200
[source.tables.others]
[source.tables.things.columns]
amount = "decimal(18,2)"
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"
[project]
interval_ms = 500

[[projection]]
name = "others_latest"
kind = "latest"
table = "others"

[[projection]]
name = "things_latest"
kind = "latest"
table = "things"

[[projection]]
name = "things_history"
kind = "history"
table = "things"

[[projection]]
name = "amount_by_name"
kind = "sql"
sql = "amount_by_name.sql"
tables = ["things"]
key = ["name"]
"#;

pub const QUERY: &str = "-- What each name has.
select
    name,
    cast(sum(amount) as decimal(18, 2)) as amount
from things
group by name";

pub const FILES: [(&str, &str); 1] = [("amount_by_name.sql", QUERY)];

pub fn small() -> World {
    World::configured(CONFIGURATION, &FILES, SOURCE)
}

/// Names of the things that are served.
pub fn names(world: &World) -> Vec<String> {
    let rows = world.query("select name from things_latest order by id");
    rows.into_iter().map(|row| row[0].clone().unwrap_or_default()).collect()
}
