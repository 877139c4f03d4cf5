//! One blob of an image, from the registry into the store.
//!
//! What came so far is in a file of its own, `partial/<digest>`, which outlives the pull: the next
//! one goes on from there. Whoever holds the file's lock downloads, everybody else waits and takes
//! over if the holder fails; so a blob is fetched once, whoever asks, in whatever process. A blob
//! gets its name in the store only when its bytes are what its digest says.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use rustix::fs::FlockOperation;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::board::Line;
use super::error::PullError;
use super::pace::{PROGRESS, SLOWEST};
use super::session::{Get, Session};
use super::transport::piece;
use crate::digest::Hashing;
use crate::document::Blob;
use crate::error::ImageError;
use crate::store::is_same;
use crate::{Digest, Store};

/// Pieces (of some 10 KiB) that wait to be written.
const QUEUE: usize = 64;
/// Between two looks at another pull's download.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// How long another pull's download may show no progress.
const LOOK_MAX: Duration = Duration::from_secs(600);

/// Makes sure that a blob is in the store.
pub(crate) async fn fetch(
    session: &Session,
    store: &Store,
    blob: Blob,
    what: &str,
    line: &Line,
) -> Result<(), PullError> {
    let Some(file) = claim(store, blob, what, line).await? else {
        line.finish();
        return Ok(());
    };
    let begun = file.metadata().map_or(0, |meta| meta.len()).min(blob.size);
    store.check_space(blob.size - begun)?;
    let mut sink = Sink::open(file, begun);
    let resumed = begun > 0;
    line.set(begun);
    line.say("");
    download(session, blob, what, line, &mut sink).await?;
    let (mut file, mut found) = sink.close().await?;
    if found != blob.digest && resumed {
        // What lay here was not the beginning of it: a disk that lost its last writes, perhaps.
        tracing::info!(digest = %blob.digest, "a partial download was damaged, fetching it anew");
        let mut sink = Sink::open(file, 0);
        download(session, blob, what, line, &mut sink).await?;
        (file, found) = sink.close().await?;
    }
    let (store, what) = (store.clone(), what.to_owned());
    blocking(move || {
        let partial = store.partial(&blob.digest);
        if found != blob.digest {
            let _ = fs::remove_file(&partial);
            return Err(ImageError::WrongDigest { what, expected: blob.digest, found });
        }
        store.publish_file(&partial, &store.blob(&blob.digest))?;
        // Only now: whoever waits for the lock must find the blob.
        drop(file);
        Ok(())
    })
    .await?;
    line.finish();
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, PullError> {
    Ok(spawn_blocking(work).await.map_err(|_| PullError::Interrupted)??)
}

/// Returns the blob's locked partial file, or `None` when the blob is in the store.
async fn claim(
    store: &Store,
    blob: Blob,
    what: &str,
    line: &Line,
) -> Result<Option<File>, PullError> {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        let (of, name) = (store.clone(), what.to_owned());
        match blocking(move || try_claim(&of, blob, &name)).await? {
            Claim::There => return Ok(None),
            Claim::Ours(file) => return Ok(Some(file)),
            Claim::Anothers(got) => {
                line.set(got);
                line.say("coming by another pull");
                if got != seen {
                    (seen, since) = (got, Instant::now());
                }
            }
        }
        if since.elapsed() > LOOK_MAX {
            return Err(PullError::Waited { what: what.to_owned() });
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

enum Claim {
    There,
    Ours(File),
    /// How many bytes it has by now.
    Anothers(u64),
}

fn try_claim(store: &Store, blob: Blob, what: &str) -> Result<Claim, ImageError> {
    let there = || -> Result<bool, ImageError> {
        let Ok(meta) = fs::metadata(store.blob(&blob.digest)) else { return Ok(false) };
        if meta.len() != blob.size {
            let why = format!("{what} has {} bytes, not {}", meta.len(), blob.size);
            return Err(ImageError::document("manifest", why));
        }
        Ok(true)
    };
    if there()? {
        return Ok(Claim::There);
    }
    let path = store.partial(&blob.digest);
    let failed = |e| ImageError::io("open", &path, e);
    let mut options = File::options();
    let file =
        options.create(true).truncate(false).read(true).write(true).open(&path).map_err(failed)?;
    let got = file.metadata().map_err(failed)?.len();
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // The last holder may have given the file its final name meanwhile.
        Ok(()) if !is_same(&file, &path) => Ok(Claim::Anothers(got)),
        Ok(()) if there()? => {
            let _ = fs::remove_file(&path);
            Ok(Claim::There)
        }
        Ok(()) => {
            if got > blob.size {
                file.set_len(0).map_err(failed)?;
            }
            Ok(Claim::Ours(file))
        }
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Claim::Anothers(got)),
        Err(error) => Err(failed(error.into())),
    }
}

/// Downloads what is missing, over as many connections as it takes.
async fn download(
    session: &Session,
    blob: Blob,
    what: &str,
    line: &Line,
    sink: &mut Sink,
) -> Result<(), PullError> {
    let mut failed = 0;
    // A transfer that begins anew gains nothing before it is past where an earlier one came to.
    let mut furthest = sink.got;
    while sink.got < blob.size {
        let error = match attempt(session, blob, what, line, sink).await {
            Ok(()) => continue,
            Err(error) => error,
        };
        if sink.got.saturating_sub(furthest) >= PROGRESS {
            failed = 0;
        }
        furthest = furthest.max(sink.got);
        failed += 1;
        let Some(pause) = error.passing().and_then(|asked| session.pace.pause(failed, asked))
        else {
            return Err(error);
        };
        tracing::info!(%error, failed, got = sink.got, "a blob's transfer failed, going on");
        line.say(format!("trying again ({error})"));
        tokio::time::sleep(pause).await;
        line.say("");
    }
    Ok(())
}

/// One connection's worth.
async fn attempt(
    session: &Session,
    blob: Blob,
    what: &str,
    line: &Line,
    sink: &mut Sink,
) -> Result<(), PullError> {
    let path = format!("blobs/{}", blob.digest);
    let get = Get { path: &path, accept: None, from: sink.got, what };
    let mut response = match session.get(get).await {
        Err(PullError::Status { status: 416, .. }) if sink.got > 0 => {
            return sink.restart().await;
        }
        response => response?,
    };
    if sink.got > 0 && !continues(&response, sink.got, blob.size) {
        // The whole blob again: it cannot go on in the middle.
        sink.restart().await?;
        if response.status() == StatusCode::PARTIAL_CONTENT {
            return Ok(());
        }
    }
    let host = session.host();
    let (mut window, mut window_got) = (Instant::now(), 0);
    let cut =
        |got| PullError::Cut { host: host.clone(), what: what.to_owned(), got, size: blob.size };
    loop {
        let bytes = match piece(&mut response).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => break,
            Err(PullError::Unreachable { .. }) => return Err(cut(sink.got)),
            Err(error) => return Err(error),
        };
        let len = bytes.len() as u64;
        if sink.got + len > blob.size {
            let why = format!("{what} has more than the {} bytes that were said", blob.size);
            return Err(PullError::Protocol { host, why });
        }
        sink.write(bytes).await?;
        line.set(sink.got);
        window_got += len;
        if window.elapsed() > session.pace.window {
            if window_got < SLOWEST {
                return Err(PullError::Slow { host, what: "a few bytes a second" });
            }
            (window, window_got) = (Instant::now(), 0);
        }
    }
    if sink.got < blob.size {
        return Err(cut(sink.got));
    }
    Ok(())
}

/// Whether an answer begins at this byte of a blob of this size.
fn continues(response: &Response, from: u64, size: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| begins_at(range, from, size))
}

/// Reads `bytes FIRST-LAST/SIZE`.
pub(crate) fn begins_at(range: &str, from: u64, size: u64) -> bool {
    let parse = || {
        let (span, of) = range.strip_prefix("bytes ")?.split_once('/')?;
        let (first, _) = span.split_once('-')?;
        let sized = of == "*" || of.parse::<u64>().ok()? == size;
        Some(sized && first.parse::<u64>().ok()? == from)
    };
    parse().unwrap_or(false)
}

/// Writes and digests on a blocking thread, a few pieces behind.
struct Sink {
    orders: mpsc::Sender<Order>,
    writer: JoinHandle<Result<(File, Digest), ImageError>>,
    got: u64,
}

enum Order {
    Write(Bytes),
    Restart,
}

impl Sink {
    fn open(file: File, keep: u64) -> Sink {
        let (orders, taken) = mpsc::channel(QUEUE);
        Sink { orders, writer: spawn_blocking(move || write(file, keep, taken)), got: keep }
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), PullError> {
        self.got += bytes.len() as u64;
        self.order(Order::Write(bytes)).await
    }

    /// Forgets all that came.
    async fn restart(&mut self) -> Result<(), PullError> {
        self.got = 0;
        self.order(Order::Restart).await
    }

    async fn order(&mut self, order: Order) -> Result<(), PullError> {
        if self.orders.send(order).await.is_ok() {
            return Ok(());
        }
        // The writer ended early, with its reason.
        let ended = (&mut self.writer).await.map_err(|_| PullError::Interrupted)?;
        Err(ended.map_or_else(PullError::Image, |_| PullError::Interrupted))
    }

    /// Waits until all is written; returns the file and the digest of it all.
    async fn close(self) -> Result<(File, Digest), PullError> {
        drop(self.orders);
        Ok(self.writer.await.map_err(|_| PullError::Interrupted)??)
    }
}

fn write(
    file: File,
    keep: u64,
    mut orders: mpsc::Receiver<Order>,
) -> Result<(File, Digest), ImageError> {
    let failed = |e| ImageError::io("write", "the download", e);
    let from_start = |length| {
        file.set_len(length)?;
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Hashing::new(file))
    };
    let mut hashing = from_start(keep).map_err(failed)?;
    let mut buffer = vec![0; 128 << 10];
    // What was here already.
    while hashing.read(&mut buffer).map_err(failed)? > 0 {}
    while let Some(order) = orders.blocking_recv() {
        match order {
            Order::Write(bytes) => hashing.write_all(&bytes).map_err(failed)?,
            Order::Restart => hashing = from_start(0).map_err(failed)?,
        }
    }
    let (_, digest, _) = hashing.finish();
    Ok((file, digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_must_begin_where_we_stopped() {
        assert!(begins_at("bytes 5-9/10", 5, 10));
        assert!(begins_at("bytes 5-9/*", 5, 10));
        for bad in ["bytes 4-9/10", "bytes 5-9/11", "bytes */10", "5-9/10", "", "bytes x-9/10"] {
            assert!(!begins_at(bad, 5, 10), "{bad}");
        }
    }
}
