//! `--forward ssh-agent`: commands in the sandbox ask the laptop's own ssh agent, for as long as this
//! `tow` lives and no longer. Keys never leave the laptop.
//!
//! The guest is hostile: it can make connections to the agent's socket and to nothing else, a bounded
//! number at once. What is said on them is between it and the agent, as with `ssh -A`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use towline_proto::frame::FrameKind;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{self, ForwardOpen, SshAgentListener, StreamErrorCode, forward_open};
use towline_streams::{FrameReader, FrameWriter, Memory};

use crate::daemon::client::OpenError;
use crate::env_vars;
use crate::error::Failure;
use crate::ids;
use crate::output::human;
use crate::tunnel::guest::{Guest, Opener, open_failed};
use crate::tunnel::tcp::{self, Dialer, Ended, NoStream, Stream, Target};

/// The variable by which programs find the agent, here and in the sandbox.
const VARIABLE: &str = "SSH_AUTH_SOCK";
/// Connections at once: more than any program makes.
const CONNECTIONS_MAX: usize = 32;
/// Bytes of all connections in memory.
const HELD_MAX: usize = 4 << 20;
/// Bound on one attempt to open the listener, and on the agent's own answer.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// First and longest pause before a broken listener is taken up again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// `sun_path` has 108 bytes with the final NUL.
const PATH_MAX: usize = 107;

/// What can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The ssh agent that SSH_AUTH_SOCK names
    SshAgent,
}

/// Flags that forward something of the laptop's.
#[derive(Debug, Clone, Default, Args)]
pub struct ForwardArgs {
    /// Let the command use something of this machine's while it runs
    #[arg(long, value_name = "WHAT", value_enum)]
    pub forward: Vec<What>,
}

/// A forwarded agent; dropping it ends that.
#[derive(Debug)]
pub struct Forwarding {
    _tasks: JoinSet<()>,
}

impl ForwardArgs {
    /// Refuses what cannot work before anything is started.
    pub async fn check(&self) -> anyhow::Result<()> {
        if self.forward.contains(&What::SshAgent) {
            agent().await?;
        }
        Ok(())
    }

    /// Makes the listeners and tells the command where they are.
    pub async fn start(
        &self,
        guest: &Guest<'_>,
        start: &mut v1::ExecStart,
    ) -> anyhow::Result<Option<Forwarding>> {
        if !self.forward.contains(&What::SshAgent) {
            return Ok(None);
        }
        let (forwarding, path) = begin(guest.opener()).await?;
        start.env.push([VARIABLE.as_bytes(), b"=", &path].concat());
        Ok(Some(forwarding))
    }
}

/// Connects to the laptop's own agent.
async fn agent() -> anyhow::Result<UnixStream> {
    let Some(path) = env_vars::get(VARIABLE).map(PathBuf::from) else {
        return Err(Failure::new("there is no ssh agent to forward: SSH_AUTH_SOCK is not set")
            .hint("eval \"$(ssh-agent)\" starts one, `ssh-add` gives it your keys")
            .into());
    };
    let connected = timeout(OPEN_MAX, UnixStream::connect(&path)).await;
    let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
    connected.map_err(late).and_then(|connected| connected).map_err(|error| {
        Failure::new(format!("no ssh agent answers at `{}` (SSH_AUTH_SOCK)", path.display()))
            .hint("eval \"$(ssh-agent)\" starts one, `ssh-add` gives it your keys")
            .because(error)
            .into()
    })
}

async fn begin(opener: Opener) -> anyhow::Result<(Forwarding, Vec<u8>)> {
    let listener = forward_open::Listener::SshAgent(SshAgentListener {});
    let open = ForwardOpen { forward_id: ids::random::<16>()?.to_vec(), listener: Some(listener) };
    let (link, path) = listen(&opener, &open).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(opener, open, link));
    Ok((Forwarding { _tasks: tasks }, path))
}

/// A stream that announces connections; nothing is said on it but its end.
struct Link {
    reader: FrameReader<OwnedReadHalf>,
    _writer: FrameWriter<OwnedWriteHalf>,
}

/// Makes the listener in the sandbox, or takes it up; returns where it is.
async fn listen(opener: &Opener, open: &ForwardOpen) -> anyhow::Result<(Link, Vec<u8>)> {
    let opening = async {
        let stream = opener.open(Kind::Forward(open.clone())).await.map_err(open_failed)?;
        let (mut reader, writer) = (stream.reader, stream.writer);
        let first = reader.next().await?;
        anyhow::Ok((first, Link { reader, _writer: writer }))
    };
    let late = || Failure::new("the sandbox did not make the socket for the ssh agent in time");
    let (first, link) = timeout(OPEN_MAX, opening).await.map_err(|_| late())??;
    match first {
        Some(frame) if frame.is(FrameKind::ForwardListening) => {
            let path = frame.decode::<v1::ForwardListening>()?.path;
            let sane = path.starts_with(b"/")
                && path.len() <= PATH_MAX
                && !path.iter().any(u8::is_ascii_control);
            if !sane {
                return Err(Failure::new("the sandbox named a socket that cannot be one").into());
            }
            Ok((link, path))
        }
        Some(frame) if frame.is(FrameKind::Error) => {
            let error: v1::StreamError = frame.decode()?;
            Err(Failure::new(human::printable(&error.message)).into())
        }
        _ => Err(Failure::new("the sandbox made no socket for the ssh agent").into()),
    }
}

/// Takes connections until it is dropped; a broken stream is taken up again.
async fn serve(opener: Opener, open: ForwardOpen, mut link: Link) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let memory = Memory::new(HELD_MAX);
    let mut connections = JoinSet::new();
    let mut pause = PAUSES.0;
    loop {
        while let Ok(Some(frame)) = link.reader.next().await {
            while connections.try_join_next().is_some() {}
            let accepted = frame.is(FrameKind::ForwardAccepted);
            let accepted = accepted.then(|| frame.decode::<v1::ForwardAccepted>().ok()).flatten();
            // Too many: whoever connected waits for its end.
            if let (Some(accepted), Ok(slot)) = (accepted, Arc::clone(&slots).try_acquire_owned()) {
                let (opener, memory) = (opener.clone(), Arc::clone(&memory));
                connections.spawn(async move {
                    carry(&opener, accepted.connection_id, &memory).await;
                    drop(slot);
                });
            }
        }
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
            match listen(&opener, &open).await {
                Ok((again, _)) => {
                    (link, pause) = (again, PAUSES.0);
                    break;
                }
                Err(error) => tracing::debug!(%error, "forwarded agent not taken up again"),
            }
        }
    }
}

async fn carry(opener: &Opener, connection: Vec<u8>, memory: &Arc<Memory>) {
    let (Ok(agent), Ok(id)) = (agent().await, ids::random()) else { return };
    let target = Target::Announced(connection);
    match Box::pin(tcp::forward(opener, id, &target, agent, memory)).await {
        Ended::Closed => {}
        Ended::Refused(error) => tracing::debug!(reason = error.message, "agent not connected"),
        Ended::Lost(reason) => tracing::debug!(reason, "agent's connection lost"),
    }
}

impl Dialer for Opener {
    type Reader = OwnedReadHalf;
    type Writer = OwnedWriteHalf;

    async fn dial(
        &self,
        open: v1::TcpOpen,
        _anew: bool,
    ) -> Result<Stream<OwnedReadHalf, OwnedWriteHalf>, NoStream> {
        match self.open(Kind::Tcp(open)).await {
            Ok(opened) => Ok(Stream { reader: opened.reader, writer: opened.writer, held: None }),
            Err(error) => Err(NoStream {
                retry: error.may_retry(),
                code: match &error {
                    OpenError::Refused(failure) => failure.code,
                    OpenError::Daemon(_) => StreamErrorCode::Internal,
                },
                message: error.to_string(),
            }),
        }
    }
}

/// Says that nothing is forwarded to a command that outlives this `tow`.
pub fn refuse_detached(args: &ForwardArgs, detach: bool) -> anyhow::Result<()> {
    if detach && !args.forward.is_empty() {
        return Err(Failure::usage("`--forward` lasts as long as this `tow`: not with `-d`").into());
    }
    Ok(())
}
