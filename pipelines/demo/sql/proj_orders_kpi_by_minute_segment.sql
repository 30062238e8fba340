-- Orders and payments by minute and customer segment.
--
-- Orders count in the minute they were created, payments in the minute they were paid; a payment counts only while its
-- order is live. Where a minute has one and not the other, the missing measures are 0. An order without a live customer
-- belongs to the segment UNKNOWN.
--
-- Every measure is a sum over orders, so any set of orders (with their payments and customers) gives that set's part.
-- __weight counts the rows behind a result row: at zero, the result row is gone.
with segmented_orders as (
    select
        orders.order_id,
        orders.amount,
        orders.created_at,
        coalesce(customers.segment, 'UNKNOWN') as segment
    from orders
    left join customers on customers.customer_id = orders.customer_id
),
measured as (
    select
        date_trunc('minute', created_at) as minute_bucket,
        segment,
        1 as orders_count,
        amount as order_amount,
        0 as paid_amount
    from segmented_orders
    union all
    select
        date_trunc('minute', payments.paid_at) as minute_bucket,
        segmented_orders.segment,
        0 as orders_count,
        0 as order_amount,
        payments.paid_amount
    from payments
    join segmented_orders on segmented_orders.order_id = payments.order_id
)
select
    minute_bucket,
    segment,
    cast(sum(orders_count) as integer) as orders_count,
    cast(sum(order_amount) as decimal(18, 2)) as orders_amount_sum,
    cast(sum(paid_amount) as decimal(18, 2)) as paid_amount_sum,
    count(*) as __weight
from measured
group by
    minute_bucket,
    segment
