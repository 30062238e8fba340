//! Lines of a change log. Permanent: files of released versions are read by later ones, so a key may be added here (with
//! a higher [`VERSION`] if who does not know it would misread a file), but none may change its name or meaning.
//!
//! The first line is a header, the last one tells where the file ends and how many changes it has, each one between is a
//! change. A file without its last line is cut off.

use std::borrow::Cow;
use std::fmt;
use std::io::Write;

use arrow::array::{Array, BinaryArray};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shori_core::change::{ChangeBatch, Op};
use shori_core::position::{Micros, Position, SortKey};
use shori_core::schema::TableSchema;
use shori_core::source::{SnapshotProgress, SnapshotState};
use shori_core::{Error, ErrorKind, Result};

use crate::calendar;
use crate::names::parse_key;
use crate::values::{Cell, write_text, write_value};

pub const FORMAT: &str = "shori change log";
/// Goes up when a file cannot be understood by older versions.
pub const VERSION: u32 = 1;

/// A position as two texts of hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionText {
    lsn: HexKey,
    seq: HexKey,
}

impl PositionText {
    pub fn of(position: &Position) -> Self {
        Self { lsn: HexKey(position.lsn), seq: HexKey(position.seq) }
    }

    pub fn position(&self) -> Position {
        Position::new(self.lsn.0, self.seq.0)
    }
}

/// A part of a line that is text, and means something else.
macro_rules! as_text {
    ($name:ident($inner:ty), $expected:literal, $read:expr, $write:expr) => {
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        struct $name($inner);

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(&$write(self.0))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                        let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
                        $read(text).map($name).ok_or_else(wrong)
                    }
                }

                deserializer.deserialize_str(Text)
            }
        }
    };
}

as_text!(HexKey(SortKey), "hexadecimal digits in pairs", parse_key, |key| key);
as_text!(Instant(Micros), "a time as 2024-02-29T23:59:59.000001Z", parse_instant, instant);
as_text!(OpName(Op), "the name of a kind of change", op_named, op_name);

/// A snapshot that has begun below the end of the file, and not ended before it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotText {
    generation: u32,
    start: PositionText,
    /// Of one that has ended.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    end: Option<SnapshotEnd>,
    rows: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SnapshotEnd {
    end: PositionText,
    end_time: Instant,
}

impl SnapshotText {
    pub fn of(progress: &SnapshotProgress) -> Self {
        let end = SnapshotEnd { end: PositionText::of(&progress.end), end_time: Instant(progress.end_time) };
        Self {
            generation: progress.generation,
            start: PositionText::of(&progress.start),
            end: progress.is_done().then_some(end),
            rows: progress.rows,
        }
    }

    pub fn progress(&self) -> SnapshotProgress {
        let mut progress = SnapshotProgress {
            state: SnapshotState::Running,
            start: self.start.position(),
            rows: self.rows,
            ..SnapshotProgress::requested(self.generation)
        };
        if let Some(end) = &self.end {
            progress.state = SnapshotState::Done;
            (progress.end, progress.end_time) = (end.end.position(), end.end_time.0);
        }
        progress
    }
}

/// The first line, but for the table's schema, which stands in it as control tables have it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Header {
    pub format: String,
    pub version: u32,
    /// The random id of the store that the log is of.
    pub store: String,
    pub source: String,
    pub capture: String,
    pub after: PositionText,
    /// Below it, only the last image per key is there.
    pub horizon: PositionText,
    pub snapshots: Vec<SnapshotText>,
}

pub fn write_header(out: &mut Vec<u8>, header: &Header, schema: &TableSchema) -> Result<()> {
    let fail = |cause| Error::new(ErrorKind::Internal, "write", "the header of a change log", cause);
    let start = serde_json::to_string(header).map_err(fail)?;
    // Two objects become one.
    write!(out, "{},{}", &start[..start.len() - 1], &schema.to_json()[1..]).map_err(unwritten)?;
    out.push(b'\n');
    Ok(())
}

/// Writes change `row` of a batch.
pub fn write_change(out: &mut Vec<u8>, batch: &ChangeBatch, row: usize) -> Result<()> {
    let (position, op) = (batch.position(row)?, Op::from_u8(batch.op.value(row))?);
    let time = instant(batch.commit_time(row));
    write!(
        out,
        "{{\"position\":{{\"lsn\":\"{}\",\"seq\":\"{}\"}},\"op\":\"{}\",\"commit_time\":\"{time}\"",
        position.lsn,
        position.seq,
        op_name(op)
    )
    .map_err(unwritten)?;
    let mask = batch.unchanged.as_ref().filter(|masks| masks.is_valid(row));
    let is_unchanged = |column| mask.is_some_and(|masks| is_marked(masks, row, column));
    let fields = batch.schema.columns.fields();
    if op != Op::Truncate {
        out.extend_from_slice(b",\"row\":{");
        let mut is_first = true;
        for (column, field) in fields.iter().enumerate().filter(|(column, _)| !is_unchanged(*column)) {
            if !std::mem::take(&mut is_first) {
                out.push(b',');
            }
            write_text(out, field.name())?;
            out.push(b':');
            write_value(out, &batch.columns[column], row)?;
        }
        out.push(b'}');
    }
    if (0..fields.len()).any(is_unchanged) {
        let names: Vec<&str> = (0..fields.len())
            .filter(|column| is_unchanged(*column))
            .map(|column| fields[column].name().as_str())
            .collect();
        write!(out, ",\"unchanged\":{}", serde_json::json!(names)).map_err(unwritten)?;
    }
    out.extend_from_slice(b"}\n");
    Ok(())
}

fn is_marked(masks: &BinaryArray, row: usize, column: usize) -> bool {
    masks.value(row).get(column / 8).is_some_and(|byte| byte >> (column % 8) & 1 == 1)
}

/// The last line: of a file that ends at a boundary, with its commit time.
pub fn write_end(out: &mut Vec<u8>, up_to: &Position, boundary_time: Option<Micros>, changes: u64) -> Result<()> {
    let place = format!("{{\"lsn\":\"{}\",\"seq\":\"{}\"}}", up_to.lsn, up_to.seq);
    match boundary_time {
        Some(time) => {
            let time = instant(time);
            writeln!(out, "{{\"boundary\":{place},\"boundary_time\":\"{time}\",\"changes\":{changes}}}")
        }
        None => writeln!(out, "{{\"continued\":{place},\"changes\":{changes}}}"),
    }
    .map_err(unwritten)
}

fn unwritten(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Internal, "write", "a line of a change log", cause)
}

/// Every line but the first.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnyLine<'a> {
    position: Option<PositionText>,
    op: Option<OpName>,
    commit_time: Option<Instant>,
    #[serde(borrow)]
    row: Option<RowCells<'a>>,
    #[serde(default)]
    unchanged: Vec<String>,
    boundary: Option<PositionText>,
    boundary_time: Option<Instant>,
    continued: Option<PositionText>,
    changes: Option<u64>,
}

/// Values by column, in the line's order.
pub struct RowCells<'a>(pub Vec<(Cow<'a, str>, Cell<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for RowCells<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;

        impl<'de> Visitor<'de> for Columns {
            type Value = RowCells<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of values by column")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut columns: A) -> Result<Self::Value, A::Error> {
                let mut cells = Vec::new();
                while let Some(Name(name)) = columns.next_key()? {
                    cells.push((name, columns.next_value()?));
                }
                Ok(RowCells(cells))
            }
        }

        deserializer.deserialize_map(Columns)
    }
}

/// Text that is borrowed where nothing in it is escaped.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// A line, read.
pub enum Line<'a> {
    Change(ChangeLine<'a>),
    End(End),
}

pub struct ChangeLine<'a> {
    pub position: Position,
    pub op: Op,
    pub commit_time: Micros,
    pub cells: RowCells<'a>,
    pub unchanged: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    pub up_to: Position,
    /// Of a boundary.
    pub boundary_time: Option<Micros>,
    pub changes: u64,
}

/// Reads a line that is not the first; what is wrong with it, if it is none.
pub fn read_line(text: &[u8]) -> std::result::Result<Line<'_>, String> {
    let line: AnyLine<'_> = serde_json::from_slice(text).map_err(|cause| cause.to_string())?;
    match line {
        AnyLine { position: Some(position), op: Some(op), commit_time: Some(time), row, unchanged, .. } => {
            let cells = row.unwrap_or(RowCells(Vec::new()));
            Ok(Line::Change(ChangeLine {
                position: position.position(),
                op: op.0,
                commit_time: time.0,
                cells,
                unchanged,
            }))
        }
        AnyLine { boundary: Some(boundary), boundary_time: Some(time), changes: Some(changes), .. } => {
            Ok(Line::End(End { up_to: boundary.position(), boundary_time: Some(time.0), changes }))
        }
        AnyLine { continued: Some(continued), changes: Some(changes), .. } => {
            Ok(Line::End(End { up_to: continued.position(), boundary_time: None, changes }))
        }
        _ => Err("it is neither a whole change nor the end of a file".into()),
    }
}

pub fn op_name(op: Op) -> &'static str {
    match op {
        Op::Snapshot => "snapshot",
        Op::Delete => "delete",
        Op::Insert => "insert",
        Op::UpdateBefore => "update_before",
        Op::UpdateAfter => "update_after",
        Op::Truncate => "truncate",
    }
}

fn op_named(name: &str) -> Option<Op> {
    (0..=5).filter_map(|code| Op::from_u8(code).ok()).find(|op| op_name(*op) == name)
}

/// `2024-02-29T23:59:59.000001Z`
fn instant(micros: Micros) -> String {
    format!("{}Z", calendar::Timestamp(micros))
}

fn parse_instant(text: &str) -> Option<Micros> {
    calendar::parse_timestamp(text.strip_suffix('Z')?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use arrow::datatypes::{DataType, Field};
    use shori_core::change::ChangeHeadBuilder;
    use shori_core::position::CaptureId;

    fn at(lsn: u64) -> Position {
        Position::new(SortKey::from_u64(lsn), SortKey::EMPTY)
    }

    /// Files of released versions have these lines.
    #[test]
    fn lines_are_as_documented() {
        let columns = vec![Field::new("id", DataType::Int64, false), Field::new("note", DataType::Utf8, true)];
        let schema = Arc::new(TableSchema::new("orders", columns, &["id"]).unwrap());
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            store: "5d".into(),
            source: "shop".into(),
            capture: "orders".into(),
            after: PositionText::of(&Position::ZERO),
            horizon: PositionText::of(&Position::ZERO),
            snapshots: vec![SnapshotText::of(&SnapshotProgress {
                state: SnapshotState::Done,
                end: at(2),
                rows: 7,
                ..SnapshotProgress::requested(1)
            })],
        };
        let mut out = Vec::new();
        write_header(&mut out, &header, &schema).unwrap();
        let mut head = ChangeHeadBuilder::default();
        head.push(&at(1), Op::Insert, 0);
        head.push(&at(2), Op::UpdateAfter, 1);
        head.push(&at(3), Op::Truncate, 2);
        let ids: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), Some(1), None]));
        let notes: ArrayRef = Arc::new(StringArray::from(vec![Some("a \"b\"\n"), None, None]));
        let mut batch = head.finish(CaptureId::new("shop", "orders"), schema.clone(), vec![ids, notes]).unwrap();
        batch.unchanged = Some(BinaryArray::from(vec![None, Some(&[0b10u8][..]), None]));
        (0..3).for_each(|row| write_change(&mut out, &batch, row).unwrap());
        write_end(&mut out, &at(3), Some(2), 3).unwrap();
        write_end(&mut out, &at(3), None, 3).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text, include_str!("../tests/all/documented.jsonl"));
        let first = text.lines().next().unwrap();
        assert_eq!(serde_json::from_str::<Header>(first).unwrap(), header);
        assert_eq!(TableSchema::from_json(first).unwrap(), *schema);
        assert!(header.snapshots[0].progress().is_done());
        let lines: Vec<_> = text.lines().skip(1).map(|line| read_line(line.as_bytes()).unwrap()).collect();
        assert!(matches!(&lines[1], Line::Change(change) if change.unchanged == ["note"] && change.cells.0.len() == 1));
        assert!(matches!(&lines[3], Line::End(End { boundary_time: Some(2), changes: 3, .. })));
        assert!(matches!(&lines[4], Line::End(End { boundary_time: None, .. })));
    }

    #[test]
    fn damaged_lines_are_told_by_what_is_wrong() {
        for (line, told) in [
            ("", "EOF"),
            ("{\"position\":{\"lsn\":\"00\",\"seq\":\"\"},\"op\":\"ins", "EOF"),
            ("{}", "neither"),
            ("{\"changes\":3}", "neither"),
            ("{\"position\":{\"lsn\":\"0\",\"seq\":\"\"},\"op\":\"insert\",\"commit_time\":\"x\"}", "hexadecimal"),
            ("{\"position\":{\"lsn\":\"00\",\"seq\":\"\"},\"op\":\"upsert\",\"commit_time\":\"x\"}", "kind of change"),
            ("{\"position\":{\"lsn\":\"00\",\"seq\":\"\"},\"op\":\"insert\",\"commit_time\":\"x\"}", "a time as"),
            ("{\"changes\":3,\"other\":1}", "other"),
        ] {
            let error = read_line(line.as_bytes()).err().unwrap();
            assert!(error.contains(told), "{line}: {error}");
        }
    }
}
