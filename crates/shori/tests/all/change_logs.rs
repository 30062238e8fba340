//! Change logs, end to end: the log of one pipeline as files, from which another makes the same results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use crate::harness::{Rows, Running, World};
use crate::server::Server;
use crate::small_disk::SmallDisk;

const PROJECTIONS: &str = "
[[projection]]
name = \"orders_history\"
kind = \"history\"
table = \"orders\"
[[projection]]
name = \"customers_history\"
kind = \"history\"
table = \"customers\"
[[projection]]
name = \"orders_now\"
kind = \"latest\"
table = \"orders\"
[[projection]]
name = \"by_segment\"
kind = \"sql\"
sql = \"by_segment.sql\"
tables = [\"orders\", \"customers\"]
key = [\"segment\"]
";

const QUERY: &str = "
select customers.segment as segment, count(*) as orders_count, sum(orders.amount) as amount
from orders
join customers on customers.id = orders.customer_id
group by 1
";

const TABLES: &str = "
create table customers (id integer primary key, segment text not null);
create table orders (
    id integer primary key,
    customer_id integer not null,
    amount decimal(18, 2) not null,
    note text
);
insert into customers values (1, 'a'), (2, 'b'), (3, 'c');
insert into orders values (1, 1, 10.10, 'before'), (2, 2, 20.20, null), (3, 3, 30.30, 'before');
";

fn configuration(source: &str) -> String {
    format!(
        "[pipeline]
        name = \"shop\"
        [[source]]
        name = \"shop\"
        {source}
        tables.orders = {{}}
        tables.customers = {{}}
        [[store]]
        name = \"serving\"
        kind = \"duckdb\"
        path = \"serving.duckdb\"
        {PROJECTIONS}"
    )
}

fn origin() -> World {
    let source = "kind = \"sqlite\"\npath = \"source.db\"";
    World::configured(&configuration(source), &[("by_segment.sql", QUERY)], TABLES)
}

/// Reads what another pipeline has exported.
fn replay(folder: &Path) -> World {
    let source = format!("kind = \"files\"\npath = \"{}\"", folder.display());
    World::configured(&configuration(&source), &[("by_segment.sql", QUERY)], "")
}

fn results(world: &World) -> Vec<Rows> {
    let own = "exclude (surrogate_key, batch_id, created_at, updated_at)";
    ["orders_history", "customers_history", "orders_now", "by_segment"]
        .map(|name| {
            let own = if name.ends_with("history") { own } else { "" };
            world.query(&format!("select * {own} from {name} order by all"))
        })
        .into()
}

#[track_caller]
fn assert_same(origin: &World, replay: &World) {
    for (found, expected) in results(replay).into_iter().zip(results(origin)) {
        assert!(!expected.is_empty());
        assert_eq!(found, expected);
    }
}

fn transaction(rng: &mut ChaCha8Rng) -> String {
    let mut statements = vec!["begin immediate".to_string()];
    for _ in 0..rng.random_range(1..9) {
        let (id, customer) = (rng.random_range(1..60), rng.random_range(1..4));
        statements.push(match rng.random_range(0..8) {
            0..3 => format!("insert or replace into orders (id, customer_id, amount, note) values ({id}, {customer}, {id}.25, 'new')"),
            3..5 => format!("update orders set amount = amount + 1, note = 'paid' where id = {id}"),
            5 => format!("delete from orders where id between {id} and {id} + 2"),
            6 => format!("update or ignore orders set id = id + 100 where id = {id}"),
            _ => format!("update customers set segment = 'segment {id}' where id = {customer}"),
        });
    }
    statements.push("commit".into());
    statements.join("; ")
}

#[test]
fn a_log_written_as_files_makes_the_same_results() {
    let origin = origin();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let folder = origin.path("data/cdc_logs");
    origin.shori(&["export"]).tells(1, &["it has not run yet"]);
    origin.succeed(&["run", "--once"]);
    let done = origin.succeed(&["export", "--file-changes", "3"]);
    assert!(done.out.contains("orders: 3 changes") && done.out.contains("customers: 3 changes"), "{done:?}");
    let replay = replay(&folder);
    for round in 0..4 {
        match round {
            1 => origin.write("alter table orders add column extra integer; update orders set extra = id"),
            2 => drop(origin.succeed(&["resnapshot", "orders"])),
            _ => {}
        }
        for _ in 0..20 {
            origin.write(&transaction(&mut rng));
        }
        origin.succeed(&["run", "--once"]);
        let exported = origin.succeed(&["export", "--file-changes", "7", "--json"]).json();
        assert!(exported["tables"][1]["changes"].as_u64().unwrap() > 0, "{exported}");
        if round % 2 == 1 {
            replay.succeed(&["run", "--once"]);
            assert_same(&origin, &replay);
        }
    }
    origin.verify();
    // Nothing new, nothing written.
    let files = || walk(&folder).len();
    let before = files();
    let done = origin.succeed(&["export"]);
    assert!(done.out.contains("orders: 0 changes") && files() == before, "{done:?}");
    // One that begins later reads it all at once.
    let anew = self::replay(&folder);
    anew.succeed(&["check"]);
    anew.succeed(&["init"]);
    anew.succeed(&["run", "--once"]);
    assert_same(&origin, &anew);
    let status = anew.succeed(&["status", "--json"]).json();
    assert_eq!(status["captures"][0]["log_bytes_waiting"], 0, "{status}");
    let verified = anew.shori(&["verify"]);
    assert_eq!(verified.status, Some(1), "{verified:?}");
    assert!(verified.out.contains("verify the pipeline that wrote them"), "{verified:?}");
    anew.shori(&["init", "--release", "orders"]).tells(2, &["it is read from files"]);
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let tables = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    tables.flat_map(|table| std::fs::read_dir(table).unwrap().map(|entry| entry.unwrap().path())).collect()
}

/// Kills that come at named places, and at any moment.
const PLACES: [&str; 4] =
    ["export.before_publish:1", "export.after_file:1", "export.after_file:3", "export.after_file:4"];

#[test]
fn killed_again_and_again_an_export_and_a_replay_lose_and_double_nothing() {
    let origin = origin();
    let mut running = origin.run();
    origin.catch_up(&mut running);
    let replay = replay(&origin.path("data/cdc_logs"));
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let source = origin.source();
    let write = |transactions: usize, rng: &mut ChaCha8Rng| {
        for _ in 0..transactions {
            source.execute_batch(&transaction(rng)).unwrap();
        }
    };
    for round in 0..16 {
        write(15, &mut rng);
        let mut export = origin.command(&["export", "--file-changes", "5"]);
        if round % 2 == 0 {
            export.env("SHORI_FAILPOINT", PLACES[round / 2 % PLACES.len()]);
        }
        let export = Running::start(export);
        write(5, &mut rng);
        if round % 2 == 0 {
            let done = export.end();
            assert_eq!(done.status, None, "killed by itself: {done:?}");
        } else {
            kill_at_any_moment(export, &mut rng);
        }
        if round == 3 {
            origin.succeed(&["export", "--file-changes", "5"]);
        }
        if round > 3 {
            kill_at_any_moment(replay.start(&["run"]), &mut rng);
        }
    }
    origin.catch_up(&mut running);
    origin.verify();
    origin.succeed(&["export", "--file-changes", "5"]);
    replay.succeed(&["run", "--once"]);
    assert_same(&origin, &replay);
    running.stop();
}

/// Finished files of a folder of change logs, each with what it holds.
fn finished(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let is_finished = |path: &PathBuf| !path.file_name().unwrap().to_string_lossy().starts_with('.');
    let files = walk(folder).into_iter().filter(is_finished);
    files.map(|path| (path.strip_prefix(folder).unwrap().to_path_buf(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn a_full_disk_under_an_export_is_told_and_once_there_is_room_the_files_are_as_if_it_had_never_been() {
    let origin = origin();
    let (small, roomy) = (origin.path("small"), origin.path("roomy"));
    std::fs::create_dir(&small).unwrap();
    let Some(disk) = SmallDisk::mount(&small, 2) else { return };
    let export =
        |folder: &Path| origin.shori(&["export", "--file-changes", "500", "--to", &folder.display().to_string()]);
    let exported = |folder: &Path| assert_eq!(export(folder).status, Some(0));
    origin.succeed(&["run", "--once"]);
    [&small, &roomy].into_iter().for_each(|folder| exported(folder));
    let replay = replay(&small);
    replay.succeed(&["run", "--once"]);
    assert_same(&origin, &replay);
    let (before, shown) = (finished(&small), results(&replay));
    // More than fits, of the table whose files are written last, in files of which the first ones do.
    origin.write(
        "with recursive numbers(n) as (select 10 union all select n + 1 from numbers where n < 4000)
        insert into orders select n, 1 + n % 3, n || '.25', hex(randomblob(500)) from numbers;
        update customers set segment = 'later';
        delete from orders where id = 2;",
    );
    origin.succeed(&["run", "--once"]);
    for _ in 0..2 {
        let done = export(&small);
        println!("{}", done.err);
        done.tells(1, &["cannot write change log", &small.display().to_string(), "No space left", "free some space"]);
        assert!(done.out.is_empty(), "nothing is told to be written: {done:?}");
        assert_eq!(finished(&small), before, "nothing of it is shown");
        assert_eq!(walk(&small).len(), before.len(), "what cannot be finished does not fill the disk");
        replay.succeed(&["run", "--once"]);
        assert_eq!(results(&replay), shown, "who reads it has what was there before");
    }
    disk.resize(100);
    [&small, &roomy].into_iter().for_each(|folder| exported(folder));
    let undisturbed = finished(&roomy);
    assert!(undisturbed.len() > before.len() + 5, "{:?}", undisturbed.keys());
    assert!(finished(&small) == undisturbed, "{:?} for {:?}", finished(&small).keys(), undisturbed.keys());
    replay.succeed(&["run", "--once"]);
    assert_same(&origin, &replay);
}

fn kill_at_any_moment(running: Running, rng: &mut ChaCha8Rng) {
    std::thread::sleep(Duration::from_millis(rng.random_range(1..400)));
    running.kill();
}

#[test]
fn a_followed_export_is_read_while_it_goes_on() {
    let origin = origin();
    let mut running = origin.run();
    origin.catch_up(&mut running);
    origin.succeed(&["export"]);
    let export = origin.start(&["export", "--follow", "--every", "1"]);
    let replay = replay(&origin.path("data/cdc_logs"));
    let replaying = replay.run();
    origin.write("update orders set note = 'followed'");
    crate::harness::until("the change in the other pipeline", || {
        let rows = replay.try_query("select count(*) from orders_now where note = 'followed'").ok()?;
        (rows[0][0].as_deref() == Some("3")).then_some(())
    });
    replaying.stop();
    export.stop();
    running.stop();
    origin.succeed(&["run", "--once"]);
    origin.succeed(&["export"]);
    replay.succeed(&["run", "--once"]);
    assert_same(&origin, &replay);
}

#[test]
fn a_log_that_was_compacted_meanwhile_is_told_and_exported_anew() {
    let mut origin = origin();
    origin.succeed(&["run", "--once"]);
    origin.succeed(&["export"]);
    origin.configure(&(configuration("kind = \"sqlite\"\npath = \"source.db\"") + "[retention]\nkeep_hours = 0\n"));
    origin.write("update orders set amount = 1; update orders set amount = 2; delete from orders where id = 2");
    origin.succeed(&["run", "--once"]);
    origin.succeed(&["compact"]);
    origin.shori(&["export"]).tells(1, &["table orders", "compacted", "another folder", "retention.keep_hours"]);
    origin.succeed(&["export", "--to", "anew"]);
    let replay = replay(&origin.path("anew"));
    replay.succeed(&["run", "--once"]);
    let rows = |world: &World| world.query("select * from orders_now order by all");
    assert_eq!(rows(&replay), rows(&origin));
    origin.shori(&["export", "--table", "none"]).tells(2, &["table none"]);
    let replayed = replay.shori(&["resnapshot", "orders"]);
    assert_eq!(replayed.status, Some(1), "{replayed:?}");
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let replay = replay(&folder.path().join("none"));
    replay.shori(&["run", "--once"]).tells(1, &["none", "shori export"]);
    std::fs::create_dir(folder.path().join("none")).unwrap();
    let done = replay.shori(&["check"]);
    assert!(done.status == Some(1) && done.err.contains("the change log of table orders"), "{done:?}");
}

#[test]
fn a_log_of_a_server_kept_in_a_server_makes_the_same_results() {
    let server = Server::shared();
    let runtime = Runtime::new().unwrap();
    let (source, store) = runtime.block_on(async { (server.create_database().await, server.create_database().await) });
    let sql = |text: &str| {
        runtime.block_on(async { server.connect(&source).await.batch_execute(text).await }).unwrap();
    };
    // A note that lies apart, and is not sent where it does not change.
    sql("
        create table customers (id bigint primary key, segment text not null, note text);
        create table orders (id bigint primary key, customer_id bigint not null, amount numeric(18, 2), at timestamptz);
        alter table customers alter column note set storage external;
        insert into customers select n, 'segment ' || n % 3, repeat(md5(n::text), 100) from generate_series(1, 20) as n;
        insert into orders select n, 1 + n % 20, n / 100.0, now() from generate_series(1, 500) as n;
    ");
    let address = |database: &str| {
        format!("{{ host = \"127.0.0.1\", port = {}, database = \"{database}\", user = \"postgres\" }}", server.port())
    };
    let from = format!(
        "kind = \"postgres\"\nserver = {}\nslot = \"logs_{source}\"\nsnapshot_chunk_rows = 70",
        address(&source)
    );
    let log = format!("[[store]]\nname = \"log\"\nkind = \"postgres\"\nserver = {}\n[[projection]]", address(&store));
    let text = configuration(&from)
        .replacen("[[projection]]", &log, 1)
        .replace("kind = \"history\"", "kind = \"history\"\ntarget = \"serving\"");
    let text = text
        .replace("kind = \"latest\"", "kind = \"latest\"\ntarget = \"serving\"")
        .replace("kind = \"sql\"", "kind = \"sql\"\ntarget = \"serving\"");
    let text =
        text.replace("name = \"shop\"\n        [[source]]", "name = \"shop\"\nstaging = \"log\"\n        [[source]]");
    let origin = World::configured(&text, &[("by_segment.sql", QUERY)], "");
    let replay = replay(&origin.path("data/cdc_logs"));
    for round in 0..3 {
        origin.succeed(&["run", "--once"]);
        origin.succeed(&["export", "--file-changes", "50"]);
        if round != 1 {
            replay.succeed(&["run", "--once"]);
            assert_same(&origin, &replay);
        }
        sql("
            begin;
            update customers set segment = segment || '!' where id % 2 = 0;
            update orders set amount = amount + 0.01 where id % 3 = 0;
            commit;
            delete from orders where id % 50 = 1;
            update orders set id = -id where id % 70 = 2;
            insert into orders select n, 1, null, 'infinity' from generate_series(1001, 1010) as n on conflict do nothing;
        ");
    }
}
