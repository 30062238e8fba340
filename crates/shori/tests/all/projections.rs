//! Projections that the engine has never seen, by SQL and TOML alone: kept by change, equal to the query run in full.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::harness::{Rows, World};

const SOURCE: &str = "
create table regions (region_id integer primary key, name text not null, manager text);
create table shops (shop_id integer primary key, region_id integer, name text not null);
create table sales (
    sale_id integer primary key,
    shop_id integer not null,
    product text,
    quantity integer not null,
    amount text not null,
    sold_at text not null
);
create table stocks (
    shop_id integer not null,
    product text not null,
    quantity integer,
    counted_at text,
    primary key (shop_id, product)
) without rowid;
insert into regions values (1, 'north', 'Ada'), (2, 'south', null);
insert into shops values (1, 1, 'harbour'), (2, 2, 'station'), (3, null, 'nowhere');
insert into sales values (1, 1, 'tea', 2, '4.20', '2026-01-01T10:00:00.000001Z');
insert into stocks values (1, 'tea', 5, null), (2, 'tea', 7, '2026-01-01T00:00:00Z');
";

/// The declared types that SOURCE does not tell, for the test's own reading.
const TYPED: &str = "
create table regions as select region_id, name, manager from source.regions;
create table shops as select shop_id, region_id, name from source.shops;
create table sales as select sale_id, shop_id, product, quantity, amount::decimal(18,2) as amount,
    sold_at::timestamptz::timestamp as sold_at from source.sales;
create table stocks as select shop_id, product, quantity, counted_at::timestamptz::timestamp as counted_at from source.stocks;
";

const CONFIGURATION: &str = r#"
[pipeline]
name = "shops"
[[source]]
name = "tills"
kind = "sqlite"
path = "source.db"
[source.tables.regions]
[source.tables.shops]
[source.tables.sales.columns]
amount = "decimal(18,2)"
sold_at = "timestamp"
[source.tables.stocks.columns]
counted_at = "timestamp"
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"

[[projection]]
name = "sales_by_region"
kind = "sql"
sql = "sales_by_region.sql"
tables = ["regions", "shops", "sales"]
key = ["day", "region"]
additive = ["sale_count", "quantity", "amount"]
weight = "rows_behind"
publish_weight = true
[projection.entity]
sales = "sale_id"
shops = { through = "sales", column = "shop_id" }
regions = { through = "shops", column = "region_id" }

[[projection]]
name = "extremes_by_product"
kind = "sql"
sql = "extremes_by_product.sql"
tables = ["regions", "shops", "sales"]
key = ["product", "manager"]
additive = ["sale_count"]
weight = "sale_count"
publish_weight = true
[projection.entity]
sales = "sale_id"
shops = { through = "sales", column = "shop_id" }
regions = { through = "shops", column = "region_id" }

[[projection]]
name = "shops_ranked"
kind = "sql"
sql = "shops_ranked.sql"
tables = ["regions", "shops", "sales"]
key = ["shop_id"]

[[projection]]
name = "sales_wide"
kind = "sql"
sql = "sales_wide.sql"
tables = ["regions", "shops", "sales"]
key = ["sale_id"]
[projection.entity]
sales = "sale_id"
shops = { through = "sales", column = "shop_id" }
regions = { through = "shops", column = "region_id" }

[[projection]]
name = "stocks_latest"
kind = "latest"
table = "stocks"

[[projection]]
name = "stocks_history"
kind = "history"
table = "stocks"
key = ["shop", "article"]

[[projection]]
name = "shops_history"
kind = "history"
table = "shops"
"#;

const QUERIES: [(&str, &str); 4] = [
    (
        "sales_by_region.sql",
        "select
            date_trunc('day', sales.sold_at)::date as day,
            coalesce(regions.name, 'UNKNOWN') as region,
            cast(count(*) as bigint) as sale_count,
            cast(sum(sales.quantity) as bigint) as quantity,
            cast(sum(sales.amount) as decimal(18, 2)) as amount,
            max(sales.amount) as largest,
            min(sales.sold_at) as first_sold_at,
            count(*) as rows_behind
        from sales
        left join shops on shops.shop_id = sales.shop_id
        left join regions on regions.region_id = shops.region_id
        group by 1, 2",
    ),
    (
        "extremes_by_product.sql",
        "-- A null product and a null manager are keys like any other.
        select
            product,
            manager,
            count(*) as sale_count,
            min(amount) as smallest,
            max(amount) as largest,
            count(distinct shop_id) as shop_count
        from sales
        left join shops using (shop_id)
        left join regions using (region_id)
        group by product, manager;",
    ),
    (
        "shops_ranked.sql",
        "select
            shops.shop_id,
            shops.name,
            regions.name as region,
            cast(coalesce(sum(sales.amount), 0) as decimal(18, 2)) as amount,
            rank() over (order by coalesce(sum(sales.amount), 0) desc, shops.shop_id) as place
        from shops
        left join regions using (region_id)
        left join sales on sales.shop_id = shops.shop_id
        group by shops.shop_id, shops.name, regions.name",
    ),
    (
        "sales_wide.sql",
        "select
            sales.sale_id,
            sales.product,
            sales.amount,
            sales.sold_at,
            shops.name as shop,
            regions.name as region,
            regions.manager
        from sales
        left join shops using (shop_id)
        left join regions using (region_id)",
    ),
];

/// Statements of one transaction; any row may come before or go after those that it belongs to.
fn statements(rng: &mut ChaCha8Rng) -> String {
    let count = if rng.random_bool(0.1) { 60 } else { rng.random_range(1..8) };
    (0..count).map(|_| statement(rng)).collect::<Vec<_>>().join("\n")
}

fn statement(rng: &mut ChaCha8Rng) -> String {
    let region = rng.random_range(1..6);
    let shop = rng.random_range(1..13);
    let sale = rng.random_range(1..120);
    let product = ["'tea'", "'milk'", "'a''b'", "null"][rng.random_range(0..4)];
    let article = ["tea", "milk", "rice"][rng.random_range(0..3)];
    let amount = format!("{}.{:02}", rng.random_range(-20..400), rng.random_range(0..100));
    let quantity = rng.random_range(-3..20);
    let time = format!(
        "2026-01-{:02}T{:02}:00:{:02}.{:06}Z",
        rng.random_range(1..4),
        rng.random_range(0..24),
        rng.random_range(0..60),
        rng.random_range(0..1_000_000)
    );
    match rng.random_range(0..20) {
        0 => format!("insert or replace into regions values ({region}, 'region {quantity}', null);"),
        1 => format!("update regions set manager = {product}, name = 'of {quantity}' where region_id = {region};"),
        2 => format!("delete from regions where region_id = {region};"),
        3 => format!("insert or ignore into shops values ({shop}, {region}, 'shop {shop}');"),
        4 => format!("update shops set region_id = {region} where shop_id = {shop};"),
        5 => format!("update shops set region_id = null, name = 'closed' where shop_id % 5 = {};", shop % 5),
        6 => format!("delete from shops where shop_id = {shop};"),
        7 => format!("update or ignore shops set shop_id = {} where shop_id = {shop};", rng.random_range(1..13)),
        8 => format!("delete from sales where sale_id = {sale};"),
        9 => format!("update sales set shop_id = {shop}, sold_at = '{time}' where sale_id = {sale};"),
        10 => format!("update sales set amount = '{amount}', product = {product} where sale_id = {sale};"),
        11 => format!("update or ignore sales set sale_id = {} where sale_id = {sale};", rng.random_range(1..120)),
        12 => format!("delete from stocks where shop_id = {shop} and product = '{article}';"),
        13 => format!(
            "insert into stocks values ({shop}, '{article}', {quantity}, '{time}')
            on conflict (shop_id, product) do update set quantity = excluded.quantity, counted_at = null;"
        ),
        14 => format!("update or ignore stocks set shop_id = {} where shop_id = {shop};", rng.random_range(1..13)),
        _ => format!(
            "insert or replace into sales values ({sale}, {shop}, {product}, {quantity}, '{amount}', '{time}');"
        ),
    }
}

fn sorted(mut rows: Rows) -> Rows {
    rows.sort();
    rows
}

/// The source's rows in a database of this test's own, by another path than the program's.
fn recomputed(world: &World) -> duckdb::Connection {
    let target = duckdb::Connection::open_in_memory().unwrap();
    target.execute_batch("set TimeZone = 'UTC'; create schema source;").unwrap();
    let source = world.source();
    for (table, columns) in [
        ("regions", "region_id bigint, name varchar, manager varchar"),
        ("shops", "shop_id bigint, region_id bigint, name varchar"),
        ("sales", "sale_id bigint, shop_id bigint, product varchar, quantity bigint, amount varchar, sold_at varchar"),
        ("stocks", "shop_id bigint, product varchar, quantity bigint, counted_at varchar"),
    ] {
        target.execute_batch(&format!("create table source.{table} ({columns})")).unwrap();
        let mut statement = source.prepare(&format!("select * from {table}")).unwrap();
        let width = statement.column_count();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values = (0..width).map(|index| match row.get_ref(index).unwrap() {
                rusqlite::types::ValueRef::Integer(number) => number.to_string(),
                rusqlite::types::ValueRef::Text(text) => shori_text(text),
                _ => "null".into(),
            });
            let values = values.collect::<Vec<_>>().join(", ");
            target.execute_batch(&format!("insert into source.{table} values ({values})")).unwrap();
        }
    }
    target.execute_batch(TYPED).unwrap();
    target
}

fn shori_text(text: &[u8]) -> String {
    format!("'{}'", std::str::from_utf8(text).unwrap().replace('\'', "''"))
}

fn rows(connection: &duckdb::Connection, sql: &str) -> Rows {
    let mut statement = connection.prepare(&format!("select columns(*)::varchar from ({sql}) as q")).unwrap();
    let mut found = statement.query([]).unwrap();
    let mut rows = Vec::new();
    while let Some(row) = found.next().unwrap() {
        let width = row.as_ref().column_count();
        rows.push((0..width).map(|index| row.get(index).unwrap()).collect());
    }
    sorted(rows)
}

#[track_caller]
fn assert_equal(world: &World) {
    let expected = recomputed(world);
    for (file, query) in QUERIES {
        let projection = file.trim_end_matches(".sql");
        let served = sorted(world.query(&format!("select * from {projection}")));
        assert_eq!(served, rows(&expected, query.trim_end_matches(';')), "{projection}");
    }
    let latest = world.query("select * exclude (__source_lsn) from stocks_latest");
    assert_eq!(sorted(latest), rows(&expected, "select * from stocks"));
    let current = world.query("select shop, article, quantity, counted_at from stocks_history where is_current");
    assert_eq!(sorted(current), rows(&expected, "select * from stocks"));
    let current = world.query("select shop_id, region_id, name from shops_history where is_current");
    assert_eq!(sorted(current), rows(&expected, "select * from shops"));
}

fn random_writes(seed: u64) {
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let world = World::configured(CONFIGURATION, &QUERIES, SOURCE);
    let mut running = world.run();
    world.catch_up(&mut running);
    assert_equal(&world);
    for round in 0..5 {
        for _ in 0..40 {
            world.write(&format!("begin immediate;\n{}\ncommit;", statements(&mut rng)));
        }
        if round == 2 {
            running.kill();
            world.write(&format!("begin immediate;\n{}\ncommit;", statements(&mut rng)));
            running = world.run();
        }
        world.catch_up(&mut running);
        assert_equal(&world);
    }
    world.verify();
    world.write("delete from sales; delete from stocks; delete from regions;");
    world.catch_up(&mut running);
    assert_equal(&world);
    running.stop();
    world.verify();
}

#[test]
fn an_unseen_projection_is_kept_by_change_and_equals_the_query_run_in_full() {
    random_writes(1);
}

#[test]
fn an_unseen_projection_is_kept_by_change_and_equals_the_query_run_in_full_with_chance() {
    random_writes(ChaCha8Rng::from_os_rng().random());
}

#[test]
fn a_projection_added_to_a_running_pipeline_is_built_from_the_log() {
    let without = CONFIGURATION.split("[[projection]]\nname = \"sales_wide\"").next().unwrap();
    let mut world = World::configured(without, &QUERIES, SOURCE);
    world.succeed(&["run", "--once"]);
    world.write("update shops set region_id = 1; insert into stocks values (9, 'rice', 1, null); delete from stocks where shop_id = 9;");
    world.succeed(&["run", "--once"]);
    world.configure(CONFIGURATION);
    world.succeed(&["run", "--once"]);
    assert_equal(&world);
    world.verify();
    let ended = "select count(*) from stocks_history where shop = 9 and valid_to is not null";
    assert_eq!(world.value(ended), "1", "a history begun later has what the log keeps");
}
