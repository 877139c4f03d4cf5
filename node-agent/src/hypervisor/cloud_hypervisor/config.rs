//! What one VM is made of, as `vm.create` takes it. Paths of sockets are relative to the VM's
//! directory, which is the process's working directory.

use std::path::Path;

use serde::Serialize;

use super::CloudHypervisor;
use crate::hypervisor::{HypervisorError, LINK_SOCKET, VmSpec};

/// Every guest's own number: each VMM has a vsock of its own, so they never meet.
const CID: u64 = 3;

#[derive(Debug, Serialize)]
pub(super) struct VmConfig {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
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

#[derive(Debug, Serialize)]
struct Disk {
    id: String,
    serial: String,
    path: String,
    readonly: bool,
    image_type: &'static str,
}

#[derive(Debug, Serialize)]
struct Rng {
    src: &'static str,
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
    let mut disks = Vec::new();
    if let Some(upper) = &spec.upper {
        disks.push(disk("upper", upper, false)?);
    }
    if let Some(modules) = &vmm.kernel.modules_disk {
        disks.push(disk("modules", modules, true)?);
    }
    for (number, layer) in spec.layers.iter().enumerate() {
        disks.push(disk(&format!("layer{number}"), layer, true)?);
    }
    Ok(VmConfig {
        cpus: Cpus { boot_vcpus: spec.cpus, max_vcpus: spec.cpus, nested: false },
        memory: Memory { size: spec.memory_mib << 20 },
        payload: Payload {
            kernel: text(&vmm.kernel.vmlinux)?,
            initramfs: text(&vmm.initramfs)?,
            cmdline,
        },
        disks,
        rng: Rng { src: "/dev/urandom" },
        serial,
        console: off,
        vsock: Vsock { cid: CID, socket: LINK_SOCKET },
    })
}

fn disk(name: &str, path: &Path, readonly: bool) -> Result<Disk, HypervisorError> {
    Ok(Disk {
        id: name.to_owned(),
        serial: name.to_owned(),
        path: text(path)?,
        readonly,
        // Never guessed from what a guest wrote.
        image_type: "Raw",
    })
}

fn text(path: &Path) -> Result<String, HypervisorError> {
    let text = path.to_str().ok_or_else(|| {
        HypervisorError::Spec(format!("the path `{}` is not UTF-8", path.display()))
    })?;
    Ok(text.to_owned())
}
