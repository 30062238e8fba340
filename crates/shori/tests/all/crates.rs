//! The tree is the architecture: which crate may know which.

use std::collections::BTreeSet;

use cargo_metadata::{DependencyKind, MetadataCommand, Package};

/// Crates that speak to one outside system each.
const SYSTEMS: [&str; 4] = ["shori-sqlite", "shori-duckdb", "shori-postgres", "shori-files"];

/// Drivers, servers and files: none of them is the core's business.
const DRIVERS: [&str; 14] = [
    "duckdb",
    "rusqlite",
    "libsqlite3-sys",
    "libduckdb-sys",
    "tokio-postgres",
    "postgres",
    "tiberius",
    "rdkafka",
    "deltalake",
    "object_store",
    "axum",
    "hyper",
    "reqwest",
    "clap",
];

fn packages() -> Vec<Package> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml");
    MetadataCommand::new().manifest_path(manifest).no_deps().exec().unwrap().packages
}

/// What a crate uses in the program, and in its tests where `tests`.
fn uses(package: &Package, tests: bool) -> BTreeSet<String> {
    let counts = |kind: DependencyKind| tests || kind != DependencyKind::Development;
    let used = package.dependencies.iter().filter(|dependency| counts(dependency.kind));
    used.map(|dependency| dependency.name.clone()).collect()
}

#[test]
fn system_crates_know_the_core_and_never_each_other() {
    let packages = packages();
    for system in SYSTEMS {
        let package = packages.iter().find(|package| package.name == system).expect(system);
        let own = uses(package, true).into_iter().filter(|name| name.starts_with("shori"));
        assert_eq!(own.collect::<Vec<_>>(), ["shori-core"], "{system}");
    }
}

#[test]
fn the_core_knows_no_driver_and_no_other_crate_of_ours() {
    let packages = packages();
    let core = packages.iter().find(|package| package.name == "shori-core").unwrap();
    let used = uses(core, true);
    assert!(!used.iter().any(|name| name.starts_with("shori") && name != "shori-core"), "{used:?}");
    for driver in DRIVERS {
        assert!(!used.contains(driver), "shori-core uses {driver}");
    }
}

/// The transform keeps its cache in a SQLite file of its own: that is no system that anybody else runs.
#[test]
fn a_source_uses_no_driver_of_another_system() {
    let packages = packages();
    let sqlite = packages.iter().find(|package| package.name == "shori-sqlite").unwrap();
    assert!(!uses(sqlite, true).contains("duckdb"));
    let files = packages.iter().find(|package| package.name == "shori-files").unwrap();
    assert!(DRIVERS.iter().all(|driver| !uses(files, true).contains(*driver)));
}

#[test]
fn every_crate_is_a_system_the_core_or_the_program() {
    let names: BTreeSet<String> = packages().iter().map(|package| package.name.to_string()).collect();
    let known = SYSTEMS.into_iter().chain(["shori", "shori-core"]).map(String::from).collect();
    assert_eq!(names, known, "a new system crate belongs into SYSTEMS");
}
