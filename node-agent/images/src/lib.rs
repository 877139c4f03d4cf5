//! Images as a node keeps them: OCI images made into read-only layer disks, and the laptop's own
//! system served as an image.
//!
//! In reading order: [`Store`] is the content-addressed folder that everything is kept in,
//! [`import()`] takes an OCI image layout in, [`registry`] pulls and pushes images, [`prepare()`]
//! makes their layers into squashfs disks, [`export()`] writes an image out as an archive,
//! [`collect()`] removes what no image needs, and [`local`] builds and serves the image of the
//! machine itself. All but [`registry`] is synchronous: async callers run it
//! on blocking threads. What strangers wrote (archives, documents, a registry's answers, a guest's
//! requests) is bounded and checked here, and nothing of it is ever unpacked onto the host.

mod collect;
pub mod digest;
mod document;
pub mod error;
mod export;
pub mod fixture;
pub mod fuzzing;
mod import;
mod layer;
pub mod limits;
pub mod local;
mod prepare;
pub mod registry;
pub mod save;
pub mod secrets;
mod store;
mod tar;

pub use collect::{Collected, collect};
pub use digest::Digest;
pub use document::ImageConfig;
pub use error::ImageError;
pub use export::export;
pub use import::{Imported, import, import_layout};
pub use prepare::{Prepared, prepare};
pub use store::{OnProgress, Progress, Store, StoredImage};
