//! What goes wrong with a file, and what the person reads.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use shori_core::change::Op;
use shori_core::position::Position;
use shori_core::store::{Appended, Store};
use shori_core::{Error, ErrorKind, Result};
use shori_duckdb::store::DuckdbStore;

use crate::store::*;

fn try_open(directory: &Path) -> Result<DuckdbStore> {
    DuckdbStore::open(&database(directory), &directory.join("serving.duckdb"), "serving")
}

/// Opens, and reads the whole log.
async fn open_and_read(directory: &Path) -> Result<usize> {
    let store = try_open(directory)?;
    store.bootstrap().await?;
    let stream = store.read_log(&id("orders"), &Position::ZERO, &at(u64::MAX, 0)).await?;
    let batches: Vec<_> = futures::TryStreamExt::try_collect(stream).await?;
    Ok(images(&batches).len())
}

async fn filled(directory: &Path, rows: u64) {
    let store = open(directory);
    store.bootstrap().await.unwrap();
    store.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
    let images: Vec<_> = (1..=rows).map(|n| image(n, 0, Op::Insert, n as i64, &format!("text {n}"))).collect();
    append(&store, &[("orders", Position::ZERO)], &[batch("orders", &images)], at(rows, 0)).await.unwrap();
}

#[track_caller]
fn assert_tells(error: &Error, kind: ErrorKind, name: &str) {
    println!("{error}");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(name), "{error}");
    assert!(error.remedy().is_some(), "{error}");
}

#[tokio::test]
async fn a_file_of_another_kind_is_called_what_it_is() {
    let text = b"these are only some words, and more of them than a header has".repeat(200);
    let sqlite = [b"SQLite format 3\0".to_vec(), vec![0; 8192]].concat();
    for content in [text, sqlite, vec![1, 2, 3]] {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("serving.duckdb"), content).unwrap();
        let error = try_open(directory.path()).err().unwrap();
        assert_tells(&error, ErrorKind::Corrupt, "serving.duckdb");
    }
}

#[tokio::test]
async fn a_damaged_file_is_found_when_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path(), 300_000).await;
    let path = directory.path().join("serving.duckdb");
    assert_eq!(open_and_read(directory.path()).await.unwrap(), 300_000);
    let whole = std::fs::read(&path).unwrap();
    assert!(whole.len() > 1_000_000, "the rows are in the file: {}", whole.len());
    for at in [whole.len() / 3, whole.len() / 2, whole.len() - 300_000] {
        let mut damaged = whole.clone();
        damaged[at..at + 4096].iter_mut().for_each(|byte| *byte ^= 0x5a);
        std::fs::write(&path, &damaged).unwrap();
        if let Err(error) = open_and_read(directory.path()).await {
            assert_tells(&error, ErrorKind::Corrupt, "");
        }
    }
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = open_and_read(directory.path()).await.unwrap_err();
    assert_tells(&error, ErrorKind::Corrupt, "");
}

#[tokio::test]
async fn a_newer_layout_is_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    filled(directory.path(), 1).await;
    {
        let database = database(directory.path());
        database.attach(&directory.path().join("serving.duckdb"), "serving").unwrap();
        let connection = database.connect("serving").unwrap();
        connection.execute_batch("update ctl_store set layout_version = 1000").unwrap();
    }
    let error = open(directory.path()).bootstrap().await.unwrap_err();
    assert_tells(&error, ErrorKind::Usage, "1000");
}

/// Not a test of its own: the other process of the test below. It ends when its standard input does.
#[test]
#[ignore = "run by another test, as another process"]
fn hold_the_file() {
    let Ok(directory) = std::env::var("SHORI_HOLD") else { return };
    let store = open(Path::new(&directory));
    println!("held");
    let _ = std::io::stdin().lock().lines().count();
    drop(store);
}

#[tokio::test]
async fn a_file_that_another_process_holds_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store_errors::hold_the_file", "--ignored", "--nocapture"])
        .env("SHORI_HOLD", directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("held")));
    let error = try_open(directory.path()).err().unwrap();
    assert_tells(&error, ErrorKind::InUse, "serving.duckdb");
    drop(holder.stdin.take());
    holder.wait().unwrap();
    try_open(directory.path()).unwrap();
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_appends_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let small = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(directory.path()).output();
    if !small.is_ok_and(|output| output.status.success()) {
        println!("skipped: this process may not mount a small file system");
        return;
    }
    let _mounted = Mounted(directory.path());
    let mut durable = 0;
    let mut failed = None;
    {
        let store = open(directory.path());
        store.bootstrap().await.unwrap();
        store.prepare_captures("t", "here", &[info("orders")]).await.unwrap();
        for round in 0..200u64 {
            // Text that does not compress.
            let text = |n: u64| format!("{:x}", md5_like(n)).repeat(3);
            let images: Vec<_> =
                (1..=2_000).map(|n| image(durable + n, 0, Op::Insert, n as i64, &text(durable + n))).collect();
            let expected = if durable == 0 { Position::ZERO } else { at(durable, 0) };
            match append(&store, &[("orders", expected)], &[batch("orders", &images)], at(durable + 2_000, 0)).await {
                Ok(done) => assert_eq!(done, Appended::Applied { rows: 2_000 }),
                Err(error) => {
                    failed = Some((round, error));
                    break;
                }
            }
            durable += 2_000;
        }
        let (_, error) = failed.unwrap();
        assert_tells(&error, ErrorKind::DiskFull, "");
        // Whatever follows says so too, or that a restart is needed.
        let again = [batch("orders", &[image(durable + 1, 0, Op::Insert, 1, "x")])];
        if let Err(error) = append(&store, &[("orders", at(durable, 0))], &again, at(durable + 1, 0)).await {
            println!("{error}");
            assert!(matches!(error.kind(), ErrorKind::DiskFull | ErrorKind::Corrupt), "{error}");
            assert!(error.remedy().is_some());
        } else {
            durable += 1;
        }
    }
    // More room, as after a person has acted.
    let more = Command::new("mount").args(["-o", "remount,size=64m"]).arg(directory.path()).status().unwrap();
    assert!(more.success());
    let store = open(directory.path());
    let rows = whole_log(&store, "orders").await;
    let staged = store.captures().await.unwrap()[&id("orders")].watermark.staged;
    println!("{} rows, staged {staged}, durable {durable}", rows.len());
    assert_eq!(rows.last().map(|image| image.position), Some(staged));
    assert!(staged >= at(durable, 0), "what was applied is there");
    std::io::stdout().flush().unwrap();
}

/// Sixteen bytes that look like chance.
fn md5_like(number: u64) -> u128 {
    let mix =
        |value: u64| value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    u128::from(mix(number)) << 64 | u128::from(mix(number ^ 0xffff))
}
