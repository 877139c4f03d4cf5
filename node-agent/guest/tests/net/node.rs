//! A node that decides by port and by name, and notes what it was asked.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use towline_guest_agent::net::Network;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    DnsRecord, EgressOpen, EgressOpened, EgressProtocol, LookupAnswer, LookupOpen, StreamError,
    StreamErrorCode, StreamOpen, stream_open::Kind,
};
use towline_streams::{
    FrameReader, FrameWriter, GuestSessions, Marker, MuxDriver, MuxHandle, MuxRecv, MuxSend,
};

pub(crate) const BLOCKED: u16 = 1;
pub(crate) const REFUSED: u16 = 2;
pub(crate) const UNREACHABLE: u16 = 3;
pub(crate) const TIMED_OUT: u16 = 4;
/// Sends back what comes.
pub(crate) const ECHO: u16 = 7;
/// Reads to the end, then says how much it was and a checksum of it.
pub(crate) const COUNT: u16 = 9;
/// Says "bye" and ends; then reads to the end and notes how much came.
pub(crate) const BYE: u16 = 10;
/// Resets after the first byte.
pub(crate) const RESET: u16 = 11;
/// Reads until an error, and notes it.
pub(crate) const WATCH: u16 = 12;
/// Sends `SOURCE_LEN` bytes and ends.
pub(crate) const SOURCE: u16 = 19;
pub(crate) const SOURCE_LEN: usize = 20 << 20;

/// What it was asked and what it saw.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) opened: Mutex<Vec<EgressOpen>>,
    pub(crate) seen: Mutex<Vec<String>>,
}

/// A session between a network and a node. Dropping it kills the node.
pub(crate) struct Session {
    pub(crate) handle: MuxHandle,
    _tasks: JoinSet<()>,
    _sessions: GuestSessions,
}

/// Gives the network a session with a new node.
pub(crate) async fn connect(network: &Network, notes: &Arc<Notes>) -> Session {
    let (near, far) = tokio::io::duplex(256 << 10);
    let (mut sessions, guest) = MuxDriver::guest(near, Marker::BOOT);
    let nonce = rand_bytes();
    let (handle, mut incoming, host) = MuxDriver::host(far, &[Marker::BOOT], nonce);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(guest.await) });
    tasks.spawn(async move { drop(host.await) });
    let notes = Arc::clone(notes);
    tasks.spawn(async move {
        while let Some((send, receive)) = incoming.next().await {
            tokio::spawn(serve(Arc::clone(&notes), send, receive));
        }
    });
    let session = sessions.next().await.unwrap();
    network.set_session(session.handle.clone());
    Session { handle, _tasks: tasks, _sessions: sessions }
}

fn rand_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    bytes
}

/// Some bytes, different everywhere.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// A checksum that knows the order.
pub(crate) fn checksum(state: u64, bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(state, |state, byte| (state.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(31))
}

async fn serve(notes: Arc<Notes>, send: MuxSend, receive: MuxRecv) {
    let (mut reader, mut writer) = (FrameReader::new(receive), FrameWriter::new(send));
    let Ok(Some(frame)) = reader.next().await else { return };
    assert!(frame.is(FrameKind::Open), "{frame:?}");
    match frame.decode::<StreamOpen>().unwrap().kind.unwrap() {
        Kind::Lookup(open) => {
            let answer = look_up(&open);
            let _ = writer.send_message(FrameKind::LookupAnswer, &answer).await;
            let _ = writer.finish().await;
        }
        Kind::Egress(open) => egress(&notes, open, reader, writer).await,
        other => panic!("a guest's network does not open {other:?}"),
    }
}

fn look_up(open: &LookupOpen) -> LookupAnswer {
    let mut answer = LookupAnswer { has_ipv4: true, has_ipv6: true, ..LookupAnswer::default() };
    match open.name.as_str() {
        "missing.test" => answer.response_code = 3,
        "refused.test" => answer.response_code = 5,
        "v4.test" => answer.has_ipv6 = false,
        _ if open.record_type == 16 => {
            let data: Vec<u8> = [&[250][..], &[b'x'; 250][..]].concat();
            answer.records = vec![DnsRecord { record_type: 16, ttl_s: 5, data }; 6];
        }
        _ => {}
    }
    answer
}

async fn egress(
    notes: &Notes,
    open: EgressOpen,
    reader: FrameReader<MuxRecv>,
    mut writer: FrameWriter<MuxSend>,
) {
    notes.opened.lock().unwrap().push(open.clone());
    let port = u16::try_from(open.port).unwrap();
    let code = match port {
        BLOCKED => Some(StreamErrorCode::Blocked),
        REFUSED => Some(StreamErrorCode::ConnectionRefused),
        UNREACHABLE => Some(StreamErrorCode::Unreachable),
        TIMED_OUT => Some(StreamErrorCode::TimedOut),
        _ => None,
    };
    if let Some(code) = code {
        let error = StreamError { code: code.into(), message: "by port".into() };
        let _ = writer.send_message(FrameKind::Error, &error).await;
        let _ = writer.finish().await;
        return;
    }
    if writer.send_message(FrameKind::EgressOpened, &EgressOpened {}).await.is_err() {
        return;
    }
    if open.protocol() == EgressProtocol::Udp {
        return datagrams(reader, writer).await;
    }
    let (mut receive, first) = reader.into_parts();
    assert!(first.is_empty(), "nothing comes before the node has answered");
    let mut send = writer.into_inner();
    let ended = match port {
        ECHO => echo(&mut receive, &mut send).await,
        COUNT => count(&mut receive, &mut send).await,
        BYE => {
            let _ = send.write_all(b"bye").await;
            let _ = send.shutdown().await;
            let (len, sum) = drain(&mut receive).await.unwrap();
            notes.seen.lock().unwrap().push(format!("{len} {sum}"));
            Ok(())
        }
        RESET => {
            let _ = receive.read_u8().await;
            send.reset(7);
            return;
        }
        WATCH => {
            let end = drain(&mut receive).await;
            notes.seen.lock().unwrap().push(match end {
                Ok(_) => "end".into(),
                Err(error) => error.kind().to_string(),
            });
            Ok(())
        }
        SOURCE => match send.write_all(&pattern(SOURCE_LEN)).await {
            Ok(()) => send.shutdown().await,
            Err(error) => Err(error),
        },
        _ => panic!("no such port: {port}"),
    };
    if let Err(error) = ended {
        notes.seen.lock().unwrap().push(error.kind().to_string());
    }
}

async fn echo(receive: &mut MuxRecv, send: &mut MuxSend) -> std::io::Result<()> {
    tokio::io::copy(receive, send).await?;
    send.shutdown().await
}

async fn count(receive: &mut MuxRecv, send: &mut MuxSend) -> std::io::Result<()> {
    let (len, sum) = drain(receive).await?;
    send.write_all(format!("{len} {sum}").as_bytes()).await?;
    send.shutdown().await
}

async fn drain(receive: &mut MuxRecv) -> std::io::Result<(usize, u64)> {
    let (mut buffer, mut len, mut sum) = (vec![0; 64 << 10], 0, 0);
    loop {
        let read = receive.read(&mut buffer).await?;
        if read == 0 {
            return Ok((len, sum));
        }
        len += read;
        sum = checksum(sum, &buffer[..read]);
    }
}

async fn datagrams(mut reader: FrameReader<MuxRecv>, mut writer: FrameWriter<MuxSend>) {
    while let Ok(Some(frame)) = reader.next().await {
        assert!(frame.is(FrameKind::EgressDatagram), "{frame:?}");
        let frame = Frame::raw(FrameKind::EgressDatagram, frame.body);
        if writer.send(&frame).await.is_err() {
            return;
        }
    }
    let _ = writer.finish().await;
}

/// Waits until the node has noted something.
pub(crate) async fn seen(notes: &Notes) -> String {
    let found = async {
        loop {
            if let Some(seen) = notes.seen.lock().unwrap().pop() {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("the node sees it")
}
