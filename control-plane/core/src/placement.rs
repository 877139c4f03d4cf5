//! Chooses a node for a sandbox: a pure function of what it is given. Says why not, node by node,
//! and what would change the answer. Left out: the reservation itself, which the applier re-checks
//! with the same `fits()`.

use std::collections::BTreeMap;

use towline_proto::ids::NodeId;
use towline_proto::limits;
use towline_proto::v1::{self, Isolation, NodeState};

use crate::refusal::{Refusal, RefusalKind};
use crate::resources::{Resources, Short, amount, fits};
use crate::state::nodes::{Nodes, limits_of, reserved_of};

/// vCPUs of a sandbox that asked for none, on a node that has as many.
pub const DEFAULT_CPUS: u32 = limits::CPUS_DEFAULT;
/// Memory of a sandbox that asked for none.
pub const DEFAULT_MEMORY_MIB: u64 = limits::MEMORY_DEFAULT_MIB;
/// Disk of a sandbox that asked for none.
pub const DEFAULT_DISK_MIB: u64 = 20 * 1024;
/// Processes of a sandbox that asked for none.
pub const DEFAULT_PROCESSES: u32 = 4096;

/// Nodes that a refusal names: more would not be read.
const NODES_NAMED: usize = 5;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Zeros mean the default.
    pub shape: v1::Shape,
    /// VM or process.
    pub isolation: Isolation,
    /// Needs a node on the laptop's own machine.
    pub local_image: bool,
}

/// A node and the complete shape there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Where.
    pub node: NodeId,
    /// With nothing left to default.
    pub shape: v1::Shape,
}

/// Why one node was passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    Silent,
    Cordoned,
    NoDriver,
    NotLocal,
    Smaller(u32),
    Short(Short),
}

/// Chooses the node that is fullest after it (best fit); ties go to the lower id. `in_flight` is
/// reserved too, but not committed yet.
pub fn place(
    nodes: &Nodes,
    in_flight: &BTreeMap<NodeId, Resources>,
    want: &Want,
) -> Result<Placement, Refusal> {
    let mut best: Option<(u64, Placement)> = None;
    let mut passed = Vec::new();
    for (id, record) in nodes.iter() {
        let Some(node) = &record.node else { continue };
        let pending = in_flight.get(&id).copied().unwrap_or_default();
        match consider(node, pending, want) {
            Ok((left, shape)) => {
                if best.is_none_or(|(least, _)| left < least) {
                    best = Some((left, Placement { node: id, shape }));
                }
            }
            Err(why) => passed.push((id, node, pending, why)),
        }
    }
    best.map(|(_, placement)| placement).ok_or_else(|| refusal(want, &passed))
}

fn consider(node: &v1::Node, pending: Resources, want: &Want) -> Result<(u64, v1::Shape), Passed> {
    match node.state() {
        NodeState::Suspect => return Err(Passed::Silent),
        NodeState::Cordoned => return Err(Passed::Cordoned),
        NodeState::Ready | NodeState::Unspecified => {}
    }
    if want.local_image && !node.embedded {
        return Err(Passed::NotLocal);
    }
    if !node.drivers.iter().any(|driver| driver.isolation() == want.isolation) {
        return Err(Passed::NoDriver);
    }
    let cpus = cpus_of(node);
    let shape = complete(&want.shape, cpus);
    if shape.cpus > cpus {
        return Err(Passed::Smaller(cpus));
    }
    let (limits, reserved) = (limits_of(node), reserved_of(node).plus(pending));
    let amount = Resources::of_shape(&shape);
    fits(limits, reserved, amount).map_err(Passed::Short)?;
    Ok((limits.minus(reserved.plus(amount)).memory_mib, shape))
}

/// Most CPUs that one sandbox can have there: the machine's, however often they are promised.
fn cpus_of(node: &v1::Node) -> u32 {
    let offered = node.capacity.map_or(0, |capacity| capacity.cpus);
    if node.machine_cpus == 0 { offered } else { offered.min(node.machine_cpus) }
}

/// Fills in what the request left to default, for a node with so many CPUs.
pub fn complete(shape: &v1::Shape, node_cpus: u32) -> v1::Shape {
    fn or<T: PartialEq + Default>(value: T, default: T) -> T {
        if value == T::default() { default } else { value }
    }
    v1::Shape {
        cpus: or(shape.cpus, DEFAULT_CPUS.min(node_cpus).max(1)),
        memory_mib: or(shape.memory_mib, DEFAULT_MEMORY_MIB),
        disk_mib: or(shape.disk_mib, DEFAULT_DISK_MIB),
        processes_max: or(shape.processes_max, DEFAULT_PROCESSES),
    }
}

fn refusal(want: &Want, passed: &[(NodeId, &v1::Node, Resources, Passed)]) -> Refusal {
    let kind = RefusalKind::Exhausted;
    if passed.is_empty() {
        return Refusal::new(
            kind,
            "the cluster has no node yet: start one with `tow up`, or add a node agent",
        );
    }
    let message = short_of(want, passed, Short::Memory)
        .or_else(|| short_of(want, passed, Short::Disk))
        .or_else(|| short_of(want, passed, Short::Cpus))
        .or_else(|| smaller(want, passed))
        .unwrap_or_else(|| other(want, passed));
    Refusal::new(kind, message)
}

/// "no node has 64 GiB of memory free; the largest has 18 GiB on node_…".
fn short_of(
    want: &Want,
    passed: &[(NodeId, &v1::Node, Resources, Passed)],
    short: Short,
) -> Option<String> {
    let pick = |amount: Resources| match short {
        Short::Cpus => amount.cpus,
        Short::Memory => amount.memory_mib,
        Short::Disk => amount.disk_mib,
    };
    let (free, total, id, node) = passed
        .iter()
        .filter(|(.., why)| *why == Passed::Short(short))
        .map(|(id, node, pending, _)| {
            let limits = limits_of(node);
            let free = limits.minus(reserved_of(node).plus(*pending));
            (pick(free), pick(limits), *id, *node)
        })
        .max_by_key(|(free, ..)| *free)?;
    let wanted = pick(Resources::of_shape(&complete(&want.shape, cpus_of(node))));
    let (say, what): (fn(u64) -> String, _) = match short {
        Short::Cpus => (|n| n.to_string(), "CPUs"),
        Short::Memory => (amount, "memory"),
        Short::Disk => (amount, "disk"),
    };
    let hint = if total < wanted {
        format!("ask for at most {}", say(total))
    } else {
        format!("stop or remove sandboxes there, or ask for at most {}", say(free))
    };
    Some(format!(
        "no node has {} of {what} free; the largest has {} on {id} (`{}`, {} in all): {hint}",
        say(wanted),
        say(free),
        node.name,
        say(total),
    ))
}

fn smaller(want: &Want, passed: &[(NodeId, &v1::Node, Resources, Passed)]) -> Option<String> {
    let most = passed.iter().filter_map(|(.., why)| match why {
        Passed::Smaller(cpus) => Some(*cpus),
        _ => None,
    });
    let most = most.max()?;
    Some(format!("no node has {} CPUs; the largest has {most}: ask for fewer", want.shape.cpus))
}

fn other(want: &Want, passed: &[(NodeId, &v1::Node, Resources, Passed)]) -> String {
    let any = |why: Passed| passed.iter().find(|(.., other)| *other == why);
    if let Some((id, node, ..)) = any(Passed::Silent) {
        return format!(
            "no node answers: {id} (`{}`) is silent; see whether its node agent runs (`tow status`)",
            node.name
        );
    }
    if any(Passed::NotLocal).is_some() {
        return "`--image local` needs a node on this machine: start one with `tow up`".to_owned();
    }
    if any(Passed::NoDriver).is_some() {
        return no_driver(want, passed);
    }
    "every node is cordoned: uncordon one with `tow node uncordon`".to_owned()
}

fn no_driver(want: &Want, passed: &[(NodeId, &v1::Node, Resources, Passed)]) -> String {
    match want.isolation {
        Isolation::Process => {
            let others = passed.iter().filter(|(.., why)| *why == Passed::NoDriver);
            let names = others.map(|(_, node, ..)| format!("`{}`", node.name)).take(NODES_NAMED);
            let names: Vec<String> = names.collect();
            format!(
                "isolation `process` shares the node's kernel, and no node allows it: leave \
                 --isolation out to get a VM, or have it allowed in the node agent's configuration \
                 (`isolation_process = true`) of {}",
                names.join(", ")
            )
        }
        Isolation::Unspecified | Isolation::Vm => "no node has a driver for VMs".to_owned(),
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
