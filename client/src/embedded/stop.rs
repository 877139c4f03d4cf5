//! Takes the embedded cluster down: its sandboxes first (disks kept), then its processes.

use std::time::Duration;

use anyhow::Context as _;
use towline_link::status::RpcError;
use towline_proto::v1;

use super::enrol::{self, Admin};
use super::layout::Layout;
use super::lock::Holder;
use crate::error::Failure;
use crate::output::Printer;
use crate::session::new_key;

/// Bound on the sandboxes' stopping.
const SANDBOXES_MAX: Duration = Duration::from_secs(60);
/// Bound on the supervisor's: each child has 10 s, one after the other.
const SUPERVISOR_MAX: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(100);

/// What was found and done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Nothing ran.
    WasDown,
    /// It is down now; so many sandboxes were stopped.
    Now(usize),
}

/// Stops the cluster if it runs.
pub async fn stop(layout: &Layout, printer: &Printer) -> anyhow::Result<Stopped> {
    let Some(holder) = Holder::find(&layout.lock())? else {
        return Ok(Stopped::WasDown);
    };
    let progress = printer.progress("stopping sandboxes");
    let stopped = match stop_sandboxes(layout).await {
        Ok(stopped) => stopped,
        Err(error) => {
            printer.warning(format!("could not stop all sandboxes: {error:#}"));
            0
        }
    };
    progress.set("stopping the embedded cluster");
    std::fs::write(layout.down_mark(), b"").context("writing down that it is down")?;
    holder.terminate().context("asking the supervisor to stop")?;
    let gone = tokio::task::spawn_blocking(move || holder.wait(SUPERVISOR_MAX)).await??;
    match gone {
        true => Ok(Stopped::Now(stopped)),
        false => Err(Failure::new("the supervisor did not stop within 30 s")
            .hint(format!("see `{}`", layout.log("supervisor").display()))
            .into()),
    }
}

async fn stop_sandboxes(layout: &Layout) -> anyhow::Result<usize> {
    let stop = async {
        let mut admin = enrol::connect(layout).await?;
        let wanted = list(&mut admin).await?;
        let running: Vec<_> = wanted.iter().filter(|s| s.desired().is_up()).collect();
        for sandbox in &running {
            let request = v1::SetDesiredRequest {
                idempotency_key: new_key(),
                id: sandbox.id.clone(),
                desired: v1::Desired::Stopped.into(),
                expect_generation: 0,
            };
            admin.set_desired(request).await.map_err(RpcError::from)?;
        }
        while list(&mut admin).await?.iter().any(has_vm) {
            tokio::time::sleep(ASK_EVERY).await;
        }
        anyhow::Ok(running.len())
    };
    tokio::time::timeout(SANDBOXES_MAX, stop).await.context("not all stopped within 60 s")?
}

fn has_vm(sandbox: &v1::Sandbox) -> bool {
    use v1::Phase;
    let phase = sandbox.observed.clone().unwrap_or_default().phase();
    matches!(
        phase,
        Phase::Preparing | Phase::Booting | Phase::Running | Phase::Paused | Phase::Stopping
    )
}

async fn list(admin: &mut Admin) -> anyhow::Result<Vec<v1::Sandbox>> {
    let mut all = Vec::new();
    let mut page = Vec::new();
    loop {
        let request = v1::ListSandboxesRequest { page, ..Default::default() };
        let answer = admin.list_sandboxes(request).await.map_err(RpcError::from)?.into_inner();
        all.extend(answer.sandboxes);
        if answer.next_page.is_empty() {
            return Ok(all);
        }
        page = answer.next_page;
    }
}
