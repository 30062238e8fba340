//! The demo's live view of a terminal: rates, lag per capture, freshness, and the newest KPI rows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::stores::OpenStore;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::widgets::{Block, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};
use shori_core::pipeline::Handle;
use shori_core::{Error, ErrorKind, Result};
use tokio::task::JoinHandle;

use super::demo::Counts;
use super::status::rows;

const EVERY: Duration = Duration::from_millis(500);

const NEWEST_KPI: &str = "
select
    strftime(minute_bucket, '%H:%M'),
    segment,
    cast(orders_count as varchar),
    cast(orders_amount_sum as varchar),
    cast(paid_amount_sum as varchar)
from proj_orders_kpi_by_minute_segment
order by minute_bucket desc, segment
limit 8";

/// Draws until the pipeline stops; q, Esc and Ctrl-C stop it.
pub fn show(counts: Arc<Counts>, handle: Handle, store: OpenStore, changes: Option<u64>) -> JoinHandle<Result<()>> {
    tokio::task::spawn_blocking(move || {
        let mut terminal = ratatui::try_init().map_err(drawing)?;
        let drawn = View { counts, handle, store, changes, last: Sample::default() }.run(&mut terminal);
        ratatui::restore();
        drawn
    })
}

fn drawing(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Refused, "draw on", "the terminal", cause).with_remedy("use --json")
}

struct View {
    counts: Arc<Counts>,
    handle: Handle,
    store: OpenStore,
    changes: Option<u64>,
    last: Sample,
}

/// Counts at one moment, and rates per second since the one before.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    totals: [u64; 3],
    rates: [f64; 3],
}

impl Default for Sample {
    fn default() -> Self {
        Self { at: Instant::now(), totals: [0; 3], rates: [0.0; 3] }
    }
}

impl View {
    fn run(mut self, terminal: &mut DefaultTerminal) -> Result<()> {
        while !self.handle.stop.is_cancelled() {
            self.sample();
            // The table is not there yet at the very start.
            let newest = tokio::runtime::Handle::current().block_on(self.store.query(NEWEST_KPI));
            let kpi = newest.map(|batches| rows(&batches)).unwrap_or_default();
            terminal.draw(|frame| self.draw(frame, &kpi)).map_err(drawing)?;
            if event::poll(EVERY).map_err(drawing)?
                && let Event::Key(key) = event::read().map_err(drawing)?
            {
                let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    self.handle.stop.cancel();
                }
            }
        }
        Ok(())
    }

    fn sample(&mut self) {
        let totals = [
            self.counts.generated.load(Ordering::Relaxed),
            self.counts.captured.load(Ordering::Relaxed),
            self.counts.freshness.projected(),
        ];
        let seconds = self.last.at.elapsed().as_secs_f64();
        if seconds < EVERY.as_secs_f64() / 2.0 {
            return;
        }
        let rates =
            std::array::from_fn(|index| (totals[index] - self.last.totals[index].min(totals[index])) as f64 / seconds);
        self.last = Sample { at: Instant::now(), totals, rates };
    }

    fn draw(&self, frame: &mut Frame, kpi: &[Vec<Option<String>>]) {
        let progress = self.handle.progress.borrow();
        let log = self.handle.log.borrow();
        let projections = progress.checkpoints.len() as u16;
        let parts = [
            Constraint::Length(6),
            Constraint::Length(log.captures.len() as u16 + 3),
            Constraint::Length(projections + 3),
            Constraint::Min(4),
        ];
        let [flow, captures, shown, newest] = Layout::vertical(parts).areas(frame.area());
        frame.render_widget(self.flow(), flow);
        let capture_rows = log.captures.iter().map(|(id, state)| {
            let lag = shori_core::pipeline::now() - state.watermark.boundary_time;
            let lag =
                if state.watermark.boundary_time == 0 { "-".into() } else { format!("{:.0} ms", lag as f64 / 1000.0) };
            Row::new([
                id.to_string(),
                state.watermark.staged.lsn.to_u64().unwrap_or(0).to_string(),
                lag,
                state.failed.clone().unwrap_or_default(),
            ])
        });
        frame.render_widget(
            table(capture_rows.collect(), ["capture", "change", "since its commit", ""], "captures"),
            captures,
        );
        let projection_rows = progress.checkpoints.iter().map(|(name, checkpoint)| {
            let at = checkpoint.as_ref().and_then(|checkpoint| checkpoint.values().next());
            let at = at.and_then(|at| at.lsn.to_u64()).map_or("-".into(), |at| at.to_string());
            let age =
                self.counts.freshness.age(name).map_or("-".into(), |age| format!("{:.0} ms", age as f64 / 1000.0));
            Row::new([name.to_string(), at, age, progress.failed.get(name).cloned().unwrap_or("OK".into())])
        });
        frame.render_widget(
            table(
                projection_rows.collect(),
                ["projection", "as of change", "since its commit", "status"],
                "projections",
            ),
            shown,
        );
        let cell = |row: &Vec<Option<String>>, index: usize| row.get(index).cloned().flatten().unwrap_or_default();
        let kpi_rows = kpi.iter().map(|row| {
            Row::new([format!("{}  {}", cell(row, 0), cell(row, 1)), cell(row, 2), cell(row, 3), cell(row, 4)])
        });
        frame.render_widget(
            table(kpi_rows.collect(), ["minute, segment", "orders", "ordered", "paid"], "newest KPI rows"),
            newest,
        );
    }

    fn flow(&self) -> Paragraph<'static> {
        let [generated, captured, projected] = self.last.totals;
        let [made, read, shown] = self.last.rates;
        let fresh = self.counts.freshness.percentiles();
        let goal = self.changes.map(|changes| format!(" of {changes}")).unwrap_or_default();
        let seconds = self.counts.begun.elapsed().as_secs();
        let text = format!(
            "generated {generated:>10}{goal}  {made:>8.0}/s\ncaptured  {captured:>10}  {read:>8.0}/s\nprojected {projected:>10}  {shown:>8.0}/s\nsource commit to projected: p50 {:.0} ms  p95 {:.0} ms  p99 {:.0} ms   running {seconds} s, q ends",
            fresh.p50, fresh.p95, fresh.p99
        );
        Paragraph::new(text).block(Block::bordered().title(" Shori demo "))
    }
}

fn table<'a>(rows: Vec<Row<'a>>, header: [&'a str; 4], title: &'a str) -> Table<'a> {
    let widths = [
        Constraint::Percentage(40),
        Constraint::Percentage(20),
        Constraint::Percentage(20),
        Constraint::Percentage(20),
    ];
    let header = Row::new(header).style(Style::new().add_modifier(Modifier::BOLD));
    Table::new(rows, widths).header(header).block(Block::bordered().title(format!(" {title} ")))
}
