//! What can be told of a folder without capturing it.

use std::collections::BTreeMap;

use shori_core::change::ChangeBatch;
use shori_core::position::{CaptureId, Lsn};
use shori_core::source::{BatchLimit, CaptureInfo};
use shori_core::{Error, Result};

use crate::names::{folder_error, parse_key, table_folder};
use crate::{FilesConfig, cursor, ends, stream};

/// What could be captured.
#[derive(Debug)]
pub struct Inspected {
    pub captures: Vec<CaptureInfo>,
    /// Tables that cannot be captured, each with the reason.
    pub failed: Vec<(CaptureId, Error)>,
}

/// Tables as the newest file of each has them.
pub fn inspect(config: &FilesConfig) -> Result<Inspected> {
    let (_, _) = cursor::start(config, &BTreeMap::new())?;
    let (mut captures, mut failed) = (Vec::new(), Vec::new());
    for name in &config.tables {
        let id = CaptureId::new(&config.source_name, name);
        let newest = cursor::must_have_files(config, &id)
            .and_then(|chain| chain.last().ok_or_else(|| cursor::no_files(config, &id)))
            .and_then(|last| ends::read_head(&table_folder(&config.path, name), &last));
        match newest {
            Ok(head) => captures.push(CaptureInfo { id, schema: head.schema }),
            Err(error) => failed.push((id, error)),
        }
    }
    Ok(Inspected { captures, failed })
}

/// The first rows of every table.
pub fn sample(config: &FilesConfig, rows: usize) -> Result<Vec<ChangeBatch>> {
    const BYTES_MAX: usize = 16 << 20;
    let mut sampled = Vec::new();
    for name in &config.tables {
        let one = FilesConfig { tables: vec![name.clone()], ..config.clone() };
        let (_, cursor) = cursor::start(&one, &BTreeMap::new())?;
        let (batch, _) = stream::step(cursor, BatchLimit { rows, bytes: BYTES_MAX })?;
        sampled.extend(batch.changes);
    }
    Ok(sampled)
}

/// Bytes of files that reach above the commit with this `lsn` in hexadecimal; `None` where that is no position.
pub fn bytes_above(config: &FilesConfig, lsn: &str) -> Result<Option<u64>> {
    let Some(lsn): Option<Lsn> = parse_key(lsn) else { return Ok(None) };
    let mut bytes = 0;
    for name in &config.tables {
        let folder = table_folder(&config.path, name);
        let chain = cursor::must_have_files(config, &CaptureId::new(&config.source_name, name))?;
        for file in chain.files().iter().filter(|file| file.up_to.lsn > lsn) {
            let path = folder.join(file.to_string());
            bytes += std::fs::metadata(&path).map_err(|cause| folder_error("read", &path, cause))?.len();
        }
    }
    Ok(Some(bytes))
}
