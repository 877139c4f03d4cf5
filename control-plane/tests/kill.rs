//! kill -9 of the real binary at random moments of a create, stop, remove load: afterwards every
//! acknowledged change is there, and none is there twice. `TOWLINE_KILLS` asks for more kills.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{FakeNode, LONG, Server, client, key, list, set, spec};
use tonic::transport::Channel;
use tonic::{Code, Status};
use towline_link::rpc::ControlPlaneClient;
use towline_proto::v1::{self, Desired};

const CLIENTS: usize = 8;

/// What one client knows to be so, by name of sandbox.
type Acknowledged = BTreeMap<String, (Vec<u8>, Desired)>;

/// Repeats one call, with its key, until it is answered.
async fn insist<F, T>(socket: &Path, mut call: impl FnMut(ControlPlaneClient<Channel>) -> F) -> T
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let insist = async {
        loop {
            match call(client(socket.to_owned()).await).await {
                Ok(answer) => return answer.into_inner(),
                Err(status) => {
                    let broken = !matches!(
                        status.code(),
                        Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition
                    );
                    assert!(broken, "a repeated request was refused: {status}");
                }
            }
        }
    };
    tokio::time::timeout(LONG, insist).await.expect("a repeated request is answered")
}

async fn load(
    socket: PathBuf,
    me: usize,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
) -> Acknowledged {
    let mut acknowledged = Acknowledged::new();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("c{me}-{n}");
        let create = v1::CreateSandboxRequest { idempotency_key: key(), spec: Some(spec(&name)) };
        let made = insist(&socket, |mut c| {
            let create = create.clone();
            async move { c.create_sandbox(create).await }
        })
        .await;
        acknowledged.insert(name.clone(), (made.id.clone(), Desired::Running));
        done.fetch_add(1, Ordering::Relaxed);
        for desired in [Desired::Stopped, Desired::Deleted].into_iter().take(n % 3) {
            let change = set(&made.id, desired);
            let changed = insist(&socket, |mut c| {
                let change = change.clone();
                async move { c.set_desired(change).await }
            })
            .await;
            assert_eq!(changed.desired(), desired);
            acknowledged.insert(name.clone(), (made.id.clone(), desired));
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
    acknowledged
}

/// Kills once the load has come so much further, or after the pause if it is stuck.
async fn progress(done: &AtomicUsize, by: usize) {
    let target = done.load(Ordering::Relaxed) + by;
    let wait = async {
        while done.load(Ordering::Relaxed) < target {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("the load goes on after a restart");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kills_exactly_once() {
    let kills: usize =
        std::env::var("TOWLINE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let mut server = Server::start().await;
    let node = FakeNode::start(server.socket(), 1 << 40);
    let mut first = server.client().await;
    let there = async {
        while first.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes.is_empty()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, there).await.expect("the node registers");
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|me| tokio::spawn(load(server.socket(), me, Arc::clone(&stop), Arc::clone(&done))))
        .collect();
    for kill in 0..kills {
        // Uneven numbers of changes, so that the kills fall at different moments of a batch.
        progress(&done, 7 + (kill * 13) % 40).await;
        server.kill();
        server.spawn();
    }
    progress(&done, 20).await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Acknowledged::new();
    for client in clients {
        acknowledged.extend(client.await.unwrap());
    }
    server.kill();
    server.spawn();
    check(&mut server.client().await, &acknowledged, &node).await;
}

async fn check(
    client: &mut ControlPlaneClient<Channel>,
    acknowledged: &Acknowledged,
    node: &FakeNode,
) {
    let settled = async {
        loop {
            let found = list(client).await;
            if found.iter().all(|sandbox| sandbox.desired() != Desired::Deleted) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let found = tokio::time::timeout(LONG, settled).await.expect("removed records go");
    let mut names = BTreeMap::new();
    for sandbox in &found {
        let name = sandbox.spec.as_ref().unwrap().name.clone();
        let twice = names.insert(name.clone(), (sandbox.id.clone(), sandbox.desired()));
        assert!(twice.is_none(), "{name} is there twice");
    }
    let mut wanted = acknowledged.clone();
    wanted.retain(|_, (_, desired)| *desired != Desired::Deleted);
    assert_eq!(names, wanted, "exactly what was acknowledged is there");
    assert!(wanted.len() > 5, "the load did something");
    let on_node = async {
        loop {
            let there: Vec<_> = node.has.lock().unwrap().keys().cloned().collect();
            if there.len() == wanted.len() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, on_node).await.expect("the node has exactly what is wanted");
}
