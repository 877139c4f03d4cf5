//! Carries datagrams: one stream of the node per flow (source and target with their ports), for as
//! long as something passes. What cannot be carried is lost, as on any way; what is refused is told
//! by an "unreachable" message, also for the datagrams that follow shortly.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::egress_open::Target;
use towline_proto::v1::{EgressOpen, EgressProtocol};
use towline_streams::{FrameReader, FrameWriter, MuxRecv, MuxSend};

use super::egress::{self, Refused};
use super::network::{Shared, UDP_MAX, lock};
use super::packet::{self, Content, FlowKey, Unreachable};

/// Datagrams of a flow that wait for the node, and their bytes: more are lost.
const WAITING_MAX: usize = 64;
const WAITING_BYTES_MAX: usize = 256 << 10;
/// Silence after which a flow is forgotten. The node's own bound is the same.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How long a refusal is repeated without asking the node again.
const REFUSED_FOR: Duration = Duration::from_secs(3);

/// A flow as the table knows it. Dropping it ends the flow.
#[derive(Debug)]
pub(super) struct UdpFlow {
    packets: mpsc::Sender<Vec<u8>>,
    state: Arc<FlowState>,
}

#[derive(Debug, Default)]
struct FlowState {
    /// When something passed last, in milliseconds since the start.
    used_ms: AtomicU64,
    waiting_bytes: AtomicUsize,
}

struct Flow {
    shared: Arc<Shared>,
    key: FlowKey,
    packets: mpsc::Receiver<Vec<u8>>,
    state: Arc<FlowState>,
}

/// Takes a packet that holds a datagram: into its flow, or a new one.
pub(super) fn receive(
    shared: &Arc<Shared>,
    key: FlowKey,
    target: Target,
    packet: &[u8],
    tasks: &mut JoinSet<()>,
) {
    let mut table = lock(&shared.udp);
    if let Some(flow) = table.get(&key)
        && !flow.packets.is_closed()
    {
        return flow.put(shared, packet);
    }
    table.retain(|_, flow| !flow.packets.is_closed());
    if table.len() >= UDP_MAX {
        let used = |flow: &UdpFlow| flow.state.used_ms.load(Ordering::Relaxed);
        let oldest = table.iter().min_by_key(|(_, flow)| used(flow)).map(|(key, _)| *key);
        oldest.map(|key| table.remove(&key));
    }
    let (sender, packets) = mpsc::channel(WAITING_MAX);
    let state = Arc::new(FlowState::default());
    let flow = UdpFlow { packets: sender, state: Arc::clone(&state) };
    flow.put(shared, packet);
    table.insert(key, flow);
    drop(table);
    let flow = Flow { shared: Arc::clone(shared), key, packets, state };
    tasks.spawn(flow.serve(target));
}

impl UdpFlow {
    fn put(&self, shared: &Shared, packet: &[u8]) {
        self.state.touch(shared);
        let waiting = self.state.waiting_bytes.fetch_add(packet.len(), Ordering::Relaxed);
        if waiting + packet.len() > WAITING_BYTES_MAX
            || self.packets.try_send(packet.to_vec()).is_err()
        {
            self.state.waiting_bytes.fetch_sub(packet.len(), Ordering::Relaxed);
        }
    }
}

impl FlowState {
    fn touch(&self, shared: &Shared) {
        let now = u64::try_from(shared.now().as_millis()).unwrap_or(u64::MAX);
        self.used_ms.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has passed for long enough.
    async fn idle(&self, shared: &Shared) {
        loop {
            let used = Duration::from_millis(self.used_ms.load(Ordering::Relaxed));
            let silent = shared.now().saturating_sub(used);
            match IDLE_MAX.checked_sub(silent) {
                Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
                _ => return,
            }
        }
    }
}

impl Flow {
    async fn serve(mut self, target: Target) {
        let open = EgressOpen {
            protocol: EgressProtocol::Udp.into(),
            target: Some(target),
            port: self.key.target_port.into(),
        };
        let refused = match egress::open(&self.shared, open).await {
            Ok((reader, writer)) => self.carry(reader, writer).await,
            Err(refused) => Some(refused),
        };
        match refused {
            Some(Refused::Reset) => self.refuse(Unreachable::Port).await,
            Some(Refused::Unreachable) => self.refuse(Unreachable::Host).await,
            Some(Refused::Silent) | None => {}
        }
        // It closes its end of the table's channel; the entry is taken out when it is met next.
    }

    /// Passes datagrams both ways until the flow is over; says when its target refused it.
    async fn carry(
        &mut self,
        mut reader: FrameReader<MuxRecv>,
        mut writer: FrameWriter<MuxSend>,
    ) -> Option<Refused> {
        let Self { shared, key, packets, state } = self;
        let up = async {
            while let Some(packet) = packets.recv().await {
                state.waiting_bytes.fetch_sub(packet.len(), Ordering::Relaxed);
                let Content::Udp { data, .. } = packet::read(&packet) else { continue };
                let frame = Frame::raw(FrameKind::EgressDatagram, Bytes::copy_from_slice(data));
                if writer.send(&frame).await.is_err() {
                    return;
                }
            }
        };
        let down = async {
            loop {
                match reader.next().await {
                    Ok(Some(frame)) if frame.is(FrameKind::EgressDatagram) => {
                        state.touch(shared);
                        shared.send_if(packet::datagram(key, &frame.body));
                    }
                    Ok(Some(frame)) => return Some(egress::refusal(&frame)),
                    Ok(None) | Err(_) => return None,
                }
            }
        };
        tokio::select! {
            refused = down => refused,
            () = up => None,
            () = state.idle(shared) => None,
        }
    }

    async fn refuse(&mut self, why: Unreachable) {
        let answer = async {
            while let Some(packet) = self.packets.recv().await {
                self.state.waiting_bytes.fetch_sub(packet.len(), Ordering::Relaxed);
                self.shared.say_unreachable(&packet, why);
            }
        };
        let _ = tokio::time::timeout(REFUSED_FOR, answer).await;
    }
}
