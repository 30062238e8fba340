//! The command line: one file a verb.
//!
//! Exit status 0: done; 1: failed; 2: the command line or the configuration is wrong. Errors go to stderr as one line
//! that names the object, the cause and the remedy; what a verb prints for programs (`--json`) goes to stdout alone. Who
//! closes stdout (`| head`) has read enough: that is no failure.

mod bench;
mod check;
mod compact;
mod demo;
mod export;
mod generate;
mod init;
mod lines;
mod logging;
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

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use shori_core::{Error, ErrorKind, Result};

use crate::config::{self, Loaded};
pub use printed::{print, print_json};

/// From a committed change to fresh analytics in seconds.
#[derive(Parser)]
#[command(name = "shori", version, arg_required_else_help = true, after_help = "Start with: shori demo")]
struct Cli {
    /// How much to tell on stderr: error, warn, info, debug; finer: shori_core=debug [default: warn]
    #[arg(long, global = true, env = logging::VARIABLE, hide_env_values = true, value_parser = logging::level)]
    log_level: Option<String>,
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
    /// Write the log as JSON change logs, from where they end
    Export(export::Export),
    /// Measure against targets and floors
    Bench(bench::Bench),
    /// Run a query over a store, also while the pipeline runs
    Query(query::Query),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  shori completions bash > /etc/bash_completion.d/shori")]
    Completions { shell: clap_complete::Shell },
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

/// A word that begins with a comment of SQL, which no option's name does, is no option: behind a blank it is none.
fn no_option(word: OsString) -> OsString {
    let name = word.to_str().and_then(|word| word.strip_prefix("--")?.split('=').next());
    match name.is_some_and(|name| name.contains(char::is_whitespace)) {
        true => [OsStr::new(" "), &word].into_iter().collect(),
        false => word,
    }
}

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(std::env::args_os().map(no_option)) {
        Ok(cli) => cli,
        Err(usage) => {
            let status = if usage.use_stderr() { 2 } else { 0 };
            // Nothing is left to do when the terminal has gone away.
            let _ = usage.print();
            return ExitCode::from(status);
        }
    };
    let started = start_logging(&cli).and_then(|()| crate::failpoints::arm_from_environment());
    match started.and_then(|()| act(cli.verb)) {
        Ok(status) => status,
        Err(error) if printed::reader_is_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}

/// By the command line, else the environment, else the `.env` file of the pipeline, as its configuration is read.
fn start_logging(cli: &Cli) -> Result<()> {
    let beside = || match cli.verb.which() {
        Some(which) if which.dir.is_none() => config::beside(which.file(), logging::VARIABLE),
        _ => Ok(None),
    };
    let level = match &cli.log_level {
        Some(level) => level.clone(),
        None => match beside()? {
            Some(text) => logging::level(&text).map_err(|cause| {
                Error::new(ErrorKind::Usage, "use", format!("{} of the file .env", logging::VARIABLE), cause)
            })?,
            None => logging::DEFAULT.into(),
        },
    };
    let directory = match &cli.verb {
        Verb::Run(verb) => verb.log_dir.as_deref(),
        _ => None,
    };
    logging::start(&level, directory)
}

impl Verb {
    /// The pipeline that it is about.
    fn which(&self) -> Option<&Which> {
        Some(match self {
            Verb::Init(verb) => &verb.which,
            Verb::Check(verb) => &verb.which,
            Verb::Run(verb) => &verb.which,
            Verb::Status(verb) => &verb.which,
            Verb::Generate(verb) => &verb.which,
            Verb::Rebuild(verb) => &verb.which,
            Verb::Resnapshot(verb) => &verb.which,
            Verb::Verify(verb) => &verb.which,
            Verb::Compact(verb) => &verb.which,
            Verb::Export(verb) => &verb.which,
            Verb::Query(verb) => &verb.which,
            Verb::Demo(_) | Verb::Bench(_) | Verb::Completions { .. } => return None,
        })
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
        Verb::Export(verb) => verb.act(),
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

/// Runs async work of one command. What takes long is in threads of its own; between those that would take turns at the rest,
/// waking each other up took a sixth of the processor time of a snapshot.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|cause| Error::new(ErrorKind::Internal, "start", "the async runtime", cause))?;
    runtime.block_on(work)
}
