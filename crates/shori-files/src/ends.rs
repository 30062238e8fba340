//! The first and the last line of a file: what can be told without reading what is between.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use shori_core::schema::TableSchema;
use shori_core::{Error, ErrorKind, Result};

use crate::lines::{End, FORMAT, Header, Line, VERSION, read_line};
use crate::names::{FileName, folder_error};
use crate::writer::Origin;

/// Longest first line: a table has some thousand columns at most.
const HEADER_BYTES_MAX: u64 = 16 << 20;
/// No last line is longer: it has a position, a time and a number.
const END_BYTES_MAX: u64 = 512;

/// A file's first line.
#[derive(Debug)]
pub struct Head {
    pub header: Header,
    pub schema: Arc<TableSchema>,
    /// With the end of the line.
    pub bytes: u64,
}

/// Both ends of a file.
pub fn read(folder: &Path, name: &FileName) -> Result<(Head, End)> {
    Ok((read_head(folder, name)?, read_end(folder, name)?))
}

pub fn open(folder: &Path, name: &FileName) -> Result<File> {
    let path = folder.join(name.to_string());
    File::open(&path).map_err(|cause| folder_error("read", &path, cause))
}

pub fn read_head(folder: &Path, name: &FileName) -> Result<Head> {
    let path = folder.join(name.to_string());
    let mut line = Vec::new();
    BufReader::new(open(folder, name)?.take(HEADER_BYTES_MAX))
        .read_until(b'\n', &mut line)
        .map_err(|cause| folder_error("read", &path, cause))?;
    parse_head(&line).map_err(|cause| damaged(folder, name, 1, cause))
}

fn parse_head(line: &[u8]) -> std::result::Result<Head, String> {
    let text = std::str::from_utf8(line).map_err(|cause| cause.to_string())?;
    if !text.ends_with('\n') {
        return Err("it is cut off".into());
    }
    let header: Header = serde_json::from_str(text).map_err(|cause| cause.to_string())?;
    if header.format != FORMAT || header.version > VERSION {
        return Err(format!(
            "it is a {} of version {}, and this program reads a {FORMAT} of version {VERSION}",
            header.format, header.version
        ));
    }
    let schema = TableSchema::from_json(text).map_err(|cause| cause.to_string())?;
    Ok(Head { header, schema: Arc::new(schema), bytes: line.len() as u64 })
}

pub fn read_end(folder: &Path, name: &FileName) -> Result<End> {
    let path = folder.join(name.to_string());
    let mut file = open(folder, name)?;
    let mut tail = Vec::new();
    let read = || {
        let length = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(length.saturating_sub(END_BYTES_MAX)))?;
        file.take(END_BYTES_MAX).read_to_end(&mut tail)
    };
    read().map_err(|cause| folder_error("read", &path, cause))?;
    let cut_off = || {
        Error::new(ErrorKind::Corrupt, "read", format!("file {}", path.display()), "its end is missing: it is cut off")
            .with_remedy(REMEDY)
    };
    let lines = tail.strip_suffix(b"\n").ok_or_else(cut_off)?;
    let last = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or(lines);
    match read_line(last) {
        Ok(Line::End(end)) if end.up_to == name.up_to && end.boundary_time.is_some() == name.is_whole => Ok(end),
        _ => Err(cut_off()),
    }
}

const REMEDY: &str = "put the file back as it was written, and start again";

/// A file that is not as it was written.
pub fn damaged(folder: &Path, name: &FileName, line: u64, cause: String) -> Error {
    let object = format!("file {} line {line}", folder.join(name.to_string()).display());
    Error::new(ErrorKind::Corrupt, "read", object, cause).with_remedy(REMEDY)
}

/// Refuses a file of another log.
pub fn must_be_of(folder: &Path, header: &Header, origin: &Origin) -> Result<()> {
    if header.store == origin.store && header.source == origin.source {
        return Ok(());
    }
    let cause = format!(
        "it is the log of source {} in store {}, not of source {} in store {}",
        header.source, header.store, origin.source, origin.store
    );
    let object = format!("change log {}", folder.display());
    Err(Error::new(ErrorKind::SourceReplaced, "use", object, cause).with_remedy("name another folder"))
}
