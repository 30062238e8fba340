//! Targets that are called what the store's own statements call something else.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shori_core::position::Position;
use shori_core::projection::Target;
use shori_core::store::{OutputKind, OutputRows, Store};

use crate::store::*;
use crate::store_layers::{is_layered, merge, replacement, versions};
use crate::store_output::*;

/// Aliases, tables and words of such statements. `serving` is the store.
const NAMES: [&str; 10] = ["e", "l", "n", "o", "r", "serving", "shori_changes", "shori_closed", "shori_versions", "t"];
const STEPS: u64 = 12;

#[tokio::test]
async fn rows_of_a_target_of_any_name_are_what_a_map_holds() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    for (seed, name) in NAMES.into_iter().enumerate() {
        let target = Target { projection: name.into(), ..rows_target() };
        store.prepare_target(&target).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
        let (mut model, mut layered) = (Rows::new(), 0);
        for step in 1..STEPS {
            let (kind, parts) = match step == 3 || random.random_bool(0.1) {
                true => (OutputKind::Replace, replacement(&mut random, &mut model)),
                false => (OutputKind::Merge, merge(&mut random, &mut model)),
            };
            let outcome = commit(&store, &target, (step - 1, step), kind, parts, Position::ZERO).await;
            outcome.unwrap_or_else(|error| panic!("{name} step {step} {kind:?}: {error}"));
            assert_eq!(
                rows_in(&store, name).await,
                model.clone().into_iter().collect::<Vec<_>>(),
                "{name} step {step}"
            );
            layered += usize::from(is_layered(&store, &target).await);
        }
        assert!(layered > 0, "{name}: no step ended in layers");
    }
}

#[tokio::test]
async fn versions_of_a_target_of_any_name_are_what_a_list_holds() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.bootstrap().await.unwrap();
    for (seed, name) in NAMES.into_iter().enumerate() {
        let target = Target { projection: name.into(), ..versions_target() };
        store.prepare_target(&target).await.unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
        let (mut model, mut layered) = (Vec::new(), 0);
        for step in 1..STEPS {
            let (kind, parts) = if step == 3 || random.random_bool(0.1) {
                (OutputKind::ReplaceVersions, vec![OutputRows::Version(version_rows(&model))])
            } else {
                (OutputKind::Versions, versions(&mut random, &mut model, step, 6))
            };
            let outcome = commit(&store, &target, (step - 1, step), kind, parts, Position::ZERO).await;
            outcome.unwrap_or_else(|error| panic!("{name} step {step} {kind:?}: {error}"));
            assert_eq!(versions_in(&store, name).await.0, model, "{name} step {step} {kind:?}");
            layered += usize::from(is_layered(&store, &target).await);
        }
        let later = format!("select count(*) from serving.main.\"{name}_as_of\"(timestamp '2000-01-01')");
        store.query(&later).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(layered > 0, "{name}: no step ended in layers");
    }
}
