//! Benchmarks: figures with targets, each measured together with the floor that it is held against.
//!
//! # Constraints
//!
//! - A benchmark reports, it does not judge: a missed target is no failure. A figure that cannot be measured is one.
//! - Every figure is measured by a process of its own, so that its peak memory is its own, and prepared by another.
//! - A floor is measured in the same run on the same data, never remembered.
//!
//! # Layout
//!
//! [`report`] is what is printed, [`machine`] what it ran on, [`task`] how processes are started, [`watch`] what a
//! running pipeline tells. A suite is a folder
//! (`engine`) with its list of figures and a file for each.

mod drive;
mod engine;
mod machine;
mod postgres;
mod report;
mod task;
mod watch;

use std::path::{Path, PathBuf};

use shori_core::{Error, ErrorKind, Result};

pub use report::{Bound, FigureReport, Measured, Report};

/// Where a figure works, and how much data it takes.
#[derive(Clone, Debug)]
pub struct Place {
    /// Shared by the figures of a run.
    pub work: PathBuf,
    /// Of the target's row counts; 1 is all of them.
    pub scale: f64,
}

impl Place {
    /// `rows` at this scale, at least one.
    pub fn rows(&self, rows: u64) -> u64 {
        ((rows as f64 * self.scale).round() as u64).max(1)
    }

    /// A new, empty folder of this name.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder(name);
        self.remove(name)?;
        let fail = |cause| Error::new(ErrorKind::Refused, "create", format!("folder {}", folder.display()), cause);
        std::fs::create_dir_all(&folder).map_err(fail)?;
        Ok(folder)
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        let folder = self.folder(name);
        match std::fs::remove_dir_all(&folder) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::new(ErrorKind::Refused, "remove", format!("folder {}", folder.display()), cause))
            }
            _ => Ok(()),
        }
    }
}

/// One step of a benchmark, run in a process of its own.
type Task = fn(&Place) -> Result<Measured>;

/// A number with a target.
struct Figure {
    name: &'static str,
    unit: &'static str,
    bound: Bound,
    /// Makes what is measured, if it needs something of its own.
    prepare: Option<Task>,
    measure: Task,
    /// The folder of `prepare`: removed afterwards.
    folder: &'static str,
    /// Measured on the suite's shared data.
    shared: bool,
    /// Measured only when named.
    on_request: bool,
}

struct Suite {
    name: &'static str,
    figures: &'static [Figure],
    /// Makes the shared data, step by step.
    shared: &'static [(&'static str, Task)],
    /// Whether the shared data stands in the work folder already.
    shared_stands: fn(&Place) -> bool,
    /// Other tasks that figures start.
    helpers: &'static [(&'static str, Task)],
}

/// A load above this disturbs what is measured.
const LOAD_QUIET: f64 = 0.5;

const SUITES: &[Suite] = &[engine::SUITE, postgres::SUITE];

/// Names of the suites.
pub fn suites() -> Vec<&'static str> {
    SUITES.iter().map(|suite| suite.name).collect()
}

fn suite(name: &str) -> Result<&'static Suite> {
    SUITES.iter().find(|suite| suite.name == name).ok_or_else(|| {
        let known = suites().join(", ");
        Error::new(ErrorKind::Usage, "run", format!("suite {name}"), format!("there is none; known: {known}"))
    })
}

/// What to run.
pub struct Request {
    pub suite: String,
    /// All that are not on request only, if empty.
    pub figures: Vec<String>,
    pub scale: f64,
    /// Kept if given, with what it holds; else a new folder in the current one, removed at the end.
    pub work: Option<PathBuf>,
    pub keep: bool,
}

/// Runs a suite; progress goes to stderr. A figure that fails is reported as such, and the others are measured.
pub fn run(request: &Request) -> Result<Report> {
    let suite = suite(&request.suite)?;
    if !(request.scale.is_finite() && request.scale > 0.0 && request.scale <= 1.0) {
        return Err(Error::new(ErrorKind::Usage, "run at", format!("scale {}", request.scale), "it is not in (0, 1]"));
    }
    if let Some(unknown) = request.figures.iter().find(|name| !suite.figures.iter().any(|f| f.name == **name)) {
        let known = suite.figures.iter().map(|figure| figure.name);
        let cause = format!("suite {} has none{}", suite.name, crate::config::nearest(unknown, known));
        return Err(Error::new(ErrorKind::Usage, "measure", format!("figure {unknown}"), cause));
    }
    let load = machine::load();
    if load > LOAD_QUIET {
        eprintln!("this machine is busy (load {load}): figures will be worse than it can do");
    }
    let (work, temporary) = work_folder(request.work.as_deref(), request.keep)?;
    let place = Place { work, scale: request.scale };
    let wanted = |figure: &&Figure| match request.figures.is_empty() {
        true => !figure.on_request,
        false => request.figures.iter().any(|name| name == figure.name),
    };
    let chosen: Vec<&Figure> = suite.figures.iter().filter(wanted).collect();
    if chosen.iter().any(|figure| figure.shared) && !(suite.shared_stands)(&place) {
        for (name, _) in suite.shared {
            task::run(&place, suite.name, name)?;
        }
    }
    let mut figures = Vec::new();
    for figure in suite.figures {
        if chosen.iter().any(|chosen| chosen.name == figure.name) {
            figures.push(measure(suite, figure, &place).unwrap_or_else(|error| {
                eprintln!("{}: {error}", figure.name);
                FigureReport::failed(figure.name, figure.unit, figure.bound, &error)
            }));
        } else if request.figures.is_empty() {
            let why = format!("not run: takes long; ask with --figure {}", figure.name);
            figures.push(FigureReport::not_run(figure.name, figure.unit, figure.bound, why));
        }
    }
    if request.keep {
        eprintln!("kept {}", place.work.display());
    }
    drop(temporary);
    Ok(Report::new(suite.name, figures))
}

fn measure(suite: &Suite, figure: &Figure, place: &Place) -> Result<FigureReport> {
    if figure.prepare.is_some() {
        task::run(place, suite.name, &format!("{}/prepare", figure.name))?;
    }
    let measured = task::run(place, suite.name, &format!("{}/measure", figure.name))?;
    if !figure.folder.is_empty() {
        place.remove(figure.folder)?;
    }
    let report = FigureReport::measured(figure.name, figure.unit, figure.bound, place.scale, measured);
    let value = report.value.unwrap_or_default();
    let ratio = report.ratio.map(|ratio| format!(", ratio {ratio}")).unwrap_or_default();
    eprintln!("{}: {value} {}{ratio}", figure.name, figure.unit);
    Ok(report)
}

/// Not the system's folder for temporary files: that may be in memory, and gigabytes are written.
fn work_folder(given: Option<&Path>, keep: bool) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let fail = |object: String| move |cause| Error::new(ErrorKind::Usage, "create", object, cause);
    if let Some(folder) = given {
        std::fs::create_dir_all(folder).map_err(fail(format!("folder {}", folder.display())))?;
        let folder = folder.canonicalize().map_err(fail(format!("folder {}", folder.display())))?;
        return Ok((folder, None));
    }
    let here = std::env::current_dir().map_err(fail("a work folder".into()))?;
    let temporary = tempfile::Builder::new().prefix("shori-bench-").tempdir_in(here);
    let temporary = temporary.map_err(fail("a work folder here".into()))?;
    match keep {
        true => Ok((temporary.keep(), None)),
        false => Ok((temporary.path().to_path_buf(), Some(temporary))),
    }
}

/// Runs one task in this process and prints what it measured, for the process that asked.
pub fn run_task(suite_name: &str, name: &str, place: &Place) -> Result<()> {
    let suite = suite(suite_name)?;
    let figure = suite.figures.iter().find_map(|figure| match name.strip_prefix(figure.name)? {
        "/prepare" => figure.prepare,
        "/measure" => Some(figure.measure),
        _ => None,
    });
    let other = || suite.shared.iter().chain(suite.helpers).find(|(known, _)| *known == name).map(|(_, task)| *task);
    let unknown = || Error::new(ErrorKind::Usage, "run", format!("task {name}"), "there is none");
    let work = figure.or_else(other).ok_or_else(unknown)?;
    task::answer(&work(place)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(suite: &str, figures: &[&str], scale: f64) -> Request {
        let figures = figures.iter().map(|name| name.to_string()).collect();
        Request { suite: suite.into(), figures, scale, work: None, keep: false }
    }

    #[test]
    fn what_is_not_there_is_refused_before_anything_is_made() {
        let refused = |request| run(&request).unwrap_err();
        assert!(refused(request("engines", &[], 1.0)).to_string().contains("known: engine, postgres"));
        let error = refused(request("engine", &["engine.backlogs"], 1.0));
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("did you mean engine.backlog?"), "{error}");
        for scale in [0.0, 1.5, f64::NAN] {
            assert_eq!(refused(request("engine", &[], scale)).kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn figures_are_named_by_their_suite_and_once() {
        for suite in SUITES {
            let mut names: Vec<&str> = suite.figures.iter().map(|figure| figure.name).collect();
            assert!(names.iter().all(|name| name.starts_with(&format!("{}.", suite.name))));
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), suite.figures.len());
        }
    }

    /// What runs in one process, on little data: the others start this program again.
    #[test]
    fn the_engine_is_measured() {
        let work = tempfile::tempdir().unwrap();
        let place = Place { work: work.path().to_path_buf(), scale: 0.0005 };
        for (_, task) in engine::SUITE.shared {
            task(&place).unwrap();
        }
        assert!((engine::SUITE.shared_stands)(&place));
        for figure in ["engine.backlog", "engine.history", "engine.memory_transaction", "engine.refresh_random"] {
            let figure = engine::SUITE.figures.iter().find(|known| known.name == figure).unwrap();
            if let Some(prepare) = figure.prepare {
                prepare(&place).unwrap();
            }
            let measured = (figure.measure)(&place).unwrap();
            assert!(measured.value > 0.0, "{}", figure.name);
            assert_eq!(measured.floor.is_some(), matches!(figure.bound, Bound::RatioAtMost(_)), "{}", figure.name);
        }
    }
}
