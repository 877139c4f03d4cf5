//! May this sandbox reach that address? Pure: everything that decides comes in as an argument.
//!
//! `none` reaches nothing. `public` reaches what the registries call globally reachable, but not
//! mail and not the node itself, and what the operator's rules allow. An address is judged in every
//! form in which somebody on the way may read it.

use std::net::IpAddr;

use ipnet::IpNet;
use towline_proto::v1::EgressProtocol;

use super::name::TargetName;
use super::rules::{OperatorRules, Rule};
use super::special::{Special, carried, special};

/// Mail between servers: a way to send spam, and of no use to a build.
pub const MAIL_PORT: u16 = 25;

/// A sandbox's policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The public internet, and what the operator allows.
    Public,
    /// Nothing.
    None,
}

impl Policy {
    /// Reads it from a spec. A name that this version does not know means nothing is reachable.
    pub fn of_spec(name: &str) -> Self {
        if name == "public" { Self::Public } else { Self::None }
    }
}

/// What leads to the node, beyond the registries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnAddresses {
    /// The addresses of all its interfaces.
    pub node: Vec<IpAddr>,
    /// Where the control plane is, and where others reach this node.
    pub cluster: Vec<IpAddr>,
}

/// A connection or flow that is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// What the workload asked for, if it was a name.
    pub name: Option<&'a TargetName>,
    /// What it would be dialled as.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: EgressProtocol,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether it may be dialled.
    pub allowed: bool,
    /// The rule that decided: `policy none`, `private 10.0.0.0/8`, `allow mirror.example:443`.
    pub rule: String,
    /// What would allow it; empty when it is allowed.
    pub hint: String,
}

/// What policy `none` says to everything, before a name is even looked up.
pub fn closed() -> Decision {
    Decision {
        allowed: false,
        rule: "policy none".into(),
        hint: "a sandbox made with `--policy public` reaches the public internet".into(),
    }
}

/// Decides about one address.
pub fn decide(
    policy: Policy,
    rules: &OperatorRules,
    own: &OwnAddresses,
    wanted: Wanted<'_>,
) -> Decision {
    if policy == Policy::None {
        return closed();
    }
    let blocks = blocks(wanted.address, own);
    if let Some(rule) = rules.of_port(wanted.port).find(|rule| admits(rule, &wanted, &blocks)) {
        return Decision { allowed: true, rule: rule.to_string(), hint: String::new() };
    }
    if let Some(block) = blocks.first() {
        let rule = format!("{} {}", block.name, block.range);
        return Decision { allowed: false, rule, hint: hint(&wanted, &blocks) };
    }
    if wanted.port == MAIL_PORT {
        let rule = format!("mail port {MAIL_PORT}");
        return Decision { allowed: false, rule, hint: hint(&wanted, &blocks) };
    }
    Decision { allowed: true, rule: "policy public".into(), hint: String::new() }
}

/// Everything that keeps an address off, in any of its forms.
fn blocks(address: IpAddr, own: &OwnAddresses) -> Vec<Special> {
    let forms = [address].into_iter().chain(carried(address).into_iter().map(IpAddr::V4));
    forms.flat_map(|form| [owned(form, own), special(form)]).flatten().collect()
}

fn owned(address: IpAddr, own: &OwnAddresses) -> Option<Special> {
    let block = |name| Special { name, range: IpNet::from(address), guarded: true };
    // Loopback and link-local have names of their own.
    if special(address).is_some_and(|special| special.guarded) {
        None
    } else if own.node.contains(&address) {
        Some(block("the node's own address"))
    } else if own.cluster.contains(&address) {
        Some(block("the cluster's address"))
    } else {
        None
    }
}

/// A name rule opens what the name leads to, but never what is guarded. A range opens a guarded
/// block only from within it: `0.0.0.0/0` does not mean the node's loopback.
fn admits(rule: &Rule, wanted: &Wanted<'_>, blocks: &[Special]) -> bool {
    if let Some(range) = rule.range_with(wanted.address) {
        return blocks.iter().filter(|block| block.guarded).all(|block| {
            let single = range.prefix_len() == range.max_prefix_len();
            single || (block.range.contains(&wanted.address) && block.range.contains(&range))
        });
    }
    wanted.name.is_some_and(|name| rule.is_about(name)) && blocks.iter().all(|b| !b.guarded)
}

fn hint(wanted: &Wanted<'_>, blocks: &[Special]) -> String {
    let port = wanted.port;
    let subject = match wanted.name {
        Some(name) if blocks.iter().all(|block| !block.guarded) => format!("name = \"{name}\""),
        _ => format!("range = \"{}\"", IpNet::from(wanted.address)),
    };
    format!("an operator allows it in node-agent.toml: [[egress.allow]] {subject} ports = [{port}]")
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
