//! Tables are read whole while they are written to, and what is told at each boundary is what they held there.

use shori_core::change::Op;
use shori_core::position::Position;
use shori_core::source::BatchLimit;

use crate::harness::{LIMIT, Reader, shown, table};
use crate::server::Server;
use crate::writers::{Writers, seed, transfer};

const ACCOUNTS: i64 = 20_000;
const COLUMNS: &str = "id bigint primary key, owner bigint, balance bigint not null, note text";
const FILLED: &str =
    "insert into accounts select i, i % 1000, 100, repeat('n', (i % 200)::int) from generate_series(0, 19999) i;";

fn accounts() -> String {
    format!("create table accounts ({COLUMNS}) with (fillfactor = 70); create index on accounts (owner); {FILLED}")
}

/// Rows are never fewer or more, and no money comes or goes, at any boundary since the first snapshot has ended.
fn assert_invariant(reader: &Reader) {
    let first = reader.stored.ended[&reader.capture("accounts")][0].end;
    let mut replay = reader.replay("accounts");
    let mut looked = 0;
    for boundary in reader.boundaries.range(first..) {
        replay.advance(boundary);
        let sum: i64 = replay.rows.values().map(|(_, row)| row.row[2].integer()).sum();
        assert_eq!((replay.rows.len() as i64, sum), (ACCOUNTS, 100 * ACCOUNTS), "at {boundary}");
        looked += 1;
    }
    assert!(looked > 10, "{looked} boundaries");
}

/// Reads until the running snapshot is done. `after_chunk` is given the number of chunks so far.
async fn read_snapshot(reader: &mut Reader, table: &str, limit: BatchLimit, restart: bool) -> u32 {
    let mut chunks = 0;
    while !reader.snapshot(table).is_done() {
        let batch = reader.step(limit).await.unwrap();
        if !batch.snapshots.is_empty() {
            chunks += 1;
            if restart {
                reader.start().await;
            }
        }
    }
    chunks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_is_read_whole_while_money_moves_in_it() {
    let seed = seed();
    let server = Server::shared();
    let database = server.create_database().await;
    let mut reader = Reader::over(server, &database, &accounts(), &["accounts"]).await;
    reader.config.snapshot_chunk_rows = 500;
    reader.start().await;
    let writers = Writers::start(server, &database, 4, seed, |random| transfer(random, ACCOUNTS)).await;
    let limit = BatchLimit { rows: 200, bytes: 1 << 20 };
    let chunks = read_snapshot(&mut reader, "accounts", LIMIT, false).await;
    assert!(chunks >= 30, "{chunks} chunks");
    let more = writers.committed() + 200;
    while writers.committed() < more {
        reader.step(limit).await.unwrap();
    }
    // Once more, while they go on: what stands is right all the time.
    reader.resnapshot("accounts", false);
    reader.start().await;
    read_snapshot(&mut reader, "accounts", LIMIT, false).await;
    assert_eq!(reader.snapshot("accounts").generation, 2);
    writers.end().await;
    reader.try_read(limit).await.unwrap();
    reader.assert_equal("accounts").await;
    assert_invariant(&reader);
    assert!(reader.failed.is_empty() && reader.rejected.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_goes_on_after_every_chunk_in_another_process() {
    let seed = seed();
    let server = Server::shared();
    let database = server.create_database().await;
    let mut reader = Reader::over(server, &database, &accounts(), &["accounts"]).await;
    reader.config.snapshot_chunk_rows = 1500;
    reader.start().await;
    let writers = Writers::start(server, &database, 2, seed, |random| transfer(random, ACCOUNTS)).await;
    let chunks = read_snapshot(&mut reader, "accounts", BatchLimit { rows: 1500, bytes: 1 << 20 }, true).await;
    assert!(chunks >= 13, "{chunks} chunks");
    let more = writers.committed() + 200;
    while writers.committed() < more {
        reader.step(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    }
    writers.end().await;
    reader.try_read(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    reader.assert_equal("accounts").await;
    assert_invariant(&reader);
    // Nothing is read again but what was being read.
    let snapshot_rows = reader.ops("accounts").iter().filter(|op| **op == Op::Snapshot).count() as i64;
    assert!(snapshot_rows < ACCOUNTS * 3 / 2, "{snapshot_rows} rows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rewritten_meanwhile_is_whole() {
    let seed = seed();
    let server = Server::shared();
    let database = server.create_database().await;
    let mut reader = Reader::over(server, &database, &accounts(), &["accounts"]).await;
    reader.start().await;
    let writers = Writers::start(server, &database, 2, seed, |random| transfer(random, ACCOUNTS)).await;
    for rewriting in ["vacuum full accounts", "cluster accounts using accounts_pkey", "vacuum accounts"] {
        let rows = reader.snapshot("accounts").rows;
        reader.read_until("chunks are read", |reader| reader.snapshot("accounts").rows > rows + 5000).await;
        reader.sql(rewriting).await;
    }
    read_snapshot(&mut reader, "accounts", LIMIT, false).await;
    let more = writers.committed() + 100;
    while writers.committed() < more {
        reader.step(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    }
    writers.end().await;
    reader.try_read(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    reader.assert_equal("accounts").await;
    assert_invariant(&reader);
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_are_one_table() {
    let seed = seed();
    let server = Server::shared();
    let database = server.create_database().await;
    let sql = format!(
        "create table accounts (id bigint, owner bigint, balance bigint not null, note text, primary key (id, owner))
         partition by range (owner);
         create table accounts_low partition of accounts for values from (minvalue) to (300);
         create table accounts_high partition of accounts for values from (300) to (maxvalue) partition by range (owner);
         create table accounts_middle partition of accounts_high for values from (300) to (700);
         create table accounts_top partition of accounts_high for values from (700) to (maxvalue);
         {FILLED}"
    );
    let mut reader = Reader::over(server, &database, &sql, &["accounts"]).await;
    reader.start().await;
    let writers = Writers::start(server, &database, 3, seed, |random| transfer(random, ACCOUNTS)).await;
    read_snapshot(&mut reader, "accounts", LIMIT, false).await;
    let more = writers.committed() + 100;
    while writers.committed() < more {
        reader.step(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    }
    writers.end().await;
    reader.try_read(BatchLimit { rows: 20, bytes: 1 << 20 }).await.unwrap();
    reader.assert_equal("accounts").await;
    assert_invariant(&reader);
    let moves = reader.ops("accounts").iter().filter(|op| **op == Op::Delete).count();
    assert!(moves > 0, "rows went from one partition to another");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_without_rows_is_done_at_once() {
    let mut reader = Reader::fresh("create table items (id bigint primary key)", &["items"]).await;
    reader.start().await;
    reader.read().await;
    assert!(reader.snapshot("items").is_done());
    assert_eq!((reader.snapshot("items").rows, reader.log("items").len()), (0, 0));
    reader.sql("insert into items values (1)").await;
    reader.read().await;
    assert_eq!(shown(&reader.rows("items")), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_columns_are_carried() {
    let columns: Vec<String> = (0..999).map(|index| format!("c{index} int")).collect();
    let sql = format!(
        "create table wide (id bigint primary key, {}); insert into wide (id, c0, c998) select i, i, -i from generate_series(1, 50) i",
        columns.join(", ")
    );
    let mut reader = Reader::fresh(&sql, &["wide"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("update wide set c500 = c998; delete from wide where id > 40; insert into wide (id) values (100)").await;
    reader.read().await;
    reader.assert_equal("wide").await;
    assert_eq!(reader.rows("wide")[0].len(), 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_publication_leaves_out_are_left_out() {
    let sql = "
        create table items (id bigint primary key, region text, size bigint);
        insert into items select i, case when i % 2 = 0 then 'eu' else 'us' end, i from generate_series(1, 3000) i;
        alter table items replica identity full;
        create publication shori for table items where (region = 'eu' or size < 0);";
    let mut reader = Reader::fresh(sql, &["items"]).await;
    reader.start().await;
    reader.read().await;
    let matches = |reader: &Reader, should: Vec<_>| {
        let is = reader.rows("items");
        assert!(is == should, "{} rows for {}", is.len(), should.len());
    };
    let query = "select * from items where region = 'eu' or size < 0";
    matches(&reader, reader.printed(query).await);
    reader.sql("update items set region = 'us' where id < 500; update items set region = 'eu' where id > 2500").await;
    reader.sql("delete from items where id % 7 = 0; update items set size = -size where id % 5 = 0").await;
    reader.read().await;
    matches(&reader, reader.printed(query).await);
}

/// What the publication keeps back must not leave the source by another way.
#[tokio::test(flavor = "multi_thread")]
async fn columns_that_the_publication_leaves_out_are_left_out() {
    let sql = "
        create table people (id bigint primary key, name text, secret text);
        insert into people values (1, 'a', 'canary'), (2, 'b', 'canary');
        create publication shori for table people (id, name);";
    let mut reader = Reader::fresh(sql, &["people"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("update people set name = 'c' where id = 1").await;
    reader.read().await;
    let log = format!("{:?}", reader.log("people").iter().map(|row| row.row.clone()).collect::<Vec<_>>());
    assert!(!log.contains("canary"), "{log}");
    let rows = reader.rows("people");
    assert!(rows.iter().all(|row| row.len() == 2), "{rows:?}");
    assert_eq!(shown(&rows), "1,c 2,b");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_added_later_is_read_whole_and_its_neighbours_go_on() {
    let sql = "
        create table items (id bigint primary key);
        create table parts (id bigint primary key);
        insert into items values (1); insert into parts select generate_series(1, 2500);";
    let mut reader = Reader::fresh(sql, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("insert into items values (2); insert into parts values (9000)").await;
    reader.config.tables.push(table("parts"));
    reader.start().await;
    reader.sql("insert into items values (3); delete from parts where id % 2 = 0").await;
    reader.read().await;
    reader.assert_equal("items").await;
    reader.assert_equal("parts").await;
    assert_eq!(reader.ops("items").iter().filter(|op| **op == Op::Snapshot).count(), 1);
}

/// A change before its table was published is not sent, though its transaction ends after.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_added_later_has_what_was_being_written_then() {
    // A transaction that is open for long would hold up the slots of other tests.
    let server = Server::start(&[]);
    let database = server.create_database().await;
    let sql = "create table items (id bigint primary key); create table parts (id bigint primary key)";
    let mut reader = Reader::over(&server, &database, sql, &["items"]).await;
    reader.start().await;
    reader.read().await;
    let writer = server.connect(&database).await;
    writer.batch_execute("begin; insert into parts values (1)").await.unwrap();
    reader.config.tables.push(table("parts"));
    let reading = async {
        reader.start().await;
        reader.read_until("the table is read", |reader| reader.snapshot("parts").is_done()).await;
    };
    // It may well wait for the writer.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), reading).await;
    writer.batch_execute("insert into parts values (2); commit").await.unwrap();
    reader.start().await;
    reader.read().await;
    reader.assert_equal("parts").await;
}

/// Field 11: while no image of a row is there yet, what an update does not bring is read from the source.
#[tokio::test(flavor = "multi_thread")]
async fn unchanged_large_values_are_completed_while_the_table_is_read() {
    for as_text in [false, true] {
        let sql = "
            create table files (id bigint primary key, name text, body text, span interval);
            insert into files
            select i, 'a', (select string_agg(md5(i || '.' || j), '') from generate_series(1, 200) j), i * interval '1 day'
            from generate_series(1, 400) i;";
        let mut reader = Reader::fresh(sql, &["files"]).await;
        if as_text {
            reader.config.tables[0].columns.insert("span".into(), "text".into());
        } else {
            reader.sql("alter table files drop column span").await;
        }
        reader.config.snapshot_chunk_rows = 50;
        reader.start().await;
        let step = |rows: u64| move |reader: &Reader| reader.snapshot("files").rows >= rows;
        reader.read_until("some chunks are read", step(50)).await;
        reader
            .sql("delete from files where id % 3 = 0 and id < 100; update files set name = 'b' where id % 2 = 0")
            .await;
        reader.sql("vacuum files").await;
        reader.sql("update files set name = 'c' where id > 300; update files set id = -id where id > 350").await;
        reader.read_until("more chunks are read", step(150)).await;
        reader.start().await;
        reader.sql("update files set name = 'd' where id < -380; delete from files where id < -390").await;
        reader.read().await;
        reader.assert_equal("files").await;
        assert!(reader.log("files").iter().any(|row| row.op == Op::UpdateAfter && row.unchanged.is_empty()));
    }
}

/// One capture may be ahead of the others (its neighbours stood still): its chunks stand above what is stored of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_capture_that_is_ahead_is_read_whole_again() {
    let sql = "
        create table items (id bigint primary key); insert into items values (1);
        create table parts (id bigint primary key); insert into parts values (1);";
    let mut reader = Reader::fresh(sql, &["items", "parts"]).await;
    reader.acknowledges = false;
    reader.start().await;
    reader.read().await;
    let behind = reader.stored.known[&reader.capture("parts")].clone();
    reader.sql("insert into items values (2)").await;
    reader.sql("insert into items values (3)").await;
    reader.read().await;
    let parts = reader.capture("parts");
    reader.stored.known.insert(parts, behind);
    reader.resnapshot("items", false);
    reader.start().await;
    reader.read_until("it is read whole", |reader| reader.snapshot("items").is_done()).await;
    reader.read().await;
    let snapshots = reader.log("items").iter().filter(|row| row.op == Op::Snapshot);
    let last: Vec<Position> = snapshots.map(|row| row.position).collect();
    assert_eq!(last.len(), 4, "the rows of both snapshots are in the log");
    reader.assert_equal("items").await;
    reader.assert_equal("parts").await;
}

/// Where nothing is written, a place that ends on a page or a file is reached all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_a_server_at_rest_becomes_visible_at_once() {
    let server = Server::start(&[]);
    let database = server.create_database().await;
    let sql = "create table items (id bigint primary key); insert into items values (1)";
    let mut reader = Reader::over(&server, &database, sql, &["items"]).await;
    reader.start().await;
    reader.read().await;
    reader.sql("checkpoint").await;
    reader.sql("select pg_switch_wal()").await;
    reader.resnapshot("items", false);
    reader.start().await;
    let begun = std::time::Instant::now();
    reader.read_until("it is read whole", |reader| reader.snapshot("items").is_done()).await;
    reader.read_until("it is visible", |reader| reader.watermark.boundary >= reader.snapshot("items").end).await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "after {:?}", begun.elapsed());
}
