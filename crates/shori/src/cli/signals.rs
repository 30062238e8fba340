//! SIGINT and SIGTERM: the first stops in order, the second at once.

use shori_core::{Error, ErrorKind, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process ended by SIGINT, as shells show it.
const INTERRUPTED: i32 = 130;

/// Cancels `stop` at the first signal. The next one, or one that comes when something else has cancelled it, ends the
/// process: nothing durable is lost by it (contract 10).
pub fn cancel_on_signal(stop: CancellationToken) -> Result<()> {
    let fail = |cause| Error::new(ErrorKind::Internal, "listen for", "signals", cause);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    tokio::spawn(async move {
        tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} () = stop.cancelled() => {} }
        if !stop.is_cancelled() {
            tracing::info!("stopping after the batch in hand; a second signal ends at once");
        }
        stop.cancel();
        tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} }
        std::process::exit(INTERRUPTED);
    });
    Ok(())
}
