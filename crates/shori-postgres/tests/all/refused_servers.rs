//! Servers that are not read, and what is told instead.

use shori_core::{Error, ErrorKind};
use shori_postgres::{inspect, install};

use crate::harness::{Reader, polled};
use crate::server::Server;

const ITEMS: &str = "
create table items (id bigint primary key, name text, changed timestamptz not null default now());
create index on items (changed);
insert into items values (1, 'a')";

/// What `shori check`, `shori init` and `shori run` say, which is one and the same.
async fn told(reader: &mut Reader) -> Error {
    let inspected = inspect(&reader.config).await.map(|inspected| inspected.captures).unwrap_err();
    let installed = install(&reader.config).await.unwrap_err();
    let started = reader.try_start().await.unwrap_err();
    for error in [&inspected, &installed] {
        assert_eq!((error.kind(), error.to_string()), (started.kind(), started.to_string()));
    }
    started
}

/// PostgreSQL 16 and newer decode on a standby, too: Shori does not use that, as a publication is made on the primary, and
/// what a standby has replayed is no end of the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused_with_the_primary_as_the_remedy() {
    let primary = Server::start(&[]);
    let database = primary.create_database().await;
    let standby = primary.start_standby();
    let mut reader = Reader::over(&primary, &database, ITEMS, &["items"]).await;
    let end = reader.value("select pg_current_wal_lsn()").await;
    reader.wait_for(&format!("exists (select from pg_stat_replication where replay_lsn >= '{end}')")).await;
    let client = standby.connect(&database).await;
    let row = client.query_one("select pg_is_in_recovery(), (select name from items where id = 1)", &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), (true, "a"), "it is a standby that follows, and answers questions");
    for is_polled in [false, true] {
        if is_polled {
            polled(&mut reader.config, "changed");
        }
        reader.config.server.port = standby.port();
        let error = told(&mut reader).await;
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        let server = format!("PostgreSQL database {database} at 127.0.0.1:{}", standby.port());
        assert_eq!(error.to_string(), format!("cannot capture {server}: it is a standby; name its primary server"));
    }
    assert_eq!(reader.value("select count(*) from pg_publication").await, "0", "nothing was made");
    assert_eq!(reader.value("select count(*) from pg_replication_slots").await, "0", "nothing was made");
    // What the remedy says is enough.
    reader.config.server.port = primary.port();
    reader.start().await;
    reader.read().await;
    reader.assert_equal("items").await;
}

/// Gives a database the looks of one of an older server: the number of its version, and a catalog without a column that
/// came later. Old servers are not to be had here, so how a real one answers a connection, session settings and all, this
/// cannot show; what is asked of it first, and what is made of the answer, it does.
fn disguise(version: u32) -> String {
    format!(
        "set allow_system_table_mods = on;
        alter function pg_catalog.current_setting(text) rename to current_setting_really;
        create function pg_catalog.current_setting(name text) returns text language sql stable as
            $$ select case name when 'server_version_num' then '{version}' else current_setting_really(name) end $$;
        alter table pg_catalog.pg_index rename column indnkeyatts to indnkeyatts_later"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_too_old_a_version_is_refused_before_its_catalog_is_looked_at() {
    for (version, shown) in [(90_624, "9"), (130_023, "13")] {
        for is_polled in [false, true] {
            let mut reader = Reader::fresh(ITEMS, &["items"]).await;
            if is_polled {
                polled(&mut reader.config, "changed");
            }
            reader.sql(&disguise(version)).await;
            let server = reader.config.server.name();
            let error = told(&mut reader).await;
            assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
            let cause = format!("its version is {shown}; use PostgreSQL 14 or newer");
            assert_eq!(error.to_string(), format!("cannot capture {server}: {cause}"));
        }
    }
    // The oldest that is read gets on: to the column that the disguise took away.
    let reader = Reader::fresh(ITEMS, &["items"]).await;
    reader.sql(&disguise(140_000)).await;
    let error = inspect(&reader.config).await.map(|inspected| inspected.captures).unwrap_err();
    assert!(error.to_string().contains("indnkeyatts"), "{error}");
}
