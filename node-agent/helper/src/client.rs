//! The node agent's side: asks, and waits for the answer within a bound.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};

use crate::packet;
use crate::protocol::{Answer, Name, Request, Running, Spawn};

/// Longest wait for an answer: a start makes a root and waits for its program.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Says why the helper did not do it.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// It cannot be talked to.
    #[error(
        "the node's helper at `{socket}` is out of reach; is towline-node-helper running, with this \
         user as its `agent_uid`?"
    )]
    Unreachable {
        /// Where it should listen.
        socket: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("the node's helper, which keeps a log, refused: {0}")]
    Refused(String),
}

/// A helper. Requests are asked one after the other.
#[derive(Debug)]
pub struct Helper {
    socket: PathBuf,
    connection: Mutex<Option<OwnedFd>>,
}

impl Helper {
    /// The one that listens there. Nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), connection: Mutex::default() }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts a VMM; `fds` are what [`Request::Spawn`] says.
    pub fn spawn(&self, spawn: Spawn, fds: &[BorrowedFd<'_>]) -> Result<Running, HelperError> {
        match self.ask(&Request::Spawn(spawn), fds)? {
            Answer::Started(running) => Ok(running),
            other => Err(odd(&other)),
        }
    }

    /// Ends a VMM: by `SIGTERM`, or at once with all of its cgroup.
    pub fn end(&self, name: Name, kill: bool) -> Result<(), HelperError> {
        self.done(&Request::End { name, kill })
    }

    /// The VMMs that run.
    pub fn list(&self) -> Result<Vec<Running>, HelperError> {
        match self.ask(&Request::List {}, &[])? {
            Answer::Vmms { running } => Ok(running),
            other => Err(odd(&other)),
        }
    }

    /// Moves the deadline at which all VMMs are killed.
    pub fn lease(&self, until_ns: Option<u64>) -> Result<(), HelperError> {
        self.done(&Request::Lease { until_ns })
    }

    fn done(&self, request: &Request) -> Result<(), HelperError> {
        match self.ask(request, &[])? {
            Answer::Done => Ok(()),
            other => Err(odd(&other)),
        }
    }

    fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Answer, HelperError> {
        let unreachable = |source| HelperError::Unreachable { socket: self.socket.clone(), source };
        let request = serde_json::to_vec(request).map_err(io::Error::other).map_err(unreachable)?;
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.exchange(&mut connection, &request, fds);
        if answer.is_err() {
            // What may still come on it answers nothing else.
            *connection = None;
        }
        answer.map_err(unreachable)
    }

    fn exchange(
        &self,
        connection: &mut Option<OwnedFd>,
        request: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<Answer> {
        if let Some(known) = connection {
            match packet::send(&*known, request, fds) {
                Ok(()) => return receive(known),
                // Another helper listens by now; this one has read nothing.
                Err(error) if is_gone(&error) => *connection = None,
                Err(error) => return Err(error),
            }
        }
        let new = connection.insert(self.connect()?);
        packet::send(&*new, request, fds)?;
        receive(new)
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let connection = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        sockopt::set_socket_timeout(&connection, sockopt::Timeout::Recv, Some(ANSWER_MAX))?;
        sockopt::set_socket_timeout(&connection, sockopt::Timeout::Send, Some(ANSWER_MAX))?;
        connect(&connection, &SocketAddrUnix::new(&self.socket)?)?;
        Ok(connection)
    }
}

fn receive(connection: &OwnedFd) -> io::Result<Answer> {
    let Some((answer, _)) = packet::receive(connection)? else {
        return Err(io::ErrorKind::ConnectionReset.into());
    };
    serde_json::from_slice(&answer).map_err(io::Error::other)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn odd(answer: &Answer) -> HelperError {
    match answer {
        Answer::Refused { problem } => HelperError::Refused(problem.clone()),
        other => HelperError::Refused(format!("it answers {other:?}")),
    }
}
