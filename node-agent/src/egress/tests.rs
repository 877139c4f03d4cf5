//! Egress between doubles: a resolver that says what a test wants, real sockets on loopback (which
//! a rule of the test opens), and a guest that is the other end of an in-memory pipe.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, UdpSocket};
use towline_node_core::Gate;
use towline_proto::v1::{DnsRecord, LookupAnswer, LookupOpen};

use super::policy::OwnAddresses;
use super::resolver::ResolveError;
use super::*;

const WAIT: Duration = Duration::from_secs(30);

/// Gives one answer after another, the last one for ever.
#[derive(Debug, Default)]
struct Answers {
    left: Mutex<VecDeque<Vec<IpAddr>>>,
    asked: Mutex<u32>,
}

impl Answers {
    fn new(answers: &[&[&str]]) -> Arc<Self> {
        let parse = |answer: &&[&str]| answer.iter().map(|a| a.parse().unwrap()).collect();
        let left = Mutex::new(answers.iter().map(parse).collect());
        Arc::new(Self { left, asked: Mutex::default() })
    }

    fn asked(&self) -> u32 {
        *self.asked.lock().unwrap()
    }
}

impl Resolve for Answers {
    fn addresses(&self, _: TargetName) -> BoxFuture<'_, Result<Vec<IpAddr>, ResolveError>> {
        *self.asked.lock().unwrap() += 1;
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = if left.len() > 1 { left.pop_front() } else { left.front().cloned() };
        Box::pin(async move { answer.ok_or(ResolveError::NoSuchName) })
    }

    fn records(
        &self,
        _: TargetName,
        record_type: u16,
    ) -> BoxFuture<'_, Result<Vec<DnsRecord>, ResolveError>> {
        *self.asked.lock().unwrap() += 1;
        let record = DnsRecord { record_type: record_type.into(), ttl_s: 5, data: vec![1] };
        Box::pin(async move { Ok(vec![record]) })
    }
}

struct World {
    egress: Arc<SandboxEgress>,
    gates: Arc<Gates>,
    folder: tempfile::TempDir,
}

fn id() -> SandboxId {
    SandboxId::from_bytes([1; 16])
}

/// A sandbox for which the operator opened these ports of 127.0.0.1.
fn world(policy: Policy, ports: &[u16], resolver: Arc<dyn Resolve>) -> World {
    let folder = tempfile::tempdir().unwrap();
    let gates = Arc::new(Gates::default());
    gates.set(id(), Gate::Open { epoch: 1 });
    let text = format!("range = '127.0.0.1'\nports = {ports:?}");
    let rules = OperatorRules::parse(vec![toml::from_str(&text).unwrap()]).unwrap();
    let own = Own::fixed(OwnAddresses {
        node: vec!["11.22.33.44".parse().unwrap()],
        cluster: Vec::new(),
    });
    let node = Egress::new(rules, own, resolver, 1000);
    let feed = Feed::open(folder.path());
    World { egress: node.of_sandbox(id(), policy, feed, Arc::clone(&gates)), gates, folder }
}

type GuestReader = FrameReader<ReadHalf<DuplexStream>>;
type GuestWriter = FrameWriter<WriteHalf<DuplexStream>>;

impl World {
    fn open(&self, open: EgressOpen) -> (GuestReader, GuestWriter) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (read, write) = tokio::io::split(far);
        let egress = Arc::clone(&self.egress);
        tokio::spawn(async move {
            egress.serve(open, FrameReader::new(read), FrameWriter::new(write)).await;
        });
        let (read, write) = tokio::io::split(near);
        (FrameReader::new(read), FrameWriter::new(write))
    }

    /// The code with which it is refused; `None` when it is opened.
    async fn refused(&self, open: EgressOpen) -> Option<StreamErrorCode> {
        let (mut reader, _writer) = self.open(open);
        let frame = next(&mut reader).await;
        frame.is(FrameKind::Error).then(|| frame.decode::<StreamError>().unwrap().code())
    }

    async fn look_up(&self, name: &str, record_type: u32) -> LookupAnswer {
        let (near, far) = tokio::io::duplex(1 << 16);
        let open = LookupOpen { name: name.into(), record_type };
        self.egress.serve_lookup(open, FrameWriter::new(far)).await;
        next(&mut FrameReader::new(near)).await.decode().unwrap()
    }

    /// What the feed holds, as `target:port rule`.
    fn feed(&self) -> Vec<String> {
        let entries = crate::feed::file_of(self.folder.path());
        let line = |entry: towline_proto::v1::FeedEntry| match entry.what {
            Some(towline_proto::v1::feed_entry::What::Egress(d)) => {
                format!("{}:{} {}", d.target, d.port, d.rule)
            }
            other => format!("{other:?}"),
        };
        entries.into_iter().map(line).collect()
    }
}

async fn next<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> Frame {
    tokio::time::timeout(WAIT, reader.next()).await.unwrap().unwrap().unwrap()
}

fn to_name(name: &str, port: u16) -> EgressOpen {
    let target = Some(egress_open::Target::Name(name.into()));
    EgressOpen { protocol: EgressProtocol::Tcp.into(), target, port: port.into() }
}

fn to(address: &str, port: u16, protocol: EgressProtocol) -> EgressOpen {
    let bytes = match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let target = Some(egress_open::Target::Address(bytes));
    EgressOpen { protocol: protocol.into(), target, port: port.into() }
}

async fn listener(address: &str) -> (TcpListener, u16) {
    let listener = TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[tokio::test]
async fn bytes_pass_both_ways_with_half_close() {
    let (listener, port) = listener("127.0.0.1:0").await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut question = Vec::new();
        stream.read_to_end(&mut question).await.unwrap();
        stream.write_all(&question).await.unwrap();
        stream.write_all(b" is what you said").await.unwrap();
    });
    let world = world(Policy::Public, &[port], Answers::new(&[&["127.0.0.1"]]));
    let (mut reader, writer) = world.open(to_name("Server.Example.", port));
    assert!(next(&mut reader).await.is(FrameKind::EgressOpened));
    let mut send = writer.into_inner();
    send.write_all(&[b'x'; 300_000]).await.unwrap();
    send.shutdown().await.unwrap();
    let (mut rest, first) = reader.into_parts();
    let mut answer = first.to_vec();
    tokio::time::timeout(WAIT, rest.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer.len(), 300_000 + 17);
    server.await.unwrap();
    assert_eq!(world.feed(), [format!("server.example:{port} allow 127.0.0.1/32:{port}")]);
}

#[tokio::test]
async fn connect_is_told_the_truth() {
    let (held, port) = listener("127.0.0.1:0").await;
    let world = world(Policy::Public, &[port, 1], Answers::new(&[]));
    assert_eq!(world.refused(to("127.0.0.1", port, EgressProtocol::Tcp)).await, None);
    drop(held);
    let refused = Some(StreamErrorCode::ConnectionRefused);
    assert_eq!(world.refused(to("127.0.0.1", port, EgressProtocol::Tcp)).await, refused);
    let blocked = Some(StreamErrorCode::Blocked);
    for address in ["127.0.0.2", "::1", "169.254.169.254", "11.22.33.44", "::ffff:127.0.0.1"] {
        assert_eq!(world.refused(to(address, port, EgressProtocol::Tcp)).await, blocked);
        assert_eq!(world.refused(to(address, port, EgressProtocol::Udp)).await, blocked);
    }
    let missing = Some(StreamErrorCode::NameNotFound);
    assert_eq!(world.refused(to_name("nobody.example", 80)).await, missing);
    assert!(world.feed().contains(&format!("169.254.169.254:{port} metadata 169.254.169.254/32")));
}

#[tokio::test]
async fn a_guest_that_forges_is_refused() {
    let world = world(Policy::Public, &[80], Answers::new(&[&["127.0.0.1"]]));
    let target = Some(egress_open::Target::Address(vec![1; 5]));
    let tcp = EgressProtocol::Tcp.into();
    let long = "x".repeat(70_000);
    for open in [
        EgressOpen { protocol: tcp, target, port: 80 },
        EgressOpen { protocol: tcp, target: None, port: 80 },
        EgressOpen { port: 65_616, ..to_name("a", 80) },
        EgressOpen { port: 0, ..to_name("a", 80) },
        EgressOpen { protocol: 0, ..to_name("a", 80) },
        EgressOpen { protocol: 77, ..to_name("a", 80) },
        to_name("a b", 80),
        to_name("", 80),
        to_name("a\u{0}.example", 80),
        to_name(&long, 80),
    ] {
        assert_eq!(world.refused(open).await, Some(StreamErrorCode::Invalid));
    }
}

#[tokio::test]
async fn a_name_that_moves_is_dialled_where_it_was_decided_about() {
    let (public, port) = listener("127.0.0.1:0").await;
    let private = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let names = Answers::new(&[&["127.0.0.1"], &["127.0.0.2"]]);
    let world = world(Policy::Public, &[port], Arc::<Answers>::clone(&names));
    assert_eq!(world.refused(to_name("rebind.example", port)).await, None);
    assert_eq!(names.asked(), 1, "one look-up per connection");
    assert_eq!(public.accept().await.unwrap().1.ip(), "127.0.0.1".parse::<IpAddr>().unwrap());
    let blocked = Some(StreamErrorCode::Blocked);
    assert_eq!(world.refused(to_name("rebind.example", port)).await, blocked);
    let nobody = tokio::time::timeout(Duration::from_millis(50), private.accept()).await;
    assert!(nobody.is_err(), "the private server heard of it");
}

#[tokio::test]
async fn of_a_mixed_answer_only_what_is_allowed_is_tried() {
    let (_held, port) = listener("127.0.0.1:0").await;
    let private = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let names = Answers::new(&[&["127.0.0.2", "fd00::1", "127.0.0.1"]]);
    let world = world(Policy::Public, &[port], names);
    assert_eq!(world.refused(to_name("mixed.example", port)).await, None);
    let nobody = tokio::time::timeout(Duration::from_millis(50), private.accept()).await;
    assert!(nobody.is_err());
}

#[tokio::test]
async fn policy_none_asks_nobody() {
    let (_held, port) = listener("127.0.0.1:0").await;
    let names = Answers::new(&[&["127.0.0.1"]]);
    let world = world(Policy::None, &[port], Arc::<Answers>::clone(&names));
    let blocked = Some(StreamErrorCode::Blocked);
    assert_eq!(world.refused(to_name("leak.secret.example", port)).await, blocked);
    assert_eq!(world.refused(to("127.0.0.1", port, EgressProtocol::Tcp)).await, blocked);
    for record_type in [1, 28, 16, 65] {
        assert_eq!(world.look_up("leak.example", record_type).await.response_code, 5);
    }
    assert_eq!(names.asked(), 0);
    assert!(world.feed().contains(&"leak.example:0 policy none".to_owned()), "{:?}", world.feed());
}

#[tokio::test]
async fn lookups_say_what_a_resolver_says() {
    let names = Answers::new(&[&["10.0.0.1"], &["fd00::1", "8.8.8.8"]]);
    let open = world(Policy::Public, &[], names);
    let answer = open.look_up("a.example", 1).await;
    assert_eq!((answer.response_code, answer.has_ipv4, answer.has_ipv6), (0, true, false));
    let answer = open.look_up("a.example", 28).await;
    assert_eq!((answer.response_code, answer.has_ipv4, answer.has_ipv6), (0, true, true));
    assert_eq!(open.look_up("a.example", 16).await.records[0].data, [1]);
    // Transfers and ANY are not for a stub.
    for refused in [0, 252, 255] {
        assert_eq!(open.look_up("a.example", refused).await.response_code, 5);
    }
    let empty = world(Policy::Public, &[], Answers::new(&[]));
    assert_eq!(empty.look_up("a.example", 1).await.response_code, 3);
}

#[tokio::test]
async fn datagrams_come_back_and_a_refusal_is_told() {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    let world = world(Policy::Public, &[port], Answers::new(&[]));
    let (mut reader, mut writer) = world.open(to("127.0.0.1", port, EgressProtocol::Udp));
    assert!(next(&mut reader).await.is(FrameKind::EgressOpened));
    for text in ["one", "", "three"] {
        writer.send(&Frame::raw(FrameKind::EgressDatagram, text.as_bytes())).await.unwrap();
        let mut buffer = [0; 100];
        let (len, from) = server.recv_from(&mut buffer).await.unwrap();
        server.send_to(&buffer[..len], from).await.unwrap();
        let back = next(&mut reader).await;
        assert!(back.is(FrameKind::EgressDatagram) && back.body == text);
    }
    drop(server);
    writer.send(&Frame::raw(FrameKind::EgressDatagram, &b"x"[..])).await.unwrap();
    let error: StreamError = next(&mut reader).await.decode().unwrap();
    assert_eq!(error.code(), StreamErrorCode::ConnectionRefused);
}

#[tokio::test]
async fn connections_are_bounded_and_end_with_the_gate() {
    // An ordinary user's shell allows fewer descriptors than both ends of all of them need.
    crate::capacity::sockets_max();
    let (listener, port) = listener("127.0.0.1:0").await;
    let accept = tokio::spawn(async move {
        let mut held: Vec<(tokio::net::TcpStream, SocketAddr)> = Vec::new();
        while held.len() < TCP_MAX {
            held.push(listener.accept().await.unwrap());
        }
        held
    });
    let world = world(Policy::Public, &[port], Answers::new(&[]));
    let open = to("127.0.0.1", port, EgressProtocol::Tcp);
    let mut streams = Vec::new();
    for _ in 0..TCP_MAX {
        let (mut reader, writer) = world.open(open.clone());
        assert!(next(&mut reader).await.is(FrameKind::EgressOpened));
        streams.push((reader, writer));
    }
    assert_eq!(world.refused(open.clone()).await, Some(StreamErrorCode::Limit));
    world.gates.set(id(), Gate::Closing { reason: "being stopped".into() });
    assert_eq!(world.refused(open.clone()).await, Some(StreamErrorCode::NotRunning));
    world.gates.set(id(), Gate::Shut { reason: "stopped".into() });
    for (mut reader, _writer) in streams {
        let end = tokio::time::timeout(WAIT, reader.next()).await.unwrap();
        assert!(matches!(end, Ok(None) | Err(_)));
    }
    // To the servers it is a reset: nobody takes what they got for all of it.
    for (mut stream, _) in accept.await.unwrap() {
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}
