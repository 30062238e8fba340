-- The operational table that the pipeline captures, with some rows in it. May be run again: what is there stays.
--
-- total_amount is computed by the server. Such columns are not in the stream of servers before PostgreSQL 18, and Shori
-- leaves them out: it is quantity * unit_price. last_updated is kept by a trigger, as an application's own would be.
create table if not exists orders (
    id serial primary key,
    customer_id integer not null,
    product_id integer not null,
    quantity integer not null check (quantity > 0),
    unit_price decimal(10, 2) not null check (unit_price >= 0),
    total_amount decimal(12, 2) generated always as (quantity * unit_price) stored,
    order_status varchar(50) not null default 'pending',
    order_date timestamp not null default now(),
    last_updated timestamp not null default now(),
    created_at timestamp not null default now()
);

-- What capture by timestamp looks for.
create index if not exists orders_last_updated_idx on orders (last_updated);

create or replace function set_last_updated() returns trigger
language plpgsql
as $$
begin
    new.last_updated := now();
    return new;
end
$$;

create or replace trigger orders_last_updated
before update on orders
for each row
execute function set_last_updated();

insert into orders (customer_id, product_id, quantity, unit_price, order_status, order_date, last_updated, created_at)
select
    1 + number % 50,
    1 + number % 20,
    1 + number % 5,
    9.99 + number,
    (array['pending', 'processing', 'shipped', 'delivered'])[1 + number % 4],
    ordered_at,
    ordered_at,
    ordered_at
from (
    select
        number,
        now()::timestamp - (101 - number) * interval '7 minutes' as ordered_at
    from generate_series(1, 100) as number
) as sample
where not exists (select from orders);
