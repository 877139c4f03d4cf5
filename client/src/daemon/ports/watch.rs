//! Follows a sandbox with published ports: whether it runs (then the daemon stays), and when it is
//! removed (then its ports are free). A control plane that is away for a while means neither.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use towline_link::status::RpcError;
use towline_proto::v1::{self, Desired, Phase};

use super::{Ports, Scope};
use crate::daemon::clusters::Clusters;

/// Bound on the beginning of a watch; its messages come when something changes.
const BEGIN_MAX: Duration = Duration::from_secs(10);
/// First and longest pause after a watch that was cut.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Cuts in a row after which a sandbox is no reason to stay any more.
const CUTS_MAX: u32 = 10;

/// A sandbox that is followed for as long as this is kept.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) scope: Scope,
    running: Arc<AtomicBool>,
    _task: JoinSet<()>,
}

/// Why a watch ended.
enum Ended {
    /// There is no such sandbox any more.
    Gone,
    Cut,
}

impl Watch {
    pub(super) fn start(ports: Weak<Ports>, clusters: Arc<Clusters>, scope: Scope) -> Self {
        // It is published for what runs, or will soon.
        let running = Arc::new(AtomicBool::new(true));
        let mut task = JoinSet::new();
        let (its, said) = (scope.clone(), Arc::clone(&running));
        task.spawn(async move { follow(ports, &clusters, its, &said).await });
        Self { scope, running, _task: task }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }
}

async fn follow(ports: Weak<Ports>, clusters: &Clusters, scope: Scope, running: &AtomicBool) {
    let (mut pause, mut cuts) = (PAUSES.0, 0);
    loop {
        let mut heard = false;
        if let Ended::Gone = watch(clusters, &scope, running, &mut heard).await {
            if let Some(ports) = ports.upgrade() {
                // Of its own: it ends this one.
                tokio::spawn(async move { ports.forget(&scope).await });
            }
            return;
        }
        (pause, cuts) = if heard { (PAUSES.0, 0) } else { (pause, cuts + 1) };
        if cuts >= CUTS_MAX {
            running.store(false, Ordering::Relaxed);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn watch(
    clusters: &Clusters,
    scope: &Scope,
    running: &AtomicBool,
    heard: &mut bool,
) -> Ended {
    let Ok(cluster) = clusters.get(&scope.config, &scope.context).await else { return Ended::Cut };
    let which = v1::get_sandbox_request::Which::Id(scope.sandbox.to_vec());
    let request = v1::GetSandboxRequest { which: Some(which) };
    let mut client = cluster.session.client();
    let begun = timeout(BEGIN_MAX, client.watch_sandbox(request)).await;
    let mut changes = match begun.map(|answer| answer.map_err(RpcError::from)) {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(RpcError::NotFound(_))) => return Ended::Gone,
        Ok(Err(_)) | Err(_) => return Ended::Cut,
    };
    let mut deleted = false;
    loop {
        match changes.next().await.map(|next| next.map_err(RpcError::from)) {
            Some(Ok(now)) => {
                *heard = true;
                let phase = now.observed.as_ref().map_or(Phase::Placed, v1::Observed::phase);
                deleted = now.desired() == Desired::Deleted;
                if phase == Phase::Gone {
                    return Ended::Gone;
                }
                let runs = now.desired().is_up() && phase != Phase::Lost;
                running.store(runs, Ordering::Relaxed);
            }
            Some(Err(RpcError::NotFound(_))) => return Ended::Gone,
            None if deleted => return Ended::Gone,
            Some(Err(_)) | None => return Ended::Cut,
        }
    }
}
