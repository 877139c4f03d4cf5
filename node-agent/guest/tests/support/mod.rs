//! A durable client of execs for tests: what `tow` does, over in-memory streams that can be cut.

use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};
use towline_guest_agent::exec::{self, ExecTable};
use towline_guest_agent::settings::Settings;
use towline_guest_agent::workload::Workload;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::{DATA_CHUNK_MAX, OUTPUT_ACK_STEP, UNACKED_MAX};
use towline_proto::v1::{
    ExecAck, ExecExit, ExecOpen, ExecResume, ExecStart, ExecStarted, StreamError, exec_open::How,
    exit_status,
};
use towline_streams::{FrameReader, FrameWriter};

/// Nothing here takes longer, however busy the machine is.
pub(crate) const BOUND: Duration = Duration::from_secs(120);

pub(crate) struct Host {
    pub(crate) table: Arc<ExecTable>,
    _spool: TempDir,
}

pub(crate) fn host() -> Host {
    let spool = tempfile::tempdir().unwrap();
    let workload = Workload::host(spool.path()).unwrap();
    Host { table: ExecTable::new(workload, Settings::default()), _spool: spool }
}

pub(crate) fn sh(script: &str) -> ExecStart {
    command(&["/bin/sh", "-c", script])
}

pub(crate) fn command(argv: &[&str]) -> ExecStart {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    ExecStart { argv, ..ExecStart::default() }
}

pub(crate) fn start(key: u8, what: ExecStart) -> ExecOpen {
    ExecOpen { exec_id: vec![key; 16], how: Some(How::Start(what)) }
}

pub(crate) fn resume(key: u8, how: ExecResume) -> ExecOpen {
    ExecOpen { exec_id: vec![key; 16], how: Some(How::Resume(how)) }
}

/// One stream to the guest agent.
pub(crate) struct Stream {
    pub(crate) reader: FrameReader<ReadHalf<DuplexStream>>,
    pub(crate) writer: FrameWriter<WriteHalf<DuplexStream>>,
}

impl Host {
    pub(crate) fn open(&self, open: ExecOpen) -> Stream {
        let (near, far) = tokio::io::duplex(100_000);
        let table = Arc::clone(&self.table);
        tokio::spawn(async move {
            let (read, write) = tokio::io::split(far);
            exec::serve(&table, open, FrameReader::new(read), FrameWriter::new(write)).await;
        });
        let (read, write) = tokio::io::split(near);
        Stream { reader: FrameReader::new(read), writer: FrameWriter::new(write) }
    }

    /// Runs a command to its end with this input.
    pub(crate) async fn run(&self, key: u8, what: ExecStart, input: &[u8]) -> Outcome {
        let mut client = Client::new(key, input.to_vec());
        let opened = self.open(start(key, what));
        client.session(opened, usize::MAX).await.expect("the command ends")
    }
}

/// How an exec went.
#[derive(Debug)]
pub(crate) enum Outcome {
    Exit(ExecExit, Vec<u8>, Vec<u8>),
    Refused(StreamError),
}

impl Outcome {
    pub(crate) fn code(&self) -> i32 {
        match self {
            Self::Exit(exit, ..) => match exit.status.as_ref().unwrap().how {
                Some(exit_status::How::Code(code)) => code,
                Some(exit_status::How::Signal(signal)) => 128 + signal,
                None => panic!("no status"),
            },
            Self::Refused(error) => panic!("refused: {error:?}"),
        }
    }

    pub(crate) fn stdout(&self) -> String {
        match self {
            Self::Exit(_, stdout, _) => String::from_utf8_lossy(stdout).into_owned(),
            Self::Refused(error) => panic!("refused: {error:?}"),
        }
    }

    pub(crate) fn stderr(&self) -> String {
        match self {
            Self::Exit(_, _, stderr) => String::from_utf8_lossy(stderr).into_owned(),
            Self::Refused(error) => panic!("refused: {error:?}"),
        }
    }

    pub(crate) fn refusal(self) -> StreamError {
        match self {
            Self::Refused(error) => error,
            Self::Exit(exit, ..) => panic!("not refused: {exit:?}"),
        }
    }
}

/// The client's end of a durable exec.
pub(crate) struct Client {
    pub(crate) key: u8,
    input: Vec<u8>,
    acked: usize,
    /// Output of both kinds that was acknowledged.
    told: usize,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

impl Client {
    pub(crate) fn new(key: u8, input: Vec<u8>) -> Self {
        Self { key, input, acked: 0, told: 0, stdout: Vec::new(), stderr: Vec::new() }
    }

    pub(crate) fn resume(&self) -> ExecOpen {
        resume(
            self.key,
            ExecResume {
                stdout_offset: self.stdout.len() as u64,
                stderr_offset: self.stderr.len() as u64,
                take_stdin: true,
                ..ExecResume::default()
            },
        )
    }

    /// Goes on until the end, or until `cut` bytes have passed here: then the stream is dropped in
    /// the middle of whatever it was doing.
    pub(crate) async fn session(&mut self, stream: Stream, cut: usize) -> Option<Outcome> {
        tokio::time::timeout(BOUND, self.session_unbounded(stream, cut)).await.expect("in time")
    }

    async fn session_unbounded(&mut self, stream: Stream, cut: usize) -> Option<Outcome> {
        let Stream { mut reader, mut writer } = stream;
        let first = reader.next().await.unwrap()?;
        if first.is(FrameKind::Error) {
            return Some(Outcome::Refused(first.decode().unwrap()));
        }
        let started: ExecStarted = first.decode().unwrap();
        let wanted = usize::try_from(started.stdin_offset).unwrap();
        assert!(wanted >= self.acked, "asked for what was acknowledged");
        assert_eq!(started.stdout_offset, self.stdout.len() as u64);
        assert_eq!(started.stderr_offset, self.stderr.len() as u64);
        self.acked = wanted;
        // What was acknowledged before may have been lost with its stream.
        self.send_ack(&mut writer).await;
        let (mut sent, mut passed, mut eof_sent) = (wanted, 0, false);
        loop {
            if passed >= cut {
                return None;
            }
            let room = (self.acked + UNACKED_MAX).min(self.input.len()).saturating_sub(sent);
            if room > 0 {
                let len = room.min(DATA_CHUNK_MAX).min(cut - passed);
                let piece = self.input[sent..sent + len].to_vec();
                // Reading goes on meanwhile: both directions are full at once.
                let mut frames = Vec::new();
                {
                    let write = writer.send_data(FrameKind::Stdin, sent as u64, &piece);
                    tokio::pin!(write);
                    loop {
                        tokio::select! {
                            // It fails when the guest has said its last word meanwhile.
                            _ = &mut write => break,
                            frame = reader.next() => match frame.unwrap() {
                                Some(frame) => frames.push(frame),
                                None => break,
                            },
                        }
                    }
                }
                (sent, passed) = (sent + len, passed + len);
                for frame in frames {
                    passed += frame.body.len();
                    if let Some(exit) = self.take(&frame) {
                        return Some(exit);
                    }
                }
                self.ack_steps(&mut writer).await;
                continue;
            }
            if sent == self.input.len() && !eof_sent {
                let _ = writer.send_data(FrameKind::StdinEof, sent as u64, &[]).await;
                eof_sent = true;
            }
            let frame = reader.next().await.unwrap().expect("no end without EXIT");
            passed += frame.body.len();
            if let Some(exit) = self.take(&frame) {
                return Some(exit);
            }
            self.ack_steps(&mut writer).await;
        }
    }

    /// In steps, as `tow` does.
    async fn ack_steps(&mut self, writer: &mut FrameWriter<WriteHalf<DuplexStream>>) {
        if self.received() >= self.told + OUTPUT_ACK_STEP {
            self.send_ack(writer).await;
        }
    }

    fn received(&self) -> usize {
        self.stdout.len() + self.stderr.len()
    }

    async fn send_ack(&mut self, writer: &mut FrameWriter<WriteHalf<DuplexStream>>) {
        self.told = self.received();
        let ack = ExecAck {
            stdout_offset: self.stdout.len() as u64,
            stderr_offset: self.stderr.len() as u64,
            ..ExecAck::default()
        };
        // The guest may have sent its last frame by now.
        let _ = writer.send_message(FrameKind::Ack, &ack).await;
    }

    fn take(&mut self, frame: &Frame) -> Option<Outcome> {
        if frame.is(FrameKind::Stdout) || frame.is(FrameKind::Stderr) {
            let (offset, bytes) = frame.split_data().unwrap();
            let into =
                if frame.is(FrameKind::Stdout) { &mut self.stdout } else { &mut self.stderr };
            assert_eq!(offset, into.len() as u64, "nothing is lost or doubled");
            into.extend_from_slice(&bytes);
        } else if frame.is(FrameKind::Ack) {
            let ack: ExecAck = frame.decode().unwrap();
            self.acked = usize::try_from(ack.stdin_offset).unwrap();
        } else if frame.is(FrameKind::Exit) {
            let exit: ExecExit = frame.decode().unwrap();
            assert_eq!(exit.stdout_bytes, self.stdout.len() as u64);
            assert_eq!(exit.stderr_bytes, self.stderr.len() as u64);
            return Some(Outcome::Exit(exit, self.stdout.clone(), self.stderr.clone()));
        } else if frame.is(FrameKind::Error) {
            return Some(Outcome::Refused(frame.decode().unwrap()));
        } else {
            panic!("a frame of kind {}", frame.kind);
        }
        None
    }
}

/// Reproducible random numbers.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.below(u64::MAX).to_le_bytes());
        words.flatten().take(len).collect()
    }
}
