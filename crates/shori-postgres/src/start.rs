//! Where reading goes on: each capture as the log has it against what the server has now.

use std::collections::BTreeMap;
use std::sync::Arc;

use shori_core::position::{CaptureId, Position, Watermark};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::{CaptureInfo, Resume, SnapshotProgress, SnapshotState};
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::Client;

use crate::catalog::{Found, Layout, Types};
use crate::message::WalLocation;
use crate::setup::{self, Facts, Published, Slot};
use crate::snapshot::Bookmark;
use crate::stream::Capture;
use crate::{PostgresConfig, PostgresTable, poll, positions};

/// What can be read, and from where.
pub(crate) struct Ready {
    pub captures: Vec<Capture>,
    /// Captures that cannot go on, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
    /// Of the capture that is furthest behind; `None` where none has begun.
    lowest: Option<Watermark>,
    /// The furthest that any capture is staged.
    pub furthest: Position,
    /// Whether what is in the log may show commits that are still to come in the stream.
    pub is_partly_read: bool,
    /// Captures of tables that have columns of which the log does not know. What waits in the slot was written before them, as a rule:
    /// they are followed when that has been read, where no row has told of them by then.
    pub behind: Vec<usize>,
}

pub(crate) fn has_begun(known: &Resume) -> bool {
    known.snapshot.state != SnapshotState::Requested
}

/// Refuses a log of the other capture: its positions say something else.
pub(crate) fn must_be_streamed(config: &PostgresConfig, resume: &BTreeMap<CaptureId, Resume>) -> Result<()> {
    if !resume.values().any(poll::is_polled) {
        return Ok(());
    }
    let cause = "the log has its changes by timestamp, and it is to be captured by logical replication";
    Err(Error::new(ErrorKind::SourceReplaced, "capture", config.server.name(), cause)
        .with_remedy("put back capture = \"timestamp\", or start with an empty log"))
}

/// Takes up every table that was found, where the log has it.
pub(crate) fn captures(
    config: &PostgresConfig,
    resume: &BTreeMap<CaptureId, Resume>,
    found: Found,
    published: &BTreeMap<String, Published>,
    slot: &Slot,
    types: &Types,
) -> Result<Ready> {
    let id = |name: &str| CaptureId::new(&config.source_name, name);
    let mut ready = Ready {
        captures: Vec::with_capacity(found.layouts.len()),
        failed: found.failed.into_iter().map(|(table, error)| (id(&table.name), error)).collect(),
        lowest: None,
        furthest: Position::ZERO,
        is_partly_read: resume.values().any(|known| known.watermark.boundary < known.watermark.staged),
        behind: Vec::new(),
    };
    for (table, layout) in found.layouts {
        let id = id(&table.name);
        let columns = published.get(&table.name).and_then(|published| published.columns.as_deref());
        let known = resume.get(&id);
        let layout = layout.published(&table, columns, types);
        let checked = layout.and_then(|layout| match known.filter(|known| has_begun(known)) {
            Some(begun) => check_resume(config, begun, &layout, slot).map(|()| layout),
            None => Ok(layout),
        });
        ready.furthest = ready.furthest.max(known.map_or(Position::ZERO, |known| known.watermark.staged));
        match checked {
            Ok(layout) => ready.take_up(config, id, table, layout, known, types)?,
            Err(error) => ready.failed.push((id, error)),
        }
    }
    Ok(ready)
}

/// Tables that are read by the log, and that somebody has taken out of the publication: what was written since is not
/// sent. Only a table that is to be read whole is put in.
pub(crate) async fn leave_out_unpublished(
    client: &Client,
    config: &PostgresConfig,
    resume: &BTreeMap<CaptureId, Resume>,
    found: &mut Found,
) -> Result<()> {
    if !setup::has_publication(client, config).await? {
        return Ok(());
    }
    let published = setup::published(client, config).await?;
    let is_begun = |name: &str| resume.get(&CaptureId::new(&config.source_name, name)).is_some_and(has_begun);
    for (table, layout) in std::mem::take(&mut found.layouts) {
        if published.contains_key(&table.name) || !is_begun(&table.name) {
            found.layouts.push((table, layout));
            continue;
        }
        let cause = format!("it is not in publication {}: what was written since may be missing", config.publication);
        let error = Error::new(ErrorKind::Gap, "capture", format!("table {}", config.qualified(&table.name)), cause)
            .with_remedy(format!("run shori resnapshot {}", table.name));
        found.failed.push((table, error));
    }
    Ok(())
}

impl Ready {
    fn take_up(
        &mut self,
        config: &PostgresConfig,
        id: CaptureId,
        table: PostgresTable,
        mut layout: Layout,
        known: Option<&Resume>,
        types: &Types,
    ) -> Result<()> {
        let progress = known.map_or(SnapshotProgress::requested(1), |known| known.snapshot.clone());
        if let Some(begun) = known.filter(|known| has_begun(known)) {
            let watermark = begun.watermark;
            self.is_partly_read |= !begun.snapshot.is_done();
            let lowest = self.lowest.filter(|lowest| lowest.staged <= watermark.staged);
            self.lowest = Some(lowest.unwrap_or(watermark));
            if let Some(schema) = begun.schema.as_ref().filter(|_| !added(begun, &layout).is_empty()) {
                layout = as_known(&table, layout, schema, types)?;
                self.behind.push(self.captures.len());
            }
        }
        let schema_name = config.schema.as_str().into();
        self.captures.push(Capture { progress, schema_name, layout: Arc::new(layout), failed: false, table, id });
        Ok(())
    }

    /// What is captured, as the log is to know it.
    pub fn infos(&self) -> Vec<CaptureInfo> {
        let info = |capture: &Capture| CaptureInfo { id: capture.id.clone(), schema: capture.layout.schema.clone() };
        self.captures.iter().map(info).collect()
    }

    /// Where reading goes on: where nothing older is needed, where the slot begins.
    pub fn watermark(&self, slot: &Slot, resume: &BTreeMap<CaptureId, Resume>) -> Result<Watermark> {
        if let Some(lowest) = self.lowest {
            return Ok(lowest);
        }
        let staged = positions::of_boundary(slot.forgotten_to)?.max(self.furthest);
        let told = resume.values().map(|known| known.watermark);
        let boundary = match positions::is_between_commits(&staged) && !self.is_partly_read {
            true => staged,
            false => told.clone().map(|mark| mark.boundary).max().unwrap_or(Position::ZERO),
        };
        let boundary_time = told.map(|mark| mark.boundary_time).max().unwrap_or(0);
        Ok(Watermark { staged, boundary, boundary_time })
    }
}

/// Columns that the table has and the log does not know of.
fn added(known: &Resume, layout: &Layout) -> Vec<String> {
    match known.schema.as_ref().map(|schema| schema.change_to(&layout.schema)) {
        Some(SchemaChange::Evolved { added, .. }) => added.iter().map(|field| field.name().clone()).collect(),
        _ => Vec::new(),
    }
}

/// A table without the columns that the log does not know.
fn as_known(table: &PostgresTable, layout: Layout, schema: &TableSchema, types: &Types) -> Result<Layout> {
    let names: Vec<String> = schema.columns.fields().iter().map(|field| field.name().clone()).collect();
    let mut table = table.clone();
    table.columns.retain(|name, _| names.contains(name));
    layout.of_columns(&table, |column| names.contains(&column.name), types)
}

pub(crate) fn read_anew(capture: &CaptureId, progress: &SnapshotProgress) -> SnapshotProgress {
    tracing::info!(%capture, "an added column has values already: the table is read again");
    SnapshotProgress::requested(progress.generation.saturating_add(1))
}

/// Whether reading can go on where `known` stands.
fn check_resume(config: &PostgresConfig, known: &Resume, layout: &Layout, slot: &Slot) -> Result<()> {
    let table = &layout.schema.table;
    let object = || format!("table {}", config.qualified(table));
    let schema: Option<&Arc<TableSchema>> = known.schema.as_ref();
    if let Some(SchemaChange::Incompatible { reason }) = schema.map(|schema| schema.change_to(&layout.schema)) {
        return Err(Error::new(ErrorKind::Schema, "capture", object(), reason)
            .with_remedy(format!("run shori resnapshot --retyped {table}")));
    }
    let gap = |cause: String| {
        Err(Error::new(ErrorKind::Gap, "read", format!("changes of {}", object()), cause)
            .with_remedy(format!("run shori resnapshot {table}")))
    };
    if let Some(lost) = &slot.lost {
        return gap(format!("{lost}: what was committed since may be missing"));
    }
    let read_on = positions::read_on_at(&known.watermark.staged)?;
    if slot.forgotten_to > read_on {
        return gap(format!(
            "source retention has passed the watermark: the log has it up to {}, the slot begins at {}",
            shown(read_on),
            shown(slot.forgotten_to)
        ));
    }
    match Bookmark::decode(&known.snapshot.resume)? {
        Some(bookmark) if bookmark.table != layout.oid => gap("it was dropped and created again".into()),
        _ => Ok(()),
    }
}

/// Fails where the server's log ends before what was read of it.
pub(crate) fn check_reaches(config: &PostgresConfig, facts: &Facts, read_on: WalLocation) -> Result<()> {
    if facts.wal_end >= read_on {
        return Ok(());
    }
    let cause = format!(
        "the log has its changes up to {}, but its own ends at {}: it is an older copy",
        shown(read_on),
        shown(facts.wal_end)
    );
    Err(Error::new(ErrorKind::SourceReplaced, "read", config.server.name(), cause)
        .with_remedy("put the captured server back and start again, or start with an empty log"))
}

/// As PostgreSQL prints it.
fn shown(location: WalLocation) -> String {
    format!("{:X}/{:X}", location >> 32, location & u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every table is to be read anew: what stands in the log is still no more visible than was told.
    #[test]
    fn a_boundary_that_is_held_stays_where_it_was() {
        let staged = positions::of_chunk_end(64, 3).unwrap();
        let told = positions::of_boundary(32).unwrap();
        let at = |boundary| Watermark { staged, boundary, boundary_time: 7 };
        let asked = |boundary| {
            let snapshot = SnapshotProgress::requested(2);
            BTreeMap::from([(
                CaptureId::new("shop", "items"),
                Resume { watermark: at(boundary), snapshot, schema: None },
            )])
        };
        let ready = |is_partly_read| Ready {
            captures: Vec::new(),
            failed: Vec::new(),
            lowest: None,
            furthest: staged,
            is_partly_read,
            behind: Vec::new(),
        };
        let slot = Slot { forgotten_to: 48, lost: None };
        assert_eq!(ready(true).watermark(&slot, &asked(told)).unwrap(), at(told));
        assert_eq!(ready(false).watermark(&slot, &asked(staged)).unwrap(), at(staged));
    }
}
