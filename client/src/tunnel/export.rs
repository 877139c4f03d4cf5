//! Takes an image out of a node's image store: to an archive, to a folder, to standard output.
//!
//! What is written is checked here as well, whatever becomes of it: the archive's names, and each
//! blob against its digest. A file or folder has its name only when it is whole.

use std::io::{self, IsTerminal as _, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, StreamErrorCode, stream_open::Kind};
use towline_streams::{ArchiveReader, archive_reader};

use super::guest::{Guest, open_failed};
use crate::error::Failure;
use crate::output::human;

mod layout;

/// How long the node may say nothing at all: it may wait for other exports.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// Where an image goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// An archive on standard output.
    Stdout,
    /// An archive; a file that is there is replaced.
    Archive(PathBuf),
    /// A folder with an OCI image layout, made for it.
    Layout(PathBuf),
}

/// The node that was asked does not have the image; another one may.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotHere(String);

impl Destination {
    /// Looks at what was named, before anything is asked for.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            if io::stdout().is_terminal() {
                let failure = Failure::usage("an archive does not belong on a terminal");
                return Err(failure.hint("`tow image export NAME image.tar` writes a file").into());
            }
            return Ok(Self::Stdout);
        }
        if path.extension().is_some_and(|extension| extension == "tar") {
            return Ok(Self::Archive(path.to_owned()));
        }
        let taken = |what: &str| {
            Failure::new(format!("`{}` is there already, and {what}", path.display()))
                .hint("a new folder, or a name that ends in .tar for an archive")
        };
        match std::fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
            Ok(true) => Err(taken("is not empty").into()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(taken("is no folder").into())
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(cannot(path, error)),
            Ok(false) | Err(_) => Ok(Self::Layout(path.to_owned())),
        }
    }

    /// Takes the archive in; `digest` is what must be in it. Blocks.
    fn take(&self, archive: &mut ArchiveReader, digest: &str) -> anyhow::Result<u64> {
        match self {
            Self::Stdout => {
                let mut out = Copying { from: archive, to: io::stdout().lock(), bytes: 0 };
                layout::check(&mut out, digest, None)?;
                out.finish()
            }
            Self::Archive(path) => {
                let made = beside(path, |builder, folder| builder.tempfile_in(folder))?;
                let mut out = Copying { from: archive, to: made.as_file(), bytes: 0 };
                layout::check(&mut out, digest, None)?;
                let bytes = out.finish()?;
                made.as_file().sync_all().map_err(|e| cannot(path, e))?;
                made.persist(path).map_err(|e| cannot(path, e.error))?;
                Ok(bytes)
            }
            Self::Layout(path) => {
                let made = beside(path, |builder, folder| builder.tempdir_in(folder))?;
                let mut out = Copying { from: archive, to: io::sink(), bytes: 0 };
                layout::check(&mut out, digest, Some(made.path()))?;
                let bytes = out.finish()?;
                // Replaces an empty folder and nothing else.
                std::fs::rename(made.path(), path).map_err(|e| cannot(path, e))?;
                // Its name is gone: there is nothing left to remove.
                let _ = made.keep();
                Ok(bytes)
            }
        }
    }
}

/// Makes what is to be renamed: in the same folder, with the rights that the user's umask leaves.
fn beside<T>(
    path: &Path,
    make: impl FnOnce(&tempfile::Builder<'_, '_>, &Path) -> io::Result<T>,
) -> anyhow::Result<T> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    let is_archive = path.extension().is_some_and(|extension| extension == "tar");
    let mode = if is_archive { 0o666 } else { 0o777 };
    builder.prefix(".tow-export-").permissions(std::fs::Permissions::from_mode(mode));
    make(&builder, folder).map_err(|error| cannot(path, error))
}

fn cannot(path: &Path, error: io::Error) -> anyhow::Error {
    Failure::new(format!("could not write `{}`", path.display())).because(error).into()
}

/// Writes on what is read.
struct Copying<'a, W> {
    from: &'a mut ArchiveReader,
    to: W,
    bytes: u64,
}

impl<W: Write> Read for Copying<'_, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buffer)?;
        self.to.write_all(&buffer[..n])?;
        self.bytes += n as u64;
        Ok(n)
    }
}

impl<W: Write> Copying<'_, W> {
    /// Reads to the archive's end, beyond its last entry.
    fn finish(mut self) -> anyhow::Result<u64> {
        io::copy(&mut self, &mut io::sink()).context("the archive")?;
        self.to.flush()?;
        Ok(self.bytes)
    }
}

/// Exports an image, called `name` in what is written; returns the archive's bytes.
pub async fn run(
    guest: &Guest<'_>,
    digest: &str,
    name: &str,
    to: &Destination,
    show: impl Fn(&v1::ImageImportProgress),
) -> anyhow::Result<u64> {
    let open = v1::ImageExportOpen { digest: digest.to_owned(), name: name.to_owned() };
    let opened = guest.open(Kind::ImageExport(open)).await.map_err(open_failed)?;
    // The writer stays open to the end: the node ends the export when it closes.
    let (mut reader, _writer) = (opened.reader, opened.writer);
    let (pieces, mut archive) = archive_reader();
    let (to, digest) = (to.clone(), digest.to_owned());
    let taking = spawn_blocking(move || to.take(&mut archive, &digest));
    let ended = loop {
        let frame = match timeout(SILENCE_MAX, reader.next()).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => break Err(broke().into()),
            Ok(Err(error)) => break Err(broke().because(error).into()),
            Err(_) => break Err(broke().into()),
        };
        if frame.is(FrameKind::ImportProgress) {
            show(&frame.decode()?);
        } else if frame.is(FrameKind::Error) {
            break Err(refused(&frame.decode()?));
        } else if frame.is(FrameKind::ExportData) {
            let last = frame.body.is_empty();
            // Who takes no more says why below.
            if pieces.send(frame.body).await.is_err() || last {
                break Ok(());
            }
        }
    };
    drop(pieces);
    let taken = taking.await.context("writing the image")?;
    // The node's reason is the cause of whatever the archive lacks.
    ended?;
    taken
}

/// The node's own words.
pub(super) fn refused(error: &v1::StreamError) -> anyhow::Error {
    let text = human::printable(&error.message);
    match error.code() {
        StreamErrorCode::NotFound => NotHere(text).into(),
        _ => Failure::new(text).into(),
    }
}

fn broke() -> Failure {
    Failure::new("the node went away during the export")
        .hint("`tow status` says how it is; exporting again is safe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_says_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Destination::at(&folder.path().join(name));
        assert!(matches!(at("x.tar").unwrap(), Destination::Archive(_)));
        assert!(matches!(at("x").unwrap(), Destination::Layout(_)));
        assert!(matches!(at("x.tar.d").unwrap(), Destination::Layout(_)));
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        assert!(matches!(at("empty").unwrap(), Destination::Layout(_)));
        std::fs::write(folder.path().join("file"), b"").unwrap();
        assert!(at("file").unwrap_err().to_string().contains("is no folder"));
        let full = Destination::at(folder.path()).unwrap_err().to_string();
        assert!(full.contains("is not empty"), "{full}");
    }
}
