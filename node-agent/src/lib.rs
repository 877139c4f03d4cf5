//! The node agent: runs sandboxes as microVMs and splices clients' streams to guests.

pub mod disks;
pub mod guest_link;
pub mod hypervisor;
pub mod initramfs;
pub mod kernel;
