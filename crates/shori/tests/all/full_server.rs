//! A server that keeps log and results has no space left, and has again.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use crate::harness::{Running, World, until};
use crate::server::Server;
use crate::small_disk::SmallDisk;

const TABLES: &str = "
create table orders (order_id bigint primary key, amount numeric(18, 2) not null, note text not null);
insert into orders select n, n / 100.0, 'open' from generate_series(1, 1000) as n;
";
/// Orders of one transaction of the flood, each with text that does not compress.
const FLOOD_ROWS: i64 = 1000;
const FLOODS: i64 = 12;
/// Before the next try, after each that follows another in vain.
const PAUSES: [&str; 4] = ["100ms", "200ms", "400ms", "800ms"];

fn configuration(source: (&Server, &str), store: (&Server, &str)) -> String {
    let address = |(server, database): (&Server, &str)| {
        let port = server.port();
        format!("{{ host = \"127.0.0.1\", port = {port}, database = \"{database}\", user = \"postgres\" }}")
    };
    format!(
        "[pipeline]
        name = \"shop\"
        [[source]]
        name = \"shop\"
        kind = \"postgres\"
        server = {}
        tables.orders = {{}}
        [[store]]
        name = \"serving\"
        kind = \"postgres\"
        server = {}
        [[projection]]
        name = \"orders_history\"
        kind = \"history\"
        table = \"orders\"
        [[projection]]
        name = \"orders_latest\"
        kind = \"latest\"
        table = \"orders\"
        ",
        address(source),
        address(store),
    )
}

/// A small disk that servers can write to, which are run by another user.
fn small_disk(folder: &TempDir, mib: u32) -> Option<SmallDisk> {
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let disk = SmallDisk::mount(folder.path(), mib)?;
    assert!(Command::new("chown").arg("postgres:").arg(folder.path()).status().unwrap().success());
    Some(disk)
}

/// A pipeline that has read what was there: from here on, every change is one of the stream.
struct Shop<'a> {
    world: World,
    runtime: Runtime,
    source: Client,
    /// Where the warehouse is.
    server: &'a Server,
}

impl<'a> Shop<'a> {
    /// `options`: of the statement that makes the warehouse.
    fn with_warehouse(source: &Server, server: &'a Server, options: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let (database, client) = runtime.block_on(async {
            let database = source.create_database().await;
            let client = source.connect(&database).await;
            client.batch_execute(TABLES).await.unwrap();
            let warehouse = server.connect("postgres").await;
            warehouse.batch_execute(&format!("create database warehouse {options}")).await.unwrap();
            (database, client)
        });
        let world = World::configured(&configuration((source, &database), (server, "warehouse")), &[], "");
        world.succeed(&["run", "--once"]);
        Self { world, runtime, source: client, server }
    }

    fn warehouse(&self) -> Client {
        self.runtime.block_on(self.server.connect("warehouse"))
    }

    fn sql(&self, statements: &str) {
        self.runtime.block_on(self.source.batch_execute(statements)).unwrap();
    }

    fn flood(&self) {
        for flood in 1..=FLOODS {
            let (first, last) = (flood * 10_000, flood * 10_000 + FLOOD_ROWS - 1);
            self.sql(&format!(
                "insert into orders
                select n, 1, (select string_agg(md5(n || '.' || i), '') from generate_series(1, 60) as i)
                from generate_series({first}, {last}) as n"
            ));
        }
    }

    /// What comes while there is no space: it waits in the source.
    fn write_meanwhile(&self) {
        self.sql(
            "update orders set amount = 7 where order_id <= 10; delete from orders where order_id between 11 and 15",
        );
        self.sql("insert into orders values (1000000, 1, 'the last one')");
    }

    fn number(&self, warehouse: &Client, query: &str) -> i64 {
        let answer = self.runtime.block_on(warehouse.query_one(query, &[]));
        answer.unwrap_or_else(|cause| panic!("{query}: {cause:?}")).get(0)
    }

    /// The pipeline, left to itself, comes to the end of the source, with each change once.
    fn comes_to_the_end(self, mut running: Running) {
        let warehouse = self.warehouse();
        until("the last order", || {
            running.assert_running();
            let shown = "
                select count(*)
                from (
                    select order_id from orders_history where is_current
                    union all
                    select order_id from orders_latest
                ) as shown
                where order_id = 1000000";
            (self.number(&warehouse, shown) == 2).then_some(())
        });
        running.stop();
        let inserted = FLOODS * FLOOD_ROWS + 1;
        let count = |what: &str| self.number(&warehouse, &format!("select count(*) from {what}"));
        assert_eq!(count("stg_cdc_orders"), 1000 + inserted + 10 + 5, "each change is in the log once");
        assert_eq!(count("orders_history"), 1000 + inserted + 10, "each version is there once");
        let whole = "select md5(string_agg(order_id || ' ' || amount || ' ' || note, ',' order by order_id))";
        let rows = |client: &Client, of: &str| -> String {
            self.runtime.block_on(client.query_one(&format!("{whole} from {of}"), &[])).unwrap().get(0)
        };
        let should = rows(&self.source, "orders");
        assert_eq!(rows(&warehouse, "orders_latest"), should);
        assert_eq!(rows(&warehouse, "orders_history where is_current"), should);
        self.world.verify();
    }
}

/// Lines that tell of the full disk, so far.
fn tries(running: &Running) -> Vec<String> {
    let err = running.err();
    err.lines().filter(|line| line.contains("No space left on device")).map(String::from).collect()
}

/// The pauses that were announced for one part of the pipeline, in their order.
fn pauses(tries: &[String], what: &str) -> Vec<String> {
    let of_part = tries.iter().filter(|line| line.contains(what));
    of_part.filter_map(|line| Some(line.rsplit_once("after=")?.1.trim().to_string())).collect()
}

/// The disk is that of a tablespace, which the warehouse is in with its temporary tables.
#[test]
fn a_full_disk_under_a_server_that_keeps_the_results_is_told_and_waited_for_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = small_disk(&folder, 24) else { return };
    let server = Server::start(&[]);
    let runtime = Runtime::new().unwrap();
    runtime.block_on(async {
        let small = format!("create tablespace small location '{}'", folder.path().display());
        server.connect("postgres").await.batch_execute(&small).await.unwrap();
    });
    let shop = Shop::with_warehouse(&server, &server, "tablespace small");
    let mut running = shop.world.run();
    shop.flood();
    until("tries with growing pauses", || {
        running.assert_running();
        pauses(&tries(&running), "source shop").windows(PAUSES.len()).any(|pauses| pauses == PAUSES).then_some(())
    });
    let told = tries(&running);
    println!("{}", told.join("\n"));
    for line in &told {
        for part in ["WARN trying again", "cannot ", "free space where the server keeps its data"] {
            assert!(line.contains(part), "{part:?} is not in: {line}");
        }
    }
    assert!(told.iter().any(|line| line.contains("stg_cdc_orders")), "{told:?}");
    shop.write_meanwhile();
    let last = "select count(*) from orders_history where order_id = 1000000";
    assert_eq!(shop.number(&shop.warehouse(), last), 0);
    disk.resize(1000);
    shop.comes_to_the_end(running);
}

/// The disk is that of the server's own log: without space for it, a server ends, and stays away until somebody has made
/// room and started it. Which of its processes finds out first is chance, and so is whether it can tell its client why.
#[test]
fn a_server_that_ended_for_want_of_space_for_its_own_log_is_waited_for_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = small_disk(&folder, 40) else { return };
    let server = Server::start(&[]);
    server.move_log(folder.path());
    server.start_again();
    let shop = Shop::with_warehouse(Server::shared(), &server, "");
    let mut running = shop.world.run();
    shop.flood();
    until("a try in vain", || {
        running.assert_running();
        let told = server.told();
        let is_full = told.lines().any(|line| line.contains("PANIC") && line.contains("No space left on device"));
        (is_full && running.err().contains("trying again")).then_some(())
    });
    println!("{}", running.err());
    shop.write_meanwhile();
    disk.resize(1000);
    server.kill();
    server.start_again();
    shop.comes_to_the_end(running);
}
