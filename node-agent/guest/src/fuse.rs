//! The local image: requests of the kernel's FUSE client go raw over a stream to the node, answers
//! come back raw. What the server would only refuse is answered here.
//!
//! Requests that are not answered when a session ends are asked again in the next; one that nobody
//! answers within a bound fails with EIO, so nothing hangs for ever on a node that is gone.

mod local;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{FuseOpen, StreamOpen, stream_open::Kind};
use towline_streams::{FrameReader, FrameWriter, MuxHandle, Priority};

use crate::nonblocking::NonBlocking;
use local::{Local, unique_of_answer};

/// How long a request may wait for its answer, over all sessions.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Requests that wait at once; beyond it the kernel's queue waits instead.
const OUTSTANDING_MAX: usize = 1024;
/// The largest request: a name, or what the kernel insists that a reader has room for.
const REQUEST_MAX: usize = 128 << 10;

/// What mounts the file system needs: the device, and to say that it is mounted.
#[derive(Debug)]
pub struct Device {
    fd: Arc<OwnedFd>,
    is_mounted: watch::Sender<bool>,
}

/// The requests of one mount.
#[derive(Debug)]
pub struct Requests {
    state: Mutex<State>,
    /// Something to send, or room for more.
    changed: Notify,
    room: Notify,
    device: Mutex<Option<Arc<NonBlocking>>>,
}

#[derive(Debug, Default)]
struct State {
    outstanding: BTreeMap<u64, Outstanding>,
    unsent: VecDeque<u64>,
}

#[derive(Debug)]
struct Outstanding {
    request: Bytes,
    since: Instant,
}

impl Device {
    /// Says that reading requests may begin.
    pub fn mounted(&self) {
        self.is_mounted.send_replace(true);
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens /dev/fuse and starts the task that reads it once it is mounted.
pub fn start() -> io::Result<(Device, Arc<Requests>)> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = Arc::new(rustix::fs::open("/dev/fuse", flags, Mode::empty())?);
    let requests = Arc::new(Requests {
        state: Mutex::default(),
        changed: Notify::new(),
        room: Notify::new(),
        device: Mutex::default(),
    });
    let (is_mounted, mut waits) = watch::channel(false);
    let (own, ours) = (fd.try_clone()?, Arc::clone(&requests));
    tokio::spawn(async move {
        // Read before it is mounted, the device only gives errors.
        if waits.wait_for(|mounted| *mounted).await.is_err() {
            return;
        }
        drop(waits);
        if let Ok(device) = NonBlocking::new(own) {
            let device = Arc::new(device);
            *lock(&ours.device) = Some(Arc::clone(&device));
            tokio::select! {
                () = ours.read_requests(&device) => {}
                () = ours.expire(&device) => {}
            }
        }
    });
    Ok((Device { fd, is_mounted }, requests))
}

impl Requests {
    /// Serves a session: opens the stream, asks again what is outstanding, then goes on.
    pub async fn serve(&self, mux: &MuxHandle) -> io::Result<()> {
        let (send, receive) = mux.open(Priority::Demand)?;
        let mut writer = FrameWriter::new(send);
        let open = StreamOpen { kind: Some(Kind::Fuse(FuseOpen {})), ..StreamOpen::default() };
        writer.send_message(FrameKind::Open, &open).await?;
        {
            let mut state = self.lock();
            state.unsent = state.outstanding.keys().copied().collect();
        }
        let mut reader = FrameReader::new(receive);
        tokio::select! {
            result = self.send(&mut writer) => result,
            result = self.receive(&mut reader) => result,
        }
    }

    async fn send<W: tokio::io::AsyncWrite + Unpin>(
        &self,
        writer: &mut FrameWriter<W>,
    ) -> io::Result<()> {
        loop {
            let changed = self.changed.notified();
            let next = {
                let mut state = self.lock();
                let unique = state.unsent.pop_front();
                unique.map(|unique| state.outstanding.get(&unique).map(|o| o.request.clone()))
            };
            match next {
                Some(Some(request)) => {
                    writer.send(&Frame::raw(FrameKind::FuseRequest, request)).await?;
                }
                // It expired before it was sent.
                Some(None) => {}
                None => changed.await,
            }
        }
    }

    async fn receive<R: tokio::io::AsyncRead + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
    ) -> io::Result<()> {
        while let Some(frame) = reader.next().await? {
            if !frame.is(FrameKind::FuseAnswer) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a frame of kind {} came on the local image's stream", frame.kind),
                ));
            }
            self.answer(&frame.body);
        }
        Ok(())
    }

    /// Gives an answer to the kernel; one that nobody waits for, or asked for twice, is dropped.
    fn answer(&self, answer: &[u8]) {
        let Some(unique) = unique_of_answer(answer) else { return };
        if self.lock().outstanding.remove(&unique).is_none() {
            return;
        }
        self.room.notify_one();
        let Some(device) = lock(&self.device).clone() else { return };
        let refused = device.try_write(answer).is_err_and(|error| {
            // ENOENT: the asking process was killed meanwhile.
            Errno::from_io_error(&error) != Some(Errno::NOENT)
        });
        if refused {
            let _ = device.try_write(&local::error(unique, Errno::IO));
        }
    }

    async fn read_requests(&self, device: &NonBlocking) {
        let mut buffer = vec![0; REQUEST_MAX];
        loop {
            self.wait_for_room().await;
            match device.read(&mut buffer).await {
                Ok(len) => self.take(device, &buffer[..len]),
                Err(error) => match Errno::from_io_error(&error) {
                    // ENOENT: the request was taken back while it was read.
                    Some(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                    // ENODEV: unmounted.
                    _ => return,
                },
            }
        }
    }

    async fn wait_for_room(&self) {
        loop {
            let room = self.room.notified();
            if self.lock().outstanding.len() < OUTSTANDING_MAX {
                return;
            }
            room.await;
        }
    }

    fn take(&self, device: &NonBlocking, request: &[u8]) {
        match local::look_at(request) {
            Local::Answer(answer) => {
                let _ = device.try_write(&answer);
            }
            Local::Nothing => {}
            Local::Forward(unique) => {
                let request = Bytes::copy_from_slice(request);
                let mut state = self.lock();
                state.outstanding.insert(unique, Outstanding { request, since: Instant::now() });
                state.unsent.push_back(unique);
                drop(state);
                self.changed.notify_one();
            }
        }
    }

    /// Fails what has waited for too long.
    async fn expire(&self, device: &NonBlocking) {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let expired: Vec<u64> = {
                let mut state = self.lock();
                let is_old = |o: &Outstanding| o.since.elapsed() >= ANSWER_MAX;
                let old: Vec<u64> =
                    state.outstanding.iter().filter(|(_, o)| is_old(o)).map(|(&u, _)| u).collect();
                old.iter().for_each(|unique| drop(state.outstanding.remove(unique)));
                old
            };
            for unique in expired {
                let _ = device.try_write(&local::error(unique, Errno::IO));
                self.room.notify_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
