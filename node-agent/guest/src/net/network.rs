//! Takes the workload's packets from the device and hands each to its connection or flow; begins
//! new ones. Owns the tables, and all tasks that serve what is in them.

use std::collections::HashMap;
use std::fmt::Debug;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use towline_proto::v1::egress_open::Target;
use towline_streams::MuxHandle;

use super::addresses::{self, Place};
use super::connection::Outgoing;
use super::device::Tun;
use super::flow::TcpFlow;
use super::names::Names;
use super::packet::{self, Content, FlowKey, PACKET_MAX, Segment, Unreachable};
use super::udp::UdpFlow;
use super::{resolver, tcp, udp};

/// Connections at once, waiting ones and closing ones too. The node allows a sandbox fewer; these
/// are more, so that it is the node that says so.
pub(super) const TCP_MAX: usize = 2048;
/// Flows of datagrams at once; beyond it the one that was silent for longest makes room.
pub(super) const UDP_MAX: usize = 512;
/// Questions to the resolver that wait for the node.
pub(super) const QUESTIONS_MAX: usize = 256;
/// Packets taken before the agent's other work gets its turn.
const BATCH: u32 = 32;

/// Where packets come from and go to.
pub trait Wire: Debug + Send + Sync {
    /// Reads one packet.
    fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>>;
    /// Sends one packet, or loses it.
    fn send(&self, packet: &[u8]);
}

impl Wire for Tun {
    fn poll_receive(&self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        Tun::poll_receive(self, cx, into)
    }

    fn send(&self, packet: &[u8]) {
        Tun::send(self, packet);
    }
}

/// The network of a sandbox. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

/// What all connections and flows know.
#[derive(Debug)]
pub(super) struct Shared {
    wire: Box<dyn Wire>,
    /// The packet that is being made: one at a time, so one buffer for all connections.
    scratch: Mutex<Vec<u8>>,
    start: Instant,
    pub(super) node: watch::Sender<Option<MuxHandle>>,
    pub(super) names: Mutex<Names>,
    pub(super) tcp: Mutex<HashMap<FlowKey, Arc<TcpFlow>>>,
    pub(super) udp: Mutex<HashMap<FlowKey, UdpFlow>>,
    pub(super) questions: Arc<Semaphore>,
}

impl Network {
    /// A network over this wire.
    pub fn new(wire: Box<dyn Wire>) -> Self {
        let shared = Arc::new(Shared {
            wire,
            scratch: Mutex::default(),
            start: Instant::now(),
            node: watch::Sender::new(None),
            names: Mutex::default(),
            tcp: Mutex::default(),
            udp: Mutex::default(),
            questions: Arc::new(Semaphore::new(QUESTIONS_MAX)),
        });
        Self { shared }
    }

    /// From now on the node is asked over this session; what waited for one goes on.
    pub fn set_session(&self, session: MuxHandle) {
        self.shared.node.send_replace(Some(session));
    }

    /// Serves the workload until the device fails. All tasks end with it.
    pub async fn run(&self) -> io::Error {
        let mut tasks = JoinSet::new();
        let mut buffer = vec![0; PACKET_MAX + 1];
        let mut batch = 0;
        loop {
            let received = tokio::select! {
                received = poll_fn(|cx| self.shared.wire.poll_receive(cx, &mut buffer)) => received,
                Some(_) = tasks.join_next() => continue,
            };
            match received {
                Ok(len) => self.shared.receive(&buffer[..len], &mut tasks),
                Err(error) => return error,
            }
            batch += 1;
            if batch == BATCH {
                batch = 0;
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Shared {
    /// Takes one packet of the workload.
    fn receive(self: &Arc<Self>, bytes: &[u8], tasks: &mut JoinSet<()>) {
        match packet::read(bytes) {
            Content::Tcp { key, segment } => self.receive_segment(key, &segment, bytes, tasks),
            Content::Udp { key, data } => self.receive_datagram(key, data, bytes, tasks),
            Content::Prohibited => self.say_unreachable(bytes, Unreachable::Prohibited),
            Content::Nothing => {}
        }
    }

    fn receive_segment(
        self: &Arc<Self>,
        key: FlowKey,
        segment: &Segment,
        bytes: &[u8],
        tasks: &mut JoinSet<()>,
    ) {
        let mut table = lock(&self.tcp);
        if let Some(flow) = table.get(&key).cloned() {
            drop(table);
            return flow.receive(self, segment, bytes);
        }
        let target = self.target(key.target);
        let is_resolver = matches!(target, Some(Target::Address(_)))
            && addresses::place(key.target) == Place::Resolver;
        let known = target.filter(|_| !is_resolver || key.target_port == resolver::PORT);
        match known {
            Some(target) if segment.opens && table.len() < TCP_MAX => {
                let buffer = tcp::buffer(table.len());
                let flow = Arc::new(TcpFlow::opening(bytes, buffer));
                table.insert(key, Arc::clone(&flow));
                let listed = tcp::Listed { shared: Arc::clone(self), key, flow };
                if is_resolver {
                    tasks.spawn(resolver::serve_connection(listed));
                } else {
                    tasks.spawn(tcp::serve(listed, target));
                }
            }
            _ => {
                drop(table);
                self.send_if(packet::reset(&key, segment));
            }
        }
    }

    fn receive_datagram(
        self: &Arc<Self>,
        key: FlowKey,
        data: &[u8],
        bytes: &[u8],
        tasks: &mut JoinSet<()>,
    ) {
        if addresses::place(key.target) == Place::Resolver {
            if key.target_port != resolver::PORT {
                return self.say_unreachable(bytes, Unreachable::Port);
            }
            // Beyond the bound a question is lost; the client asks again.
            if let Ok(permit) = Arc::clone(&self.questions).try_acquire_owned() {
                let answer = resolver::answer_datagram(Arc::clone(self), key, data.to_vec());
                tasks.spawn(async move {
                    answer.await;
                    drop(permit);
                });
            }
            return;
        }
        match self.target(key.target) {
            Some(target) => udp::receive(self, key, target, bytes, tasks),
            None => self.say_unreachable(bytes, Unreachable::Port),
        }
    }

    /// What to ask the node for; `None`: the address stands for nothing.
    fn target(&self, address: IpAddr) -> Option<Target> {
        match addresses::place(address) {
            Place::Name(number) => {
                lock(&self.names).name(number).map(|name| Target::Name(name.as_ref().into()))
            }
            Place::Resolver | Place::Real => Some(Target::Address(match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            })),
        }
    }

    /// The time, as connections know it.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Sends a packet that was made.
    pub(super) fn send_if(&self, packet: Option<Vec<u8>>) {
        if let Some(packet) = packet {
            self.wire.send(&packet);
        }
    }

    /// Tells the sender of a packet that it reaches nobody.
    pub(super) fn say_unreachable(&self, original: &[u8], why: Unreachable) {
        self.send_if(packet::unreachable(original, why));
    }
}

/// Packets of connections go straight to the device.
impl Outgoing for &Shared {
    fn packet(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8])) {
        let mut scratch = lock(&self.scratch);
        if scratch.len() < len {
            scratch.resize(len, 0);
        }
        fill(&mut scratch[..len]);
        self.wire.send(&scratch[..len]);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
