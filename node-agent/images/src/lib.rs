//! OCI images: import, unpack to layer disks; the machine's own system as an image.
