//! A pipeline over polled tables of a real PostgreSQL, end to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use crate::harness::{Running, World, until};
use crate::server::Server;

const TABLES: &str = "
create table orders (
    order_id bigint primary key,
    amount numeric(18, 2) not null,
    status text not null,
    last_updated timestamp not null default now()
);
create index on orders (last_updated);
insert into orders select n, n / 100.0, 'open' from generate_series(1, 5000) as n;
";

/// Versions that are as the one before.
const DOUBLED: &str = "
select count(*)
from (
    select
        struct_pack(amount, status, last_updated) as version,
        lag(struct_pack(amount, status, last_updated)) over (partition by order_id order by valid_from) as before
    from orders_history
)
where version = before";

struct Shop {
    world: World,
    runtime: Runtime,
    database: String,
}

impl Shop {
    fn over(server: &Server) -> Self {
        let runtime = Runtime::new().unwrap();
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
            capture = \"timestamp\"
            poll_seconds = 1
            server = {{ host = \"127.0.0.1\", port = {}, database = \"{database}\", user = \"postgres\" }}
            snapshot_chunk_rows = 700
            tables.orders = {{ changed_at = \"last_updated\" }}
            [[store]]
            name = \"serving\"
            kind = \"duckdb\"
            path = \"serving.duckdb\"
            [[projection]]
            name = \"orders_history\"
            kind = \"history\"
            table = \"orders\"
            [[projection]]
            name = \"orders_latest\"
            kind = \"latest\"
            table = \"orders\"
            [ingest]
            batch_max_rows = 500
            ",
            server.port()
        );
        let world = World::configured(&configuration, &[], "");
        Self { world, runtime, database }
    }

    fn sql(&self, server: &Server, statements: &str) {
        self.runtime.block_on(async {
            server.connect(&self.database).await.batch_execute(statements).await.unwrap();
        });
    }

    #[track_caller]
    fn assert_verified(&self) {
        self.world.succeed(&["run", "--once"]);
        let done = self.world.succeed(&["verify"]);
        assert_eq!(done.out.matches("  ok").count(), 2, "{done:?}");
        assert_eq!(self.world.value(DOUBLED), "0", "no version comes twice");
    }
}

fn transaction(random: &mut ChaCha8Rng) -> String {
    let id = random.random_range(1..5200);
    match random.random_range(0..4) {
        0 => format!("insert into orders values ({id}, 1.25, 'new') on conflict do nothing"),
        1 => format!(
            "begin; update orders set status = 'all', last_updated = now() where order_id > {id}; savepoint s;
            update orders set status = 'part', last_updated = now() where order_id = {id}; commit"
        ),
        _ => format!("update orders set amount = amount + 1, last_updated = now() where order_id = {id}"),
    }
}

#[test]
fn killed_again_and_again_polls_lose_and_double_nothing() {
    let server = Server::shared();
    let shop = Shop::over(server);
    let (stop, commits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writer = {
        let (stop, commits, database) = (stop.clone(), commits.clone(), shop.database.clone());
        shop.runtime.spawn(async move {
            let mut random = ChaCha8Rng::seed_from_u64(7);
            let client = server.connect(&database).await;
            while !stop.load(Ordering::Relaxed) {
                client.batch_execute(&transaction(&mut random)).await.unwrap();
                commits.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    for round in 0..6 {
        let before = commits.load(Ordering::Relaxed);
        let running: Running = shop.world.run();
        until("some commits", || (commits.load(Ordering::Relaxed) >= before + 40 * (1 + round)).then_some(()));
        running.kill();
    }
    stop.store(true, Ordering::Relaxed);
    shop.runtime.block_on(writer).unwrap();
    shop.assert_verified();
    let updates = "select count(*) from orders_history where cdc_operation = 'UPDATE'";
    assert_ne!(shop.world.value(updates), "0");
    let status = shop.world.succeed(&["status", "--json"]).json();
    assert!(status["captures"][0]["log_bytes_waiting"].is_null(), "{status}");
    // What no poll sees, verify tells and a resnapshot mends.
    shop.sql(server, "delete from orders where order_id <= 1000");
    shop.world.succeed(&["run", "--once"]);
    let done = shop.world.shori(&["verify"]);
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.out.contains("captured by timestamp, which sees neither deletions nor"), "{done:?}");
    shop.world.succeed(&["resnapshot", "orders"]);
    shop.assert_verified();
    let gone = "select count(*) from orders_history where order_id <= 1000 and is_current";
    assert_eq!(shop.world.value(gone), "0");
}

#[test]
fn what_polls_do_not_see_is_told_and_what_they_lack_refused() {
    let server = Server::shared();
    let shop = Shop::over(server);
    let done = shop.world.succeed(&["check"]);
    for part in ["note: source shop is captured by timestamp", "rows that are deleted", "public.orders (last_updated)"]
    {
        assert!(done.out.contains(part), "{part:?} is not in {done:?}");
    }
    shop.sql(server, "drop index orders_last_updated_idx");
    let done = shop.world.succeed(&["check"]);
    assert!(done.out.contains("create index on public.orders (\"last_updated\")"), "{done:?}");
    let done = shop.world.succeed(&["run", "--once"]);
    assert!(done.err.contains("rows that are deleted"), "{done:?}");
    let configuration = std::fs::read_to_string(shop.world.path("shori.toml")).unwrap();
    let kind = "kind = \"postgres\"\n            capture";
    for (from, to, cause) in [
        ("{ changed_at = \"last_updated\" }", "{}", "table orders of source shop"),
        ("{ changed_at = \"last_updated\" }", "{}", "it has no changed_at"),
        ("\"last_updated\"", "\"lastupdated\"", "table public.orders: it has no column lastupdated"),
        ("\"last_updated\"", "\"status\"", "column status, its changed_at, is of type text"),
        ("\"timestamp\"", "\"logical\"", "it has poll_seconds, which is for capture \"timestamp\""),
        ("\"timestamp\"", "\"logical\"", "it has changed_at, which is for capture \"timestamp\""),
        ("\"timestamp\"", "\"polling\"", "unknown variant `polling`"),
        ("poll_seconds = 1", "slot = \"mine\"", "it has slot, which is for capture \"logical\""),
        ("poll_seconds = 1", "poll_seconds = 0", "poll_seconds of source shop"),
        (kind, "kind = \"sqlite\"\npath = \"source.db\"\ncapture", "it has capture, which is for kind \"postgres\""),
    ] {
        assert!(configuration.contains(from), "{from}");
        std::fs::write(shop.world.path("shori.toml"), configuration.replacen(from, to, 1)).unwrap();
        let done = shop.world.shori(&["check"]);
        assert!(done.err.contains(cause), "{to}: {done:?}");
        assert_ne!(done.status, Some(0), "{to}: {done:?}");
    }
}
