//! The nodes' sessions: reports in, directives out, each on its own task.

use std::pin::Pin;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use towline_control_core::{Input, Role, SessionId};
use towline_link::peer::Peer;
use towline_link::rpc::NodeUplink;
use towline_proto::limits::NODE_LEASE;
use towline_proto::v1::{self, node_report::Report};
use tracing::{debug, info};

use super::{Service, caller, peer};
use crate::driver::Handle;

type DirectiveStream = Pin<Box<dyn Stream<Item = Result<v1::NodeDirective, Status>> + Send>>;

/// A node registers at once, or is not one.
const REGISTER_MAX: Duration = Duration::from_secs(10);
/// A session that says nothing for so long is over, whatever its connection thinks.
const SILENCE_MAX: Duration = Duration::from_secs(NODE_LEASE.as_secs() * 3);

#[tonic::async_trait]
impl NodeUplink for Service {
    type SessionStream = DirectiveStream;

    async fn session(
        &self,
        request: Request<Streaming<v1::NodeReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = peer(&request)?;
        let mut reports = request.into_inner();
        let node = register(&peer, &mut reports).await?;
        let (id, directives) = self.core.open_session(node).await?;
        let core = self.core.clone();
        let until = life(&peer);
        let reader = tokio::spawn(async move {
            tokio::select! {
                () = read_reports(&core, id, reports) => {}
                () = tokio::time::sleep(until) => info!(session = id.0, "certificate ended"),
            }
            let _ = core.report(Input::CloseSession(id)).await;
        });
        let ends = EndsWith { reader: reader.abort_handle(), core: self.core.clone(), id };
        let stream = ReceiverStream::new(directives).flat_map(move |batch| {
            let _held = &ends;
            let items: Vec<_> = match batch {
                Ok(directives) => directives.into_iter().map(Ok).collect(),
                Err(status) => vec![Err(status)],
            };
            futures_util::stream::iter(items)
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Ends the session in the core when the stream of its directives is dropped.
struct EndsWith {
    reader: tokio::task::AbortHandle,
    core: Handle,
    id: SessionId,
}

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.reader.abort();
        let (core, id) = (self.core.clone(), self.id);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { core.report(Input::CloseSession(id)).await });
        }
    }
}

/// Reads the first report, which says who the node is; its certificate must agree.
async fn register(
    peer: &Peer,
    reports: &mut Streaming<v1::NodeReport>,
) -> Result<v1::RegisterNode, Status> {
    let caller = caller(peer)?;
    let first = tokio::time::timeout(REGISTER_MAX, reports.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the node did not register"))??;
    let Some(v1::NodeReport { report: Some(Report::Register(mut node)) }) = first else {
        return Err(Status::invalid_argument("the first report must be `register`"));
    };
    match caller.role {
        Role::Node if node.name.is_empty() => node.name = caller.name,
        Role::Node if node.name == caller.name => {}
        Role::Node => {
            return Err(Status::permission_denied(format!(
                "the certificate is of node `{}`, not of `{}`",
                caller.name,
                node.name.escape_debug()
            )));
        }
        // The machine's owner, over the admin socket.
        Role::Operator if peer.uid.is_some() => {}
        _ => return Err(Status::permission_denied("only a node may open a node's session")),
    }
    towline_link::identity::check_name(&node.name)
        .map_err(|error| Status::invalid_argument(format!("the node's name: {error}")))?;
    if node.drivers.len() > 32 || node.link_endpoint.len() > 512 || node.version.len() > 128 {
        return Err(Status::invalid_argument("the node says too much about itself"));
    }
    Ok(node)
}

/// How long the node's certificate still holds: a session does not outlive it.
fn life(peer: &Peer) -> Duration {
    let Some(not_after) = peer.not_after else { return Duration::from_secs(24 * 3600) };
    not_after.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO)
}

async fn read_reports(core: &Handle, id: SessionId, mut reports: Streaming<v1::NodeReport>) {
    loop {
        let report = match tokio::time::timeout(SILENCE_MAX, reports.message()).await {
            Ok(Ok(Some(report))) => report,
            Ok(Ok(None)) => return debug!(session = id.0, "node closed its session"),
            Ok(Err(error)) => return info!(session = id.0, %error, "node session cut"),
            Err(_) => return info!(session = id.0, "node session silent: cut"),
        };
        let input = match report.report {
            Some(Report::Heartbeat(beat)) => Input::Heartbeat(id, beat),
            Some(Report::Observed(batch)) => Input::Observed(id, batch),
            Some(Report::Register(_)) | None => continue,
        };
        if core.report(input).await.is_err() {
            return;
        }
    }
}
