//! Which addresses are the node itself, and where its control plane is.
//!
//! Asked of the system when something is to be decided, at most once per [`FRESH`], so that an idle
//! node does nothing. If the system cannot say, nothing is decided.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::policy::OwnAddresses;

/// How long an answer is used. A new address of an interface is the node's that much later; the
/// kernel's own routes are asked each time besides.
const FRESH: Duration = Duration::from_secs(1);
/// How long the control plane's addresses are used.
const CLUSTER_FRESH: Duration = Duration::from_secs(60);
/// How long they are waited for when they are names: then the ones of before count.
const CLUSTER_WAIT: Duration = Duration::from_secs(2);

/// Looks the node's addresses up.
#[derive(Debug)]
pub struct Own {
    cluster: Vec<String>,
    fixed: Option<OwnAddresses>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    node: Option<(Instant, Vec<IpAddr>)>,
    cluster: Option<(Instant, Vec<IpAddr>)>,
}

impl Own {
    /// Of this machine, whose control plane is at these `host:port`, and which others reach by this
    /// `host` or `host:port`: a translator may lead that back to it.
    pub fn of_machine(control_plane: Vec<String>, advertised: Option<&str>) -> Self {
        let mut cluster = control_plane;
        cluster.extend(advertised.map(|host| match host.contains(':') {
            true => host.to_owned(),
            false => format!("{host}:0"),
        }));
        Self { cluster, fixed: None, known: Mutex::default() }
    }

    /// Always these; for tests.
    pub fn fixed(own: OwnAddresses) -> Self {
        Self { cluster: Vec::new(), fixed: Some(own), known: Mutex::default() }
    }

    /// The node's addresses now, this one among them if the kernel would deliver it to itself.
    pub(crate) async fn addresses(&self, about: IpAddr) -> io::Result<OwnAddresses> {
        if let Some(fixed) = &self.fixed {
            return Ok(fixed.clone());
        }
        let mut own = OwnAddresses { node: self.node()?, cluster: self.cluster().await };
        if !own.node.contains(&about) && routes_to_itself(about) {
            own.node.push(about);
        }
        Ok(own)
    }

    fn node(&self) -> io::Result<Vec<IpAddr>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, addresses)) = &known.node
            && at.elapsed() < FRESH
        {
            return Ok(addresses.clone());
        }
        let addresses: Vec<IpAddr> =
            if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect();
        known.node = Some((Instant::now(), addresses.clone()));
        Ok(addresses)
    }

    async fn cluster(&self) -> Vec<IpAddr> {
        let kept = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.cluster.clone()
        };
        let old = match kept {
            Some((at, addresses)) if at.elapsed() < CLUSTER_FRESH => return addresses,
            Some((_, addresses)) => addresses,
            None => Vec::new(),
        };
        let endpoints = self.cluster.clone();
        let looked_up = tokio::task::spawn_blocking(move || {
            let addresses = endpoints.iter().filter_map(|endpoint| endpoint.to_socket_addrs().ok());
            addresses.flatten().map(|address| address.ip()).collect::<Vec<_>>()
        });
        let looked_up = tokio::time::timeout(CLUSTER_WAIT, looked_up).await;
        let mut addresses = looked_up.ok().and_then(Result::ok).unwrap_or_default();
        if addresses.is_empty() {
            addresses = old;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.cluster = Some((Instant::now(), addresses.clone()));
        addresses
    }
}

/// Whether the kernel's routes lead this address to the machine itself, as a local route without an
/// address of an interface does: then it is also what the machine would send from. Sends nothing.
fn routes_to_itself(address: IpAddr) -> bool {
    let any: SocketAddr = match address {
        IpAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        IpAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let source = || -> io::Result<IpAddr> {
        let socket = UdpSocket::bind(any)?;
        socket.connect((address, 9))?;
        Ok(socket.local_addr()?.ip())
    };
    // Without a route nothing is reached either.
    source().is_ok_and(|source| source == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_machine_knows_its_loopback_and_its_routes() {
        let own = Own::of_machine(vec!["127.0.0.9:1".into()], Some("127.0.0.8"));
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        let addresses = own.addresses("8.8.8.8".parse().unwrap()).await.unwrap();
        assert!(addresses.node.contains(&loopback), "{addresses:?}");
        assert!(routes_to_itself(loopback));
        assert_eq!(
            addresses.cluster,
            ["127.0.0.9", "127.0.0.8"].map(|a| a.parse::<IpAddr>().unwrap())
        );
        assert!(!routes_to_itself("8.8.8.8".parse().unwrap()));
    }
}
