//! Numbers, strings and counted bytes off the front of a message.

/// What is wrong with the bytes.
pub(crate) type Fault = &'static str;

pub(crate) const ENDS_EARLY: Fault = "it ends early";

#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(ENDS_EARLY)?;
        self.rest = rest;
        Ok(*bytes)
    }

    pub fn u8(&mut self) -> Result<u8, Fault> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub fn i16(&mut self) -> Result<i16, Fault> {
        Ok(i16::from_be_bytes(self.array()?))
    }

    pub fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn i32(&mut self) -> Result<i32, Fault> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn i64(&mut self) -> Result<i64, Fault> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Text up to a zero byte, which is taken too.
    pub fn string(&mut self) -> Result<&'a str, Fault> {
        let length = self.rest.iter().position(|byte| *byte == 0).ok_or(ENDS_EARLY)?;
        let text = self.bytes(length)?;
        self.rest = &self.rest[1..];
        std::str::from_utf8(text).map_err(|_| "a name in it is not UTF-8")
    }

    /// Bytes after their length (Int32).
    pub fn counted(&mut self) -> Result<&'a [u8], Fault> {
        let length = usize::try_from(self.i32()?).map_err(|_| "a length in it is negative")?;
        self.bytes(length)
    }
}
