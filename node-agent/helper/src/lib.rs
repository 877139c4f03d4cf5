//! The node's privileged helper: the only part of Towline that is root on a node.
//!
//! ```text
//!   towline-node-agent (its own user) ── verbs and descriptors ──▶ towline-node-helper (root)
//!                                                                      │ fork
//!            one per VM: own user id, own cgroup, own root, no network ▼
//!                                                        cloud-hypervisor │ qemu
//! ```
//! It has four verbs ([`protocol::Request`]): start a VMM that its configuration lists, end one, list
//! them, and set the deadline at which all are killed. It opens no path that it is told: files come
//! as descriptors that the node agent could open, and are mounted into the VMM's own root with the
//! node agent's user mapped to the VMM's, so that nothing of anybody else's becomes readable by it.
//!
//! What is decided ([`decide`]) is apart from what is done ([`server`], [`spawn`], [`jail`]).
//! [`client`] is the node agent's side; [`confine`] and [`cgroups`] are used by both.

pub mod cgroups;
pub mod client;
pub mod config;
pub mod confine;
pub mod decide;
mod jail;
mod packet;
pub mod process;
pub mod protocol;
pub mod server;
mod spawn;
