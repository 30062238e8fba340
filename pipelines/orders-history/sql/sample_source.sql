-- The operational table that the pipeline captures. total_amount is computed by the server: such columns are not in the
-- stream of servers before PostgreSQL 18.
create table if not exists orders (
    id serial primary key,
    customer_id integer not null,
    product_id integer not null,
    quantity integer not null,
    unit_price decimal(10, 2) not null,
    total_amount decimal(12, 2) generated always as (quantity * unit_price) stored,
    order_status varchar(50) not null default 'pending',
    order_date timestamp not null default now(),
    last_updated timestamp not null default now(),
    created_at timestamp not null default now()
);

insert into orders (customer_id, product_id, quantity, unit_price)
select 1 + number % 50, 1 + number % 20, 1 + number % 5, 9.99 + number
from generate_series(1, 100) as number
where not exists (select from orders);
