//! What is promised of this node, and whether one sandbox more fits.
//!
//! The control plane reserves before it places, so a refusal here is the second line: it speaks
//! when the node's capacity shrank since. What already runs is never refused.

use towline_proto::v1::{Capacity, Shape};

/// The sum of what this node's sandboxes were promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Promised {
    /// CPUs of sandboxes that are not at rest.
    pub cpus: u64,
    /// Memory of sandboxes that are not at rest.
    pub memory_mib: u64,
    /// Disk of all sandboxes that have one.
    pub disk_mib: u64,
}

impl Promised {
    pub(crate) fn add(&mut self, shape: &Shape, memory: bool, disk: bool) {
        if memory {
            self.cpus = self.cpus.saturating_add(u64::from(shape.cpus));
            self.memory_mib = self.memory_mib.saturating_add(shape.memory_mib);
        }
        if disk {
            self.disk_mib = self.disk_mib.saturating_add(shape.disk_mib);
        }
    }

    /// Says why a sandbox of this shape does not fit beside what is promised.
    pub(crate) fn refusal(&self, shape: &Shape, capacity: &Capacity) -> Option<String> {
        if shape.cpus == 0 || shape.memory_mib == 0 || shape.disk_mib == 0 {
            return Some("the control plane sent a sandbox without CPUs, memory or disk".into());
        }
        let check = |what: &str, wanted: u64, promised: u64, offered: u64| {
            (promised.saturating_add(wanted) > offered).then(|| {
                let free = offered.saturating_sub(promised);
                format!("this node has {free} {what} left of {offered}; the sandbox needs {wanted}")
            })
        };
        check("CPUs", shape.cpus.into(), self.cpus, capacity.cpus.into())
            .or_else(|| {
                check("MiB of memory", shape.memory_mib, self.memory_mib, capacity.memory_mib)
            })
            .or_else(|| check("MiB of disk", shape.disk_mib, self.disk_mib, capacity.disk_mib))
    }
}
