//! The guest's side of the network: every packet of the workload to the outside comes through a TUN
//! device, and each connection, flow of datagrams and name becomes a stream that asks the node.
//!
//! Reading order: `network` tells packets apart and owns the tables, `tcp` and `udp` carry one
//! connection or flow each, `egress` asks the node, `resolver` answers DNS. `connection`, `packet`,
//! `dns` and `names` decide and know no IO. Invariant: nothing is answered as if it came from
//! outside unless the node said so, and whatever the workload sends, memory is bounded.

mod addresses;
mod connection;
mod device;
mod dns;
mod egress;
mod flow;
mod names;
mod netlink;
mod network;
mod packet;
mod resolver;
mod tcp;
mod udp;

#[doc(hidden)]
pub mod fuzzing;

pub use addresses::{OWN_V4, OWN_V6, RESOLVER_V4, RESOLVER_V6};
pub use device::Tun;
pub use network::{Network, Wire};

use std::io;

/// Makes the network of the namespace that the caller is in. Nothing moves before the result's
/// [`Network::run`] is polled, and nothing gets out before a session with the node is there.
pub fn start() -> io::Result<Network> {
    Ok(Network::new(Box::new(Tun::create()?)))
}
