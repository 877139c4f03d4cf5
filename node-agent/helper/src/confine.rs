//! Keeps a VMM to its own files by landlock, as far as the kernel can, before it starts, and bounds
//! what it may use. Both who may start one do so: the helper, and a node agent without one.
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

/// The newest rules that are asked for; older kernels enforce what they know.
const NEWEST: ABI = ABI::V6;

/// The first that keeps it from truncating what it may only read.
pub const ABI_WANTED: u32 = 3;

/// Descriptors that it may have open: disks, sockets and what its threads wake each other by.
const FILES_MAX: u64 = 1024;

/// Libraries and modules that a VMM may need, wherever this machine has them.
const SYSTEM_EXECUTE: [&str; 6] =
    ["/usr/lib", "/lib", "/lib64", "/usr/lib64", "/usr/libexec", "/usr/local/lib"];
/// What else of the system it may read.
const SYSTEM_READ: [&str; 7] = [
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
    "/etc/ld.so.cache",
    "/dev/urandom",
    "/proc/self",
    "/sys/kernel/mm",
];
/// Devices that any VMM may use.
const DEVICES: [&str; 1] = ["/dev/null"];

/// What a process may touch, besides the system's programs and libraries.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Its program.
    pub program: PathBuf,
    /// Trees and files to read.
    pub read: Vec<PathBuf>,
    /// Files to read and write.
    pub write: Vec<PathBuf>,
    /// Directories in which it may make and remove files and sockets.
    pub own: Vec<PathBuf>,
    /// Devices to use, besides those of all.
    pub devices: Vec<PathBuf>,
}

/// Bounds of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Private writable memory.
    pub data_bytes: u64,
    /// Size of any file that it writes.
    pub file_bytes: u64,
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

/// Prepares the rules; what does not exist is left out, as it could not be touched anyway.
pub fn prepare(files: &Files) -> io::Result<RulesetCreated> {
    rules(files).map_err(|error| io::Error::other(format!("landlock: {error}")))
}

fn rules(files: &Files) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let own = file | read | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let execute = SYSTEM_EXECUTE.iter().map(Path::new).chain([files.program.as_path()]);
    let may_read = SYSTEM_READ.iter().map(Path::new).chain(paths(&files.read));
    let devices = DEVICES.iter().map(Path::new).chain(paths(&files.devices));
    let lists: [(Vec<&Path>, _); 4] = [
        (may_read.collect(), read),
        (execute.collect(), read | AccessFs::Execute),
        (devices.chain(paths(&files.write)).collect(), file),
        (paths(&files.own).collect(), own),
    ];
    for (list, access) in lists {
        for path in list {
            rules = add(rules, path, access)?;
        }
    }
    Ok(rules)
}

fn paths(list: &[PathBuf]) -> impl Iterator<Item = &Path> {
    list.iter().map(PathBuf::as_path)
}

/// Gives the command's process a session of its own, its limits, and only the files that the rules
/// allow.
pub fn apply(command: &mut Command, rules: Option<RulesetCreated>, limits: Limits) {
    let mut rules = rules;
    let confine = move || {
        setsid()?;
        confine_self(rules.take(), limits)
    };
    // SAFETY: after fork the closure makes system calls on what was prepared before; what else it
    // may use is the heap, which glibc makes usable in a forked child.
    unsafe {
        command.pre_exec(confine);
    }
}

/// Gives this process its limits, no core dumps (they would hold the guest's memory), files and
/// sockets that are its owner's only, no descriptor that lives through exec but the standard ones, and
/// only the files that the rules allow.
pub fn confine_self(rules: Option<RulesetCreated>, limits: Limits) -> io::Result<()> {
    umask(Mode::RWXG | Mode::RWXO);
    close_the_rest()?;
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, FILES_MAX)?;
    limit(Resource::Data, limits.data_bytes)?;
    limit(Resource::Fsize, limits.file_bytes)?;
    let Some(rules) = rules else { return Ok(()) };
    rules.restrict_self().map_err(|_| io::Error::from(io::ErrorKind::PermissionDenied))?;
    Ok(())
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
    end_with_starter(command);
    // SAFETY: after fork the closure makes system calls only.
    unsafe {
        command.pre_exec(background_self);
    }
}

/// Lets this process have only the time that nobody else wants.
pub fn background_self() -> io::Result<()> {
    /// Linux' `IOPRIO_CLASS_IDLE`, for this process.
    const IDLE_IO: libc::c_int = 3 << 13;
    rustix::process::nice(19)?;
    // SAFETY: plain numbers. Where it is not possible, the process is a little less polite.
    unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, IDLE_IO) };
    Ok(())
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
    fn run(files: &Files, line: &str, limits: Limits) -> bool {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]).stderr(std::process::Stdio::null());
        apply(&mut command, Some(prepare(files).unwrap()), limits);
        command.status().unwrap().success()
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
        let allowed = Files {
            // The shell, and what it runs here.
            program: "/usr/bin".into(),
            read: vec![other.join("layer")],
            own: vec![own.clone()],
            ..Files::default()
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
