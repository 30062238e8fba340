//! Runs many seeds of the simulation, or one again.
//!
//! ```text
//! cargo run --release -p shori-core --features testing --example simulate -- --seeds 20000
//! cargo run --release -p shori-core --features testing --example simulate -- --seed 4711 --trace
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shori_core::testing::planted::Plant;
use shori_core::testing::simulation::{Options, Report, run};

/// Steps of a failed run that are printed.
const TRACE_TAIL: usize = 60;
/// Failures after which the run ends.
const FAILURES_MAX: usize = 20;

const USAGE: &str = "usage: simulate [--seeds N] [--first-seed F] [--threads T] [--plant NAME]
       simulate --seed S [--trace] [--plant NAME]";

struct Arguments {
    seeds: u64,
    first: u64,
    only: Option<u64>,
    threads: usize,
    options: Options,
}

#[derive(Default)]
struct Totals {
    seeds: AtomicU64,
    transactions: AtomicU64,
    crashes: AtomicU64,
    steps: AtomicU64,
    failures: Mutex<Vec<Report>>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match arguments.only {
        Some(seed) => replay(seed, &arguments.options),
        None => run_many(&arguments),
    }
}

fn parse(mut given: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut arguments = Arguments { seeds: 1000, first: 1, only: None, threads, options: Options::default() };
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or(format!("{name} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
        match name.as_str() {
            "--seeds" => arguments.seeds = number(value()?)?,
            "--first-seed" => arguments.first = number(value()?)?,
            "--seed" => arguments.only = Some(number(value()?)?),
            "--threads" => arguments.threads = number(value()?)?.max(1) as usize,
            "--trace" => arguments.options.trace = true,
            "--plant" => {
                let wanted = value()?;
                let plant = Plant::ALL.into_iter().find(|plant| format!("{plant:?}") == wanted);
                arguments.options.plant = Some(plant.ok_or(format!("there is no {wanted}, but {:?}", Plant::ALL))?);
            }
            _ => return Err(format!("{name} is unknown")),
        }
    }
    Ok(arguments)
}

fn replay(seed: u64, options: &Options) -> ExitCode {
    let report = run(seed, options);
    report.trace.iter().for_each(|step| println!("{step}"));
    let Report { transactions, crashes, steps, fingerprint, .. } = report;
    println!(
        "seed {seed}: {transactions} transactions, {crashes} crashes, {steps} steps, fingerprint {fingerprint:016x}"
    );
    match report.failure {
        Some(failure) => {
            println!("failed: {failure}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn run_many(arguments: &Arguments) -> ExitCode {
    let started = Instant::now();
    let totals = Totals::default();
    let next = AtomicU64::new(arguments.first);
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| work(arguments, &next, &totals));
        }
        while totals.seeds.load(Ordering::Relaxed) < arguments.seeds && !gives_up(&totals) {
            std::thread::sleep(Duration::from_millis(100));
            if started.elapsed().as_millis() % 2000 < 100 {
                eprint!("\r{} of {} seeds", totals.seeds.load(Ordering::Relaxed), arguments.seeds);
            }
        }
    });
    eprintln!();
    let failures = totals.failures.into_inner().unwrap();
    for report in &failures {
        print_failure(report, arguments.options.plant);
    }
    println!(
        "{} seeds, {} transactions, {} crashes, {} steps, {} failures in {:.1} s",
        totals.seeds.into_inner(),
        totals.transactions.into_inner(),
        totals.crashes.into_inner(),
        totals.steps.into_inner(),
        failures.len(),
        started.elapsed().as_secs_f64()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn work(arguments: &Arguments, next: &AtomicU64, totals: &Totals) {
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= arguments.first + arguments.seeds || gives_up(totals) {
            return;
        }
        let report = run(seed, &arguments.options);
        totals.transactions.fetch_add(report.transactions, Ordering::Relaxed);
        totals.crashes.fetch_add(report.crashes, Ordering::Relaxed);
        totals.steps.fetch_add(report.steps, Ordering::Relaxed);
        if report.failure.is_some() {
            totals.failures.lock().unwrap().push(report);
        }
        totals.seeds.fetch_add(1, Ordering::Relaxed);
    }
}

fn gives_up(totals: &Totals) -> bool {
    totals.failures.lock().unwrap().len() >= FAILURES_MAX
}

fn print_failure(report: &Report, plant: Option<Plant>) {
    let Report { seed, failure, .. } = report;
    println!("seed {seed} failed: {}", failure.as_deref().unwrap_or_default());
    let again = run(*seed, &Options { trace: true, plant, ..Options::default() });
    let first = again.trace.len().saturating_sub(TRACE_TAIL);
    again.trace[first..].iter().for_each(|step| println!("    {step}"));
    println!("  again: simulate --seed {seed} --trace");
}
