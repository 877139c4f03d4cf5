//! `towline-node-agent doctor`: what this machine lacks to be a node, and what to do about it.
//! Changes nothing; with a configuration it boots one small guest to see which VMM it would use.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use towline_node_helper::client::Helper;

use crate::config::{Config, VmmChoice};
use crate::hypervisor::{cloud_hypervisor, confine, qemu};
use crate::{capacity, chain, prepare, vm_driver};

/// Programs that the node agent runs, the Debian package of each, and what is not there without it.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("mksquashfs", "squashfs-tools", "no image can be used"),
    ("mke2fs", "e2fsprogs", "no sandbox can have a disk"),
    ("depmod", "kmod", "guests have no /lib/modules"),
];
/// Without these nothing runs.
const NEEDED: &[&str] = &["mksquashfs", "mke2fs"];
const KVM: &str = "/dev/kvm";
/// Less room than this and images or disks will soon not fit.
const DISK_MIN_MIB: u64 = 5 << 10;
/// A node with many sandboxes holds a descriptor for each of their connections.
const FILES_WANTED: u64 = 65_536;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grade {
    /// As it should be.
    Ok,
    /// Works, but something should be known.
    Note,
    /// This machine cannot be a node without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Of what.
    pub name: &'static str,
    /// How it ended.
    pub grade: Grade,
    /// What is here.
    pub found: String,
    /// What to do; empty where nothing is to be done.
    pub todo: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, grade: Grade::Ok, found: found.into(), todo: String::new() }
    }

    fn note(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, grade: Grade::Note, found: found.into(), todo: todo.into() }
    }

    fn missing(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, grade: Grade::Missing, found: found.into(), todo: todo.into() }
    }

    /// For people: a line, and one with what to do.
    pub fn text(&self) -> String {
        let mark = match self.grade {
            Grade::Ok => "ok     ",
            Grade::Note => "note   ",
            Grade::Missing => "MISSING",
        };
        let todo =
            if self.todo.is_empty() { String::new() } else { format!("\n        {}", self.todo) };
        format!("{mark} {}: {}{todo}", self.name, self.found)
    }

    /// For programs: as `tow doctor --json` has it.
    pub fn object(&self) -> Value {
        let grade = match self.grade {
            Grade::Ok => "ok",
            Grade::Note => "note",
            Grade::Missing => "missing",
        };
        json!({
            "schema": "towline.check/1", "name": self.name, "grade": grade,
            "found": self.found, "todo": self.todo,
        })
    }
}

/// Looks at everything; what depends on it by `config`, or else as without one.
pub async fn check(config: Option<&Config>) -> Vec<Check> {
    let vmm = config.map(|config| config.vmm).unwrap_or_default();
    let helper_socket = config.and_then(|config| config.helper.as_deref());
    let mut checks = vec![processor(), kvm(helper_socket.is_some())];
    checks.extend(vmms(vmm, config.and_then(|config| config.cloud_hypervisor.clone())));
    checks.push(landlock(config.is_some_and(|config| config.landlock_required)));
    checks.push(userfaultfd(helper_socket.is_some()));
    checks.push(helper(helper_socket));
    checks.extend(PROGRAMS.iter().map(|(name, package, without)| program(name, package, without)));
    checks.push(descriptors());
    match config {
        Some(config) => {
            checks.push(guest_agent(&config.guest_agent));
            checks.push(room("data_dir", &config.data_dir));
            checks.push(room("cache_dir", &config.cache_dir));
            checks.push(reflinks(&config.data_dir));
            checks.push(offers(config));
            checks.push(driver(config).await);
        }
        None => checks.push(Check::note(
            "configuration",
            "none given: folders, capacity and which VMM would be used were not looked at",
            "towline-node-agent --config FILE doctor",
        )),
    }
    checks
}

fn processor() -> Check {
    const NAME: &str = "processor";
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|one| one == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Check::ok(NAME, "Intel VT-x"),
        (_, true) => Check::ok(NAME, "AMD SVM"),
        _ => Check::note(
            NAME,
            "no hardware virtualisation: guests are emulated, several times slower, and emulation is \
             no security boundary",
            "a machine of bare metal, or a virtual one whose provider switches nesting on",
        ),
    }
}

fn kvm(by_helper: bool) -> Check {
    const NAME: &str = "kvm";
    if by_helper && Path::new(KVM).exists() {
        return Check::ok(NAME, format!("{KVM} is there, for VMMs by the helper"));
    }
    match File::options().read(true).write(true).open(KVM) {
        Ok(_) => Check::ok(NAME, format!("{KVM} opens")),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Check::note(
            NAME,
            format!("{KVM} is there but not for this user"),
            "put the node agent's user into the group kvm: usermod -aG kvm USER",
        ),
        Err(error) => Check::note(NAME, format!("{KVM}: {error}"), "modprobe kvm-intel or kvm-amd"),
    }
}

/// Of both VMMs: what is wanted must be there, and one of them in any case.
fn vmms(wanted: VmmChoice, program: Option<PathBuf>) -> Vec<Check> {
    let program = program.or_else(cloud_hypervisor::find_program);
    let cloud = match program {
        None => Err("not found".to_owned()),
        Some(program) => cloud_hypervisor::version_of(&program).map_err(|error| chain(&error)),
    };
    let qemu = qemu::version_here().map_err(|error| chain(&error));
    let none = cloud.is_err() && qemu.is_err();
    let check = |name, found: &Result<String, String>, needed: bool, todo: &str| match found {
        Ok(version) => Check::ok(name, version),
        Err(problem) if needed => Check::missing(name, problem, todo),
        Err(problem) => Check::note(name, problem, todo),
    };
    let needs_cloud = wanted == VmmChoice::CloudHypervisor;
    let needs_qemu = wanted == VmmChoice::Qemu || (none && !needs_cloud);
    vec![
        check("cloud-hypervisor", &cloud, needs_cloud, cloud_hypervisor::INSTALL),
        check("qemu", &qemu, needs_qemu, qemu::INSTALL),
    ]
}

fn landlock(required: bool) -> Check {
    const NAME: &str = "landlock";
    const TODO: &str = "a kernel of 6.2 or newer with `landlock` in its `lsm=`";
    let found = match confine::abi() {
        Some(abi) if abi >= confine::ABI_WANTED => return Check::ok(NAME, format!("ABI {abi}")),
        Some(abi) => format!("ABI {abi}: a VMM is kept to its own files, but for truncating"),
        None => "a VMM cannot be kept to its own files by this kernel".to_owned(),
    };
    match required {
        true => Check::missing(NAME, found, TODO),
        false => Check::note(NAME, found, TODO),
    }
}

fn userfaultfd(by_helper: bool) -> Check {
    const NAME: &str = "userfaultfd";
    let is_there = || Path::new(cloud_hypervisor::USERFAULTFD).exists();
    if cloud_hypervisor::has_userfaultfd() || (by_helper && is_there()) {
        return Check::ok(NAME, "saved memory comes as it is used");
    }
    Check::note(
        NAME,
        "not for this user: a warm start or a copy under Cloud Hypervisor reads all of its memory",
        "setfacl -m u:USER:rw /dev/userfaultfd",
    )
}

/// Whether VMMs have users of their own.
fn helper(socket: Option<&Path>) -> Check {
    const NAME: &str = "helper";
    const TODO: &str = "run towline-node-helper as root, and set `helper` to its socket";
    let Some(socket) = socket else {
        let found = "none: all VMMs run as the node agent's user, without cgroups";
        return Check::note(NAME, found, TODO);
    };
    match Helper::new(socket).list() {
        Ok(running) => {
            let found = format!("`{}` answers, {} VMMs run", socket.display(), running.len());
            Check::ok(NAME, found)
        }
        Err(error) => Check::missing(NAME, chain(&error), TODO),
    }
}

fn program(name: &'static str, package: &str, without: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = std::env::split_paths(&path).chain(system).map(|dir| dir.join(name));
    let todo = format!("apt-get install {package}");
    match places.find(|path| path.is_file()) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None if NEEDED.contains(&name) => {
            Check::missing(name, format!("not found: {without}"), todo)
        }
        None => Check::note(name, format!("not found: {without}"), todo),
    }
}

fn descriptors() -> Check {
    const NAME: &str = "open files";
    match rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum {
        Some(most) if most < FILES_WANTED => Check::note(
            NAME,
            format!("at most {most}: sandboxes may have half as many connections together"),
            format!("LimitNOFILE={FILES_WANTED} in the service, or ulimit -n"),
        ),
        most => {
            Check::ok(NAME, most.map_or("no limit".to_owned(), |most| format!("at most {most}")))
        }
    }
}

fn guest_agent(path: &Path) -> Check {
    const NAME: &str = "guest agent";
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Check::ok(NAME, path.display().to_string()),
        Ok(_) => {
            Check::missing(NAME, format!("`{}` is no file", path.display()), "set `guest_agent`")
        }
        Err(error) => {
            let found = format!("`{}`: {error}", path.display());
            Check::missing(NAME, found, "install it beside this program, or set `guest_agent`")
        }
    }
}

/// The folder, or the nearest above it that is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn room(name: &'static str, path: &Path) -> Check {
    let at = existing(path);
    let shown = path.display();
    if let Err(error) = tempfile::tempfile_in(at) {
        let found = format!("`{shown}` cannot be written to: {error}");
        return Check::missing(name, found, format!("give `{shown}` to the node agent's user"));
    }
    match rustix::fs::statvfs(at) {
        Err(error) => Check::missing(name, format!("`{shown}`: {error}"), ""),
        Ok(stat) => {
            let free_mib = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
            let found = format!("`{shown}` has {} GiB free", free_mib >> 10);
            match free_mib < DISK_MIN_MIB {
                true => Check::note(name, found, "images and disks will soon not fit"),
                false => Check::ok(name, found),
            }
        }
    }
}

fn reflinks(data: &Path) -> Check {
    const NAME: &str = "reflinks";
    let cloned = || -> std::io::Result<()> {
        let mut from = tempfile::tempfile_in(existing(data))?;
        std::io::Write::write_all(&mut from, &[7; 4096])?;
        let to = tempfile::tempfile_in(existing(data))?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from)?)
    };
    match cloned() {
        Ok(()) => Check::ok(NAME, "disks are copied at no cost"),
        Err(_) => Check::note(
            NAME,
            "the file system of `data_dir` has none: a fork copies what its disk has in use",
            "XFS or Btrfs for `data_dir`, if sandboxes are forked often",
        ),
    }
}

fn offers(config: &Config) -> Check {
    const NAME: &str = "offers";
    let asked = Config { data_dir: existing(&config.data_dir).to_owned(), ..config.clone() };
    match capacity::capacity(&asked) {
        Ok(offered) => Check::ok(
            NAME,
            format!(
                "{} CPUs (promised), {} MiB of memory, {} MiB of disk",
                offered.cpus, offered.memory_mib, offered.disk_mib
            ),
        ),
        Err(error) => {
            Check::missing(NAME, error.to_string(), "set `cpus`, `memory_mib`, `disk_mib`")
        }
    }
}

/// What sandboxes would run under: seen, not guessed.
async fn driver(config: &Config) -> Check {
    const NAME: &str = "driver";
    let wanted = config.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare(&wanted)).await;
    let prepared = prepared.map_err(anyhow::Error::from).and_then(|prepared| prepared);
    let qemu = match prepared {
        Ok(qemu) => qemu,
        Err(error) => {
            return Check::missing(NAME, format!("{error:#}"), "towline-node-agent prepare");
        }
    };
    match vm_driver(config, None, qemu).await {
        Err(error) => Check::missing(NAME, chain(&error), "see the checks above"),
        Ok(driver) => {
            let has = driver.capabilities();
            let mut found = format!("{} {} with {}", has.driver, has.version, has.accel.as_str());
            if !has.accel_reason.is_empty() {
                found = format!("{found} ({})", has.accel_reason);
            }
            match has.missing.is_empty() {
                true => Check::ok(NAME, found),
                false => Check::note(NAME, found, format!("not here: {}", has.missing.join("; "))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_is_asked_for_must_be_there() {
        let none = || Some(PathBuf::from("/nonexistent/cloud-hypervisor"));
        let graded = |checks: Vec<Check>, name| {
            checks.into_iter().find(|check| check.name == name).unwrap().grade
        };
        let asked = vmms(VmmChoice::CloudHypervisor, none());
        assert_eq!(graded(asked, "cloud-hypervisor"), Grade::Missing);
        let other = vmms(VmmChoice::CloudHypervisor, Some("/bin/true".into()));
        assert!(other[0].found.contains("does not say that it is"), "{other:?}");
        assert_eq!(graded(vmms(VmmChoice::Qemu, none()), "cloud-hypervisor"), Grade::Note);
    }

    #[test]
    fn a_folder_that_cannot_be_written_to_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let check = room("data_dir", &dir.path().join("not/yet/there"));
        assert_ne!(check.grade, Grade::Missing, "{check:?}");
        let check = room("data_dir", Path::new("/proc/self/data"));
        assert_eq!(check.grade, Grade::Missing, "{check:?}");
        assert!(
            check.text().starts_with("MISSING data_dir: `/proc/self/data` cannot be"),
            "{check:?}"
        );
        assert_eq!(check.object()["grade"], "missing");
    }

    #[test]
    fn what_is_no_file_is_no_guest_agent() {
        for path in ["/", "/nonexistent"] {
            assert_eq!(guest_agent(Path::new(path)).grade, Grade::Missing);
        }
        assert_eq!(guest_agent(Path::new("/bin/true")).grade, Grade::Ok);
    }
}
