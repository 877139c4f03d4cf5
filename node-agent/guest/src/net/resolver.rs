//! Answers DNS on the resolver's address, by datagrams and by connections. `dns` decides; here are
//! the waiting for the node, and the bounds.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;
use towline_proto::v1::LookupOpen;

use super::connection::Gone;
use super::dns::{self, Asked};
use super::egress;
use super::flow::TcpFlow;
use super::network::{Shared, lock};
use super::packet::{self, FlowKey};
use super::tcp::{Listed, close};

/// The port of DNS.
pub(super) const PORT: u16 = 53;
/// How long a client may keep a connection without asking (RFC 7766 wants seconds).
const IDLE_MAX: Duration = Duration::from_secs(20);

/// Answers a question that came by a datagram.
pub(super) async fn answer_datagram(shared: Arc<Shared>, key: FlowKey, question: Vec<u8>) {
    if let Some(answer) = answer(&shared, &question, false).await {
        shared.send_if(packet::datagram(&key, &answer));
    }
}

/// Serves a connection to the resolver: questions one after another, each behind its length.
pub(super) async fn serve_connection(listed: Listed) {
    let Listed { shared, key, flow } = &listed;
    flow.accept(shared, key);
    let mut client = Client { shared, flow };
    let serve = async {
        while let Ok(Ok(len)) = timeout(IDLE_MAX, client.read_u16()).await {
            let mut question = vec![0; usize::from(len)];
            match timeout(IDLE_MAX, client.read_exact(&mut question)).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => break,
            }
            let Some(answer) = answer(shared, &question, true).await else { break };
            let Ok(len) = u16::try_from(answer.len()) else { break };
            let mut message = len.to_be_bytes().to_vec();
            message.extend(answer);
            if !matches!(timeout(IDLE_MAX, client.write_all(&message)).await, Ok(Ok(()))) {
                break;
            }
        }
        flow.finish(shared);
        close(shared, flow).await;
    };
    tokio::select! {
        () = serve => {}
        () = flow.was_reset() => {}
        () = flow.keep_time(shared) => {}
    }
}

/// The answer to a message; `None`: it is no question.
async fn answer(shared: &Shared, question: &[u8], by_tcp: bool) -> Option<Vec<u8>> {
    let asked = dns::read(question, by_tcp, &lock(&shared.names));
    let query = match asked {
        Asked::Node(query) => query,
        Asked::Answer(answer) => return Some(answer),
        Asked::Nothing => return None,
    };
    let look_up = LookupOpen { name: query.name.clone(), record_type: query.record_type.into() };
    Some(match egress::look_up(shared, look_up).await {
        Some(said) => query.answer(&said, &mut lock(&shared.names)),
        None => query.failure(),
    })
}

/// A connection as a stream of bytes.
struct Client<'a> {
    shared: &'a Shared,
    flow: &'a TcpFlow,
}

impl AsyncRead for Client<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.flow.poll_receive(self.shared, cx, |_, bytes| {
            let len = bytes.len().min(into.remaining());
            into.put_slice(&bytes[..len]);
            Poll::Ready(len)
        });
        read.map(|read| read.map(drop).map_err(gone))
    }
}

impl AsyncWrite for Client<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.flow.poll_send(self.shared, cx, |_, room| {
            let len = bytes.len().min(room.len());
            room[..len].copy_from_slice(&bytes[..len]);
            Poll::Ready(len)
        });
        written.map(|written| written.map_err(gone))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flow.finish(self.shared);
        Poll::Ready(Ok(()))
    }
}

fn gone(Gone: Gone) -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}
