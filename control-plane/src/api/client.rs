//! What laptops ask: sandboxes, tickets, images, nodes.

use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::Stream;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use towline_control_core::{Answer, Caller, Request as Ask};
use towline_link::rpc::ControlPlane;
use towline_link::ticket::keep_digest;
use towline_proto::ids::TicketId;
use towline_proto::limits::TICKET_LIFE_MAX;
use towline_proto::v1;

use super::{Service, caller, caller_of, peer, status};
use crate::driver::Watched;
use crate::keys::{random, unix_ms};

type Reply<T> = Result<Response<T>, Status>;
type SandboxStream = Pin<Box<dyn Stream<Item = Result<v1::Sandbox, Status>> + Send>>;

fn unexpected(answer: &Answer) -> Status {
    Status::internal(format!("the core answered something else: {answer:?}"))
}

macro_rules! expect {
    ($answer:expr, $pattern:pat => $value:expr) => {
        match $answer {
            $pattern => Ok(Response::new($value)),
            other => Err(unexpected(&other)),
        }
    };
}

#[tonic::async_trait]
impl ControlPlane for Service {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Reply<v1::EnrollResponse> {
        self.admit(request.into_inner()).await.map(Response::new)
    }

    async fn renew_certificate(
        &self,
        request: Request<v1::RenewCertificateRequest>,
    ) -> Reply<v1::EnrollResponse> {
        let peer = peer(&request)?;
        self.renew(&peer, &request.into_inner()).map(Response::new)
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Reply<v1::CreateTokenResponse> {
        let caller = caller_of(&request)?;
        self.new_token(caller, request.into_inner()).await.map(Response::new)
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Reply<v1::RevokeTokenResponse> {
        let answer = self.ask(&request, Ask::RevokeToken(request.get_ref().clone())).await?;
        expect!(answer, Answer::Done => v1::RevokeTokenResponse {})
    }

    async fn create_sandbox(
        &self,
        request: Request<v1::CreateSandboxRequest>,
    ) -> Reply<v1::Sandbox> {
        let caller = caller_of(&request)?;
        let ask = Ask::CreateSandbox(request.into_inner());
        expect!(self.core.request(caller, ask).await?, Answer::Sandbox(sandbox) => *sandbox)
    }

    async fn get_sandbox(&self, request: Request<v1::GetSandboxRequest>) -> Reply<v1::Sandbox> {
        let answer = self.ask(&request, Ask::GetSandbox(request.get_ref().clone())).await?;
        expect!(answer, Answer::Sandbox(sandbox) => *sandbox)
    }

    async fn list_sandboxes(
        &self,
        request: Request<v1::ListSandboxesRequest>,
    ) -> Reply<v1::ListSandboxesResponse> {
        let answer = self.ask(&request, Ask::ListSandboxes(request.get_ref().clone())).await?;
        expect!(answer, Answer::Sandboxes(page) => page)
    }

    type WatchSandboxStream = SandboxStream;

    async fn watch_sandbox(
        &self,
        request: Request<v1::GetSandboxRequest>,
    ) -> Reply<Self::WatchSandboxStream> {
        let caller = caller_of(&request)?;
        may_look(&caller)?;
        let mut watched = self.core.watch(caller, request.into_inner()).await?;
        // The first view, or the reason why there is none, comes before the stream.
        let first = next_view(&mut watched).await;
        if let Some(Err(error)) = first {
            return Err(error);
        }
        Ok(Response::new(Box::pin(views(first, watched))))
    }

    async fn set_desired(&self, request: Request<v1::SetDesiredRequest>) -> Reply<v1::Sandbox> {
        let answer = self.ask(&request, Ask::SetDesired(request.get_ref().clone())).await?;
        expect!(answer, Answer::Sandbox(sandbox) => *sandbox)
    }

    async fn fork_sandbox(
        &self,
        request: Request<v1::ForkSandboxRequest>,
    ) -> Reply<v1::ForkSandboxResponse> {
        let answer = self.ask(&request, Ask::ForkSandbox(request.get_ref().clone())).await?;
        expect!(answer, Answer::Forked(sandboxes) => v1::ForkSandboxResponse { sandboxes })
    }

    async fn set_expiry(&self, request: Request<v1::SetExpiryRequest>) -> Reply<v1::Sandbox> {
        let answer = self.ask(&request, Ask::SetExpiry(request.get_ref().clone())).await?;
        expect!(answer, Answer::Sandbox(sandbox) => *sandbox)
    }

    async fn resize_sandbox(
        &self,
        request: Request<v1::ResizeSandboxRequest>,
    ) -> Reply<v1::Sandbox> {
        let answer = self.ask(&request, Ask::ResizeSandbox(request.get_ref().clone())).await?;
        expect!(answer, Answer::Sandbox(sandbox) => *sandbox)
    }

    async fn issue_ticket(
        &self,
        request: Request<v1::IssueTicketRequest>,
    ) -> Reply<v1::IssueTicketResponse> {
        let peer = peer(&request)?;
        let caller = caller(&peer)?;
        let (Some(identity), Some(client_key)) = (&peer.identity, peer.spki_sha256) else {
            return Err(Status::failed_precondition(
                "a ticket is bound to a certificate: ask over mutual TLS, not the admin socket",
            ));
        };
        let ask = Ask::IssueTicket(request.get_ref().clone());
        let answer = self.core.request(caller, ask).await?;
        let Answer::Ticket { sandbox, node, keep } = answer else {
            return Err(unexpected(&answer));
        };
        let life_end = SystemTime::now() + TICKET_LIFE_MAX;
        // A ticket does not outlive the certificate it is bound to.
        let end = peer.not_after.map_or(life_end, |not_after| not_after.min(life_end));
        let not_after_unix_s = end.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let random = random().map_err(|error| Status::internal(error.to_string()))?;
        let ticket = v1::Ticket {
            cluster_id: self.keys.member.cluster_id.clone(),
            ticket_id: TicketId::from_parts(unix_ms(), random).to_vec(),
            epoch: sandbox.as_ref().map_or(0, |sandbox| sandbox.epoch),
            sandbox_id: sandbox.map(|sandbox| sandbox.id).unwrap_or_default(),
            node_id: node.id.clone(),
            client_key_sha256: client_key.to_vec(),
            not_after_unix_s,
            identity: identity.to_string(),
            keep_sha256: keep.as_deref().map(keep_digest).unwrap_or_default(),
        };
        Ok(Response::new(v1::IssueTicketResponse {
            ticket: self.keys.tickets.sign(&ticket),
            link_endpoint: node.link_endpoint,
            node_id: node.id,
            expires_unix_s: not_after_unix_s,
            keep: keep.unwrap_or_default(),
        }))
    }

    async fn put_image(&self, request: Request<v1::PutImageRequest>) -> Reply<v1::Image> {
        let answer = self.ask(&request, Ask::PutImage(request.get_ref().clone())).await?;
        expect!(answer, Answer::Image(image) => image)
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Reply<v1::ListImagesResponse> {
        let answer = self.ask(&request, Ask::ListImages).await?;
        expect!(answer, Answer::Images(images) => v1::ListImagesResponse { images })
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Reply<v1::DeleteImageResponse> {
        let answer = self.ask(&request, Ask::DeleteImage(request.get_ref().clone())).await?;
        expect!(answer, Answer::Done => v1::DeleteImageResponse {})
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Reply<v1::ListNodesResponse> {
        let answer = self.ask(&request, Ask::ListNodes).await?;
        expect!(answer, Answer::Nodes(nodes) => v1::ListNodesResponse { nodes })
    }

    async fn get_cluster_status(
        &self,
        request: Request<v1::GetClusterStatusRequest>,
    ) -> Reply<v1::ClusterStatus> {
        let answer = self.ask(&request, Ask::ClusterStatus).await?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        expect!(answer, Answer::Status(status) => v1::ClusterStatus { version, ..status })
    }
}

impl Service {
    async fn ask<T>(&self, request: &Request<T>, ask: Ask) -> Result<Answer, Status> {
        self.core.request(caller_of(request)?, ask).await
    }
}

fn may_look(caller: &Caller) -> Result<(), Status> {
    use towline_control_core::Role;
    match caller.role {
        Role::User | Role::Operator => Ok(()),
        Role::Node | Role::Stranger => {
            Err(Status::permission_denied("only users and operators may watch sandboxes"))
        }
    }
}

/// The next view that was not seen; `None` at the end.
async fn next_view(watched: &mut watch::Receiver<Watched>) -> Option<Result<v1::Sandbox, Status>> {
    let changed = watched.changed().await;
    let now = watched.borrow_and_update();
    match (&now.end, &now.sandbox) {
        (Some(Err(refusal)), _) => Some(Err(status(refusal))),
        (None, _) if changed.is_err() => {
            Some(Err(Status::unavailable("the control plane is stopping: watch again")))
        }
        (_, sandbox) => sandbox.clone().map(Ok),
    }
}

fn views(
    first: Option<Result<v1::Sandbox, Status>>,
    watched: watch::Receiver<Watched>,
) -> impl Stream<Item = Result<v1::Sandbox, Status>> + Send {
    futures_util::stream::unfold((first, watched), |(first, mut watched)| async move {
        if let Some(first) = first {
            return Some((first, (None, watched)));
        }
        let ended = watched.borrow().end.is_some();
        if ended && !watched.has_changed().unwrap_or(false) {
            return None;
        }
        let view = next_view(&mut watched).await?;
        Some((view, (None, watched)))
    })
}
