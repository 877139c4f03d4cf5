//! Unpacks gzip and zstd as it reads, with a bound on how much comes out of how little.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use crate::limits;

/// Largest window of a zstd frame: 128 MiB, what `zstd --long` makes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// An error that says that a bound was met, inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BoundMet(pub(crate) String);

/// Reads a stream, unpacked if it begins as gzip or zstd do. What comes out is at most `most`
/// bytes, and not absurdly more than went in.
pub(crate) fn unpack<'r>(input: impl Read + 'r, most: u64) -> io::Result<Box<dyn Read + 'r>> {
    let packed = Rc::new(Cell::new(0));
    let counted = Counted { inner: input, bytes: Rc::clone(&packed) };
    let mut input = BufReader::with_capacity(64 << 10, counted);
    let start = input.fill_buf()?;
    let unpacked: Box<dyn Read> = if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(input))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Box::new(decoder)
    } else {
        Box::new(input)
    };
    Ok(Box::new(Bounded { inner: unpacked, packed, unpacked: 0, most }))
}

struct Counted<R> {
    inner: R,
    bytes: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes.set(self.bytes.get() + n as u64);
        Ok(n)
    }
}

struct Bounded<'r> {
    inner: Box<dyn Read + 'r>,
    packed: Rc<Cell<u64>>,
    unpacked: u64,
    most: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.unpacked += n as u64;
        if self.unpacked > self.most {
            let why = format!("it unpacks to more than {} MiB", self.most >> 20);
            return Err(io::Error::other(BoundMet(why)));
        }
        let fair = self.packed.get().saturating_mul(limits::RATIO_MAX);
        if self.unpacked > limits::RATIO_FLOOR && self.unpacked > fair {
            let why = format!(
                "it unpacks to more than {} times its size: a decompression bomb, or one huge \
                 empty file",
                limits::RATIO_MAX
            );
            return Err(io::Error::other(BoundMet(why)));
        }
        Ok(n)
    }
}
