//! Looking at a source, and making it ready, without reading from it.

use std::collections::BTreeSet;
use std::sync::Arc;

use shori_core::change::ChangeBatch;
use shori_core::position::CaptureId;
use shori_core::source::{BatchLimit, CaptureInfo, SnapshotProgress};
use shori_core::{Error, ErrorKind, Result};

use crate::catalog::{self, Types};
use crate::connect::Server;
use crate::setup::{self, Facts};
use crate::snapshot;
use crate::start::check_reaches;
use crate::stream::Capture;
use crate::{PostgresConfig, poll};

/// Bytes of one table's sample.
const SAMPLE_MAX_BYTES: usize = 16 << 20;

/// What could be captured, and what is in the way of it: nothing is changed.
pub struct Inspected {
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
    /// Missing rights and settings.
    pub problems: Vec<Error>,
    /// What capture works without, and who relies on it should know.
    pub notes: Vec<String>,
}

pub async fn inspect(config: &PostgresConfig) -> Result<Inspected> {
    let session = config.server.connect().await?;
    let client = &session.client;
    setup::must_be_readable(client, config).await?;
    let found = catalog::tables(client, config, &mut Types::default()).await?;
    let id = |name: &str| CaptureId::new(&config.source_name, name);
    let names: Vec<String> = config.tables.iter().map(|table| table.name.clone()).collect();
    let mut problems = setup::missing_rights(client, config, &names).await?;
    problems.extend(Facts::read(client, config).await.err());
    let mut failed: Vec<_> = found.failed.into_iter().map(|(table, error)| (id(&table.name), error)).collect();
    let mut notes = Vec::new();
    if config.polls.is_some() {
        notes.extend(poll::notes(client, config).await?);
        for (table, layout) in &found.layouts {
            match poll::hints(client, config, table, layout).await {
                Ok(hints) => notes.extend(hints),
                Err(error) if error.kind() == ErrorKind::Schema => failed.push((id(&table.name), error)),
                Err(error) => return Err(error),
            }
        }
    }
    let captures = found
        .layouts
        .into_iter()
        .map(|(table, layout)| CaptureInfo { id: id(&table.name), schema: layout.schema })
        .filter(|info| !failed.iter().any(|(id, _)| *id == info.id))
        .collect();
    Ok(Inspected { captures, failed, problems, notes })
}

/// Makes publication and slot, where they are used. May be repeated. Returns the tables that are captured, and why others are not.
pub async fn install(config: &PostgresConfig) -> Result<(Vec<String>, Vec<Error>)> {
    let session = config.server.connect().await?;
    let client = &session.client;
    Facts::read(client, config).await?;
    let found = catalog::tables(client, config, &mut Types::default()).await?;
    let names: Vec<String> = found.layouts.iter().map(|(table, _)| table.name.clone()).collect();
    if config.polls.is_none() {
        let (_, made) = setup::publication(client, config, &names).await?;
        setup::slot(client, config, made, false).await?;
    }
    let unique: BTreeSet<String> = names.into_iter().collect();
    Ok((unique.into_iter().collect(), found.failed.into_iter().map(|(_, error)| error).collect()))
}

/// The first rows of every table that can be captured, at most `rows` of each. Positions mean nothing.
pub async fn sample(config: &PostgresConfig, rows: usize) -> Result<Vec<ChangeBatch>> {
    let mut session = config.server.connect().await?;
    let found = catalog::tables(&session.client, config, &mut Types::default()).await?;
    let transaction = snapshot::begin(&mut session.client).await?;
    let mut sampled = Vec::new();
    for (table, layout) in found.layouts {
        let capture = Capture {
            id: CaptureId::new(&config.source_name, &table.name),
            schema_name: config.schema.as_str().into(),
            progress: SnapshotProgress::requested(1),
            layout: Arc::new(layout),
            failed: false,
            table,
        };
        let place = snapshot::Place { read_to: 8, chunk: 0, time: 0, filter: None };
        let limit = BatchLimit { rows, bytes: SAMPLE_MAX_BYTES };
        sampled.extend(snapshot::read_chunk(transaction.client(), &capture, &place, None, limit).await?.changes);
    }
    Ok(sampled)
}

/// Runs a script of the user's.
pub async fn execute(server: &Server, script: &str) -> Result<()> {
    let session = server.connect().await?;
    session.client.batch_execute(script).await.map_err(server.fail("run a script in"))
}

/// Bytes of the server's log above the position with this `lsn`, changes of other tables among them.
pub async fn log_bytes_above(config: &PostgresConfig, lsn: u64) -> Result<u64> {
    let session = config.server.connect().await?;
    let facts = Facts::read(&session.client, config).await?;
    check_reaches(config, &facts, lsn)?;
    Ok(facts.wal_end.saturating_sub(lsn.saturating_add(1)))
}
