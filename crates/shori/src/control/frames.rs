//! Bytes of unknown number on a stream that goes on after them.
//!
//! Layout: frames, each a length (four bytes, the highest first) and so many bytes; a frame of length 0 is the end. So who
//! reads can tell the end from a stream that broke off.

use std::io::{self, Read};

use tokio::io::{AsyncWrite, AsyncWriteExt};

/// Longest frame, in bytes.
pub const FRAME_MAX_BYTES: usize = 1 << 20;

pub async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    for frame in bytes.chunks(FRAME_MAX_BYTES) {
        to.write_all(&(frame.len() as u32).to_be_bytes()).await?;
        to.write_all(frame).await?;
    }
    Ok(())
}

pub async fn end(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    to.write_all(&0u32.to_be_bytes()).await
}

/// Reads what is in frames, up to the end frame and not beyond it.
pub struct Frames<R> {
    inner: R,
    /// Bytes of the current frame that were not read.
    left: usize,
    ended: bool,
}

impl<R: Read> Frames<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0, ended: false }
    }

    /// What follows the end frame; whatever was not read before it is passed over.
    pub fn rest(mut self) -> io::Result<R> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(self.inner)
    }
}

/// Not `UnexpectedEof`: readers of Arrow take that for an end.
fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the answer broke off")
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 && !self.ended {
            let mut length = [0; 4];
            self.inner.read_exact(&mut length).map_err(|_| broken())?;
            self.left = u32::from_be_bytes(length) as usize;
            self.ended = self.left == 0;
            if self.left > FRAME_MAX_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of the answer is too long"));
            }
        }
        if self.ended {
            return Ok(0);
        }
        let most = buffer.len().min(self.left);
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(broken());
        }
        self.left -= read;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(parts: &[&[u8]]) -> Vec<u8> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut bytes = Vec::new();
            for part in parts {
                write(&mut bytes, part).await.unwrap();
            }
            end(&mut bytes).await.unwrap();
            bytes.extend_from_slice(b"after");
            bytes
        })
    }

    #[test]
    fn bytes_come_back_and_the_stream_goes_on() {
        let long = vec![7; 2 * FRAME_MAX_BYTES + 1];
        for parts in [&[][..], &[b"one".as_slice(), b"", b"two"], &[&long, b"x"]] {
            let bytes = framed(parts);
            let mut frames = Frames::new(bytes.as_slice());
            let mut read = Vec::new();
            frames.read_to_end(&mut read).unwrap();
            assert!(read == parts.concat());
            assert_eq!(frames.rest().unwrap(), b"after");
            assert_eq!(Frames::new(bytes.as_slice()).rest().unwrap(), b"after");
        }
    }

    #[test]
    fn a_stream_that_breaks_off_or_lies_is_an_error() {
        let bytes = framed(&[b"one", b"two"]);
        let whole = bytes.len() - b"after".len();
        for length in 0..whole {
            let error = Frames::new(&bytes[..length]).rest().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{length}");
        }
        let error = Frames::new([0xff; 8].as_slice()).rest().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
