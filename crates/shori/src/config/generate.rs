//! What `shori generate` does where the command line does not say.

use serde::Deserialize;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateConfig {
    /// Seconds from one round of a few changes to the next; flat out if not given.
    pub interval_seconds: Option<f64>,
}
