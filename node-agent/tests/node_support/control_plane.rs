//! A control plane that wants what a test says, commits every report at once, and forgets nothing.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use towline_link::authority::CertificateAuthority;
use towline_link::identity::Role;
use towline_link::rpc::{self, Listener, NodeUplink, Routes};
use towline_link::ticket::TicketSigner;
use towline_link::tls::{self, ALPN_H2, ClientAuth};
use towline_proto::ids::SandboxId;
use towline_proto::v1::node_directive::Directive;
use towline_proto::v1::node_report::Report;
use towline_proto::v1::{
    Bookmark, DesiredSandbox, HeartbeatAnswer, NodeDirective, NodeRegistered, NodeReport, Observed,
    ObservedAck, Phase, RegisterNode, TicketKey,
};

use super::{WAIT_MAX, sandbox, store};

pub(crate) const CLUSTER: &str = "cluster_test";
pub(crate) const NODE: [u8; 16] = [7; 16];

type Known = BTreeMap<SandboxId, Observed>;

#[derive(Debug)]
struct Shared {
    desired: watch::Sender<Vec<DesiredSandbox>>,
    observed: watch::Sender<Known>,
    /// Every phase that was reported, in order.
    history: Mutex<Vec<(SandboxId, Phase)>>,
    registered: watch::Sender<Option<RegisterNode>>,
    keys: Vec<TicketKey>,
    /// Counts cuts: sessions of before end.
    cuts: watch::Sender<u32>,
}

pub(crate) struct ControlPlane {
    pub(crate) endpoint: String,
    pub(crate) signer: TicketSigner,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ControlPlane {
    pub(crate) async fn start(ca: &CertificateAuthority) -> Self {
        let signer = TicketSigner::generate().unwrap();
        let shared = Arc::new(Shared {
            desired: watch::Sender::new(Vec::new()),
            observed: watch::Sender::new(Known::new()),
            history: Mutex::default(),
            registered: watch::Sender::new(None),
            keys: vec![signer.public_key()],
            cuts: watch::Sender::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let member = store(ca, Role::Member, "m1");
        let auth = ClientAuth::Required;
        let tls = tls::server_config(&member, ca.certificate(), auth, &[ALPN_H2]).unwrap();
        let service = rpc::node_uplink_server(Service(Arc::clone(&shared)));
        let routes = Routes::new(service);
        let task = tokio::spawn(async move {
            let listener = Listener::Tcp(listener, tls);
            rpc::serve(listener, routes, std::future::pending()).await.unwrap();
        });
        Self { endpoint, signer, shared, task }
    }

    /// Wants these sandboxes, and no others.
    pub(crate) fn want(&self, desired: Vec<DesiredSandbox>) {
        self.shared.desired.send_replace(desired);
    }

    /// Forgets what was observed, so that only what comes now counts.
    pub(crate) fn forget(&self) {
        self.shared.observed.send_replace(Known::new());
        self.shared.registered.send_replace(None);
    }

    /// Ends all sessions; new ones are welcome.
    pub(crate) fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Waits until a sandbox is reported in a phase, at a generation.
    pub(crate) async fn until(&self, n: u8, generation: u64, phase: Phase) -> Observed {
        let mut observed = self.shared.observed.subscribe();
        let fits = |fact: &Observed| fact.generation == generation && fact.phase() == phase;
        let wait = observed.wait_for(|known| known.get(&sandbox(n)).is_some_and(fits));
        match timeout(WAIT_MAX, wait).await {
            Ok(known) => known.unwrap()[&sandbox(n)].clone(),
            Err(_) => panic!("never saw {phase:?} at {generation}, but {:?}", self.history(n)),
        }
    }

    pub(crate) fn history(&self, n: u8) -> Vec<Phase> {
        let history = self.shared.history.lock().unwrap();
        history.iter().filter(|(id, _)| *id == sandbox(n)).map(|(_, phase)| *phase).collect()
    }

    pub(crate) async fn registered(&self) -> RegisterNode {
        let mut registered = self.shared.registered.subscribe();
        let wait = registered.wait_for(Option::is_some);
        timeout(WAIT_MAX, wait).await.expect("the node registers").unwrap().clone().unwrap()
    }

    pub(crate) fn link_endpoint(&self) -> String {
        let registered = self.shared.registered.borrow();
        registered.as_ref().expect("the node is registered").link_endpoint.clone()
    }
}

struct Service(Arc<Shared>);

#[tonic::async_trait]
impl NodeUplink for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<NodeDirective, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (down, stream) = mpsc::channel(64);
        let (shared, reports) = (Arc::clone(&self.0), request.into_inner());
        tokio::spawn(async move {
            let _ = session(shared, reports, down).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type Down = mpsc::Sender<Result<NodeDirective, Status>>;

/// Ends when either side does.
async fn session(shared: Arc<Shared>, mut up: Streaming<NodeReport>, down: Down) -> Option<()> {
    let Some(Report::Register(register)) = up.message().await.ok()??.report else { return None };
    let registered = NodeRegistered {
        node_id: NODE.to_vec(),
        epoch: 1,
        cluster_id: CLUSTER.into(),
        ticket_keys: shared.keys.clone(),
    };
    say(&down, Directive::Registered(registered)).await?;
    shared.registered.send_replace(Some(register));
    let (mut desired, mut cuts) = (shared.desired.subscribe(), shared.cuts.subscribe());
    tell(&down, &mut desired).await?;
    say(&down, Directive::Bookmark(Bookmark { revision: 1 })).await?;
    loop {
        tokio::select! {
            _ = cuts.changed() => return None,
            changed = desired.changed() => {
                changed.ok()?;
                tell(&down, &mut desired).await?;
            }
            report = up.message() => match report.ok()??.report? {
                Report::Register(_) => return None,
                Report::Heartbeat(beat) => {
                    let sent_boottime_ms = beat.sent_boottime_ms;
                    let answer = HeartbeatAnswer { sent_boottime_ms, lease_ms: 10_000 };
                    say(&down, Directive::Heartbeat(answer)).await?;
                }
                Report::Observed(batch) => {
                    batch.observed.into_iter().for_each(|fact| note(&shared, fact));
                    let ack = ObservedAck { sequence: batch.sequence };
                    say(&down, Directive::ObservedAck(ack)).await?;
                }
            }
        }
    }
}

async fn tell(down: &Down, desired: &mut watch::Receiver<Vec<DesiredSandbox>>) -> Option<()> {
    let records = desired.borrow_and_update().clone();
    for record in records {
        say(down, Directive::Desired(record)).await?;
    }
    Some(())
}

async fn say(down: &Down, directive: Directive) -> Option<()> {
    down.send(Ok(NodeDirective { directive: Some(directive) })).await.ok()
}

fn note(shared: &Shared, fact: Observed) {
    let id = SandboxId::try_from(&fact.sandbox_id[..]).unwrap();
    shared.history.lock().unwrap().push((id, fact.phase()));
    shared.observed.send_modify(|known| {
        known.insert(id, fact);
    });
}
