//! PID 1 in the sandbox: exec, files, image mounts; small and static.
//!
//! Reading order: `boot` makes the kernel usable (`process`: a part of the node's, without a VM), `agent` owns the guest link's sessions, `configure`
//! and `root` build what the workload sees, `workload` holds its processes, `exec` runs commands,
//! `serve` tells streams apart. Nothing here trusts the workload, and nothing outside trusts this.

mod accept_queue;
pub mod agent;
pub mod boot;
mod changes;
pub mod configure;
pub mod copy;
pub mod credentials;
mod dial;
pub mod diff;
mod disks;
pub mod exec;
pub mod files;
mod fork;
pub mod forward;
pub mod fuse;
pub mod gitconfig;
pub mod layer;
pub mod listening;
pub mod net;
pub mod nonblocking;
pub mod process;
pub mod refusal;
pub mod root;
pub mod serve;
pub mod settings;
pub mod shutdown;
pub mod tcp;
pub mod vsock;
pub mod workload;
