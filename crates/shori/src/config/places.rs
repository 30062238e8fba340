//! Folders that must be there: nothing but what makes a pipeline's files may make one, lest a mistyped path becomes an
//! empty pipeline.

use std::path::Path;

use shori_core::{Error, ErrorKind, Result};

use super::Loaded;

/// Refuses a folder of the demo pipeline that nobody has made.
pub(super) fn must_be_made(directory: &Path) -> Result<()> {
    let shown = directory.display();
    let wrong = |cause: &str| Error::new(ErrorKind::Usage, "use", format!("folder {shown}"), cause.to_string());
    if directory.is_dir() {
        return Ok(());
    }
    if directory.exists() {
        return Err(wrong("it is a file").with_remedy("name a folder"));
    }
    let remedy =
        format!("correct it, or make a pipeline there: shori init --sample --dir {shown}, or shori demo --dir {shown}");
    Err(wrong("it does not exist").with_remedy(remedy))
}

/// Why stores can neither be opened nor made.
pub(super) fn of_stores(loaded: &Loaded) -> Vec<Error> {
    let mut problems = Vec::new();
    // An empty path is refused as such.
    for store in loaded.config.stores.iter().filter(|store| !store.file().as_os_str().is_empty()) {
        let path = loaded.resolve(store.file());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (cause, remedy) = if path.is_dir() {
            (format!("its path {} is a folder", path.display()), "give the path of a file")
        } else if folder.is_dir() {
            continue;
        } else if folder.exists() {
            (format!("{} is no folder", folder.display()), "correct the store's path")
        } else {
            let cause = format!("its folder {} does not exist", folder.display());
            (cause, "create the folder, or correct the store's path")
        };
        problems.push(loaded.wrong(&format!("store {}", store.name), &cause).with_remedy(remedy));
    }
    problems
}
