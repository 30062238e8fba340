//! Ends this process by SIGKILL at a place named in the environment: for tests of crashes.
//!
//! `SHORI_FAILPOINT=project.after_advance:3` ends it when that place is reached for the third time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Signal, getpid, kill_process};
use shori_core::{Error, ErrorKind, Result, failpoint};

const VARIABLE: &str = "SHORI_FAILPOINT";

struct Armed {
    place: &'static str,
    left: AtomicU64,
}

static ARMED: OnceLock<Armed> = OnceLock::new();

/// Does nothing unless the variable is set. Fails when it names no place.
pub fn arm_from_environment() -> Result<()> {
    let Ok(wanted) = std::env::var(VARIABLE) else { return Ok(()) };
    let (name, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
    let wrong = |cause: &str| Error::new(ErrorKind::Usage, "arm", format!("{VARIABLE}={wanted}"), cause.to_string());
    let mut places = failpoint::ALL.iter().chain(failpoint::OF_EXPORT);
    let place = places.find(|place| **place == name).ok_or_else(|| wrong("there is no such place"))?;
    let left = count.parse().map_err(|_| wrong("the count is not a number"))?;
    ARMED.get_or_init(|| Armed { place, left: AtomicU64::new(left) });
    failpoint::set_hook(reached);
    Ok(())
}

fn reached(place: &'static str) {
    let Some(armed) = ARMED.get().filter(|armed| armed.place == place) else { return };
    if armed.left.fetch_sub(1, Ordering::SeqCst) == 1 {
        // Nothing runs after this; if the signal were refused, going on is what a test would see.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
