//! The demo's progress as plain lines, where there is no terminal to draw on: a log of a CI run, a pipe.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use shori_core::{Error, ErrorKind, Result};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::demo::Counts;

const EVERY: Duration = Duration::from_secs(3);

/// Prints a line every few seconds until the pipeline stops.
pub fn print(counts: Arc<Counts>, stop: CancellationToken, changes: Option<u64>) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                _ = stop.cancelled() => return Ok(()),
                _ = tokio::time::sleep(EVERY) => {}
            }
            writeln!(std::io::stdout(), "{}", line(&counts, changes)).map_err(|cause| {
                Error::new(ErrorKind::Refused, "print", "the demo's progress", cause).with_remedy("use --json")
            })?;
        }
    })
}

fn line(counts: &Counts, changes: Option<u64>) -> String {
    let generated = counts.generated.load(Ordering::Relaxed);
    let captured = counts.captured.load(Ordering::Relaxed);
    let (projected, median) = (counts.freshness.projected(), counts.freshness.percentiles().p50);
    let of = changes.map(|changes| format!(" of {changes}")).unwrap_or_default();
    let at = counts.begun.elapsed().as_secs_f64();
    format!(
        "{at:.0} s: {generated}{of} changes generated, {captured} captured, {projected} projected (p50 {median:.0} ms)"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Instant;

    use super::*;
    use crate::freshness::Freshness;

    #[test]
    fn a_line_tells_how_far_everything_has_come() {
        let counts = Counts {
            begun: Instant::now(),
            generated: AtomicU64::new(30),
            captured: AtomicU64::new(20),
            freshness: Freshness::new(1),
        };
        assert_eq!(line(&counts, Some(100)), "0 s: 30 of 100 changes generated, 20 captured, 0 projected (p50 0 ms)");
        assert!(line(&counts, None).starts_with("0 s: 30 changes generated"));
    }
}
