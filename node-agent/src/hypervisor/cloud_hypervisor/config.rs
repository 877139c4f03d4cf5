//! What one VM is made of, as `vm.create` takes it. Paths of sockets are relative to the VM's
//! directory, which is the process's working directory.
//!
//! Every device has a place of its own on the bus, so that a guest that was saved before its disks
//! were known sees them, when they are plugged in, as one that was booted with them.

use std::path::Path;

use serde::Serialize;

use super::CloudHypervisor;
use crate::hypervisor::{DiskLimits, HypervisorError, LINK_SOCKET, VmSpec};

/// Changes when a machine saved by another version of this file would not fit any more.
pub(super) const MACHINE: &str = "v1";
/// Places on the bus. Disks follow, the sandbox's own after that which it can do without: a guest
/// that sees its own has seen those before.
const VSOCK_SLOT: u8 = 2;
const RNG_SLOT: u8 = 3;
const DISKS_SLOT: u8 = 4;
const DISKS_GROUP: &str = "disks";
/// Every guest's own number: each VMM has a vsock of its own, so they never meet.
const CID: u64 = 3;

#[derive(Debug, Serialize)]
pub(super) struct VmConfig {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit_groups: Option<[RateLimitGroup; 1]>,
    disks: Vec<Disk>,
    rng: Rng,
    serial: Console,
    console: Console,
    vsock: Vsock,
}

#[derive(Debug, Serialize)]
struct Cpus {
    boot_vcpus: u32,
    max_vcpus: u32,
    /// Sandboxes start no VMs of their own.
    nested: bool,
}

#[derive(Debug, Serialize)]
struct Memory {
    /// In bytes.
    size: u64,
}

#[derive(Debug, Serialize)]
struct Payload {
    kernel: String,
    initramfs: String,
    cmdline: &'static str,
}

/// What all disks share.
#[derive(Debug, Serialize)]
struct RateLimitGroup {
    id: &'static str,
    rate_limiter_config: RateLimiter,
}

#[derive(Debug, Serialize)]
struct RateLimiter {
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth: Option<TokenBucket>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<TokenBucket>,
}

#[derive(Debug, Serialize)]
struct TokenBucket {
    size: u64,
    /// In milliseconds.
    refill_time: u64,
}

impl RateLimitGroup {
    fn of(limits: DiskLimits) -> Option<Self> {
        let bucket = |size| TokenBucket { size, refill_time: 1000 };
        let (bandwidth, ops) = (limits.bytes_s(), limits.iops.map(u64::from));
        bandwidth.or(ops)?;
        let (bandwidth, ops) = (bandwidth.map(bucket), ops.map(bucket));
        Some(Self { id: DISKS_GROUP, rate_limiter_config: RateLimiter { bandwidth, ops } })
    }
}

/// Also what `vm.add-disk` takes.
#[derive(Debug, Serialize)]
pub(super) struct Disk {
    id: String,
    pci_device_id: u8,
    serial: String,
    path: String,
    readonly: bool,
    image_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit_group: Option<&'static str>,
}

impl Disk {
    /// What it is called.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The file behind it.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    #[cfg(test)]
    pub(super) fn new(id: &str, path: &str) -> Self {
        let (id, path, image_type) = (id.to_owned(), path.to_owned(), "Raw");
        let (pci_device_id, readonly, rate_limit_group) = (0, false, None);
        let serial = id.clone();
        Self { serial, id, pci_device_id, path, readonly, image_type, rate_limit_group }
    }
}

#[derive(Debug, Serialize)]
struct Rng {
    src: &'static str,
    pci_device_id: u8,
}

#[derive(Debug, Serialize)]
struct Console {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Vsock {
    cid: u64,
    socket: &'static str,
    pci_device_id: u8,
}

/// Of a spec whose paths are absolute.
pub(super) fn of(vmm: &CloudHypervisor, spec: &VmSpec) -> Result<VmConfig, HypervisorError> {
    let (off, null) = (Console { mode: "Off", file: None }, Console { mode: "Null", file: None });
    let serial = match spec.console {
        true => Console { mode: "File", file: Some("console.log") },
        false => null,
    };
    // Nothing secret, and nothing that is not the same for every guest of this machine.
    let cmdline = match spec.console {
        true => "panic=-1 cryptomgr.notests random.trust_cpu=on console=ttyS0 loglevel=7",
        false => "panic=-1 cryptomgr.notests random.trust_cpu=on quiet",
    };
    Ok(VmConfig {
        cpus: Cpus { boot_vcpus: spec.cpus, max_vcpus: spec.cpus, nested: false },
        memory: Memory { size: spec.memory_mib << 20 },
        payload: Payload {
            kernel: text(&vmm.kernel.vmlinux)?,
            initramfs: text(&vmm.initramfs)?,
            cmdline,
        },
        rate_limit_groups: RateLimitGroup::of(vmm.disk_limits).map(|group| [group]),
        disks: disks(vmm, spec)?,
        rng: Rng { src: "/dev/urandom", pci_device_id: RNG_SLOT },
        serial,
        console: off,
        vsock: Vsock { cid: CID, socket: LINK_SOCKET, pci_device_id: VSOCK_SLOT },
    })
}

/// The disks of a VM. A machine that is to be saved has none yet.
pub(super) fn disks(vmm: &CloudHypervisor, spec: &VmSpec) -> Result<Vec<Disk>, HypervisorError> {
    let Some(upper) = &spec.upper else { return Ok(Vec::new()) };
    let modules = vmm.kernel.modules_disk.iter().map(|path| ("modules".to_owned(), path, true));
    let layers = spec.layers.iter().enumerate();
    let rate_limit_group = RateLimitGroup::of(vmm.disk_limits).map(|group| group.id);
    let layers = layers.map(|(number, path)| (format!("layer{number}"), path, true));
    modules
        .chain([("upper".to_owned(), upper, false)])
        .chain(layers)
        .zip(DISKS_SLOT..)
        .map(|((name, path, readonly), pci_device_id)| {
            Ok(Disk {
                id: name.clone(),
                pci_device_id,
                serial: name,
                path: text(path)?,
                readonly,
                // Never guessed from what a guest wrote.
                image_type: "Raw",
                rate_limit_group,
            })
        })
        .collect()
}

fn text(path: &Path) -> Result<String, HypervisorError> {
    let text = path.to_str().ok_or_else(|| {
        HypervisorError::Spec(format!("the path `{}` is not UTF-8", path.display()))
    })?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn disks_share_the_limits_that_there_are() {
        let of = |mib_s, iops| {
            serde_json::to_value(RateLimitGroup::of(DiskLimits { mib_s, iops })).unwrap()
        };
        assert_eq!(of(None, None), json!(null));
        let ops = json!({"size": 7, "refill_time": 1000});
        let group = |limits| json!({"id": "disks", "rate_limiter_config": limits});
        assert_eq!(of(None, Some(7)), group(json!({"ops": ops})));
        let bandwidth = json!({"size": 2 << 20, "refill_time": 1000});
        assert_eq!(of(Some(2), Some(7)), group(json!({"bandwidth": bandwidth, "ops": ops})));
    }
}
