//! Names of files and folders: what a file holds stands in its name, so that a folder is understood without opening it.
//! Permanent: folders of released versions are read by later ones.
//!
//! `<after>_<up to>.jsonl`: every change of the table with `after < position <= up to`, where the table's last change
//! need not stand at `up to`. It ends at a boundary; one that ends with `.part.jsonl` does not. A position is
//! `<lsn>-<seq>` in hexadecimal, where `0` stands for no bytes.

use std::path::{Path, PathBuf};

use shori_core::position::{Position, SORT_KEY_MAX_BYTES, SortKey};
use shori_core::{Error, ErrorKind, Result};

const WHOLE: &str = ".jsonl";
const PART: &str = ".part.jsonl";
/// Before the name of a file that is being written.
const UNFINISHED: &str = ".unfinished-";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FileName {
    pub after: Position,
    pub up_to: Position,
    /// Whether `up_to` is a boundary.
    pub is_whole: bool,
}

impl FileName {
    pub fn parse(name: &str) -> Option<Self> {
        let (stem, is_whole) = match name.strip_suffix(PART) {
            Some(stem) => (stem, false),
            None => (name.strip_suffix(WHOLE)?, true),
        };
        let (after, up_to) = stem.split_once('_')?;
        Some(Self { after: parse_position(after)?, up_to: parse_position(up_to)?, is_whole })
    }
}

impl std::fmt::Display for FileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (after, up_to) = (position_text(&self.after), position_text(&self.up_to));
        write!(f, "{after}_{up_to}{}", if self.is_whole { WHOLE } else { PART })
    }
}

fn position_text(position: &Position) -> String {
    let key = |key: &SortKey| if key.is_empty() { "0".to_string() } else { key.to_string() };
    format!("{}-{}", key(&position.lsn), key(&position.seq))
}

fn parse_position(text: &str) -> Option<Position> {
    let key =
        |text: &str| if text == "0" { Some(SortKey::EMPTY) } else { parse_key(text).filter(|key| !key.is_empty()) };
    let (lsn, seq) = text.split_once('-')?;
    Some(Position::new(key(lsn)?, key(seq)?))
}

/// Bytes from their hexadecimal digits in lower case.
pub fn parse_key(text: &str) -> Option<SortKey> {
    if !text.len().is_multiple_of(2) || text.len() > 2 * SORT_KEY_MAX_BYTES {
        return None;
    }
    let digit = |letter: u8| match letter {
        b'0'..=b'9' => Some(letter - b'0'),
        b'a'..=b'f' => Some(letter - b'a' + 10),
        _ => None,
    };
    let mut bytes = Vec::with_capacity(text.len() / 2);
    for pair in text.as_bytes().chunks(2) {
        bytes.push(digit(pair[0])? << 4 | digit(pair[1])?);
    }
    SortKey::from_slice(&bytes).ok()
}

pub fn unfinished(name: &FileName) -> String {
    format!("{UNFINISHED}{name}")
}

pub fn is_unfinished(name: &str) -> bool {
    name.starts_with(UNFINISHED)
}

/// The folder of a table's files: its name, where letters that file systems do not like are `%` and two digits.
pub fn table_folder(root: &Path, table: &str) -> PathBuf {
    let mut name = String::with_capacity(table.len());
    for (index, letter) in table.bytes().enumerate() {
        let is_plain =
            letter.is_ascii_alphanumeric() || letter == b'_' || letter == b'-' || letter == b'.' && index > 0;
        if is_plain { name.push(char::from(letter)) } else { name.push_str(&format!("%{letter:02x}")) }
    }
    root.join(name)
}

/// The files of one table, as they follow each other.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Chain {
    /// By where they begin, then by how far they reach.
    files: Vec<FileName>,
}

impl Chain {
    /// `None` where the table has no folder.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let fail = |cause| folder_error("list", folder, cause);
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(fail(cause)),
        };
        let mut files = Vec::new();
        for entry in entries {
            let name = entry.map_err(fail)?.file_name();
            files.extend(name.to_str().and_then(FileName::parse));
        }
        files.sort_unstable();
        Ok(Some(Self { files }))
    }

    /// The file that has what follows `position`. Of several that begin at one place, the one that reaches furthest has
    /// taken the place of the others.
    pub fn following(&self, position: &Position) -> Option<FileName> {
        let begun = self.files.partition_point(|file| file.after <= *position);
        self.files[..begun].last().copied().filter(|file| file.up_to > *position)
    }

    /// How far the files reach that follow each other from `position` on.
    pub fn reach(&self, position: &Position) -> Position {
        let mut reach = *position;
        while let Some(file) = self.following(&reach) {
            reach = file.up_to;
        }
        reach
    }

    /// The first file above a place that no file follows: what is between is missing.
    pub fn beyond(&self, gap: &Position) -> Option<FileName> {
        self.files.iter().find(|file| file.after > *gap).copied()
    }

    pub fn first(&self) -> Option<FileName> {
        self.files.first().copied()
    }

    pub fn last(&self) -> Option<FileName> {
        self.files.iter().max_by_key(|file| file.up_to).copied()
    }

    pub fn files(&self) -> &[FileName] {
        &self.files
    }
}

pub fn folder_error(operation: &str, folder: &Path, cause: std::io::Error) -> Error {
    let kind = match cause.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::DiskFull,
        std::io::ErrorKind::NotFound => ErrorKind::Unavailable,
        _ => ErrorKind::Refused,
    };
    let error = Error::new(kind, operation, format!("change log {}", folder.display()), cause);
    match kind {
        ErrorKind::DiskFull => error.with_remedy("free some space and start again: nothing is lost"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(lsn: u64) -> Position {
        Position::new(SortKey::from_u64(lsn), SortKey::EMPTY)
    }

    fn file(after: u64, up_to: u64) -> FileName {
        let after = if after == 0 { Position::ZERO } else { at(after) };
        FileName { after, up_to: at(up_to), is_whole: true }
    }

    /// Folders of released versions have these.
    #[test]
    fn names_come_back() {
        let longest = Position::new(SortKey::MAX, SortKey::MAX);
        for (name, text) in [
            (file(0, 42), "0-0_000000000000002a-0.jsonl"),
            (FileName { is_whole: false, ..file(1, 2) }, "0000000000000001-0_0000000000000002-0.part.jsonl"),
        ] {
            assert_eq!(name.to_string(), text);
            assert_eq!(FileName::parse(text), Some(name));
        }
        let long = FileName { after: Position::ZERO, up_to: longest, is_whole: false };
        assert_eq!(FileName::parse(&long.to_string()), Some(long));
        for text in
            ["", ".jsonl", "0-0.jsonl", "0-0_0.jsonl", "0-0_0-0.json", "-_0-0.jsonl", "0-0_0G-0.jsonl", "0-0_é-0.jsonl"]
        {
            assert_eq!(FileName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn folders_have_names_that_every_file_system_takes() {
        let name = |table| table_folder(Path::new("/r"), table).display().to_string();
        assert_eq!(name("order_items"), "/r/order_items");
        assert_eq!(name("../a b"), "/r/%2e.%2fa%20b");
        assert_eq!(name("é"), "/r/%c3%a9");
    }

    #[test]
    fn files_follow_each_other_and_a_longer_one_takes_the_place_of_a_shorter() {
        let mut files = vec![file(0, 5), file(5, 8), file(5, 9), file(9, 12), file(20, 30)];
        files.sort_unstable();
        let chain = Chain { files };
        assert_eq!(chain.following(&Position::ZERO), Some(file(0, 5)));
        assert_eq!(chain.following(&at(5)), Some(file(5, 9)));
        assert_eq!(chain.following(&at(8)), Some(file(5, 9)));
        assert_eq!(chain.reach(&at(1)), at(12));
        assert_eq!((chain.following(&at(12)), chain.beyond(&at(12))), (None, Some(file(20, 30))));
        assert_eq!((chain.following(&at(30)), chain.beyond(&at(30))), (None, None));
    }
}
