//! A node agent between doubles: a control plane that keeps what it is told, a hypervisor whose VMs
//! are sleeping processes, and a tiny guest in this process for each.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part of it")]

mod control_plane;
mod hypervisor;
mod names;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use towline_link::authority::CertificateAuthority;
use towline_link::endpoint::{LinkClient, LinkConnection};
use towline_link::identity::{Identity, LeafKey, Role};
use towline_link::stream::{LinkStream, Priority};
use towline_link::tls::CertStore;
use towline_node_agent::Outside;
use towline_node_agent::config::Config;
use towline_node_agent::egress::own::Own;
use towline_node_agent::egress::resolver::Resolve;
use towline_node_agent::hypervisor::{Hypervisor, Hypervisors};
use towline_node_agent::store::Store;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::ids::SandboxId;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    Desired, DesiredSandbox, ImageRef, LocalImage, PingOpen, SandboxSpec, Shape, StreamError,
    StreamOpen, Ticket, image_ref,
};

pub(crate) use control_plane::{CLUSTER, ControlPlane, NODE};
pub(crate) use hypervisor::{Doubles, Template};
pub(crate) use names::Names;

/// Bound on every wait of these tests.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);

pub(crate) fn sandbox(n: u8) -> SandboxId {
    SandboxId::from_bytes([n; 16])
}

/// A sandbox of the local image of a small tree.
pub(crate) fn desired(n: u8, generation: u64, desired: Desired) -> DesiredSandbox {
    let local = LocalImage { home: b"/home/ada".to_vec() };
    let shape = Shape { cpus: 1, memory_mib: 128, disk_mib: 16, processes_max: 100 };
    DesiredSandbox {
        reason: String::new(),
        ran: false,
        sandbox_id: sandbox(n).to_vec(),
        epoch: 1,
        generation,
        desired: desired.into(),
        spec: Some(SandboxSpec {
            name: format!("box-{n}"),
            image: Some(ImageRef { source: Some(image_ref::Source::Local(local)) }),
            shape: Some(shape),
            ..SandboxSpec::default()
        }),
        image_digest: String::new(),
        revision: generation,
        forked_from: None,
    }
}

/// The world of one test. The node agent has a runtime of its own, so that dropping that is what
/// kill -9 is to a process.
pub(crate) struct World {
    dir: TempDir,
    pub(crate) ca: CertificateAuthority,
    pub(crate) control: ControlPlane,
    pub(crate) doubles: Arc<Doubles>,
    pub(crate) names: Arc<Names>,
    /// More for the node agent's configuration.
    pub(crate) more: String,
    node: Option<Runtime>,
}

impl World {
    /// Nothing runs yet. `None` where a test cannot run.
    pub(crate) async fn new() -> Option<Self> {
        if !["/sbin/mke2fs", "/usr/sbin/mke2fs"].iter().any(|path| Path::new(path).exists()) {
            print_skipped("mke2fs is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for part in ["data/identity", "cache", "root/usr/bin", "root/etc", "root/home/ada"] {
            std::fs::create_dir_all(dir.path().join(part)).unwrap();
        }
        std::fs::write(dir.path().join("root/usr/bin/tool"), "tool").unwrap();
        let ca = CertificateAuthority::create(CLUSTER, SystemTime::now()).unwrap();
        let (certificate, key) = leaf(&ca, Role::Node, "n1");
        let identity = dir.path().join("data/identity");
        std::fs::write(identity.join("ca.pem"), ca.certificate_pem()).unwrap();
        std::fs::write(identity.join("node.pem"), certificate).unwrap();
        std::fs::write(identity.join("node.key"), key).unwrap();
        let control = ControlPlane::start(&ca).await;
        let (doubles, names) = (Arc::new(Doubles::new()), Arc::default());
        Some(Self { dir, ca, control, doubles, names, more: String::new(), node: None })
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Starts the node agent.
    pub(crate) fn start(&mut self) {
        let text = format!(
            "name = \"n1\"\ndata_dir = {:?}\ncache_dir = {:?}\ncontrol_plane = [{:?}]\n\
             embedded = true\ncpus = 4\nmemory_mib = 1024\ndisk_mib = 1024\n{}",
            self.data(),
            self.dir.path().join("cache"),
            self.control.endpoint,
            self.more,
        );
        let file = self.dir.path().join("node-agent.toml");
        std::fs::write(&file, text).unwrap();
        let config = Config::load(&file).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let drivers = Hypervisors::new(vec![Arc::clone(&self.doubles) as Arc<dyn Hypervisor>]);
        let root = self.dir.path().join("root");
        let outside = Outside {
            own: Own::of_machine(vec![self.control.endpoint.clone()], None),
            resolver: Arc::clone(&self.names) as Arc<dyn Resolve>,
        };
        runtime.spawn(async move {
            let store = Arc::new(Store::open(&config.data_dir).unwrap());
            let never = std::future::pending();
            let ended =
                towline_node_agent::run(config, store, drivers, outside, &root, never).await;
            panic!("the node agent ended: {ended:?}");
        });
        self.node = Some(runtime);
    }

    /// kill -9 of the node agent.
    pub(crate) async fn kill(&mut self) {
        let node = self.node.take().unwrap();
        // Its tasks end here, and with them the lock on its data.
        tokio::task::spawn_blocking(move || node.shutdown_timeout(WAIT_MAX)).await.unwrap();
    }

    /// A laptop's link to the node.
    pub(crate) async fn laptop(&self) -> Laptop {
        let (certificate, key) = leaf(&self.ca, Role::User, "ada");
        let store = CertStore::new(&certificate, &key, self.ca.certificate()).unwrap();
        let client = LinkClient::new(&store, self.ca.certificate()).unwrap();
        let endpoint = self.control.link_endpoint();
        let connect = client.connect(&endpoint, Some("n1"));
        let link = tokio::time::timeout(WAIT_MAX, connect).await.unwrap().unwrap();
        Laptop { spki: store.info().spki_sha256, link, _client: client }
    }

    /// A good ticket.
    pub(crate) fn ticket(&self, laptop: &Laptop, n: u8) -> Ticket {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        Ticket {
            keep_sha256: Vec::new(),
            cluster_id: CLUSTER.into(),
            ticket_id: vec![1; 16],
            sandbox_id: sandbox(n).to_vec(),
            epoch: 1,
            node_id: NODE.to_vec(),
            client_key_sha256: laptop.spki.to_vec(),
            not_after_unix_s: now + 300,
            identity: format!("spiffe://{CLUSTER}/user/ada"),
        }
    }

    /// Pings the guest through the node with this ticket: the error of a refusal.
    pub(crate) async fn ping(&self, laptop: &Laptop, ticket: &Ticket) -> Result<(), StreamError> {
        let signed = self.control.signer.sign(ticket);
        laptop.ping(signed).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            node.shutdown_background();
        }
        self.doubles.end_all();
    }
}

pub(crate) struct Laptop {
    spki: [u8; 32],
    link: LinkConnection,
    _client: LinkClient,
}

impl Laptop {
    pub(crate) async fn ping(&self, ticket: Vec<u8>) -> Result<(), StreamError> {
        let kind = Some(Kind::Ping(PingOpen { guest: true }));
        let mut stream = self.open(&StreamOpen { ticket, kind }).await;
        let answer = tokio::time::timeout(WAIT_MAX, stream.reader.next());
        let frame = answer.await.unwrap().unwrap().unwrap();
        if frame.is(FrameKind::Pong) { Ok(()) } else { Err(frame.decode().unwrap()) }
    }

    pub(crate) async fn open(&self, open: &StreamOpen) -> LinkStream {
        let mut stream = self.link.open(Priority::Control).await.unwrap();
        stream.writer.send(&Frame::message(FrameKind::Open, open)).await.unwrap();
        stream
    }
}

fn leaf(ca: &CertificateAuthority, role: Role, name: &str) -> (String, String) {
    let key = LeafKey::generate().unwrap();
    let identity = Identity::new(CLUSTER, role, name).unwrap();
    let life = Duration::from_secs(24 * 3600);
    let certificate = ca.issue(&key.csr_pem().unwrap(), &identity, SystemTime::now(), life);
    (certificate.unwrap(), key.to_pem())
}

pub(crate) fn store(ca: &CertificateAuthority, role: Role, name: &str) -> CertStore {
    let (certificate, key) = leaf(ca, role, name);
    CertStore::new(&certificate, &key, ca.certificate()).unwrap()
}

#[expect(clippy::print_stderr, reason = "a test says why it is skipped")]
pub(crate) fn print_skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}
