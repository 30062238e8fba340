//! Answers of a running pipeline that are larger than anything that would hold them.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use shori::control::{Client, Request};
use shori_core::{Error, ErrorKind};

use crate::harness::{World, until};

const ROWS: i64 = 2_000_000;
/// What the answer may add to the memory of the process that gives it: a third of its size.
const GROWTH_MAX_KIB: u64 = 128 * 1024;

/// A process that takes no time from one look to the next, so many times on end, has nothing to do.
const IDLE_LOOKS: u32 = 30;

/// Some 200 bytes a row.
fn wide(rows: i64) -> String {
    format!("select n::bigint as n, repeat('x', 200) as filler from range({rows}) as numbers(n)")
}

fn resident_kib(client: &Client, field: &str) -> u64 {
    let process = client.request(&Request::Pid).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse().unwrap()
}

fn numbers(batch: &RecordBatch) -> &[i64] {
    batch.column(0).as_primitive::<Int64Type>().values()
}

#[test]
fn an_answer_comes_whole_and_in_order_without_being_held() {
    let world = World::demo();
    let running = world.run();
    let client = world.client().unwrap();
    assert_eq!(client.query("serving", "select 1::bigint as n where false").unwrap()[0].schema().field(0).name(), "n");
    let before = resident_kib(&client, "VmRSS");
    let mut next = 0;
    let schema = client
        .scan("serving", &wide(ROWS), &mut |batch| {
            assert!(numbers(&batch).iter().zip(next..).all(|(found, wanted)| *found == wanted));
            next += batch.num_rows() as i64;
            Ok(())
        })
        .unwrap();
    assert_eq!(next, ROWS);
    assert_eq!(schema.field(1).name(), "filler");
    let peak = resident_kib(&client, "VmHWM");
    assert!(peak.saturating_sub(before) < GROWTH_MAX_KIB, "{before} KiB before, {peak} KiB at most");
    let many = client.query("serving", &wide(1_000_001)).unwrap_err();
    assert!(many.to_string().contains("add a limit"), "{many}");
    let shown = world.succeed(&["query", "--json", &wide(1_000_001).replace("200", "1")]);
    assert_eq!(shown.out.lines().count(), 1_000_001);
    running.stop();
}

#[test]
fn an_answer_that_fails_on_the_way_tells_why() {
    let world = World::demo();
    let running = world.run();
    let client = world.client().unwrap();
    // One thread makes it: of several, the first to fail interrupts the others, and DuckDB may tell of either.
    let sql =
        "select if(n = 1500000, error('no more of this'), n)::bigint as n from (select unnest(range(2000000)) as n)";
    let mut rows = 0;
    let failed = client.scan("serving", sql, &mut |batch| {
        rows += batch.num_rows();
        Ok(())
    });
    let error = failed.unwrap_err();
    assert!(error.to_string().contains("no more of this"), "{error}");
    assert!(rows > 0 && rows < 1_500_001, "{rows} rows came");
    for (sql, cause) in [("select nothing", "nothing"), ("drop table x", "only reading statements")] {
        let error = client.query("serving", sql).unwrap_err();
        assert!(error.to_string().contains(cause), "{error}");
    }
    assert!(client.query("elsewhere", "select 1").unwrap_err().to_string().contains("there is none of that name"));
    running.stop();
}

#[test]
fn a_question_is_taken_however_it_is_written() {
    let world = World::demo();
    world.succeed(&["run", "--once"]);
    for sql in
        ["-- one\nselect 1 as n", "/* one */ (select 1 as n) union select 1; -- ';'", "from (values (1)) as v(n);"]
    {
        assert_eq!(world.succeed(&["query", "--json", sql]).out, "{\"n\":1}\n", "{sql}");
    }
    assert!(world.succeed(&["query", "table ctl_store"]).out.contains("layout_version"));
    assert!(world.succeed(&["query", "explain select 1"]).out.contains("explain_value"));
    assert!(world.succeed(&["query", "--json", "explain select 1"]).json()["explain_value"].is_string());
    for (sql, cause) in [
        ("select 1; drop table ctl_store", "only one statement"),
        ("-- select\ndrop table ctl_store", "only reading statements"),
        ("explain analyze drop table ctl_store", "only reading statements"),
    ] {
        world.shori(&["query", sql]).tells(2, &[cause]);
    }
}

#[test]
fn a_client_that_goes_away_ends_its_statement() {
    let world = World::demo();
    let running = world.run();
    let client = world.client().unwrap();
    let enough = || Error::new(ErrorKind::Usage, "take", "more", "it is enough");
    let taken = client.scan("serving", &wide(i64::MAX), &mut |_| Err(enough()));
    assert_eq!(taken.unwrap_err().object(), "more");
    // This one takes days until it has its first row.
    let process = client.request(&Request::Pid).unwrap();
    let mut waiting =
        world.start(&["query", "select max(hash(a.r, b.r)) from range(10000000) a(r), range(10000000) b(r)"]);
    let begun = ticks(process);
    until("the statement to run", || (ticks(process) > begun + 50).then_some(()));
    waiting.assert_running();
    waiting.kill();
    let (mut last, mut idle_looks) = (0, 0);
    until("the statement's end", || {
        let now = ticks(process);
        idle_looks = if now == last { idle_looks + 1 } else { 0 };
        last = now;
        (idle_looks == IDLE_LOOKS).then_some(())
    });
    assert_eq!(world.value("select 1"), "1");
    running.stop();
}

/// Processor time that a process has taken, in hundredths of a second.
fn ticks(process: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let after_name = text.rsplit_once(')').unwrap().1.to_string();
    after_name.split_whitespace().nth(11).unwrap().parse().unwrap()
}

#[test]
fn a_pipeline_that_dies_breaks_its_answer_off() {
    let world = World::demo();
    let mut running = Some(world.run());
    let client = world.client().unwrap();
    let broken = client.scan("serving", &wide(i64::MAX), &mut |batch| {
        assert!(!batch.column(1).is_empty());
        if let Some(running) = running.take() {
            running.kill();
        }
        Ok(())
    });
    let error = broken.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("broke off"), "{error}");
}
