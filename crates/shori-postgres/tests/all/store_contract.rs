//! The PostgreSQL store under the contract that every store keeps.

use async_trait::async_trait;
use shori_core::projection::Target;
use shori_core::store::Store;
use shori_core::testing::store_contract::{StoreHarness, StoreSystem, run};
use shori_core::testing::value::Row;
use shori_postgres::{PostgresStore, Server as Address};
use tokio_postgres::Client;

use crate::harness::address;
use crate::server::Server;
use crate::stored::rows_of;

struct Databases;

struct Database {
    address: Address,
    client: Client,
}

#[async_trait]
impl StoreHarness for Databases {
    async fn fresh(&self) -> Box<dyn StoreSystem> {
        let server = Server::shared();
        let name = server.create_database().await;
        Box::new(Database { address: address(server, &name), client: server.connect(&name).await })
    }

    fn seeds(&self) -> u64 {
        std::env::var("SHORI_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(4)
    }
}

#[async_trait]
impl StoreSystem for Database {
    async fn open(&self) -> Box<dyn Store> {
        Box::new(PostgresStore::new(self.address.clone(), "warehouse".into()))
    }

    async fn rows(&self, _store: &dyn Store, target: &Target) -> Vec<Row> {
        rows_of(&self.client, "warehouse", target).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_stores_holds() {
    run(&Databases).await;
}
