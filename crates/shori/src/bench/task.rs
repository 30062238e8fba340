//! Steps of a benchmark in processes of their own: this program, started again with a hidden option.

use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use shori_core::{Error, ErrorKind, Result};

use super::machine::{peak_resident_mb, processor_seconds};
use super::{Measured, Place};

/// What a task's process prints as its only line.
#[derive(Serialize, Deserialize)]
struct Answer {
    measured: Measured,
    peak_resident_mb: f64,
    processor_s: f64,
}

/// The part that tells the peak resident memory of a task's process.
pub const PEAK_RESIDENT_MB: &str = "peak_resident_mb";

/// The part that tells the processor time of a task's process: on a busy machine it says more than time does.
const PROCESSOR_S: &str = "processor_s";

/// Prints what this process measured, with what it took.
pub fn answer(measured: &Measured) -> Result<()> {
    let (peak_resident_mb, processor_s) = (peak_resident_mb(), processor_seconds());
    let answer = Answer { measured: measured.clone(), peak_resident_mb, processor_s };
    crate::cli::print_json(&answer)
}

/// Runs a task and waits for it. What it measured has what its process took among its parts.
pub fn run(place: &Place, suite: &str, name: &str) -> Result<Measured> {
    run_with(place, suite, name, &[])
}

/// The same, with more in its environment.
pub fn run_with(place: &Place, suite: &str, name: &str, environment: &[(&str, String)]) -> Result<Measured> {
    eprintln!("{name} ...");
    let fail = |cause: String| Error::new(ErrorKind::Refused, "run", format!("benchmark task {name}"), cause);
    let program = std::env::current_exe().map_err(|cause| fail(cause.to_string()))?;
    let scale = place.scale.to_string();
    let output = Command::new(program)
        .args(["bench", suite, "--task", name, "--scale", &scale, "--work"])
        .arg(&place.work)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|cause| fail(cause.to_string()))?;
    if !output.status.success() {
        return Err(fail(format!("it ended with {}", output.status)));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|cause| fail(cause.to_string()))?;
    Ok(answer.measured.part(PEAK_RESIDENT_MB, answer.peak_resident_mb).part(PROCESSOR_S, answer.processor_s))
}
