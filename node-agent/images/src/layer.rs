//! From an OCI layer (a compressed tar archive of changes) to a read-only layer disk.
//!
//! [`compression`] unpacks with a bound, [`tree`] works out what the entries mean on top of the
//! layers below ([`listing`]), [`normal`] writes the result as a plain tar stream, and [`imager`]
//! pipes that into mksquashfs. No file of a layer is ever made on the host.

pub(crate) mod compression;
pub(crate) mod imager;
pub(crate) mod listing;
pub(crate) mod normal;
pub(crate) mod tree;
