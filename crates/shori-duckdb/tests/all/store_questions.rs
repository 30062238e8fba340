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

#[tokio::test]
async fn one_statement_that_reads_is_taken_however_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.bootstrap().await.unwrap();
    for (sql, rows) in [
        (" select 1 ;\n", 1),
        ("-- first\n/* and /* then */ */ select ';' -- ; last", 1),
        ("select 1; -- done; really", 1),
        ("select 1 -- one\n;;", 1),
        ("(select 1) union select 2", 2),
        ("with numbers as (select 1) from numbers", 1),
        ("table ctl_store", 1),
        ("values (1), (2)", 2),
        ("describe ctl_store", 4),
        ("show databases", 1),
        ("pivot (select 1 as a, 2 as b) on a using sum(b)", 1),
        ("from (pivot (select 1 as a, 2 as b) on a using sum(b));", 1),
        ("explain select 1", 1),
        ("/* how */ explain analyze (select 1) union select 2;", 1),
        ("explain (format json) select 1", 1),
        ("explain (select 1)", 1),
    ] {
        let answer = store.query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert!(answer.iter().map(|batch| batch.num_rows()).sum::<usize>() >= rows, "{sql}");
        ask(&store, sql, usize::MAX).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

#[tokio::test]
async fn what_does_not_only_read_is_refused_and_so_are_several_statements() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.bootstrap().await.unwrap();
    let file = folder.path().join("written").display().to_string();
    for (sql, cause) in [
        ("", "no statement"),
        (" -- nothing\n;", "no statement"),
        ("select 1; select 2", "only one statement"),
        ("select 1; drop table ctl_store", "only one statement"),
        ("select 1) as q; drop table ctl_store; select * from (select 2", "syntax error"),
        ("selec 1", "syntax error"),
        ("select 1 /* without end", "unterminated"),
        ("drop table ctl_store", "only reading statements"),
        ("-- select\ndrop table ctl_store", "only reading statements"),
        ("insert into ctl_checkpoints values (now())", "only reading statements"),
        ("with ended as (select now() as at) insert into ctl_checkpoints from ended", "read-only"),
        ("pivot (select 1 as a, 2 as b) on a using sum(b); drop table ctl_store", "only one statement"),
        ("explain analyze insert into ctl_checkpoints values (now())", "only reading statements"),
        ("explain analyze copy ctl_store to 'FILE'", "only reading statements"),
        ("copy ctl_store to 'FILE'", "only reading statements"),
        ("attach 'FILE' as other", "only reading statements"),
        ("export database 'FILE'", "only reading statements"),
        ("set threads = 1", "only reading statements"),
        ("pragma threads = 1", "only reading statements"),
        ("commit", "only reading statements"),
        ("checkpoint", "only reading statements"),
    ] {
        let sql = sql.replace("FILE", &file);
        for refused in [store.query(&sql).await.err(), ask(&store, &sql, 1).await.err()] {
            let refused = refused.unwrap_or_else(|| panic!("{sql:?} was answered")).to_string();
            assert!(refused.contains(cause), "{sql:?}: {refused}");
        }
    }
    assert_eq!(ask(&store, "table ctl_store", 1).await.unwrap(), 1);
    assert_eq!(ask(&store, "table ctl_checkpoints", 1).await.unwrap(), 0);
    assert!(!std::path::Path::new(&file).exists());
}
