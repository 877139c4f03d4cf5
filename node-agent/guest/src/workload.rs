//! Where the workload's processes live: namespaces of their own under a small init that outlives
//! each exec, and a cgroup whose limits end fork bombs and memory hogs while the agent lives.
//!
//! This guards the agent against accidents, not attacks: root in the sandbox is root of its kernel.
//! Host tests use [`Workload::host`]: plain processes, no namespaces, no limits.

mod cgroup;
mod init;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tokio::sync::Mutex;
use towline_proto::v1::StreamErrorCode;

pub use cgroup::{Cgroups, Limits};
pub(crate) use cgroup::{ExecCgroup, Halt};
pub use init::{INIT_NAME, run_init};

use crate::exec::{ExecKey, Spawner};
use crate::refusal::Refusal;
use init::Init;

/// Where processes are started.
#[derive(Debug)]
pub struct Workload {
    spool: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Host { spawner: Arc<Spawner> },
    Sandbox(Box<Sandbox>),
}

#[derive(Debug)]
struct Sandbox {
    root: PathBuf,
    /// The workload's instance of devpts.
    terminals: OwnedFd,
    cgroups: Cgroups,
    /// Started again if it ends: `reboot` in a pid namespace ends its init.
    init: Mutex<Option<(Init, Entry)>>,
}

/// How to get into the workload.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) spawner: Arc<Spawner>,
    pub(crate) init: Option<Arc<OwnedFd>>,
}

impl Workload {
    /// Plain processes of this machine, for tests.
    pub fn host(spool: &Path) -> io::Result<Self> {
        let spawner = Arc::new(Spawner::start(None)?);
        Ok(Self { spool: spool.to_owned(), kind: Kind::Host { spawner } })
    }

    /// Processes in the sandbox whose root was mounted at `root`.
    pub async fn sandbox(root: &Path, spool: &Path, cgroups: Cgroups) -> Result<Self, Refusal> {
        let refuse = |error: rustix::io::Errno| {
            Refusal::io("cannot open the sandbox's terminals", &error.into())
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let terminals =
            rustix::fs::open(root.join("dev/pts"), flags, Mode::empty()).map_err(refuse)?;
        let sandbox = Sandbox { root: root.to_owned(), terminals, cgroups, init: Mutex::default() };
        let workload = Self { spool: spool.to_owned(), kind: Kind::Sandbox(Box::new(sandbox)) };
        workload.enter().await?;
        Ok(workload)
    }

    /// The folder of spools, outside the workload's view.
    pub(crate) fn spool(&self) -> &Path {
        &self.spool
    }

    /// Whether commands change to their user.
    pub(crate) fn becomes_users(&self) -> bool {
        matches!(self.kind, Kind::Sandbox(_))
    }

    /// The way in; makes the workload's init if there is none.
    pub(crate) async fn enter(&self) -> Result<Entry, Refusal> {
        let sandbox = match &self.kind {
            Kind::Host { spawner } => {
                return Ok(Entry { spawner: Arc::clone(spawner), init: None });
            }
            Kind::Sandbox(sandbox) => sandbox,
        };
        let mut init = sandbox.init.lock().await;
        if let Some((alive, entry)) = &*init
            && alive.is_alive()
        {
            return Ok(entry.clone());
        }
        let refuse = |error: io::Error| {
            Refusal::new(
                StreamErrorCode::NotRunning,
                format!("cannot make the workload's namespaces: {error}"),
            )
        };
        let new = Init::start(&sandbox.root, sandbox.cgroups.of_init()).await.map_err(refuse)?;
        let pidfd = new.pidfd();
        let spawner = Arc::new(Spawner::start(Some(Arc::clone(&pidfd))).map_err(refuse)?);
        let entry = Entry { spawner, init: Some(pidfd) };
        *init = Some((new, entry.clone()));
        Ok(entry)
    }

    /// A cgroup for one exec.
    pub(crate) fn exec_cgroup(&self, key: &ExecKey) -> Result<Option<ExecCgroup>, Refusal> {
        match &self.kind {
            Kind::Host { .. } => Ok(None),
            Kind::Sandbox(sandbox) => sandbox
                .cgroups
                .make(key)
                .map(Some)
                .map_err(|error| Refusal::io("cannot make the command's cgroup", &error)),
        }
    }

    /// A new terminal: its master and its slave, which exists inside the workload too.
    pub(crate) fn open_terminal(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = match &self.kind {
            Kind::Host { .. } => rustix::fs::open("/dev/ptmx", flags, Mode::empty())?,
            Kind::Sandbox(sandbox) => {
                rustix::fs::openat(&sandbox.terminals, "ptmx", flags, Mode::empty())?
            }
        };
        rustix::pty::unlockpt(&master)?;
        let open = rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, open)?;
        Ok((master, slave))
    }

    /// Halts every process of the workload.
    pub(crate) async fn freeze(&self, halt: Halt) -> io::Result<()> {
        match &self.kind {
            Kind::Host { .. } => Err(io::Error::other("there are no limits here")),
            Kind::Sandbox(sandbox) => sandbox.cgroups.freeze(halt).await,
        }
    }

    /// Lets them go on, unless they are halted for something else too.
    pub(crate) fn thaw(&self, halt: Halt) -> io::Result<()> {
        match &self.kind {
            Kind::Host { .. } => Ok(()),
            Kind::Sandbox(sandbox) => sandbox.cgroups.thaw(halt),
        }
    }

    /// Gives the machine, and the workload's view of it, another name.
    pub(crate) async fn set_hostname(&self, name: &str) -> io::Result<()> {
        rustix::system::sethostname(name.as_bytes())?;
        let Kind::Sandbox(sandbox) = &self.kind else { return Ok(()) };
        let init = sandbox.init.lock().await.as_ref().map(|(init, _)| init.pidfd());
        let Some(init) = init else { return Ok(()) };
        let name = name.to_owned();
        // Of its own: a thread that has entered stays there.
        let renamed = std::thread::spawn(move || {
            let kinds = rustix::thread::ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
            rustix::thread::move_into_thread_name_spaces(init.as_fd(), kinds)?;
            rustix::system::sethostname(name.as_bytes())
        });
        renamed.join().map_err(|_| io::Error::other("the renaming thread died"))??;
        Ok(())
    }

    /// Ends every process of the workload: TERM, then KILL after the grace.
    pub async fn end(&self, grace: std::time::Duration) {
        if let Kind::Sandbox(sandbox) = &self.kind {
            sandbox.cgroups.end_all(grace).await;
            if let Some((init, _)) = sandbox.init.lock().await.take() {
                init.kill().await;
            }
        }
    }
}

/// Sends a signal to a process group; one that is gone needs none.
#[expect(unsafe_code, reason = "rustix has no type for real-time signals")]
pub(crate) fn signal_group(group: Pid, number: i32) {
    // SAFETY: kill has no memory effects; a group's number is over 0, so never "all processes".
    unsafe { libc::kill(-group.as_raw_nonzero().get(), number) };
}
