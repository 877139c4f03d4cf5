//! The `qemu` driver: the microvm machine, by KVM where this very kernel was seen to run under it,
//! else emulated.
//!
//! Each VM is confined by landlock and QEMU's own seccomp filter, has no network card, and talks to
//! the node agent by one serial port only.

mod command;
mod migrate;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use futures_util::future::BoxFuture;
use towline_proto::v1::Isolation;

use super::confine::{self, Files};
use super::launch::{Launch, Life, limits};
use super::probe::{self, Subject};
use super::template::{Fits, Saves, Templates};
use super::vm::{ORDERS_SOCKET, remove_stale};
use super::{
    Accel, Capabilities, DiskLimits, Hypervisor, HypervisorError, LINK_SOCKET, Starter, Vm,
    VmShape, VmSpec, Vmm, tsc,
};
use crate::kernel::Kernel;

const PROGRAM: &str = "qemu-system-x86_64";
pub(crate) const INSTALL: &str = "install it (Debian: qemu-system-x86)";

/// What QEMU itself may map besides the guest's memory and translated code. Much of it is never
/// touched: under load it has 64 threads for disks with 8 MiB of stack each, and 1 MiB for each
/// request under way; it aborts when it gets no more (seen with 768).
const OVERHEAD_MIB: u64 = 2048;

/// How `accel` is set in the node agent's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// KVM where it works, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// What the driver needs to know.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// Where verdicts about KVM are remembered, and templates are kept.
    pub cache_dir: PathBuf,
    /// The guest kernel.
    pub kernel: Kernel,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// The configured choice.
    pub accel: AccelChoice,
    /// Who starts it.
    pub starter: Starter,
    /// What a VM's disks may move.
    pub disk_limits: DiskLimits,
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    kernel: Kernel,
    initramfs: PathBuf,
    tsc_khz: Option<u64>,
    capabilities: Capabilities,
    templates: Option<Templates>,
    starter: Starter,
    disk_limits: DiskLimits,
}

/// How the process of a VM begins.
#[derive(Debug)]
enum Start {
    /// With the kernel.
    Boot,
    /// With the kernel, to see whether it does.
    Probe,
    /// With the kernel, to be saved later: in the background.
    ToBeSaved,
    /// With what was saved.
    Restore(OwnedFd),
}

impl Qemu {
    /// Finds QEMU and decides on KVM: tried once, within a bound, per kernel, QEMU and boot.
    pub async fn new(config: QemuConfig) -> Result<Self, HypervisorError> {
        let program = find_program()?;
        let version = version(&program)?;
        let landlock = confine::is_available();
        let mut missing = config.starter.missing();
        if !landlock {
            missing.push("landlock: this kernel cannot keep QEMU to its own files".to_owned());
        }
        let mut qemu = Self {
            program,
            kernel: config.kernel,
            initramfs: config.initramfs,
            tsc_khz: tsc::khz(),
            capabilities: Capabilities {
                driver: "qemu",
                isolation: Isolation::Vm,
                version,
                accel: Accel::Tcg,
                accel_reason: String::new(),
                snapshot: false,
                hotplug: false,
                gpu: false,
                landlock,
                own_kernel: true,
                disk_limit: true,
                memory_limit: true,
                memory_limit_ends_commands: true,
                process_limit: true,
                missing,
            },
            templates: None,
            starter: config.starter,
            disk_limits: config.disk_limits,
        };
        let verdict = match config.accel {
            AccelChoice::Tcg => Err("accel = \"tcg\" is configured".into()),
            AccelChoice::Auto | AccelChoice::Kvm => qemu.try_kvm(&config.cache_dir).await,
        };
        match verdict {
            Ok(()) => qemu.capabilities.accel = Accel::Kvm,
            Err(reason) if config.accel == AccelChoice::Kvm => {
                return Err(HypervisorError::NoKvm(reason));
            }
            Err(reason) => qemu.capabilities.accel_reason = reason,
        }
        // A kernel that has the disks' driver built in has looked at them before it could be saved.
        qemu.capabilities.snapshot = qemu.kernel.has_module("virtio_blk");
        let accel = qemu.capabilities.accel;
        let fits = Fits {
            program: &qemu.program,
            version: &qemu.capabilities.version,
            kernel: &qemu.kernel,
            initramfs: &qemu.initramfs,
            machine: &["qemu", command::MACHINE, accel.as_str(), command::cpu(accel)],
        };
        let templates = Templates::new(&config.cache_dir, &fits);
        qemu.templates = qemu.capabilities.snapshot.then_some(templates);
        Ok(qemu)
    }

    async fn try_kvm(&self, cache_dir: &Path) -> Result<(), String> {
        let subject = Subject {
            cache_dir,
            driver: self.capabilities.driver,
            version: &self.capabilities.version,
            kernel: &self.kernel,
            initramfs: &self.initramfs,
            starter: &self.starter,
        };
        let boot = async |spec: &VmSpec| self.spawn(spec, Accel::Kvm, Start::Probe);
        probe::verdict(subject, boot).await
    }

    /// Starts the process of a VM.
    fn spawn(&self, spec: &VmSpec, accel: Accel, start: Start) -> Result<Vm, HypervisorError> {
        spec.check()?;
        let io = HypervisorError::io;
        let dir = fs::canonicalize(&spec.dir).map_err(io("find", &spec.dir))?;
        let spec = VmSpec { dir, ..spec.absolute()? };
        for name in [LINK_SOCKET, ORDERS_SOCKET] {
            remove_stale(&spec.dir.join(name))?;
        }
        let args = command::arguments(self, &spec, accel, &start)?;
        let mut limits = limits(&spec, u64::from(command::TRANSLATIONS_MIB) + OVERHEAD_MIB);
        limits.file_bytes = match start {
            Start::ToBeSaved => migrate::SIZE_MAX,
            // It may be saved, too, to make copies of it.
            Start::Boot | Start::Probe | Start::Restore(_) => {
                limits.file_bytes.max((spec.memory_mib + migrate::DEVICES_MIB) << 20)
            }
        };
        let (life, inherited) = match start {
            Start::Boot => (Life::Lasting, None),
            Start::Probe => (Life::Bound, None),
            Start::ToBeSaved => (Life::Background, None),
            Start::Restore(saved) => (Life::Lasting, Some(saved)),
        };
        self.starter.start(Launch {
            program: &self.program,
            vmm: Vmm::Qemu,
            args,
            dir: &spec.dir,
            cpus: spec.cpus,
            files: self.files(&spec, accel),
            limits,
            life,
            inherited,
        })
    }

    fn files(&self, spec: &VmSpec, accel: Accel) -> Files {
        let mut read = vec![self.kernel.vmlinux.clone(), self.initramfs.clone()];
        read.extend(self.kernel.modules_disk.iter().chain(&spec.layers).cloned());
        Files {
            program: self.program.clone(),
            read,
            write: spec.upper.iter().cloned().collect(),
            own: vec![spec.dir.clone()],
            devices: if accel == Accel::Kvm { vec!["/dev/kvm".into()] } else { Vec::new() },
        }
    }
}

impl Hypervisor for Qemu {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move { self.spawn(spec, self.capabilities.accel, Start::Boot) })
    }

    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
    ) -> BoxFuture<'a, Result<Option<Vm>, HypervisorError>> {
        Box::pin(async move {
            // A console is one more device.
            let templates = self.templates.as_ref().filter(|_| !spec.console);
            let Some((_, saved)) = templates.and_then(|all| all.open(spec.shape())) else {
                return Ok(None);
            };
            let start = Start::Restore(saved.into());
            self.spawn(spec, self.capabilities.accel, start).map(Some)
        })
    }

    fn make_template(&self, shape: VmShape) -> BoxFuture<'_, Result<(), HypervisorError>> {
        Box::pin(async move {
            let Some(templates) = &self.templates else { return Ok(()) };
            let failed = |problem| HypervisorError::Template { shape, problem };
            templates.make(self, shape).await.map_err(failed)
        })
    }

    fn drop_template(&self, shape: VmShape) {
        if let Some(templates) = &self.templates {
            templates.drop(shape);
        }
    }

    fn save<'a>(&'a self, vm: &'a Vm, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { save(vm, to).await.map(drop) })
    }

    fn fits(&self) -> Option<&str> {
        self.templates.as_ref().map(Templates::key)
    }

    fn start_copy<'a>(
        &'a self,
        spec: &'a VmSpec,
        saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move {
            let vm = Saves::restore(self, spec, saved).await?;
            if let Err(error) = migrate::go_on(&vm).await {
                let _ = vm.kill();
                vm.wait_exit().await;
                return Err(HypervisorError::io("restore the VM in", &spec.dir)(error));
            }
            Ok(vm)
        })
    }

    fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError> {
        self.starter.find(dir, &self.program, Vmm::Qemu)
    }

    fn strays(&self, folder: &Path) -> Vec<Vm> {
        self.starter.strays(folder, &self.program, Vmm::Qemu)
    }
}

impl Saves for Qemu {
    fn find(&self, dir: &Path) -> Option<Vm> {
        self.adopt(dir).ok().flatten()
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move { self.spawn(spec, self.capabilities.accel, Start::ToBeSaved) })
    }

    fn save<'a>(&'a self, vm: &'a Vm, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let file = save(vm, to).await?;
            tokio::task::spawn_blocking(move || file.sync_all()).await?
        })
    }

    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
        saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move {
            let saved = File::open(saved).map_err(HypervisorError::io("open", saved))?;
            self.spawn(spec, self.capabilities.accel, Start::Restore(saved.into()))
        })
    }
}

async fn save(vm: &Vm, to: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    migrate::migrate(vm, &file).await?;
    Ok(file)
}

/// The version of the one that would be used.
pub(crate) fn version_here() -> Result<String, HypervisorError> {
    version(&find_program()?)
}

fn find_program() -> Result<PathBuf, HypervisorError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/usr/local/bin".into()])
        .map(|dir| dir.join(PROGRAM))
        .find_map(|candidate| fs::canonicalize(candidate).ok())
        .ok_or_else(|| HypervisorError::Missing {
            program: PROGRAM.into(),
            problem: "it is not on the PATH".into(),
            hint: INSTALL,
        })
}

fn version(program: &Path) -> Result<String, HypervisorError> {
    let missing = |problem: String| HypervisorError::Missing {
        program: program.display().to_string(),
        problem,
        hint: INSTALL,
    };
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next().and_then(|line| line.strip_prefix("QEMU emulator version ")) {
        Some(version) => Ok(version.to_owned()),
        None => Err(missing(format!("it does not say its version ({})", output.status))),
    }
}
