//! The laptop's side of a sandbox's story: find or create it, follow it until it runs, change
//! what is wanted of it.
//!
//! Leaves where and whether to the control plane. Waiting is level-triggered (each message is the
//! whole record) and ends when nothing has changed for [`SILENCE_MAX`].

use std::time::Duration;

use tokio_stream::StreamExt as _;
use towline_link::status::RpcError;
use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, Desired, Phase};

use crate::cluster::Cluster;
use crate::error::Failure;
use crate::folder::ProjectFolder;
use crate::output::{Printer, human};
use crate::session::{Client, new_key};

/// How long a sandbox on its way may show no change at all: an emulated boot on a busy machine
/// takes tens of seconds, a large image minutes but with progress.
const SILENCE_MAX: Duration = Duration::from_secs(180);
/// How often a cut watch is taken up again, each after a pause.
const WATCH_RETRIES: u32 = 60;
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// Returns the request that finds a sandbox by what was typed: an id or a name.
pub fn which(text: &str) -> v1::GetSandboxRequest {
    use v1::get_sandbox_request::Which;
    let which = match text.parse::<SandboxId>() {
        Ok(id) => Which::Id(id.to_vec()),
        Err(_) => Which::Name(text.to_owned()),
    };
    v1::GetSandboxRequest { which: Some(which) }
}

/// Returns the sandbox's name and, where it has none yet, its id.
pub fn name(sandbox: &v1::Sandbox) -> String {
    let name = sandbox.spec.as_ref().map(|spec| spec.name.clone()).unwrap_or_default();
    match name.is_empty() {
        true => crate::output::json::id_text::<SandboxId>(&sandbox.id),
        false => human::printable(&name),
    }
}

/// Returns what the node has seen last.
pub fn phase(sandbox: &v1::Sandbox) -> Phase {
    sandbox.observed.as_ref().map_or(Phase::Placed, v1::Observed::phase)
}

/// Fails unless it runs; `what` would be done with it.
pub fn must_run(sandbox: &v1::Sandbox, what: &str) -> Result<(), Failure> {
    let name = name(sandbox);
    let hint = match phase(sandbox) {
        Phase::Running => return Ok(()),
        Phase::Paused => format!("`tow resume {name}`"),
        _ => format!("`tow start {name}`"),
    };
    let text = format!("sandbox {name} does not run: running sandboxes are {what} only");
    Err(Failure::new(text).hint(hint))
}

/// Finds a sandbox by id or name.
pub async fn find(cluster: &Cluster, text: &str) -> anyhow::Result<v1::Sandbox> {
    let request = which(text);
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.get_sandbox(request).await }
    };
    cluster.try_call(call).await.map_err(|error| match error {
        RpcError::NotFound(_) => {
            let text = format!("there is no sandbox `{}`", human::printable(text));
            Failure::new(text).hint("`tow ls` lists them").into()
        }
        other => cluster.explain(other),
    })
}

/// Lists all sandboxes, or those of a folder.
pub async fn list(
    cluster: &Cluster,
    folder: Option<&ProjectFolder>,
) -> anyhow::Result<Vec<v1::Sandbox>> {
    let mut all = Vec::new();
    let mut page = Vec::new();
    loop {
        let folder = folder.map(ProjectFolder::to_proto);
        let request = v1::ListSandboxesRequest { limit: 0, page, folder };
        let answer = cluster
            .call(|mut client| {
                let request = request.clone();
                async move { client.list_sandboxes(request).await }
            })
            .await?;
        all.extend(answer.sandboxes);
        if answer.next_page.is_empty() {
            return Ok(all);
        }
        page = answer.next_page;
    }
}

/// Creates a sandbox. A call whose answer was lost is repeated with the same key.
pub async fn create(cluster: &Cluster, spec: v1::SandboxSpec) -> anyhow::Result<v1::Sandbox> {
    let request = v1::CreateSandboxRequest { idempotency_key: new_key(), spec: Some(spec) };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.create_sandbox(request).await }
    };
    cluster.call(call).await
}

/// Says what is wanted of a sandbox.
pub async fn set_desired(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    desired: Desired,
) -> anyhow::Result<v1::Sandbox> {
    let request = v1::SetDesiredRequest {
        idempotency_key: new_key(),
        id: sandbox.id.clone(),
        desired: desired.into(),
        expect_generation: 0,
    };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.set_desired(request).await }
    };
    cluster.call(call).await
}

/// Brings a sandbox to Running, whatever it was, and waits until it is.
pub async fn ensure_running(
    cluster: &Cluster,
    sandbox: v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<v1::Sandbox> {
    let sandbox = match phase(&sandbox) {
        _ if sandbox.desired() == Desired::Paused => {
            printer.hint(format!("sandbox {} is paused; it is resumed", name(&sandbox)));
            set_desired(cluster, &sandbox, Desired::Running).await?
        }
        Phase::Running if sandbox.desired() == Desired::Running => return Ok(sandbox),
        Phase::Lost => return Err(lost(&sandbox)),
        Phase::Stopped | Phase::Failed | Phase::Stopping => {
            start(cluster, sandbox, printer).await?
        }
        _ if sandbox.desired() != Desired::Running => start(cluster, sandbox, printer).await?,
        _ => sandbox,
    };
    wait_running(cluster, &sandbox, printer).await
}

/// Lets a paused sandbox go on and waits until it does.
pub async fn resume(
    cluster: &Cluster,
    sandbox: v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<v1::Sandbox> {
    if !matches!(sandbox.desired(), Desired::Paused | Desired::Running) {
        let name = name(&sandbox);
        return Err(Failure::new(format!(
            "sandbox {name} is not paused: it is {}",
            word(&sandbox)
        ))
        .hint(format!("`tow start {name}`"))
        .into());
    }
    let wanted = set_desired(cluster, &sandbox, Desired::Running).await?;
    wait_running(cluster, &wanted, printer).await
}

/// Waits until a sandbox is paused, or is known not to be.
pub async fn wait_paused(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<v1::Sandbox> {
    let progress = printer.progress(format!("pausing {}", name(sandbox)));
    let generation = sandbox.generation;
    follow(cluster, sandbox, |now| {
        progress.set(describe(now));
        let observed = now.observed.clone().unwrap_or_default();
        let not_paused = |why: &str| {
            let name = name(now);
            Some(Err(Failure::new(format!("sandbox {name} was not paused: {why}"))
                .hint(format!("`tow why {name}`"))
                .into()))
        };
        match observed.phase() {
            Phase::Paused if observed.generation >= generation => Some(Ok(())),
            Phase::Lost => Some(Err(lost(now))),
            _ if now.desired() != Desired::Paused => {
                not_paused("somebody else wanted it otherwise")
            }
            // What is said about an older wish is history.
            Phase::Running | Phase::Stopped | Phase::Failed
                if observed.generation >= generation =>
            {
                not_paused(&format!("it is {}: {}", word(now), reason(now)))
            }
            _ => None,
        }
    })
    .await
}

/// Makes copies of a running sandbox. A call whose answer was lost is repeated with the same key.
pub async fn fork(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    count: u32,
    name: String,
) -> anyhow::Result<Vec<v1::Sandbox>> {
    let id = sandbox.id.clone();
    let request = v1::ForkSandboxRequest { idempotency_key: new_key(), id, count, name };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.fork_sandbox(request).await }
    };
    Ok(cluster.call(call).await?.sandboxes)
}

/// The phase as people call it.
fn word(sandbox: &v1::Sandbox) -> String {
    crate::output::json::phase(sandbox)
}

async fn start(
    cluster: &Cluster,
    sandbox: v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<v1::Sandbox> {
    let reason = reason(&sandbox);
    let why = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    printer.hint(format!("sandbox {} was stopped{why}; starting it", name(&sandbox)));
    set_desired(cluster, &sandbox, Desired::Running).await
}

/// Returns what was last said of it, fit for a terminal; empty when there is nothing to say.
pub fn reason(sandbox: &v1::Sandbox) -> String {
    human::printable(sandbox.observed.as_ref().map_or("", |observed| &observed.reason))
}

fn lost(sandbox: &v1::Sandbox) -> anyhow::Error {
    let name = name(sandbox);
    Failure::new(format!("sandbox {name} is lost: its node is gone, and its disk with it"))
        .hint(format!("`tow rm {name}` removes what is left; `tow run` then makes a new one"))
        .into()
}

/// Waits until a sandbox runs, with what happens on the way on stderr.
pub async fn wait_running(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<v1::Sandbox> {
    let progress = printer.progress(describe(sandbox));
    let generation = sandbox.generation;
    follow(cluster, sandbox, |now| {
        progress.set(describe(now));
        let observed = now.observed.clone().unwrap_or_default();
        // What is said about an older wish is history.
        let current = observed.generation >= generation;
        match observed.phase() {
            Phase::Running if current => Some(Ok(())),
            Phase::Failed if current => Some(Err(failed(now))),
            Phase::Stopped if current => Some(Err(failed(now))),
            Phase::Lost => Some(Err(lost(now))),
            _ if now.desired() != Desired::Running => Some(Err(Failure::new(format!(
                "somebody else wanted sandbox {} stopped while it was starting",
                name(now)
            ))
            .into())),
            _ => None,
        }
    })
    .await
}

/// Waits until a sandbox no longer runs; `None` when it is gone altogether.
pub async fn wait_stopped(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<()> {
    let progress = printer.progress(format!("stopping {}", name(sandbox)));
    let generation = sandbox.generation;
    follow(cluster, sandbox, |now| {
        progress.set(describe(now));
        let observed = now.observed.clone().unwrap_or_default();
        let ended = matches!(observed.phase(), Phase::Stopped | Phase::Failed | Phase::Lost);
        // One that never ran has nothing to stop, and nobody to say so.
        let never = now.observed.is_none();
        (ended && observed.generation >= generation || never && phase(now) == Phase::Lost)
            .then_some(Ok(()))
    })
    .await
    .map(drop)
}

/// Waits until a removed sandbox is gone; returns what that freed, where the node said so.
pub async fn wait_gone(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    printer: &Printer,
) -> anyhow::Result<Option<u64>> {
    let progress = printer.progress(format!("removing {}", name(sandbox)));
    let end = follow(cluster, sandbox, |now| {
        progress.set(describe(now));
        (phase(now) == Phase::Gone).then_some(Ok(()))
    })
    .await;
    match end {
        Ok(last) => Ok(last.observed.map(|observed| observed.freed_bytes)),
        Err(error) if error.is::<Gone>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The record is no longer there.
#[derive(Debug, thiserror::Error)]
#[error("sandbox {0} was removed")]
struct Gone(String);

/// Follows a sandbox until `decide` has an answer. A watch that is cut is taken up again.
async fn follow(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    mut decide: impl FnMut(&v1::Sandbox) -> Option<anyhow::Result<()>>,
) -> anyhow::Result<v1::Sandbox> {
    let mut cuts = 0;
    loop {
        match watch_once(cluster, sandbox, &mut decide).await? {
            Watched::Decided(now) => return Ok(*now),
            Watched::Cut(error) => {
                cuts += 1;
                if cuts > WATCH_RETRIES {
                    return Err(error);
                }
                tracing::debug!(%error, "watch was cut");
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        }
    }
}

enum Watched {
    Decided(Box<v1::Sandbox>),
    Cut(anyhow::Error),
}

/// Tells every change of a sandbox, the present one first, until it is gone or `tell` fails. A
/// watch that is cut is taken up again.
pub async fn changes(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    mut tell: impl FnMut(&v1::Sandbox) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let id = v1::get_sandbox_request::Which::Id(sandbox.id.clone());
    let request = v1::GetSandboxRequest { which: Some(id) };
    let mut cuts = 0;
    while cuts <= WATCH_RETRIES {
        match cluster.client().watch_sandbox(request.clone()).await.map_err(RpcError::from) {
            Ok(answer) => {
                let mut changes = answer.into_inner();
                while let Some(Ok(now)) = changes.next().await {
                    cuts = 0;
                    tell(&now)?;
                }
            }
            Err(RpcError::NotFound(_)) => return Ok(()),
            Err(error) if error.may_retry() => {}
            Err(error) => return Err(cluster.explain(error)),
        }
        cuts += 1;
        tokio::time::sleep(WATCH_PAUSE).await;
    }
    Err(Failure::new("the control plane could not be watched any more").hint("`tow status`").into())
}

async fn watch_once(
    cluster: &Cluster,
    sandbox: &v1::Sandbox,
    decide: &mut impl FnMut(&v1::Sandbox) -> Option<anyhow::Result<()>>,
) -> anyhow::Result<Watched> {
    let id = v1::get_sandbox_request::Which::Id(sandbox.id.clone());
    let request = v1::GetSandboxRequest { which: Some(id) };
    let gone = || anyhow::Error::from(Gone(name(sandbox)));
    let mut changes = match cluster.client().watch_sandbox(request).await.map_err(RpcError::from) {
        Ok(answer) => answer.into_inner(),
        Err(RpcError::NotFound(_)) => return Err(gone()),
        Err(error) if error.may_retry() => return Ok(Watched::Cut(cluster.explain(error))),
        Err(error) => return Err(cluster.explain(error)),
    };
    let mut last: Option<v1::Sandbox> = None;
    loop {
        let next = tokio::time::timeout(SILENCE_MAX, changes.next()).await;
        let next = next.map_err(|_| silent(last.as_ref().unwrap_or(sandbox)))?;
        match next.map(|next| next.map_err(RpcError::from)) {
            Some(Ok(now)) => {
                if let Some(answer) = decide(&now) {
                    return answer.map(|()| Watched::Decided(Box::new(now)));
                }
                last = Some(now);
            }
            Some(Err(RpcError::NotFound(_))) => return Err(gone()),
            Some(Err(error)) => return Ok(Watched::Cut(cluster.explain(error))),
            None => match last {
                Some(now) if now.desired() == Desired::Deleted => return Err(gone()),
                _ => return Ok(Watched::Cut(anyhow::anyhow!("the watch ended"))),
            },
        }
    }
}

fn silent(sandbox: &v1::Sandbox) -> anyhow::Error {
    let text = format!(
        "nothing has happened for {} s while waiting for sandbox {} ({})",
        SILENCE_MAX.as_secs(),
        name(sandbox),
        describe(sandbox)
    );
    Failure::new(text)
        .hint("`tow status` says how the cluster is, `tow inspect` how the sandbox is")
        .into()
}

fn failed(sandbox: &v1::Sandbox) -> anyhow::Error {
    let name = name(sandbox);
    let reason = match reason(sandbox) {
        reason if reason.is_empty() => "the node gave no reason".into(),
        reason => reason,
    };
    Failure::new(format!("sandbox {name} could not be started: {reason}"))
        .hint(format!("`tow start {name}` tries again, `tow rm {name}` removes it"))
        .into()
}

/// Says where a sandbox is on its way.
fn describe(sandbox: &v1::Sandbox) -> String {
    let reason = reason(sandbox);
    let what = match phase(sandbox) {
        Phase::Unspecified | Phase::Placed => "waiting for the node",
        Phase::Preparing => "preparing image",
        Phase::Booting => "booting",
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
        Phase::Unknown => "its node is silent",
        Phase::Lost => "lost",
        Phase::Deleting | Phase::Gone => "removing",
    };
    match reason.is_empty() {
        true => format!("{}: {what}", name(sandbox)),
        false => format!("{}: {what}: {reason}", name(sandbox)),
    }
}

/// Returns a sandbox as it is now; `None` when it is gone.
pub async fn by_id(cluster: &Cluster, id: &[u8]) -> anyhow::Result<Option<v1::Sandbox>> {
    let id = v1::get_sandbox_request::Which::Id(id.to_vec());
    let request = v1::GetSandboxRequest { which: Some(id) };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.get_sandbox(request).await }
    };
    match cluster.try_call(call).await {
        Ok(sandbox) => Ok(Some(sandbox)),
        Err(RpcError::NotFound(_)) => Ok(None),
        Err(error) => Err(cluster.explain(error)),
    }
}
