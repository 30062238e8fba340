//! The pipeline orders-history as it is shipped: its sample, its mutator, and its days by `make`.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::harness::{World, until};
use crate::server::Server;

const CONFIGURATION: &str = include_str!("../../../../pipelines/orders-history/shori.toml");
const SAMPLE: &str = include_str!("../../../../pipelines/orders-history/sql/sample_source.sql");
const SAMPLE_ROWS: i64 = 100;
/// Everything about the orders that is drawn, and nothing that a clock tells.
const DRAWN: &str = "
select string_agg(concat_ws(' ', id, customer_id, product_id, quantity, unit_price, order_status), e'\\n' order by id)
from orders
";

struct Pipeline<'s> {
    world: World,
    runtime: Runtime,
    server: &'s Server,
    source: String,
}

impl<'s> Pipeline<'s> {
    /// Over two databases of a server, with the sample table.
    fn over(server: &'s Server) -> Self {
        let pipeline = Self::without_sample(server);
        pipeline.world.succeed(&["init", "--sample"]);
        pipeline
    }

    fn without_sample(server: &'s Server) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        // Slots of all databases of a server share their names.
        let slot = format!("slot = \"orders_history_{}\"\n", NEXT.fetch_add(1, Ordering::Relaxed));
        let configuration = CONFIGURATION.replace("[source.server]", &format!("{slot}\n[source.server]"));
        let runtime = Runtime::new().unwrap();
        let create = || runtime.block_on(server.create_database());
        let (source, warehouse) = (create(), create());
        let world = World::configured(&configuration, &[], "");
        std::fs::create_dir(world.path("sql")).unwrap();
        world.put("sql/sample_source.sql", SAMPLE);
        let port = server.port();
        world.put(
            ".env",
            &format!(
                "DB_HOST=127.0.0.1\nDB_PORT={port}\nDB_NAME={source}\nWAREHOUSE_DB_HOST=127.0.0.1\n\
                 WAREHOUSE_DB_PORT={port}\nWAREHOUSE_DB_NAME={warehouse}\nMUTATION_INTERVAL_SECONDS=0.02\n\
                 LOG_LEVEL=INFO\n"
            ),
        );
        Self { world, runtime, server, source }
    }

    fn value<T: for<'r> tokio_postgres::types::FromSql<'r>>(&self, sql: &str) -> T {
        self.runtime.block_on(async {
            let client = self.server.connect(&self.source).await;
            client.query_one(sql, &[]).await.unwrap().get(0)
        })
    }

    fn rows(&self) -> i64 {
        self.value("select count(*) from orders")
    }

    /// What is reported is what the table has become.
    #[track_caller]
    fn assert_tells_the_truth(&self, generated: &Value) {
        let count = |key: &str| generated["orders"][key].as_i64().unwrap();
        assert_eq!(self.rows(), SAMPLE_ROWS + count("inserts") - count("deletes"), "{generated}");
        let changes = count("inserts") + count("updates") + count("deletes");
        assert_eq!(generated["changes"].as_i64(), Some(changes), "{generated}");
    }
}

#[test]
fn the_history_of_what_several_writers_do_is_that_of_the_source() {
    let pipeline = Pipeline::over(Server::shared());
    let world = &pipeline.world;
    // What is there stays.
    world.succeed(&["init", "--sample"]);
    assert_eq!(pipeline.rows(), SAMPLE_ROWS);
    world.succeed(&["check"]);
    let running = world.reached(world.start(&["run", "--log-dir", "logs"]));
    let words = ["generate", "--changes", "2000", "--seed", "3", "--writers", "4", "--json"];
    let generated = world.succeed(&words).json();
    assert_eq!(generated["changes"].as_i64(), Some(2_000), "{generated}");
    pipeline.assert_tells_the_truth(&generated);
    for key in ["inserts", "updates", "deletes"] {
        assert!(generated["orders"][key].as_i64().unwrap() > 200, "{generated}");
    }
    world.verify();
    let current = world.succeed(&["query", "--json", "select count(*) as n from dim_orders_history where is_current"]);
    assert_eq!(current.json()["n"].as_i64(), Some(pipeline.rows()));
    let done = running.stop();
    assert_eq!(done.err, "", "with --log-dir, lines go to a terminal and to files alone");
    let log = std::fs::read_to_string(world.path("logs/shori.log")).unwrap();
    assert!(log.contains("INFO running") && log.contains("snapshot done"), "{log}");
    let touch = "
        update orders
        set order_status = 'returned'
        where id = (select max(id) from orders)
        returning last_updated > created_at
    ";
    assert!(pipeline.value::<bool>(touch), "the trigger keeps last_updated");
}

#[test]
fn equal_seeds_write_equal_orders() {
    let drawn = |seed: &str| {
        let pipeline = Pipeline::over(Server::shared());
        pipeline.world.succeed(&["generate", "--changes", "700", "--seed", seed]);
        pipeline.value::<String>(DRAWN)
    };
    let one = drawn("7");
    assert_eq!(one, drawn("7"));
    assert_ne!(one, drawn("8"));
}

#[test]
fn rounds_go_on_until_a_signal_and_are_told_as_they_were() {
    let pipeline = Pipeline::over(Server::shared());
    let before: String = pipeline.value(DRAWN);
    // By the interval of the configuration, which is that of .env.
    let running = pipeline.world.start(&["generate", "--json"]);
    until("some rounds", || (running.err().matches("wrote").count() >= 20).then_some(()));
    let generated = running.stop().json();
    pipeline.assert_tells_the_truth(&generated);
    assert_ne!(pipeline.value::<String>(DRAWN), before);
    let (changes, transactions) = (generated["changes"].as_f64().unwrap(), generated["transactions"].as_f64().unwrap());
    assert!(changes / transactions < 8.0, "{generated}");
}

#[test]
fn a_server_that_goes_away_is_waited_for_and_one_that_is_not_there_is_told() {
    let server = Server::start(&[("fsync", "on")]);
    let pipeline = Pipeline::over(&server);
    let mut running = pipeline.world.start(&["generate", "--rate", "400", "--writers", "2"]);
    let above = |rows: i64| (pipeline.rows() > rows).then_some(());
    until("some orders", || above(SAMPLE_ROWS + 20));
    server.kill();
    until("that it is missed", || running.err().contains("the server has gone, trying again").then_some(()));
    running.assert_running();
    server.start_again();
    let rows = pipeline.rows();
    until("more orders", || above(rows + 20));
    running.stop();
    server.stop();
    pipeline.world.shori(&["generate", "--changes", "1"]).tells(1, &["cannot connect to", "Connection refused"]);
}

#[test]
fn what_is_no_sample_is_not_written_to() {
    let pipeline = Pipeline::without_sample(Server::shared());
    let done = pipeline.world.shori(&["generate", "--changes", "1"]);
    done.tells(2, &["table \"public\".orders", "does not exist", "run shori init --sample"]);
    let configuration = std::fs::read_to_string(pipeline.world.path("shori.toml")).unwrap();
    pipeline.world.put("shori.toml", &configuration.replace("sample = ", "# sample = "));
    let done = pipeline.world.shori(&["generate", "--changes", "1"]);
    done.tells(2, &["this pipeline has no sample tables"]);
}

/// As a newcomer does it, in a copy of the folder: `make quick-start`, and all that follows until `make clean`.
#[test]
fn its_days_by_make_are_as_the_page_tells() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../pipelines/orders-history/test.sh");
    let done = Command::new(script).env("SHORI", env!("CARGO_BIN_EXE_shori")).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && out.contains("== all of it went well"), "{out}\n{err}");
}

#[test]
fn a_signal_ends_a_long_pause() {
    let pipeline = Pipeline::over(Server::shared());
    let running = pipeline.world.start(&["generate", "--interval", "3600", "--seed", "2"]);
    until("the first round", || running.err().contains("wrote").then_some(()));
    running.signal(Signal::INT);
    assert_eq!(running.end().status, Some(0));
}

#[test]
fn an_interval_that_is_none_is_told_by_the_name_that_was_typed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../pipelines/orders-history");
    let make = |words: &[&str]| {
        // A program that does nothing is there, so that none is built.
        let mut make = Command::new("make");
        make.args(["--no-print-directory", "-C", folder, "SHORI=/bin/false"]).args(words);
        make.env_remove("MAKEFLAGS").env_remove("MUTATION_INTERVAL").env_remove("CDC_INTERVAL").output().unwrap()
    };
    for (verb, interval, told) in [
        ("start", "MUTATION_INTERVAL=abc", "MUTATION_INTERVAL is \"abc\", and must be a number of seconds"),
        ("quick-start", "MUTATION_INTERVAL=-1", "MUTATION_INTERVAL is \"-1\""),
        ("prod-start", "CDC_INTERVAL=0.5", "CDC_INTERVAL is \"0.5\", and must be a whole number of seconds"),
    ] {
        let done = make(&[verb, interval]);
        let err = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success() && err.contains(told), "{verb} {interval}: {err}");
    }
    for intervals in [&["MUTATION_INTERVAL=0.5"][..], &["MUTATION_INTERVAL=30", "CDC_INTERVAL=60"], &[]] {
        assert!(make(&[&["intervals"], intervals].concat()).status.success(), "{intervals:?}");
    }
}
