//! `shori demo`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use shori_core::event::{Event, Events};
use shori_core::pipeline::Handle;
use shori_core::position::Position;
use shori_core::project::Progress;
use shori_core::{Error, ErrorKind, Result};

use super::{init, lines, run, verify, view};
use crate::assemble;
use crate::config::Loaded;
use crate::control::Server;
use crate::freshness::{Freshness, Percentiles};
use crate::generate::{Generated, Pacing, Workload};
use crate::systems::{self, System};
use crate::verify::{FindingKind, ProjectionReport, Report};

/// A busy sample database and its projections, in one command.
///
/// Makes DIR/source.db (SQLite) and DIR/serving.duckdb, writes to the one as an application would, and keeps KPI,
/// latest-state and history tables in the other, at once. Kill it at any time and start it again: nothing is lost or
/// doubled; `shori verify --dir DIR` proves it.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  shori demo\n  shori demo --dir /tmp/demo --changes 200000 --seed 7 --json\n  shori demo --rate 5000"
)]
pub struct Demo {
    /// Folder for the demo's files
    #[arg(short, long, default_value = "demo")]
    dir: PathBuf,
    /// Row changes to make; without it, until Ctrl-C
    #[arg(long)]
    changes: Option<u64>,
    /// Row changes per second; without it, flat out with --changes, else 2000
    #[arg(long)]
    rate: Option<f64>,
    /// The same seed makes the same changes
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints. Rates are changes per second, times seconds, memory megabytes.
#[derive(Debug, Serialize)]
struct Outcome {
    generated: u64,
    captured: u64,
    projected: u64,
    lost: u64,
    duplicated: u64,
    seconds: f64,
    changes_per_second: f64,
    freshness_ms: Percentiles,
    rss_peak_mb: f64,
}

/// Findings that mean a change is not shown, or not as it was.
const LOST: &[FindingKind] = &[
    FindingKind::Missing,
    FindingKind::Differing,
    FindingKind::Gap,
    FindingKind::VersionCount,
    FindingKind::DeletionCount,
];
/// Findings that mean a change is shown more than once.
const DUPLICATED: &[FindingKind] = &[FindingKind::Extra, FindingKind::Duplicated, FindingKind::Overlap];

fn count(report: &Report, kinds: &[FindingKind]) -> u64 {
    let counts = |projection: &ProjectionReport| kinds.iter().map(|kind| projection.count(*kind)).sum::<u64>();
    report.projections.iter().map(counts).sum()
}

/// Rate of the endless demo: busy, but kind to a laptop.
const ENDLESS_RATE: f64 = 2_000.0;

/// What the running demo counts, for its view and its outcome.
pub struct Counts {
    pub begun: Instant,
    pub generated: AtomicU64,
    pub captured: AtomicU64,
    pub freshness: Freshness,
}

impl Counts {
    fn listen(&self, event: &Event) {
        if let Event::Appended { commits, .. } = event {
            self.captured.fetch_add(commits.iter().map(|run| run.rows).sum(), Ordering::Relaxed);
        }
        self.freshness.listen(event);
    }
}

impl Demo {
    pub fn act(self) -> Result<ExitCode> {
        let loaded = Loaded::demo(&self.dir)?;
        init::sample(&loaded)?;
        let counts = Arc::new(Counts {
            begun: Instant::now(),
            generated: AtomicU64::new(0),
            captured: AtomicU64::new(0),
            freshness: Freshness::new(loaded.config.projections.len()),
        });
        let (generated, seconds) = super::block_on(self.live(&loaded, counts.clone()))?;
        self.tell_progress("comparing every projection with the source");
        let report = verify::verify(&loaded)?;
        let ok = report.ok();
        let outcome = Outcome {
            generated: generated.changes,
            captured: counts.captured.load(Ordering::Relaxed),
            projected: counts.freshness.projected(),
            lost: count(&report, LOST),
            duplicated: count(&report, DUPLICATED),
            seconds,
            changes_per_second: generated.changes as f64 / seconds,
            freshness_ms: counts.freshness.percentiles(),
            rss_peak_mb: rss_peak_mb(),
        };
        if self.json {
            super::print_json(&outcome)?;
        } else {
            tell(&self.dir, &outcome)?;
        }
        if !ok {
            eprintln!("{report}");
        }
        Ok(ExitCode::from(u8::from(!ok)))
    }

    fn tell_progress(&self, what: &str) {
        if !self.json {
            eprintln!("{what}");
        }
    }

    /// Generates and runs at once; returns what was generated, and the seconds until all of it was projected.
    async fn live(&self, loaded: &Loaded, counts: Arc<Counts>) -> Result<(Generated, f64)> {
        let opened = assemble::open(loaded)?;
        let (counted, log) = (counts.clone(), run::events(loaded, false));
        let events = Events::new(move |event| {
            log.send(event.clone());
            counted.listen(event);
        });
        let prepared = assemble::pipeline(loaded, &opened, false, events)?.prepare();
        let handle = prepared.handle();
        super::signals::cancel_on_signal(handle.stop.clone())?;
        let server = Server { handle: handle.clone(), stores: opened.stores.clone() };
        let _listening = server.listen(&loaded.state_directory())?;
        let running = tokio::spawn(prepared.run());
        let shown = match (self.json, std::io::stdout().is_terminal()) {
            (true, _) => None,
            (_, true) => Some(view::show(counts.clone(), handle.clone(), opened.staging.clone(), self.changes)),
            (_, false) => Some(lines::print(counts.clone(), handle.stop.clone(), self.changes)),
        };
        let driven = self.drive(loaded, &handle, &counts).await;
        handle.stop.cancel();
        let shown = match shown {
            Some(shown) => {
                shown.await.map_err(|cause| Error::new(ErrorKind::Internal, "end", "the live view", cause))?
            }
            None => Ok(()),
        };
        if self.changes.is_none() {
            self.tell_progress("ending with what is in hand; Ctrl-C ends at once");
        }
        running.await.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "the pipeline", cause))??;
        shown?;
        driven
    }

    /// Generates; with a number of changes, then waits until every projection shows them.
    async fn drive(&self, loaded: &Loaded, handle: &Handle, counts: &Arc<Counts>) -> Result<(Generated, f64)> {
        // Triggers must stand before the first change, else the snapshot alone would see it.
        handle.ready().await?;
        let source = &loaded.config.sources[0];
        let application = System::of(loaded, source)?.application()?;
        let rate = self.rate.or(self.changes.is_none().then_some(ENDLESS_RATE));
        let pacing = rate.map_or(Pacing::FlatOut, Pacing::Rate);
        let workload = Workload { changes: self.changes, pacing, seed: self.seed, ..Workload::default() };
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, watched) = (handle.stop.clone(), stop.clone());
        tokio::spawn(async move {
            stopping.cancelled().await;
            watched.store(true, Ordering::Relaxed);
        });
        let counted = counts.clone();
        let begun = Instant::now();
        let work = move || {
            application.run(&workload, &stop, |progress| counted.generated.store(progress.changes, Ordering::Relaxed))
        };
        let generated = tokio::task::spawn_blocking(work).await;
        let generated = generated.map_err(|cause| Error::new(ErrorKind::Internal, "finish", "generating", cause))??;
        let end = shori_sqlite::log_end(&systems::sqlite_config(loaded, source))?;
        projected(handle, end, loaded.config.projections.len()).await?;
        Ok((generated, begun.elapsed().as_secs_f64()))
    }
}

/// Returns when every projection shows everything up to `end`, or when the pipeline ends.
async fn projected(handle: &Handle, end: Position, projections: usize) -> Result<()> {
    let shown = |progress: &Progress| {
        let reached = |checkpoint: &Option<_>| {
            let checkpoint: Option<&shori_core::position::Positions> = checkpoint.as_ref();
            checkpoint.is_some_and(|checkpoint| checkpoint.values().all(|at| at.lsn >= end.lsn))
        };
        let known = progress.checkpoints.len() >= projections;
        !progress.failed.is_empty() || (known && progress.checkpoints.values().all(reached))
    };
    let mut progress = handle.progress.clone();
    tokio::select! {
        biased;
        _ = handle.stop.cancelled() => Ok(()),
        waited = progress.wait_for(shown) => match waited {
            Ok(progress) => match progress.failed.iter().next() {
                Some((name, reason)) => Err(Error::new(ErrorKind::Projection, "refresh", format!("projection {name}"), reason.clone())),
                None => Ok(()),
            },
            // The pipeline has ended by itself: its own error tells why.
            Err(_) => Ok(()),
        },
    }
}

/// Peak resident memory of this process in megabytes, where the system tells (Linux: VmHWM).
pub fn rss_peak_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<f64>().ok());
    kib.unwrap_or(0.0) * 1024.0 / 1e6
}

fn tell(directory: &std::path::Path, outcome: &Outcome) -> Result<()> {
    let Percentiles { p50, p95, p99 } = outcome.freshness_ms;
    super::print(format_args!(
        "{} changes generated, {} captured, {} projected in {:.1} s ({:.0} changes/s)\n",
        outcome.generated, outcome.captured, outcome.projected, outcome.seconds, outcome.changes_per_second
    ))?;
    super::print(format_args!("source commit to projected: p50 {p50:.0} ms, p95 {p95:.0} ms, p99 {p99:.0} ms\n"))?;
    super::print(format_args!("compared with the source: {} lost, {} duplicated\n", outcome.lost, outcome.duplicated))?;
    super::print(format_args!(
        "\nLook around:\n  shori query --dir {0} \"select * from proj_orders_kpi_by_minute_segment order by minute_bucket desc limit 5\"\n  shori verify --dir {0}\n",
        directory.display()
    ))
}
