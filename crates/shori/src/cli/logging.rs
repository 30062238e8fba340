//! Where log lines go, and which.
//!
//! To stderr, or with `--log-dir` to a file a day in that folder, and to stderr besides where that is a terminal: a service
//! whose output is kept anyway would keep each line twice.

use std::io::IsTerminal;
use std::path::Path;

use shori_core::{Error, ErrorKind, Result};
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub(super) const VARIABLE: &str = "LOG_LEVEL";
pub(super) const DEFAULT: &str = "warn";

/// Files of as many days are kept.
const DAYS_KEPT: usize = 14;
/// Leads to the file of the day.
const NEWEST: &str = "shori.log";

/// Libraries that tell of every acknowledgement at level info, and of every value they send at level debug.
const QUIET: [&str; 2] = ["pg_walstream", "tokio_postgres"];

/// Names that other programs have for our levels.
const OTHER_NAMES: [(&str, &str); 4] =
    [("warning", "warn"), ("critical", "error"), ("fatal", "error"), ("err", "error")];

/// A filter as `tracing` reads it. The filter itself takes any word, as the name of a module.
pub(super) fn level(text: &str) -> std::result::Result<String, String> {
    if text.trim().is_empty() {
        return Ok(DEFAULT.into());
    }
    let parts: std::result::Result<Vec<String>, String> = text.split(',').map(part).collect();
    let filter = parts?.join(",");
    EnvFilter::try_new(&filter).map(|_| filter.clone()).map_err(|cause| cause.to_string())
}

fn part(text: &str) -> std::result::Result<String, String> {
    let (module, level) = text.rsplit_once('=').map_or((None, text), |(module, level)| (Some(module), level));
    let level = level.trim();
    let other = OTHER_NAMES.iter().find(|(name, _)| level.eq_ignore_ascii_case(name));
    let known = other.map_or(level, |(_, name)| name);
    let parsed = known.parse::<LevelFilter>();
    let parsed = parsed.map_err(|_| format!("{level:?} is no level: give error, warn, info, debug, trace or off"))?;
    Ok(module.map_or_else(|| parsed.to_string(), |module| format!("{module}={parsed}")))
}

/// Starts logging by a filter of [`level`].
pub(super) fn start(level: &str, directory: Option<&Path>) -> Result<()> {
    let chosen = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let quiet = QUIET.into_iter().filter(|library| !level.contains(library));
    let quiet = quiet.filter_map(|library| format!("{library}=warn").parse().ok());
    let filter = quiet.fold(chosen, EnvFilter::add_directive);
    let is_terminal = std::io::stderr().is_terminal();
    let file = directory.map(file).transpose()?;
    let file = file.map(|file| tracing_subscriber::fmt::layer().with_writer(file).with_ansi(false).with_target(false));
    let console = (file.is_none() || is_terminal).then(|| {
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(is_terminal).with_target(false)
    });
    tracing_subscriber::registry().with(filter).with(console).with(file).init();
    Ok(())
}

fn file(directory: &Path) -> Result<RollingFileAppender> {
    let fail = |cause: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(ErrorKind::Usage, "write logs to", format!("folder {}", directory.display()), cause)
            .with_remedy("name a folder that can be written to as --log-dir")
    };
    // The appender makes it too, and complains on stderr that it is not there.
    std::fs::create_dir_all(directory).map_err(|cause| fail(cause.into()))?;
    // The link to the newest file holds the path as it is given here.
    let directory = std::fs::canonicalize(directory).map_err(|cause| fail(cause.into()))?;
    RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("shori")
        .filename_suffix("log")
        .latest_symlink(NEWEST)
        .max_log_files(DAYS_KEPT)
        .build(directory)
        .map_err(|cause| fail(cause.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_by_any_of_their_names() {
        for (text, wanted) in [
            ("", "warn"),
            ("info", "info"),
            ("WARNING", "warn"),
            ("Critical", "error"),
            ("DEBUG", "debug"),
            ("off", "off"),
            ("warn,shori_core=TRACE", "warn,shori_core=trace"),
        ] {
            assert_eq!(level(text).as_deref(), Ok(wanted), "{text}");
        }
        for text in ["loud", "warn,shori_core", "info,shori=loud"] {
            assert!(level(text).is_err_and(|cause| cause.contains("is no level")), "{text}");
        }
    }
}
