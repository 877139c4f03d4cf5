//! A control plane and a node for tests of the daemon: the real transports, identities and
//! tickets, with answers that a test decides.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use towline_client::config::Context;
use towline_client::daemon::client::DaemonClient;
use towline_client::daemon::place::Place;
use towline_guest_agent::forward::Forwards;
use towline_guest_agent::tcp::{self, TcpTable};
use towline_link::authority::CertificateAuthority;
use towline_link::endpoint::{LinkConnection, LinkServer};
use towline_link::identity::{Identity, LeafKey, Role};
use towline_link::peer::Peer;
use towline_link::rpc::{self, Listener, Routes};
use towline_link::status::RpcError;
use towline_link::stream::LinkStream;
use towline_link::ticket::{TicketContext, TicketSigner, TicketVerifier};
use towline_link::tls::{self, ALPN_H2, CertStore, ClientAuth};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::*;

pub(crate) const CLUSTER: &str = "cluster_fake";

pub(crate) fn node_id() -> NodeId {
    NodeId::from_bytes([1; 16])
}

/// What the fakes answer and have seen.
pub(crate) struct World {
    /// Connections to ports of the one sandbox, by a real guest agent.
    pub(crate) tcp: Arc<TcpTable>,
    pub(crate) sandboxes: Mutex<HashMap<String, SandboxId>>,
    pub(crate) refusal: Mutex<Option<RpcError>>,
    /// Where the node is, and where the control plane says that it is.
    pub(crate) node_endpoint: Mutex<String>,
    pub(crate) link_endpoint: Mutex<String>,
    pub(crate) tickets_issued: AtomicU32,
    /// What the node takes for the sandboxes' epoch.
    pub(crate) node_epoch: AtomicU32,
    /// What the control plane writes into tickets.
    pub(crate) epoch: AtomicU32,
    pub(crate) links: AtomicU32,
    pub(crate) opens: Mutex<Vec<StreamOpen>>,
    pub(crate) broken: AtomicU32,
    /// The relay is there and carries nothing.
    pub(crate) drop_packets: AtomicBool,
}

pub(crate) struct Cluster {
    pub(crate) ca: Arc<CertificateAuthority>,
    pub(crate) signer: Arc<TicketSigner>,
    pub(crate) world: Arc<World>,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let ca = CertificateAuthority::create(CLUSTER, SystemTime::now()).unwrap();
        let signer = TicketSigner::generate().unwrap();
        let world = World {
            tcp: TcpTable::new(Arc::<Forwards>::default()),
            sandboxes: Mutex::default(),
            refusal: Mutex::default(),
            node_endpoint: Mutex::default(),
            link_endpoint: Mutex::default(),
            tickets_issued: AtomicU32::default(),
            node_epoch: AtomicU32::default(),
            epoch: AtomicU32::default(),
            links: AtomicU32::default(),
            opens: Mutex::default(),
            broken: AtomicU32::default(),
            drop_packets: AtomicBool::default(),
        };
        world.sandboxes.lock().unwrap().insert("web".into(), SandboxId::from_bytes([5; 16]));
        Self { ca: Arc::new(ca), signer: Arc::new(signer), world: Arc::new(world) }
    }

    fn leaf(&self, role: Role, name: &str, life: Duration) -> (String, String) {
        let key = LeafKey::generate().unwrap();
        let identity = Identity::new(CLUSTER, role, name).unwrap();
        let csr = key.csr_pem().unwrap();
        let pem = self.ca.issue(&csr, &identity, SystemTime::now(), life).unwrap();
        (pem, key.to_pem())
    }

    fn store(&self, role: Role, name: &str) -> CertStore {
        let (certificate, key) = self.leaf(role, name, Duration::from_secs(3600));
        CertStore::new(&certificate, &key, self.ca.certificate()).unwrap()
    }

    /// Serves the control plane until the set is dropped; returns its address.
    pub(crate) async fn control_plane(&self, tasks: &mut JoinSet<()>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let store = self.store(Role::Member, "m1");
        let ca = self.ca.certificate();
        let config = tls::server_config(&store, ca, ClientAuth::Optional, &[ALPN_H2]).unwrap();
        let fake = FakeControlPlane {
            ca: Arc::clone(&self.ca),
            signer: Arc::clone(&self.signer),
            world: Arc::clone(&self.world),
        };
        tasks.spawn(async move {
            let routes = Routes::new(rpc::control_plane_server(fake));
            let listener = Listener::Tcp(listener, config);
            rpc::serve(listener, routes, std::future::pending()).await.unwrap();
        });
        endpoint
    }

    /// Serves a node until the set is dropped, and announces it.
    pub(crate) fn node(&self, tasks: &mut JoinSet<()>) {
        let store = self.store(Role::Node, "n1");
        let address = "127.0.0.1:0".parse().unwrap();
        let server = LinkServer::bind(address, &store, self.ca.certificate()).unwrap();
        let endpoint = server.local_addr().unwrap().to_string();
        *self.world.node_endpoint.lock().unwrap() = endpoint.clone();
        *self.world.link_endpoint.lock().unwrap() = endpoint;
        let verifier = Arc::new(TicketVerifier::new(&[self.signer.public_key()]));
        let world = Arc::clone(&self.world);
        tasks.spawn(async move {
            let mut links = JoinSet::new();
            while let Some(handshake) = server.accept().await {
                let (world, verifier) = (Arc::clone(&world), Arc::clone(&verifier));
                links.spawn(async move {
                    let link = handshake.finish().await.unwrap();
                    world.links.fetch_add(1, Ordering::Relaxed);
                    serve_link(link, world, verifier).await;
                });
            }
        });
    }

    /// Puts a relay in front of the node and announces that instead. When the set is dropped the
    /// node is gone as if it had been killed: not a word, and nobody at its port.
    pub(crate) async fn relay(&self, tasks: &mut JoinSet<()>) {
        let node = self.world.node_endpoint.lock().unwrap().clone();
        let front = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let back = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(node).await.unwrap();
        *self.world.link_endpoint.lock().unwrap() = front.local_addr().unwrap().to_string();
        let world = Arc::clone(&self.world);
        tasks.spawn(async move {
            let (mut there, mut here) = (vec![0; 65536], vec![0; 65536]);
            let mut client = None;
            loop {
                tokio::select! {
                    got = front.recv_from(&mut there) => {
                        let (len, from) = got.unwrap();
                        client = Some(from);
                        if world.drop_packets.load(Ordering::Relaxed) {
                            continue;
                        }
                        let _ = back.send(&there[..len]).await;
                    }
                    got = back.recv(&mut here) => if let (Ok(len), Some(client)) = (got, client) {
                        let _ = front.send_to(&here[..len], client).await;
                    },
                }
            }
        });
    }

    /// Writes a context of this cluster with a certificate that lives so long.
    pub(crate) fn context(&self, dir: &Path, endpoint: &str, life: Duration) -> PathBuf {
        let (certificate, key) = self.leaf(Role::User, "ada", life);
        let context = Context {
            endpoint: endpoint.into(),
            ca_file: dir.join("ca.pem"),
            cert_file: dir.join("cert.pem"),
            key_file: dir.join("key.pem"),
            cluster_id: CLUSTER.into(),
        };
        std::fs::write(&context.ca_file, self.ca.certificate_pem()).unwrap();
        std::fs::write(&context.cert_file, certificate).unwrap();
        std::fs::write(&context.key_file, key).unwrap();
        let text = format!(
            "current = 'c'\n[context.c]\nendpoint = '{endpoint}'\nca_file = '{}'\n\
             cert_file = '{}'\nkey_file = '{}'\ncluster_id = '{CLUSTER}'\n",
            context.ca_file.display(),
            context.cert_file.display(),
            context.key_file.display(),
        );
        let path = dir.join("config.toml");
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// A daemon of its own for one test; it is asked to leave when the test ends well, and killed
/// otherwise.
pub(crate) struct TestDaemon {
    pub(crate) client: DaemonClient,
    pub(crate) place: Place,
    dir: tempfile::TempDir,
}

impl TestDaemon {
    pub(crate) fn new(config: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::at(dir.path().join("towline")).unwrap();
        let client = DaemonClient::new(place.clone(), "c").unwrap().with_config(config.into());
        let mut daemon = Self { client, place, dir };
        daemon.client = daemon.client_with(&[]);
        daemon
    }

    /// Starts the daemon with more variables of this form: `NAME=value`.
    pub(crate) fn client_with(&self, variables: &[String]) -> DaemonClient {
        let runtime = format!("XDG_RUNTIME_DIR={}", self.dir.path().display());
        let state = format!("XDG_STATE_HOME={}", self.dir.path().join("state").display());
        let mut program: Vec<OsString> =
            ["env".into(), runtime.into(), state.into(), "TOWLINE_LOG=debug".into()].to_vec();
        program.extend(variables.iter().map(Into::into));
        program.extend([env!("CARGO_BIN_EXE_tow").into(), "daemon".into()]);
        self.client.clone().with_program(program)
    }

    /// Kills the daemon that answers now.
    pub(crate) async fn kill(&self) {
        let pid = self.client.status().await.unwrap().unwrap().pid;
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        while self.client.status().await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.place.log()).unwrap_or_default()
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for line in self.log().lines().filter(|line| line.contains("daemon ready")) {
            let pid = line.split("pid=").nth(1).and_then(|pid| pid.trim().parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
    }
}

async fn serve_link(link: LinkConnection, world: Arc<World>, verifier: Arc<TicketVerifier>) {
    let mut streams = JoinSet::new();
    let spki = link.peer().spki_sha256.unwrap();
    while let Ok(stream) = link.accept().await {
        let (world, verifier) = (Arc::clone(&world), Arc::clone(&verifier));
        streams.spawn(async move {
            if serve_stream(stream, &world, &verifier, spki).await.is_err() {
                world.broken.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

/// Checks the ticket and sends every frame back.
async fn serve_stream(
    stream: LinkStream,
    world: &World,
    verifier: &TicketVerifier,
    spki: [u8; 32],
) -> std::io::Result<()> {
    let LinkStream { mut reader, mut writer } = stream;
    let open: StreamOpen = reader.next().await?.unwrap().decode().unwrap();
    let context = TicketContext {
        cluster_id: CLUSTER,
        node_id: node_id(),
        client_spki_sha256: &spki,
        now_unix_s: now_s(),
    };
    let ticket = verifier.verify(&open.ticket, &context).map_err(std::io::Error::other)?;
    world.opens.lock().unwrap().push(StreamOpen { ticket: vec![], ..open.clone() });
    if ticket.epoch != u64::from(world.node_epoch.load(Ordering::Relaxed)) {
        let code = StreamErrorCode::Ticket.into();
        let error = StreamError { code, message: "the ticket is of another epoch".into() };
        writer.send_message(FrameKind::Error, &error).await?;
        writer.finish().await?;
        return Ok(());
    }
    if let Some(stream_open::Kind::Tcp(open)) = open.kind {
        tcp::serve(&world.tcp, open, reader, writer).await;
        return Ok(());
    }
    while let Some(frame) = reader.next().await? {
        if frame.is(FrameKind::Signal) {
            return Ok(()); // the guest's end of the stream breaks
        }
        writer.send(&frame).await?;
    }
    writer.send(&Frame::raw(FrameKind::Pong, &b"end"[..])).await?;
    writer.finish().await
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

struct FakeControlPlane {
    ca: Arc<CertificateAuthority>,
    signer: Arc<TicketSigner>,
    world: Arc<World>,
}

type Answer<T> = Result<tonic::Response<T>, tonic::Status>;

fn caller<T>(request: &tonic::Request<T>) -> Peer {
    request.extensions().get::<Peer>().unwrap().clone()
}

/// Writes what `async_trait` would have written: it does not look into macros.
macro_rules! unserved {
    ($($name:ident: $request:ty => $response:ty),* $(,)?) => {
        $(fn $name<'s, 'f>(
            &'s self,
            _: tonic::Request<$request>,
        ) -> std::pin::Pin<Box<dyn Future<Output = Answer<$response>> + Send + 'f>>
        where
            's: 'f,
            Self: 'f,
        {
            Box::pin(async { Err(RpcError::refused("not served by the fake").into()) })
        })*
    };
}

#[tonic::async_trait]
impl rpc::ControlPlane for FakeControlPlane {
    type WatchSandboxStream = tokio_stream::Empty<Result<Sandbox, tonic::Status>>;

    async fn get_sandbox(&self, request: tonic::Request<GetSandboxRequest>) -> Answer<Sandbox> {
        let Some(get_sandbox_request::Which::Name(name)) = request.into_inner().which else {
            return Err(RpcError::Invalid("by name, please".into()).into());
        };
        match self.world.sandboxes.lock().unwrap().get(&name) {
            Some(id) => Ok(tonic::Response::new(Sandbox { id: id.to_vec(), ..Default::default() })),
            None => Err(RpcError::NotFound(format!("there is no sandbox `{name}`")).into()),
        }
    }

    async fn issue_ticket(
        &self,
        request: tonic::Request<IssueTicketRequest>,
    ) -> Answer<IssueTicketResponse> {
        if let Some(refusal) = self.world.refusal.lock().unwrap().clone() {
            return Err(refusal.into());
        }
        let peer = caller(&request);
        let request = request.into_inner();
        let expires_unix_s = now_s() + 600;
        let ticket = Ticket {
            keep_sha256: Vec::new(),
            cluster_id: CLUSTER.into(),
            ticket_id: vec![9; 16],
            sandbox_id: request.sandbox_id,
            epoch: self.world.epoch.load(Ordering::Relaxed).into(),
            node_id: node_id().to_vec(),
            client_key_sha256: peer.spki_sha256.unwrap().to_vec(),
            not_after_unix_s: expires_unix_s,
            identity: peer.identity.unwrap().to_string(),
        };
        self.world.tickets_issued.fetch_add(1, Ordering::Relaxed);
        Ok(tonic::Response::new(IssueTicketResponse {
            keep: Vec::new(),
            ticket: self.signer.sign(&ticket),
            link_endpoint: self.world.link_endpoint.lock().unwrap().clone(),
            node_id: node_id().to_vec(),
            expires_unix_s,
        }))
    }

    async fn list_nodes(&self, _: tonic::Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        let node = Node {
            id: node_id().to_vec(),
            name: "n1".into(),
            state: NodeState::Ready.into(),
            link_endpoint: self.world.link_endpoint.lock().unwrap().clone(),
            ..Default::default()
        };
        Ok(tonic::Response::new(ListNodesResponse { nodes: vec![node] }))
    }

    async fn renew_certificate(
        &self,
        request: tonic::Request<RenewCertificateRequest>,
    ) -> Answer<EnrollResponse> {
        let identity = caller(&request).identity.unwrap();
        let life = Duration::from_secs(24 * 3600);
        let certificate_pem = self
            .ca
            .issue(&request.into_inner().csr_pem, &identity, SystemTime::now(), life)
            .map_err(|e| RpcError::Invalid(e.to_string()))?;
        Ok(tonic::Response::new(EnrollResponse { certificate_pem, ..Default::default() }))
    }

    async fn watch_sandbox(
        &self,
        request: tonic::Request<GetSandboxRequest>,
    ) -> Answer<Self::WatchSandboxStream> {
        if let Some(get_sandbox_request::Which::Id(id)) = request.into_inner().which {
            let sandboxes = self.world.sandboxes.lock().unwrap();
            if !sandboxes.values().any(|known| known.to_vec() == id) {
                return Err(RpcError::NotFound("there is no such sandbox".into()).into());
            }
        }
        Err(RpcError::refused("not served by the fake").into())
    }

    unserved! {
        enroll: EnrollRequest => EnrollResponse,
        create_token: CreateTokenRequest => CreateTokenResponse,
        revoke_token: RevokeTokenRequest => RevokeTokenResponse,
        create_sandbox: CreateSandboxRequest => Sandbox,
        list_sandboxes: ListSandboxesRequest => ListSandboxesResponse,
        set_desired: SetDesiredRequest => Sandbox,
        set_expiry: SetExpiryRequest => Sandbox,
        resize_sandbox: ResizeSandboxRequest => Sandbox,
        fork_sandbox: ForkSandboxRequest => ForkSandboxResponse,
        put_image: PutImageRequest => Image,
        list_images: ListImagesRequest => ListImagesResponse,
        delete_image: DeleteImageRequest => DeleteImageResponse,
        get_cluster_status: GetClusterStatusRequest => ClusterStatus,
    }
}
