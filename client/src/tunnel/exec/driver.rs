//! Carries a durable exec: opens its stream, moves bytes, and opens it again whenever it breaks.
//!
//! All decisions about offsets are `client.rs`'s. The bound here: a broken link is tried again for
//! [`RESUME_MAX`], then the command is left running and the user told so. Nothing in here waits
//! for our own output while the guest could be heard, or the other way round.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::DATA_CHUNK_MAX;
use towline_proto::v1;
use towline_streams::{FrameReader, FrameWriter};

use super::client::{Event, ExecClient, Outgoing, Stream};
use super::detach::DetachKeys;
use super::output::{Output, Written};
use super::signals::{Received, Signals};
use super::stdin;
use crate::error::{Exit, Failure};
use crate::tunnel::terminal::{self, RawMode};

/// How long a broken link is tried again.
const RESUME_MAX: Duration = Duration::from_secs(60);
/// Bound on one attempt to open the stream and hear STARTED.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// First and longest pause between attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long a command may live on after nobody reads its output any more.
const DEAF_MAX: Duration = Duration::from_secs(5);
/// How long the last acknowledgement may take.
const GOODBYE_MAX: Duration = Duration::from_millis(200);
/// Frames that wait for the link.
const SEND_QUEUE: usize = 4;

/// One opened stream.
#[derive(Debug)]
pub struct Wire {
    /// From the guest.
    pub reader: FrameReader<OwnedReadHalf>,
    /// To the guest.
    pub writer: FrameWriter<OwnedWriteHalf>,
}

/// Says why a stream could not be opened.
#[derive(Debug)]
pub struct DialError {
    /// What went wrong.
    pub error: anyhow::Error,
    /// Whether trying again may help.
    pub retry: bool,
}

/// What is known about a sandbox whose stream broke.
#[derive(Debug)]
pub enum Verdict {
    /// The command may still be there.
    MayComeBack,
    /// It cannot be.
    Gone(anyhow::Error),
}

/// Opens streams to one sandbox.
pub trait Dialer {
    /// Opens a stream whose first frame holds `open`.
    fn dial(&self, open: v1::ExecOpen) -> impl Future<Output = Result<Wire, DialError>>;
    /// Says whether it makes sense to dial again.
    fn verdict(&self) -> impl Future<Output = Verdict>;
    /// Says something to the person in front.
    fn notice(&self, text: &str);
}

/// What our side of the command is.
#[derive(Debug, Clone)]
pub struct Io {
    /// Standard input is read and passed on.
    pub stdin: bool,
    /// The command has a terminal.
    pub terminal: bool,
    /// Signals that we receive go to the command.
    pub forward_signals: bool,
    /// Keys that leave.
    pub detach_keys: Vec<u8>,
    /// Return as soon as the command runs.
    pub only_start: bool,
}

/// How it ended.
#[derive(Debug)]
pub enum Ended {
    /// The command did.
    Exited(v1::ExitStatus),
    /// It runs (or its kept output is all shown), and we leave.
    Left,
    /// We were told to leave by a signal.
    Signalled(i32),
    /// Nobody reads our output any more.
    OutputClosed,
}

impl Ended {
    /// Returns our exit code.
    pub fn exit(&self) -> Exit {
        use v1::exit_status::How;
        match self {
            Self::Exited(status) => match status.how {
                Some(How::Code(code)) => Exit(code.to_le_bytes()[0]),
                Some(How::Signal(signal)) => Exit::of_signal(signal),
                None => Exit(crate::error::TOWLINE_FAILED),
            },
            Self::Left => Exit::OK,
            Self::Signalled(signal) => Exit::of_signal(*signal),
            Self::OutputClosed => Exit::of_signal(rustix::process::Signal::PIPE.as_raw()),
        }
    }
}

/// Why a stream is no longer used.
enum Stop {
    Ended(Ended),
    Broken(anyhow::Error),
    Failed(anyhow::Error),
}

/// Runs an exec to its end, over as many streams as it takes.
pub async fn run(dialer: &impl Dialer, client: ExecClient, io: Io) -> anyhow::Result<Ended> {
    let mut session = Session::new(client, io)?;
    let mut deadline = Instant::now() + RESUME_MAX;
    let mut pause = PAUSES.0;
    let mut told = false;
    loop {
        let began = Instant::now();
        let stop = match session.dial(dialer, deadline).await {
            Ok(wire) => session.pump(wire).await,
            Err(stop) => stop,
        };
        session.client.broken();
        let why = match stop {
            Stop::Ended(ended) => return Ok(ended),
            Stop::Failed(error) => return Err(error),
            Stop::Broken(why) => why,
        };
        if session.was_live(began) {
            // A new break: a new chance, and it is said again.
            (deadline, pause, told) = (Instant::now() + RESUME_MAX, PAUSES.0, false);
        }
        tracing::debug!(%why, "link lost");
        if let Verdict::Gone(error) = dialer.verdict().await {
            return Err(error);
        }
        if Instant::now() >= deadline {
            return Err(gave_up(why));
        }
        if !told {
            dialer.notice("link lost, resuming…");
            told = true;
        }
        if let Some(ended) = session.wait(pause).await {
            return Ok(ended);
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

fn gave_up(why: anyhow::Error) -> anyhow::Error {
    Failure::new(format!(
        "lost the link to the sandbox and could not take it up again in {} s; the command goes on",
        RESUME_MAX.as_secs()
    ))
    .hint("`tow status` says how the cluster is; `tow attach` takes the command up again")
    .because(why)
    .into()
}

/// Our descriptors and the state machine, which outlive each stream.
struct Session {
    client: ExecClient,
    io: Io,
    input: Option<mpsc::Receiver<Bytes>>,
    detach: DetachKeys,
    output: Output,
    signals: Signals,
    raw: Option<RawMode>,
    /// Stdout and stderr that nobody reads.
    closed: [bool; 2],
    deaf_since: Option<Instant>,
    live_at: Option<Instant>,
    /// A signal came while there was no stream.
    signalled: bool,
}

impl Session {
    fn new(mut client: ExecClient, io: Io) -> anyhow::Result<Self> {
        if !io.stdin {
            client.on_input_end();
        }
        Ok(Self {
            client,
            input: None,
            detach: DetachKeys::new(io.detach_keys.clone()),
            output: Output::spawn().context("starting the output thread")?,
            signals: Signals::listen().context("listening to signals")?,
            raw: None,
            closed: [false; 2],
            deaf_since: None,
            live_at: None,
            signalled: false,
            io,
        })
    }

    fn was_live(&self, since: Instant) -> bool {
        self.live_at.is_some_and(|at| at >= since)
    }

    /// Opens a stream, within a bound.
    async fn dial(&mut self, dialer: &impl Dialer, deadline: Instant) -> Result<Wire, Stop> {
        let left = deadline.saturating_duration_since(Instant::now()) + PAUSES.1;
        let dialing = tokio::time::timeout(OPEN_MAX.min(left), dialer.dial(self.client.open()));
        let mut dialing = std::pin::pin!(dialing);
        loop {
            tokio::select! {
                dialed = &mut dialing => return match dialed {
                    Ok(Ok(wire)) => Ok(wire),
                    Ok(Err(error)) if error.retry => Err(Stop::Broken(error.error)),
                    Ok(Err(error)) => Err(Stop::Failed(error.error)),
                    Err(_) => Err(Stop::Broken(
                        Failure::new("the sandbox's node did not answer")
                            .hint("`tow status` says how the cluster is")
                            .into(),
                    )),
                },
                received = self.signals.next() => if let Some(ended) = self.while_away(received) {
                    return Err(Stop::Ended(ended));
                },
            }
        }
    }

    /// A signal while there is no stream: the command gets it as soon as it can be reached; a
    /// second one means that the user has had enough.
    fn while_away(&mut self, received: Received) -> Option<Ended> {
        let Received::Signal(signal) = received else { return None };
        if !self.io.forward_signals || std::mem::replace(&mut self.signalled, true) {
            return Some(Ended::Signalled(signal));
        }
        self.client.signal(signal);
        None
    }

    /// Uses one stream for as long as it lasts.
    async fn pump(&mut self, wire: Wire) -> Stop {
        let Wire { mut reader, writer } = wire;
        let (send, queue) = mpsc::channel(SEND_QUEUE);
        let mut writing = std::pin::pin!(write_all(writer, queue));
        let mut writer_failed = false;
        let stop = loop {
            let deaf_for = self.deaf_since.map(|since| since + DEAF_MAX);
            let stop = tokio::select! {
                frame = reader.next() => self.on_read(frame),
                permit = send.reserve(), if self.client.wants_to_send() && !writer_failed => {
                    if let (Ok(permit), Some(outgoing)) = (permit, self.client.next_outgoing()) {
                        permit.send(outgoing);
                    }
                    None
                }
                // A writer that failed is no reason to stop reading: EXIT may be on its way.
                _ = &mut writing, if !writer_failed => {
                    writer_failed = true;
                    None
                }
                // One read is a chunk at most: the guest takes no byte over the window.
                bytes = next_input(&mut self.input),
                    if self.client.input_room() >= DATA_CHUNK_MAX =>
                {
                    self.on_input(bytes)
                }
                Some(written) = self.output.written() => {
                    self.on_written(written);
                    None
                }
                received = self.signals.next() => self.on_signal(received),
                () = sleep_until(deaf_for), if deaf_for.is_some() => {
                    Some(Stop::Ended(Ended::OutputClosed))
                }
            };
            if let Some(stop) = stop {
                break stop;
            }
        };
        self.finish(stop, send, writing, writer_failed).await
    }

    fn on_read(&mut self, frame: std::io::Result<Option<Frame>>) -> Option<Stop> {
        match frame {
            Ok(Some(frame)) => match self.client.on_frame(&frame) {
                Ok(event) => self.on_event(event),
                Err(error) => Some(Stop::Failed(
                    anyhow::Error::from(error).context("the guest broke the protocol"),
                )),
            },
            Ok(None) if self.client.ends_without_exit() => Some(Stop::Ended(Ended::Left)),
            Ok(None) => Some(Stop::Broken(anyhow::anyhow!("the stream ended"))),
            Err(error) => Some(Stop::Broken(error.into())),
        }
    }

    /// Waits before the next attempt.
    async fn wait(&mut self, pause: Duration) -> Option<Ended> {
        let mut pausing = std::pin::pin!(sleep(pause));
        loop {
            tokio::select! {
                () = &mut pausing => return None,
                received = self.signals.next() => if let Some(ended) = self.while_away(received) {
                    return Some(ended);
                },
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Option<Stop> {
        match event {
            Event::Started(started) => self.on_started(&started),
            Event::Output(stream, bytes) => {
                match self.closed[index(stream)] {
                    true => self.client.consumed(stream, bytes.len()),
                    false => self.output.write(stream, bytes),
                }
                None
            }
            Event::Exited(exit) => {
                Some(Stop::Ended(Ended::Exited(exit.status.unwrap_or_default())))
            }
            Event::Refused(error) => Some(refusal(error, self.client.started())),
            Event::Nothing => None,
        }
    }

    fn on_started(&mut self, started: &v1::ExecStarted) -> Option<Stop> {
        let first = self.live_at.replace(Instant::now()).is_none();
        self.signalled = false;
        if self.io.only_start {
            return Some(Stop::Ended(Ended::Left));
        }
        if !first {
            return None;
        }
        self.io.terminal |= started.terminal;
        self.begin().err().map(Stop::Failed)
    }

    /// The command runs: from now on our input and terminal are its.
    fn begin(&mut self) -> anyhow::Result<()> {
        if self.io.stdin {
            self.input = Some(stdin::spawn().context("starting the input thread")?);
        }
        if self.io.terminal && self.io.stdin {
            self.raw = RawMode::enter().context("switching the terminal to raw mode")?;
        }
        if self.io.terminal {
            let (rows, columns) = terminal::size();
            self.client.resize(rows, columns);
        }
        Ok(())
    }

    fn on_input(&mut self, bytes: Option<Bytes>) -> Option<Stop> {
        let Some(bytes) = bytes else {
            self.input = None;
            self.client.on_input_end();
            return None;
        };
        if self.raw.is_none() || self.detach.is_off() {
            self.client.on_input(bytes);
            return None;
        }
        let typed = self.detach.on_typed(&bytes);
        self.client.on_input(typed.pass.into());
        typed.detach.then_some(Stop::Ended(Ended::Left))
    }

    fn on_written(&mut self, written: Written) {
        let (stream, len) = match written {
            Written::Bytes(stream, len) => (stream, len),
            Written::Failed(stream, len, error) => {
                self.on_output_closed(stream, &error);
                (stream, len)
            }
        };
        self.client.consumed(stream, len);
    }

    /// The command learns that nobody reads, as it would here: by SIGPIPE. What it still writes is
    /// taken and dropped, so that it can end in its own way, for a bounded time.
    fn on_output_closed(&mut self, stream: Stream, error: &std::io::Error) {
        if !self.closed[index(stream)] {
            tracing::debug!(?stream, %error, "output closed");
            self.closed[index(stream)] = true;
            self.client.signal(rustix::process::Signal::PIPE.as_raw());
            self.deaf_since.get_or_insert_with(Instant::now);
        }
    }

    fn on_signal(&mut self, received: Received) -> Option<Stop> {
        match received {
            Received::Resized if self.io.terminal => {
                let (rows, columns) = terminal::size();
                self.client.resize(rows, columns);
            }
            Received::Resized => {}
            Received::Continued => {
                if let Some(raw) = &self.raw {
                    let _ = raw.again();
                }
            }
            Received::Signal(signal) if self.io.forward_signals => self.client.signal(signal),
            Received::Signal(signal) => return Some(Stop::Ended(Ended::Signalled(signal))),
        }
        None
    }

    /// Writes what has arrived, acknowledges it, and says goodbye.
    async fn finish(
        &mut self,
        stop: Stop,
        send: mpsc::Sender<Outgoing>,
        mut writing: std::pin::Pin<&mut impl Future<Output = std::io::Result<()>>>,
        writer_failed: bool,
    ) -> Stop {
        let ended = match stop {
            Stop::Ended(ended @ (Ended::Exited(_) | Ended::Left)) if !self.io.only_start => ended,
            other => return other,
        };
        while self.client.output_pending() {
            tokio::select! {
                Some(written) = self.output.written() => self.on_written(written),
                // Whoever should read our output may never do so.
                received = self.signals.next() => if let Received::Signal(signal) = received {
                    return Stop::Ended(Ended::Signalled(signal));
                },
            }
        }
        // The guest may forget the command now. It does so by itself later: no need to insist.
        while let Some(outgoing) = self.client.next_outgoing() {
            if send.try_send(outgoing).is_err() {
                break;
            }
        }
        drop(send);
        if !writer_failed {
            let _ = tokio::time::timeout(GOODBYE_MAX, &mut writing).await;
        }
        let own_pipe =
            self.closed[0] && matches!(&ended, Ended::Exited(status) if by_sigpipe(status));
        Stop::Ended(if own_pipe { Ended::OutputClosed } else { ended })
    }
}

fn by_sigpipe(status: &v1::ExitStatus) -> bool {
    status.how == Some(v1::exit_status::How::Signal(rustix::process::Signal::PIPE.as_raw()))
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Stdout => 0,
        Stream::Stderr => 1,
    }
}

async fn next_input(input: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn write_all(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::Receiver<Outgoing>,
) -> std::io::Result<()> {
    while let Some(outgoing) = queue.recv().await {
        match outgoing {
            Outgoing::Frame(frame) => writer.send(&frame).await?,
            Outgoing::Stdin(offset, bytes) => {
                writer.send_data(FrameKind::Stdin, offset, &bytes).await?;
            }
        }
    }
    writer.finish().await
}

/// Turns a refusal of the node or guest into what the user sees and the exit code says.
fn refusal(error: v1::StreamError, started: bool) -> Stop {
    use v1::StreamErrorCode as Code;
    let text = crate::output::human::printable(&error.message);
    let failure = Failure::new(text);
    match error.code() {
        Code::CommandNotFound => Stop::Failed(failure.code(crate::error::NOT_FOUND).into()),
        Code::CannotExecute => Stop::Failed(failure.code(crate::error::CANNOT_EXECUTE).into()),
        Code::TakenOver => Stop::Failed(
            failure
                .hint("another `tow` took this command's terminal over; `tow attach` takes it back")
                .into(),
        ),
        // The node or the link is restarting: what it says now may be otherwise in a moment.
        Code::Internal if started => Stop::Broken(failure.into()),
        Code::Ticket | Code::NotRunning => Stop::Broken(failure.into()),
        _ => Stop::Failed(failure.into()),
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
