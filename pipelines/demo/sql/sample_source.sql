-- The sample source: what an order system's database may look like. Money is decimal text, times are UTC text with
-- microseconds, so that neither loses a digit in SQLite. There are no foreign keys: rows may come in any order.

create table if not exists customers (
    customer_id integer primary key not null,
    segment text not null,
    is_active boolean not null default 1,
    updated_at text not null default (strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z')
);

create table if not exists orders (
    order_id integer primary key not null,
    customer_id integer not null,
    amount text not null,
    status text not null,
    created_at text not null default (strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z'),
    updated_at text not null default (strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z')
);

create table if not exists payments (
    payment_id integer primary key not null,
    order_id integer not null,
    paid_amount text not null,
    paid_at text not null default (strftime('%Y-%m-%dT%H:%M:%f', 'now') || '000Z')
);
