//! A connection of the workload as its packets and its task share it: held back until the node has
//! decided, then open, or passed over in silence.
//!
//! The lock is held for one short synchronous step.

use std::sync::Mutex;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;

use super::connection::{Connection, Gone};
use super::network::{Shared, lock};
use super::packet::{FlowKey, Segment};

/// A workload that answers nothing for so long while it should is gone (its network namespace was
/// removed, say).
const UNHEARD_MAX: Duration = Duration::from_secs(600);

/// One connection.
#[derive(Debug)]
pub(super) struct TcpFlow {
    state: Mutex<State>,
    /// Something is due earlier than the timer knows.
    earlier: Notify,
    /// The workload has reset the connection.
    reset: Notify,
    buffer: usize,
}

/// Opening -> Open, or Silent. It leaves the table to end.
#[derive(Debug)]
enum State {
    /// The newest packet that asks for it.
    Opening(Vec<u8>),
    Open(Box<Open>),
    Silent,
}

#[derive(Debug)]
struct Open {
    connection: Connection,
    /// When the timer will look next, as time since the start.
    armed: Option<Duration>,
}

impl TcpFlow {
    /// One that this packet asks for; `buffer` bytes per direction are for it.
    pub(super) fn opening(packet: &[u8], buffer: usize) -> Self {
        Self {
            state: Mutex::new(State::Opening(packet.to_vec())),
            earlier: Notify::new(),
            reset: Notify::new(),
            buffer,
        }
    }

    /// Takes a packet of the workload.
    pub(super) fn receive(&self, mut shared: &Shared, segment: &Segment, bytes: &[u8]) {
        let mut state = lock(&self.state);
        match &mut *state {
            // It asks again, maybe as another socket.
            State::Opening(packet) if segment.opens => {
                packet.clear();
                packet.extend_from_slice(bytes);
            }
            State::Opening(_) | State::Silent => {}
            State::Open(open) => {
                open.connection.receive(bytes, shared.now(), &mut shared);
                if segment.resets && open.connection.is_over() {
                    self.reset.notify_one();
                }
                self.arm(open, shared);
            }
        }
    }

    /// Answers the workload: the node said yes.
    pub(super) fn accept(&self, mut shared: &Shared, key: &FlowKey) {
        let mut state = lock(&self.state);
        if let State::Opening(packet) = &*state {
            let mut seed = [0; 8];
            // The kernel's generator is ready long before: the node gives entropy with the settings.
            let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
            let connection = Connection::accept(
                key,
                packet,
                u64::from_ne_bytes(seed),
                self.buffer,
                shared.now(),
                &mut shared,
            );
            *state = State::Open(Box::new(Open { connection, armed: None }));
        }
    }

    /// From now on the workload is not answered.
    pub(super) fn silence(&self) {
        *lock(&self.state) = State::Silent;
    }

    /// The packet that asked for it, while it waits.
    pub(super) fn waiting(&self) -> Option<Vec<u8>> {
        match &mut *lock(&self.state) {
            State::Opening(packet) => Some(std::mem::take(packet)),
            State::Open(_) | State::Silent => None,
        }
    }

    /// Waits until the workload has reset the connection.
    pub(super) async fn was_reset(&self) {
        self.reset.notified().await;
    }

    /// As [`Connection::poll_receive`], and tells the workload that there is room.
    pub(super) fn poll_receive(
        &self,
        shared: &Shared,
        cx: &mut Context<'_>,
        take: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<usize>,
    ) -> Poll<Result<usize, Gone>> {
        self.step(shared, |connection| connection.poll_receive(cx, take))
    }

    /// As [`Connection::poll_send`], and sends.
    pub(super) fn poll_send(
        &self,
        shared: &Shared,
        cx: &mut Context<'_>,
        fill: impl FnMut(&mut Context<'_>, &mut [u8]) -> Poll<usize>,
    ) -> Poll<Result<usize, Gone>> {
        self.step(shared, |connection| connection.poll_send(cx, fill))
    }

    /// Says that nothing follows.
    pub(super) fn finish(&self, mut shared: &Shared) {
        if let State::Open(open) = &mut *lock(&self.state) {
            open.connection.finish();
            open.connection.poll(shared.now(), &mut shared);
            self.arm(open, shared);
        }
    }

    /// Waits until the connection is over.
    pub(super) fn poll_over(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *lock(&self.state) {
            State::Open(open) => open.connection.poll_over(cx),
            State::Opening(_) | State::Silent => Poll::Ready(()),
        }
    }

    /// Resets what is not over.
    pub(super) fn abort(&self, mut shared: &Shared) {
        if let State::Open(open) = &mut *lock(&self.state)
            && !open.connection.is_over()
        {
            open.connection.abort();
            open.connection.poll(shared.now(), &mut shared);
        }
    }

    /// Keeps the connection's time: sends what is due. Ends when the workload was not heard for too
    /// long.
    pub(super) async fn keep_time(&self, shared: &Shared) {
        loop {
            let Some(due) = self.tick(shared) else { return };
            match due {
                Some(due) => tokio::select! {
                    () = tokio::time::sleep(due) => {}
                    () = self.earlier.notified() => {}
                },
                None => self.earlier.notified().await,
            }
        }
    }

    /// Sends what is due, and says how long until something is; `None`: it is stuck.
    fn tick(&self, mut shared: &Shared) -> Option<Option<Duration>> {
        let mut state = lock(&self.state);
        let State::Open(open) = &mut *state else { return Some(None) };
        let now = shared.now();
        open.connection.poll(now, &mut shared);
        if open.connection.unheard(now) > UNHEARD_MAX {
            return None;
        }
        let due = open.connection.due(now);
        open.armed = due.map(|due| now + due);
        Some(due)
    }

    fn step(
        &self,
        mut shared: &Shared,
        step: impl FnOnce(&mut Connection) -> Poll<Result<usize, Gone>>,
    ) -> Poll<Result<usize, Gone>> {
        let mut state = lock(&self.state);
        let State::Open(open) = &mut *state else { return Poll::Ready(Err(Gone)) };
        let result = step(&mut open.connection);
        if matches!(result, Poll::Ready(Ok(len)) if len > 0) {
            open.connection.poll(shared.now(), &mut shared);
            self.arm(open, shared);
        }
        result
    }

    /// Wakes the timer if something became due earlier than it looks.
    fn arm(&self, open: &mut Open, shared: &Shared) {
        let now = shared.now();
        if let Some(due) = open.connection.due(now).map(|due| now + due)
            && open.armed.is_none_or(|armed| due < armed)
        {
            open.armed = Some(due);
            self.earlier.notify_one();
        }
    }
}
