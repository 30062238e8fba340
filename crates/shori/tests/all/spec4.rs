//! What a projection shows, and when: the items of the specification's list of what others got wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{World, until};
use crate::small::{CONFIGURATION, FILES, SOURCE, names, small};

/// A statement that inserts `count` things above those there.
fn insert_things(count: u32) -> String {
    format!(
        "with recursive numbers(n) as (select 1 union all select n + 1 from numbers where n < {count})
        insert into things (name, amount) select 'of many', '1.00' from numbers;"
    )
}

#[test]
fn spec4_01_a_transaction_larger_than_a_batch_is_whole_or_not_there() {
    const ROWS: u32 = 100_001;
    let mut world = small();
    world.configure(&format!("{CONFIGURATION}\n[ingest]\nbatch_max_rows = 1000\n"));
    world.succeed(&["run", "--once"]);
    world.write(&format!("begin immediate; {} commit;", insert_things(ROWS)));
    let mut counts = Vec::new();
    let mut look = |world: &World| {
        let query = "select (select count(*) from things_latest),
            (select count(*) from things_history),
            (select coalesce(sum(amount), 0)::bigint from amount_by_name where name = 'of many')";
        let row = &world.try_query(query).ok()?[0];
        let found: Vec<u32> = row.iter().map(|count| count.as_ref().unwrap().parse().unwrap()).collect();
        assert!([2, ROWS + 2].contains(&found[0]) && [2, ROWS + 2].contains(&found[1]), "half visible: {found:?}");
        assert!([0, ROWS].contains(&found[2]), "half visible: {found:?}");
        counts.push(found.clone());
        Some(found)
    };
    for kill_at in [10_000, 40_000, 80_000] {
        let mut running = world.run();
        let staged = "select max(last_ingested_lsn) >= unhex('STAGED') from ctl_ingestion_watermarks";
        let staged = staged.replace("STAGED", &format!("{kill_at:016x}"));
        until("staged rows", || {
            running.assert_running();
            look(&world);
            (world.try_query(&staged).ok()?[0][0].as_deref() == Some("true")).then_some(())
        });
        running.kill();
        assert_eq!(look(&world).unwrap()[0], 2, "nothing of it is visible");
    }
    let mut running = world.run();
    until("all of it", || {
        running.assert_running();
        (look(&world)? == [ROWS + 2, ROWS + 2, ROWS]).then_some(())
    });
    world.catch_up(&mut running);
    running.stop();
    world.verify();
    println!("{} looks", counts.len());
}

#[test]
fn spec4_02_an_idle_table_freezes_no_projection() {
    let mut world = small();
    let joined = "\n[[projection]]\nname = \"joined\"\nkind = \"sql\"\nsql = \"joined.sql\"\ntables = [\"things\", \"others\"]\nkey = [\"id\"]\n
        [projection.entity]\nthings = \"id\"\nothers = \"id\"\n";
    world.configure(&format!("{CONFIGURATION}{joined}"));
    world.put("joined.sql", "select things.id, others.name as other, amount from things left join others using (id)");
    let mut running = world.run();
    world.catch_up(&mut running);
    for round in 0..5 {
        world.write(&format!("update things set amount = '{round}.00'"));
        // Every projection, those of the idle table too, comes to the newest change.
        world.catch_up(&mut running);
        assert_eq!(world.value("select count(distinct amount) from joined"), "1");
        assert_eq!(world.value("select max(amount) from joined"), format!("{round}.00"));
    }
    let watermarks = "select count(distinct last_ingested_lsn) from ctl_ingestion_watermarks";
    assert_eq!(world.value(watermarks), "1", "the idle table's watermark moves too");
    running.stop();
    world.verify();
}

#[test]
fn spec4_03_a_projection_holds_all_up_to_its_place_and_nothing_after() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, source) = (stop.clone(), world.source());
    let application = std::thread::spawn(move || {
        let mut number = 0;
        while !stopped.load(Ordering::Relaxed) {
            number += 1;
            // One transaction over two tables and several rows.
            source
                .execute_batch(&format!(
                    "begin immediate; update things set amount = '{number}'; update others set name = '{number}'; commit;"
                ))
                .unwrap();
        }
    });
    let query = "
        select
            (select min(amount)::bigint from things_latest),
            (select max(amount)::bigint from things_latest),
            (select count(*) from things_history),
            lower(hex(as_of_lsn)),
            epoch_us(as_of_time)
        from ctl_projection_metadata
        where projection_name = 'NAME'";
    let (mut latest, mut history) = (Vec::new(), Vec::new());
    until("some looks at moving projections", || {
        running.assert_running();
        latest.push(world.query(&query.replace("NAME", "things_latest")).remove(0));
        history.push(world.query(&query.replace("NAME", "things_history")).remove(0));
        latest.dedup();
        (latest.len() >= 30).then_some(())
    });
    stop.store(true, Ordering::Relaxed);
    application.join().unwrap();
    let source = world.source();
    let number = |text: &Option<String>| text.as_ref().unwrap().parse::<i64>().unwrap();
    let place = |row: &[Option<String>]| i64::from_str_radix(row[3].as_ref().unwrap(), 16).unwrap();
    let of_things = "from _shori_changes join _shori_captures on number = capture
        where table_name = 'things' and op in (2, 4) and id <= ?1";
    for row in latest.iter().filter(|row| place(row) > 0) {
        let amount = format!("select cast(v2 as integer) {of_things} order by id desc limit 1");
        let expected: i64 = source.query_row(&amount, [place(row)], |row| row.get(0)).unwrap();
        assert_eq!((number(&row[0]), number(&row[1])), (expected, expected), "{row:?}");
        let time = "select at_us from _shori_changes where id <= ?1 order by id desc limit 1";
        let committed: i64 = source.query_row(time, [place(row)], |row| row.get(0)).unwrap();
        assert_eq!(number(&row[4]), committed, "as_of_time is when the source committed");
    }
    for row in &history {
        let images: i64 =
            source.query_row(&format!("select count(*) {of_things}"), [place(row)], |row| row.get(0)).unwrap();
        assert_eq!(number(&row[2]), images + 2, "{row:?}");
    }
    world.catch_up(&mut running);
    world.verify();
}

#[test]
fn spec4_04_rows_from_before_capture_are_handed_over_without_gap_or_duplicate() {
    let mut world = World::configured(CONFIGURATION, &FILES, &format!("{SOURCE}{}", insert_things(6_000)));
    world.configure(&CONFIGURATION.replace("busy_timeout_ms = 200", "snapshot_chunk_rows = 200"));
    world.succeed(&["init"]);
    let (stop, source) = (Arc::new(AtomicBool::new(false)), world.source());
    let stopped = stop.clone();
    let application = std::thread::spawn(move || {
        let mut number = 0i64;
        while !stopped.load(Ordering::Relaxed) {
            number += 1;
            let id = (number * 7919) % 6_000 + 1;
            source
                .execute_batch(&format!(
                    "begin immediate;
                    update things set amount = '{number}' where id = {id};
                    delete from things where id = {};
                    insert into things (name, amount) values ('new', '{number}');
                    update things set id = -id where id = {};
                    commit;",
                    id + 13,
                    id + 29
                ))
                .unwrap();
        }
    });
    for kill_at in [500, 2_000, 4_000] {
        let mut running = world.run();
        let read = format!(
            "select coalesce(max(row_count), 0) >= {kill_at} from ctl_snapshots where capture_instance = 'things'"
        );
        until("part of the snapshot", || {
            running.assert_running();
            (world.try_query(&read).ok()?[0][0].as_deref() == Some("true")).then_some(())
        });
        running.kill();
    }
    let mut running = world.run();
    until("the snapshot's end", || {
        running.assert_running();
        let done = "select count(*) from ctl_snapshots where state = 'done'";
        (world.try_query(done).ok()?[0][0].as_deref() == Some("2")).then_some(())
    });
    stop.store(true, Ordering::Relaxed);
    application.join().unwrap();
    world.catch_up(&mut running);
    world.verify();
    running.stop();
    let live: i64 = world.source().query_row("select count(*) from things", [], |row| row.get(0)).unwrap();
    assert_eq!(world.value("select count(*) from things_latest"), live.to_string());
    assert_eq!(world.value("select count(distinct id) from things_latest"), live.to_string());
}

#[test]
fn spec4_07_late_changes_reach_their_rows() {
    let world = World::demo();
    let kpi = |world: &World| {
        let rows = world.query(
            "select strftime(minute_bucket, '%m-%d %H:%M'), segment, orders_count, orders_amount_sum, paid_amount_sum
            from proj_orders_kpi_by_minute_segment order by 1, 2",
        );
        rows.into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    world.write(
        "insert into customers (customer_id, segment) values (1, 'gold'), (2, 'iron');
        insert into orders values
            (1, 1, '10.00', 'new', '2020-01-01T10:00:30Z', '2020-01-01T10:00:30Z'),
            (2, 2, '20.00', 'new', '2026-01-01T10:00:30Z', '2026-01-01T10:00:30Z');
        insert into payments values (1, 1, '4.00', '2020-01-01T10:05:00Z');",
    );
    let mut running = world.run();
    world.catch_up(&mut running);
    assert_eq!(
        kpi(&world),
        ["01-01 10:00 gold 1 10.00 0.00", "01-01 10:00 iron 1 20.00 0.00", "01-01 10:05 gold 0 0.00 4.00"]
    );
    world.write("update orders set amount = '11.50' where order_id = 1;");
    world.catch_up(&mut running);
    assert_eq!(kpi(&world)[0], "01-01 10:00 gold 1 11.50 0.00", "an order of years ago");
    world.write("update customers set segment = 'tin' where customer_id = 1;");
    world.catch_up(&mut running);
    assert_eq!(
        kpi(&world),
        ["01-01 10:00 iron 1 20.00 0.00", "01-01 10:00 tin 1 11.50 0.00", "01-01 10:05 tin 0 0.00 4.00"]
    );
    world.write("update payments set paid_at = '2020-01-01T10:09:00Z' where payment_id = 1;");
    world.catch_up(&mut running);
    assert_eq!(kpi(&world)[2], "01-01 10:09 tin 0 0.00 4.00", "a payment moved to another minute");
    running.stop();
    world.write("update payments set paid_amount = '4.01', order_id = 2; delete from orders where order_id = 1;");
    let mut running = world.run();
    world.catch_up(&mut running);
    assert_eq!(kpi(&world), ["01-01 10:00 iron 1 20.00 0.00", "01-01 10:09 iron 0 0.00 4.01"], "after downtime");
    world.verify();
}

#[test]
fn spec4_08_money_stays_decimal_and_times_keep_their_microseconds() {
    const TYPES: &str = r#"
[pipeline]
name = "types"
[[source]]
name = "here"
kind = "sqlite"
path = "source.db"
[source.tables.ledger.columns]
small = "decimal(18,2)"
large = "decimal(38,10)"
moment = "timestamp"
zoned = "timestamptz"
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"
[[projection]]
name = "ledger_latest"
kind = "latest"
table = "ledger"
[[projection]]
name = "ledger_history"
kind = "history"
table = "ledger"
[[projection]]
name = "ledger_sum"
kind = "sql"
sql = "sum.sql"
tables = ["ledger"]
key = ["one"]
additive = ["small", "large"]
weight = "weight"
[projection.entity]
ledger = "id"
"#;
    let sum =
        "select 1 as one, cast(sum(small) as decimal(20, 2)) as small, cast(sum(large) as decimal(38, 10)) as large,
        max(moment) as newest, count(*) as weight from ledger";
    let source = "create table ledger (id integer primary key, small text, large text, moment text, zoned text);
        insert into ledger values
            (1, '9999999999999999.99', '9999999999999999999999999999.0000000001', '2026-01-01T00:00:00.000001Z', '2026-01-01T00:00:00.000001+02:00');";
    let world = World::configured(TYPES, &[("sum.sql", sum)], source);
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write(
        "insert into ledger values
            (2, '-0.01', '-0.0000000001', '1969-12-31T23:59:59.999999Z', '2026-06-30T23:59:59.999999Z'),
            (3, '0.10', '0.1', '2026-01-01 12:34:56.123456', '2026-01-01T12:34:56.123456Z'),
            (4, '0.20', '0.2', null, null);
        insert into ledger values (5, '7', '7', null, null);
        update ledger set small = '-9999999999999999.99' where id = 5;
        delete from ledger where id = 5;",
    );
    world.catch_up(&mut running);
    let expected = [
        "1 9999999999999999.99 9999999999999999999999999999.0000000001 2026-01-01 00:00:00.000001 2025-12-31 22:00:00.000001",
        "2 -0.01 -0.0000000001 1969-12-31 23:59:59.999999 2026-06-30 23:59:59.999999",
        "3 0.10 0.1000000000 2026-01-01 12:34:56.123456 2026-01-01 12:34:56.123456",
        "4 0.20 0.2000000000",
    ];
    for from in ["ledger_latest", "ledger_history where is_current"] {
        let rows =
            world.query(&format!("select id, small, large, moment, zoned at time zone 'UTC' from {from} order by id"));
        let lines: Vec<String> =
            rows.into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, expected, "{from}");
    }
    let total = world.query("select * from ledger_sum").remove(0);
    let total: Vec<String> = total.into_iter().flatten().collect();
    assert_eq!(
        total,
        ["1", "10000000000000000.28", "9999999999999999999999999999.3000000000", "2026-01-01 12:34:56.123456"]
    );
    let types = world.value("select string_agg(data_type, ' ' order by ordinal_position) from information_schema.columns where table_name = 'ledger_latest'");
    assert_eq!(types, "BIGINT DECIMAL(18,2) DECIMAL(38,10) TIMESTAMP TIMESTAMP WITH TIME ZONE BLOB");
    running.stop();
    world.verify();
}

#[test]
fn spec4_15_an_emptied_table_gives_empty_projections() {
    let world = small();
    let mut running = world.run();
    world.catch_up(&mut running);
    world.write("delete from things;");
    world.catch_up(&mut running);
    for empty in ["things_latest", "amount_by_name", "things_history where is_current"] {
        assert_eq!(world.value(&format!("select count(*) from {empty}")), "0", "{empty}");
    }
    assert_eq!(world.value("select count(*) from things_history"), "2");
    world.verify();
    world.write("insert into things values (1, 'again', '1.00');");
    world.catch_up(&mut running);
    assert_eq!(names(&world), ["again"]);
    running.stop();
    world.verify();
}

#[test]
fn spec4_15_a_table_that_never_had_a_row_gives_empty_projections() {
    let source = "create table things (id integer primary key, name text, amount text);
        create table others (id integer primary key, name text);";
    let world = World::configured(CONFIGURATION, &FILES, source);
    world.succeed(&["run", "--once"]);
    assert_eq!(world.value("select count(*) from ctl_projection_metadata where status = 'OK'"), "4");
    world.verify();
}
