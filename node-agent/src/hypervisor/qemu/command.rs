//! The command line of one VM. Paths of sockets are relative to the VM's directory, which is the
//! process's working directory: a socket's address has room for 107 bytes only.

use std::path::Path;

use towline_proto::mux::PORT_NAME;

use super::Qemu;
use crate::hypervisor::vm::ORDERS_SOCKET;
use crate::hypervisor::{Accel, HypervisorError, LINK_SOCKET, VmSpec};

/// All instructions that programs may want, but not what costs an emulated kernel dearly: with `erms`
/// it copies byte by byte (measured: five times slower system calls that move data), with `smap` it
/// leaves the translated block at each copy, `la57` adds a level to each page walk.
const TCG_CPU: &str = "max,-erms,-fsrm,-smap,-la57,-pku";
/// Cache of translated code under emulation, per VM, in MiB.
pub(super) const TRANSLATIONS_MIB: u32 = 256;

pub(super) fn arguments(
    qemu: &Qemu,
    spec: &VmSpec,
    accel: Accel,
) -> Result<Vec<String>, HypervisorError> {
    let mut args = Args::default();
    args.add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    args.add(&["-name", "towline,debug-threads=on"]);
    args.add(&[
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);
    let serial = if spec.console { "on" } else { "off" };
    args.pair("-M", format!("microvm,pit=off,pic=off,rtc=on,isa-serial={serial}"));
    match accel {
        Accel::Kvm => args.add(&["-accel", "kvm", "-cpu", "host"]),
        Accel::Tcg => {
            args.pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATIONS_MIB}"));
            args.add(&["-cpu", TCG_CPU]);
        }
    }
    args.pair("-smp", spec.cpus.to_string());
    args.pair("-m", format!("{}M", spec.memory_mib));
    args.pair("-kernel", quoted(&qemu.kernel.vmlinux)?);
    args.pair("-initrd", quoted(&qemu.initramfs)?);
    args.pair("-append", kernel_command_line(qemu.tsc_khz, spec, accel));
    args.pair("-qmp", format!("unix:{ORDERS_SOCKET},server=on,wait=off"));
    args.add(&["-device", "virtio-serial-device,max_ports=2"]);
    args.pair("-chardev", format!("socket,id=link,path={LINK_SOCKET},server=on,wait=off"));
    args.pair("-device", format!("virtserialport,chardev=link,name={PORT_NAME}"));
    args.add(&["-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]);
    for (number, layer) in spec.layers.iter().enumerate() {
        args.disk(&format!("layer{number}"), layer, "readonly=on")?;
    }
    if let Some(upper) = &spec.upper {
        args.disk("upper", upper, "discard=unmap,cache=writeback")?;
    }
    if spec.console {
        args.add(&["-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"]);
    }
    Ok(args.0)
}

/// Nothing secret, and nothing that is not the same for every guest of this machine.
fn kernel_command_line(tsc_khz: Option<u64>, spec: &VmSpec, accel: Accel) -> String {
    let mut line = String::from("panic=-1 cryptomgr.notests random.trust_cpu=on");
    if spec.console {
        line += " console=ttyS0 earlyprintk=ttyS0 loglevel=7";
    } else {
        line += " quiet";
    }
    match accel {
        Accel::Kvm => {}
        Accel::Tcg => {
            // Emulation is no boundary that these could guard, and they cost it much.
            line += " nokaslr mitigations=off";
            // Without it the kernel finds no timer and hangs, mostly on a busy host.
            if let Some(khz) = tsc_khz {
                line += &format!(" tsc_early_khz={khz}");
            }
        }
    }
    line
}

/// A path within an option list, where a comma is written twice.
fn quoted(path: &Path) -> Result<String, HypervisorError> {
    let text = path.to_str().ok_or_else(|| {
        HypervisorError::Spec(format!("the path `{}` is not UTF-8", path.display()))
    })?;
    Ok(text.to_owned())
}

#[derive(Debug, Default)]
struct Args(Vec<String>);

impl Args {
    fn add(&mut self, args: &[&str]) {
        self.0.extend(args.iter().map(|&arg| arg.to_owned()));
    }

    fn pair(&mut self, option: &str, value: String) {
        self.0.extend([option.to_owned(), value]);
    }

    fn disk(&mut self, serial: &str, path: &Path, options: &str) -> Result<(), HypervisorError> {
        let file = quoted(path)?.replace(',', ",,");
        self.pair("-drive", format!("id={serial},file={file},format=raw,if=none,{options}"));
        self.pair("-device", format!("virtio-blk-device,drive={serial},serial={serial}"));
        Ok(())
    }
}
