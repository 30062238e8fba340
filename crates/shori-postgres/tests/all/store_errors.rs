//! What the store says, and does next, when its server refuses or is not there.

use shori_core::ErrorKind;
use shori_core::change::Op;
use shori_core::error::Response;
use shori_core::position::Position;
use shori_core::store::{Appended, Store};
use shori_postgres::PostgresStore;

use crate::harness::address;
use crate::server::Server;
use crate::stored::*;

async fn append_one(store: &PostgresStore) -> shori_core::Result<Appended> {
    let changes = [batch("orders", &[image(1, 0, Op::Insert, 1, "a")])];
    append(store, &[("orders", Position::ZERO)], &changes, at(1, 0)).await
}

async fn prepared() -> Stored {
    let stored = Stored::fresh().await;
    stored.store.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
    stored
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_server_have_the_kind_that_says_what_to_do() {
    for (code, kind, response) in [
        ("53100", ErrorKind::Unavailable, Response::Retry),
        ("53200", ErrorKind::Unavailable, Response::Retry),
        ("40P01", ErrorKind::Unavailable, Response::Retry),
        ("57P01", ErrorKind::Unavailable, Response::Retry),
        ("22003", ErrorKind::Data, Response::StopPart),
        ("42501", ErrorKind::Usage, Response::StopPipeline),
    ] {
        let Stored { store, client, .. } = prepared().await;
        let refuse = format!(
            "create function refuse() returns trigger language plpgsql as
                $$ begin raise exception 'the test says so' using errcode = '{code}'; end $$;
            create trigger refuse before insert on stg_cdc_orders for each row execute function refuse()"
        );
        client.batch_execute(&refuse).await.unwrap();
        let error = append_one(&store).await.unwrap_err();
        assert_eq!((error.kind(), error.response()), (kind, response), "{error}");
        assert!(error.to_string().contains("stg_cdc_orders: the test says so"), "{error}");
        client.batch_execute("drop trigger refuse on stg_cdc_orders").await.unwrap();
        assert_eq!(append_one(&store).await.unwrap(), Appended::Applied { rows: 1 }, "nothing of it was left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_are_durable_whatever_the_database_says() {
    let Stored { store, client, database } = prepared().await;
    drop(store);
    let defaults = format!(
        "alter database {database} set synchronous_commit = off;
        alter database {database} set default_transaction_isolation = 'serializable';
        alter database {database} set idle_in_transaction_session_timeout = '1s';
        create table seen (synchronous_commit text, isolation text);
        create function see() returns trigger language plpgsql as $$ begin
            insert into seen values (current_setting('synchronous_commit'), current_setting('transaction_isolation'));
            return new;
        end $$;
        create trigger see before insert on stg_cdc_orders for each row execute function see()"
    );
    client.batch_execute(&defaults).await.unwrap();
    append_one(&open(Server::shared(), &database)).await.unwrap();
    let row = client.query_one("select * from seen", &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), ("on", "read committed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_its_server_says_where_it_looked() {
    let mut nowhere = address(Server::shared(), "missing");
    let error = PostgresStore::new(nowhere.clone(), "public".into()).bootstrap().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    nowhere.port = 1;
    let error = PostgresStore::new(nowhere, "public".into()).bootstrap().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_a_newer_version_is_left_as_it_is() {
    let Stored { store, client, database } = Stored::fresh().await;
    drop(store);
    client.batch_execute("update ctl_store set layout_version = 99").await.unwrap();
    let error = open(Server::shared(), &database).bootstrap().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
}

/// Stores of several schemas in one database do not meet; odd names are names.
#[tokio::test(flavor = "multi_thread")]
async fn each_schema_is_a_store_of_its_own_and_many_may_be_made_at_once() {
    let server = Server::shared();
    let database = server.create_database().await;
    let open = |schema: &str| PostgresStore::new(address(server, &database), schema.into());
    let schema = "Shop's \"own\"";
    let all = (0..6).map(|_| async {
        let store = open(schema);
        let id = store.bootstrap().await.unwrap();
        store.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
        id
    });
    let ids = futures::future::join_all(all).await;
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let other = open("other");
    assert_ne!(other.bootstrap().await.unwrap(), ids[0]);
    assert!(other.captures().await.unwrap().is_empty());
    let store = open(schema);
    assert_eq!(append_one(&store).await.unwrap(), Appended::Applied { rows: 1 });
    assert_eq!(whole_log(&store, "orders").await.len(), 1);
}
