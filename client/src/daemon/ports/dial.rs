//! The way of one published port: from an accepted connection to a stream over the node's link.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::net::TcpStream;
use towline_link::stream::{LinkRecv, LinkSend};
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{StreamOpen, TcpOpen};
use towline_streams::Memory;

use super::Scope;
use crate::daemon::clusters::Clusters;
use crate::daemon::failure::DaemonFailure;
use crate::daemon::request;
use crate::ids;
use crate::tunnel::tcp::{self, Dialer, Ended, NoStream, Stream, Target};

/// Where the connections of a port go.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) clusters: Arc<Clusters>,
    pub(super) scope: Scope,
    pub(super) port: u16,
    pub(super) memory: Arc<Memory>,
    pub(super) connections: Arc<AtomicU32>,
}

impl Way {
    /// Carries one connection to its end.
    pub(super) async fn carry(&self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let Ok(id) = ids::random() else { return };
        self.connections.fetch_add(1, Ordering::Relaxed);
        let _count = Count(&self.connections);
        let target = Target::Port(self.port);
        match Box::pin(tcp::forward(self, id, &target, stream, &self.memory)).await {
            Ended::Closed => {}
            Ended::Refused(error) => {
                tracing::debug!(port = self.port, reason = error.message, "connection refused");
            }
            Ended::Lost(reason) => {
                tracing::info!(port = self.port, sandbox = %self.scope.sandbox, reason, "connection lost");
            }
        }
    }
}

/// Counts a connection until it ends, however it ends.
struct Count<'a>(&'a AtomicU32);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Dialer for Way {
    type Reader = LinkRecv;
    type Writer = LinkSend;

    async fn dial(
        &self,
        open: TcpOpen,
        anew: bool,
    ) -> Result<Stream<LinkRecv, LinkSend>, NoStream> {
        let open = StreamOpen { ticket: Vec::new(), kind: Some(Kind::Tcp(open)) };
        let cluster = self.clusters.get(&self.scope.config, &self.scope.context).await;
        let dialled = match cluster {
            Ok(cluster) => request::dial_sandbox(&cluster, self.scope.sandbox, &open, anew).await,
            Err(failure) => Err(failure),
        };
        let (stream, lease) = dialled.map_err(no_stream)?;
        Ok(Stream { reader: stream.reader, writer: stream.writer, held: Some(Box::new(lease)) })
    }
}

fn no_stream(failure: DaemonFailure) -> NoStream {
    NoStream { message: failure.message, code: failure.code, retry: failure.retry }
}
