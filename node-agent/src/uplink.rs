//! The session with the control plane: register, heartbeats, reports up, desired records down.
//!
//! It is level-triggered: a session that breaks is made anew after a jittered pause, and the core
//! tells and is told everything again. A session whose heartbeats are not answered for the length
//! of a lease is broken, whatever TCP says. Decides nothing.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use towline_link::identity::Role;
use towline_link::retry::{Backoff, RetryPolicy};
use towline_link::rpc;
use towline_link::tls::{self, ALPN_H2, Trust};
use towline_node_core::{Assignment, Input, Session};
use towline_proto::ids::NodeId;
use towline_proto::limits::{HEARTBEAT_INTERVAL, NODE_LEASE};
use towline_proto::v1::node_directive::Directive;
use towline_proto::v1::node_report::Report;
use towline_proto::v1::{
    Heartbeat, NodeDirective, NodeRegistered, NodeReport, ObservedBatch, RegisterNode,
};

use crate::capacity::boottime;
use crate::membership::Membership;

/// Reports that wait for the connection. The core has one under way at a time.
const REPORTS_MAX: usize = 16;
/// Bound on connecting and on the first answer.
const REGISTER_MAX: Duration = Duration::from_secs(10);
/// The pauses between sessions. There is no deadline: a node without a control plane waits for it.
const PAUSES: RetryPolicy = RetryPolicy {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(3),
    deadline: Duration::from_secs(10 * 365 * 24 * 3600),
};

/// A report for one session.
#[derive(Debug)]
pub struct Outgoing {
    /// The session that it is for; in another it is dropped.
    pub session: Session,
    /// What to say.
    pub batch: ObservedBatch,
}

/// What the uplink works with.
#[derive(Debug)]
pub struct Uplink {
    /// Who we are.
    pub membership: Membership,
    /// `host:port` of members, tried in turn.
    pub endpoints: Vec<String>,
    /// What is registered; the newest at each session.
    pub register: watch::Receiver<RegisterNode>,
    /// What the control plane says goes here.
    pub inputs: mpsc::Sender<Input>,
    /// What it said at registration goes here, before the input.
    pub registered: watch::Sender<Option<NodeRegistered>>,
}

/// The end of the driver's side.
pub fn channel() -> (mpsc::Sender<Outgoing>, mpsc::Receiver<Outgoing>) {
    mpsc::channel(REPORTS_MAX)
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error(transparent)]
    Transport(#[from] rpc::RpcTransportError),
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("no answer within {} s", REGISTER_MAX.as_secs())]
    Silent,
    #[error("the control plane did not answer heartbeats for {} s", NODE_LEASE.as_secs())]
    Lease,
    #[error("the control plane ended the session")]
    Ended,
    #[error("the control plane wants a new session: {0}")]
    Reset(String),
    #[error("the control plane broke the protocol: {0}")]
    Protocol(String),
    #[error("this node agent is stopping")]
    Stopping,
}

impl Uplink {
    /// Holds a session whenever one can be had. Runs until it is dropped or the driver is gone.
    pub async fn run(self, mut reports: mpsc::Receiver<Outgoing>) {
        let mut backoff = Backoff::new(PAUSES);
        let mut session = 0;
        for endpoint in self.endpoints.iter().cycle() {
            session += 1;
            let mut registered = false;
            let result = self.session(session, endpoint, &mut reports, &mut registered).await;
            let Err(error) = result;
            if matches!(error, SessionError::Stopping) {
                return;
            }
            let reason = crate::chain(&error);
            if registered {
                tracing::warn!(endpoint, reason, "session with the control plane ended");
                if self.inputs.send(Input::Disconnected { session }).await.is_err() {
                    return;
                }
                backoff = Backoff::new(PAUSES);
            } else {
                tracing::debug!(endpoint, reason, "no session with the control plane");
            }
            let wait = backoff.next(Duration::ZERO).unwrap_or(PAUSES.longest);
            tokio::time::sleep(wait).await;
        }
    }

    async fn session(
        &self,
        session: Session,
        endpoint: &str,
        reports: &mut mpsc::Receiver<Outgoing>,
        is_registered: &mut bool,
    ) -> Result<std::convert::Infallible, SessionError> {
        let (up, mut down) = timeout(REGISTER_MAX, self.open(endpoint))
            .await
            .map_err(|_| SessionError::Silent)??;
        let first =
            timeout(REGISTER_MAX, down.message()).await.map_err(|_| SessionError::Silent)?;
        match first?.and_then(|message| message.directive) {
            Some(Directive::Registered(answer)) => self.registered(session, answer).await?,
            Some(Directive::MustReset(reset)) => return Err(SessionError::Reset(reset.reason)),
            _ => return Err(SessionError::Protocol("it did not say `registered` first".into())),
        }
        *is_registered = true;
        tracing::info!(endpoint, session, "registered with the control plane");
        let mut beat = interval(HEARTBEAT_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answered = Instant::now();
        loop {
            tokio::select! {
                directive = down.message() => {
                    let directive = directive?.ok_or(SessionError::Ended)?;
                    if matches!(directive.directive, Some(Directive::Heartbeat(_))) {
                        answered = Instant::now();
                    } else {
                        self.directive(session, directive).await?;
                    }
                }
                _ = beat.tick() => {
                    if answered.elapsed() > NODE_LEASE {
                        return Err(SessionError::Lease);
                    }
                    let sent_boottime_ms = u64::try_from(boottime().as_millis()).unwrap_or(u64::MAX);
                    let report = Report::Heartbeat(Heartbeat { sent_boottime_ms });
                    // One that does not fit is not missed: the next one comes in a second.
                    let _ = up.try_send(NodeReport { report: Some(report) });
                }
                outgoing = reports.recv() => {
                    let outgoing = outgoing.ok_or(SessionError::Stopping)?;
                    if outgoing.session == session {
                        let report = Some(Report::Observed(outgoing.batch));
                        timeout(NODE_LEASE, up.send(NodeReport { report }))
                            .await
                            .map_err(|_| SessionError::Lease)?
                            .map_err(|_| SessionError::Ended)?;
                    }
                }
            }
        }
    }

    async fn open(
        &self,
        endpoint: &str,
    ) -> Result<(mpsc::Sender<NodeReport>, Streaming<NodeDirective>), SessionError> {
        let trust = Trust::Ca(self.membership.ca.clone());
        let store = Some(&self.membership.store);
        let tls = tls::client_config(store, trust, Role::Member, &[ALPN_H2])?;
        let channel = rpc::connect(endpoint, tls).await?;
        let (up, outgoing) = mpsc::channel(REPORTS_MAX);
        let register = Report::Register(self.register.borrow().clone());
        up.try_send(NodeReport { report: Some(register) }).map_err(|_| SessionError::Ended)?;
        let stream = ReceiverStream::new(outgoing);
        let down = rpc::node_uplink(channel).session(stream).await?.into_inner();
        Ok((up, down))
    }

    async fn registered(
        &self,
        session: Session,
        answer: NodeRegistered,
    ) -> Result<(), SessionError> {
        let node = NodeId::try_from(&answer.node_id[..])
            .map_err(|error| SessionError::Protocol(error.to_string()))?;
        self.registered.send_replace(Some(answer));
        self.input(Input::Registered { session, node }).await
    }

    async fn directive(
        &self,
        session: Session,
        directive: NodeDirective,
    ) -> Result<(), SessionError> {
        match directive.directive {
            Some(Directive::Desired(desired)) => match Assignment::try_from(desired) {
                Ok(assignment) => {
                    let assignment = Box::new(assignment);
                    self.input(Input::Desired { session, assignment }).await
                }
                Err(error) => {
                    tracing::error!(%error, "desired record ignored");
                    Ok(())
                }
            },
            Some(Directive::Bookmark(bookmark)) => {
                self.input(Input::Bookmark { session, revision: bookmark.revision }).await
            }
            Some(Directive::ObservedAck(ack)) => {
                self.input(Input::Acknowledged { session, sequence: ack.sequence }).await
            }
            Some(Directive::MustReset(reset)) => Err(SessionError::Reset(reset.reason)),
            Some(Directive::Registered(_)) => {
                Err(SessionError::Protocol("it said `registered` twice".into()))
            }
            // A newer control plane may say what this node agent does not know.
            Some(Directive::Heartbeat(_)) | None => Ok(()),
        }
    }

    async fn input(&self, input: Input) -> Result<(), SessionError> {
        self.inputs.send(input).await.map_err(|_| SessionError::Stopping)
    }
}
