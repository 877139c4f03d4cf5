//! What can go wrong with an OCI image, in words that say where and what to do next.

use std::io;
use std::path::PathBuf;

use crate::Digest;

/// An image could not be imported or prepared.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The archive or folder is not an image.
    #[error("neither an OCI image layout nor an archive of docker save: {0}")]
    NotALayout(String),
    /// A document of the image is not what the OCI specification says.
    #[error("the image's {what} cannot be used: {why}")]
    BadDocument {
        /// Which document.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// No image in the layout is for this machine.
    #[error("the image is for {found}; this node runs linux/{}", wanted_architecture())]
    OtherPlatform {
        /// What it is for.
        found: String,
    },
    /// Content is not what its digest says.
    #[error(
        "{what} does not have the content that its digest names: expected {expected}, found {found}"
    )]
    WrongDigest {
        /// Which content.
        what: String,
        /// The digest that it was named by.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// A blob that the image names is not in the archive.
    #[error("the archive lacks {what} {digest}")]
    MissingBlob {
        /// What it would be.
        what: &'static str,
        /// Its name.
        digest: Digest,
    },
    /// A blob of an image in the store is gone.
    #[error(
        "{what} ({digest}) of the image is missing on this node: `tow image pull` or `tow image \
         import` brings it in again"
    )]
    LostBlob {
        /// Which part.
        what: String,
        /// Its name.
        digest: Digest,
    },
    /// A blob of an image in the store is not what its name says.
    #[error(
        "{what} of the image is damaged on this node: remove `{path}` there, then pull or import \
         the image again"
    )]
    DamagedBlob {
        /// Which part.
        what: String,
        /// Where it is.
        path: PathBuf,
    },
    /// An archive entry that no honest image has.
    #[error("{archive}, entry {entry}: {why}")]
    BadEntry {
        /// Which archive.
        archive: String,
        /// The entry's number and name.
        entry: String,
        /// What is wrong with it.
        why: String,
    },
    /// An archive that is damaged or no tar archive.
    #[error("{archive} is damaged: {why}")]
    BadArchive {
        /// Which archive.
        archive: String,
        /// What is wrong with it.
        why: String,
    },
    /// More than an image may have.
    #[error("{what}: more than the limit of {limit}")]
    Limit {
        /// What there is too much of.
        what: String,
        /// How much would be accepted.
        limit: String,
    },
    /// The disk is full, or would be.
    #[error("no space for the image at `{at}`: {need_mib} MiB are needed, {free_mib} MiB are free")]
    NoSpace {
        /// Where.
        at: PathBuf,
        /// What the image still needs.
        need_mib: u64,
        /// What there is.
        free_mib: u64,
    },
    /// The image was never imported here.
    #[error("no image {0} on this node: `tow image pull` or `tow image import` brings it in")]
    Unknown(Digest),
    /// The program that makes layer disks is missing.
    #[error("`mksquashfs` could not be started: install the package squashfs-tools")]
    NoImager(#[source] io::Error),
    /// The program that makes layer disks failed.
    #[error("mksquashfs failed ({status}): {output}")]
    Imager {
        /// How it ended.
        status: String,
        /// What it said.
        output: String,
    },
    /// Somebody adds to the store, and has been at it for a while.
    #[error("images come to or leave this node just now: try again when that is done")]
    Busy,
    /// The machine's own error.
    #[error("could not {what} `{path}`")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Whoever takes the archive does not any more.
    #[error("the archive could not be sent on")]
    Output(#[source] io::Error),
    /// The stream that the archive comes from broke.
    #[error("the archive ended early")]
    Input(#[source] io::Error),
}

impl ImageError {
    /// Makes an error of the machine; one about space gets its own words.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::StorageFull
            || source.kind() == io::ErrorKind::QuotaExceeded
        {
            return ImageError::NoSpace { free_mib: free_mib(&path), at: path, need_mib: 1 };
        }
        ImageError::Io { what, path, source }
    }

    pub(crate) fn document(what: impl Into<String>, why: impl ToString) -> Self {
        ImageError::BadDocument { what: what.into(), why: why.to_string() }
    }
}

/// Returns the free space of the file system that a path is on, for those without privilege.
pub(crate) fn free_mib(path: &std::path::Path) -> u64 {
    let there = path.ancestors().find_map(|path| rustix::fs::statvfs(path).ok());
    there.map_or(0, |vfs| vfs.f_bavail.saturating_mul(vfs.f_frsize) >> 20)
}

/// The architecture of this machine, in OCI's words.
pub(crate) fn wanted_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
