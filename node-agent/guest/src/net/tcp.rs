//! Carries one TCP connection: asks the node, answers the workload accordingly, and passes bytes
//! both ways until both have ended. Bytes go from the connection's buffer into the stream's without
//! a stop, so only the two windows hold anything back.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use towline_proto::v1::egress_open::Target;
use towline_proto::v1::{EgressOpen, EgressProtocol};
use towline_streams::{MuxRecv, MuxSend};

use super::connection::Gone;
use super::egress::{self, Refused};
use super::flow::TcpFlow;
use super::network::{Shared, lock};
use super::packet::{self, Content, FlowKey, Unreachable};

/// Buffers per connection and direction, by how many there are: a few are fast, and all together
/// take at most some 100 MiB.
const BUFFERS: [(usize, usize); 3] = [(32, 256 << 10), (256, 64 << 10), (usize::MAX, 16 << 10)];
/// How long a workload that asks again and again is not answered after the node's attempt timed out:
/// Linux gives up after 127 s, and says ETIMEDOUT then.
const SILENCE: Duration = Duration::from_secs(130);
/// How long a workload may take to acknowledge the end.
const CLOSE_MAX: Duration = Duration::from_secs(60);

/// The buffer of a connection that comes after so many others.
pub(super) fn buffer(others: usize) -> usize {
    BUFFERS.iter().find(|(below, _)| others < *below).map_or(16 << 10, |(_, size)| *size)
}

/// A connection in the table. Dropping it resets what is not over, and takes it out.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) shared: Arc<Shared>,
    pub(super) key: FlowKey,
    pub(super) flow: Arc<TcpFlow>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.flow.abort(&self.shared);
        lock(&self.shared.tcp).remove(&self.key);
    }
}

/// Serves one connection to its end.
pub(super) async fn serve(listed: Listed, target: Target) {
    let Listed { shared, key, flow } = &listed;
    let open = EgressOpen {
        protocol: EgressProtocol::Tcp.into(),
        target: Some(target),
        port: key.target_port.into(),
    };
    match egress::open(shared, open).await {
        Ok((reader, writer)) => {
            let (receive, first) = reader.into_parts();
            flow.accept(shared, key);
            carry(shared, flow, writer.into_inner(), receive, first).await;
        }
        Err(refused) => refuse(shared, key, flow, refused).await,
    }
}

async fn refuse(shared: &Shared, key: &FlowKey, flow: &TcpFlow, refused: Refused) {
    let Some(packet) = flow.waiting() else { return };
    match refused {
        Refused::Reset => {
            if let Content::Tcp { segment, .. } = packet::read(&packet) {
                shared.send_if(packet::reset(key, &segment));
            }
        }
        Refused::Unreachable => shared.say_unreachable(&packet, Unreachable::Host),
        Refused::Silent => {
            flow.silence();
            tokio::time::sleep(SILENCE).await;
        }
    }
}

async fn carry(
    shared: &Shared,
    flow: &TcpFlow,
    mut send: MuxSend,
    mut receive: MuxRecv,
    first: BytesMut,
) {
    let both = async {
        tokio::try_join!(up(shared, flow, &mut send), down(shared, flow, &mut receive, first))
    };
    tokio::select! {
        both = both => {
            // Otherwise dropping what is left resets both sides.
            if both.is_ok() {
                close(shared, flow).await;
            }
        }
        () = flow.was_reset() => {}
        () = flow.keep_time(shared) => {}
    }
}

/// Waits for the workload to acknowledge the end.
pub(super) async fn close(shared: &Shared, flow: &TcpFlow) {
    let over = tokio::time::timeout(CLOSE_MAX, poll_fn(|cx| flow.poll_over(cx)));
    tokio::select! {
        _ = over => {}
        () = flow.keep_time(shared) => {}
    }
}

async fn up(shared: &Shared, flow: &TcpFlow, send: &mut MuxSend) -> Result<(), Gone> {
    loop {
        let mut broken = false;
        let moved = poll_fn(|cx| {
            flow.poll_receive(shared, cx, |cx, bytes| {
                Pin::new(&mut *send).poll_write(cx, bytes).map(|written| {
                    broken |= written.is_err();
                    written.unwrap_or(0)
                })
            })
        });
        let moved = moved.await?;
        if broken {
            return Err(Gone);
        }
        if moved == 0 {
            return send.shutdown().await.map_err(|_| Gone);
        }
    }
}

async fn down(
    shared: &Shared,
    flow: &TcpFlow,
    receive: &mut MuxRecv,
    mut first: BytesMut,
) -> Result<(), Gone> {
    loop {
        let mut broken = false;
        let moved = poll_fn(|cx| {
            flow.poll_send(shared, cx, |cx, room| {
                if !first.is_empty() {
                    let len = first.len().min(room.len());
                    first.copy_to_slice(&mut room[..len]);
                    return Poll::Ready(len);
                }
                let mut room = ReadBuf::new(room);
                Pin::new(&mut *receive).poll_read(cx, &mut room).map(|read| {
                    broken |= read.is_err();
                    room.filled().len()
                })
            })
        });
        let moved = moved.await?;
        if broken {
            return Err(Gone);
        }
        if moved == 0 {
            flow.finish(shared);
            return Ok(());
        }
    }
}
