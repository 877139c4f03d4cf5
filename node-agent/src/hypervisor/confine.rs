//! Keeps a VM's process to its own files by landlock, as far as the kernel can, before it starts.
//!
//! Everything is prepared by the parent; between fork and exec only system calls remain.
#![expect(unsafe_code, reason = "a child confines itself between fork and exec")]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit, setsid, umask};

use super::{HypervisorError, VmSpec};

/// The newest rules that are asked for; older kernels enforce what they know.
const NEWEST: ABI = ABI::V6;

/// The first that keeps it from truncating what it may only read.
pub const ABI_WANTED: u32 = 3;

/// Descriptors that it may have open: disks, sockets and what its threads wake each other by.
const FILES_MAX: u64 = 1024;

/// What it may write to a log where no disk is larger.
const LOGS_MAX: u64 = 64 << 20;

/// What a process may touch.
#[derive(Debug, Clone, Default)]
pub struct Allowed {
    /// Trees and files to read.
    pub read: Vec<PathBuf>,
    /// Trees to read and run programs and libraries from.
    pub execute: Vec<PathBuf>,
    /// Files and devices to read and write.
    pub write: Vec<PathBuf>,
    /// Directories in which it may make and remove files and sockets.
    pub own: Vec<PathBuf>,
}

/// Bounds of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Private writable memory.
    pub data_bytes: u64,
    /// Size of any file that it writes.
    pub file_bytes: u64,
}

impl Limits {
    /// Bounds for a VM's process that hold on any machine; a healthy one stays far below.
    pub fn of(spec: &VmSpec, overhead_mib: u64) -> Self {
        let disk = spec.upper.as_ref().and_then(|path| std::fs::metadata(path).ok());
        Self {
            data_bytes: (spec.memory_mib + overhead_mib) << 20,
            file_bytes: disk.map_or(0, |disk| disk.len()).max(LOGS_MAX),
        }
    }
}

/// Whether this kernel has landlock.
pub fn is_available() -> bool {
    abi().is_some()
}

/// The version of landlock's interface that this kernel has.
pub fn abi() -> Option<u32> {
    const VERSION: u32 = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: asked for its version, the system call reads nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    u32::try_from(abi).ok().filter(|&abi| abi > 0)
}

/// Says why a VMM could not be kept to its own files whole, given the kernel's version of it.
pub fn require(abi: Option<u32>) -> Result<(), HypervisorError> {
    let what = match abi {
        Some(abi) if abi >= ABI_WANTED => return Ok(()),
        Some(abi) => format!("this kernel has ABI {abi} of it, and {ABI_WANTED} is needed"),
        None => "this kernel has none".to_owned(),
    };
    Err(HypervisorError::NoLandlock(what))
}

/// Prepares the rules; what does not exist is left out, as it could not be touched anyway.
pub fn prepare(allowed: &Allowed) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let own = file | read | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (paths, access) in [
        (&allowed.read, read),
        (&allowed.execute, read | AccessFs::Execute),
        (&allowed.write, file),
        (&allowed.own, own),
    ] {
        for path in paths {
            rules = add(rules, path, access)?;
        }
    }
    Ok(rules)
}

/// Gives the command's process a session of its own, its limits, no core dumps (they would hold the
/// guest's memory), files and sockets that are its owner's only, and only the files that the rules
/// allow.
pub fn apply(command: &mut Command, rules: Option<RulesetCreated>, limits: Limits) {
    let mut rules = rules;
    let confine = move || {
        setsid()?;
        umask(Mode::RWXG | Mode::RWXO);
        close_the_rest()?;
        limit(Resource::Core, 0)?;
        limit(Resource::Nofile, FILES_MAX)?;
        limit(Resource::Data, limits.data_bytes)?;
        limit(Resource::Fsize, limits.file_bytes)?;
        if let Some(rules) = rules.take() {
            rules.restrict_self().map_err(|_| io::Error::from(io::ErrorKind::PermissionDenied))?;
        }
        Ok(())
    };
    // SAFETY: after fork the closure makes system calls on what was prepared before; what else it
    // may use is the heap, which glibc makes usable in a forked child.
    unsafe {
        command.pre_exec(confine);
    }
}

/// Lets the command's process have one descriptor besides the standard ones, under its number here.
/// After [`apply`], which takes all others away.
pub fn inherit(command: &mut Command, fd: OwnedFd) {
    // SAFETY: after fork the closure makes one system call on what it owns.
    unsafe {
        command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?));
    }
}

/// Lets the command's process have only the time that nobody else wants, and ends it with the thread
/// that starts it.
pub fn in_background(command: &mut Command) {
    /// Linux' `IOPRIO_CLASS_IDLE`, for this process.
    const IDLE_IO: libc::c_int = 3 << 13;
    end_with_starter(command);
    let background = || {
        rustix::process::nice(19)?;
        // SAFETY: plain numbers. Where it is not possible, the process is a little less polite.
        unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, IDLE_IO) };
        Ok(())
    };
    // SAFETY: after fork the closure makes system calls only.
    unsafe {
        command.pre_exec(background);
    }
}

/// Ends the command's process with the thread that starts it: nobody looks for it later.
pub fn end_with_starter(command: &mut Command) {
    let bind = || {
        let signal = rustix::process::Signal::KILL;
        Ok(rustix::process::set_parent_process_death_signal(Some(signal))?)
    };
    // SAFETY: after fork the closure makes one system call.
    unsafe {
        command.pre_exec(bind);
    }
}

/// Has every descriptor but the standard three end with exec: also those that whoever started the
/// node agent left open, by mistake, for all its children.
fn close_the_rest() -> io::Result<()> {
    const CLOEXEC: u32 = 4;
    // SAFETY: a plain system call; it closes nothing now.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?)
}

fn add(
    rules: RulesetCreated,
    path: &Path,
    access: landlock::BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(path) else { return Ok(rules) };
    // Rights of directories do not apply to files; the library would complain.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    rules.add_rule(PathBeneath::new(fd, access))
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
mod tests {
    use super::*;
    use std::fs;

    /// Runs a shell line under the rules; whether it succeeded.
    fn run(allowed: &Allowed, line: &str, limits: Limits) -> bool {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]).stderr(std::process::Stdio::null());
        apply(&mut command, Some(prepare(allowed).unwrap()), limits);
        command.status().unwrap().success()
    }

    #[test]
    fn what_is_required_is_refused_where_it_is_not() {
        for (abi, says) in [(None, "has none"), (Some(2), "ABI 2"), (Some(1), "ABI 1")] {
            let error = require(abi).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("landlock = \"auto\""), "{error}");
        }
        assert!(require(Some(3)).is_ok() && require(Some(7)).is_ok());
    }

    #[test]
    fn a_confined_process_reaches_its_own_files_and_no_others() {
        if !is_available() {
            eprintln!("SKIPPED: this kernel has no landlock");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("secret"), "s").unwrap();
        fs::write(other.join("layer"), "l").unwrap();
        let allowed = Allowed {
            read: vec![other.join("layer")],
            execute: ["/bin", "/usr", "/lib", "/lib64"].map(PathBuf::from).to_vec(),
            write: vec!["/dev/null".into()],
            own: vec![own.clone()],
        };
        let limits = Limits { data_bytes: 1 << 30, file_bytes: 1 << 20 };
        let (own, other) = (own.display(), other.display());
        assert!(run(
            &allowed,
            &format!("echo x > {own}/log && cat {other}/layer > /dev/null"),
            limits
        ));
        assert!(!run(&allowed, &format!("cat {other}/secret"), limits));
        assert!(!run(&allowed, &format!("echo x > {other}/layer"), limits));
        assert!(!run(&allowed, &format!("echo x > {other}/new"), limits));
        assert!(!run(&allowed, "cat /etc/passwd", limits));
        let write_much = format!("head -c 5000 /bin/sh > {own}/big");
        assert!(run(&allowed, &write_much, limits));
        assert!(!run(&allowed, &write_much, Limits { file_bytes: 1000, ..limits }));
    }

    #[test]
    fn what_is_bound_to_its_starter_ends_with_it() {
        let starter = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            end_with_starter(command.arg("1000"));
            command.spawn().unwrap()
        });
        let status = starter.join().unwrap().wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
    }
}
