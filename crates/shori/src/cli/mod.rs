//! The command line: one file a verb.
//!
//! Exit status 0: done; 1: failed; 2: the command line or the configuration is wrong. Errors go to stderr as one line
//! that names the object, the cause and the remedy; what a verb prints for programs (`--json`) goes to stdout alone. Who
//! closes stdout (`| head`) has read enough: that is no failure.

mod bench;
mod check;
mod compact;
mod demo;
mod generate;
mod init;
mod lines;
mod printed;
mod query;
mod reach;
mod rebuild;
mod resnapshot;
mod run;
mod signals;
mod status;
mod syntax;
mod trial;
mod verify;
mod view;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use shori_core::{Error, ErrorKind, Result};

use crate::config::Loaded;
pub use printed::{print, print_json};

/// From a committed change to fresh analytics in seconds.
#[derive(Parser)]
#[command(name = "shori", version, arg_required_else_help = true, after_help = "Start with: shori demo")]
struct Cli {
    /// How much to tell on stderr: error, warn, info, debug; finer: shori_core=debug
    #[arg(long, global = true, env = "LOG_LEVEL", default_value = "warn", hide_env_values = true, value_parser = log_level)]
    log_level: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// A busy sample database and its projections, in one command
    Demo(demo::Demo),
    /// Make a source ready for capture
    Init(init::Init),
    /// Check configuration, source and queries; change nothing
    Check(check::Check),
    /// Run a pipeline
    Run(run::Run),
    /// How far every capture and projection has come
    Status(status::Status),
    /// Write to the sample source as an application would
    Generate(generate::Generate),
    /// Build a projection anew
    Rebuild(rebuild::Rebuild),
    /// Read a table of the source anew, while everything else goes on
    Resnapshot(resnapshot::Resnapshot),
    /// Recompute every projection from the source and compare
    Verify(verify::Verify),
    /// Bring the log down to what is still needed
    Compact(compact::Compact),
    /// Measure against targets and floors
    Bench(bench::Bench),
    /// Run a query over a store, also while the pipeline runs
    Query(query::Query),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  shori completions bash > /etc/bash_completion.d/shori")]
    Completions { shell: clap_complete::Shell },
}

/// Libraries that tell of every acknowledgement at level info, and of every value they send at level debug.
const QUIET: [&str; 2] = ["pg_walstream", "tokio_postgres"];

/// The filter itself takes any word, as the name of a module.
fn log_level(text: &str) -> std::result::Result<String, String> {
    if text.is_empty() {
        return Ok("warn".into());
    }
    for part in text.split(',') {
        let level = part.rsplit('=').next().unwrap_or(part).trim();
        if level.parse::<tracing_subscriber::filter::LevelFilter>().is_err() {
            return Err(format!("{level:?} is no level: give error, warn, info, debug, trace or off"));
        }
    }
    tracing_subscriber::EnvFilter::try_new(text).map(|_| text.to_string()).map_err(|cause| cause.to_string())
}

/// Which pipeline a verb is about.
#[derive(Args, Clone, Debug)]
pub struct Which {
    /// The pipeline's configuration
    #[arg(short, long, value_name = "FILE", conflicts_with = "dir")]
    config: Option<PathBuf>,
    /// The demo pipeline, with its files in this folder
    #[arg(short, long)]
    dir: Option<PathBuf>,
}

impl Which {
    pub fn load(&self) -> Result<Loaded> {
        match &self.dir {
            Some(directory) => Loaded::made_demo(directory),
            None => Loaded::from_file(self.file()),
        }
    }

    /// For what tells all that is wrong.
    pub fn load_as_written(&self) -> Result<Loaded> {
        match &self.dir {
            Some(directory) => Loaded::made_demo(directory),
            None => Loaded::as_written(self.file()),
        }
    }

    /// For what makes the demo pipeline's folder.
    pub fn load_to_make(&self) -> Result<Loaded> {
        match &self.dir {
            Some(directory) => Loaded::demo(directory),
            None => self.load(),
        }
    }

    /// `./shori.toml` if nothing is named.
    fn file(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new("shori.toml"))
    }
}

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            let status = if usage.use_stderr() { 2 } else { 0 };
            // Nothing is left to do when the terminal has gone away.
            let _ = usage.print();
            return ExitCode::from(status);
        }
    };
    let filter = tracing_subscriber::EnvFilter::try_new(&cli.log_level);
    let chosen = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let quiet = QUIET.into_iter().filter(|library| !cli.log_level.contains(library));
    let filter = quiet.filter_map(|library| format!("{library}=warn").parse().ok());
    let filter = filter.fold(chosen, tracing_subscriber::EnvFilter::add_directive);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    log.with_ansi(std::io::stderr().is_terminal()).init();
    match crate::failpoints::arm_from_environment().and_then(|()| act(cli.verb)) {
        Ok(status) => status,
        Err(error) if printed::reader_is_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}

fn act(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Demo(verb) => verb.act(),
        Verb::Init(verb) => verb.act(),
        Verb::Check(verb) => verb.act(),
        Verb::Run(verb) => verb.act(),
        Verb::Status(verb) => verb.act(),
        Verb::Generate(verb) => verb.act(),
        Verb::Rebuild(verb) => verb.act(),
        Verb::Resnapshot(verb) => verb.act(),
        Verb::Verify(verb) => verb.act(),
        Verb::Compact(verb) => verb.act(),
        Verb::Bench(verb) => verb.act(),
        Verb::Query(verb) => verb.act(),
        Verb::Completions { shell } => {
            // Into memory first: what it writes to must not fail.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "shori", &mut script);
            print(String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs async work of one command.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|cause| Error::new(ErrorKind::Internal, "start", "the async runtime", cause))?;
    runtime.block_on(work)
}
