//! Threads for work that nobody waits for.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Above the nice value of the process: of a contended core, such a thread gets about a quarter: who waits for what it
/// holds would wait for long with less.
#[cfg(target_os = "linux")]
const NICER: i32 = 5;

/// A thread that has a core when no one else wants it: what it does would hold up commits, and is none the worse for waiting.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).spawn(|| {
        yield_to_others();
        work();
    })
}

/// Linux keeps a nice value for each thread (`setpriority(2)`, "C library/kernel differences"); where it is the process's,
/// it stays as it is.
fn yield_to_others() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(NICER) {
        tracing::debug!(%error, "background work has the priority of everything else");
    }
}
