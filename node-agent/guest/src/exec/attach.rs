//! One client's stream to an exec: frames in become input, signals and ACKs; state becomes frames.
//!
//! At most one attachment owns an exec: its input counts and its ACKs let output be forgotten.
//! Others (`tow logs`) only read. All that a client sends is checked here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::{DATA_CHUNK_MAX, UNACKED_MAX};
use towline_proto::v1::{
    ExecAck, ExecExit, ExecOpen, ExecResize, ExecResume, ExecSignal, ExecStarted, StreamErrorCode,
    exec_open::How,
};
use towline_streams::{FrameReader, FrameWriter};

use super::output::Piece;
use super::pumps::Which;
use super::start::window;
use super::table::ExecTable;
use super::{Exec, ExecKey, Life, State, spool};
use crate::refusal::Refusal;

/// How long a client may take to close its stream after it was sent the exit.
const LAST_WORDS_MAX: Duration = Duration::from_secs(30);
/// Input that may be consumed before an ACK says so.
const ACK_STEP: u64 = 64 << 10;
/// Linux' largest signal number.
const SIGNAL_MAX: i32 = 64;

/// Why an attachment ended.
enum Over {
    /// The exit was sent, or all there is with `no_follow`.
    Told,
    /// The client closed its half, or the stream broke.
    Left,
}

/// Serves one exec stream whose OPEN was read.
pub async fn serve<R, W>(
    table: &Arc<ExecTable>,
    open: ExecOpen,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    if let Err(refusal) = serve_or_refuse(table, open, &mut reader, &mut writer).await {
        // A stream that is broken cannot be told.
        let _ = writer.send_message(FrameKind::Error, &refusal.to_message()).await;
    }
    let _ = writer.finish().await;
}

async fn serve_or_refuse<R, W>(
    table: &Arc<ExecTable>,
    open: ExecOpen,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Result<(), Refusal>
where
    R: AsyncRead + Unpin + Send,
    W: AsyncWrite + Unpin + Send,
{
    let (exec, resume) = find_or_start(table, open).await?;
    // A spooled exec has readers beside its owner; any other has one client, the newest.
    let own = resume.take_stdin || (!exec.info.detached && !resume.no_follow);
    let mut attachment = Attachment::new(&exec, resume, own)?;
    let over = attachment.run(reader, writer).await;
    exec.change(|state| state.detach(attachment.id));
    match over? {
        Over::Told if attachment.own => {
            let closed = tokio::time::timeout(LAST_WORDS_MAX, drain(reader)).await;
            if matches!(closed, Ok(Ok(()))) {
                attachment.forget_delivered();
            }
            Ok(())
        }
        Over::Told | Over::Left => Ok(()),
    }
}

async fn find_or_start(
    table: &Arc<ExecTable>,
    open: ExecOpen,
) -> Result<(Arc<Exec>, ExecResume), Refusal> {
    let key = ExecKey::try_from(&open.exec_id[..]).ok();
    match open.how {
        Some(How::Start(start)) => {
            let key = key.ok_or_else(|| Refusal::invalid("an exec id has 16 bytes"))?;
            let exec = table.start(key, start).await?;
            Ok((exec, ExecResume { take_stdin: true, ..ExecResume::default() }))
        }
        Some(How::Resume(resume)) => {
            let newest = open.exec_id.is_empty() && resume.newest_main;
            if key.is_none() && !newest {
                return Err(Refusal::invalid("an exec id has 16 bytes"));
            }
            Ok((table.find(key)?, resume))
        }
        None => Err(Refusal::invalid("an exec stream must start or resume an exec")),
    }
}

/// Reads to the end of the client's half.
async fn drain<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> io::Result<()> {
    while reader.next().await?.is_some() {}
    Ok(())
}

struct Attachment {
    exec: Arc<Exec>,
    id: u64,
    own: bool,
    follow: bool,
    started: ExecStarted,
    progress: std::sync::Mutex<Progress>,
}

/// How far each output was sent and acknowledged on this stream.
#[derive(Debug, Clone, Copy)]
struct Progress {
    sent: [u64; 2],
    acked: [u64; 2],
}

/// What the sending half does next.
enum Next {
    Ack(u64),
    Piece(Which, Piece),
    Exit(ExecExit),
    End,
    TakenOver,
}

impl Attachment {
    fn new(exec: &Arc<Exec>, resume: ExecResume, own: bool) -> Result<Self, Refusal> {
        let wanted = [resume.stdout_offset, resume.stderr_offset];
        let attached = exec.change(|state| {
            for (offset, output) in wanted.into_iter().zip([&state.stdout, &state.stderr]) {
                if offset > output.end() {
                    return Err(Refusal::invalid(format!(
                        "output is asked for from {offset} on, but only {} bytes were written",
                        output.end()
                    )));
                }
            }
            let from = [wanted[0].max(state.stdout.first()), wanted[1].max(state.stderr.first())];
            let started = ExecStarted {
                exec_id: exec.key.to_vec(),
                pid: state.running().map_or(0, |running| running.pid_inside),
                // Not what is queued already: the queue must not grow with each new stream.
                stdin_offset: state.stdin.consumed,
                stdout_offset: from[0],
                stderr_offset: from[1],
                terminal: exec.info.terminal,
            };
            Ok((state.attach(own), started, Progress { sent: from, acked: from }))
        });
        let (id, started, progress) = attached?;
        Ok(Self {
            exec: Arc::clone(exec),
            id,
            own,
            follow: !resume.no_follow,
            started,
            progress: std::sync::Mutex::new(progress),
        })
    }

    async fn run<R, W>(
        &mut self,
        reader: &mut FrameReader<R>,
        writer: &mut FrameWriter<W>,
    ) -> Result<Over, Refusal>
    where
        R: AsyncRead + Unpin + Send,
        W: AsyncWrite + Unpin + Send,
    {
        let this = &*self;
        tokio::select! {
            over = this.receive(reader) => over,
            over = this.send(writer) => over,
        }
    }

    async fn receive<R>(&self, reader: &mut FrameReader<R>) -> Result<Over, Refusal>
    where
        R: AsyncRead + Unpin + Send,
    {
        loop {
            match reader.next().await {
                Ok(Some(frame)) => {
                    if frame.is(FrameKind::Stdin) {
                        self.exec.until(|state| state.takes_input().then_some(())).await;
                    }
                    self.take(&frame)?;
                }
                Ok(None) => return Ok(Over::Left),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(Refusal::invalid(error.to_string()));
                }
                Err(_) => return Ok(Over::Left),
            }
        }
    }

    async fn send<W>(&self, writer: &mut FrameWriter<W>) -> Result<Over, Refusal>
    where
        W: AsyncWrite + Unpin + Send,
    {
        if writer.send_message(FrameKind::Started, &self.started).await.is_err() {
            return Ok(Over::Left);
        }
        let mut acked_stdin = self.started.stdin_offset;
        let mut last = Which::Stderr;
        loop {
            let next = self.exec.until(|state| self.next(state, acked_stdin, last)).await;
            let sent = match next {
                Next::Ack(stdin_offset) => {
                    acked_stdin = stdin_offset;
                    let ack = ExecAck { stdin_offset, ..ExecAck::default() };
                    writer.send_message(FrameKind::Ack, &ack).await
                }
                Next::Piece(which, piece) => {
                    last = which;
                    self.send_piece(writer, which, piece).await
                }
                Next::Exit(exit) => {
                    let sent = writer.send_message(FrameKind::Exit, &exit).await;
                    return Ok(if sent.is_ok() { Over::Told } else { Over::Left });
                }
                Next::End => return Ok(Over::Told),
                Next::TakenOver => {
                    return Err(Refusal::new(
                        StreamErrorCode::TakenOver,
                        "another client has attached to this command",
                    ));
                }
            };
            if sent.is_err() {
                return Ok(Over::Left);
            }
        }
    }

    fn next(&self, state: &mut State, acked_stdin: u64, last: Which) -> Option<Next> {
        if self.own && !state.is_owned_by(self.id) {
            return Some(Next::TakenOver);
        }
        let consumed = state.stdin.consumed;
        let all = consumed == state.stdin.accepted();
        if self.own && consumed > acked_stdin && (all || consumed - acked_stdin >= ACK_STEP) {
            return Some(Next::Ack(consumed));
        }
        let order = match last {
            Which::Stdout => [Which::Stderr, Which::Stdout],
            Which::Stderr => [Which::Stdout, Which::Stderr],
        };
        let piece = order
            .into_iter()
            .find_map(|which| self.piece(state, which).map(|piece| Next::Piece(which, piece)));
        piece.or_else(|| self.end(state))
    }

    /// What the window lets pass of an output.
    fn piece(&self, state: &mut State, which: Which) -> Option<Piece> {
        let progress = self.progress();
        let (sent, acked) = (progress.sent[which as usize], progress.acked[which as usize]);
        let window = (UNACKED_MAX as u64).saturating_sub(sent - acked);
        let max = usize::try_from(window).unwrap_or(usize::MAX).min(DATA_CHUNK_MAX);
        if max == 0 {
            return None;
        }
        state.output(which).at(sent, max)
    }

    fn end(&self, state: &State) -> Option<Next> {
        let progress = self.progress();
        let all_sent =
            progress.sent[0] >= state.stdout.end() && progress.sent[1] >= state.stderr.end();
        if !all_sent {
            return None;
        }
        match &state.life {
            Life::Ended(status) => Some(Next::Exit(ExecExit {
                status: Some(status.clone()),
                stdout_bytes: state.stdout.end(),
                stderr_bytes: state.stderr.end(),
            })),
            Life::Starting | Life::Running(_) | Life::Refused(_) => {
                (!self.follow).then_some(Next::End)
            }
        }
    }

    async fn send_piece<W>(
        &self,
        writer: &mut FrameWriter<W>,
        which: Which,
        piece: Piece,
    ) -> io::Result<()>
    where
        W: AsyncWrite + Unpin + Send,
    {
        let (offset, bytes) = match piece {
            Piece::Bytes(offset, bytes) => (offset, bytes),
            Piece::Spooled(offset, file, len) => {
                let bytes = tokio::task::spawn_blocking(move || spool::read(&file, offset, len))
                    .await
                    .map_err(io::Error::other)??;
                if bytes.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if self.exec.lock().output(which).first() > offset {
                    // Punched out while it was read: these may be zeros. Go on behind the hole.
                    return Ok(());
                }
                (offset, bytes)
            }
        };
        let kind = match which {
            Which::Stdout => FrameKind::Stdout,
            Which::Stderr => FrameKind::Stderr,
        };
        {
            let mut progress = self.progress();
            let skipped = offset - progress.sent[which as usize];
            progress.acked[which as usize] += skipped;
            progress.sent[which as usize] = offset + bytes.len() as u64;
        }
        writer.send_data(kind, offset, &bytes).await
    }

    /// Takes one frame of the client.
    fn take(&self, frame: &Frame) -> Result<(), Refusal> {
        let is = |kind| frame.is(kind);
        if is(FrameKind::Ack) {
            self.take_ack(decode(frame)?)
        } else if is(FrameKind::Signal) {
            let ExecSignal { signal } = decode(frame)?;
            self.signal(signal)
        } else if is(FrameKind::Resize) {
            self.resize(decode(frame)?)
        } else if is(FrameKind::Stdin) || is(FrameKind::StdinEof) {
            let (offset, bytes) =
                frame.split_data().map_err(|error| Refusal::invalid(error.to_string()))?;
            let eof = is(FrameKind::StdinEof);
            self.exec.change(|state| {
                if !state.is_owned_by(self.id) {
                    // Sent before the client knew that another took over, or by a mere reader.
                    return Ok(());
                }
                state.with_stdin(|stdin| {
                    if eof { stdin.finish(offset) } else { stdin.push(offset, &bytes) }
                })
            })
        } else {
            Err(Refusal::invalid(format!("a frame of kind {} is not for an exec", frame.kind)))
        }
    }

    fn take_ack(&self, ack: ExecAck) -> Result<(), Refusal> {
        let offsets = [ack.stdout_offset, ack.stderr_offset];
        {
            let mut progress = self.progress();
            for (index, offset) in offsets.into_iter().enumerate() {
                if offset > progress.sent[index] {
                    return Err(Refusal::invalid("more output is acknowledged than was sent"));
                }
                progress.acked[index] = progress.acked[index].max(offset);
            }
        }
        self.exec.change(|state| {
            if state.is_owned_by(self.id) {
                state.with_output(Which::Stdout, |output| output.acknowledge(offsets[0]));
                state.with_output(Which::Stderr, |output| output.acknowledge(offsets[1]));
            }
        });
        Ok(())
    }

    /// To the terminal's foreground group, as a key would; without one to the command's group.
    fn signal(&self, number: i32) -> Result<(), Refusal> {
        if !(1..=SIGNAL_MAX).contains(&number) {
            return Err(Refusal::invalid(format!("there is no signal {number}")));
        }
        let state = self.exec.lock();
        let Some(running) = state.running().filter(|running| running.exited.is_none()) else {
            return Ok(());
        };
        let foreground = running
            .terminal
            .as_ref()
            .and_then(|terminal| rustix::termios::tcgetpgrp(&**terminal).ok());
        send_signal(foreground.unwrap_or(running.pid), number);
        Ok(())
    }

    fn resize(&self, size: ExecResize) -> Result<(), Refusal> {
        let state = self.exec.lock();
        if let Some(terminal) = state.running().and_then(|running| running.terminal.as_ref()) {
            rustix::termios::tcsetwinsize(&**terminal, window(size.rows, size.columns))
                .map_err(|error| Refusal::io("cannot change the terminal's size", &error.into()))?;
        }
        Ok(())
    }

    /// The client has all: only the exit is kept, for lists. A spool stays for `tow logs`.
    fn forget_delivered(&self) {
        self.exec.change(|state| {
            state.delivered = true;
            for which in [Which::Stdout, Which::Stderr] {
                let end = state.output(which).end();
                state.with_output(which, |output| output.acknowledge(end));
            }
        });
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn decode<M: prost::Message + Default>(frame: &Frame) -> Result<M, Refusal> {
    frame.decode().map_err(|error| Refusal::invalid(error.to_string()))
}

fn send_signal(group: rustix::process::Pid, number: i32) {
    crate::workload::signal_group(group, number);
}
