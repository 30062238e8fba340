//! engine.freshness: from a change's commit in the source to the commit of the last projection that shows it.
//!
//! Per change, over all changes of the measured time, the ones after it included until they are shown. The source's
//! commit time is that of the statement, before its commit: the measure errs on the long side.

use std::time::Duration;

use shori_core::Result;

use super::flow;
use crate::bench::{Measured, Place};
use crate::cli;

const WARM_UP_SECONDS: f64 = 15.0;
const MEASURED_SECONDS: f64 = 65.0;

pub(super) fn measure(place: &Place) -> Result<Measured> {
    let shorter = place.scale.max(0.1);
    let seconds = |seconds: f64| Duration::from_secs_f64(seconds * shorter);
    let flow = cli::block_on(flow::run(place, seconds(WARM_UP_SECONDS), seconds(MEASURED_SECONDS)))?;
    let mut measured =
        flow.seen.measured()?.part("generated", flow.generated as f64).part("generator_late_s", flow.late_seconds);
    match flow.caught_up_seconds {
        Some(seconds) => measured = measured.part("caught_up_s", seconds),
        None => measured.note = Some("the pipeline did not keep up: changes not shown are not counted".into()),
    }
    Ok(measured)
}
