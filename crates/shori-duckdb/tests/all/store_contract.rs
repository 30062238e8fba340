//! The DuckDB store under the contract that every store keeps.

use async_trait::async_trait;
use shori_core::projection::{Target, history};
use shori_core::store::Store;
use shori_core::testing::store_contract::{StoreHarness, StoreSystem, run};
use shori_core::testing::value::{Row, rows_of};
use shori_duckdb::database::Database;
use shori_duckdb::store::DuckdbStore;

struct Files;

/// Handles to one file share one instance: a process must not open a DuckDB file twice.
struct File {
    directory: tempfile::TempDir,
    database: Database,
}

impl File {
    fn store(&self) -> DuckdbStore {
        DuckdbStore::open(&self.database, &self.directory.path().join("serving.duckdb"), "serving").unwrap()
    }
}

#[async_trait]
impl StoreHarness for Files {
    async fn fresh(&self) -> Box<dyn StoreSystem> {
        let directory = tempfile::tempdir().unwrap();
        let database = crate::store::database(directory.path());
        Box::new(File { directory, database })
    }

    fn seeds(&self) -> u64 {
        3
    }
}

#[async_trait]
impl StoreSystem for File {
    async fn open(&self) -> Box<dyn Store> {
        Box::new(self.store())
    }

    async fn rows(&self, _store: &dyn Store, target: &Target) -> Vec<Row> {
        let columns = target.columns.fields().iter().map(|field| {
            let own = [history::CREATED_AT, history::UPDATED_AT, history::BATCH_ID, history::SURROGATE_KEY];
            let renamed =
                target.columns.field_with_name(history::VALID_FROM).is_ok() && own.contains(&field.name().as_str());
            if renamed { format!("\"{}__source\"", field.name()) } else { format!("\"{}\"", field.name()) }
        });
        let sql = format!("select {} from \"{}\"", columns.collect::<Vec<_>>().join(", "), target.projection);
        self.store().query(&sql).await.unwrap().iter().flat_map(rows_of).collect()
    }
}

#[tokio::test]
async fn the_contract_of_stores_holds() {
    run(&Files).await;
}
