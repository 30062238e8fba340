mod damage;
mod demo_sql;
mod pipeline;
