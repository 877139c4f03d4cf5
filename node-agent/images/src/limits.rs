//! Bounds on what a stranger's image may be; each is far above what real images have.

/// Bytes of a manifest, an index or a config.
pub const DOCUMENT_MAX: u64 = 4 << 20;
/// Layers of one image.
pub const LAYERS_MAX: usize = 128;
/// Layer disks of one image: a microVM has few disk slots. Later layers are squashed into the
/// last.
pub const LAYER_DISKS_MAX: usize = 16;
/// Blobs in one archive: several platforms and their attestations.
pub const BLOBS_MAX: usize = 4096;
/// Bytes of one archive, and of one image's layers unpacked.
pub const IMAGE_BYTES_MAX: u64 = 64 << 30;
/// Entries of one image's layers together.
pub const ENTRIES_MAX: u64 = 2_000_000;
/// Unpacked bytes of a compressed layer that are accepted whatever the ratio.
pub const RATIO_FLOOR: u64 = 256 << 20;
/// Beyond the floor, how many times larger than its compressed form a layer may be. System images
/// are at 2 to 5; an honest layer of zeros has no reason to be sent.
pub const RATIO_MAX: u64 = 200;
/// Bytes of one PAX or GNU extension header.
pub const EXTENSION_MAX: u64 = 1 << 20;
/// Bytes of a path inside a layer, as Linux bounds it.
pub const PATH_MAX: usize = 4095;
/// Bytes of one component, as Linux bounds it.
pub const NAME_MAX: usize = 255;
/// Extended attributes of one entry, and bytes of one.
pub const XATTRS_MAX: usize = 64;
/// Bytes of one extended attribute's value, as Linux bounds it.
pub const XATTR_VALUE_MAX: usize = 64 << 10;
/// Free space that an import leaves to others.
pub const SPACE_LEFT_MIB: u64 = 64;
