-- Every live order with its customer's segment; UNKNOWN where there is no live customer.
-- __lsn is the commit that left the order as it is.
select
    orders.order_id,
    orders.customer_id,
    coalesce(customers.segment, 'UNKNOWN') as segment,
    orders.amount,
    orders.status,
    orders.created_at,
    orders.updated_at,
    orders.__lsn as __source_lsn
from orders
left join customers on customers.customer_id = orders.customer_id
