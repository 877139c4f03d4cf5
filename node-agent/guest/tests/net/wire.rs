//! Over a made-up wire: what packets the workload gets for its packets.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4Message, Icmpv4Packet, IpAddress, IpProtocol, IpRepr, Ipv4Packet, TcpControl, TcpPacket,
    TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use towline_guest_agent::net::{Network, RESOLVER_V4, Wire};

use crate::node::{self, BLOCKED, ECHO, Notes, REFUSED, Session, TIMED_OUT, UNREACHABLE};

const OWN: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const TARGET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

#[derive(Debug)]
struct Fake {
    packets: Mutex<mpsc::UnboundedReceiver<Vec<u8>>>,
    sent: mpsc::UnboundedSender<Vec<u8>>,
}

impl Wire for Fake {
    fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<std::io::Result<usize>> {
        let packet = std::task::ready!(self.packets.lock().unwrap().poll_recv(cx));
        let packet = packet.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        into[..packet.len()].copy_from_slice(&packet);
        Poll::Ready(Ok(packet.len()))
    }

    fn send(&self, packet: &[u8]) {
        let _ = self.sent.send(packet.to_vec());
    }
}

struct Workload {
    network: Network,
    packets: mpsc::UnboundedSender<Vec<u8>>,
    sent: mpsc::UnboundedReceiver<Vec<u8>>,
    notes: Arc<Notes>,
    _tasks: JoinSet<()>,
}

impl Workload {
    fn new() -> Self {
        let (packets, taken) = mpsc::unbounded_channel();
        let (sender, sent) = mpsc::unbounded_channel();
        let network = Network::new(Box::new(Fake { packets: Mutex::new(taken), sent: sender }));
        let mut tasks = JoinSet::new();
        let running = network.clone();
        tasks.spawn(async move { drop(running.run().await) });
        Self { network, packets, sent, notes: Arc::default(), _tasks: tasks }
    }

    async fn session(&self) -> Session {
        node::connect(&self.network, &self.notes).await
    }

    async fn next(&mut self) -> Vec<u8> {
        let next = tokio::time::timeout(Duration::from_secs(60), self.sent.recv());
        next.await.expect("a packet in time").unwrap()
    }

    fn tcp(&self, port: u16, control: TcpControl, seq: i32, ack: Option<i32>, payload: &[u8]) {
        self.tcp_to(TARGET, port, control, seq, ack, payload);
    }

    fn tcp_to(
        &self,
        target: Ipv4Addr,
        port: u16,
        control: TcpControl,
        seq: i32,
        ack: Option<i32>,
        payload: &[u8],
    ) {
        let repr = TcpRepr {
            src_port: 40_000,
            dst_port: port,
            control,
            seq_number: TcpSeqNumber(seq),
            ack_number: ack.map(TcpSeqNumber),
            window_len: 64_000,
            window_scale: None,
            max_seg_size: (control == TcpControl::Syn).then_some(1460),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let (from, to) = (IpAddress::from(OWN), IpAddress::from(target));
        let packet = ip(from, to, IpProtocol::Tcp, repr.buffer_len(), |bytes| {
            let mut packet = TcpPacket::new_unchecked(bytes);
            repr.emit(&mut packet, &from, &to, &ChecksumCapabilities::default());
        });
        self.packets.send(packet).unwrap();
    }

    fn udp(&self, target: Ipv4Addr, port: u16, data: &[u8]) {
        let repr = UdpRepr { src_port: 40_000, dst_port: port };
        let (from, to) = (IpAddress::from(OWN), IpAddress::from(target));
        let packet = ip(from, to, IpProtocol::Udp, 8 + data.len(), |bytes| {
            let mut packet = UdpPacket::new_unchecked(bytes);
            let capabilities = ChecksumCapabilities::default();
            let fill = |into: &mut [u8]| into.copy_from_slice(data);
            repr.emit(&mut packet, &from, &to, data.len(), fill, &capabilities);
        });
        self.packets.send(packet).unwrap();
    }
}

fn ip(
    from: IpAddress,
    to: IpAddress,
    protocol: IpProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let repr = IpRepr::new(from, to, protocol, len, 64);
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut bytes[..], &ChecksumCapabilities::default());
    fill(&mut bytes[repr.header_len()..]);
    bytes
}

/// Reads a segment to the workload; its checksums must be right.
fn segment(packet: &[u8]) -> TcpRepr<'_> {
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    assert!(ip.verify_checksum());
    let (from, to) = (IpAddress::from(ip.src_addr()), IpAddress::from(ip.dst_addr()));
    let packet = TcpPacket::new_checked(&packet[20..]).unwrap();
    TcpRepr::parse(&packet, &from, &to, &ChecksumCapabilities::default()).unwrap()
}

fn unreachable_code(packet: &[u8]) -> u8 {
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    assert_eq!(IpAddr::from(ip.dst_addr()), IpAddr::from(OWN));
    let message = Icmpv4Packet::new_checked(&packet[20..]).unwrap();
    assert_eq!(message.msg_type(), Icmpv4Message::DstUnreachable);
    assert!(message.verify_checksum());
    message.msg_code()
}

#[tokio::test]
async fn connections_get_the_nodes_answer() {
    let mut workload = Workload::new();
    let _session = workload.session().await;
    for port in [BLOCKED, REFUSED] {
        workload.tcp(port, TcpControl::Syn, 100, None, &[]);
        let packet = workload.next().await;
        let reset = segment(&packet);
        assert_eq!((reset.control, reset.ack_number), (TcpControl::Rst, Some(TcpSeqNumber(101))));
    }
    workload.tcp(UNREACHABLE, TcpControl::Syn, 100, None, &[]);
    assert_eq!(unreachable_code(&workload.next().await), 1, "no route to host");
    // Not answered at all, however often it is asked; the next answer is another one's.
    for _ in 0..3 {
        workload.tcp(TIMED_OUT, TcpControl::Syn, 100, None, &[]);
    }
    workload.tcp(ECHO, TcpControl::None, 5, Some(77), b"late");
    let packet = workload.next().await;
    let reset = segment(&packet);
    assert_eq!((reset.src_port, reset.control), (ECHO, TcpControl::Rst), "no such connection");
    assert_eq!(reset.seq_number, TcpSeqNumber(77));
    workload.tcp_to(Ipv4Addr::new(198, 19, 7, 7), 80, TcpControl::Syn, 1, None, &[]);
    assert_eq!(segment(&workload.next().await).control, TcpControl::Rst, "no name has it");
    let opened = workload.notes.opened.lock().unwrap();
    assert_eq!(opened.len(), 4, "each is asked once: {opened:?}");
}

#[tokio::test]
async fn a_connection_opens_when_the_node_is_there_and_carries_bytes() {
    let mut workload = Workload::new();
    workload.tcp(ECHO, TcpControl::Syn, 100, None, &[]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(workload.sent.try_recv().is_err(), "nothing is answered before the node has said so");
    let session = workload.session().await;
    let packet = workload.next().await;
    let answer = segment(&packet);
    assert_eq!((answer.control, answer.ack_number), (TcpControl::Syn, Some(TcpSeqNumber(101))));
    let ours = answer.seq_number.0.wrapping_add(1);
    workload.tcp(ECHO, TcpControl::None, 101, Some(ours), &[]);
    workload.tcp(ECHO, TcpControl::Psh, 101, Some(ours), b"hello");
    let (mut got, mut acknowledged) = (Vec::new(), 0);
    while got.len() < 5 || acknowledged < 106 {
        let packet = workload.next().await;
        let answer = segment(&packet);
        got.extend_from_slice(answer.payload);
        acknowledged = answer.ack_number.unwrap().0;
    }
    assert_eq!(got, b"hello");
    // The node dies: so does the connection.
    workload.tcp(ECHO, TcpControl::None, 106, Some(ours.wrapping_add(5)), &[]);
    session.handle.close();
    drop(session);
    loop {
        let packet = workload.next().await;
        if segment(&packet).control == TcpControl::Rst {
            break;
        }
    }
}

#[tokio::test]
async fn datagrams_pass_and_are_refused() {
    let mut workload = Workload::new();
    let _session = workload.session().await;
    workload.udp(TARGET, ECHO, b"ping");
    let packet = workload.next().await;
    assert_eq!(&packet[28..], b"ping");
    let udp = UdpPacket::new_checked(&packet[20..]).unwrap();
    assert_eq!((udp.src_port(), udp.dst_port()), (ECHO, 40_000));
    assert!(udp.verify_checksum(&TARGET.into(), &OWN.into()));
    for _ in 0..2 {
        workload.udp(TARGET, REFUSED, b"ping");
        assert_eq!(unreachable_code(&workload.next().await), 3, "port unreachable");
    }
    workload.udp(TARGET, UNREACHABLE, b"ping");
    assert_eq!(unreachable_code(&workload.next().await), 1);
    assert_eq!(workload.notes.opened.lock().unwrap().len(), 3, "a refusal is remembered");
    workload.udp(RESOLVER_V4, 54, b"ping");
    assert_eq!(unreachable_code(&workload.next().await), 3, "only DNS is there");
}

#[tokio::test]
async fn other_packets_are_prohibited_or_passed_over() {
    let mut workload = Workload::new();
    let _session = workload.session().await;
    let (from, to) = (IpAddress::from(OWN), IpAddress::from(TARGET));
    let ping = ip(from, to, IpProtocol::Icmp, 8, |bytes| bytes[0] = 8);
    let sctp = ip(from, to, IpProtocol::from(132), 8, |_| {});
    for packet in [ping, sctp] {
        workload.packets.send(packet).unwrap();
        assert_eq!(unreachable_code(&workload.next().await), 13, "prohibited");
    }
    let group = IpAddress::from(Ipv4Addr::new(224, 0, 0, 22));
    let reply = ip(from, to, IpProtocol::Icmp, 8, |_| {});
    for packet in
        [vec![], vec![0x45], vec![0; 40], ip(from, group, IpProtocol::Igmp, 8, |_| {}), reply]
    {
        workload.packets.send(packet).unwrap();
    }
    workload.udp(TARGET, ECHO, b"last");
    assert_eq!(&workload.next().await[28..], b"last", "nothing was said about the others");
}
