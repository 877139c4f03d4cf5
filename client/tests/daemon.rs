//! The daemon as a process of its own, between a client in this process and a fake cluster: it is
//! started on demand, carries streams whole, mends what can be mended and says what cannot.

#![allow(clippy::unwrap_used, reason = "tests")]

mod daemon_fakes;

use std::sync::atomic::Ordering;
use std::time::Duration;

use daemon_fakes::{Cluster, TestDaemon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use towline_client::daemon::client::{OpenError, OpenedStream};
use towline_client::session::Session;
use towline_link::status::RpcError;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{
    ImageImportOpen, ListPorts, OpenSandboxStream, PingOpen, PortMapping, PublishPorts,
    PublishedPort, StreamErrorCode, StreamOpen, UnpublishPorts, stream_open::Kind,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

struct Setup {
    cluster: Cluster,
    daemon: TestDaemon,
    /// The control plane; dropping it is its death.
    control_plane: JoinSet<()>,
    _node: JoinSet<()>,
    _dir: tempfile::TempDir,
}

async fn setup() -> Setup {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let (mut control_plane, mut node) = (JoinSet::new(), JoinSet::new());
    let endpoint = cluster.control_plane(&mut control_plane).await;
    cluster.node(&mut node);
    let config = cluster.context(dir.path(), &endpoint, DAY);
    let daemon = TestDaemon::new(&config);
    Setup { cluster, daemon, control_plane, _node: node, _dir: dir }
}

impl Setup {
    async fn open(&self) -> Result<OpenedStream, OpenError> {
        self.daemon.client.open(ping("web")).await
    }

    async fn end(self) {
        assert!(self.daemon.client.shutdown().await.unwrap());
        assert!(!self.daemon.place.socket().exists());
        assert!(self.daemon.client.status().await.unwrap().is_none());
    }
}

fn ping(name: &str) -> OpenSandboxStream {
    let kind = Some(Kind::Ping(PingOpen { guest: true }));
    let open = Some(StreamOpen { kind, ..Default::default() });
    OpenSandboxStream { sandbox_name: name.into(), open, ..Default::default() }
}

fn stdin(bytes: &[u8]) -> Frame {
    Frame::raw(FrameKind::Stdin, bytes.to_vec())
}

/// Sends a frame and gets it back.
async fn echo(stream: &mut OpenedStream, bytes: &[u8]) {
    stream.writer.send(&stdin(bytes)).await.unwrap();
    assert_eq!(next(stream).await, Some(stdin(bytes)));
}

async fn next(stream: &mut OpenedStream) -> Option<Frame> {
    let next = tokio::time::timeout(Duration::from_secs(60), stream.reader.next());
    next.await.expect("a frame within a minute").unwrap()
}

/// Waits for the stream's end; true if it is not an orderly one of the far side.
async fn broke(stream: &mut OpenedStream) -> bool {
    let next = tokio::time::timeout(Duration::from_secs(60), stream.reader.next());
    matches!(next.await.expect("an end within a minute"), Ok(None) | Err(_))
}

fn refused(result: Result<OpenedStream, OpenError>) -> towline_client::daemon::DaemonFailure {
    match result {
        Err(OpenError::Refused(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_share_a_daemon_a_link_and_a_ticket_and_end_in_order() {
    let setup = setup().await;
    assert!(setup.daemon.client.status().await.unwrap().is_none(), "asking starts none");
    let mut first = setup.open().await.unwrap();
    assert_eq!(first.sandbox_id, Some(SandboxId::from_bytes([5; 16])));
    let mut second = setup.open().await.unwrap();
    echo(&mut first, b"one").await;
    echo(&mut second, b"two").await;
    let status = setup.daemon.client.status().await.unwrap().unwrap();
    assert_eq!((status.links, status.streams), (1, 2));
    let world = &setup.cluster.world;
    assert_eq!(world.links.load(Ordering::Relaxed), 1);
    assert_eq!(world.tickets_issued.load(Ordering::Relaxed), 1);
    let opens = world.opens.lock().unwrap().clone();
    assert_eq!(opens[0].kind, Some(Kind::Ping(PingOpen { guest: true })));

    // A half-closed stream still answers, then ends.
    first.writer.finish().await.unwrap();
    assert_eq!(next(&mut first).await, Some(Frame::raw(FrameKind::Pong, &b"end"[..])));
    assert_eq!(next(&mut first).await, None);
    // A stream that breaks on the far side ends, and the other lives.
    let mut third = setup.open().await.unwrap();
    third.writer.send(&Frame::raw(FrameKind::Signal, &b""[..])).await.unwrap();
    assert!(broke(&mut third).await);
    echo(&mut second, b"still").await;
    drop(second);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_passes_unharmed_both_ways_and_a_slow_reader_only_slows() {
    const PIECES: u32 = 1024;
    let setup = setup().await;
    let stream = setup.open().await.unwrap();
    let OpenedStream { mut reader, mut writer, .. } = stream;
    let sender = tokio::spawn(async move {
        for piece in 0..PIECES {
            let bytes: Vec<u8> = piece.to_le_bytes().repeat(16 << 10);
            writer.send(&stdin(&bytes)).await.unwrap();
        }
        writer.finish().await.unwrap();
    });
    for piece in 0..PIECES {
        let frame = reader.next().await.unwrap().unwrap();
        assert!(frame.body.chunks(4).all(|c| c == piece.to_le_bytes()), "piece {piece}");
        assert_eq!(frame.body.len(), 64 << 10);
    }
    assert!(reader.next().await.unwrap().unwrap().is(FrameKind::Pong));
    assert_eq!(reader.next().await.unwrap(), None);
    sender.await.unwrap();
    let status = setup.daemon.client.status().await.unwrap().unwrap();
    let peak = std::fs::read_to_string(format!("/proc/{}/status", status.pid)).unwrap();
    let peak = peak.lines().find(|l| l.starts_with("VmHWM")).unwrap().to_owned();
    let kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 64 << 10, "the daemon kept too much: {peak}");
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_ticket_is_renewed_unnoticed_but_not_for_ever() {
    let setup = setup().await;
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"epoch 0").await;
    // The sandbox moved on: the kept ticket is of an older epoch.
    let world = &setup.cluster.world;
    world.epoch.store(1, Ordering::Relaxed);
    world.node_epoch.store(1, Ordering::Relaxed);
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"epoch 1").await;
    assert_eq!(world.tickets_issued.load(Ordering::Relaxed), 2);
    // The node knows better than the control plane: the refusal is the client's to see.
    world.node_epoch.store(2, Ordering::Relaxed);
    let mut stream = setup.open().await.unwrap();
    let error: towline_proto::v1::StreamError = next(&mut stream).await.unwrap().decode().unwrap();
    assert_eq!(error.code(), StreamErrorCode::Ticket);
    let issued = world.tickets_issued.load(Ordering::Relaxed);
    assert!((3..10).contains(&issued), "{issued} tickets");
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_say_what_and_what_next() {
    let mut setup = setup().await;
    let failure = refused(setup.daemon.client.open(ping("nope")).await);
    assert_eq!(failure.message, "there is no sandbox `nope`");
    assert_eq!((failure.hint.as_str(), failure.retry), ("tow ls", false));
    let world = &setup.cluster.world;
    let reason = "sandbox `web` is stopped".to_owned();
    *world.refusal.lock().unwrap() = Some(RpcError::Refused { reason: reason.clone() });
    let failure = refused(setup.open().await);
    assert_eq!((failure.message, failure.code), (reason, StreamErrorCode::NotRunning));
    *world.refusal.lock().unwrap() = None;
    let failure = refused(setup.daemon.client.open(OpenSandboxStream::default()).await);
    assert!(failure.message.contains("neither a sandbox nor a node"), "{failure}");

    // An image import finds a node by itself.
    let kind = Some(Kind::ImageImport(ImageImportOpen { name: "x".into() }));
    let open = Some(StreamOpen { kind, ..Default::default() });
    let mut stream =
        setup.daemon.client.open(OpenSandboxStream { open, ..Default::default() }).await.unwrap();
    assert_eq!(stream.sandbox_id, None);
    echo(&mut stream, &[7; 300_000]).await;

    // Without a control plane what is known still works by id, and what is not says so.
    setup.open().await.unwrap();
    setup.control_plane.shutdown().await;
    let by_id =
        OpenSandboxStream { sandbox_id: vec![5; 16], open: ping("").open, ..Default::default() };
    let mut stream = setup.daemon.client.open(by_id).await.unwrap();
    echo(&mut stream, b"by id").await;
    let failure = refused(setup.open().await);
    assert!(failure.retry && failure.message.contains("does not answer"), "{failure}");
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_restarted_elsewhere_is_found_again() {
    let setup = setup().await;
    let mut relay = JoinSet::new();
    setup.cluster.relay(&mut relay).await;
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"before").await;
    relay.shutdown().await;
    setup.cluster.relay(&mut relay).await;
    // The old stream ends when the daemon finds out, long before QUIC would (30 s).
    stream.writer.send(&stdin(b"anybody there?")).await.unwrap();
    assert!(broke(&mut stream).await);
    assert!(setup.daemon.log().contains("link given up"), "{}", setup.daemon.log());
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"after").await;
    assert_eq!(setup.cluster.world.links.load(Ordering::Relaxed), 2);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_is_away_for_a_while_breaks_nothing() {
    let setup = setup().await;
    let mut relay = JoinSet::new();
    setup.cluster.relay(&mut relay).await;
    let announced = setup.cluster.world.link_endpoint.lock().unwrap().clone();
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"before").await;
    // Nobody carries packets, and the control plane knows nothing new.
    setup.cluster.world.drop_packets.store(true, Ordering::Relaxed);
    stream.writer.send(&stdin(b"late")).await.unwrap();
    let silence = tokio::time::timeout(Duration::from_secs(8), stream.reader.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    setup.cluster.world.drop_packets.store(false, Ordering::Relaxed);
    assert_eq!(next(&mut stream).await, Some(stdin(b"late")));
    assert_eq!(*setup.cluster.world.link_endpoint.lock().unwrap(), announced);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_daemon_is_replaced_and_many_clients_start_one() {
    let setup = setup().await;
    let mut opening = JoinSet::new();
    for _ in 0..8 {
        let client = setup.daemon.client.clone();
        opening.spawn(async move { client.open(ping("web")).await.unwrap() });
    }
    let mut streams = opening.join_all().await;
    for stream in &mut streams {
        echo(stream, b"one of eight").await;
    }
    let status = setup.daemon.client.status().await.unwrap().unwrap();
    assert_eq!(status.streams, 8);
    assert_eq!(setup.daemon.log().matches("daemon ready").count(), 1);
    let pid = i32::try_from(status.pid).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(broke(&mut streams[0]).await);
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"again").await;
    assert_ne!(setup.daemon.client.status().await.unwrap().unwrap().pid, status.pid);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_version_is_replaced_while_its_streams_live_on() {
    use towline_proto::v1::{DaemonAnswer, DaemonRequest, daemon_request::Request};
    let setup = setup().await;
    let mut stream = setup.open().await.unwrap();
    echo(&mut stream, b"old").await;
    let old = setup.daemon.client.status().await.unwrap().unwrap().pid;
    // A client of another version asks.
    let socket = tokio::net::UnixStream::connect(setup.daemon.place.socket()).await.unwrap();
    let (read, write) = socket.into_split();
    let request = DaemonRequest {
        version: "99.0.0".into(),
        request: Some(Request::Open(ping("web"))),
        ..Default::default()
    };
    let mut writer = towline_streams::FrameWriter::new(write);
    writer.send_message(FrameKind::DaemonRequest, &request).await.unwrap();
    let mut reader = towline_streams::FrameReader::new(read);
    let answer: DaemonAnswer = reader.next().await.unwrap().unwrap().decode().unwrap();
    assert!(matches!(answer.answer, Some(towline_proto::v1::daemon_answer::Answer::Leaving(_))));
    let mut fresh = setup.open().await.unwrap();
    echo(&mut fresh, b"new").await;
    assert_ne!(setup.daemon.client.status().await.unwrap().unwrap().pid, old);
    echo(&mut stream, b"the old one still carries its stream").await;
    drop(stream);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_go_to_a_collector_where_there_is_one() {
    use tokio::io::AsyncReadExt;
    let setup = setup().await;
    let collector = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("OTEL_EXPORTER_OTLP_ENDPOINT=http://{}", collector.local_addr().unwrap());
    let client = setup.daemon.client_with(&[url]);
    let mut stream = client.open(ping("web")).await.unwrap();
    echo(&mut stream, b"traced").await;
    drop(stream);
    let accept = tokio::time::timeout(Duration::from_secs(60), collector.accept());
    let (mut connection, _) = accept
        .await
        .unwrap_or_else(|_| panic!("no export within a minute: {}", setup.daemon.log()))
        .unwrap();
    let mut preface = [0; 14];
    connection.read_exact(&mut preface).await.unwrap();
    assert_eq!(&preface, b"PRI * HTTP/2.0");
    // A collector that says nothing holds the daemon up for a bounded time only.
    assert!(client.shutdown().await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_cannot_start_says_why() {
    let setup = setup().await;
    let words = "no such thing as a daemon today";
    let program = ["sh".into(), "-c".into(), format!("echo {words} >&2")];
    let client = setup.daemon.client.clone().with_program(program.map(Into::into).to_vec());
    let error = client.open(ping("web")).await.unwrap_err();
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("did not start") && text.contains(words), "{text}");
    drop(setup.daemon);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_at_half_its_life_with_the_same_key() {
    let cluster = Cluster::new();
    let mut tasks = JoinSet::new();
    let endpoint = cluster.control_plane(&mut tasks).await;
    let dir = tempfile::tempdir().unwrap();
    // Issued five minutes back (for slow clocks), so a life of a minute is past its half.
    let config = cluster.context(dir.path(), &endpoint, Duration::from_secs(60));
    let config: towline_client::config::Config =
        toml::from_str(&std::fs::read_to_string(config).unwrap()).unwrap();
    let context = &config.context["c"];
    let before = std::fs::read_to_string(&context.cert_file).unwrap();
    let session = Session::open("c", context).await.unwrap();
    let after = std::fs::read_to_string(&context.cert_file).unwrap();
    assert_ne!(before, after);
    let spki = towline_link::identity::spki_sha256;
    assert_eq!(spki(&before).unwrap(), spki(&after).unwrap());
    let left = session.store().info().not_after.duration_since(std::time::SystemTime::now());
    assert!(left.unwrap() > DAY / 2);
    // A second one finds nothing to do, and one that comes too late says so.
    Session::open("c", context).await.unwrap();
    assert_eq!(std::fs::read_to_string(&context.cert_file).unwrap(), after);
    cluster.context(dir.path(), &endpoint, Duration::ZERO);
    let error = Session::open("c", context).await.unwrap_err().to_string();
    assert!(error.contains("has expired"), "{error}");
}

/// `cargo test --release -p towline-client --test daemon -- --ignored --nocapture measure`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a check"]
async fn measure_opening_and_bulk() {
    use std::io::Write;
    use std::time::Instant;
    const MIB: usize = 512;
    let setup = setup().await;
    let mut line = String::new();
    let mut opened: Vec<Duration> = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        let mut stream = setup.open().await.unwrap();
        echo(&mut stream, b"x").await;
        opened.push(start.elapsed());
    }
    opened.sort();
    line += &format!("open by name and first echo: p50 {:?}, p99 {:?}; ", opened[100], opened[198]);
    let OpenedStream { mut reader, mut writer, .. } = setup.open().await.unwrap();
    let piece = stdin(&vec![7; 64 << 10]);
    let start = Instant::now();
    let sender = tokio::spawn(async move {
        for _ in 0..MIB * 16 {
            writer.send(&piece).await.unwrap();
        }
        writer.finish().await.unwrap();
    });
    while reader.next().await.unwrap().is_some() {}
    sender.await.unwrap();
    let rate = MIB as f64 / start.elapsed().as_secs_f64();
    line += &format!("{rate:.0} MiB/s each way at once; ");
    let status = setup.daemon.client.status().await.unwrap().unwrap();
    let memory = std::fs::read_to_string(format!("/proc/{}/status", status.pid)).unwrap();
    for field in ["VmRSS", "VmHWM", "Threads"] {
        let found = memory.lines().find(|l| l.starts_with(field)).unwrap_or_default();
        line += &format!("{} ", found.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    writeln!(std::io::stderr(), "{line}").unwrap();
    setup.end().await;
}

/// With a cluster that runs (`tow up`) and a sandbox in it: `TOWLINE_MEASURE_SANDBOX=name cargo test
/// -p towline-client --test daemon -- --ignored --nocapture measure_pings`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a check"]
async fn measure_pings() {
    use std::io::Write;
    use std::time::Instant;
    let Some(name) = std::env::var_os("TOWLINE_MEASURE_SANDBOX") else {
        writeln!(std::io::stderr(), "SKIPPED: TOWLINE_MEASURE_SANDBOX is not set").unwrap();
        return;
    };
    let place = towline_client::daemon::place::Place::discover().unwrap();
    let program = vec![env!("CARGO_BIN_EXE_tow").into(), "daemon".into()];
    let client =
        towline_client::daemon::client::DaemonClient::new(place, "").unwrap().with_program(program);
    for guest in [false, true] {
        let mut took = Vec::new();
        for _ in 0..200 {
            let mut request = ping(name.to_str().unwrap());
            request.open.as_mut().unwrap().kind = Some(Kind::Ping(PingOpen { guest }));
            let start = Instant::now();
            let mut stream = client.open(request).await.unwrap();
            let answer = next(&mut stream).await;
            assert!(answer.as_ref().is_some_and(|f| f.is(FrameKind::Pong)), "{answer:?}");
            took.push(start.elapsed());
        }
        took.sort();
        let line = format!("ping, guest {guest}: p50 {:?}, p99 {:?}", took[100], took[198]);
        writeln!(std::io::stderr(), "{line}").unwrap();
    }
}

/// A server in the sandbox that answers each line with the same; returns its port.
async fn echo_server(tasks: &mut JoinSet<()>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

async fn ask(port: u32, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let port = u16::try_from(port).unwrap();
    let asking = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(question).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    };
    tokio::time::timeout(Duration::from_secs(60), asking).await.expect("an answer in time")
}

fn publish(port: u16, leased: bool) -> PublishPorts {
    PublishPorts {
        sandbox_id: vec![5; 16],
        sandbox_name: "web".into(),
        ports: vec![PortMapping { host: Vec::new(), host_port: 0, port: port.into() }],
        leased,
    }
}

impl Setup {
    async fn ports(&self) -> Vec<PublishedPort> {
        let all = ListPorts { sandbox_id: Vec::new() };
        self.daemon.client.list_ports(all).await.unwrap()
    }

    /// Its ports, once `wanted` holds of them.
    async fn ports_once(&self, wanted: impl Fn(&[PublishedPort]) -> bool) -> Vec<PublishedPort> {
        let mut seen = Vec::new();
        let asking = async {
            loop {
                seen = self.ports().await;
                if wanted(&seen) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), asking).await;
        assert!(waited.is_ok(), "the ports as wanted, not {seen:?}");
        seen
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_port_serves_many_and_comes_back_where_it_was_after_a_kill() {
    let setup = setup().await;
    let mut servers = JoinSet::new();
    let inside = echo_server(&mut servers).await;
    let (ports, _) = setup.daemon.client.publish(publish(inside, false)).await.unwrap();
    let port = ports[0].host_port;
    assert!(ports[0].problem.is_empty() && !ports[0].leased, "{ports:?}");
    let mut asking = JoinSet::new();
    for number in 0..100u32 {
        asking.spawn(async move {
            let question = number.to_le_bytes().repeat(1000);
            assert!(ask(port, &question).await.unwrap() == question);
        });
    }
    while let Some(asked) = asking.join_next().await {
        asked.unwrap();
    }
    // The count is what is open now: each of the hundred leaves it, if not before its last byte is
    // read here.
    let idle = setup.ports_once(|ports| ports.iter().all(|port| port.connections == 0)).await;
    assert_eq!(idle, ports);
    // Again is harmless.
    let (again, _) = setup.daemon.client.publish(publish(inside, false)).await.unwrap();
    assert_eq!(again, ports);

    setup.daemon.kill().await;
    assert!(ask(port, b"anybody?").await.is_err());
    let back = setup.ports().await;
    assert_eq!((back.len(), back[0].host_port), (1, port));
    assert_eq!(ask(port, b"still there").await.unwrap(), b"still there");

    let unpublish = UnpublishPorts { sandbox_id: vec![5; 16], ports: Vec::new() };
    assert!(setup.daemon.client.unpublish(unpublish).await.unwrap().is_empty());
    assert!(ask(port, b"gone?").await.is_err());
    setup.daemon.kill().await;
    assert!(setup.ports().await.is_empty());
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leased_port_ends_with_its_client_and_a_removed_sandboxs_by_itself() {
    let setup = setup().await;
    let mut servers = JoinSet::new();
    let inside = echo_server(&mut servers).await;
    let (ports, lease) = setup.daemon.client.publish(publish(inside, true)).await.unwrap();
    let port = ports[0].host_port;
    assert!(ports[0].leased);
    assert_eq!(ask(port, b"leased").await.unwrap(), b"leased");
    drop(lease);
    setup.ports_once(<[_]>::is_empty).await;
    assert!(ask(port, b"gone?").await.is_err());

    let (ports, _) = setup.daemon.client.publish(publish(inside, false)).await.unwrap();
    assert_eq!(ask(ports[0].host_port, b"kept").await.unwrap(), b"kept");
    setup.cluster.world.sandboxes.lock().unwrap().clear();
    setup.ports_once(<[_]>::is_empty).await;
    assert!(ask(ports[0].host_port, b"gone?").await.is_err());
    setup.end().await;
}
