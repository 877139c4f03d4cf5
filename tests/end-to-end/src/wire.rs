//! Two network namespaces and a wire between them: a node's, and that of whatever is on its network.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};

use crate::cluster::in_path;

/// An end of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the node is.
    Node,
    /// Where everything else is.
    Far,
}

/// Both namespaces, gone when dropped, with the servers that run in them.
#[derive(Debug)]
pub struct Wire {
    node: String,
    far: String,
    servers: Vec<Child>,
}

impl Wire {
    /// Name of the wire's device at both ends.
    pub const DEVICE: &str = "wire";

    /// Makes them with these addresses. The node has a way to each of the far ones. `Err` says what
    /// is missing on this machine.
    pub fn new(own: &[&str], far: &[&str]) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces need root".into());
        }
        for tool in ["ip", "nsenter", "python3"] {
            if !in_path(tool) {
                return Err(format!("`{tool}` is not installed"));
            }
        }
        let id = std::process::id();
        let wire =
            Self { node: format!("tow-n{id}"), far: format!("tow-f{id}"), servers: Vec::new() };
        ip(&["netns", "add", &wire.node])?;
        ip(&["netns", "add", &wire.far])?;
        let ends = [Self::DEVICE, "type", "veth", "peer", "name", Self::DEVICE];
        let add = ["-n", &wire.node, "link", "add"];
        ip(&[&add[..], &ends, &["netns", &wire.far]].concat())?;
        for (netns, addresses) in [(&wire.node, own), (&wire.far, far)] {
            ip(&["-n", netns, "link", "set", "lo", "up"])?;
            ip(&["-n", netns, "link", "set", Self::DEVICE, "up"])?;
            for address in addresses {
                add_address(netns, address)?;
            }
        }
        // Those on a network of its own are reached without.
        let near = |address: &str| own.iter().any(|own| network(own) == network(address));
        for address in far.iter().filter(|address| !address.contains(':') && !near(address)) {
            let target = format!("{address}/32");
            ip(&["-n", &wire.node, "route", "add", &target, "dev", Self::DEVICE])?;
        }
        Ok(wire)
    }

    /// Name of one end's namespace.
    pub fn name(&self, side: Side) -> &str {
        match side {
            Side::Node => &self.node,
            Side::Far => &self.far,
        }
    }

    /// A command that will run at one end.
    pub fn command(&self, side: Side, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name(side)));
        command.args(["--", program]).stdin(Stdio::null());
        command
    }

    /// Starts a command that ends with the wire.
    #[track_caller]
    pub fn serve(&mut self, command: &mut Command) {
        self.servers.push(command.spawn().expect("a server"));
    }
}

/// The first three parts of an IPv4 address.
fn network(address: &str) -> Option<&str> {
    Some(address.rsplit_once('.')?.0)
}

fn add_address(netns: &str, address: &str) -> Result<(), String> {
    let v6 = address.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6());
    let network = format!("{address}/{}", if v6 { 64 } else { 24 });
    let add = ["-n", netns, "address", "add", &network, "dev", Wire::DEVICE];
    if v6 { ip(&[&add[..], &["nodad"]].concat()) } else { ip(&add) }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        for netns in [&self.node, &self.far] {
            let _ = ip(&["netns", "delete", netns]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let done = Command::new("ip").args(arguments).output().map_err(|e| e.to_string())?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr)))
}
