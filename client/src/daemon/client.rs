//! How `tow` reaches its daemon: the socket if somebody answers, else a new daemon, and a daemon of
//! another version is asked to leave first.
//!
//! A daemon says that it is ready on its standard output, so nothing here guesses at times; what is
//! waited for has a bound and is named when it does not come.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout_at};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::SandboxId;
use towline_proto::v1::daemon_answer::Answer;
use towline_proto::v1::daemon_request::Request;
use towline_proto::v1::{
    DaemonAnswer, DaemonRequest, DaemonShutdown, DaemonStatus, DaemonStatusRequest, ListPorts,
    OpenSandboxStream, PublishPorts, PublishedPort, UnpublishPorts,
};
use towline_streams::{FrameReader, FrameWriter};

use super::place::Place;
use super::{DaemonFailure, VERSION};
use crate::config;

/// Bound on finding or starting a daemon.
const START_MAX: Duration = Duration::from_secs(15);
/// Bound on the answer to a request; opening a stream may take a new link and ticket.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Between two looks at a daemon that another `tow` is starting.
const LOOK: Duration = Duration::from_millis(20);
/// Daemons that are asked to leave, or leave under us, before we give up.
const REPLACEMENTS_MAX: u32 = 5;

/// What a starting daemon says once its socket answers.
pub(super) const READY: &[u8] = b"ready\n";
/// What a starting daemon says when another one is there.
pub(super) const TAKEN: &[u8] = b"taken\n";

/// A stream to a sandbox.
#[derive(Debug)]
pub struct OpenedStream {
    /// The sandbox, where one was asked for.
    pub sandbox_id: Option<SandboxId>,
    /// From the other end.
    pub reader: FrameReader<OwnedReadHalf>,
    /// To the other end.
    pub writer: FrameWriter<OwnedWriteHalf>,
}

/// A connection to the daemon for as long as something is wanted of it; dropping it ends that.
#[derive(Debug)]
pub struct Lease {
    reader: FrameReader<OwnedReadHalf>,
    _writer: FrameWriter<OwnedWriteHalf>,
}

impl Lease {
    /// Waits until the daemon is gone.
    pub async fn lost(&mut self) {
        while let Ok(Some(_)) = self.reader.next().await {}
    }
}

/// Says why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The daemon, the control plane or the node said no.
    #[error(transparent)]
    Refused(#[from] DaemonFailure),
    /// No daemon could be reached or started, or it went away.
    #[error("the daemon could not be used")]
    Daemon(#[source] anyhow::Error),
}

impl OpenError {
    /// Whether trying again may help: a daemon that died is started anew.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Refused(failure) => failure.retry,
            Self::Daemon(_) => true,
        }
    }
}

/// Reaches one daemon, for one context.
#[derive(Debug, Clone)]
pub struct DaemonClient {
    place: Place,
    context: String,
    config: PathBuf,
    /// What is started: `tow daemon`.
    program: Vec<std::ffi::OsString>,
}

impl DaemonClient {
    /// For a context by its name; the daemon reads the same configuration file.
    pub fn new(place: Place, context: &str) -> anyhow::Result<Self> {
        let tow = std::env::current_exe().context("finding the path of `tow`")?;
        let program = vec![tow.into(), "daemon".into()];
        Ok(Self { place, context: context.into(), config: config::path()?, program })
    }

    /// Means the contexts of another configuration file.
    pub fn with_config(mut self, config: PathBuf) -> Self {
        self.config = config;
        self
    }

    /// Starts another program than `tow daemon`.
    pub fn with_program(mut self, program: Vec<std::ffi::OsString>) -> Self {
        self.program = program;
        self
    }

    /// Opens a stream; afterwards its frames are those of the stream's kind. The daemon sends OPEN.
    pub async fn open(&self, open: OpenSandboxStream) -> Result<OpenedStream, OpenError> {
        let asked = self.ask(Request::Open(open), true).await.map_err(OpenError::Daemon)?;
        let Some((answer, reader, writer)) = asked else {
            return Err(OpenError::Daemon(anyhow!("no daemon was started")));
        };
        match answer {
            Answer::Opened(opened) => {
                let sandbox_id = SandboxId::try_from(opened.sandbox_id.as_slice()).ok();
                Ok(OpenedStream { sandbox_id, reader, writer })
            }
            Answer::Error(error) => Err(OpenError::Refused(error.into())),
            Answer::Status(_) | Answer::Leaving(_) | Answer::Ports(_) => {
                Err(OpenError::Daemon(anyhow!("the daemon answered something else")))
            }
        }
    }

    /// Publishes ports of a sandbox; leased ones until the lease ends.
    pub async fn publish(
        &self,
        request: PublishPorts,
    ) -> Result<(Vec<PublishedPort>, Lease), OpenError> {
        self.ports(Request::Publish(request)).await
    }

    /// Unpublishes ports of a sandbox; returns what is left.
    pub async fn unpublish(
        &self,
        request: UnpublishPorts,
    ) -> Result<Vec<PublishedPort>, OpenError> {
        Ok(self.ports(Request::Unpublish(request)).await?.0)
    }

    /// What is published of a sandbox, or of all.
    pub async fn list_ports(&self, request: ListPorts) -> Result<Vec<PublishedPort>, OpenError> {
        Ok(self.ports(Request::ListPorts(request)).await?.0)
    }

    async fn ports(&self, request: Request) -> Result<(Vec<PublishedPort>, Lease), OpenError> {
        let asked = self.ask(request, true).await.map_err(OpenError::Daemon)?;
        match asked {
            Some((Answer::Ports(answer), reader, writer)) => {
                Ok((answer.ports, Lease { reader, _writer: writer }))
            }
            Some((Answer::Error(error), ..)) => Err(OpenError::Refused(error.into())),
            _ => Err(OpenError::Daemon(anyhow!("the daemon answered something else"))),
        }
    }

    /// What the daemon does now; `None` when there is none. Starts none.
    pub async fn status(&self) -> anyhow::Result<Option<DaemonStatus>> {
        match self.ask(Request::Status(DaemonStatusRequest {}), false).await? {
            Some((Answer::Status(status), ..)) => Ok(Some(status)),
            Some(_) => bail!("the daemon answered something else"),
            None => Ok(None),
        }
    }

    /// Asks the daemon to leave; true if there was one. Streams end with it.
    pub async fn shutdown(&self) -> anyhow::Result<bool> {
        let asked = self.ask(Request::Shutdown(DaemonShutdown {}), false).await?;
        let Some((_, mut reader, _writer)) = asked else { return Ok(false) };
        // The connection ends when the daemon does.
        let gone = tokio::time::timeout(START_MAX, reader.next()).await;
        gone.context("waiting for the daemon to leave")?.ok();
        Ok(true)
    }

    async fn ask(&self, request: Request, start: bool) -> anyhow::Result<Option<Asked>> {
        let request = DaemonRequest {
            version: VERSION.into(),
            context: self.context.clone(),
            config: self.config.clone().into_os_string().into_encoded_bytes(),
            request: Some(request),
        };
        let versionless =
            matches!(request.request, Some(Request::Status(_) | Request::Shutdown(_)));
        let frame = Frame::message(FrameKind::DaemonRequest, &request);
        let deadline = Instant::now() + START_MAX;
        for _ in 0..REPLACEMENTS_MAX {
            let stream = match connect(&self.place.socket()).await? {
                Some(stream) => stream,
                None if start => self.start(deadline).await?,
                None => return Ok(None),
            };
            // A daemon that left while we asked ends the connection: look for the next one.
            let answer = tokio::time::timeout(ANSWER_MAX, exchange(stream, &frame))
                .await
                .context("waiting for the daemon's answer")?;
            match answer? {
                Some((Answer::Leaving(_), ..)) if !versionless => {}
                Some(asked) => return Ok(Some(asked)),
                None => {}
            }
        }
        bail!("the daemon left {REPLACEMENTS_MAX} times without an answer; see {}", self.log())
    }

    /// Starts a daemon and connects to it, or to the one that somebody else started meanwhile.
    async fn start(&self, deadline: Instant) -> anyhow::Result<UnixStream> {
        loop {
            let said = timeout_at(deadline, self.spawn()).await.with_context(|| {
                format!("waiting for the daemon to start; see {}", self.log())
            })??;
            if let Some(stream) = connect(&self.place.socket()).await? {
                return Ok(stream);
            }
            if said != TAKEN && said != READY {
                bail!("the daemon did not start; see {}\n{}", self.log(), self.last_words());
            }
            // Another daemon holds the lock: it is starting, or leaving.
            if Instant::now() >= deadline {
                bail!("another daemon holds {} and does not answer", self.place.lock().display());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Starts the program and returns what it says.
    async fn spawn(&self) -> anyhow::Result<Vec<u8>> {
        let log = open_log(&self.place.log()).with_context(|| format!("opening {}", self.log()))?;
        let (program, args) = self.program.split_first().context("no program to start")?;
        super::descriptors::keep_to_ourselves();
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .current_dir("/")
            .spawn()
            .with_context(|| format!("starting {}", Path::new(program).display()))?;
        let stdout = child.stdout.take().context("the daemon has no output")?;
        let mut stdout = tokio::process::ChildStdout::from_std(stdout)?;
        let mut said = vec![0; READY.len()];
        let mut len = 0;
        while len < said.len() {
            match stdout.read(&mut said[len..]).await? {
                0 => break,
                n => len += n,
            }
        }
        said.truncate(len);
        if said != READY {
            // It ends by itself; whoever started it must not leave a zombie.
            tokio::task::spawn_blocking(move || child.wait()).await??;
        }
        Ok(said)
    }

    fn log(&self) -> String {
        self.place.log().display().to_string()
    }

    fn last_words(&self) -> String {
        let mut text = String::new();
        let read = fs::File::open(self.place.log())
            .and_then(|log| io::BufReader::new(log).take(1 << 20).read_to_string(&mut text));
        match read {
            Ok(_) => text
                .lines()
                .rev()
                .take(3)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .fold(String::new(), |all, line| all + line + "\n"),
            Err(_) => String::new(),
        }
    }
}

type Asked = (Answer, FrameReader<OwnedReadHalf>, FrameWriter<OwnedWriteHalf>);

/// Sends a request and reads the answer; `None` when the daemon left instead.
async fn exchange(stream: UnixStream, request: &Frame) -> anyhow::Result<Option<Asked>> {
    let uid = stream.peer_cred().context("looking who the daemon is")?.uid();
    if uid != rustix::process::geteuid().as_raw() {
        bail!("the daemon's socket is served by uid {uid}");
    }
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    if writer.send(request).await.is_err() {
        return Ok(None);
    }
    let Ok(Some(frame)) = reader.next().await else { return Ok(None) };
    if !frame.is(FrameKind::DaemonAnswer) {
        bail!("the daemon answered with a frame of kind {}", frame.kind);
    }
    let answer = frame.decode::<DaemonAnswer>()?.answer.context("the daemon's answer is empty")?;
    Ok(Some((answer, reader, writer)))
}

async fn connect(socket: &Path) -> anyhow::Result<Option<UnixStream>> {
    match UnixStream::connect(socket).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            // Reset: it dies at this very moment, with our connection not yet accepted.
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset => Ok(None),
            _ => Err(error).with_context(|| format!("connecting to {}", socket.display())),
        },
    }
}

fn open_log(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}
