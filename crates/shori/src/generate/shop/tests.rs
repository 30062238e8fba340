use std::sync::atomic::AtomicBool;

use rusqlite::types::Value;
use tempfile::TempDir;

use super::*;
use crate::generate::Pacing;

const SAMPLE: &str = include_str!("../../../../../pipelines/demo/sql/sample_source.sql");
const CLOCK: Clock = Clock::Fixed { start: 1_767_323_045_000_000, step_us: 997 };

fn of(changes: u64) -> Workload {
    Workload { changes: Some(changes), ..Workload::default() }
}

fn run(path: &Path, workload: &Workload) -> Result<Generated> {
    Shop { path: path.into(), clock: CLOCK }.run(workload, &AtomicBool::new(false), &mut |_| {})
}

struct Sample {
    directory: TempDir,
}

impl Sample {
    fn new() -> Self {
        let sample = Self { directory: TempDir::new().unwrap() };
        sample.connect().execute_batch(SAMPLE).unwrap();
        sample
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("source.db")
    }

    fn connect(&self) -> Connection {
        Connection::open(self.path()).unwrap()
    }

    fn generate(&self, changes: u64) -> Generated {
        self.run(&of(changes)).unwrap()
    }

    fn run(&self, workload: &Workload) -> Result<Generated> {
        run(&self.path(), workload)
    }

    fn number(&self, query: &str) -> i64 {
        self.connect().query_row(query, [], |row| row.get(0)).unwrap()
    }

    /// All rows of a table, in key order.
    fn rows(&self, table: &str) -> Vec<Vec<Value>> {
        let connection = self.connect();
        let mut statement = connection.prepare(&format!("select * from {table} order by 1, 2, 3")).unwrap();
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| (0..columns).map(|index| row.get(index)).collect()).unwrap();
        rows.map(|row| row.unwrap()).collect()
    }
}

/// Counts changes on its own: one row for each row that a statement touched.
const COUNTING: &str = "
create table counted (table_name text, op text);
create trigger c1 after insert on customers begin insert into counted values ('customers', 'insert'); end;
create trigger c2 after update on customers begin insert into counted values ('customers', 'update'); end;
create trigger c3 after delete on customers begin insert into counted values ('customers', 'delete'); end;
create trigger o1 after insert on orders begin insert into counted values ('orders', 'insert'); end;
create trigger o2 after update on orders when old.order_id = new.order_id
begin insert into counted values ('orders', 'update'); end;
create trigger o3 after delete on orders begin insert into counted values ('orders', 'delete'); end;
create trigger o4 after update on orders when old.order_id <> new.order_id
begin insert into counted values ('orders', 'key_update'); end;
create trigger p1 after insert on payments begin insert into counted values ('payments', 'insert'); end;
create trigger p2 after update on payments begin insert into counted values ('payments', 'update'); end;
create trigger p3 after delete on payments begin insert into counted values ('payments', 'delete'); end;
";

#[test]
fn exactly_the_changes_asked_for_are_made_and_the_ledger_holds_them() {
    for changes in [1, 7, 1_000, 30_001] {
        let sample = Sample::new();
        sample.connect().execute_batch(COUNTING).unwrap();
        let generated = sample.generate(changes);
        assert_eq!(generated.changes, changes);
        assert_eq!(generated.tables.total(), changes);
        assert_eq!(sample.number("select count(*) from counted"), changes as i64);
        let difference = "
            select count(*) from (
                select table_name, op, count(*) as rows from counted group by 1, 2
                except
                select table_name, op, rows from generator_ledger where captured = 1
            )
        ";
        assert_eq!(sample.number(difference), 0);
        assert_eq!(sample.number("select sum(rows) from generator_ledger"), changes as i64);
    }
}

#[test]
fn changes_before_a_capture_are_told_apart_in_the_ledger() {
    let sample = Sample::new();
    sample.generate(1_000);
    sample.connect().execute_batch(COUNTING).unwrap();
    sample.generate(500);
    assert_eq!(sample.number("select sum(rows) from generator_ledger where captured = 0"), 1_000);
    assert_eq!(sample.number("select sum(rows) from generator_ledger where captured = 1"), 500);
}

#[test]
fn equal_seeds_write_equal_databases_and_others_do_not() {
    let (one, two, other) = (Sample::new(), Sample::new(), Sample::new());
    one.generate(50_000);
    two.generate(50_000);
    other.run(&Workload { seed: 2, ..of(50_000) }).unwrap();
    for table in ["customers", "orders", "payments", "generator_ledger"] {
        assert!(one.rows(table) == two.rows(table), "{table} differs");
        assert!(one.rows(table) != other.rows(table), "{table} is the same");
    }
}

#[test]
fn the_mix_is_that_of_the_benchmark() {
    let sample = Sample::new();
    let generated = sample.generate(210_000);
    let orders = generated.tables.of("orders");
    let customers = generated.tables.of("customers");
    let payments = generated.tables.of("payments");
    let changes = (generated.changes - 10_000) as f64;
    let new_orders = orders.inserts as f64 / 1.02;
    let near = |what: &str, ratio: f64, expected: f64| {
        assert!((ratio - expected).abs() < 0.03 * expected.max(0.5), "{what}: {ratio}, not {expected}");
    };
    near("changes of an order", changes / new_orders, 2.45);
    near("updates", orders.updates as f64 / new_orders, 0.45 + 0.04);
    near("payments", payments.inserts as f64 / new_orders, 0.80);
    for count in [orders.deletes, orders.key_updates, customers.updates, customers.deletes, payments.updates] {
        assert!(count > 0, "{:?}", generated.tables);
    }
    assert!(customers.inserts > 10_000, "deleted customers come back");
    let share = |status: &str| {
        let query = format!("select count(*) from orders where status = '{status}'");
        sample.number(&query) as f64 / sample.number("select count(*) from orders") as f64
    };
    near("open", share("open"), 0.70);
    near("paid", share("paid"), 0.20);
    near("cancelled", share("cancelled"), 0.10);
    let dead = "select count(*) from payments where order_id not in (select order_id from orders)";
    assert!(sample.number(dead) > 0, "some payments are of dead orders");
}

#[test]
fn it_goes_on_where_it_or_another_left_off() {
    let sample = Sample::new();
    sample.generate(20_000);
    let before = sample.number("select max(order_id) from orders");
    sample.connect().execute_batch("insert into orders values (1000000, 1, '1.00', 'open', 'x', 'x')").unwrap();
    let generated = sample.generate(20_000);
    assert_eq!(generated.changes, 20_000);
    assert!(generated.tables.of("customers").inserts < 5_100, "{:?}", generated.tables);
    let after = sample.number("select max(order_id) from orders");
    assert!(before < 1_000_000 && after > 1_000_000, "{before} {after}");
}

#[test]
fn times_are_written_in_one_form() {
    let sample = Sample::new();
    sample.generate(20_000);
    let pattern = "20[0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]:[0-9][0-9]:[0-9][0-9].[0-9][0-9][0-9][0-9][0-9][0-9]Z";
    for (table, column) in
        [("customers", "updated_at"), ("orders", "created_at"), ("orders", "updated_at"), ("payments", "paid_at")]
    {
        let other = format!("select count(*) from {table} where {column} not glob '{pattern}'");
        assert_eq!(sample.number(&other), 0, "{table}.{column}");
    }
}

#[test]
fn transactions_are_no_larger_than_allowed() {
    let sample = Sample::new();
    let generated = sample.run(&Workload { transaction_max_rows: 3, ..of(10_000) }).unwrap();
    assert!(generated.transactions >= (10_000 - 2_500) / 3, "{generated:?}");
}

#[test]
fn a_set_stop_ends_it_before_the_next_transaction() {
    let sample = Sample::new();
    let stop = AtomicBool::new(false);
    let workload = Workload { pacing: Pacing::Rate(1_000.0), ..Workload::default() };
    let mut progress = |_: &Progress| stop.store(true, Ordering::Relaxed);
    let generated = Shop::new(sample.path()).run(&workload, &stop, &mut progress).unwrap();
    assert_eq!(sample.number("select sum(rows) from generator_ledger"), generated.changes as i64);
}

#[test]
fn a_rate_is_kept() {
    let sample = Sample::new();
    let workload = Workload { pacing: Pacing::Rate(20_000.0), customers: 10, ..of(10_010) };
    let generated = sample.run(&workload).unwrap();
    assert!(generated.seconds >= 0.45, "{generated:?}");
}

#[test]
fn missing_files_and_tables_are_named_with_a_remedy() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("none.db");
    let error = run(&path, &of(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.to_string().contains("none.db") && error.to_string().contains("shori init --sample"), "{error}");
    assert!(!path.exists());
    let sample = Sample::new();
    sample.connect().execute_batch("drop table payments").unwrap();
    let error = sample.run(&of(10)).unwrap_err();
    assert!(error.to_string().contains("table payments"), "{error}");
    assert!(error.to_string().contains("shori init --sample"), "{error}");
}

#[test]
fn it_waits_for_the_lock_of_another_writer() {
    let sample = Sample::new();
    let other = sample.connect();
    other.execute_batch("pragma journal_mode = wal; begin immediate").unwrap();
    let path = sample.path();
    // The other writer ends its transaction only once the generator runs; it cannot have committed anything before.
    let worker = std::thread::spawn(move || run(&path, &of(10)));
    other.execute_batch("commit").unwrap();
    assert_eq!(worker.join().unwrap().unwrap().changes, 10);
}

#[test]
fn rounds_are_as_far_apart_as_asked_for() {
    let sample = Sample::new();
    sample.run(&Workload { customers: 10, ..of(100) }).unwrap();
    let pacing = Pacing::Rounds(Duration::from_millis(20));
    let generated = sample.run(&Workload { pacing, customers: 10, ..of(50) }).unwrap();
    assert!(generated.transactions >= 10 && generated.seconds >= 0.02 * 10.0, "{generated:?}");
}

#[test]
fn several_writers_are_refused() {
    let error = Sample::new().run(&Workload { writers: 2, ..of(10) }).unwrap_err();
    assert!(error.to_string().contains("one writer"), "{error}");
}
