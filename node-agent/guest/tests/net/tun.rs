//! Over a real TUN device in a network namespace of its own, with this machine's TCP as the
//! workload: what `connect()` and sockets tell. Needs root.
#![expect(unsafe_code, reason = "a thread of its own enters a new network namespace")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use domain::base::iana::{Rcode, Rtype};
use domain::base::{Message, MessageBuilder, Name};
use domain::rdata::{A, Aaaa};
use rustix::thread::UnshareFlags;
use tokio::task::{JoinSet, spawn_blocking};
use towline_guest_agent::net::{self, Network, RESOLVER_V4, RESOLVER_V6};
use towline_proto::v1::egress_open::Target;

use crate::node::{
    self, BLOCKED, BYE, COUNT, ECHO, Notes, REFUSED, RESET, SOURCE, SOURCE_LEN, Session, TIMED_OUT,
    UNREACHABLE, WATCH, checksum, pattern, seen,
};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9));
/// A bound for what should take no time, on a machine where everything else runs too.
const BOUND: Duration = Duration::from_secs(60);

struct Sandbox {
    network: Network,
    notes: Arc<Notes>,
    session: Option<Session>,
    _tasks: JoinSet<()>,
}

/// Runs a test in a new network namespace with a network and a node.
fn in_sandbox(test: impl AsyncFnOnce(&mut Sandbox) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        if !enter_namespace() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let network = match net::start() {
                Ok(network) => network,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    eprintln!("SKIPPED: this machine has no TUN devices: {error}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let mut tasks = JoinSet::new();
            let running = network.clone();
            tasks.spawn(async move { drop(running.run().await) });
            let notes = Arc::default();
            let session = Some(node::connect(&network, &notes).await);
            test(&mut Sandbox { network, notes, session, _tasks: tasks }).await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// False, with a word why, where this process may not.
fn enter_namespace() -> bool {
    // SAFETY: no file descriptor is shared anew or lost; only this thread's network changes.
    match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        Ok(()) => true,
        Err(error) => {
            eprintln!("SKIPPED: a network namespace needs root: {error}");
            false
        }
    }
}

/// Runs what blocks, in the same namespace.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    spawn_blocking(work).await.unwrap()
}

fn connect(address: IpAddr, port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((address, port))?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.set_write_timeout(Some(BOUND))?;
    Ok(stream)
}

fn to_the_end(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// What every kind of target tells `connect()`.
fn check_truth(address: IpAddr) {
    let error = |port| connect(address, port).unwrap_err().kind();
    assert_eq!(error(BLOCKED), ErrorKind::ConnectionRefused);
    assert_eq!(error(REFUSED), ErrorKind::ConnectionRefused);
    assert_eq!(error(UNREACHABLE), ErrorKind::HostUnreachable);
    let target = SocketAddr::new(address, TIMED_OUT);
    let silent = TcpStream::connect_timeout(&target, Duration::from_millis(1500)).unwrap_err();
    assert_eq!(silent.kind(), ErrorKind::TimedOut);
    check_echo(address, 3);
}

fn check_echo(address: IpAddr, len: usize) {
    let mut stream = connect(address, ECHO).unwrap();
    let sent = pattern(len);
    let mut writer = stream.try_clone().unwrap();
    let bytes = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == sent, "{} of {len} bytes came back", got.len());
}

#[test]
fn connect_tells_the_truth() {
    in_sandbox(async |sandbox| {
        blocking(|| check_truth(V4)).await;
        blocking(|| check_truth(V6)).await;
        let nobody = Ipv4Addr::new(198, 19, 200, 200).into();
        let refused = blocking(move || connect(nobody, 80).unwrap_err()).await;
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let opened = sandbox.notes.opened.lock().unwrap();
        assert_eq!(opened.len(), 10, "each connection is asked for once: {opened:?}");
        assert_eq!(opened[0].target, Some(Target::Address(vec![203, 0, 113, 9])));
        assert!(matches!(&opened[9].target, Some(Target::Address(bytes)) if bytes.len() == 16));
    });
}

#[test]
fn each_side_may_end_first() {
    in_sandbox(async |sandbox| {
        let counted = blocking(|| {
            let mut stream = connect(V4, COUNT).unwrap();
            stream.write_all(&pattern(300_000)).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            String::from_utf8(to_the_end(stream)).unwrap()
        });
        let wanted = format!("300000 {}", checksum(0, &pattern(300_000)));
        assert_eq!(counted.await, wanted);
        blocking(|| {
            let mut stream = connect(V6, BYE).unwrap();
            let mut bye = Vec::new();
            stream.read_to_end(&mut bye).unwrap();
            assert_eq!(bye, b"bye");
            stream.write_all(&pattern(300_000)).unwrap();
        })
        .await;
        assert_eq!(seen(&sandbox.notes).await, wanted);
    });
}

#[test]
fn resets_pass_both_ways() {
    in_sandbox(async |sandbox| {
        let error = blocking(|| {
            let mut stream = connect(V4, RESET).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read(&mut [0; 8]).unwrap_err()
        });
        assert_eq!(error.await.kind(), ErrorKind::ConnectionReset);
        blocking(|| {
            let stream = connect(V4, WATCH).unwrap();
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        })
        .await;
        assert_eq!(seen(&sandbox.notes).await, ErrorKind::ConnectionReset.to_string());
    });
}

#[test]
fn many_bytes_and_many_connections_pass() {
    in_sandbox(async |_| {
        let (sum, sent) = blocking(|| {
            let mut stream = connect(V4, COUNT).unwrap();
            let bytes = pattern(SOURCE_LEN);
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            (String::from_utf8(to_the_end(stream)).unwrap(), checksum(0, &bytes))
        })
        .await;
        assert_eq!(sum, format!("{SOURCE_LEN} {sent}"));
        let got = blocking(|| checksum(0, &to_the_end(connect(V6, SOURCE).unwrap()))).await;
        assert_eq!(got, sent);
        // As many at once as a node allows a guest to open, with a little room.
        let count = 200.min(towline_proto::mux::GUEST_OPENED_MAX - 8);
        blocking(move || {
            let all: Vec<TcpStream> = (0..count).map(|_| connect(V4, ECHO).unwrap()).collect();
            for mut stream in &all {
                stream.write_all(b"hello").unwrap();
            }
            for mut stream in &all {
                let mut got = [0; 5];
                stream.read_exact(&mut got).unwrap();
                assert_eq!(&got, b"hello");
            }
        })
        .await;
    });
}

#[test]
fn datagrams_tell_the_truth() {
    in_sandbox(async |sandbox| {
        blocking(|| {
            for (own, address) in [("0.0.0.0:0", V4), ("[::]:0", V6)] {
                let socket = UdpSocket::bind(own).unwrap();
                socket.set_read_timeout(Some(BOUND)).unwrap();
                socket.connect((address, ECHO)).unwrap();
                for len in [0, 1, 1400, 9000, 65_000] {
                    let sent = pattern(len);
                    socket.send(&sent).unwrap();
                    let mut got = vec![0; 66_000];
                    let received = socket.recv(&mut got).unwrap();
                    assert!(got[..received] == sent, "{received} of {len}");
                }
                // What else is unreachable, Linux tells only those who ask for it (IP_RECVERR).
                let socket = UdpSocket::bind(own).unwrap();
                socket.set_read_timeout(Some(BOUND)).unwrap();
                socket.connect((address, BLOCKED)).unwrap();
                socket.send(b"x").unwrap();
                let error = socket.recv(&mut [0; 8]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
        })
        .await;
        assert_eq!(sandbox.notes.opened.lock().unwrap().len(), 4, "one stream per flow");
    });
}

fn question(name: &str, rtype: Rtype) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec().question();
    builder.header_mut().set_rd(true);
    builder.push((name.parse::<Name<Vec<u8>>>().unwrap(), rtype)).unwrap();
    builder.finish()
}

fn ask_by_udp(resolver: IpAddr, name: &str, rtype: Rtype) -> Message<Vec<u8>> {
    let own = if resolver.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(own).unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    socket.connect((resolver, 53)).unwrap();
    socket.send(&question(name, rtype)).unwrap();
    let mut answer = vec![0; 4096];
    let len = socket.recv(&mut answer).unwrap();
    answer.truncate(len);
    Message::from_octets(answer).unwrap()
}

/// Two questions over one connection.
fn ask_by_tcp(resolver: IpAddr, name: &str, rtypes: [Rtype; 2]) -> [Message<Vec<u8>>; 2] {
    let mut stream = connect(resolver, 53).unwrap();
    rtypes.map(|rtype| {
        let question = question(name, rtype);
        stream.write_all(&u16::try_from(question.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&question).unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut answer = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut answer).unwrap();
        Message::from_octets(answer).unwrap()
    })
}

fn address_in(answer: &Message<Vec<u8>>) -> Option<IpAddr> {
    let section = answer.answer().unwrap();
    let v4 = section.limit_to::<A>().next().map(|record| record.unwrap().data().addr().into());
    let v6 = section.limit_to::<Aaaa>().next().map(|record| record.unwrap().data().addr().into());
    v4.or(v6)
}

#[test]
fn names_lead_to_the_node_by_name() {
    in_sandbox(async |sandbox| {
        let (v4, v6) = blocking(|| {
            let v4 = address_in(&ask_by_udp(RESOLVER_V4.into(), "web.test.", Rtype::A)).unwrap();
            let by_tcp = ask_by_tcp(RESOLVER_V6.into(), "web.test.", [Rtype::AAAA, Rtype::A]);
            let [v6, again] = by_tcp.map(|answer| address_in(&answer));
            assert_eq!(again, Some(v4));
            assert_eq!(address_in(&ask_by_udp(RESOLVER_V6.into(), "v4.test.", Rtype::AAAA)), None);
            for (name, rcode) in
                [("missing.test.", Rcode::NXDOMAIN), ("refused.test.", Rcode::REFUSED)]
            {
                let answer = ask_by_udp(RESOLVER_V4.into(), name, Rtype::A);
                assert_eq!(answer.header().rcode(), rcode);
            }
            let cut = ask_by_udp(RESOLVER_V4.into(), "web.test.", Rtype::TXT);
            assert!(cut.header().tc(), "too long for a datagram");
            let [whole, _] = ask_by_tcp(RESOLVER_V4.into(), "web.test.", [Rtype::TXT, Rtype::A]);
            assert_eq!(whole.header_counts().ancount(), 6);
            (v4, v6.unwrap())
        })
        .await;
        blocking(move || [v4, v6].map(|address| check_echo(address, 1000))).await;
        for opened in sandbox.notes.opened.lock().unwrap().iter() {
            assert_eq!(opened.target, Some(Target::Name("web.test".into())));
        }
        // A new node knows nothing; the guest's table stays.
        drop(sandbox.session.take());
        let _session = node::connect(&sandbox.network, &sandbox.notes).await;
        blocking(move || {
            check_echo(v4, 1000);
            let again = ask_by_udp(RESOLVER_V4.into(), "web.test.", Rtype::A);
            assert_eq!(address_in(&again), Some(v4));
        })
        .await;
    });
}

#[test]
fn a_node_that_dies_resets_connections_and_new_ones_wait_for_the_next() {
    in_sandbox(async |sandbox| {
        let (opened, is_open) = mpsc::channel();
        let reading = spawn_blocking(move || {
            let mut stream = connect(V4, WATCH).unwrap();
            opened.send(()).unwrap();
            stream.read(&mut [0; 8]).unwrap_err().kind()
        });
        blocking(move || is_open.recv_timeout(BOUND).unwrap()).await;
        let session = sandbox.session.take().unwrap();
        session.handle.close();
        drop(session);
        assert_eq!(reading.await.unwrap(), ErrorKind::ConnectionReset);
        let waiting = spawn_blocking(|| check_echo(V4, 10));
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!waiting.is_finished());
        let _session = node::connect(&sandbox.network, &sandbox.notes).await;
        waiting.await.unwrap();
    });
}

#[test]
fn a_nested_namespace_is_served_the_same() {
    in_sandbox(async |_| {
        let Some(inner) = blocking(nested).await else { return };
        run("ip", &["addr", "add", "10.7.0.1/24", "dev", "veth-out"]);
        run("ip", &["link", "set", "veth-out", "up"]);
        run("ip", &["-6", "addr", "add", "fd00:7::1/64", "dev", "veth-out", "nodad"]);
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        // The inner one's own addresses arrive at the device, without translation.
        inner.send(Box::new(check_nested)).unwrap();
        blocking({
            let inner = inner.clone();
            move || inner.finish()
        })
        .await;
        let masquerade = ["-t", "nat", "-A", "POSTROUTING", "-o", "tow0", "-j", "MASQUERADE"];
        let masquerading = Command::new("iptables").args(masquerade).status();
        if !masquerading.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED: this kernel has no address translation (iptables)");
            return;
        }
        inner.send(Box::new(|| check_truth(V4))).unwrap();
        blocking(move || inner.finish()).await;
    });
}

fn check_nested() {
    check_truth(V4);
    check_truth(V6);
    check_echo(V4, 1_000_000);
    let answer = ask_by_udp(RESOLVER_V4.into(), "web.test.", Rtype::A);
    check_echo(address_in(&answer).unwrap(), 1000);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    socket.connect((V4, ECHO)).unwrap();
    socket.send(b"ping").unwrap();
    let mut got = [0; 8];
    assert_eq!(socket.recv(&mut got).unwrap(), 4);
}

type Work = Box<dyn FnOnce() + Send>;

/// A thread in a namespace behind a pair of Ethernet devices.
#[derive(Clone)]
struct Inner {
    work: mpsc::Sender<Work>,
    done: Arc<std::sync::Mutex<mpsc::Receiver<bool>>>,
}

impl Inner {
    fn send(&self, work: Work) -> Result<(), mpsc::SendError<Work>> {
        self.work.send(work)
    }

    fn finish(&self) {
        let done = self.done.lock().unwrap().recv_timeout(Duration::from_secs(300));
        assert_eq!(done, Ok(true), "see the panic above");
    }
}

fn nested() -> Option<Inner> {
    let (work, todo) = mpsc::channel::<Work>();
    let (says, done) = mpsc::channel();
    let (ready, thread) = mpsc::channel();
    std::thread::spawn(move || {
        if !enter_namespace() {
            return;
        }
        ready.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let set_up: Work = todo.recv().unwrap();
        set_up();
        says.send(true).unwrap();
        for work in todo {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            says.send(result.is_ok()).unwrap();
        }
    });
    let thread = thread.recv().ok()?.to_string();
    run("ip", &["link", "add", "veth-out", "type", "veth", "peer", "name", "veth-in"]);
    run("ip", &["link", "set", "veth-in", "netns", &thread]);
    let inner = Inner { work, done: Arc::new(done.into()) };
    inner
        .send(Box::new(|| {
            run("ip", &["addr", "add", "10.7.0.2/24", "dev", "veth-in"]);
            run("ip", &["link", "set", "veth-in", "up"]);
            run("ip", &["-6", "addr", "add", "fd00:7::2/64", "dev", "veth-in", "nodad"]);
            run("ip", &["route", "add", "default", "via", "10.7.0.1"]);
            run("ip", &["-6", "route", "add", "default", "via", "fd00:7::1"]);
        }))
        .unwrap();
    inner.finish();
    Some(inner)
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}: {status}");
}
