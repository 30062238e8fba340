//! SIGKILL under load, again and again; at the end, the source must be what the projections show.
//!
//! An application writes to the source all the time. A pipeline runs beside it and is killed: at random moments, and at
//! every failpoint (see `shori_core::failpoint`), while resnapshots, rebuilds and compactions are asked of it. At the end it
//! catches up and `shori verify` compares. Prints the kills per failpoint and ends with status 1 if anything is lost or
//! doubled, or if a failpoint was never reached in a run long enough to reach each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use rustix::process::{Pid, Signal, kill_process};
use shori_core::failpoint;

#[derive(Parser)]
struct Arguments {
    /// The program to kill
    #[arg(long)]
    shori: PathBuf,
    #[arg(long, default_value_t = 200)]
    kills: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Row changes per second written meanwhile
    #[arg(long, default_value_t = 4000.0)]
    rate: f64,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A failpoint not reached in this time is given up: the process is killed all the same.
const PATIENCE: Duration = Duration::from_secs(15);
/// Kills after which every failpoint must have been reached.
const ENOUGH_KILLS: u32 = 150;
const MOMENT: &str = "random moment";

struct Torture {
    shori: PathBuf,
    folder: tempfile::TempDir,
    rng: ChaCha8Rng,
    kills: BTreeMap<&'static str, u32>,
    unreached: BTreeMap<&'static str, u32>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(1)
        }
    }
}

const KILLS_BETWEEN_LINES: u32 = 10;

fn run(arguments: &Arguments) -> Outcome<bool> {
    let mut torture = Torture {
        shori: arguments.shori.canonicalize()?,
        folder: tempfile::tempdir()?,
        rng: ChaCha8Rng::seed_from_u64(arguments.seed),
        kills: BTreeMap::new(),
        unreached: BTreeMap::new(),
    };
    println!("{} kills, seed {}, in {}", arguments.kills, arguments.seed, torture.folder.path().display());
    torture.succeed(&["init", "--sample"])?;
    let begun = Instant::now();
    let (rate, seed) = (arguments.rate.to_string(), arguments.seed.to_string());
    let mut application = torture.start(&["generate", "--rate", &rate, "--seed", &seed], None)?;
    for round in 0..arguments.kills {
        if let Some(ended) = application.try_wait()? {
            return Err(format!("the application ended by itself: {ended}").into());
        }
        torture.round(round)?;
        if (round + 1) % KILLS_BETWEEN_LINES == 0 {
            println!("{} kills in {:.0} s", round + 1, begun.elapsed().as_secs_f64());
        }
    }
    terminate(&mut application)?;
    println!("catching up");
    torture.succeed(&["run", "--once"])?;
    println!("verifying");
    let verified = torture.command(&["verify"]).status()?;
    torture.report(arguments.kills);
    let all_reached =
        arguments.kills < ENOUGH_KILLS || failpoint::ALL.iter().all(|place| torture.kills.contains_key(place));
    if !all_reached {
        println!("some failpoints were never reached");
    }
    Ok(verified.success() && all_reached)
}

impl Torture {
    /// One life of the pipeline.
    fn round(&mut self, round: u32) -> Outcome<()> {
        // Every failpoint in turn, and a random moment every third time.
        let place = if round % 3 == 2 {
            None
        } else {
            Some(failpoint::ALL[(round - round / 3) as usize % failpoint::ALL.len()])
        };
        let armed = place.map(|place| format!("{place}:{}", self.rng.random_range(1..=4)));
        let mut pipeline = self.start(&["run"], armed.as_deref())?;
        let begun = Instant::now();
        let moment = Duration::from_millis(self.rng.random_range(20..2_500));
        let mut next_request = Duration::from_millis(self.rng.random_range(200..900));
        let until = if place.is_some() { PATIENCE } else { moment };
        loop {
            if let Some(status) = pipeline.try_wait()? {
                let by_signal = std::os::unix::process::ExitStatusExt::signal(&status);
                if by_signal != Some(Signal::KILL.as_raw()) {
                    return Err(format!("round {round}: the pipeline ended with {status}, not by SIGKILL").into());
                }
                *self.kills.entry(place.unwrap_or(MOMENT)).or_default() += 1;
                return Ok(());
            }
            if begun.elapsed() >= until {
                pipeline.kill()?;
                pipeline.wait()?;
                let counted =
                    if let Some(place) = place { self.unreached.entry(place) } else { self.kills.entry(MOMENT) };
                *counted.or_default() += 1;
                return Ok(());
            }
            if begun.elapsed() >= next_request {
                next_request += Duration::from_millis(self.rng.random_range(500..1_500));
                self.ask(place)?;
            }
            // The process's end is looked for, not waited for, so that its moment can be missed.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the running pipeline for something unusual; it may die meanwhile.
    fn ask(&mut self, place: Option<&'static str>) -> Outcome<()> {
        let tables = ["orders", "payments", "customers"];
        let projections =
            ["proj_orders_latest", "customers_latest", "proj_orders_kpi_by_minute_segment", "dim_orders_history"];
        let choice = match place {
            Some(failpoint::COMPACT_BETWEEN) => 0,
            Some(failpoint::INGEST_AFTER_REQUEST) => 1,
            _ => self.rng.random_range(0..12),
        };
        let mut words = match choice {
            0 => vec!["compact"],
            1 => vec!["resnapshot", tables.choose(&mut self.rng).ok_or("no table")?],
            2 => vec!["rebuild", projections.choose(&mut self.rng).ok_or("no projection")?],
            _ => return Ok(()),
        };
        // Without a running pipeline, the command would run one itself.
        if !self.folder.path().join(".shori/socket").exists() {
            return Ok(());
        }
        words.push("--log-level=error");
        let mut command = self.command(&words);
        let mut asked = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let begun = Instant::now();
        while asked.try_wait()?.is_none() {
            if begun.elapsed() > Duration::from_secs(2) {
                asked.kill()?;
                asked.wait()?;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.shori);
        command.arg(words[0]).arg("--dir").arg(self.folder.path()).args(&words[1..]);
        // A short retention, so that compaction has something to do.
        command.env("SHORI_KEEP_HOURS", "0.001").env_remove("SHORI_FAILPOINT");
        command
    }

    fn start(&self, words: &[&str], armed: Option<&str>) -> Outcome<Child> {
        let mut command = self.command(words);
        if let Some(armed) = armed {
            command.env("SHORI_FAILPOINT", armed);
        }
        Ok(command.stdout(Stdio::null()).spawn()?)
    }

    fn succeed(&self, words: &[&str]) -> Outcome<()> {
        let status = self.command(words).status()?;
        if status.success() { Ok(()) } else { Err(format!("shori {} ended with {status}", words.join(" ")).into()) }
    }

    fn report(&self, kills: u32) {
        println!("\n{kills} kills:");
        for place in failpoint::ALL.iter().chain([&MOMENT]) {
            let (reached, missed) = (self.kills.get(place), self.unreached.get(place));
            let missed =
                missed.map(|missed| format!("  ({missed} times not reached, killed all the same)")).unwrap_or_default();
            println!("  {place:<36} {:>4}{missed}", reached.unwrap_or(&0));
        }
        println!("  source file {} bytes", size(&self.folder.path().join("source.db")));
    }
}

fn size(path: &Path) -> u64 {
    path.metadata().map(|metadata| metadata.len()).unwrap_or(0)
}

/// SIGTERM: the application ends its transaction.
fn terminate(child: &mut Child) -> Outcome<()> {
    let pid = Pid::from_raw(i32::try_from(child.id())?).ok_or("no process")?;
    kill_process(pid, Signal::TERM)?;
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("the application ended with {status}").into()) }
}
