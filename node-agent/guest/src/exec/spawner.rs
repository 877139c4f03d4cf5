//! The thread that clones the workload's processes. It has entered the workload's pid namespace for
//! its children, and can therefore make no threads: nothing else may run on it.
//!
//! The agent's own threads stay in the outer namespace; children are still the agent's to wait for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::process::Pid;
use tokio::sync::{mpsc, oneshot};

use super::child::Child;

type Answer = io::Result<(Pid, OwnedFd)>;

/// Starts that the thread is ahead of; more wait their turn, and there are never more than execs.
const QUEUE_MAX: usize = 64;

/// Hands children to the thread. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Spawner {
    jobs: mpsc::Sender<(Child, oneshot::Sender<Answer>)>,
}

impl Spawner {
    /// Starts the thread; its children land in the pid namespace of `init`'s children, if given.
    pub(crate) fn start(init: Option<Arc<OwnedFd>>) -> io::Result<Self> {
        let (jobs, mut inbox) = mpsc::channel::<(Child, oneshot::Sender<Answer>)>(QUEUE_MAX);
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            let entered = init.map_or(Ok(()), |init| {
                let kinds = rustix::thread::ThreadNameSpaceType::PROCESS_ID;
                rustix::thread::move_into_thread_name_spaces(init.as_fd(), kinds)
            });
            let usable = entered.is_ok();
            let _ = ready.send(entered);
            while usable && let Some((child, answer)) = inbox.blocking_recv() {
                let _ = answer.send(child.spawn());
            }
        })?;
        is_ready.recv().map_err(|_| io::Error::other("the spawner thread died"))??;
        Ok(Self { jobs })
    }

    /// Clones the child.
    pub(crate) async fn spawn(&self, child: Child) -> Answer {
        let (answer, answered) = oneshot::channel();
        let died = || io::Error::other("the spawner thread died");
        self.jobs.send((child, answer)).await.map_err(|_| died())?;
        answered.await.map_err(|_| died())?
    }
}
