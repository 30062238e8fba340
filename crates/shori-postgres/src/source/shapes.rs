//! Tables that change their shape while they are read.

use std::sync::Arc;

use arrow::datatypes::Field;
use shori_core::schema::SchemaChange;
use shori_core::source::{CaptureInfo, SnapshotState};
use shori_core::{Error, ErrorKind, Result};

use super::{Open, is_of_table};
use crate::catalog::{self, Column, Layout, Sent};
use crate::stream::{Gathered, Reshaped};
use crate::{PostgresConfig, generated, setup, start};

impl Open {
    /// Follows a table that is sent in another shape from here on.
    pub(super) async fn reshape(
        &mut self,
        config: &PostgresConfig,
        reshaped: Reshaped,
        gathered: &mut Gathered,
    ) -> Result<()> {
        let Reshaped { capture: index, columns, generated } = reshaped;
        let client = &self.session.client;
        let capture = &self.cursor.captures[index];
        if capture.failed {
            return Ok(());
        }
        let table = capture.table.clone();
        let key = catalog::key_of(client, &config.qualified(&table.name), capture.layout.oid, false).await;
        let sent = sent(&capture.layout, columns, generated);
        self.types.learn(client, sent.iter().map(|column| column.type_oid)).await?;
        let made = key.and_then(|key| catalog::layout_of(&table, capture.layout.oid, sent, &key, &self.types));
        let layout = match made {
            Ok(layout) => layout,
            Err(error) if error.kind() == ErrorKind::Schema => return self.fail(index, error, gathered),
            Err(error) => return Err(error),
        };
        if self.binary && layout.sent().iter().any(Column::needs_text) {
            self.wants_text = true;
            let cause = format!(
                "table {} has a column now that is configured as text: reading goes on in text format",
                table.name
            );
            return Err(Error::new(ErrorKind::Unavailable, "read", config.server.name(), cause));
        }
        let table_name = config.qualified(&table.name);
        let mut holds_values = is_rewritten(&capture.layout, &layout);
        match capture.layout.schema.change_to(&layout.schema) {
            SchemaChange::Incompatible { reason } => {
                let error = Error::new(ErrorKind::Schema, "capture", format!("table {table_name}"), reason)
                    .with_remedy(format!("run shori resnapshot --retyped {}", table.name));
                return self.fail(index, error, gathered);
            }
            SchemaChange::Same => {}
            SchemaChange::Evolved { added, dropped } => {
                let names = |fields: &[Arc<Field>]| fields.iter().map(|field| field.name().clone()).collect::<Vec<_>>();
                let (added, dropped) = (names(&added), names(&dropped));
                tracing::info!(table = table.name, ?added, ?dropped, "the table has other columns");
                gathered.schemas.push(CaptureInfo { id: capture.id.clone(), schema: layout.schema.clone() });
                holds_values |= catalog::hold_values(client, layout.oid, &added).await?;
            }
        }
        if holds_values {
            self.read_anew(index, gathered);
        }
        gathered.cut(index)?;
        self.evaluator.forget(&layout);
        self.cursor.captures[index].layout = Arc::new(layout);
        Ok(())
    }

    /// Generated columns come and go without a trace in the stream. They are followed when all that waits until now has been
    /// read: what was written before them has values of them, too, but a table is read again for their sake.
    pub(super) async fn look_for_generated(&mut self, config: &PostgresConfig, index: usize) -> Result<()> {
        let capture = &self.cursor.captures[index];
        if capture.failed || self.behind.contains(&index) {
            return Ok(());
        }
        let client = &self.session.client;
        let layout = &capture.layout;
        let now = generated::columns(client, layout.oid, &config.qualified(&capture.table.name)).await?;
        if differ(layout, &now) {
            self.waited_until = self.waited_until.max(setup::wal_end(client).await?);
            self.behind.push(index);
        }
        Ok(())
    }

    /// Fills in what is not sent. One table whose columns cannot be computed stops itself only (contract 11).
    pub(super) async fn compute_generated(&mut self, config: &PostgresConfig, gathered: &mut Gathered) -> Result<()> {
        for (index, layout, inputs) in std::mem::take(&mut gathered.inputs) {
            let batch = &mut gathered.finished[index];
            let computing = self.evaluator.fill(&self.session.client, config, (&layout, &inputs), batch);
            let Err(error) = computing.await else { continue };
            if !is_of_table(&error) {
                return Err(error);
            }
            let capture = self.cursor.captures.iter().position(|capture| capture.layout.oid == layout.oid);
            match capture.filter(|capture| !self.cursor.captures[*capture].failed) {
                Some(capture) => self.fail(capture, error, gathered)?,
                None => return Err(error),
            }
        }
        Ok(())
    }

    /// Follows tables that had other columns at start than their log, when all that had waited until then has been read.
    pub(super) async fn follow_shapes(&mut self, config: &PostgresConfig, gathered: &mut Gathered) -> Result<()> {
        if self.behind.is_empty() {
            return Ok(());
        }
        if self.cursor.read_to < self.waited_until || !self.cursor.is_between_commits() {
            // Where nothing more is written, only the server's answer tells so.
            self.replication.ask();
            return Ok(());
        }
        // Which columns it sends may have been altered, too.
        self.published = setup::published(&self.session.client, config).await?;
        for index in std::mem::take(&mut self.behind) {
            let capture = &self.cursor.captures[index];
            let published = self.published.get(&capture.table.name).and_then(|published| published.columns.clone());
            let client = &self.session.client;
            let mut columns = catalog::sent_now(client, config, &capture.layout).await?;
            columns.retain(|(name, ..)| published.as_ref().is_none_or(|names| names.contains(name)));
            let known = capture.layout.sent().iter().map(|known| (&known.name, known.type_oid, known.modifier));
            let table = config.qualified(&capture.table.name);
            let generated = generated::columns(client, capture.layout.oid, &table).await?;
            let is_same = columns.iter().map(|(name, oid, modifier)| (name, *oid, *modifier)).eq(known);
            if is_same && !differ(&capture.layout, &generated) {
                continue;
            }
            self.reshape(config, Reshaped { capture: index, columns, generated: Some(generated) }, gathered).await?;
        }
        Ok(())
    }

    /// Rows hold what was not sent of them: the table is read whole, if it is not about to be anyhow.
    fn read_anew(&mut self, index: usize, gathered: &mut Gathered) {
        let capture = &mut self.cursor.captures[index];
        if capture.progress.state == SnapshotState::Requested {
            return;
        }
        capture.progress = start::read_anew(&capture.id, &capture.progress);
        gathered.snapshots.push((capture.id.clone(), capture.progress.clone()));
    }
}

/// Whether a table has other generated columns now than those that are computed of it.
fn differ(layout: &Layout, now: &[Sent]) -> bool {
    let is_sent = |name: &str| layout.sent().iter().any(|column| column.name == name);
    let computed = now.iter().filter(|column| !is_sent(&column.name) && column.is_made_of(is_sent));
    let known = layout.generated().iter();
    !computed
        .map(|column| (&column.name, column.type_oid, column.modifier, &column.generated))
        .eq(known.map(|column| (&column.name, column.type_oid, column.modifier, &column.generated)))
}

/// Columns as they are sent now, with the generated ones that are known where no others are given; whether one that is sent may
/// be null is not sent.
fn sent(known: &Layout, columns: Vec<(String, u32, i32)>, generated: Option<Vec<Sent>>) -> Vec<Sent> {
    let generated = generated.unwrap_or_else(|| known.generated().iter().cloned().map(Sent::from).collect());
    let is_sent = |name: &str| columns.iter().any(|(sent, ..)| sent == name);
    let generated: Vec<Sent> = generated.into_iter().filter(|column| !is_sent(&column.name)).collect();
    let nullable =
        |name: &str| known.columns.iter().find(|column| column.name == name).is_none_or(|column| column.nullable);
    let sent = columns.into_iter().map(|(name, type_oid, modifier)| Sent {
        nullable: nullable(&name),
        name,
        type_oid,
        modifier,
        generated: None,
    });
    sent.chain(generated).collect()
}

/// Whether a column has another type in the server, be it carried as the same: its values may have been written anew.
fn is_rewritten(before: &Layout, after: &Layout) -> bool {
    let differs = |column: &Column| {
        let known = before.columns.iter().find(|known| known.name == column.name);
        known.is_some_and(|known| known.type_oid != column.type_oid || known.modifier != column.modifier)
    };
    after.columns.iter().any(differs)
}
