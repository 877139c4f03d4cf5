//! Both drivers over one pipe that outlives the host: sessions start, die and start again.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that fails, fails here"
)]

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tokio::task::JoinHandle;
use towline_proto::mux::terms::{Terms, WINDOW_MIN};
use towline_streams::{GuestSession, Incoming, Marker, MuxDriver, MuxHandle, Priority};

const SECRET: [u8; 32] = [0x5e; 32];

/// A pipe's end that stays when the driver that holds it goes, as QEMU's port does.
#[derive(Clone)]
struct Kept(Arc<Mutex<DuplexStream>>);

impl AsyncRead for Kept {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock().unwrap()).poll_read(cx, into)
    }
}

impl AsyncWrite for Kept {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.lock().unwrap()).poll_write(cx, bytes)
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A guest that echoes every stream of every session and opens one that says which session it is.
fn echo_guest(io: DuplexStream) -> JoinHandle<()> {
    echo_guest_with(io, Terms::new(towline_proto::mux::WINDOW))
}

fn echo_guest_with(io: DuplexStream, terms: Terms) -> JoinHandle<()> {
    tokio::spawn(async move {
        let (mut sessions, driver) = MuxDriver::guest_with(io, Marker::BOOT, terms);
        let driver = tokio::spawn(driver);
        let mut number = 0u8;
        while let Some(GuestSession { handle, mut incoming }) = sessions.next().await {
            number += 1;
            if number == 1 {
                sessions.set_marker(Marker::new(SECRET));
            }
            let (mut send, _recv) = handle.open(Priority::Control).unwrap();
            tokio::spawn(async move {
                let _ = send.write_all(&[number]).await;
                let _ = send.shutdown().await;
            });
            tokio::spawn(async move {
                while let Some((send, recv)) = incoming.next().await {
                    tokio::spawn(echo(send, recv));
                }
            });
        }
        driver.abort();
    })
}

async fn echo(mut send: impl AsyncWrite + Unpin, mut recv: impl AsyncRead + Unpin) {
    if tokio::io::copy(&mut recv, &mut send).await.is_ok() {
        let _ = send.shutdown().await;
    }
}

fn host(io: Kept, nonce: u8) -> (MuxHandle, Incoming, JoinHandle<io::Result<()>>) {
    let markers = [Marker::new(SECRET), Marker::BOOT];
    let (handle, incoming, driver) = MuxDriver::host(io, &markers, [nonce; 16]);
    (handle, incoming, tokio::spawn(driver))
}

async fn session_number(incoming: &mut Incoming) -> u8 {
    let (_send, mut recv) = incoming.next().await.unwrap();
    recv.read_u8().await.unwrap()
}

async fn ask(handle: &MuxHandle, len: usize) {
    let (mut send, mut recv) = handle.open(Priority::Bulk).unwrap();
    let sent: Vec<u8> = (0..len).map(|at| (at % 253) as u8).collect();
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        send.write_all(&copy).await.unwrap();
        send.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    recv.read_to_end(&mut got).await.unwrap();
    writer.await.unwrap();
    assert!(got == sent, "{} of {} bytes came back, or others", got.len(), sent.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_work_both_ways_and_at_once() {
    let (near, far) = duplex(16 << 10);
    let _guest = echo_guest(far);
    let (handle, mut incoming, _driver) = host(Kept(Arc::new(Mutex::new(near))), 1);
    assert_eq!(session_number(&mut incoming).await, 1);
    let tasks: Vec<_> = (0..20)
        .map(|number| {
            let handle = handle.clone();
            tokio::spawn(async move { ask(&handle, number * 50_000).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_host_takes_over_wherever_the_old_one_was_cut() {
    let (near, far) = duplex(16 << 10);
    let _guest = echo_guest(far);
    let pipe = Kept(Arc::new(Mutex::new(near)));
    for round in 1..=20u8 {
        let (handle, mut incoming, driver) = host(pipe.clone(), round);
        assert_eq!(session_number(&mut incoming).await, round);
        ask(&handle, 3000).await;
        // Leave in the middle of a transfer in both directions.
        let (mut send, mut recv) = handle.open(Priority::Bulk).unwrap();
        let writer = tokio::spawn(async move {
            let mut total = 0u64;
            while send.write_all(&[round; 10_000]).await.is_ok() {
                total += 10_000;
            }
            total
        });
        let mut buffer = vec![0; 1000 * usize::from(round)];
        recv.read_exact(&mut buffer).await.unwrap();
        driver.abort();
        let error = recv.read_to_end(&mut buffer).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        assert!(writer.await.unwrap() > 0);
        assert!(handle.is_ended());
        assert!(handle.open(Priority::Bulk).is_err());
    }
}

/// A node agent of another build takes a running guest over: neither knows the other's window.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_with_other_windows_take_a_running_guest_over() {
    let (near, far) = duplex(16 << 10);
    let _guest = echo_guest_with(far, Terms::new(90_000));
    let pipe = Kept(Arc::new(Mutex::new(near)));
    for (round, window) in (1..).zip([WINDOW_MIN, 90_000, 1 << 20, 4 << 20]) {
        let markers = [Marker::new(SECRET), Marker::BOOT];
        let (handle, mut incoming, driver) =
            MuxDriver::host_with(pipe.clone(), &markers, [round; 16], Terms::new(window));
        let driver = tokio::spawn(driver);
        assert_eq!(session_number(&mut incoming).await, round);
        ask(&handle, 3 << 20).await;
        driver.abort();
        handle.ended().await;
    }
}

#[tokio::test]
async fn a_guest_that_breaks_the_rules_ends_the_session_with_a_reason() {
    let (near, mut far) = duplex(16 << 10);
    let (handle, _incoming, driver) = host(Kept(Arc::new(Mutex::new(near))), 9);
    let mut preamble = [0; 2 * (8 + 56)];
    far.read_exact(&mut preamble).await.unwrap();
    far.write_all(&preamble[8..64]).await.unwrap();
    far.write_all(&[1, 0, 0, 0, 2, 255, 255, 255]).await.unwrap();
    let error = driver.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(handle.ended().await.to_string().contains("which no peer sends"), "{error}");
}
