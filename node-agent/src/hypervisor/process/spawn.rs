//! Clones the first process of a sandbox and lets it run the guest agent, with exactly the
//! descriptors that it is to have and nothing else of the node agent's.
//!
//! Between clone3 and execveat the child is a copy of one thread and only makes system calls.
#![expect(unsafe_code, reason = "between clone and exec only raw system calls are allowed")]

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::pipe::{PipeFlags, pipe_with};

/// Above every descriptor that the child is given.
const HIGH: RawFd = 16;
/// Descriptors that a sandbox may have open: as in a VM.
const FILES_MAX: u64 = 1 << 20;

/// A new process that runs the program, or is about to fail at it.
pub(super) struct Spawned {
    pub(super) pid: i32,
    /// Says what made it fail before its program ran.
    failure: File,
}

/// What the child is given: descriptors 0 to 5.
pub(super) struct Stdio<'a> {
    pub(super) null: BorrowedFd<'a>,
    pub(super) log: BorrowedFd<'a>,
    pub(super) setup: BorrowedFd<'a>,
    pub(super) link: BorrowedFd<'a>,
    pub(super) gate: BorrowedFd<'a>,
}

/// Clones into new namespaces; `argv` says to people whose process it is.
pub(super) fn spawn(
    program: BorrowedFd<'_>,
    argv: [&CStr; 2],
    stdio: &Stdio<'_>,
    namespaces: i32,
) -> io::Result<Spawned> {
    let (failure, tells) = pipe_with(PipeFlags::CLOEXEC)?;
    let high = |fd: BorrowedFd<'_>| fcntl_dupfd_cloexec(fd, HIGH);
    let (tells, program) = (high(tells.as_fd())?, high(program)?);
    let given = [stdio.null, stdio.null, stdio.log, stdio.setup, stdio.link, stdio.gate];
    let given = given.map(high).into_iter().collect::<Result<Vec<OwnedFd>, _>>()?;
    let argv = [argv[0].as_ptr(), argv[1].as_ptr(), ptr::null()];
    let env: [*const libc::c_char; 1] = [ptr::null()];
    // `struct clone_args` up to tls: flags, pidfd, child_tid, parent_tid, exit_signal, ….
    let mut args = [0u64; 8];
    args[0] = u64::from(namespaces.cast_unsigned());
    args[4] = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: without CLONE_VM this is fork(2); the child only makes system calls on what was made
    // before. All pointers are valid, the arrays end with NULL.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, args.as_mut_ptr(), size_of_val(&args)) };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            if arrange(&given) {
                let (argv, env) = (argv.as_ptr(), env.as_ptr());
                let empty = c"".as_ptr();
                let flags = libc::AT_EMPTY_PATH;
                libc::syscall(libc::SYS_execveat, program.as_raw_fd(), empty, argv, env, flags);
            }
            let errno = *libc::__errno_location();
            libc::write(tells.as_raw_fd(), ptr::from_ref(&errno).cast(), size_of::<i32>());
            libc::_exit(127);
        }
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    Ok(Spawned { pid, failure: failure.into() })
}

impl Spawned {
    /// Waits until its program runs.
    pub(super) fn runs(&mut self) -> io::Result<()> {
        let mut errno = Vec::new();
        self.failure.read_to_end(&mut errno)?;
        match <[u8; 4]>::try_from(errno.as_slice()) {
            Ok(errno) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            Err(_) => Ok(()),
        }
    }
}

/// In the child: a session of its own, no core dumps (they would be written outside), the
/// descriptors that it is given, signals as they were.
///
/// # Safety
/// Only in the child.
unsafe fn arrange(given: &[OwnedFd]) -> bool {
    const CLOEXEC_RANGE: u32 = 4;
    // SAFETY: plain system calls on local values. All of `given` is above what it becomes.
    unsafe {
        libc::setsid();
        libc::umask(0o022);
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        // An ordinary user keeps the limit that it has.
        let files = libc::rlimit { rlim_cur: FILES_MAX, rlim_max: FILES_MAX };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files);
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut());
        for (target, fd) in (0..).zip(given) {
            if libc::dup2(fd.as_raw_fd(), target) < 0 {
                return false;
            }
        }
        let first = given.len();
        libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOEXEC_RANGE) == 0
    }
}

/// A file in memory with this content, which nobody can change.
pub(super) fn sealed(name: &CStr, content: &[u8], executable: bool) -> io::Result<File> {
    use std::io::Write;
    let mut file = memory_file(name, executable)?;
    file.write_all(content)?;
    let seals = rustix::fs::SealFlags::WRITE
        | rustix::fs::SealFlags::GROW
        | rustix::fs::SealFlags::SHRINK
        | rustix::fs::SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file)
}

/// A file in memory that takes so much and no more: whoever writes to it fills nobody's disk.
pub(super) fn bounded(name: &CStr, size: u64) -> io::Result<File> {
    let file = memory_file(name, false)?;
    file.set_len(size)?;
    let seals =
        rustix::fs::SealFlags::GROW | rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

fn memory_file(name: &CStr, executable: bool) -> io::Result<File> {
    const MFD_NOEXEC_SEAL: u32 = 8;
    const MFD_EXEC: u32 = 16;
    let kind = if executable { MFD_EXEC } else { MFD_NOEXEC_SEAL };
    let always = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    for flags in [always | kind, always] {
        // SAFETY: a valid C string.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: a new descriptor, which nobody else owns.
            return Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        // Before Linux 6.3 neither kind was known.
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(io::Error::last_os_error())
}
