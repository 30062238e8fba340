//! What a store holds after its server, or a process that uses it, ended at the worst moment.

use std::cell::RefCell;
use std::sync::{Arc, mpsc};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::change::Op;
use shori_core::position::Position;
use shori_core::store::{Appended, Committed, OutputKind, OutputRows, RunRecord, RunStatus, Store};
use shori_core::{ErrorKind, failpoint};
use shori_postgres::PostgresStore;

use crate::server::Server;
use crate::store_output::{Version, closes, commit, version_rows, versions_target};
use crate::stored::*;

thread_local! {
    /// The place at which this thread kills a server, and which one.
    static ARMED: RefCell<Option<(&'static str, Arc<Server>)>> = const { RefCell::new(None) };
}

/// At `place`, once: all work of a test is done on its own thread.
fn kill_at(place: &'static str, server: &Arc<Server>) {
    failpoint::set_hook(|reached| {
        let armed = ARMED.with_borrow_mut(|armed| armed.take_if(|(place, _)| *place == reached));
        if let Some((_, server)) = armed {
            server.kill();
        }
    });
    ARMED.set(Some((place, server.clone())));
}

fn is_killed() -> bool {
    ARMED.with_borrow(Option::is_none)
}

async fn prepared(server: &Arc<Server>) -> Stored {
    let stored = Stored::on(server).await;
    stored.store.prepare_captures("t", "here", &[info("orders"), info("idle")]).await.unwrap();
    stored.store.prepare_target(&versions_target()).await.unwrap();
    stored
}

/// Commit `step`: two images, of a key that is new and of one that stands.
fn step_images(step: u64) -> Vec<Image> {
    vec![image(step, 0, Op::Insert, step as i64, "new"), image(step, 1, Op::UpdateAfter, step as i64 / 2, "again")]
}

async fn append_step(store: &PostgresStore, step: u64) -> shori_core::Result<Appended> {
    let before = if step == 1 { Position::ZERO } else { at(step - 1, 1) };
    let both = [("orders", before), ("idle", before)];
    append(store, &both, &[batch("orders", &step_images(step))], at(step, 1)).await
}

/// Key 1 gets one version at each step, and every step a key of its own.
async fn output_step(store: &PostgresStore, step: u64) -> shori_core::Result<Committed> {
    let version = |id: i64| Version { id, lsn: step, from: step as i64, to: None, text: format!("{step}") };
    let mut parts = Vec::new();
    if step > 1 {
        parts.push(OutputRows::Close(closes(&[(1, step as i64)])));
    }
    parts.push(OutputRows::Version(version_rows(&[version(1), version(1000 + step as i64)])));
    commit(store, &versions_target(), (step - 1, step), OutputKind::Versions, parts, Position::ZERO).await
}

async fn check(server: &Server, database: &str, appended: u64, written: u64) {
    let store = open(server, database);
    let all: Vec<Image> = (1..=appended).flat_map(step_images).collect();
    assert_eq!(whole_log(&store, "orders").await, all, "each change once, in order");
    for state in store.captures().await.unwrap().values() {
        assert_eq!(state.watermark.staged, at(appended, 1));
    }
    let checkpoint = store.checkpoint("dim_orders_history").await.unwrap().unwrap();
    assert_eq!(checkpoint.positions[&id("orders")], at(written, 0));
    let client = server.connect(database).await;
    let row = client
        .query_one(
            "select count(*), count(*) filter (where is_current), count(distinct surrogate_key), count(*) filter (
                where valid_to is distinct from (
                    select min(n.valid_from) from dim_orders_history n
                    where n.order_key = t.order_key and n.valid_from > t.valid_from)
             ) from dim_orders_history t",
            &[],
        )
        .await
        .unwrap();
    let numbers: Vec<i64> = (0..4).map(|column| row.get(column)).collect();
    let written = written as i64;
    assert_eq!(numbers, [2 * written, 1 + written, 2 * written, 0], "versions, current ones, surrogate keys, gaps");
}

#[tokio::test]
async fn contract10_a_server_killed_inside_a_transaction_has_none_of_it() {
    let server = Arc::new(Server::start(&[]));
    let Stored { store, database, .. } = prepared(&server).await;
    for step in 1..=3 {
        kill_at(failpoint::STORE_INSIDE_APPEND, &server);
        let lost = append_step(&store, step).await.unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::Unavailable, "{lost}");
        assert!(is_killed());
        let down = append_step(&store, step).await.unwrap_err();
        assert_eq!(down.kind(), ErrorKind::Unavailable, "{down}");
        server.start_again();
        // The same store goes on, without being opened anew.
        assert_eq!(append_step(&store, step).await.unwrap(), Appended::Applied { rows: 2 });
        assert_eq!(append_step(&store, step).await.unwrap(), Appended::AlreadyApplied);
        kill_at(failpoint::STORE_INSIDE_OUTPUT, &server);
        let lost = output_step(&store, step).await.unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::Unavailable, "{lost}");
        server.start_again();
        assert!(matches!(output_step(&store, step).await.unwrap(), Committed::Applied { .. }));
        assert_eq!(output_step(&store, step).await.unwrap(), Committed::AlreadyApplied);
        check(&server, &database, step, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contract10_a_server_killed_at_any_instant_has_all_of_what_was_told_and_nothing_twice() {
    let server = Arc::new(Server::start(&[]));
    let Stored { store, database, .. } = prepared(&server).await;
    let seed = std::env::var("SHORI_SEEDS").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut appended, mut written) = (0, 0);
    for _ in 0..5 {
        // Another thread kills the server some steps later, whatever is under way then.
        let (ready, when) = mpsc::channel::<()>();
        let (killed, spins) = (server.clone(), random.random_range(0..2_000_000u64));
        let killer = std::thread::spawn(move || {
            when.recv().unwrap();
            (0..spins).for_each(|_| std::hint::spin_loop());
            killed.kill();
        });
        let until = appended + random.random_range(1..20);
        loop {
            if appended == until {
                let _ = ready.send(());
            }
            match append_step(&store, appended + 1).await {
                Ok(Appended::Applied { .. } | Appended::AlreadyApplied) => appended += 1,
                Ok(Appended::Conflict) => panic!("nobody else writes"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                    break;
                }
            }
            match output_step(&store, written + 1).await {
                Ok(Committed::Applied { .. } | Committed::AlreadyApplied) => written += 1,
                Ok(Committed::Conflict) => panic!("nobody else writes"),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                    break;
                }
            }
        }
        killer.join().unwrap();
        server.start_again();
        // What was under way has happened or not: made again, it has happened once.
        append_step(&store, appended + 1).await.unwrap();
        output_step(&store, written + 1).await.unwrap();
        (appended, written) = (appended + 1, written + 1);
        check(&server, &database, appended, written).await;
    }
    println!("{appended} appends, {written} outputs, 5 kills");
}

#[tokio::test]
async fn a_call_that_is_dropped_is_done_or_not_done_and_holds_nobody_up() {
    let server = Arc::new(Server::start(&[]));
    let Stored { store, database, .. } = prepared(&server).await;
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for step in 1..=20 {
        let budget = random.random_range(0..60);
        let mut call = Box::pin(append_step(&store, step));
        // Polled a number of times only.
        for _ in 0..budget {
            if futures::poll!(&mut call).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(call);
        append_step(&store, step).await.unwrap();
        output_step(&store, step).await.unwrap();
    }
    check(&server, &database, 20, 20).await;
}

fn run(run_id: &str) -> RunRecord {
    RunRecord {
        pipeline: "demo".into(),
        run_id: run_id.into(),
        started: 5,
        ended: None,
        status: RunStatus::Running,
        records_processed: 0,
        records_successful: 0,
        records_failed: 0,
        error: None,
        metrics: "{}".into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spec4_18_a_run_is_closed_as_failed_only_when_its_owner_is_gone() {
    let server = Arc::new(Server::start(&[]));
    let Stored { store: one, client, database } = Stored::on(&server).await;
    let (two, three) = (open(&server, &database), open(&server, &database));
    let sql = "select string_agg(run_id || ' ' || status, ', ' order by run_id) from pipeline_metadata";
    let shown = async |client: &tokio_postgres::Client| client.query_one(sql, &[]).await.unwrap().get::<_, String>(0);
    one.start_run(&run("1")).await.unwrap();
    two.start_run(&run("2")).await.unwrap();
    assert_eq!(shown(&client).await, "1 running, 2 running", "both are alive");
    assert_eq!(three.start_run(&run("1")).await.unwrap_err().kind(), ErrorKind::InUse);
    drop(one);
    three.start_run(&run("3")).await.unwrap();
    assert_eq!(shown(&client).await, "1 failed, 2 running, 3 running", "one is gone, two is alive");
    // A server that was down has forgotten the locks: the run that is alive takes its own again.
    server.kill();
    server.start_again();
    let client = server.connect(&database).await;
    two.update_run(&RunRecord { records_processed: 3, ..run("2") }).await.unwrap();
    drop(three);
    let four = open(&server, &database);
    four.start_run(&run("4")).await.unwrap();
    assert_eq!(shown(&client).await, "1 failed, 2 running, 3 failed, 4 running");
    two.update_run(&RunRecord { ended: Some(9), status: RunStatus::Completed, ..run("2") }).await.unwrap();
    drop(four);
    open(&server, &database).start_run(&run("5")).await.unwrap();
    assert_eq!(shown(&client).await, "1 failed, 2 completed, 3 failed, 4 failed, 5 running");
}

/// Of two processes with the same work, each step is done by one.
#[tokio::test(flavor = "multi_thread")]
async fn contract6_two_workers_that_contend_do_each_step_once() {
    let server = Arc::new(Server::start(&[]));
    let Stored { store, database, .. } = prepared(&server).await;
    drop(store);
    let work = |store: PostgresStore| async move {
        let (mut applied, mut lost) = (0, 0);
        loop {
            let staged = store.captures().await.unwrap()[&id("orders")].watermark.staged;
            let step = staged.lsn.to_u64().unwrap() + 1;
            if step > 60 {
                return (applied, lost);
            }
            match append_step(&store, step).await.unwrap() {
                Appended::Applied { .. } => applied += 1,
                Appended::AlreadyApplied | Appended::Conflict => lost += 1,
            }
            let checkpoint = store.checkpoint("dim_orders_history").await.unwrap();
            let written = checkpoint.map_or(0, |at| at.positions[&id("orders")].lsn.to_u64().unwrap());
            if written < 60 {
                output_step(&store, written + 1).await.unwrap();
            }
        }
    };
    let workers: Vec<_> = (0..3).map(|_| tokio::spawn(work(open(&server, &database)))).collect();
    let mut done = Vec::new();
    for worker in workers {
        done.push(worker.await.unwrap());
    }
    println!("(applied, lost) of each worker: {done:?}");
    assert_eq!(done.iter().map(|(applied, _)| applied).sum::<u64>(), 60);
    let store = open(&server, &database);
    let checkpoint = store.checkpoint("dim_orders_history").await.unwrap().unwrap();
    let written = checkpoint.positions[&id("orders")].lsn.to_u64().unwrap();
    check(&server, &database, 60, written).await;
}
