//! A blob of the store on its way to a registry, in parts that may have to be sent again.
//!
//! It is read once or more, but digested once, in order; its last bytes go out only when that digest
//! is right. So no registry ever has a damaged blob whole, even one that does not look itself.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::error::PullError;
use crate::Store;
use crate::digest::Hashing;
use crate::document::Blob;
use crate::error::ImageError;
use crate::export::{damaged, open_blob};

/// Bytes that are read at once, and how many such pieces wait to be sent.
const PIECE: usize = 128 << 10;
const QUEUE: usize = 4;

/// A blob to be sent.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) blob: Blob,
    what: String,
    store: Store,
    reading: Arc<Reading>,
    /// Bytes of the part that is sent now which went out.
    taken: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Reading {
    file: File,
    blob: Blob,
    checked: Mutex<Checked>,
}

struct Checked {
    /// Digests the file's beginning.
    beginning: Hashing<io::Sink>,
    bytes: u64,
    fault: Option<Fault>,
}

#[derive(Debug)]
enum Fault {
    Damaged,
    Read(io::Error),
}

impl std::fmt::Debug for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checked").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Content {
    /// Opens a blob's file.
    pub(crate) fn open(store: &Store, blob: Blob, what: &str) -> Result<Content, ImageError> {
        let file = open_blob(store, blob, what)?;
        let beginning = Hashing::new(io::sink());
        let checked = Mutex::new(Checked { beginning, bytes: 0, fault: None });
        let reading = Arc::new(Reading { file, blob, checked });
        let (what, store, taken) = (what.to_owned(), store.clone(), Arc::default());
        Ok(Content { blob, what, store, reading, taken })
    }

    /// How many bytes of the last part that was asked for went out.
    pub(crate) fn taken(&self) -> &AtomicU64 {
        &self.taken
    }

    /// Returns a part as what a request brings along.
    pub(crate) fn body(&self, part: Range<u64>) -> reqwest::Body {
        self.taken.store(0, Ordering::Relaxed);
        let (pieces, coming) = mpsc::channel(QUEUE);
        let left = part.end - part.start;
        let reading = Arc::clone(&self.reading);
        // Ends with the request, which drops the other end.
        spawn_blocking(move || reading.read(part, &pieces));
        reqwest::Body::wrap(Part { coming, left, taken: Arc::clone(&self.taken) })
    }

    /// Says what a failed request means: our own fault, or that it ended in the middle.
    pub(crate) fn cut(&self, error: PullError, from: u64) -> PullError {
        if let Err(fault) = self.fault() {
            return fault.into();
        }
        match (error, self.taken.load(Ordering::Relaxed)) {
            (PullError::Unreachable { host, .. }, sent) if sent > 0 => {
                let (what, size) = (self.what.clone(), self.blob.size);
                PullError::Cut { host, what, got: from + sent, size }
            }
            (error, _) => error,
        }
    }

    /// Whether all of it was read and is what its digest says.
    pub(crate) fn whole(&self) -> Result<(), ImageError> {
        self.fault()?;
        let checked = self.reading.checked.lock().unwrap_or_else(PoisonError::into_inner);
        let right =
            checked.bytes == self.blob.size && checked.beginning.digest() == self.blob.digest;
        right.then_some(()).ok_or_else(|| self.damaged())
    }

    fn fault(&self) -> Result<(), ImageError> {
        let mut checked = self.reading.checked.lock().unwrap_or_else(PoisonError::into_inner);
        match checked.fault.take() {
            None => Ok(()),
            Some(Fault::Damaged) => Err(self.damaged()),
            Some(Fault::Read(error)) => {
                Err(ImageError::io("read", self.store.blob(&self.blob.digest), error))
            }
        }
    }

    fn damaged(&self) -> ImageError {
        damaged(&self.store, self.what.clone(), &self.blob.digest)
    }
}

impl Reading {
    fn read(&self, part: Range<u64>, pieces: &mpsc::Sender<io::Result<Bytes>>) {
        let mut at = part.start;
        while at < part.end {
            let most = usize::try_from(part.end - at).unwrap_or(PIECE).min(PIECE);
            let mut piece = vec![0; most];
            let read = self.file.read_exact_at(&mut piece, at).map_err(Fault::Read);
            if let Err(fault) = read.and_then(|()| self.check(at, &piece)) {
                self.checked.lock().unwrap_or_else(PoisonError::into_inner).fault = Some(fault);
                let _ = pieces.blocking_send(Err(io::ErrorKind::InvalidData.into()));
                return;
            }
            at += most as u64;
            if pieces.blocking_send(Ok(piece.into())).is_err() {
                return;
            }
        }
    }

    /// Digests what of a piece was not read before.
    fn check(&self, at: u64, piece: &[u8]) -> Result<(), Fault> {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        let known = checked.bytes.saturating_sub(at);
        let fresh = usize::try_from(known).ok().and_then(|known| piece.get(known..));
        if let Some(fresh) = fresh.filter(|_| at <= checked.bytes) {
            checked.beginning.write_all(fresh).map_err(Fault::Read)?;
            checked.bytes += fresh.len() as u64;
        }
        let last = at + piece.len() as u64 == self.blob.size;
        if !last || checked.beginning.digest() == self.blob.digest {
            return Ok(());
        }
        Err(Fault::Damaged)
    }
}

/// A part of a blob as it goes out.
struct Part {
    coming: mpsc::Receiver<io::Result<Bytes>>,
    left: u64,
    taken: Arc<AtomicU64>,
}

impl http_body::Body for Part {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.coming.poll_recv(context).map(|piece| {
            let piece = piece?.inspect(|bytes| {
                self.left -= bytes.len() as u64;
                self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            });
            Some(piece.map(Frame::data))
        })
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
