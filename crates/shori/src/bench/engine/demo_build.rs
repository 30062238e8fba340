//! engine.demo_build: from a fresh clone, with empty caches, to the demo's first result.
//!
//! Clones the repository that the current folder belongs to, at its last commit, builds it as a newcomer does, and ends
//! with the demo's verified result. Packages of crates.io come through cargo's own cache, so the network is left out;
//! DuckDB's library is fetched. On a machine with more than two cores, two are used.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use shori_core::{Error, ErrorKind, Result};

use crate::bench::{Measured, Place};

pub(super) const FOLDER: &str = "demo_build";
const CHANGES: u64 = 10_000;

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let folder = place.fresh(FOLDER)?;
    let top = Command::new("git").args(["rev-parse", "--show-toplevel"]).output();
    let top = top.map_err(|cause| Error::new(ErrorKind::Usage, "run", "git", cause))?;
    if !top.status.success() {
        let cause = "the current folder is in no repository";
        return Err(
            Error::new(ErrorKind::Usage, "clone", "the repository", cause).with_remedy("run it in a checkout of shori")
        );
    }
    let top = String::from_utf8_lossy(&top.stdout).trim().to_string();
    let begun = Instant::now();
    let clone = folder.join("clone");
    // Not hard links: a clone over the network has none.
    let clone_text = clone.display().to_string();
    run(&folder, &folder, &["git", "clone", "--quiet", "--no-hardlinks", &top, &clone_text])?;
    let cloned = begun.elapsed().as_secs_f64();
    run(&folder, &clone, &["make", "build"])?;
    let built = begun.elapsed().as_secs_f64();
    let demo = folder.join("demo").display().to_string();
    run(&folder, &clone, &["dist/shori", "demo", "--json", "--changes", &CHANGES.to_string(), "--dir", &demo])?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Measured::new(seconds).part("clone_s", cloned).part("build_s", built - cloned).part("demo_s", seconds - built))
}

/// Runs a command in `directory` on two cores, with caches of its own; what it prints goes to stderr.
fn run(folder: &Path, directory: &Path, command: &[&str]) -> Result<()> {
    let object = command.join(" ");
    let fail = |cause: String| Error::new(ErrorKind::Refused, "run", object.clone(), cause);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pinned: &[&str] = if cores > 2 { &["taskset", "-c", "0,1"] } else { &[] };
    let words: Vec<&str> = pinned.iter().chain(command).copied().collect();
    let mut process = Command::new(words[0]);
    process.args(&words[1..]).current_dir(directory).env_remove("DUCKDB_LIB_DIR");
    process.env("CARGO_TARGET_DIR", folder.join("target")).env("CACHE", folder.join("cache"));
    let output =
        process.stdin(Stdio::null()).stderr(Stdio::inherit()).output().map_err(|cause| fail(cause.to_string()))?;
    eprint!("{}", String::from_utf8_lossy(&output.stdout));
    match output.status.success() {
        true => Ok(()),
        false => Err(fail(format!("it ended with {}", output.status))),
    }
}
