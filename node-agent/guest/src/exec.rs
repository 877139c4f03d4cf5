//! Durable execs: a command, its input and output by 64-bit offsets, and its end.
//!
//! A process lives on without a client; a client that comes back (`ExecResume`) gets everything from
//! the offsets that it names, nothing lost or doubled. One task per direction owns a descriptor;
//! they, and the attachments of clients, share [`Exec`]'s state under a short lock and tell each
//! other about changes by a watch channel.

mod attach;
mod child;
mod end;
mod output;
mod plan;
mod pumps;
mod spawner;
mod spool;
mod start;
mod stdin;
mod table;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::process::Pid;
use tokio::sync::watch;
use towline_proto::v1::{ExecInfo, ExitStatus};

use crate::nonblocking::NonBlocking;
use crate::refusal::Refusal;

pub use attach::serve;
pub(crate) use spawner::Spawner;
pub use table::ExecTable;

use output::Output;
use stdin::Stdin;

/// An exec's id, as the client chose it.
pub type ExecKey = [u8; 16];

/// One command.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) key: ExecKey,
    pub(crate) info: ExecInfo,
    pub(crate) started: Instant,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

/// What changes during an exec's life: starting -> running -> exited -> ended (all output read).
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) life: Life,
    pub(crate) stdin: Stdin,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
    /// The attachment that may write input and whose ACKs count.
    owner: Option<u64>,
    attachments: u64,
    /// A client has got the exit and left.
    pub(crate) delivered: bool,
}

/// Where an exec is in its life.
#[derive(Debug)]
pub(crate) enum Life {
    Starting,
    Refused(Refusal),
    Running(Running),
    Ended(ExitStatus),
}

/// A process that runs, or has exited while its output is still being read.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: Pid,
    /// As the workload sees it.
    pub(crate) pid_inside: u32,
    pub(crate) terminal: Option<Arc<NonBlocking>>,
    pub(crate) exited: Option<ExitStatus>,
}

impl Exec {
    pub(crate) fn new(key: ExecKey, info: ExecInfo, stdout: Output, stderr: Output) -> Self {
        Self {
            key,
            info,
            started: Instant::now(),
            state: Mutex::new(State {
                life: Life::Starting,
                stdin: Stdin::default(),
                stdout,
                stderr,
                owner: None,
                attachments: 0,
                delivered: false,
            }),
            changed: watch::Sender::new(()),
        }
    }

    /// The state, for reading and for changes that nobody waits for.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes whoever waits for a change.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.send_replace(());
        result
    }

    /// Waits until `found` finds something in the state. Cancel-safe.
    pub(crate) async fn until<T>(&self, mut found: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            if let Some(result) = found(&mut self.lock()) {
                return result;
            }
            // The sender lives in `self`, so this only fails when nobody can be here.
            let _ = changes.changed().await;
        }
    }
}

impl State {
    /// Makes a new attachment; `own` takes input and ACKs over from the one before.
    pub(crate) fn attach(&mut self, own: bool) -> u64 {
        self.attachments += 1;
        if own {
            self.owner = Some(self.attachments);
        }
        self.attachments
    }

    /// Ends an attachment.
    pub(crate) fn detach(&mut self, attachment: u64) {
        if self.owner == Some(attachment) {
            self.owner = None;
        }
    }

    pub(crate) fn is_owned_by(&self, attachment: u64) -> bool {
        self.owner == Some(attachment)
    }

    pub(crate) fn is_owned(&self) -> bool {
        self.owner.is_some()
    }

    /// How the process ended, as soon as it has, though output may follow.
    pub(crate) fn has_exited(&self) -> bool {
        match &self.life {
            Life::Starting => false,
            Life::Running(running) => running.exited.is_some(),
            Life::Refused(_) | Life::Ended(_) => true,
        }
    }

    pub(crate) fn running(&self) -> Option<&Running> {
        match &self.life {
            Life::Running(running) => Some(running),
            Life::Starting | Life::Refused(_) | Life::Ended(_) => None,
        }
    }
}
