//! The real binary in a temporary directory, clients over its admin socket, and a node that does at
//! once whatever it is told.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use towline_link::rpc::{self, ControlPlaneClient};
use towline_proto::v1::{self, Desired, Phase, node_directive::Directive, node_report::Report};

/// Bound of every wait; only a hang takes so long.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) struct Server {
    pub(crate) dir: tempfile::TempDir,
    child: Option<Child>,
}

impl Server {
    pub(crate) fn prepare() -> Self {
        let dir = tempfile::Builder::new().prefix("towcp").tempdir().unwrap();
        let config = format!(
            "data_dir = \"{}\"\nlisten = \"127.0.0.1:0\"\nmember_name = \"m1\"\n",
            dir.path().join("data").display()
        );
        std::fs::write(dir.path().join("cp.toml"), config).unwrap();
        Self { dir, child: None }
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_towline-control-plane"));
        command.arg("--config").arg(self.dir.path().join("cp.toml")).env("TOWLINE_LOG", "warn");
        command
    }

    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        self.child = Some(self.command().stdout(Stdio::null()).spawn().unwrap());
    }

    /// Spawns it and waits until it answers.
    pub(crate) async fn start() -> Self {
        let mut server = Self::prepare();
        server.spawn();
        drop(server.client().await);
        server
    }

    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().expect("it runs");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.data().join("admin.sock")
    }

    pub(crate) async fn client(&self) -> ControlPlaneClient<Channel> {
        client(self.socket()).await
    }

    pub(crate) fn endpoint(&self) -> String {
        std::fs::read_to_string(self.data().join("endpoint")).unwrap().trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Connects as soon as somebody answers.
pub(crate) async fn client(socket: PathBuf) -> ControlPlaneClient<Channel> {
    let connect = async {
        loop {
            if let Ok(channel) = rpc::connect_unix(&socket).await {
                return rpc::control_plane(channel);
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(LONG, connect).await.expect("the control plane answers")
}

/// 16 bytes that nobody else uses.
pub(crate) fn key() -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut key = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes().to_vec();
    key.extend(std::process::id().to_be_bytes());
    key
}

pub(crate) fn spec(name: &str) -> v1::SandboxSpec {
    let local = v1::LocalImage { home: b"/home/ada".to_vec() };
    let source = Some(v1::image_ref::Source::Local(local));
    let shape = v1::Shape { memory_mib: 128, disk_mib: 256, ..Default::default() };
    v1::SandboxSpec {
        name: name.into(),
        image: Some(v1::ImageRef { source }),
        shape: Some(shape),
        ..Default::default()
    }
}

pub(crate) fn by_id(id: &[u8]) -> v1::GetSandboxRequest {
    v1::GetSandboxRequest { which: Some(v1::get_sandbox_request::Which::Id(id.to_vec())) }
}

pub(crate) fn set(id: &[u8], desired: Desired) -> v1::SetDesiredRequest {
    v1::SetDesiredRequest {
        idempotency_key: key(),
        id: id.to_vec(),
        desired: desired.into(),
        expect_generation: 0,
    }
}

pub(crate) async fn list(client: &mut ControlPlaneClient<Channel>) -> Vec<v1::Sandbox> {
    let mut all = Vec::new();
    let mut page = Vec::new();
    loop {
        let request = v1::ListSandboxesRequest { limit: 50, page, folder: None };
        let answer = client.list_sandboxes(request).await.unwrap().into_inner();
        all.extend(answer.sandboxes);
        page = answer.next_page;
        if page.is_empty() {
            return all;
        }
    }
}

/// Waits until a sandbox looks as wanted.
pub(crate) async fn until(
    client: &mut ControlPlaneClient<Channel>,
    id: &[u8],
    wanted: impl Fn(&v1::Sandbox) -> bool,
) -> v1::Sandbox {
    let look = async {
        let mut views = client.watch_sandbox(by_id(id)).await.unwrap().into_inner();
        while let Some(view) = views.next().await {
            let view = view.unwrap();
            if wanted(&view) {
                return view;
            }
        }
        panic!("the sandbox went without looking as wanted");
    };
    tokio::time::timeout(LONG, look).await.expect("the sandbox comes to look as wanted")
}

/// A node with room for everything, which keeps what it has over sessions.
pub(crate) struct FakeNode {
    task: tokio::task::JoinHandle<()>,
    pub(crate) has: Arc<std::sync::Mutex<BTreeMap<Vec<u8>, v1::DesiredSandbox>>>,
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeNode {
    pub(crate) fn start(socket: PathBuf, memory_mib: u64) -> Self {
        let has = Arc::default();
        let task = tokio::spawn(live(socket, memory_mib, Arc::clone(&has)));
        Self { task, has }
    }
}

type Has = Arc<std::sync::Mutex<BTreeMap<Vec<u8>, v1::DesiredSandbox>>>;

async fn live(socket: PathBuf, memory_mib: u64, has: Has) {
    loop {
        if let Ok(channel) = rpc::connect_unix(&socket).await {
            session(channel, memory_mib, &has).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub(crate) fn register(memory_mib: u64) -> v1::NodeReport {
    let driver = v1::Driver {
        name: "fake".into(),
        isolation: v1::Isolation::Vm.into(),
        ..Default::default()
    };
    report(Report::Register(v1::RegisterNode {
        name: "node-1".into(),
        boot_id: "boot".into(),
        capacity: Some(v1::Capacity { cpus: 1_000_000, memory_mib, disk_mib: 1 << 40 }),
        link_endpoint: "127.0.0.1:7".into(),
        drivers: vec![driver],
        embedded: true,
        version: "test".into(),
        machine_cpus: 8,
    }))
}

pub(crate) fn report(report: Report) -> v1::NodeReport {
    v1::NodeReport { report: Some(report) }
}

async fn session(channel: Channel, memory_mib: u64, has: &Has) {
    let (reports, outgoing) = mpsc::channel(64);
    reports.send(register(memory_mib)).await.unwrap();
    let mut uplink = rpc::node_uplink(channel);
    let Ok(directives) = uplink.session(ReceiverStream::new(outgoing)).await else { return };
    let mut directives = directives.into_inner();
    let mut named: Option<Vec<Vec<u8>>> = Some(Vec::new());
    let mut sequence = 0;
    while let Ok(Some(directive)) = directives.message().await {
        match directive.directive {
            Some(Directive::Desired(desired)) => {
                if let Some(named) = &mut named {
                    named.push(desired.sandbox_id.clone());
                }
                sequence += 1;
                let observed = vec![obey(has, desired)];
                let batch = v1::ObservedBatch { sequence, observed };
                if reports.send(report(Report::Observed(batch))).await.is_err() {
                    return;
                }
            }
            Some(Directive::Bookmark(_)) => {
                if let Some(named) = named.take() {
                    has.lock().unwrap().retain(|id, _| named.contains(id));
                }
            }
            Some(Directive::MustReset(_)) => return,
            _ => {}
        }
    }
}

fn obey(has: &Has, desired: v1::DesiredSandbox) -> v1::Observed {
    let mut has = has.lock().unwrap();
    let phase = match desired.desired() {
        Desired::Running => Phase::Running,
        Desired::Paused => Phase::Paused,
        Desired::Stopped => Phase::Stopped,
        Desired::Deleted | Desired::Unspecified => Phase::Gone,
    };
    let observed = v1::Observed {
        sandbox_id: desired.sandbox_id.clone(),
        epoch: desired.epoch,
        generation: desired.generation,
        phase: phase.into(),
        driver: "fake".into(),
        ..Default::default()
    };
    if phase == Phase::Gone {
        has.remove(&desired.sandbox_id);
    } else {
        has.insert(desired.sandbox_id.clone(), desired);
    }
    observed
}
