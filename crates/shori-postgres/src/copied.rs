//! Rows out of `copy … to stdout (format binary)`.
//!
//! The format: PostgreSQL documentation, `COPY`, "Binary Format".

use bytes::{Buf, Bytes, BytesMut};

use crate::reader::Fault;

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
/// Signature, flags, and the length of an extension that follows.
const HEADER_BYTES: usize = 19;

/// Cuts the bytes of a copy into rows, wherever its messages end.
#[derive(Default)]
pub(crate) struct Rows {
    /// From the current row on.
    bytes: Bytes,
    has_header: bool,
    ended: bool,
    /// Where each value of the row stands; none for null.
    fields: Vec<Option<(usize, usize)>>,
    /// Where the current row ends, once it is whole.
    end: usize,
}

impl Rows {
    /// A server sends each row as a message of its own: then nothing is copied.
    pub fn push(&mut self, message: Bytes) {
        self.pass();
        if self.bytes.is_empty() {
            self.bytes = message;
            return;
        }
        let mut joined = BytesMut::with_capacity(self.bytes.len() + message.len());
        joined.extend_from_slice(&self.bytes);
        joined.extend_from_slice(&message);
        self.bytes = joined.freeze();
    }

    /// Goes to the next whole row, and tells how many bytes it takes. `None`: more has to come, or nothing will.
    pub fn advance(&mut self) -> Result<Option<usize>, Fault> {
        self.pass();
        if !self.has_header && !self.take_header()? {
            return Ok(None);
        }
        let Some(count) = self.number::<2>(0).map(i16::from_be_bytes) else { return Ok(None) };
        if count < 0 || self.ended {
            self.ended = true;
            return Ok(None);
        }
        self.fields.clear();
        let mut at = 2;
        for _ in 0..count {
            let Some(length) = self.number::<4>(at).map(i32::from_be_bytes) else { return Ok(None) };
            at += 4;
            match usize::try_from(length) {
                Ok(length) => {
                    self.fields.push(Some((at, at + length)));
                    at += length;
                }
                Err(_) => self.fields.push(None),
            }
        }
        if self.bytes.len() < at {
            return Ok(None);
        }
        self.end = at;
        Ok(Some(at))
    }

    fn take_header(&mut self) -> Result<bool, Fault> {
        let Some(extension) = self.number::<4>(HEADER_BYTES - 4).map(u32::from_be_bytes) else { return Ok(false) };
        if !self.bytes.starts_with(SIGNATURE) {
            return Err("no signature of a binary copy");
        }
        let header = HEADER_BYTES + extension as usize;
        if self.bytes.len() < header {
            return Ok(false);
        }
        self.bytes.advance(header);
        self.has_header = true;
        Ok(true)
    }

    fn pass(&mut self) {
        self.bytes.advance(std::mem::take(&mut self.end));
    }

    fn number<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..at + N)?.try_into().ok()
    }

    /// How many values the current row has.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// A value of the current row; `None`: null.
    pub fn value(&self, index: usize) -> Option<&[u8]> {
        let (start, end) = (*self.fields.get(index)?)?;
        self.bytes.get(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(rows: &[&[Option<&[u8]>]]) -> Vec<u8> {
        let mut bytes = [SIGNATURE, &[0; 4], &[0, 0, 0, 3], b"ext"].concat();
        for row in rows {
            bytes.extend_from_slice(&(row.len() as i16).to_be_bytes());
            for value in *row {
                bytes.extend_from_slice(&value.map_or(-1, |value| value.len() as i32).to_be_bytes());
                bytes.extend_from_slice(value.unwrap_or_default());
            }
        }
        bytes.extend_from_slice(&(-1i16).to_be_bytes());
        bytes
    }

    #[test]
    fn rows_come_whole_wherever_messages_end() {
        let sent: [&[Option<&[u8]>]; 4] = [&[Some(b"a"), None], &[Some(b""), Some(b"long value")], &[], &[None]];
        let bytes = copy(&sent);
        for size in 1..=bytes.len() {
            let mut rows = Rows::default();
            let mut read: Vec<Vec<Option<Vec<u8>>>> = Vec::new();
            for message in bytes.chunks(size) {
                rows.push(Bytes::copy_from_slice(message));
                while rows.advance().unwrap().is_some() {
                    read.push((0..rows.len()).map(|index| rows.value(index).map(<[u8]>::to_vec)).collect());
                }
            }
            let sent: Vec<Vec<Option<Vec<u8>>>> =
                sent.iter().map(|row| row.iter().map(|value| value.map(<[u8]>::to_vec)).collect()).collect();
            assert_eq!(read, sent, "messages of {size} bytes");
        }
    }

    #[test]
    fn what_is_no_copy_is_refused() {
        let mut rows = Rows::default();
        rows.push(Bytes::from_static(b"PGCOPY\n\xff\n\n\0 and more that is none"));
        assert!(rows.advance().is_err());
    }
}
