//! What fails is told as what it is, with what to do about it; nothing is lost, doubled or let go of too early.

use std::time::{Duration, Instant};

use shori_core::ErrorKind;
use shori_core::change::Op;
use shori_core::secret::Secret;
use shori_core::source::{BatchLimit, Source};
use shori_postgres::inspect;

use crate::harness::{LIMIT, Reader, shown};
use crate::server::{SCRAM_PASSWORD, SCRAM_USER, Server};

const ITEMS: &str = "create table items (id bigint primary key, name text); insert into items values (1, 'a')";

async fn on(server: &Server) -> Reader {
    let database = server.create_database().await;
    Reader::over(server, &database, ITEMS, &["items"]).await
}

/// Connects the test's own client anew, after the server was away.
async fn reconnect(reader: &mut Reader, server: &Server) {
    reader.client = server.connect(&reader.config.server.database).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_told_and_not_shown() {
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.sql(&format!("grant pg_read_all_data to {SCRAM_USER}")).await;
    reader.config.server.user = SCRAM_USER.into();
    for password in [Some("canary-7461"), None] {
        reader.config.server.password = password.map(|password| Secret::new(password.to_string()));
        let error = reader.try_start().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        assert!(error.remedy().is_some_and(|remedy| remedy.contains("password")), "{error}");
        assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
    }
    reader.sql("create publication shori for table items").await;
    reader.config.server.password = Some(Secret::new(SCRAM_PASSWORD.to_string()));
    reader.start().await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("items")), "1,a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_is_unavailable_and_reading_goes_on_when_it_is_back() {
    let server = Server::start(&[]);
    let mut reader = on(&server).await;
    server.kill();
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    server.start_again();
    reconnect(&mut reader, &server).await;
    reader.start_again().await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
    for round in 0..3 {
        let (first, limit) = (10 + 1000 * round, BatchLimit { rows: 90, bytes: 1 << 20 });
        reader.sql(&format!("insert into items select i, 'b' from generate_series({first}, {first} + 899) i")).await;
        let goal = reader.log("items").len() + 200;
        reader.read_until_with(limit, "some of it is read", |reader| reader.log("items").len() >= goal).await;
        server.kill();
        let error = reader.read_until_error().await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert_eq!(reader.start_again().await.unwrap_err().kind(), ErrorKind::Unavailable);
        server.start_again();
        reconnect(&mut reader, &server).await;
        reader.start_again().await.unwrap();
        reader.try_read(limit).await.unwrap();
        reader.assert_equal("items").await;
    }
    assert_eq!(reader.log("items").len(), 1 + 3 * 900, "each image is there once");
}

/// Half-open: the connection stands, and nothing comes. So it is for the stream, and so for statements.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_keeps_silent_is_given_up() {
    let server = Server::start(&[]);
    let silent = async |kind: &str| {
        let mut reader = on(&server).await;
        reader.config.server.statement_timeout = Duration::from_secs(5);
        reader.start().await;
        reader.read().await;
        let database = &reader.config.server.database;
        let query = format!(
            "select pid from pg_stat_activity
            where datname = '{database}' and backend_type = '{kind}' and pid <> pg_backend_pid()"
        );
        let pid: i32 = reader.value(&query).await.parse().unwrap();
        server.freeze(pid);
        let begun = Instant::now();
        reader.sql("insert into items values (2, 'b')").await;
        let told = tokio::time::timeout(Duration::from_secs(40), reader.read_until_error()).await;
        server.thaw(pid);
        let error = told.unwrap_or_else(|_| panic!("a silent {kind} is not noticed"));
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(begun.elapsed() < Duration::from_secs(35), "after {:?}", begun.elapsed());
        reader.start_again().await.unwrap();
        reader.read().await;
        reader.assert_equal("items").await;
    };
    futures::join!(silent("walsender"), silent("client backend"));
}

/// The same where a statement may read a table whole. A lock holds it up until its process stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_keeps_silent_in_the_middle_of_a_chunk_is_given_up() {
    let server = Server::start(&[]);
    let mut reader = on(&server).await;
    reader.config.server.statement_timeout = Duration::from_secs(5);
    reader.config.read_timeout = Duration::from_secs(5);
    reader.start().await;
    let other = server.connect(&reader.config.server.database).await;
    other.batch_execute("begin; lock table items in access exclusive mode").await.unwrap();
    let freezing = async {
        let waits = "select pid from pg_stat_activity where application_name = 'shori' and wait_event_type = 'Lock'";
        let pid: i32 = loop {
            if let Some(row) = other.query_opt(waits, &[]).await.unwrap() {
                break row.get(0);
            }
        };
        server.freeze(pid);
        other.batch_execute("insert into items values (2, 'b'); commit").await.unwrap();
        pid
    };
    let begun = Instant::now();
    let reading = tokio::time::timeout(Duration::from_secs(40), reader.read_until_error());
    let (told, pid) = futures::join!(reading, freezing);
    server.thaw(pid);
    let error = told.expect("silence in a chunk is noticed");
    println!("after {:?}: {error}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("it has not answered for 10 s"), "{error}");
    reader.start_again().await.unwrap();
    reader.read().await;
    reader.assert_equal("items").await;
    let count = |op: Op| reader.ops("items").into_iter().filter(|is| *is == op).count();
    assert_eq!((count(Op::Snapshot), count(Op::Insert)), (2, 1), "each row once, and each change");
}

async fn drop_slot(reader: &mut Reader) {
    reader.source = None;
    let slot = reader.config.slot.clone();
    reader
        .wait_for(&format!("not exists (select from pg_replication_slots where slot_name = '{slot}' and active)"))
        .await;
    reader.sql(&format!("select pg_drop_replication_slot('{slot}')")).await;
}

/// Field 10.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_slot_is_a_gap_and_a_resnapshot_repairs_what_was_missed() {
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.sql("insert into items select i, 'a' from generate_series(2, 3000) i").await;
    reader.start().await;
    reader.read().await;
    drop_slot(&mut reader).await;
    reader.sql("delete from items where id % 3 = 0; update items set name = 'b' where id % 5 = 0").await;
    reader.sql("insert into items values (5000, 'c')").await;
    for _ in 0..2 {
        // The second start finds the slot that the first has made: still, what is between is missing.
        reader.stored.stopped.clear();
        reader.start().await;
        let (_, error) = reader.failed.pop().expect("the capture fails");
        assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
        assert!(error.to_string().contains("shori resnapshot items"), "{error}");
    }
    reader.resnapshot("items", false);
    reader.start().await;
    reader.sql("insert into items values (5001, 'd')").await;
    reader.read().await;
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_whose_log_was_removed_is_a_gap() {
    let settings = [("max_slot_wal_keep_size", "1MB"), ("min_wal_size", "32MB"), ("max_wal_size", "32MB")];
    let server = Server::start(&settings);
    let mut reader = on(&server).await;
    reader.start().await;
    reader.read().await;
    reader.source = None;
    let slot = reader.config.slot.clone();
    let status = format!("(select wal_status from pg_replication_slots where slot_name = '{slot}')");
    for round in 0..50 {
        assert!(round < 49, "the slot's log is never removed");
        reader.sql(&format!("insert into items values ({}, 'x')", 100 + round)).await;
        reader.sql("select pg_switch_wal()").await;
        reader.sql("checkpoint").await;
        if reader.value(&format!("select {status}")).await == "lost" {
            break;
        }
    }
    reader.sql("delete from items where id = 1").await;
    reader.start().await;
    let (_, error) = reader.failed.pop().expect("the capture fails");
    assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_another_reads_is_told() {
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.start().await;
    let mut other = shori_postgres::PostgresSource::new(reader.config.clone());
    let error = other.start(&reader.stored.known).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains(&reader.config.slot), "{error}");
    reader.read().await;
    reader.source = None;
    other.start(&reader.stored.known).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_server_is_not_read() {
    let server = Server::start(&[]);
    let mut reader = on(&server).await;
    reader.start().await;
    reader.read().await;
    reader.source = None;
    let copy = server.copy_data();
    server.start_again();
    reconnect(&mut reader, &server).await;
    reader.start().await;
    reader.sql("insert into items values (2, 'b')").await;
    reader.read().await;
    reader.source = None;
    server.restore_data(&copy);
    server.start_again();
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::SourceReplaced, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_under_the_same_name_has_another_identity() {
    let identity = async |server: Server| {
        let reader = on(&server).await;
        let mut source = shori_postgres::PostgresSource::new(reader.config.clone());
        source.start(&reader.stored.known).await.unwrap().identity
    };
    assert_ne!(identity(Server::start(&[])).await, identity(Server::start_unrelated(&[])).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_without_row_images_is_refused_with_what_to_run() {
    let server = Server::start(&[("wal_level", "replica")]);
    let mut reader = on(&server).await;
    let error = reader.try_start().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    let remedy = error.remedy().unwrap().to_string();
    assert!(
        inspect(&reader.config).await.unwrap().problems.iter().any(|problem| problem.to_string().contains(&remedy))
    );
    let statement = remedy.strip_prefix("run: ").unwrap().split(';').next().unwrap();
    reader.sql(statement).await;
    server.stop();
    server.start_again();
    reconnect(&mut reader, &server).await;
    reader.start().await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("items")), "1,a");
}

/// Each statement that is named is run, by one who may.
#[tokio::test(flavor = "multi_thread")]
async fn missing_rights_are_named_and_granted_by_what_is_named() {
    let server = Server::start(&[]);
    let mut reader = on(&server).await;
    reader
        .sql("create role \"Reader 1\" login; create schema \"Shop\"; create table \"Shop\".\"Parts\" (id bigint primary key); \
              create table \"Shop\".items (id bigint primary key); insert into \"Shop\".items values (1)")
        .await;
    reader.config.server.user = "Reader 1".into();
    reader.config.schema = "Shop".into();
    reader.config.tables.push(crate::harness::table("Parts"));
    let refused = reader.try_start().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Usage, "{refused}");
    let problems = inspect(&reader.config).await.unwrap().problems;
    let told: Vec<String> = problems.iter().map(|problem| problem.to_string()).collect();
    for right in ["replication", "usage on schema", "select on", "publication"] {
        assert!(told.iter().any(|told| told.contains(right)), "{right} in {told:?}");
    }
    for problem in &problems {
        let statement = problem.remedy().and_then(|remedy| remedy.strip_prefix("run: ")).unwrap();
        reader.sql(statement.trim_end_matches(", as its owner")).await;
    }
    let left = inspect(&reader.config).await.unwrap().problems;
    assert!(left.is_empty(), "{left:?} are left");
    reader.start().await;
    assert!(reader.failed.is_empty(), "{:?}", reader.failed);
    reader.read_until("it is read", |reader| reader.snapshot("items").is_done()).await;
    assert_eq!(reader.log("items").len(), 1);
}

/// Contract 5, and field 9.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_keeps_what_is_not_acknowledged_and_lets_go_of_what_is() {
    let server = Server::start(&[]);
    let mut reader = on(&server).await;
    reader.sql("create table other (id bigint)").await;
    reader.acknowledges = false;
    reader.start().await;
    reader.read().await;
    let slot = reader.config.slot.clone();
    let confirmed = format!("select confirmed_flush_lsn from pg_replication_slots where slot_name = '{slot}'");
    let before = reader.value(&confirmed).await;
    reader.sql("insert into items values (2, 'b'), (3, 'c')").await;
    let own = reader.value("select pg_current_wal_lsn()").await;
    reader.read().await;
    for _ in 0..3 {
        // Reading on asks the server, and answers it.
        reader.sql("insert into other values (1)").await;
        reader.read().await;
    }
    assert_eq!(reader.value(&confirmed).await, before, "nothing was acknowledged");
    let staged = reader.watermark.staged;
    reader.source.as_mut().unwrap().acknowledge(&staged).await.unwrap();
    reader.wait_for(&format!("({confirmed}) >= '{own}'::pg_lsn")).await;
    // Another table is written to, this one is not.
    reader.acknowledges = true;
    for round in 0..3 {
        reader.sql(&format!("insert into other select {round} from generate_series(1, 1000)")).await;
        let now = reader.value("select pg_current_wal_lsn()").await;
        reader.read().await;
        reader.wait_for(&format!("({confirmed}) >= '{now}'::pg_lsn")).await;
    }
}

/// What is acknowledged in the middle of a transaction is not its commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_acknowledged_in_part_is_sent_again() {
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items select i, 'b' from generate_series(2, 100) i").await;
    let limit = BatchLimit { rows: 10, bytes: 1 << 20 };
    reader.read_until_with(limit, "some of it is read", |reader| reader.log("items").len() >= 31).await;
    let restarts = 3;
    for _ in 0..restarts {
        reader.start().await;
        let goal = reader.log("items").len() + 10;
        reader.read_until_with(limit, "more is read", |reader| reader.log("items").len() >= goal).await;
    }
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
    assert_eq!(reader.log("items").len(), 100);
}

/// A publication that was made anew is unknown to what was committed before.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_dropped_is_a_gap() {
    let mut reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.source = None;
    reader.sql("drop publication shori").await;
    reader.sql("insert into items values (2, 'b')").await;
    let mut told = None;
    if let Err(error) = reader.try_start().await {
        told = Some(error);
    } else if reader.failed.is_empty() {
        let reading = async {
            while reader.failed.is_empty() {
                let more = reader.step(LIMIT).await?.more;
                if !more {
                    reader.source.as_mut().unwrap().wait(Duration::from_millis(100)).await?;
                }
            }
            Ok(())
        };
        told = tokio::time::timeout(Duration::from_secs(10), reading).await.expect("it is told").err();
    }
    let error = told.or_else(|| reader.failed.pop().map(|(_, error)| error)).unwrap();
    assert_eq!(error.kind(), ErrorKind::Gap, "{error}");
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}
