//! Questions of people, and who goes away in the middle of an answer.

use std::sync::Arc;

use shori_core::store::Store;
use shori_duckdb::store::DuckdbStore;

use crate::store::*;

/// Asks, takes at most so many batches, and lets go of the answer; the rows that came.
async fn ask(store: &DuckdbStore, sql: &str, batches_max: usize) -> shori_core::Result<usize> {
    let mut answer = store.stream(sql).await?;
    let mut rows = 0;
    for _ in 0..batches_max {
        match answer.next().await {
            Some(batch) => rows += batch?.num_rows(),
            None => break,
        }
    }
    Ok(rows)
}

/// A connection is closed by the thread that used it, while who asked ends what may still run on it: an interruption that
/// came after the connection was gone ended the whole process once in some thousand questions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_may_end_and_be_let_go_of_at_the_same_moment() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(folder.path()));
    store.bootstrap().await.unwrap();
    let asking = (0..4).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..500 {
                assert!(ask(&store, "select * from nowhere", 1).await.is_err());
                assert_eq!(ask(&store, "select 1", usize::MAX).await.unwrap(), 1);
                assert_eq!(ask(&store, "select 1", 1).await.unwrap(), 1);
                assert!(ask(&store, "from range(1_000_000)", 1).await.unwrap() > 0);
            }
        })
    });
    for asking in asking.collect::<Vec<_>>() {
        asking.await.unwrap();
    }
}
