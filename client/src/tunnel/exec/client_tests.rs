//! The state machine against a model of the guest, with the link cut anywhere.

use super::*;
use bytes::BytesMut;
use proptest::prelude::*;
use v1::exec_open::How as Wire;

/// A guest whose command is `cat`: what it consumed of stdin is its stdout. It is held back by what
/// nobody has acknowledged.
#[derive(Default)]
struct Guest {
    accepted: Vec<u8>,
    consumed: usize,
    eof: bool,
    sent: usize,
    /// What may be sent counts from here on.
    from: usize,
    acked: usize,
}

impl Guest {
    fn open(&mut self, open: &v1::ExecOpen) -> Frame {
        let from = match open.how.as_ref().unwrap() {
            Wire::Start(_) => 0,
            Wire::Resume(resume) => usize::try_from(resume.stdout_offset).unwrap(),
        };
        (self.sent, self.from) = (from, from);
        let started = v1::ExecStarted {
            exec_id: open.exec_id.clone(),
            stdin_offset: self.consumed as u64,
            stdout_offset: from as u64,
            ..Default::default()
        };
        Frame::message(FrameKind::Started, &started)
    }

    fn take(&mut self, outgoing: Outgoing) {
        match outgoing {
            Outgoing::Stdin(offset, bytes) => {
                let offset = usize::try_from(offset).unwrap();
                assert!(offset <= self.accepted.len(), "input arrives in order");
                self.accepted.extend(bytes.iter().skip(self.accepted.len() - offset));
            }
            Outgoing::Frame(frame) if frame.is(FrameKind::StdinEof) => self.eof = true,
            Outgoing::Frame(frame) if frame.is(FrameKind::Ack) => {
                let ack: v1::ExecAck = frame.decode().unwrap();
                self.acked = usize::try_from(ack.stdout_offset).unwrap();
                self.from = self.from.max(self.acked);
            }
            Outgoing::Frame(_) => {}
        }
        assert!(self.accepted.len() - self.consumed <= UNACKED_MAX);
        self.consumed = self.accepted.len().min(self.acked + UNACKED_MAX);
    }

    fn give(&mut self, most: usize) -> Option<Frame> {
        self.consumed = self.accepted.len().min(self.acked + UNACKED_MAX);
        let window = (self.from + UNACKED_MAX).min(self.consumed);
        if self.sent < window {
            let end = window.min(self.sent + most);
            let frame =
                Frame::data(FrameKind::Stdout, self.sent as u64, &self.accepted[self.sent..end]);
            self.sent = end;
            return Some(frame);
        }
        (self.eof && self.sent == self.accepted.len()).then(|| {
            let exit = v1::ExecExit { stdout_bytes: self.consumed as u64, ..Default::default() };
            Frame::message(FrameKind::Exit, &exit)
        })
    }

    /// What is told beside output.
    fn ack(&self) -> Frame {
        let ack = v1::ExecAck { stdin_offset: self.consumed as u64, ..Default::default() };
        Frame::message(FrameKind::Ack, &ack)
    }
}

fn start() -> ExecClient {
    ExecClient::new(vec![1; 16], How::Start(v1::ExecStart::default()))
}

fn started() -> ExecClient {
    let mut client = start();
    let frame = Guest::default().open(&client.open());
    client.on_frame(&frame).unwrap();
    client
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_byte_passes_once_however_often_the_link_is_cut(
        input in prop::collection::vec(1usize..1_000_000, 0..20),
        steps in prop::collection::vec((0u8..6, 1usize..400_000), 0..400),
    ) {
        let whole: Vec<u8> = (0..=250).cycle().take(input.iter().sum()).collect();
        let (mut client, mut guest) = (start(), Guest::default());
        let (mut input, mut read) = (VecDeque::from(input), 0);
        let mut got = BytesMut::new();
        let mut cut = true;
        // Random steps, then as many plain ones as it takes.
        let plain = (0..4000u16).map(|n| ((n % 4) as u8, 400_000));
        for (what, most) in steps.into_iter().chain(plain) {
            if cut {
                let frame = guest.open(&client.open());
                client.on_frame(&frame).unwrap();
                cut = false;
            }
            match what {
                0 => match input.pop_front() {
                    Some(len) if client.input_room() >= len => {
                        client.on_input(whole[read..read + len].to_vec().into());
                        read += len;
                    }
                    Some(len) => input.push_front(len),
                    None => client.on_input_end(),
                },
                1 => {
                    // Until it would block, as a driver does.
                    while let Some(out) = client.next_outgoing() { guest.take(out) }
                    client.on_frame(&guest.ack()).unwrap();
                }
                2 | 3 => if let Some(frame) = guest.give(most)
                    && let Event::Output(stream, bytes) = client.on_frame(&frame).unwrap()
                {
                    client.consumed(stream, bytes.len());
                    got.extend_from_slice(&bytes);
                },
                // What is on its way is lost, in either direction.
                4 => { while client.next_outgoing().is_some() {} client.broken(); cut = true; }
                _ => { guest.give(most); client.broken(); cut = true; }
            }
            if client.exit().is_some() {
                break;
            }
        }
        prop_assert!(client.exit().is_some(), "the command ends");
        prop_assert!(guest.accepted == whole);
        prop_assert!(got == whole);
    }
}

/// The guest is held back by what it may not forget, and has nothing more to send.
#[test]
fn what_was_acknowledged_on_a_stream_that_broke_is_acknowledged_again() {
    let mut client = started();
    let chunk = vec![0; DATA_CHUNK_MAX];
    for offset in (0..UNACKED_MAX).step_by(DATA_CHUNK_MAX) {
        client.on_frame(&Frame::data(FrameKind::Stdout, offset as u64, &chunk)).unwrap();
        client.consumed(Stream::Stdout, DATA_CHUNK_MAX);
    }
    while client.next_outgoing().is_some() {}
    client.broken();
    let all = UNACKED_MAX as u64;
    let started = v1::ExecStarted { stdout_offset: all, ..Default::default() };
    client.on_frame(&Frame::message(FrameKind::Started, &started)).unwrap();
    client.on_input(vec![7; 100].into());
    let Some(Outgoing::Frame(frame)) = client.next_outgoing() else { panic!("a frame, first") };
    let ack: v1::ExecAck = frame.decode().unwrap();
    assert!(frame.is(FrameKind::Ack) && ack.stdout_offset == all, "{ack:?}");
    assert!(matches!(client.next_outgoing(), Some(Outgoing::Stdin(0, _))));
    assert!(client.next_outgoing().is_none(), "once");
}

#[test]
fn input_is_held_until_acknowledged_and_no_more_than_the_window() {
    let mut client = started();
    client.on_input(vec![7; UNACKED_MAX].into());
    assert_eq!(client.input_room(), 0);
    while client.next_outgoing().is_some() {}
    assert_eq!(client.input_room(), 0, "sent is not acknowledged");
    let ack = v1::ExecAck { stdin_offset: 1000, ..Default::default() };
    client.on_frame(&Frame::message(FrameKind::Ack, &ack)).unwrap();
    assert_eq!(client.input_room(), 1000);
}

#[test]
fn a_signal_does_not_wait_behind_input() {
    let mut client = started();
    client.on_input(vec![7; 100].into());
    client.signal(2);
    let Some(Outgoing::Frame(frame)) = client.next_outgoing() else { panic!("a frame") };
    assert!(frame.is(FrameKind::Signal));
}

#[test]
fn a_guest_that_breaks_the_protocol_is_refused() {
    type Expected = fn(&ProtocolError) -> bool;
    let cases: [(Frame, Expected); 4] = [
        (Frame::data(FrameKind::Stdout, 1, b"x"), |e| matches!(e, ProtocolError::Gap { .. })),
        (Frame::raw(FrameKind::Stderr, &b"short"[..]), |e| matches!(e, ProtocolError::Frame(_))),
        (
            Frame::message(
                FrameKind::Exit,
                &v1::ExecExit { stdout_bytes: 1, ..Default::default() },
            ),
            |e| matches!(e, ProtocolError::Truncated { .. }),
        ),
        (
            Frame::message(
                FrameKind::Started,
                &v1::ExecStarted { stdin_offset: 9, ..Default::default() },
            ),
            |e| matches!(e, ProtocolError::Stdin { .. }),
        ),
    ];
    for (frame, expected) in cases {
        let error = started().on_frame(&frame).unwrap_err();
        assert!(expected(&error), "{error}");
    }
    let mut client = started();
    let chunk = vec![0; DATA_CHUNK_MAX];
    let error = (0..1000u64)
        .map(|n| Frame::data(FrameKind::Stdout, n * chunk.len() as u64, &chunk))
        .find_map(|frame| client.on_frame(&frame).err());
    assert_eq!(error, Some(ProtocolError::Window));
}

#[test]
fn a_resume_names_what_was_received_and_takes_stdin_back() {
    let mut client = started();
    client.on_frame(&Frame::data(FrameKind::Stdout, 0, b"hello")).unwrap();
    client.broken();
    let Some(Wire::Resume(resume)) = client.open().how else { panic!("a resume") };
    assert_eq!((resume.stdout_offset, resume.take_stdin), (5, true));
}

#[test]
fn the_end_is_acknowledged_after_the_last_byte_was_written() {
    let mut client = started();
    client.on_frame(&Frame::data(FrameKind::Stdout, 0, b"hi")).unwrap();
    let exit = v1::ExecExit { stdout_bytes: 2, ..Default::default() };
    client.on_frame(&Frame::message(FrameKind::Exit, &exit)).unwrap();
    assert!(client.next_outgoing().is_none());
    client.consumed(Stream::Stdout, 2);
    let Some(Outgoing::Frame(frame)) = client.next_outgoing() else { panic!("a frame") };
    assert!(frame.is(FrameKind::Ack));
    assert!(client.next_outgoing().is_none());
}
