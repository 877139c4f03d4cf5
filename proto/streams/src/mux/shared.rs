//! What the driver and the handles of one session share: the sans-IO state and who waits for what.
//!
//! The lock is held for one short synchronous step. Wakers are called after it is released.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use towline_proto::mux::terms::Terms;
use towline_proto::mux::{End, HalfError, Mux, MuxError, Priority, Read, StreamId};

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mux: Mux,
    readers: BTreeMap<StreamId, Waker>,
    writers: BTreeMap<StreamId, Waker>,
    driver: Option<Waker>,
    accepting: Option<Waker>,
    end_waiters: Vec<Waker>,
    ended: Option<(io::ErrorKind, String)>,
}

impl Shared {
    pub(super) fn new(end: End, ours: Terms) -> Self {
        let state = State {
            mux: Mux::new(end, ours),
            readers: BTreeMap::new(),
            writers: BTreeMap::new(),
            driver: None,
            accepting: None,
            end_waiters: Vec::new(),
            ended: None,
        };
        Self { state: Mutex::new(state) }
    }

    // ---- for handles ----

    pub(super) fn open(&self, priority: Priority) -> io::Result<StreamId> {
        let mut state = self.lock();
        state.check()?;
        state
            .mux
            .open(priority)
            .map_err(|error| io::Error::new(io::ErrorKind::QuotaExceeded, error))
    }

    pub(super) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<Option<StreamId>> {
        let mut state = self.lock();
        if state.ended.is_some() {
            return Poll::Ready(None);
        }
        match state.mux.accept() {
            Some((id, _)) => Poll::Ready(Some(id)),
            None => {
                state.accepting = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        id: StreamId,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        state.check()?;
        let read = state.mux.read(id, into).map_err(half_error)?;
        let driver = state.driver_if_output();
        let result = match read {
            Read::Data(len) => Poll::Ready(Ok(len)),
            Read::End => Poll::Ready(Ok(0)),
            Read::Pending => {
                state.readers.insert(id, cx.waker().clone());
                Poll::Pending
            }
        };
        drop(state);
        wake(driver);
        result
    }

    /// Writes as much as there is room for of all the slices.
    pub(super) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        id: StreamId,
        slices: &[&[u8]],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        state.check()?;
        let mut total = 0;
        for slice in slices {
            let taken = state.mux.write(id, slice).map_err(half_error)?;
            total += taken;
            if taken < slice.len() {
                break;
            }
        }
        if total == 0 && slices.iter().any(|slice| !slice.is_empty()) {
            state.writers.insert(id, cx.waker().clone());
            return Poll::Pending;
        }
        let driver = state.driver_if_output();
        drop(state);
        wake(driver);
        Poll::Ready(Ok(total))
    }

    /// Sends the end, and waits until everything has been handed to the pipe.
    pub(super) fn poll_finish(&self, cx: &mut Context<'_>, id: StreamId) -> Poll<io::Result<()>> {
        let mut state = self.lock();
        state.check()?;
        state.mux.finish(id).map_err(half_error)?;
        if state.mux.is_finished(id).map_err(half_error)? {
            return Poll::Ready(Ok(()));
        }
        state.writers.insert(id, cx.waker().clone());
        let driver = state.driver_if_output();
        drop(state);
        wake(driver);
        Poll::Pending
    }

    pub(super) fn reset(&self, id: StreamId, code: u32) {
        self.step(|state| state.mux.reset(id, code));
    }

    pub(super) fn release_sender(&self, id: StreamId) {
        self.step(|state| {
            state.writers.remove(&id);
            state.mux.release_sender(id);
        });
    }

    pub(super) fn release_receiver(&self, id: StreamId) {
        self.step(|state| {
            state.readers.remove(&id);
            state.mux.release_receiver(id);
        });
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    pub(super) fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let mut state = self.lock();
        match state.check() {
            Err(error) => Poll::Ready(error),
            Ok(()) => {
                if !state.end_waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
                    state.end_waiters.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    // ---- for the driver ----

    /// The other end has said its terms.
    pub(super) fn agree(&self, peer: Terms) {
        self.step(|state| state.mux.agree(peer));
    }

    /// Takes bytes from the pipe.
    pub(super) fn receive(&self, bytes: Bytes) -> Result<(), MuxError> {
        let mut state = self.lock();
        let result = state.mux.receive(bytes);
        let wakers = state.take_changed();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        result
    }

    /// Fills `out`; when there is nothing, the driver is woken once there is.
    pub(super) fn transmit(&self, cx: &mut Context<'_>, out: &mut BytesMut, limit: usize) {
        let mut state = self.lock();
        state.mux.transmit(out, limit);
        let wakers = state.take_changed();
        if !state.driver.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.driver = Some(cx.waker().clone());
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Fails all handles from now on. The first reason counts.
    pub(super) fn end(&self, kind: io::ErrorKind, why: &str) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.ended = Some((kind, why.to_owned()));
        }
        let mut wakers: Vec<Waker> = std::mem::take(&mut state.readers).into_values().collect();
        wakers.extend(std::mem::take(&mut state.writers).into_values());
        wakers.extend(state.accepting.take());
        wakers.extend(state.driver.take());
        wakers.append(&mut state.end_waiters);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Why the session is over, if it is.
    pub(super) fn error(&self) -> Option<io::Error> {
        self.lock().check().err()
    }

    fn step(&self, step: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        step(&mut state);
        let driver = state.driver_if_output();
        drop(state);
        wake(driver);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self) -> io::Result<()> {
        match &self.ended {
            Some((kind, why)) => Err(io::Error::new(*kind, why.clone())),
            None => Ok(()),
        }
    }

    fn driver_if_output(&self) -> Option<Waker> {
        if self.mux.has_output() { self.driver.clone() } else { None }
    }

    fn take_changed(&mut self) -> Vec<Waker> {
        let mut wakers = Vec::new();
        while let Some(id) = self.mux.next_changed() {
            wakers.extend(self.readers.remove(&id));
            wakers.extend(self.writers.remove(&id));
        }
        if self.mux.has_accepted() {
            wakers.extend(self.accepting.take());
        }
        wakers
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

fn half_error(error: HalfError) -> io::Error {
    let kind = match error {
        HalfError::Reset(_) => io::ErrorKind::ConnectionReset,
        HalfError::Stopped(_) | HalfError::Closed => io::ErrorKind::BrokenPipe,
    };
    io::Error::new(kind, error)
}
