//! Sends an OCI image layout to a node's image store, as a tar archive.
//!
//! The node checks all of it; here it is only read. A folder is packed on the way, with what it
//! holds by name and nothing through links.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::mpsc;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{self, stream_open::Kind};

use super::guest::{Guest, open_failed};
use crate::error::Failure;
use crate::output::human;

/// Bytes in one frame.
const PIECE: usize = 256 << 10;
/// Pieces that wait for the link.
const QUEUE: usize = 8;

/// Where the layout comes from.
#[derive(Debug)]
pub enum Source {
    /// A folder with `oci-layout`, `index.json` and `blobs`.
    Folder(PathBuf),
    /// A tar archive of one.
    Archive(File),
    /// The same on standard input.
    Stdin,
}

impl Source {
    /// Looks at what was named.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let failed = |error: io::Error| {
            Failure::new(format!("could not read `{}`", path.display())).because(error)
        };
        if !path.metadata().map_err(failed)?.is_dir() {
            return Ok(Self::Archive(File::open(path).map_err(failed)?));
        }
        if !path.join("oci-layout").is_file() {
            let text =
                format!("`{}` is not an OCI image layout: it has no `oci-layout`", path.display());
            return Err(Failure::new(text)
                .hint("`skopeo copy docker://debian:12 oci:DIR` writes one")
                .into());
        }
        Ok(Self::Folder(path.to_owned()))
    }

    fn read_into(self, queue: mpsc::Sender<Bytes>) -> io::Result<()> {
        let mut out = Pieces { queue, piece: Vec::with_capacity(PIECE) };
        match self {
            Self::Folder(path) => pack(&path, &mut out)?,
            Self::Archive(mut file) => copy(&mut file, &mut out)?,
            Self::Stdin => copy(&mut io::stdin().lock(), &mut out)?,
        }
        out.flush()
    }
}

fn copy(from: &mut impl io::Read, out: &mut Pieces) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            len => out.write_all(&buffer[..len])?,
        }
    }
}

fn pack(path: &Path, out: &mut Pieces) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    for name in ["oci-layout", "index.json"] {
        append(&mut tar, &path.join(name), Path::new(name))?;
    }
    for algorithm in std::fs::read_dir(path.join("blobs"))? {
        let algorithm = algorithm?;
        for blob in std::fs::read_dir(algorithm.path())? {
            let blob = blob?;
            let name = Path::new("blobs").join(algorithm.file_name()).join(blob.file_name());
            append(&mut tar, &blob.path(), &name)?;
        }
    }
    tar.finish()
}

fn append(tar: &mut tar::Builder<&mut Pieces>, path: &Path, name: &Path) -> io::Result<()> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("`{}`: {error}", path.display()));
    let file = File::open(path).map_err(named)?;
    let size = file.metadata().map_err(named)?.len();
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    // A file that grows or shrinks while it is read gives a clear error on the other side.
    tar.append_data(&mut header, name, file.take(size)).map_err(named)
}

/// Cuts what is written into pieces for the link.
struct Pieces {
    queue: mpsc::Sender<Bytes>,
    piece: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..len]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.queue.blocking_send(piece.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Sends the layout; returns what the node made of it.
pub async fn run(
    guest: &Guest<'_>,
    name: &str,
    source: Source,
    show: impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<v1::ImageImported> {
    let open = Kind::ImageImport(v1::ImageImportOpen { name: name.to_owned() });
    let opened = guest.open(open).await.map_err(open_failed)?;
    let (mut reader, mut writer) = (opened.reader, opened.writer);
    let (queue, mut pieces) = mpsc::channel(QUEUE);
    let reading = tokio::task::spawn_blocking(move || source.read_into(queue));
    let sending = async {
        while let Some(piece) = pieces.recv().await {
            writer.send(&Frame::raw(FrameKind::ImportData, piece)).await?;
        }
        // Only a layout that was read to its end may look complete.
        reading.await.map_err(io::Error::other)??;
        writer.send(&Frame::raw(FrameKind::ImportData, Bytes::new())).await?;
        io::Result::Ok(())
    };
    let mut sending = std::pin::pin!(sending);
    let mut sent = None;
    loop {
        tokio::select! {
            frame = reader.next() => match frame {
                Ok(Some(frame)) => if let Some(imported) = on_frame(&frame, &show)? {
                    return Ok(imported);
                },
                Ok(None) => return Err(broke(sent, None)),
                Err(error) => return Err(broke(sent, Some(error))),
            },
            done = &mut sending, if sent.is_none() => {
                // The node may have refused in the middle: its words are worth more than ours.
                match done {
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                        return Err(Failure::new("could not read the image").because(error).into());
                    }
                    done => sent = Some(done),
                }
            }
        }
    }
}

fn on_frame(
    frame: &Frame,
    show: &impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<Option<v1::ImageImported>> {
    if frame.is(FrameKind::ImportProgress) {
        show(&frame.decode()?);
    } else if frame.is(FrameKind::Imported) {
        return Ok(Some(frame.decode()?));
    } else if frame.is(FrameKind::Error) {
        let error: v1::StreamError = frame.decode()?;
        return Err(Failure::new(human::printable(&error.message)).into());
    }
    Ok(None)
}

fn broke(sent: Option<io::Result<()>>, error: Option<io::Error>) -> anyhow::Error {
    let failure = Failure::new("the node went away during the import")
        .hint("`tow status` says how it is; importing again is safe");
    match error.or(sent.and_then(Result::err)) {
        Some(error) => failure.because(error).into(),
        None => failure.into(),
    }
}
