//! What the node agent asks of a virtual machine monitor, and the handle of a running VM. The
//! `process` driver does the same without a VM: where code says VM it means the sandbox's machine.
//!
//! A VM is one process in a session of its own: it outlives the node agent, and a restarted node
//! agent adopts it by (boot id, pid, start time, executable) or by the directory that it runs in.

pub mod cloud_hypervisor;
pub(crate) mod launch;
mod probe;
pub mod process;
mod processes;
pub mod qemu;
mod qmp;
mod template;
pub mod tsc;
mod vm;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use towline_proto::v1::Isolation;

pub use launch::Starter;
pub use towline_node_helper::confine;
pub(crate) use vm::connect;
pub use vm::{Vm, VmExit, VmIdentity, Vmm};

/// Most layer disks that one VM can have: the tail of a longer image is squashed into one.
pub const LAYER_DISKS_MAX: usize = 16;
/// Least memory with which the guest kernel starts.
pub const MEMORY_MIN_MIB: u64 = 96;
/// File name of the guest link's socket in a VM's directory.
pub const LINK_SOCKET: &str = "link.sock";

/// A virtual machine monitor.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// What it can do on this machine, and what it does not guard.
    fn capabilities(&self) -> &Capabilities;

    /// Starts a VM. It has been started, and is not yet ready, when this returns; readiness is the
    /// guest's hello.
    fn boot<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>>;

    /// Starts a VM from the template of its shape: a guest that was saved when it had said hello and
    /// knew nothing yet of image, identity or disks. `None` where there is no template (yet). It may
    /// fail in any way that a start can; a start by `boot` is never worse.
    fn restore<'a>(
        &'a self,
        _spec: &'a VmSpec,
    ) -> BoxFuture<'a, Result<Option<Vm>, HypervisorError>> {
        Box::pin(async { Ok(None) })
    }

    /// Makes the template of a shape, if it is not there. Takes longer than a boot, at the lowest
    /// priority; leaves nothing behind when it fails or is given up.
    fn make_template(&self, _shape: VmShape) -> BoxFuture<'_, Result<(), HypervisorError>> {
        Box::pin(async { Ok(()) })
    }

    /// Forgets a template from which a guest did not come up.
    fn drop_template(&self, _shape: VmShape) {}

    /// Writes all of a halted VM but its disks to a new file or folder `to`, within a bound. It stays
    /// halted, and may go on afterwards.
    fn save<'a>(&'a self, _vm: &'a Vm, _to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async { Err(io::Error::other("this driver cannot save memory")) })
    }

    /// What a saved VM must find again to be restored: kernel, VMM, processor, this boot of the host.
    /// `None` where nothing can be saved.
    fn fits(&self) -> Option<&str> {
        None
    }

    /// Starts a VM from what `save` wrote, with disks that are as they were then. It runs when this
    /// returns, and believes that it is the one that was saved.
    fn start_copy<'a>(
        &'a self,
        _spec: &'a VmSpec,
        _saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async { Err(HypervisorError::Spec("this driver cannot restore memory".into())) })
    }

    /// The VM that runs in this directory, if one does, started by whichever node agent.
    fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError>;

    /// The VMs of this driver whose directory was beneath `folder` and has been removed.
    fn strays(&self, _folder: &Path) -> Vec<Vm> {
        Vec::new()
    }
}

/// What a template fits: nothing else of a VM is known when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmShape {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory of the guest.
    pub memory_mib: u64,
}

impl fmt::Display for VmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} CPUs, {} MiB", self.cpus, self.memory_mib)
    }
}

/// The drivers of this node: at most one for each isolation.
#[derive(Debug, Clone)]
pub struct Hypervisors(Vec<Arc<dyn Hypervisor>>);

impl Hypervisors {
    /// Takes the drivers, the usual one first.
    pub fn new(drivers: Vec<Arc<dyn Hypervisor>>) -> Self {
        Self(drivers)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Hypervisor>> {
        self.0.iter()
    }

    /// The driver for sandboxes that ask for this isolation; never another one.
    pub fn get(&self, isolation: Isolation) -> Option<&Arc<dyn Hypervisor>> {
        let wanted = match isolation {
            Isolation::Unspecified | Isolation::Vm => Isolation::Vm,
            Isolation::Process => Isolation::Process,
        };
        self.iter().find(|driver| driver.capabilities().isolation == wanted)
    }

    /// The VM that runs in this directory, whichever driver's it is.
    pub fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError> {
        for driver in self.iter() {
            if let Some(vm) = driver.adopt(dir)? {
                return Ok(Some(vm));
            }
        }
        Ok(None)
    }
}

/// What a VM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// Virtual CPUs, at least one.
    pub cpus: u32,
    /// Memory of the guest.
    pub memory_mib: u64,
    /// Processes of the workload, for drivers that bound them from outside.
    pub processes_max: u32,
    /// Read-only images, the lowest first: disks `layer0`, `layer1`…
    pub layers: Vec<PathBuf>,
    /// The writable disk: `upper`.
    pub upper: Option<PathBuf>,
    /// The VM's own directory, which exists: sockets and logs go there, and nothing else is writable
    /// to it but `upper`.
    pub dir: PathBuf,
    /// Writes the guest's console to `console.log` there. For debugging only: a guest can fill it.
    pub console: bool,
}

/// Bounds of what the disks of one VM move, all together and in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskLimits {
    /// MiB a second.
    pub mib_s: Option<u32>,
    /// Requests a second.
    pub iops: Option<u32>,
}

impl DiskLimits {
    fn bytes_s(self) -> Option<u64> {
        self.mib_s.map(|mib| u64::from(mib) << 20)
    }
}

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// Emulated: works everywhere, is slow, and is not a security boundary.
    Tcg,
    /// Not at all: the sandbox shares this machine's kernel.
    None,
}

impl Accel {
    /// As `Driver.accel` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::None => "none",
        }
    }
}

/// What a hypervisor can do on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// `qemu`, `cloud-hypervisor`, `process`.
    pub driver: &'static str,
    /// What keeps a sandbox from this machine.
    pub isolation: Isolation,
    /// The program's version.
    pub version: String,
    /// How guests are executed.
    pub accel: Accel,
    /// Why KVM is not used; empty when it is.
    pub accel_reason: String,
    /// Memory snapshots.
    pub snapshot: bool,
    /// Devices while it runs.
    pub hotplug: bool,
    /// GPUs by VFIO.
    pub gpu: bool,
    /// Whether landlock keeps the process to its own files.
    pub landlock: bool,
    /// A sandbox has a kernel of its own, and may do to it what it likes.
    pub own_kernel: bool,
    /// A sandbox's disk has an end of its own.
    pub disk_limit: bool,
    /// A sandbox's memory has an end of its own.
    pub memory_limit: bool,
    /// A command that runs out of memory ends as a whole, not only the process that asked last.
    pub memory_limit_ends_commands: bool,
    /// A sandbox's processes have a bound of their own.
    pub process_limit: bool,
    /// Limits that are missing on this machine, for `tow doctor`.
    pub missing: Vec<String>,
}

impl Capabilities {
    /// As `Observed.isolation` says it.
    pub fn isolation(&self) -> &'static str {
        match self.accel {
            Accel::Kvm => "vm (kvm)",
            Accel::Tcg => "vm (emulated: not a security boundary)",
            Accel::None => "process",
        }
    }
}

/// Says why a VM could not be started or taken over.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The program is not there, or does not say its version.
    #[error("could not run `{program}`: {problem}; {hint}")]
    Missing {
        /// What was looked for.
        program: String,
        /// What happened.
        problem: String,
        /// What to do.
        hint: &'static str,
    },
    /// The program is none that this node agent was made for.
    #[error("`{program}` cannot be used: {problem}")]
    Version {
        /// The program.
        program: String,
        /// Which it is, and which would be right.
        problem: String,
    },
    /// Sandboxes run under another VMM, and would be lost.
    #[error(
        "sandboxes of this node run under {running}, and only that can take them up: stop them \
         first (tow stop), or set vmm = \"{running}\""
    )]
    InUse {
        /// The VMM that they run under.
        running: &'static str,
    },
    /// A VMM refused an order.
    #[error("the VMM in `{dir}` refused {order}: {problem}")]
    Refused {
        /// The VM's directory.
        dir: PathBuf,
        /// What it was told.
        order: &'static str,
        /// What it said.
        problem: String,
    },
    /// An ordinary user asks for what only root may do.
    #[error(
        "the `process` driver needs root: run the node agent as root, or leave \
         `isolation_process` out of its configuration"
    )]
    NoPrivileges,
    /// The configuration wants landlock, and this kernel has none or too little.
    #[error(
        "landlock = \"required\" is configured, but {0}; run a kernel of 6.2 or newer with `landlock` \
         in its `lsm=`, or set landlock = \"auto\" to run VMs without"
    )]
    NoLandlock(String),
    /// The helper did not do it, or cannot be asked.
    #[error(transparent)]
    Helper(#[from] towline_node_helper::client::HelperError),
    /// KVM was asked for by name and does not work.
    #[error(
        "accel = \"kvm\" was asked for, but {0}; use accel = \"auto\" to fall back to emulation"
    )]
    NoKvm(String),
    /// The VM's shape or paths are not possible.
    #[error("this VM cannot be started: {0}")]
    Spec(String),
    /// The process could not be started.
    #[error("could not start `{program}` in `{dir}`")]
    Spawn {
        /// The program.
        program: String,
        /// The VM's directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A template could not be made.
    #[error("could not make the template of {shape}: {problem}")]
    Template {
        /// For which shape.
        shape: VmShape,
        /// Why not.
        problem: String,
    },
    /// Anything else about files and processes.
    #[error("could not {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl HypervisorError {
    fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

impl VmSpec {
    /// Its shape.
    pub fn shape(&self) -> VmShape {
        VmShape { cpus: self.cpus, memory_mib: self.memory_mib }
    }

    /// The same with no path that depends on where the VMM runs, or on links.
    fn absolute(&self) -> Result<Self, HypervisorError> {
        let resolve =
            |path: &PathBuf| std::fs::canonicalize(path).map_err(HypervisorError::io("find", path));
        Ok(Self {
            layers: self.layers.iter().map(resolve).collect::<Result<_, _>>()?,
            upper: self.upper.as_ref().map(resolve).transpose()?,
            ..self.clone()
        })
    }

    /// Refuses what no driver can start.
    pub fn check(&self) -> Result<(), HypervisorError> {
        let refuse = |problem: String| Err(HypervisorError::Spec(problem));
        if self.cpus == 0 {
            return refuse("it needs at least one CPU".into());
        }
        if self.memory_mib < MEMORY_MIN_MIB {
            return refuse(format!(
                "{} MiB of memory is not enough; the guest kernel needs {MEMORY_MIN_MIB} MiB",
                self.memory_mib
            ));
        }
        if self.layers.len() > LAYER_DISKS_MAX {
            return refuse(format!(
                "it has {} layer disks; at most {LAYER_DISKS_MAX} can be attached",
                self.layers.len()
            ));
        }
        for path in self.layers.iter().chain(&self.upper) {
            if !path.is_file() {
                return refuse(format!("its disk `{}` is not a file", path.display()));
            }
        }
        Ok(())
    }
}
