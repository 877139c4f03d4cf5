//! One TCP connection of the workload, answered here: a `smoltcp` stack of its own, fed with packets
//! and asked for packets. Knows no clock, no device and no stream.
//!
//! One stack per connection, found by its addresses and ports, costs the same for the first packet
//! and with a thousand neighbours; a stack for all would look at each of them.

use std::task::{Context, Poll};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{RecvError, Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr, IpListenEndpoint};

use super::packet::{FlowKey, PACKET_MAX};

/// Takes a packet of `len` bytes, which `fill` writes.
pub(super) trait Outgoing {
    /// Sends one packet.
    fn packet(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8]));
}

/// A connection from its first segment on.
pub(super) struct Connection {
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    /// When the workload's side was last heard.
    heard: Duration,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("state", &self.state()).finish_non_exhaustive()
    }
}

/// How one side of a connection ended, when it was not by its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

impl Connection {
    /// Answers the packet that opens a connection. `seed` is random; `buffer` bytes are kept per
    /// direction, `now` is the time since some moment.
    pub(super) fn accept(
        key: &FlowKey,
        opening: &[u8],
        seed: u64,
        buffer: usize,
        now: Duration,
        out: &mut dyn Outgoing,
    ) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut pipe = Pipe { incoming: None, out };
        let mut interface = Interface::new(config, &mut pipe, instant(now));
        interface.update_ip_addrs(|addresses| {
            let whole = if key.target.is_ipv4() { 32 } else { 128 };
            let _ = addresses.push(IpCidr::new(key.target.into(), whole));
        });
        let new_buffer = || SocketBuffer::new(vec![0; buffer]);
        let mut socket = Socket::new(new_buffer(), new_buffer());
        // Its bytes come in large pieces from a stream, and the way is short: neither waiting for
        // more to send nor holding acknowledgements back gains anything.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let endpoint = IpListenEndpoint { addr: Some(key.target.into()), port: key.target_port };
        // Port 0, the only thing it refuses, is no flow.
        let _ = socket.listen(endpoint);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let socket = sockets.add(socket);
        let mut connection = Self { interface, sockets, socket, heard: now };
        connection.receive(opening, now, out);
        connection
    }

    /// Takes a packet of the workload.
    pub(super) fn receive(&mut self, packet: &[u8], now: Duration, out: &mut dyn Outgoing) {
        self.heard = now;
        self.run(Some(packet), now, out);
    }

    /// Sends what is due.
    pub(super) fn poll(&mut self, now: Duration, out: &mut dyn Outgoing) {
        self.run(None, now, out);
    }

    fn run(&mut self, incoming: Option<&[u8]>, now: Duration, out: &mut dyn Outgoing) {
        let mut pipe = Pipe { incoming, out };
        self.interface.poll(instant(now), &mut pipe, &mut self.sockets);
    }

    /// How long until something is due without a packet or a caller; `None`: nothing ever is.
    pub(super) fn due(&mut self, now: Duration) -> Option<Duration> {
        let delay = self.interface.poll_delay(instant(now), &self.sockets)?;
        Some(Duration::from_micros(delay.total_micros()))
    }

    /// Hands bytes of the workload to `take`, which says how many it took. `Ok(0)`: nothing follows.
    /// What was taken makes room, so `poll` is due.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<usize>,
    ) -> Poll<Result<usize, Gone>> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.socket);
        let taken = socket.recv(|bytes| {
            if bytes.is_empty() {
                return (0, None);
            }
            match take(cx, bytes) {
                Poll::Ready(len) => (len, Some(Poll::Ready(Ok(len)))),
                Poll::Pending => (0, Some(Poll::Pending)),
            }
        });
        match taken {
            Ok(Some(result)) => result,
            Ok(None) => {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            }
            Err(RecvError::Finished) => Poll::Ready(Ok(0)),
            // Before the handshake is over there is nothing yet.
            Err(RecvError::InvalidState) if socket.state() == State::SynReceived => {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            }
            Err(RecvError::InvalidState) => Poll::Ready(Err(Gone)),
        }
    }

    /// Lets `fill` write bytes for the workload, and says how many. `poll` is due then.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        mut fill: impl FnMut(&mut Context<'_>, &mut [u8]) -> Poll<usize>,
    ) -> Poll<Result<usize, Gone>> {
        let socket = self.sockets.get_mut::<Socket<'_>>(self.socket);
        if socket.state() == State::SynReceived {
            socket.register_send_waker(cx.waker());
            return Poll::Pending;
        }
        let sent = socket.send(|room| {
            if room.is_empty() {
                return (0, None);
            }
            match fill(cx, room) {
                Poll::Ready(len) => (len, Some(Poll::Ready(Ok(len)))),
                Poll::Pending => (0, Some(Poll::Pending)),
            }
        });
        match sent {
            Ok(Some(result)) => result,
            Ok(None) => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            Err(_) => Poll::Ready(Err(Gone)),
        }
    }

    /// Says that nothing follows what was sent.
    pub(super) fn finish(&mut self) {
        self.sockets.get_mut::<Socket<'_>>(self.socket).close();
    }

    /// Gives up: the workload gets a reset with the next `poll`.
    pub(super) fn abort(&mut self) {
        self.sockets.get_mut::<Socket<'_>>(self.socket).abort();
    }

    /// Waits until nothing has to be said any more. The workload has acknowledged everything then,
    /// or is gone; a late segment of it is answered by a reset, which does no harm.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_over() {
            return Poll::Ready(());
        }
        let socket = self.sockets.get_mut::<Socket<'_>>(self.socket);
        socket.register_recv_waker(cx.waker());
        socket.register_send_waker(cx.waker());
        Poll::Pending
    }

    /// Whether it is over.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state(), State::Closed | State::TimeWait)
    }

    /// How long the workload has owed an acknowledgement without any sign of life; zero if it owes
    /// none.
    pub(super) fn unheard(&self, now: Duration) -> Duration {
        let socket = self.sockets.get::<Socket<'_>>(self.socket);
        let closing = matches!(
            socket.state(),
            State::SynReceived | State::FinWait1 | State::Closing | State::LastAck
        );
        if closing || socket.send_queue() > 0 {
            now.saturating_sub(self.heard)
        } else {
            Duration::ZERO
        }
    }

    fn state(&self) -> State {
        self.sockets.get::<Socket<'_>>(self.socket).state()
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// At most one packet in, and packets out.
struct Pipe<'a> {
    incoming: Option<&'a [u8]>,
    out: &'a mut dyn Outgoing,
}

struct Incoming<'a>(&'a [u8]);

struct Packet<'a>(&'a mut dyn Outgoing);

impl Device for Pipe<'_> {
    type RxToken<'a>
        = Incoming<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Packet<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Packet<'_>)> {
        Some((Incoming(self.incoming.take()?), Packet(self.out)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Packet<'_>> {
        Some(Packet(self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = PACKET_MAX;
        // What comes through the device comes from this kernel's memory, not over a wire.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Packet<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let (mut f, mut result) = (Some(f), None);
        self.0.packet(len, &mut |bytes| result = f.take().map(|f| f(bytes)));
        result.expect("`Outgoing::packet` calls `fill` once")
    }
}
