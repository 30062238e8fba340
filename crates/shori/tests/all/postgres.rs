//! Pipelines over real PostgreSQL servers, end to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use crate::failpoints::{self, Asked};
use crate::harness::{Done, Running, World, until};
use crate::server::Server;

const TABLES: &str = "
create table customers (customer_id bigint primary key, segment text not null, note text);
create table orders (
    order_id bigint primary key,
    customer_id bigint not null,
    amount numeric(18, 2) not null,
    status text not null,
    created_at timestamp not null
);
insert into customers select n, 'segment ' || n % 3, repeat(md5(n::text), 100) from generate_series(1, 200) as n;
insert into orders select n, 1 + n % 200, n / 100.0, 'open', now()::timestamp from generate_series(1, 5000) as n;
";

const QUERY: &str = "
select
    coalesce(customers.segment, 'UNKNOWN') as segment,
    count(*) as orders_count,
    sum(amount) as amount_sum
from orders
left join customers on customers.customer_id = orders.customer_id
group by 1
";

/// Between two tries of a writer to reach a server that is down.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

struct Shop {
    world: World,
    runtime: Runtime,
    database: String,
}

/// Where log and results are kept.
#[derive(Clone, Copy)]
enum Kept {
    InFile,
    /// In another database of the same server.
    InServer,
}

impl Kept {
    fn store(self, server: &Server, runtime: &Runtime) -> String {
        match self {
            Kept::InFile => "kind = \"duckdb\"\npath = \"serving.duckdb\"".into(),
            Kept::InServer => {
                let database = runtime.block_on(server.create_database());
                format!("kind = \"postgres\"\nserver = {}", address(server, &database))
            }
        }
    }
}

fn address(server: &Server, database: &str) -> String {
    let port = server.port();
    format!("{{ host = \"127.0.0.1\", port = {port}, database = \"{database}\", user = \"postgres\" }}")
}

impl Shop {
    fn over(server: &Server) -> Self {
        Self::kept(server, Kept::InFile)
    }

    fn kept(server: &Server, kept: Kept) -> Self {
        let runtime = Runtime::new().unwrap();
        let store = kept.store(server, &runtime);
        let database = runtime.block_on(async {
            let database = server.create_database().await;
            server.connect(&database).await.batch_execute(TABLES).await.unwrap();
            database
        });
        let configuration = format!(
            "[pipeline]
            name = \"shop\"
            [[source]]
            name = \"shop\"
            kind = \"postgres\"
            server = {}
            slot = \"shop_{database}\"
            snapshot_chunk_rows = 700
            tables.orders = {{}}
            tables.customers = {{}}
            [[store]]
            name = \"serving\"
            {store}
            [[projection]]
            name = \"orders_history\"
            kind = \"history\"
            table = \"orders\"
            [[projection]]
            name = \"amounts\"
            kind = \"history\"
            table = \"orders\"
            untracked = [\"status\"]
            deletes = \"tombstone\"
            [[projection]]
            name = \"customers_latest\"
            kind = \"latest\"
            table = \"customers\"
            [[projection]]
            name = \"orders_by_segment\"
            kind = \"sql\"
            sql = \"by_segment.sql\"
            tables = [\"orders\", \"customers\"]
            key = [\"segment\"]
            ",
            address(server, &database)
        );
        let world = World::configured(&configuration, &[("by_segment.sql", QUERY)], "");
        Self { world, runtime, database }
    }

    fn client(&self, server: &Server) -> Client {
        self.runtime.block_on(server.connect(&self.database))
    }

    fn sql(&self, server: &Server, statements: &str) {
        self.runtime.block_on(self.client(server).batch_execute(statements)).unwrap();
    }

    /// What a second writer does, until told to stop; a server that is not there is waited for.
    fn keep_writing(&self, server: &'static Server, seed: u64) -> Writer {
        self.keep_writing_every(server, seed, Duration::ZERO)
    }

    /// The same with a pause between two transactions: flat out, they would be more than a pipeline can read that dies at
    /// every place.
    fn keep_writing_every(&self, server: &'static Server, seed: u64, pause: Duration) -> Writer {
        let stop = Arc::new(AtomicBool::new(false));
        let commits = Arc::new(AtomicU64::new(0));
        let (stopped, committed, database) = (stop.clone(), commits.clone(), self.database.clone());
        let task = self.runtime.spawn(async move {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut client = server.connect(&database).await;
            while !stopped.load(Ordering::Relaxed) {
                tokio::time::sleep(pause).await;
                let written = client.batch_execute(&transaction(&mut rng)).await;
                match written {
                    Ok(()) => drop(committed.fetch_add(1, Ordering::Relaxed)),
                    // Two writers may take each other's keys; what fails is rolled back whole.
                    Err(error) if error.as_db_error().is_some() => {
                        client.batch_execute("rollback").await.unwrap();
                    }
                    Err(_) => match server.try_connect(&database).await {
                        Ok(connected) => client = connected,
                        Err(_) => tokio::time::sleep(RECONNECT_PAUSE).await,
                    },
                }
            }
        });
        Writer { stop, commits, task }
    }

    /// Catches up, and has every projection recomputed.
    #[track_caller]
    fn assert_verified(&self) {
        self.world.succeed(&["run", "--once"]);
        let done: Done = self.world.succeed(&["verify"]);
        assert_eq!(done.out.matches("  ok").count(), 4, "{done:?}");
    }
}

struct Writer {
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    fn end(self, runtime: &Runtime) {
        self.stop.store(true, Ordering::Relaxed);
        runtime.block_on(self.task).unwrap();
    }
}

fn transaction(rng: &mut ChaCha8Rng) -> String {
    let mut statements = vec!["begin".to_string()];
    for _ in 0..rng.random_range(1..8) {
        let (id, other) = (rng.random_range(1..6000), rng.random_range(1..200));
        statements.push(match rng.random_range(0..10) {
            0..3 => {
                format!("insert into orders values ({id}, {other}, {other}.25, 'new', now()) on conflict do nothing")
            }
            3..6 => format!("update orders set status = 'paid', amount = amount + 1 where order_id = {id}"),
            6 => format!("delete from orders where order_id between {id} and {id} + 3"),
            7 => format!("update orders set order_id = -order_id where order_id = {id}"),
            8 => format!("update customers set segment = 'segment {}' where customer_id = {other}", id % 3),
            _ => format!("savepoint s; delete from orders where order_id > {id}; rollback to savepoint s"),
        });
    }
    statements.push(if rng.random_range(0..8) == 0 { "rollback".into() } else { "commit".into() });
    statements.join("; ")
}

#[test]
fn killed_again_and_again_a_pipeline_loses_and_doubles_nothing() {
    is_killed_again_and_again(Kept::InFile);
}

#[test]
fn killed_again_and_again_a_pipeline_into_a_server_loses_and_doubles_nothing() {
    is_killed_again_and_again(Kept::InServer);
}

fn is_killed_again_and_again(kept: Kept) {
    let server = Server::shared();
    let shop = Shop::kept(server, kept);
    let writers = [shop.keep_writing(server, 1), shop.keep_writing(server, 2)];
    let written = || writers.iter().map(Writer::commits).sum::<u64>();
    for round in 0..6 {
        let before = written();
        let running: Running = shop.world.run();
        until("some commits", || (written() >= before + 60 * (1 + round)).then_some(()));
        running.kill();
    }
    for writer in writers {
        writer.end(&shop.runtime);
    }
    shop.assert_verified();
}

#[test]
fn spec4_17_every_version_between_two_looks_and_late_commits_are_in_the_history() {
    let server = Server::shared();
    let shop = Shop::over(server);
    shop.world.succeed(&["run", "--once"]);
    let late = shop.client(server);
    shop.runtime.block_on(late.batch_execute("begin; update orders set status = 'late' where order_id = 2")).unwrap();
    for amount in 1..=40 {
        shop.sql(server, &format!("update orders set amount = {amount} where order_id = 1"));
    }
    shop.world.succeed(&["run", "--once"]);
    let amounts =
        "select string_agg(amount::int::varchar, ' ' order by valid_from) from orders_history where order_id = 1";
    let all: Vec<String> = (0..=40).map(|amount| amount.to_string()).collect();
    assert_eq!(shop.world.value(amounts), all.join(" "));
    shop.runtime.block_on(late.batch_execute("commit")).unwrap();
    shop.assert_verified();
    let statuses = "select string_agg(status, ' ' order by valid_from) from orders_history where order_id = 2";
    assert_eq!(shop.world.value(statuses), "open late");
}

#[test]
fn a_history_in_a_server_tells_what_was_at_a_time() {
    let server = Server::shared();
    let shop = Shop::kept(server, Kept::InServer);
    shop.world.succeed(&["run", "--once"]);
    shop.sql(server, "update orders set amount = 0 where order_id <= 10; delete from orders where order_id > 4990");
    shop.assert_verified();
    let ask = |words: &[&str]| {
        let done = shop.world.succeed(&[&["query", "--json"], words].concat());
        done.out.lines().map(|line| line.replace('"', "")).collect::<Vec<_>>().join(" ")
    };
    let count = "with those as (select * from amounts) select count(*) as n, count(*) filter (where amount = 0) as free from those";
    let time = ask(&["select max(valid_from)::text as t from amounts where cdc_operation = 'UPDATE'"]);
    let time = time.trim_start_matches("{t: ").trim_end_matches('}');
    assert_eq!(ask(&["--as-of", time, count]), "{n: 4990, free: 10}");
    assert_eq!(ask(&[&format!("select count(*) as n from amounts_as_of('{time}+00')")]), "{n: 4990}");
    let just_before = format!(
        "select count(*) as n, max(amount) as most from amounts_as_of('{time}+00'::timestamptz - interval '1 microsecond')"
    );
    assert_eq!(ask(&[&just_before]), "{n: 5000, most: 50.00}");
    assert_eq!(ask(&["select count(*) as n from amounts where cdc_operation = 'DELETE' and is_current"]), "{n: 10}");
    assert_eq!(ask(&["--as-of", "2001-01-01", count]), "{n: 0, free: 0}");
    let shown = shop.world.succeed(&["query", "select '2026-01-02 03:04:05+02'::timestamptz as t"]);
    assert!(shown.out.contains("2026-01-02T01:04:05Z"), "{shown:?}");
    // Tombstones end where they are kept no more, so that their keys can come back.
    let configuration = std::fs::read_to_string(shop.world.path("shori.toml")).unwrap();
    shop.world.put("shori.toml", &configuration.replace("deletes = \"tombstone\"", ""));
    shop.sql(server, "insert into orders values (4999, 1, 1, 'back', now())");
    shop.assert_verified();
    assert_eq!(ask(&["select count(*) as n from amounts where cdc_operation = 'DELETE' and is_current"]), "{n: 0}");
}

/// What had waited in the slot before the column was added has its own times, and the values of then.
#[test]
fn a_column_added_behind_a_backlog_is_followed_where_it_was_added() {
    let server = Server::shared();
    let shop = Shop::over(server);
    shop.world.succeed(&["run", "--once"]);
    shop.sql(server, "update orders set amount = 11 where order_id = 1");
    shop.sql(
        server,
        "alter table orders add column channel text default 'web'; alter table orders add column more int",
    );
    shop.sql(server, "update orders set amount = 12 where order_id = 1");
    shop.assert_verified();
    let amounts = "select string_agg(amount::int || ' ' || coalesce(channel, '-'), ', ' order by valid_from) from orders_history where order_id = 1";
    assert_eq!(shop.world.value(amounts), "0 -, 11 -, 12 web");
    let channels = "select count(*) from orders_history where is_current and channel = 'web'";
    assert_eq!(shop.world.value(channels), "5000");
    // Where no row tells of it.
    shop.sql(server, "alter table customers add column age int default 7");
    shop.assert_verified();
    assert_eq!(shop.world.value("select count(*) from customers_latest where age = 7"), "200");
}

#[test]
fn a_server_that_is_killed_is_read_on_when_it_is_back() {
    let server: &'static Server = Box::leak(Box::new(Server::start(&[("fsync", "on")])));
    let shop = Shop::over(server);
    let running = shop.world.run();
    for round in 0..3 {
        let rows = shop.runtime.block_on(async {
            let client = server.connect(&shop.database).await;
            let insert = format!(
                "insert into orders select 10000 * (1 + {round}) + n, 7, 1.5, 'late', now() from generate_series(1, 500) as n"
            );
            client.batch_execute(&insert).await.unwrap();
            client.query_one("select count(*) from orders", &[]).await.unwrap().get::<_, i64>(0)
        });
        server.kill();
        server.start_again();
        let count = "select count(*) from orders_history where is_current";
        until("the rows of this round", || {
            (shop.world.try_query(count).ok()?[0][0].as_ref()? == &rows.to_string()).then_some(())
        });
    }
    drop(running);
    shop.assert_verified();
    server.stop();
}

#[test]
fn killed_between_any_two_writes_a_pipeline_loses_and_doubles_nothing() {
    is_killed_at_each_place(Kept::InFile);
}

#[test]
fn killed_between_any_two_writes_a_pipeline_into_a_server_loses_and_doubles_nothing() {
    is_killed_at_each_place(Kept::InServer);
}

fn is_killed_at_each_place(kept: Kept) {
    let server = Server::shared();
    let shop = Shop::kept(server, kept);
    let configuration = std::fs::read_to_string(shop.world.path("shori.toml")).unwrap();
    shop.world.put("shori.toml", &format!("{configuration}\n{}", failpoints::RETENTION));
    let writer = shop.keep_writing_every(server, 4, Duration::from_millis(30));
    let asked = Asked { table: "orders", projection: "orders_history" };
    let unreached = failpoints::kill_at_each(&shop.world, &asked, || {
        let before = writer.commits();
        until("some commits", || (writer.commits() >= before + 20).then_some(()));
    });
    writer.end(&shop.runtime);
    shop.assert_verified();
    assert!(unreached.is_empty(), "never reached: {unreached:?}");
}

#[test]
fn killed_between_any_two_writes_a_pipeline_from_a_file_into_a_server_loses_and_doubles_nothing() {
    let world = demo_into(Server::shared(), &Runtime::new().unwrap(), failpoints::RETENTION);
    let generate = ["generate", "--rate", "2000", "--seed", "5", "--customers", "50"];
    let mut application = world.start(&generate);
    let asked = Asked { table: "payments", projection: "dim_orders_history" };
    let unreached = failpoints::kill_at_each(&world, &asked, || application.assert_running());
    application.stop();
    world.succeed(&["run", "--once"]);
    world.verify();
    assert!(unreached.is_empty(), "never reached: {unreached:?}");
}

/// Power fails: source, warehouse and Shori end at once.
#[test]
fn killed_with_both_servers_a_pipeline_loses_and_doubles_nothing() {
    let server: &'static Server = Box::leak(Box::new(Server::start(&[("fsync", "on")])));
    let shop = Shop::kept(server, Kept::InServer);
    let writer = shop.keep_writing(server, 3);
    for round in 0..4 {
        let before = writer.commits();
        let running = shop.world.run();
        until("some commits", || (writer.commits() >= before + 40 * (1 + round)).then_some(()));
        // Either may be the first to go.
        if round % 2 == 0 {
            server.kill();
            running.kill();
        } else {
            running.kill();
            server.kill();
        }
        server.start_again();
    }
    writer.end(&shop.runtime);
    shop.assert_verified();
    server.stop();
}

/// The demo pipeline, with its log and results in a server.
fn demo_into(server: &Server, runtime: &Runtime, more: &str) -> World {
    let demo = include_str!("../../../../pipelines/demo/shori.toml");
    let (head, tail) = demo.split_once("[[store]]").unwrap();
    let (_, projections) = tail.split_once("[[projection]]").unwrap();
    let (projections, _) = projections.split_once("[retention]").unwrap_or((projections, ""));
    let store = Kept::InServer.store(server, runtime);
    let configuration = format!("{head}[[store]]\nname = \"serving\"\n{store}\n[[projection]]{projections}\n{more}");
    let kpi = include_str!("../../../../pipelines/demo/sql/proj_orders_kpi_by_minute_segment.sql");
    let latest = include_str!("../../../../pipelines/demo/sql/proj_orders_latest.sql");
    let sample = include_str!("../../../../pipelines/demo/sql/sample_source.sql");
    let world = World::configured(&configuration, &[], sample);
    std::fs::create_dir(world.path("sql")).unwrap();
    world.put("sql/proj_orders_kpi_by_minute_segment.sql", kpi);
    world.put("sql/proj_orders_latest.sql", latest);
    world
}

#[test]
fn a_file_is_captured_into_a_server() {
    let world = demo_into(Server::shared(), &Runtime::new().unwrap(), "");
    for seed in ["1", "2"] {
        world.succeed(&["generate", "--changes", "4000", "--seed", seed, "--customers", "50"]);
        world.succeed(&["run", "--once"]);
        world.verify();
    }
    let done = world.succeed(&["query", "--json", "select count(*) as orders from proj_orders_latest"]);
    assert!(done.json()["orders"].as_i64().unwrap() > 0, "{done:?}");
    let done = world.succeed(&["status", "--json"]);
    assert_eq!(done.json()["projections"].as_array().unwrap().len(), 4, "{done:?}");
}

#[test]
fn a_dropped_slot_is_a_gap_and_a_resnapshot_mends_it() {
    let server = Server::shared();
    let shop = Shop::over(server);
    shop.world.succeed(&["run", "--once"]);
    shop.sql(server, &format!("select pg_drop_replication_slot('shop_{}')", shop.database));
    shop.sql(server, "delete from orders where order_id <= 1000");
    let done = shop.world.shori(&["run", "--once"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.err.contains("shori resnapshot orders") && done.err.contains("is gone"), "{done:?}");
    shop.world.succeed(&["resnapshot", "orders"]);
    shop.world.succeed(&["resnapshot", "customers"]);
    shop.assert_verified();
}

#[test]
fn an_added_column_flows_through_and_a_retyped_one_stops_its_table_alone() {
    let server = Server::shared();
    let shop = Shop::over(server);
    shop.world.succeed(&["run", "--once"]);
    shop.sql(
        server,
        "alter table orders add column channel text default 'web'; update orders set amount = 2 where order_id = 1",
    );
    shop.assert_verified();
    let channels = "select count(*) from orders_history where is_current and channel = 'web'";
    assert_eq!(shop.world.value(channels), "5000");
    shop.sql(server, "alter table orders alter column customer_id type numeric(10, 0); update orders set amount = 3 where order_id = 2");
    shop.sql(server, "update customers set segment = 'fresh' where customer_id = 5");
    let done = shop.world.shori(&["run", "--once"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.err.contains("shori resnapshot --retyped orders"), "{done:?}");
    assert_eq!(shop.world.value("select segment from customers_latest where customer_id = 5"), "fresh");
}

#[test]
fn what_is_wrong_with_a_server_is_told_with_its_remedy() {
    let server = Server::shared();
    let shop = Shop::over(server);
    shop.sql(server, "do $$ begin create role reader login; exception when duplicate_object then null; end $$");
    let configuration = std::fs::read_to_string(shop.world.path("shori.toml")).unwrap();
    let database = format!("\"{}\"", shop.database);
    for (from, to, cause, status) in [
        ("user = \"postgres\"", "user = \"nobody\"", "role \"nobody\" does not exist; correct user, password", 2),
        (database.as_str(), "\"none\"", "database \"none\" does not exist", 2),
        ("user = \"postgres\"", "user = \"reader\"", "run: grant select on public.orders to \"reader\"", 2),
        ("tables.orders = {}", "tables.orderz = {}", "table public.orderz: it does not exist; correct its name", 2),
        ("tables.orders = {}", "tables.orders = { columns = { amount = \"int64\" } }", "configure it as text", 1),
        ("slot = \"", "slot = \"Bad ", "is no name of a slot", 2),
        ("kind = \"postgres\"", "kind = \"postgres\"\npath = \"x.db\"", "which is for kind \"sqlite\"", 2),
        ("user = \"postgres\"", "user = \"postgres\", tls = \"verify\"", "server does not support TLS", 1),
    ] {
        std::fs::write(shop.world.path("shori.toml"), configuration.replace(from, to)).unwrap();
        let done = shop.world.shori(&["check"]);
        assert!(done.err.contains(cause), "{to}: {done:?}");
        assert_eq!(done.status, Some(status), "{to}: {done:?}");
    }
}

#[test]
fn a_standby_is_refused_in_one_line_by_every_verb_that_looks_at_it() {
    let primary = Server::start(&[]);
    let shop = Shop::over(&primary);
    let standby = primary.start_standby();
    let configuration = std::fs::read_to_string(shop.world.path("shori.toml")).unwrap();
    let port = |server: &Server| format!("port = {}", server.port());
    shop.world.put("shori.toml", &configuration.replace(&port(&primary), &port(&standby)));
    for verb in [&["check"][..], &["init"], &["run"]] {
        let at = format!("{} at 127.0.0.1:{}", shop.database, standby.port());
        shop.world.shori(verb).tells(2, &["cannot capture", &at, "it is a standby; name its primary server"]);
    }
    shop.world.put("shori.toml", &configuration);
    shop.assert_verified();
}
