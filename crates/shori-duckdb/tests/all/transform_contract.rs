//! The DuckDB transform under the contract that every transform keeps, and how it treats its cache file.

use std::path::Path;

use async_trait::async_trait;
use shori_core::testing::model_projections::latest;
use shori_core::testing::transform_contract::{TransformHarness, TransformSystem, run};
use shori_core::transform::Transform;
use shori_core::{ErrorKind, projection::Derivation, projection::Projection, projection::SqlProjection};
use shori_duckdb::transform::DuckdbTransform;

use crate::transform_random::{projections_in_sql, transform};

struct Files;

struct File(tempfile::TempDir);

#[async_trait]
impl TransformHarness for Files {
    async fn fresh(&self) -> Box<dyn TransformSystem> {
        Box::new(File(tempfile::tempdir().unwrap()))
    }

    fn seeds(&self) -> u64 {
        3
    }
}

#[async_trait]
impl TransformSystem for File {
    async fn open(&self) -> Box<dyn Transform> {
        Box::new(transform(self.0.path()))
    }
}

#[tokio::test(start_paused = true)]
async fn the_transform_keeps_its_contract() {
    run(&Files).await;
}

fn cache(directory: &Path) -> std::path::PathBuf {
    directory.join("state.sqlite")
}

#[tokio::test]
async fn a_file_that_is_no_cache_is_moved_aside() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(cache(directory.path()), b"not a database at all").unwrap();
    transform(directory.path()).open("store", &[], &[]).await.unwrap();
    let kept = std::fs::read(directory.path().join("state.sqlite.replaced")).unwrap();
    assert_eq!(kept, b"not a database at all");
    std::fs::remove_file(cache(directory.path())).unwrap();
    let foreign = duckdb::Connection::open(cache(directory.path())).unwrap();
    foreign.execute_batch("create table mine (a integer); insert into mine values (1)").unwrap();
    drop(foreign);
    transform(directory.path()).open("store", &[], &[]).await.unwrap();
    let kept = duckdb::Connection::open(directory.path().join("state.sqlite.replaced")).unwrap();
    assert_eq!(kept.query_row("select a from mine", [], |row| row.get::<_, i32>(0)).unwrap(), 1);
}

#[tokio::test]
async fn a_cache_of_an_older_layout_starts_afresh() {
    let directory = tempfile::tempdir().unwrap();
    transform(directory.path()).open("store", &[], &[]).await.unwrap();
    let file = rusqlite::Connection::open(cache(directory.path())).unwrap();
    file.execute_batch("pragma user_version = 0").unwrap();
    drop(file);
    let again: DuckdbTransform = transform(directory.path());
    again.open("store", &[], &[]).await.unwrap();
    assert!(directory.path().join("state.sqlite.replaced").exists());
    assert!(again.applied().await.unwrap().is_empty());
}

/// A program that does not know what this one adds to a file moves it aside.
#[tokio::test]
async fn a_cache_of_the_layout_before_goes_on_as_one_of_this() {
    let directory = tempfile::tempdir().unwrap();
    transform(directory.path()).open("store", &[], &[]).await.unwrap();
    let open = || rusqlite::Connection::open(cache(directory.path())).unwrap();
    open().execute_batch("pragma user_version = 1; drop table result_log").unwrap();
    transform(directory.path()).open("store", &[], &[]).await.unwrap();
    assert!(!directory.path().join("state.sqlite.replaced").exists());
    let version: i32 = open().query_row("pragma user_version", [], |row| row.get(0)).unwrap();
    let logged: i64 = open().query_row("select count(*) from result_log", [], |row| row.get(0)).unwrap();
    assert_eq!((version, logged), (2, 0));
}

#[tokio::test]
async fn a_query_that_does_not_bind_is_named_with_file_and_line() {
    use shori_core::position::CaptureId;
    use shori_core::testing::transactions::model_tables;
    use shori_core::transform::StateTable;

    let directory = tempfile::tempdir().unwrap();
    let transform = transform(directory.path());
    let tables: Vec<StateTable> = (model_tables().into_iter())
        .map(|schema| StateTable { capture: CaptureId::new("shop", &schema.table), schema: schema.into() })
        .collect();
    let mut projections = projections_in_sql();
    projections.push(latest("orders"));
    for projection in &mut projections {
        if let Projection { name, derivation: Derivation::Sql(SqlProjection { text, .. }) } = projection
            && **name == *"kpi"
        {
            *text = "select order_id,\n  no_such_column\nfrom orders;".into();
        }
    }
    transform.open("store", &tables, &projections).await.unwrap();
    let error = transform.describe("kpi").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Projection);
    assert!(
        error.to_string().contains("sql/kpi.sql, line 2") && error.to_string().contains("no_such_column"),
        "{error}"
    );
    let columns = transform.describe("sums").await.unwrap();
    assert_eq!(columns.fields().len(), 3);
    assert_eq!(transform.describe("orders_latest").await.unwrap().fields().len(), 6);
}
