//! The `cloud-hypervisor` driver: one process per VM, told what to do over its API socket.
//!
//! Each is confined by landlock before it runs and by Cloud Hypervisor's own seccomp filters after,
//! has no network card, and its guest talks to the node agent by a vsock only, which ends in a Unix
//! socket of the VM's directory. A VMM that refuses any order of a start is killed: it may hold a VM
//! that is not what was asked for.

mod api;
mod config;
mod snapshot;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::timeout;
use towline_proto::v1::Isolation;

use super::confine::{self, Files};
use super::launch::{Launch, Life, limits};
use super::probe::{self, Subject};
use super::template::{Fits, Saves, Templates};
use super::vm::remove_stale;
use super::{
    Accel, Capabilities, DiskLimits, Hypervisor, HypervisorError, LINK_SOCKET, Starter, Vm, VmExit,
    VmShape, VmSpec, Vmm,
};
use crate::kernel::Kernel;
use api::{API_SOCKET, Api};
pub(crate) use snapshot::has_userfaultfd;

/// Names the program when the configuration does not, and it is not on the PATH.
pub const PROGRAM_VARIABLE: &str = "TOWLINE_CLOUD_HYPERVISOR";
const PROGRAM: &str = "cloud-hypervisor";
/// The first version whose behaviour is known and wanted.
const VERSION_MIN: u32 = 53;
/// The last one that was tried.
const VERSION_TRIED: u32 = 53;
pub(crate) const INSTALL: &str = "install Cloud Hypervisor (the static binary of a release), or \
                                  name it in `cloud_hypervisor`";
/// What it may map besides the guest's memory: each disk and CPU has a thread with 8 MiB of stack.
const OVERHEAD_MIB: u64 = 1024;
/// How long after its socket the end of its process may be seen.
const EXIT_SEEN_MAX: Duration = Duration::from_millis(300);
/// Making a VM opens its disks.
const CREATE_MAX: Duration = Duration::from_secs(30);
/// Plugging a disk in, or letting a restored guest run.
const PLUG_MAX: Duration = Duration::from_secs(20);
/// Restoring one reads all of its memory, where it cannot come as it is used.
const RESTORE_MAX: Duration = Duration::from_secs(60);
/// What `vm.info` calls a VM that is halted.
const PAUSED: &str = "Paused";
pub(crate) const USERFAULTFD: &str = "/dev/userfaultfd";
/// Booting it loads kernel and initramfs, and asks KVM for all that it has.
const BOOT_MAX: Duration = Duration::from_secs(60);

/// What the driver needs to know.
#[derive(Debug, Clone)]
pub struct CloudHypervisorConfig {
    /// Where the verdict about KVM is remembered.
    pub cache_dir: PathBuf,
    /// The program.
    pub program: PathBuf,
    /// The guest kernel.
    pub kernel: Kernel,
    /// Its initramfs.
    pub initramfs: PathBuf,
    /// Who starts it.
    pub starter: Starter,
    /// What a VM's disks may move.
    pub disk_limits: DiskLimits,
}

/// The driver.
#[derive(Debug)]
pub struct CloudHypervisor {
    program: PathBuf,
    kernel: Kernel,
    initramfs: PathBuf,
    capabilities: Capabilities,
    templates: Option<Templates>,
    starter: Starter,
    disk_limits: DiskLimits,
}

/// How a VM begins.
#[derive(Debug, Clone, Copy)]
enum Start<'a> {
    /// With the kernel.
    Boot,
    /// With the kernel, to see whether it does.
    Probe,
    /// With the kernel, to be saved later: in the background.
    ToBeSaved,
    /// With what was saved in this folder.
    Restore(&'a Path),
    /// With a running guest that was saved in this folder.
    Copy(&'a Path),
}

/// Halts the VM in this directory, unless it is halted.
pub(super) async fn pause(dir: &Path) -> io::Result<()> {
    let api = Api(dir);
    if api.info().await.map_err(io::Error::other)?.state == PAUSED {
        return Ok(());
    }
    api.order::<()>("vm.pause", None, snapshot::PAUSE_MAX).await.map_err(io::Error::other)
}

/// Lets the VM in this directory go on; returns whether it was halted.
pub(super) async fn resume(dir: &Path) -> io::Result<bool> {
    let api = Api(dir);
    let was_halted = api.info().await.map_err(io::Error::other)?.state == PAUSED;
    if was_halted {
        api.order::<()>("vm.resume", None, PLUG_MAX).await.map_err(io::Error::other)?;
    }
    Ok(was_halted)
}

/// The program that the environment names, or that is on the PATH.
pub fn find_program() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os(PROGRAM_VARIABLE).filter(|path| !path.is_empty()) {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|path| path.is_file())
}

impl CloudHypervisor {
    /// Looks at the program, and tries KVM: once, within a bound, per kernel, VMM and boot.
    pub async fn new(config: CloudHypervisorConfig) -> Result<Self, HypervisorError> {
        let driver = Self::find(&config)?;
        let subject = Subject {
            cache_dir: &config.cache_dir,
            driver: driver.capabilities.driver,
            version: &driver.capabilities.version,
            kernel: &driver.kernel,
            initramfs: &driver.initramfs,
            starter: &driver.starter,
        };
        let boot = async |spec: &VmSpec| driver.start(spec, Start::Probe).await;
        probe::verdict(subject, boot).await.map_err(HypervisorError::NoKvm)?;
        Ok(driver)
    }

    /// Looks at the program only: whether KVM runs guests here is not known.
    pub fn find(config: &CloudHypervisorConfig) -> Result<Self, HypervisorError> {
        let program = fs::canonicalize(&config.program).map_err(|error| {
            let program = config.program.display().to_string();
            HypervisorError::Missing { program, problem: error.to_string(), hint: INSTALL }
        })?;
        let (version, major) = version(&program)?;
        let landlock = confine::is_available();
        let mut missing = config.starter.missing();
        if !landlock {
            missing.push("landlock: this kernel cannot keep the VMM to its own files".to_owned());
        }
        if major > VERSION_TRIED {
            missing.push(format!(
                "version: {version} is newer than what was tried (v{VERSION_TRIED})"
            ));
        }
        let capabilities = Capabilities {
            driver: "cloud-hypervisor",
            isolation: Isolation::Vm,
            version,
            accel: Accel::Kvm,
            accel_reason: String::new(),
            // A kernel that has the disks' driver built in could not be saved before them.
            snapshot: config.kernel.has_module("virtio_blk"),
            hotplug: true,
            gpu: false,
            landlock,
            own_kernel: true,
            disk_limit: true,
            memory_limit: true,
            memory_limit_ends_commands: true,
            process_limit: true,
            missing,
        };
        let CloudHypervisorConfig { cache_dir, kernel, initramfs, starter, disk_limits, .. } =
            config.clone();
        let mut driver = Self {
            program,
            kernel,
            initramfs,
            capabilities,
            templates: None,
            starter,
            disk_limits,
        };
        // A saved guest's limits are those with which it was saved.
        let limits = format!("{disk_limits:?}");
        if driver.capabilities.snapshot {
            let fits = Fits {
                program: &driver.program,
                version: &driver.capabilities.version,
                kernel: &driver.kernel,
                initramfs: &driver.initramfs,
                machine: &["cloud-hypervisor", config::MACHINE, &limits],
            };
            driver.templates = Some(Templates::new(&cache_dir, &fits));
        }
        Ok(driver)
    }

    /// Starts the process of a VM, which has no VM yet.
    fn spawn(&self, spec: &VmSpec, start: Start<'_>) -> Result<Vm, HypervisorError> {
        for name in [LINK_SOCKET, API_SOCKET] {
            remove_stale(&spec.dir.join(name))?;
        }
        let args = ["--api-socket", &format!("path={API_SOCKET}"), "--seccomp", "true"];
        let mut limits = limits(spec, OVERHEAD_MIB);
        // Any may be saved.
        limits.file_bytes = limits.file_bytes.max(spec.memory_mib << 20);
        self.starter.start(Launch {
            program: &self.program,
            vmm: Vmm::CloudHypervisor,
            args: args.map(str::to_owned).to_vec(),
            dir: &spec.dir,
            cpus: spec.cpus,
            files: self.files(spec, start),
            limits,
            life: match start {
                Start::Boot | Start::Restore(_) | Start::Copy(_) => Life::Lasting,
                Start::Probe => Life::Bound,
                Start::ToBeSaved => Life::Background,
            },
            inherited: None,
        })
    }

    fn files(&self, spec: &VmSpec, start: Start<'_>) -> Files {
        let mut files = Files {
            program: self.program.clone(),
            read: vec![self.kernel.vmlinux.clone(), self.initramfs.clone()],
            write: spec.upper.iter().cloned().collect(),
            own: vec![spec.dir.clone()],
            devices: vec!["/dev/kvm".into()],
        };
        files.read.extend(self.kernel.modules_disk.iter().chain(&spec.layers).cloned());
        match start {
            Start::Boot | Start::Probe => {}
            // The folder beside its own, where the snapshot goes.
            Start::ToBeSaved => files.own.extend(spec.dir.parent().map(PathBuf::from)),
            Start::Restore(saved) | Start::Copy(saved) => {
                files.read.push(saved.to_owned());
                files.devices.push(USERFAULTFD.into());
            }
        }
        files
    }

    async fn start(&self, spec: &VmSpec, start: Start<'_>) -> Result<Vm, HypervisorError> {
        spec.check()?;
        let dir = fs::canonicalize(&spec.dir).map_err(HypervisorError::io("find", &spec.dir))?;
        let spec = VmSpec { dir, ..spec.absolute()? };
        let vm = self.spawn(&spec, start)?;
        let ended = |exit: VmExit| {
            let ended = io::Error::other(exit.to_string());
            HypervisorError::io("start the VM in", &spec.dir)(ended)
        };
        let told = tokio::select! {
            biased;
            told = self.orders(&spec, start) => told,
            exit = vm.wait_exit() => Err(ended(exit)),
        };
        let Err(error) = told else { return Ok(vm) };
        // One that dies cuts its socket a moment before its end is seen, and its log says why.
        if let Ok(exit) = timeout(EXIT_SEEN_MAX, vm.wait_exit()).await {
            return Err(ended(exit));
        }
        let _ = vm.kill();
        vm.wait_exit().await;
        Err(error)
    }

    /// What a VMM that was just started is told.
    async fn orders(&self, spec: &VmSpec, start: Start<'_>) -> Result<(), HypervisorError> {
        let api = Api(&spec.dir);
        let said = api.ping().await?;
        tracing::debug!(version = said.version, build = said.build_version, "vmm answers");
        match start {
            Start::Boot | Start::Probe | Start::ToBeSaved => {
                let config = config::of(self, spec)?;
                api.order("vm.create", Some(&config), CREATE_MAX).await?;
                return api.order::<()>("vm.boot", None, BOOT_MAX).await;
            }
            Start::Restore(saved) => {
                let source = snapshot::Source::new(saved, &self.starter)?;
                api.order("vm.restore", Some(&source), RESTORE_MAX).await?;
                // All are there when the guest runs again: it is told of them at once.
                for disk in config::disks(self, spec)? {
                    api.order("vm.add-disk", Some(&disk), PLUG_MAX).await?;
                }
            }
            Start::Copy(saved) => {
                let disks = config::disks(self, spec)?;
                let own = snapshot::of_copy(saved, &spec.dir, &disks)
                    .map_err(HypervisorError::io("read what was saved in", saved))?;
                let source = snapshot::Source::new(own.path(), &self.starter)?;
                api.order("vm.restore", Some(&source), RESTORE_MAX).await?;
            }
        }
        api.order::<()>("vm.resume", None, PLUG_MAX).await
    }
}

impl Hypervisor for CloudHypervisor {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(self.start(spec, Start::Boot))
    }

    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
    ) -> BoxFuture<'a, Result<Option<Vm>, HypervisorError>> {
        Box::pin(async move {
            // A console is another device.
            let templates = self.templates.as_ref().filter(|_| !spec.console);
            let Some((path, _kept)) = templates.and_then(|all| all.open(spec.shape())) else {
                return Ok(None);
            };
            self.start(spec, Start::Restore(&path)).await.map(Some)
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
        Box::pin(async move {
            // Only there may it write.
            let own = tempfile::Builder::new().prefix(".new-").tempdir_in(vm.dir())?;
            let saved = own.path().join("saved");
            snapshot::write(vm, &saved).await?;
            fs::rename(saved, to)
        })
    }

    fn fits(&self) -> Option<&str> {
        self.templates.as_ref().map(Templates::key)
    }

    fn start_copy<'a>(
        &'a self,
        spec: &'a VmSpec,
        saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(Self::start(self, spec, Start::Copy(saved)))
    }

    fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError> {
        self.starter.find(dir, &self.program, Vmm::CloudHypervisor)
    }

    fn strays(&self, folder: &Path) -> Vec<Vm> {
        self.starter.strays(folder, &self.program, Vmm::CloudHypervisor)
    }
}

impl Saves for CloudHypervisor {
    fn find(&self, dir: &Path) -> Option<Vm> {
        self.adopt(dir).ok().flatten()
    }

    fn start<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(Self::start(self, spec, Start::ToBeSaved))
    }

    fn save<'a>(&'a self, vm: &'a Vm, to: &'a Path) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(snapshot::save(vm, to))
    }

    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
        saved: &'a Path,
    ) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(Self::start(self, spec, Start::Restore(saved)))
    }
}

/// What the program says of its version; an error if it is not one that would be used.
pub(crate) fn version_of(program: &Path) -> Result<String, HypervisorError> {
    version(program).map(|(version, _)| version)
}

/// What the program says of its version, and the first number of it.
fn version(program: &Path) -> Result<(String, u32), HypervisorError> {
    let name = program.display().to_string();
    let output =
        Command::new(program).arg("--version").stdin(Stdio::null()).output().map_err(|error| {
            HypervisorError::Missing {
                program: name.clone(),
                problem: error.to_string(),
                hint: INSTALL,
            }
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let wrong = |problem| HypervisorError::Version { program: name.clone(), problem };
    let (version, major) = parse_version(&text).ok_or_else(|| {
        wrong(format!("it does not say that it is a Cloud Hypervisor ({})", output.status))
    })?;
    if major < VERSION_MIN {
        return Err(wrong(format!("it is {version}; v{VERSION_MIN} or newer is needed")));
    }
    Ok((version, major))
}

fn parse_version(text: &str) -> Option<(String, u32)> {
    let version = text.lines().next()?.strip_prefix("cloud-hypervisor v")?.trim();
    let major = version.split(['.', '-']).next()?.parse().ok()?;
    Some((format!("v{version}"), major))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_what_it_says() {
        let parse = |text: &str| parse_version(text).map(|(_, major)| major);
        assert_eq!(parse("cloud-hypervisor v53.0.0\n"), Some(53));
        assert_eq!(parse("cloud-hypervisor v53.0-246-gae44c2971\n"), Some(53));
        assert_eq!(parse("QEMU emulator version 7.2.0"), None);
        assert_eq!(parse(""), None);
        let error = version(Path::new("/bin/true")).unwrap_err().to_string();
        assert!(error.contains("does not say that it is a Cloud Hypervisor"), "{error}");
    }
}
