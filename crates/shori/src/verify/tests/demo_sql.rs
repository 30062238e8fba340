//! The demo pipeline's SQL, against examples worked out by hand and against itself in parts.

use duckdb::Connection;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const KPI: &str = include_str!("../../../../../pipelines/demo/sql/proj_orders_kpi_by_minute_segment.sql");
const LATEST: &str = include_str!("../../../../../pipelines/demo/sql/proj_orders_latest.sql");

const TABLES: &str = "
create table customers (customer_id bigint, segment varchar, is_active boolean, updated_at timestamp, __lsn blob);
create table orders (
    order_id bigint, customer_id bigint, amount decimal(18,2), status varchar, created_at timestamp,
    updated_at timestamp, __lsn blob
);
create table payments (payment_id bigint, order_id bigint, paid_amount decimal(18,2), paid_at timestamp, __lsn blob);
";

fn tables() -> Connection {
    let connection = Connection::open_in_memory().unwrap();
    connection.execute_batch(TABLES).unwrap();
    connection
}

/// Rows of a query, each as one line of text.
fn lines(connection: &Connection, query: &str) -> Vec<String> {
    let columns = {
        let mut statement = connection.prepare(&format!("describe {query}")).unwrap();
        let names = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
        names.map(|name| format!("cast(\"{}\" as varchar)", name.unwrap())).collect::<Vec<_>>().join(", ")
    };
    let text = format!("select concat_ws(' ', {columns}) from ({query}) order by 1");
    let mut statement = connection.prepare(&text).unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().map(|line| line.unwrap()).collect()
}

#[test]
fn the_kpi_is_that_of_an_example_worked_out_by_hand() {
    let connection = tables();
    connection
        .execute_batch(
            "
            insert into customers values
                (1, 'consumer', true, '2026-01-02', null),
                (2, 'business', false, '2026-01-02', null);
            insert into orders values
                (10, 1, 12.30, 'open', '2026-01-02 03:04:05.123456', '2026-01-02 03:04:05.123456', null),
                (11, 1, 0.70, 'paid', '2026-01-02 03:04:59.999999', '2026-01-02 03:04:59.999999', null),
                (12, 2, 100.00, 'open', '2026-01-02 03:04:00', '2026-01-02 03:04:00', null),
                (13, 9, 5.05, 'open', '2026-01-02 03:05:00', '2026-01-02 03:05:00', null);
            insert into payments values
                (100, 10, 10.00, '2026-01-02 03:04:30', null),
                (101, 10, 2.30, '2026-01-02 03:05:30', null),
                (102, 13, 5.05, '2026-01-02 03:07:00', null),
                (103, 99, 777.00, '2026-01-02 03:04:30', null);
            ",
        )
        .unwrap();
    // Minute, segment, orders, their amount, payments' amount, weight. Payment 103 is of a dead order.
    let expected = [
        "2026-01-02 03:04:00 business 1 100.00 0.00 1",
        "2026-01-02 03:04:00 consumer 2 13.00 10.00 3",
        "2026-01-02 03:05:00 UNKNOWN 1 5.05 0.00 1",
        "2026-01-02 03:05:00 consumer 0 0.00 2.30 1",
        "2026-01-02 03:07:00 UNKNOWN 0 0.00 5.05 1",
    ];
    assert_eq!(lines(&connection, KPI), expected);
}

#[test]
fn the_kpi_has_the_types_that_its_table_has_and_no_rows_without_orders() {
    let connection = tables();
    assert_eq!(lines(&connection, KPI), [""; 0]);
    let mut statement = connection.prepare(&format!("describe {KPI}")).unwrap();
    let columns = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let columns: Vec<(String, String)> = columns.map(|column| column.unwrap()).collect();
    let text = |(name, data_type): &(String, String)| format!("{name} {data_type}");
    assert_eq!(
        columns.iter().map(text).collect::<Vec<_>>(),
        [
            "minute_bucket TIMESTAMP",
            "segment VARCHAR",
            "orders_count INTEGER",
            "orders_amount_sum DECIMAL(18,2)",
            "paid_amount_sum DECIMAL(18,2)",
            "__weight BIGINT",
        ]
    );
}

#[test]
fn the_latest_orders_are_all_live_ones_with_their_customers_segment() {
    let connection = tables();
    connection
        .execute_batch(
            "
            insert into customers values (1, 'consumer', true, '2026-01-02', '\\x01'::blob);
            insert into orders values
                (10, 1, 12.30, 'open', '2026-01-02 03:04:05.123456', '2026-01-02 03:04:06', '\\x0A'::blob),
                (11, 2, 0.70, 'paid', '2026-01-02 03:04:05', '2026-01-02 03:04:05', '\\x0B'::blob);
            ",
        )
        .unwrap();
    let expected = [
        "10 1 consumer 12.30 open 2026-01-02 03:04:05.123456 2026-01-02 03:04:06 \\x0A",
        "11 2 UNKNOWN 0.70 paid 2026-01-02 03:04:05 2026-01-02 03:04:05 \\x0B",
    ];
    assert_eq!(lines(&connection, LATEST), expected);
}

/// The KPI over parts of the orders, with their payments and all customers, adds up to the KPI over all.
#[test]
fn the_kpi_of_parts_adds_up_to_the_kpi_of_all() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let connection = tables();
        let (orders, parts) = (rng.random_range(0..300), rng.random_range(1..5));
        connection
            .execute_batch(&format!(
                "
                select setseed({});
                insert into customers
                select range, 'segment ' || (range % 3), true, '2026-01-02', null from range(1, 20);
                insert into orders
                select
                    range, 1 + cast(floor(random() * 25) as bigint), cast(random() * 100 as decimal(18,2)), 'open',
                    timestamp '2026-01-02' + to_microseconds(cast(random() * 600e6 as bigint)), '2026-01-02', null
                from range(1, {orders} + 1);
                insert into payments
                select
                    range, 1 + cast(floor(random() * ({orders} + 20)) as bigint), cast(random() * 100 as decimal(18,2)),
                    timestamp '2026-01-02' + to_microseconds(cast(random() * 600e6 as bigint)), null
                from range(1, 200);
                create table whole as {KPI};
                create table all_orders as from orders;
                create table all_payments as from payments;
                ",
                rng.random::<f64>()
            ))
            .unwrap();
        for part in 0..parts {
            connection
                .execute_batch(&format!(
                    "
                    create or replace table orders as from all_orders where hash(order_id) % {parts} = {part};
                    create or replace table payments as from all_payments where hash(order_id) % {parts} = {part};
                    create table part_{part} as {KPI};
                    "
                ))
                .unwrap();
        }
        let all = (0..parts).map(|part| format!("from part_{part}")).collect::<Vec<_>>().join(" union all ");
        let sums = format!(
            "
            select minute_bucket, segment, sum(orders_count), sum(orders_amount_sum), sum(paid_amount_sum), sum(__weight)
            from ({all})
            group by all
            "
        );
        assert_eq!(lines(&connection, &sums), lines(&connection, "select * from whole"));
    }
}
