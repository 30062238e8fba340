//! What the server must have for logical replication: settings, a publication, a slot; and rights to them.
//!
//! A publication is made before the slot: the plugin looks for it as of each change.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use shori_core::{Error, ErrorKind, Result};
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use crate::PostgresConfig;
use crate::connect::{literal, quoted, sql_error};
use crate::message::WalLocation;

/// The oldest server that can be read: `binary` of the plugin, and ranges of `ctid` that are not scanned whole.
const VERSION_MIN: i32 = 140_000;

/// What the server is and how far its log goes.
pub(crate) struct Facts {
    /// Of this server's data, whatever its address.
    pub identity: String,
    pub wal_end: WalLocation,
}

fn refuse(config: &PostgresConfig, cause: String, remedy: &str) -> Result<()> {
    Err(Error::new(ErrorKind::Usage, "capture", config.server.name(), cause).with_remedy(remedy))
}

/// Refuses a server that nothing can be read from. To be asked before its catalog is: older ones lack columns of that, and
/// say no more than that.
pub(crate) async fn must_be_readable(client: &Client, config: &PostgresConfig) -> Result<()> {
    let query = "select pg_catalog.current_setting('server_version_num')::int4, pg_catalog.pg_is_in_recovery()";
    let row = client.query_one(query, &[]).await.map_err(config.server.fail("look at"))?;
    let (version, standby): (i32, bool) = (row.get(0), row.get(1));
    if version < VERSION_MIN {
        return refuse(config, format!("its version is {}", version / 10_000), "use PostgreSQL 14 or newer");
    }
    if standby {
        return refuse(config, "it is a standby".into(), "name its primary server");
    }
    Ok(())
}

impl Facts {
    pub async fn read(client: &Client, config: &PostgresConfig) -> Result<Self> {
        must_be_readable(client, config).await?;
        let fail = config.server.fail("look at");
        let query = "
            select
                pg_catalog.current_setting('wal_level'),
                (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())";
        let row = client.query_one(query, &[]).await.map_err(&fail)?;
        let wal_level: String = row.get(0);
        if wal_level != "logical" && config.polls.is_none() {
            let remedy = "run: alter system set wal_level = logical; and restart the server";
            refuse(config, format!("its wal_level is {wal_level}"), remedy)?;
        }
        let query = "
            select system_identifier::text, pg_catalog.pg_current_wal_lsn() from pg_catalog.pg_control_system()";
        let control = client.query_one(query, &[]).await.map_err(&fail)?;
        let (system, database): (String, u32) = (control.get(0), row.get(1));
        // Positions of the two kinds of capture do not compare: a log holds one of them.
        let kind = if config.polls.is_some() { " by timestamp" } else { "" };
        Ok(Self {
            identity: format!("postgres {system}/{database}{kind}"),
            wal_end: u64::from(control.get::<_, PgLsn>(1)),
        })
    }
}

pub(crate) async fn wal_end(client: &Client) -> Result<WalLocation> {
    let row = client.query_one("select pg_catalog.pg_current_wal_lsn()", &[]).await;
    let row = row.map_err(|cause| sql_error("read", "the end of the server's log", cause))?;
    Ok(u64::from(row.get::<_, PgLsn>(0)))
}

/// Of this database, where nobody reads it.
const DROP_SLOT: &str = "
select pg_drop_replication_slot(slot_name)
from pg_catalog.pg_replication_slots
where slot_name = $1 and plugin = 'pgoutput' and database = current_database() and not active";

/// Whether the publication was there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Made {
    Found,
    Anew,
}

/// What a publication sends of a table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published {
    /// Which rows, as a condition; all if `None`.
    pub filter: Option<String>,
    /// Which columns, some servers name generated ones among them; all if `None`.
    pub columns: Option<Vec<String>>,
}

/// The captured tables that the publication has; it is made, or made whole, where the configuration lets Shori do so.
pub(crate) async fn publication(
    client: &Client,
    config: &PostgresConfig,
    tables: &[String],
) -> Result<(BTreeMap<String, Published>, Made)> {
    let fail = |cause| sql_error("look at", &format!("publication {}", config.publication), cause);
    let query = "
        select puballtables, pubinsert and pubupdate and pubdelete and pubtruncate, pubviaroot
        from pg_catalog.pg_publication
        where pubname = $1";
    let names = |tables: &[&String]| tables.iter().map(|table| config.qualified(table)).collect::<Vec<_>>().join(", ");
    let publication = quoted(&config.publication);
    let made = client.query_opt(query, &[&config.publication]).await.map_err(fail)?;
    match &made {
        None if tables.is_empty() => return Ok((BTreeMap::new(), Made::Found)),
        None => {
            let all: Vec<&String> = tables.iter().collect();
            let statement = format!(
                "create publication {publication} for table {} with (publish_via_partition_root = true)",
                names(&all)
            );
            must_manage(config, format!("publication {} does not exist", config.publication), &statement)?;
            // First, so that a crash between leaves a slot that is gone, and not one that lacks its publication.
            client.execute(DROP_SLOT, &[&config.slot]).await.map_err(fail)?;
            run(client, &statement, "create", &format!("publication {}", config.publication)).await?;
            tracing::info!(publication = config.publication, "created the publication");
        }
        Some(row) => {
            if !row.get::<_, bool>(1) {
                let remedy =
                    format!("alter publication {publication} set (publish = 'insert, update, delete, truncate')");
                return Err(Error::new(
                    ErrorKind::Usage,
                    "use",
                    format!("publication {}", config.publication),
                    "it does not publish every kind of change",
                )
                .with_remedy(remedy));
            }
        }
    }
    let published = published(client, config).await?;
    let missing: Vec<&String> = tables.iter().filter(|table| !published.contains_key(*table)).collect();
    if missing.is_empty() {
        return Ok((published, if made.is_some() { Made::Found } else { Made::Anew }));
    }
    if made.as_ref().is_some_and(|row| !row.get::<_, bool>(2)) {
        must_send_roots(client, config, &missing).await?;
    }
    let statement = format!("alter publication {publication} add table {}", names(&missing));
    must_manage(config, format!("publication {} lacks {}", config.publication, names(&missing)), &statement)?;
    run(client, &statement, "add tables to", &format!("publication {}", config.publication)).await?;
    tracing::info!(publication = config.publication, tables = names(&missing), "added tables to the publication");
    Ok((self::published(client, config).await?, Made::Found))
}

pub(crate) async fn has_publication(client: &Client, config: &PostgresConfig) -> Result<bool> {
    let query = "select exists (select from pg_catalog.pg_publication where pubname = $1)";
    let row = client.query_one(query, &[&config.publication]).await;
    let row = row.map_err(|cause| sql_error("look at", &format!("publication {}", config.publication), cause))?;
    Ok(row.get(0))
}

/// Refuses a partitioned table of a publication that sends its partitions as tables of their own.
async fn must_send_roots(client: &Client, config: &PostgresConfig, tables: &[&String]) -> Result<()> {
    let query = "
        select c.relname::text
        from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = $1 and c.relname = any($2) and c.relkind = 'p'
        limit 1";
    let row = client.query_opt(query, &[&config.schema, &tables]).await;
    let row = row.map_err(|cause| sql_error("look at", "partitioned tables", cause))?;
    let Some(row) = row else { return Ok(()) };
    let cause = format!("it sends partitions of table {} as tables of their own", row.get::<_, String>(0));
    let statement =
        format!("alter publication {} set (publish_via_partition_root = true)", quoted(&config.publication));
    Err(Error::new(ErrorKind::Usage, "use", format!("publication {}", config.publication), cause)
        .with_remedy(format!("run: {statement}")))
}

/// What of the source's schema is published.
pub(crate) async fn published(client: &Client, config: &PostgresConfig) -> Result<BTreeMap<String, Published>> {
    let fail = |cause| sql_error("look at", &format!("publication {}", config.publication), cause);
    // Row filters and column lists are new in 15: through JSON, older servers need no query of their own.
    let query = "
        select
            tablename::text,
            to_jsonb(p) ->> 'rowfilter',
            case when jsonb_typeof(to_jsonb(p) -> 'attnames') = 'array' then
                array(select jsonb_array_elements_text(to_jsonb(p) -> 'attnames'))
            end
        from pg_catalog.pg_publication_tables p
        where pubname = $1 and schemaname = $2";
    let rows = client.query(query, &[&config.publication, &config.schema]).await.map_err(fail)?;
    Ok(rows.iter().map(|row| (row.get(0), Published { filter: row.get(1), columns: row.get(2) })).collect())
}

fn must_manage(config: &PostgresConfig, cause: String, statement: &str) -> Result<()> {
    if config.manage {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Usage, "capture", config.server.name(), cause);
    Err(error.with_remedy(format!("run: {statement}, or set manage = true")))
}

async fn run(client: &Client, statement: &str, operation: &str, object: &str) -> Result<()> {
    client.batch_execute(statement).await.map_err(|cause| {
        let lacks_right = cause.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE);
        let error = sql_error(operation, object, cause);
        if lacks_right { error.with_remedy(format!("let a role that may run: {statement}")) } else { error }
    })
}

/// A replication slot as it was found, or made.
pub(crate) struct Slot {
    /// What ends at or before this is forgotten.
    pub forgotten_to: WalLocation,
    /// Why nothing of what a log lacks can be read from it, if so.
    pub lost: Option<String>,
}

/// Finds the slot, and makes one where there is none or it is of no use any more.
///
/// One from before its publication is of none: the plugin looks for the publication as of each change, and fails.
pub(crate) async fn slot(client: &Client, config: &PostgresConfig, made: Made, begun: bool) -> Result<Slot> {
    let object = format!("replication slot {}", config.slot);
    let fail = |cause| sql_error("look at", &object, cause);
    let query = "
        select
            plugin::text,
            database::text,
            wal_status,
            confirmed_flush_lsn,
            to_jsonb(s) ->> 'invalidation_reason'
        from pg_catalog.pg_replication_slots s
        where slot_name = $1";
    let row = client.query_opt(query, &[&config.slot]).await.map_err(fail)?;
    let Some(row) = row else {
        let lost = begun.then(|| format!("{object} is gone"));
        return create_slot(client, config, lost).await;
    };
    let (plugin, database): (Option<String>, Option<String>) = (row.get(0), row.get(1));
    if plugin.as_deref() != Some("pgoutput") || database.as_deref() != Some(config.server.database.as_str()) {
        let cause = format!(
            "it is of database {} with plugin {}",
            database.as_deref().unwrap_or("none"),
            plugin.as_deref().unwrap_or("none")
        );
        return Err(Error::new(ErrorKind::Usage, "use", object, cause).with_remedy("name another slot"));
    }
    let (status, reason): (Option<String>, Option<String>) = (row.get(2), row.get(4));
    if status.as_deref() == Some("lost") || made == Made::Anew {
        let cause = match made {
            Made::Anew => format!("publication {} was gone", config.publication),
            Made::Found => {
                format!("{object} was invalidated ({})", reason.as_deref().unwrap_or("its log was removed"))
            }
        };
        let statement = format!("select pg_drop_replication_slot({})", literal(&config.slot));
        must_manage(config, cause.clone(), &statement)?;
        run(client, &statement, "drop", &object).await?;
        return create_slot(client, config, begun.then_some(cause)).await;
    }
    match row.get::<_, Option<PgLsn>>(3) {
        Some(forgotten_to) => Ok(Slot { forgotten_to: forgotten_to.into(), lost: None }),
        None => Err(Error::new(
            ErrorKind::Unavailable,
            "use",
            object,
            "it is just being made: it waits for open transactions",
        )),
    }
}

async fn create_slot(client: &Client, config: &PostgresConfig, lost: Option<String>) -> Result<Slot> {
    let object = format!("replication slot {}", config.slot);
    let statement =
        format!("select lsn from pg_create_logical_replication_slot({}, 'pgoutput')", literal(&config.slot));
    must_manage(config, format!("{object} does not exist"), &statement)?;
    tracing::info!(slot = config.slot, "creating the replication slot; this waits for open transactions to end");
    let fail = |cause: tokio_postgres::Error| {
        let is_right = cause.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE);
        let is_full = cause.code() == Some(&tokio_postgres::error::SqlState::CONFIGURATION_LIMIT_EXCEEDED);
        let error = sql_error("create", &object, cause);
        match (is_right, is_full) {
            (true, _) => error.with_remedy(format!("run: {}", replication_grant(config))),
            (_, true) => error.with_remedy("raise max_replication_slots, or drop a slot that nobody uses"),
            _ => error,
        }
    };
    // As long as a writer's transaction is open, no statement's time is too long.
    client.batch_execute("set statement_timeout = 0").await.map_err(fail)?;
    let created = client.query_one(&statement, &[]).await.map_err(fail);
    let reset = format!("set statement_timeout = {}", config.server.statement_timeout.as_millis());
    let forgotten_to: PgLsn = created?.get(0);
    client.batch_execute(&reset).await.map_err(fail)?;
    tracing::info!(slot = config.slot, "created the replication slot");
    Ok(Slot { forgotten_to: forgotten_to.into(), lost })
}

/// How long a reader that has just gone may still hold the slot, and between two looks.
const HELD_BRIEFLY: Duration = Duration::from_secs(5);
const HELD_LOOK: Duration = Duration::from_millis(20);

/// Returns when nobody reads the slot. The server notices only by and by that a reader has gone.
pub(crate) async fn slot_is_free(client: &Client, config: &PostgresConfig) -> Result<()> {
    let object = format!("replication slot {}", config.slot);
    let query = "
        select s.active_pid, coalesce(a.application_name, '?'), coalesce(a.client_addr::text, 'the server itself')
        from pg_catalog.pg_replication_slots s
        left join pg_catalog.pg_stat_activity a on a.pid = s.active_pid
        where s.slot_name = $1 and s.active";
    let until = Instant::now() + HELD_BRIEFLY;
    loop {
        let holder = client.query_opt(query, &[&config.slot]).await;
        let holder = holder.map_err(|cause| sql_error("look at", &object, cause))?;
        let Some(holder) = holder else { return Ok(()) };
        if Instant::now() >= until {
            let (pid, name, from): (Option<i32>, String, String) = (holder.get(0), holder.get(1), holder.get(2));
            let cause = format!("process {} of the server reads it for {name} at {from}", pid.unwrap_or_default());
            let remedy = "stop the other reader, or name another slot";
            return Err(Error::new(ErrorKind::Unavailable, "read", object, cause).with_remedy(remedy));
        }
        tokio::time::sleep(HELD_LOOK).await;
    }
}

fn replication_grant(config: &PostgresConfig) -> String {
    format!("alter role {} with replication", quoted(&config.server.user))
}

/// Each right that is missing, with the statement that gives it.
pub(crate) async fn missing_rights(client: &Client, config: &PostgresConfig, tables: &[String]) -> Result<Vec<Error>> {
    let fail = config.server.fail("look at rights in");
    let user = quoted(&config.server.user);
    let mut missing = Vec::new();
    let mut lack = |object: String, cause: &str, statement: String| {
        missing.push(
            Error::new(ErrorKind::Usage, "capture", object, cause.to_string()).with_remedy(format!("run: {statement}")),
        );
    };
    let query = "
        select
            rolsuper or rolreplication or exists (
                select from pg_catalog.pg_auth_members m
                join pg_catalog.pg_roles g on g.oid = m.roleid
                where m.member = r.oid and g.rolname in ('rds_replication', 'rds_superuser')
            ),
            rolsuper,
            pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'),
            exists (select from pg_catalog.pg_publication where pubname = $1)
        from pg_catalog.pg_roles r
        where rolname = current_user";
    let row = client.query_one(query, &[&config.publication]).await.map_err(&fail)?;
    let (replicates, is_super, creates, is_published): (bool, bool, bool, bool) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    let streams = config.polls.is_none();
    let manages = streams && config.manage && !is_published;
    if streams && !replicates {
        let cause = format!("role {} may not replicate", config.server.user);
        lack(config.server.name(), &cause, replication_grant(config));
    }
    let query = "
        select
            c.relname::text,
            pg_catalog.has_schema_privilege(n.oid, 'USAGE'),
            pg_catalog.has_table_privilege(c.oid, 'SELECT'),
            pg_catalog.pg_has_role(c.relowner, 'USAGE')
        from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = $1 and c.relname = any($2)
        order by c.relname";
    let rows = client.query(query, &[&config.schema, &tables]).await.map_err(&fail)?;
    let mut told = BTreeSet::new();
    for row in rows {
        let table: String = row.get(0);
        let name = config.qualified(&table);
        if !row.get::<_, bool>(1) && told.insert("usage") {
            let statement = format!("grant usage on schema {} to {user}", quoted(&config.schema));
            lack(format!("table {name}"), &format!("role {} may not use its schema", config.server.user), statement);
        }
        if !row.get::<_, bool>(2) {
            let cause = format!("role {} may not read it", config.server.user);
            lack(format!("table {name}"), &cause, format!("grant select on {name} to {user}"));
        }
        if manages && !is_super && !row.get::<_, bool>(3) && told.insert("publication") {
            let names: Vec<String> = tables.iter().map(|table| config.qualified(table)).collect();
            let statement = format!(
                "create publication {} for table {} with (publish_via_partition_root = true)",
                quoted(&config.publication),
                names.join(", ")
            );
            let cause = format!("role {} does not own it, and so may not publish it", config.server.user);
            lack(format!("table {name}"), &cause, format!("{statement}, as its owner"));
        }
    }
    if manages && !creates {
        let statement = format!("grant create on database {} to {user}", quoted(&config.server.database));
        lack(config.server.name(), &format!("role {} may not create a publication", config.server.user), statement);
    }
    Ok(missing)
}
