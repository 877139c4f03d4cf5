//! The laptop's end of a forwarded connection: dials the sandbox, carries bytes over one link after
//! another, and takes the connection up again whenever a link breaks.
//!
//! What is kept and acknowledged is `towline_streams::Pipe`'s. The bound here: a broken link is
//! tried again for [`RESUME_MAX`]; then, or when the sandbox is gone, the local socket is reset.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep, timeout};
use towline_proto::frame::FrameKind;
use towline_proto::limits::TCP_FIRST_BYTES_MAX;
use towline_proto::v1::{self, StreamErrorCode, tcp_open::How};
use towline_streams::{Attachment, FrameReader, FrameWriter, Memory, Over, Pipe, Socket};

/// How long a broken link is tried again: longer than a restart of everything on the way.
const RESUME_MAX: Duration = Duration::from_secs(600);
/// How long a sandbox that does not run is tried again: its node may be taking it over.
const NOT_RUNNING_MAX: Duration = Duration::from_secs(20);
/// Bound on one attempt to open the stream and hear the answer.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// First and longest pause between attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long the first bytes are waited for, so that they travel with the open: less than any trip.
const FIRST_MAX: Duration = Duration::from_millis(1);

/// What a connection goes to.
#[derive(Debug, Clone)]
pub enum Target {
    /// A port of the sandbox.
    Port(u16),
    /// A connection that was announced by a forward.
    Announced(Vec<u8>),
}

/// Says why there is no stream.
#[derive(Debug)]
pub struct NoStream {
    /// What happened.
    pub message: String,
    /// What a program goes by.
    pub code: StreamErrorCode,
    /// Whether trying again may help.
    pub retry: bool,
}

/// Opens streams to one sandbox.
pub trait Dialer {
    /// What a stream is read from.
    type Reader: AsyncRead + Unpin + Send;
    /// What a stream is written to.
    type Writer: AsyncWrite + Unpin + Send;

    /// Opens a stream whose first frame holds `open`; `anew` after the ticket was refused.
    fn dial(
        &self,
        open: v1::TcpOpen,
        anew: bool,
    ) -> impl Future<Output = Result<Stream<Self::Reader, Self::Writer>, NoStream>> + Send;
}

/// One opened stream.
#[derive(Debug)]
pub struct Stream<R, W> {
    /// From the guest.
    pub reader: FrameReader<R>,
    /// To the guest.
    pub writer: FrameWriter<W>,
    /// What must live as long as the stream.
    pub held: Option<Box<dyn std::any::Any + Send>>,
}

/// How a connection ended.
#[derive(Debug)]
pub enum Ended {
    /// By one of its own ends.
    Closed,
    /// The other end was not there.
    Refused(v1::StreamError),
    /// The way to it was lost.
    Lost(String),
}

/// Carries one connection to its end.
pub async fn forward<D: Dialer, S: Socket>(
    dialer: &D,
    id: [u8; 16],
    target: &Target,
    socket: S,
    memory: &Arc<Memory>,
) -> Ended {
    let pipe = Pipe::new(memory);
    let far = async {
        let mut session = Session::new(&pipe, id, target);
        let ended = session.run(dialer).await;
        if !matches!(ended, Ended::Closed) {
            pipe.abandon();
        }
        ended
    };
    tokio::join!(pipe.local(socket), far).1
}

/// One connection over its links.
struct Session<'a> {
    pipe: &'a Pipe,
    id: [u8; 16],
    target: &'a Target,
    connected: bool,
}

/// Why one link was of no use, or not any more.
enum Stop {
    Ended(Ended),
    /// Try again.
    Broken(String),
    /// Try again with another ticket.
    Ticket(String),
    /// Try again for a short while.
    NotRunning(String),
}

impl<'a> Session<'a> {
    fn new(pipe: &'a Pipe, id: [u8; 16], target: &'a Target) -> Self {
        Self { pipe, id, target, connected: false }
    }

    async fn run<D: Dialer>(&mut self, dialer: &D) -> Ended {
        let mut deadline = Instant::now() + RESUME_MAX;
        let mut not_running = None;
        let mut pause = PAUSES.0;
        let mut anew = false;
        loop {
            let stop = match self.open(dialer, anew).await {
                Ok((attachment, mut stream)) => {
                    (deadline, not_running, pause) = (Instant::now() + RESUME_MAX, None, PAUSES.0);
                    let Stream { reader, writer, .. } = &mut stream;
                    let over = self.pipe.carry(attachment, reader, writer).await;
                    let stop = self.left(over);
                    if matches!(stop, Stop::Ended(Ended::Closed)) {
                        let _ = timeout(OPEN_MAX, stream.writer.finish()).await;
                    }
                    stop
                }
                Err(stop) => stop,
            };
            let why = match stop {
                Stop::Ended(ended) => return ended,
                Stop::Broken(why) => why,
                Stop::Ticket(why) => {
                    anew = true;
                    why
                }
                Stop::NotRunning(why) => {
                    let until = *not_running.get_or_insert(Instant::now() + NOT_RUNNING_MAX);
                    deadline = deadline.min(until);
                    why
                }
            };
            tracing::debug!(why, "link of a forwarded connection lost");
            if Instant::now() >= deadline || !self.connected && self.pipe.is_local_ended() {
                return Ended::Lost(why);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Opens a stream and hears that the connection is there.
    async fn open<D: Dialer>(
        &mut self,
        dialer: &D,
        anew: bool,
    ) -> Result<(Attachment, Stream<D::Reader, D::Writer>), Stop> {
        let how = self.how().await;
        let open = v1::TcpOpen { stream_id: self.id.to_vec(), how: Some(how) };
        let opening = async {
            let mut stream = dialer.dial(open, anew).await.map_err(|e| self.no_stream(e))?;
            let first = stream.reader.next().await;
            Ok((first, stream))
        };
        let late = || Stop::Broken("the sandbox's node did not answer".into());
        let (first, stream) = timeout(OPEN_MAX, opening).await.map_err(|_| late())??;
        let frame = match first {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err(Stop::Broken("the stream ended".into())),
            Err(error) => return Err(Stop::Broken(error.to_string())),
        };
        if frame.is(FrameKind::Error) {
            return Err(self.refused(frame.decode().unwrap_or_default()));
        }
        let hostile = |what: String| Stop::Ended(Ended::Lost(what));
        if !frame.is(FrameKind::TcpConnected) {
            return Err(hostile(format!("the guest answered with kind {}", frame.kind)));
        }
        let connected: v1::TcpConnected =
            frame.decode().map_err(|error| hostile(error.to_string()))?;
        let attachment = self.pipe.attach(connected.received_offset);
        let attachment = attachment.map_err(|error| hostile(error.to_string()))?;
        self.connected = true;
        Ok((attachment, stream))
    }

    async fn how(&self) -> How {
        if self.connected {
            let received_offset = self.pipe.received_offset();
            return How::Resume(v1::TcpResume { received_offset });
        }
        match self.target {
            Target::Port(port) => {
                let first = self.pipe.first(FIRST_MAX, TCP_FIRST_BYTES_MAX).await.to_vec();
                How::Connect(v1::TcpConnect { port: (*port).into(), first })
            }
            Target::Announced(id) => How::Accept(v1::TcpAccept { connection_id: id.clone() }),
        }
    }

    fn no_stream(&self, error: NoStream) -> Stop {
        match (error.code, error.retry) {
            (_, true) => Stop::Broken(error.message),
            // A connection that was there may be again: its node is taking the sandbox over.
            (StreamErrorCode::NotRunning, _) if self.connected => Stop::NotRunning(error.message),
            _ => Stop::Ended(Ended::Lost(error.message)),
        }
    }

    fn refused(&self, error: v1::StreamError) -> Stop {
        match error.code() {
            StreamErrorCode::Ticket => Stop::Ticket(error.message),
            StreamErrorCode::NotRunning => Stop::NotRunning(error.message),
            StreamErrorCode::Internal if self.connected => Stop::Broken(error.message),
            // The guest forgets a connection when both ends have all.
            StreamErrorCode::UnknownExec if self.connected && self.pipe.is_in_ended() => {
                Stop::Ended(Ended::Closed)
            }
            _ => Stop::Ended(Ended::Refused(error)),
        }
    }

    fn left(&self, over: Over) -> Stop {
        match over {
            Over::Complete | Over::Reset => Stop::Ended(Ended::Closed),
            Over::Cut => Stop::Broken("the stream ended".into()),
            Over::TakenOver => Stop::Ended(Ended::Lost("another stream took it up".into())),
            Over::Refused(error) => self.refused(error),
            Over::Broken(error) => Stop::Ended(Ended::Lost(error.to_string())),
        }
    }
}
