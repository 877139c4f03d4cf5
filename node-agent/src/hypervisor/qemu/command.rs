//! The command line of one VM. Every VM has the same devices, with a disk behind them or not, so that
//! one that was saved before its disks were known fits every sandbox of its shape. Paths of sockets are relative to the VM's directory, which is the
//! process's working directory: a socket's address has room for 107 bytes only.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use towline_proto::mux::PORT_NAME;

use super::{Qemu, Start};
use crate::hypervisor::vm::ORDERS_SOCKET;
use crate::hypervisor::{Accel, DiskLimits, HypervisorError, LAYER_DISKS_MAX, LINK_SOCKET, VmSpec};

/// All instructions that programs may want, but not what costs an emulated kernel dearly: with `erms`
/// it copies byte by byte (measured: five times slower system calls that move data), with `smap` it
/// leaves the translated block at each copy, `la57` adds a level to each page walk.
const TCG_CPU: &str = "max,-erms,-fsrm,-smap,-la57,-pku";
/// Cache of translated code under emulation, per VM, in MiB.
pub(super) const TRANSLATIONS_MIB: u32 = 256;

/// Changes when a machine saved by another version of this file would not fit any more.
pub(super) const MACHINE: &str = "v1";

/// What decides which instructions a guest sees.
pub(super) fn cpu(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "host",
        Accel::Tcg | Accel::None => TCG_CPU,
    }
}

pub(super) fn arguments(
    qemu: &Qemu,
    spec: &VmSpec,
    accel: Accel,
    start: &Start,
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
        Accel::Kvm => args.add(&["-accel", "kvm"]),
        Accel::Tcg | Accel::None => {
            args.pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATIONS_MIB}"));
        }
    }
    args.add(&["-cpu", cpu(accel)]);
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
    // A guest takes its disks in this order, until it has what it needs.
    let throttled = throttled(qemu.disk_limits);
    let upper_options = format!("discard=unmap,cache=writeback{throttled}");
    args.disk("upper", spec.upper.as_deref(), &upper_options)?;
    let read_only = format!("readonly=on{throttled}");
    args.disk("modules", qemu.kernel.modules_disk.as_deref(), &read_only)?;
    for number in 0..LAYER_DISKS_MAX {
        let layer = spec.layers.get(number).map(PathBuf::as_path);
        args.disk(&format!("layer{number}"), layer, &read_only)?;
    }
    match start {
        Start::Boot | Start::Probe => {}
        // It is saved while it is halted, and runs at once when it is restored.
        Start::ToBeSaved => args.add(&["-global", "migration.store-global-state=off"]),
        Start::Restore(saved) => args.pair("-incoming", format!("fd:{}", saved.as_raw_fd())),
    }
    if spec.console {
        args.add(&["-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"]);
    }
    Ok(args.0)
}

/// The options of a disk that shares these limits with the other disks.
fn throttled(limits: DiskLimits) -> String {
    let options = [("bps", limits.bytes_s()), ("iops", limits.iops.map(u64::from))];
    let options: String = options
        .into_iter()
        .filter_map(|(what, limit)| Some(format!(",throttling.{what}-total={}", limit?)))
        .collect();
    let group = if options.is_empty() { "" } else { ",throttling.group=disks" };
    options + group
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
        Accel::Tcg | Accel::None => {
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

    /// A disk, or the place for one.
    fn disk(
        &mut self,
        serial: &str,
        path: Option<&Path>,
        options: &str,
    ) -> Result<(), HypervisorError> {
        let file = match path {
            Some(path) => format!("file={}", quoted(path)?.replace(',', ",,")),
            None => "file.driver=null-co,file.size=0".to_owned(),
        };
        self.pair("-drive", format!("id={serial},{file},format=raw,if=none,{options}"));
        self.pair("-device", format!("virtio-blk-device,drive={serial},serial={serial}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_share_the_limits_that_there_are() {
        let of = |mib_s, iops| throttled(DiskLimits { mib_s, iops });
        assert_eq!(of(None, None), "");
        assert_eq!(of(Some(2), None), ",throttling.bps-total=2097152,throttling.group=disks");
        let both = ",throttling.bps-total=2097152,throttling.iops-total=7,throttling.group=disks";
        assert_eq!(of(Some(2), Some(7)), both);
    }
}
