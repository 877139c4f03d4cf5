//! The layer's archive as it is written: compressed, digested inside and outside of the compression,
//! and bounded.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{Compression, SaveError};
use crate::Digest;
use crate::digest::Hashing;
use crate::error::ImageError;
use crate::limits;
use crate::store::Store;
use crate::tar::{self, Header};

/// Fixed: another level would be another digest.
const ZSTD_LEVEL: i32 = 3;
const GZIP_LEVEL: u32 = 6;
/// The disk's space is looked at again after so many bytes.
const SPACE_LOOK: u64 = 16 << 20;

/// A layer that is being written.
pub(super) struct Writer {
    tar: tar::Writer<Hashing<Encoder>>,
    path: PathBuf,
    store: Store,
    /// Bytes of the file at hand that were said, and that are still to come.
    size: u64,
    rest: u64,
    looked: u64,
}

/// A layer that was written.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) diff_id: Digest,
    pub(super) unpacked: u64,
}

enum Encoder {
    Zstd(zstd::stream::write::Encoder<'static, Hashing<File>>),
    Gzip(flate2::write::GzEncoder<Hashing<File>>),
}

impl Encoder {
    fn new(file: File, compression: Compression) -> io::Result<Self> {
        let out = Hashing::new(file);
        Ok(match compression {
            Compression::Zstd => Self::Zstd(zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?),
            // Its header has no name and no time.
            Compression::Gzip => {
                let level = flate2::Compression::new(GZIP_LEVEL);
                Self::Gzip(flate2::write::GzEncoder::new(out, level))
            }
        })
    }

    fn written(&self) -> u64 {
        match self {
            Self::Zstd(encoder) => encoder.get_ref().bytes(),
            Self::Gzip(encoder) => encoder.get_ref().bytes(),
        }
    }

    fn finish(self) -> io::Result<Hashing<File>> {
        match self {
            Self::Zstd(encoder) => encoder.finish(),
            Self::Gzip(encoder) => encoder.finish(),
        }
    }
}

impl Write for Encoder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Zstd(encoder) => encoder.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Writer {
    pub(super) fn new(
        store: &Store,
        path: PathBuf,
        compression: Compression,
    ) -> Result<Self, SaveError> {
        store.check_space(SPACE_LOOK)?;
        let made = File::create_new(&path).and_then(|file| Encoder::new(file, compression));
        let encoder = made.map_err(|e| ImageError::io("make", &path, e))?;
        let tar = tar::Writer::new(Hashing::new(encoder));
        Ok(Self { tar, path, store: store.clone(), size: 0, rest: 0, looked: 0 })
    }

    /// Begins an entry; the one before must be whole.
    pub(super) fn header(&mut self, header: &Header) -> Result<(), SaveError> {
        if self.rest > 0 {
            return Err(SaveError::entry(&header.path, "the file before it is not whole"));
        }
        self.look(&header.path)?;
        (self.size, self.rest) = (header.size, header.size);
        self.tar.header(header).map_err(|e| failed(&self.path, e))
    }

    /// Adds to the content of the file at hand.
    pub(super) fn data(&mut self, path: &[u8], bytes: &[u8]) -> Result<(), SaveError> {
        self.take(path, bytes.len() as u64)?;
        self.tar.piece(bytes).map_err(|e| failed(&self.path, e))?;
        self.end_of_file()
    }

    /// Adds so many zeros.
    pub(super) fn hole(&mut self, path: &[u8], mut zeros: u64) -> Result<(), SaveError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        self.take(path, zeros)?;
        while zeros > 0 {
            let len = zeros.min(ZEROS.len() as u64);
            let piece = &ZEROS[..usize::try_from(len).unwrap_or(ZEROS.len())];
            self.tar.piece(piece).map_err(|e| failed(&self.path, e))?;
            zeros -= len;
            self.look(path)?;
        }
        self.end_of_file()
    }

    fn take(&mut self, path: &[u8], len: u64) -> Result<(), SaveError> {
        self.look(path)?;
        let rest = self.rest.checked_sub(len).filter(|_| len > 0);
        self.rest =
            rest.ok_or_else(|| SaveError::entry(path, "it has more content than was said"))?;
        Ok(())
    }

    fn end_of_file(&mut self) -> Result<(), SaveError> {
        match self.rest {
            0 => self.tar.pad(self.size).map_err(|e| failed(&self.path, e)),
            _ => Ok(()),
        }
    }

    /// Whether it may go on: within what others would take, and within the disk.
    fn look(&mut self, path: &[u8]) -> Result<(), SaveError> {
        let (unpacked, packed) = (self.tar.output().bytes(), self.tar.output().inner().written());
        if unpacked > limits::IMAGE_BYTES_MAX {
            let gib = limits::IMAGE_BYTES_MAX >> 30;
            return Err(SaveError::Limit(format!("more than {gib} GiB of changed files")));
        }
        // What the encoder still holds is little against the floor.
        let fair = packed.saturating_mul(limits::RATIO_MAX).max(limits::RATIO_FLOOR);
        if unpacked > fair {
            return Err(SaveError::entry(
                path,
                "it is, with the files before it, almost nothing but zeros: whoever unpacks images \
                 takes that for a bomb",
            ));
        }
        if packed - self.looked >= SPACE_LOOK {
            self.looked = packed;
            self.store.check_space(SPACE_LOOK)?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Layer, SaveError> {
        if self.rest > 0 {
            return Err(SaveError::Guest("it ended within a file".into()));
        }
        let path = self.path;
        let finish = || {
            let (encoder, diff_id, unpacked) = self.tar.finish()?.finish();
            let (_, digest, bytes) = encoder.finish()?.finish();
            io::Result::Ok((diff_id, unpacked, digest, bytes))
        };
        let (diff_id, unpacked, digest, bytes) = finish().map_err(|e| failed(&path, e))?;
        Ok(Layer { path, digest, bytes, diff_id, unpacked })
    }
}

fn failed(path: &Path, error: io::Error) -> SaveError {
    ImageError::io("write", path, error).into()
}
