//! Where polling goes on: each table as the log has it against what the server has now.

use std::collections::BTreeMap;
use std::sync::Arc;

use shori_core::position::{CaptureId, Micros, Position, Watermark};
use shori_core::schema::{SchemaChange, TableSchema};
use shori_core::source::{CaptureInfo, Resume, SnapshotProgress, SnapshotState, SourceBatch};
use shori_core::{Error, ErrorKind, Result};
use tokio_postgres::Client;

use super::begin::Column;
use super::bookmark::Bookmark;
use crate::catalog::{self, Layout, Types};
use crate::connect::quoted;
use crate::start::{has_begun, read_anew};
use crate::stream::Capture;
use crate::{PostgresConfig, PostgresTable};

/// A polled table.
pub(super) struct Polled {
    pub capture: Capture,
    /// Its schema as the log knows it.
    pub known: Arc<TableSchema>,
    pub column: Column,
    pub bookmark: Bookmark,
    /// The highest timestamp that was found in it.
    pub highest: Option<Micros>,
    /// Whether rows of it are in the batch at hand.
    pub is_touched: bool,
}

/// What can be polled, and from where.
pub(super) struct Ready {
    pub tables: Vec<Polled>,
    pub failed: Vec<(CaptureId, Error)>,
    pub watermark: Watermark,
    /// The furthest that any capture is staged.
    pub furthest: Position,
}

pub(super) async fn tables(
    client: &Client,
    config: &PostgresConfig,
    resume: &BTreeMap<CaptureId, Resume>,
    types: &mut Types,
) -> Result<Ready> {
    must_be_polled(config, resume)?;
    let found = catalog::tables(client, config, types).await?;
    let id = |table: &PostgresTable| CaptureId::new(&config.source_name, &table.name);
    let marks =
        |begun: bool| resume.values().filter(move |known| !begun || has_begun(known)).map(|known| known.watermark);
    let lowest = |begun| marks(begun).min_by_key(|mark| mark.staged);
    let mut ready = Ready {
        tables: Vec::with_capacity(found.layouts.len()),
        failed: found.failed.into_iter().map(|(table, error)| (id(&table), error)).collect(),
        watermark: lowest(true).or(lowest(false)).unwrap_or(Watermark::ZERO),
        furthest: marks(false).map(|mark| mark.staged).max().unwrap_or(Position::ZERO),
    };
    for (table, layout) in found.layouts {
        let id = id(&table);
        match polled(config, id.clone(), table, layout, resume.get(&id)) {
            Ok(polled) => ready.tables.push(polled),
            Err(error) => ready.failed.push((id, error)),
        }
    }
    Ok(ready)
}

/// Refuses a log of the other capture: its positions say something else.
fn must_be_polled(config: &PostgresConfig, resume: &BTreeMap<CaptureId, Resume>) -> Result<()> {
    let streamed = |known: &&Resume| has_begun(known) && !Bookmark::is_one(&known.snapshot.resume);
    if !resume.values().any(|known| streamed(&known)) {
        return Ok(());
    }
    let cause = "the log has its changes by logical replication, and it is to be captured by timestamp";
    Err(Error::new(ErrorKind::SourceReplaced, "poll", config.server.name(), cause)
        .with_remedy("take out capture = \"timestamp\", or start with an empty log"))
}

fn polled(
    config: &PostgresConfig,
    id: CaptureId,
    table: PostgresTable,
    layout: Layout,
    known: Option<&Resume>,
) -> Result<Polled> {
    let column = Column::of(config, &table, &layout)?;
    let begun = known.filter(|known| has_begun(known));
    let bookmark = begun.map(|known| Bookmark::decode(&known.snapshot.resume)).transpose()?;
    let schema = known.and_then(|known| known.schema.clone()).unwrap_or_else(|| layout.schema.clone());
    let polled = Polled {
        known: schema,
        column,
        bookmark: bookmark.unwrap_or(Bookmark::new(layout.oid)),
        highest: None,
        is_touched: false,
        capture: Capture {
            id,
            schema_name: config.schema.as_str().into(),
            progress: known.map_or(SnapshotProgress::requested(1), |known| known.snapshot.clone()),
            layout: Arc::new(layout),
            failed: false,
            table,
        },
    };
    polled.must_follow(config, &polled.capture.layout)?;
    Ok(polled)
}

impl Polled {
    pub fn has_begun(&self) -> bool {
        self.capture.progress.state != SnapshotState::Requested
    }

    pub fn info(&self) -> CaptureInfo {
        CaptureInfo { id: self.capture.id.clone(), schema: self.known.clone() }
    }

    /// Refuses another table of its name, and one whose columns are others.
    fn must_follow(&self, config: &PostgresConfig, layout: &Layout) -> Result<()> {
        let table = &self.capture.table.name;
        let object = || format!("table {}", config.qualified(table));
        if self.has_begun() && self.bookmark.table != layout.oid {
            return Err(Error::new(ErrorKind::Gap, "poll", object(), "it was dropped and created again")
                .with_remedy(format!("run shori resnapshot {table}")));
        }
        match self.known.change_to(&layout.schema) {
            SchemaChange::Incompatible { reason } => Err(Error::new(ErrorKind::Schema, "poll", object(), reason)
                .with_remedy(format!("run shori resnapshot --retyped {table}"))),
            _ => Ok(()),
        }
    }

    /// Takes the table's columns as they are now; one that was added with values in it has the table read again.
    pub async fn follow(
        &mut self,
        client: &Client,
        config: &PostgresConfig,
        types: &mut Types,
        batch: &mut SourceBatch,
    ) -> Result<()> {
        let layout = catalog::layout(client, config, &self.capture.table, types).await?;
        self.must_follow(config, &layout)?;
        self.column = Column::of(config, &self.capture.table, &layout)?;
        if !self.has_begun() {
            self.bookmark = Bookmark::new(layout.oid);
        }
        self.highest = self.bookmark.whole.as_ref().and_then(|whole| whole.highest);
        if self.known.columns != layout.schema.columns {
            let added: Vec<String> = match self.known.change_to(&layout.schema) {
                SchemaChange::Evolved { added, .. } => added.iter().map(|field| field.name().clone()).collect(),
                _ => Vec::new(),
            };
            if self.has_begun() && catalog::hold_values(client, layout.oid, &added).await? {
                self.capture.progress = read_anew(&self.capture.id, &self.capture.progress);
                self.bookmark = Bookmark::new(layout.oid);
                batch.snapshots.push((self.capture.id.clone(), self.capture.progress.clone()));
            }
            self.known = layout.schema.clone();
            batch.schemas.push(self.info());
        }
        self.capture.layout = Arc::new(layout);
        Ok(())
    }
}

/// What polling does not see, in one sentence.
pub(super) fn blind_spots(config: &PostgresConfig) -> String {
    let columns = config.tables.iter().map(|table| {
        let column = table.changed_at.as_deref().unwrap_or("none");
        format!("{} ({column})", config.qualified(&table.name))
    });
    format!(
        "source {} is captured by timestamp, which does not see: rows that are deleted, or moved to another key, until \
         shori resnapshot TABLE finds them gone; versions of a row between two polls; updates that do not set the \
         timestamp column: {}",
        config.source_name,
        columns.collect::<Vec<_>>().join(", ")
    )
}

/// What makes polling worse than it could be.
pub(crate) async fn hints(
    client: &Client,
    config: &PostgresConfig,
    table: &PostgresTable,
    layout: &Layout,
) -> Result<Vec<String>> {
    let column = Column::of(config, table, layout)?;
    let name = config.qualified(&table.name);
    let mut hints = Vec::new();
    let query = "
        select exists (
            select
            from pg_catalog.pg_index i
            join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
            where i.indrelid = $1 and i.indisvalid and i.indpred is null and a.attname = $2
        )";
    let indexed = client.query_one(query, &[&layout.oid, &column.name]).await;
    let indexed: bool = indexed.map_err(|cause| crate::connect::sql_error("look at", "indexes", cause))?.get(0);
    if !indexed {
        hints.push(format!(
            "each poll reads table {name} whole: no index begins with {}; run: create index on {name} ({})",
            column.name,
            quoted(&column.name)
        ));
    }
    if column.nullable {
        hints.push(format!(
            "column {} of table {name} may be null: each poll looks at all rows where it is",
            column.name
        ));
    }
    Ok(hints)
}
