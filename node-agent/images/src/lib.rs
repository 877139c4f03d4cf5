//! Images as a node keeps them: OCI images made into read-only layer disks, and the laptop's own
//! system served as an image.
//!
//! In reading order: [`Store`] is the content-addressed folder that everything is kept in,
//! [`import()`] takes an OCI image layout in, [`prepare`] makes its layers into squashfs disks, and
//! [`local`] builds and serves the image of the machine itself. All of it is synchronous: async
//! callers run it on blocking threads. What strangers wrote (archives, documents, a guest's
//! requests) is bounded and checked here, and nothing of it is ever unpacked onto the host.

pub mod digest;
pub mod local;

pub use digest::Digest;
