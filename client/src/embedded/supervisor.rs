//! The supervisor: brings the cluster up in order, keeps it up, takes it down.
//!
//! Order: member, our identity and context, node token, node agent, node READY. Everything runs
//! on one thread (see `child.rs`); every wait is bounded and says what it waits for.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::child::{self, Spec, Stopping};
use super::enrol::{self, Admin};
use super::layout::Layout;
use super::lock::Lock;
use super::{configs, ready};
use crate::error::Failure;

/// Bound on the control plane's first answer.
const MEMBER_MAX: Duration = Duration::from_secs(30);
/// Bound on the node's registration: it may probe KVM and fetch the guest kernel first.
const NODE_MAX: Duration = Duration::from_secs(180);
/// A child that ended this often before it ever answered will not answer.
const ENDS_MAX: u32 = 3;
/// Pause between two questions while waiting.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How often our certificate's age is looked at.
const RENEW_EVERY: Duration = Duration::from_secs(600);

/// Tells whoever started us how it goes.
#[derive(Debug)]
pub struct Reporter {
    /// One line per step on stdout, for the `tow` that waits; else nothing.
    pub to_stdout: bool,
}

impl Reporter {
    fn line(&self, line: &str) {
        if self.to_stdout {
            // Whoever started us may be gone: the cluster is wanted all the same.
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }

    /// Another supervisor was faster.
    pub fn other(&self) {
        self.line("other");
    }

    /// It came to nothing.
    pub fn failed(&self, error: &anyhow::Error) {
        let hint = crate::error::hint(error).unwrap_or_default();
        let told = serde_json::json!({ "text": format!("{error:#}"), "hint": hint });
        self.line(&format!("failed {told}"));
    }

    fn step(&self, text: &str) {
        tracing::info!("{text}");
        self.line(&format!("step {text}"));
    }
}

/// Runs the cluster until a signal. `verbose` shows the children's logs on our stderr. Returns
/// false when another supervisor is at work already.
pub async fn supervise(
    layout: &Layout,
    reporter: &Reporter,
    verbose: bool,
    on_ready: impl FnOnce(),
) -> anyhow::Result<bool> {
    let Some(_lock) = Lock::try_take(&layout.lock()).context("locking the embedded cluster")?
    else {
        return Ok(false);
    };
    let _ = std::fs::remove_file(layout.down_mark());
    let listen = configs::write(layout)?;
    let member = spec(layout, "control-plane", "towline-control-plane", verbose)?;
    let node = spec(layout, "node-agent", "towline-node-agent", verbose)?;
    let (stop_node, node_stopping) = watch::channel(false);
    let (stop_member, member_stopping) = watch::channel(false);
    let (member_ends, node_ends) = (watch::Sender::new(0), watch::Sender::new(0));

    let members = child::keep_running(&member, member_stopping, &member_ends);
    let ends = (&member_ends, &node_ends);
    let work = async {
        let mut signals = Signals::listen()?;
        let node = run_node(layout, reporter, &node, listen, node_stopping, on_ready, ends);
        let mut node = std::pin::pin!(node);
        let done = tokio::select! {
            done = &mut node => done,
            () = signals.any() => {
                let _ = stop_node.send(true);
                // A second signal is somebody in a hurry.
                tokio::select! { done = node => done, () = signals.any() => Ok(()) }
            }
        };
        // The member last: the node agent reports to it until it is gone.
        let _ = stop_member.send(true);
        done
    };
    tokio::try_join!(members, work).map(|_| true)
}

async fn run_node(
    layout: &Layout,
    reporter: &Reporter,
    node: &Spec,
    listen: SocketAddr,
    mut stopping: Stopping,
    on_ready: impl FnOnce(),
    (member_ends, node_ends): (&watch::Sender<u32>, &watch::Sender<u32>),
) -> anyhow::Result<()> {
    reporter.step("starting the control plane");
    let mut admin = tokio::select! {
        admin = prepare(layout, listen, member_ends) => admin?,
        _ = stopping.wait_for(|stop| *stop) => return Ok(()),
    };
    reporter.step("starting the node agent");
    let watching = async {
        wait_node(layout, &mut admin, node_ends, reporter).await?;
        reporter.line("ready");
        on_ready();
        loop {
            sleep(RENEW_EVERY).await;
            if let Err(error) = enrol::ensure_user(&mut admin, layout, &listen.to_string()).await {
                tracing::warn!(%error, "could not renew the user's certificate; trying again");
            }
        }
    };
    tokio::select! {
        kept = child::keep_running(node, stopping, node_ends) => kept,
        failed = watching => failed,
    }
}

/// What the node agent needs before it can start.
async fn prepare(
    layout: &Layout,
    listen: SocketAddr,
    ends: &watch::Sender<u32>,
) -> anyhow::Result<Admin> {
    let mut admin = wait_member(layout, ends).await?;
    enrol::ensure_user(&mut admin, layout, &listen.to_string()).await?;
    enrol::write_node_token(&mut admin, layout).await?;
    Ok(admin)
}

fn spec(layout: &Layout, name: &'static str, program: &str, verbose: bool) -> anyhow::Result<Spec> {
    let config = match name {
        "control-plane" => layout.member_config(),
        _ => layout.node_config(),
    };
    Ok(Spec {
        name,
        program: Layout::binary(program)?,
        config,
        log: layout.log(name),
        inherit_output: verbose,
    })
}

async fn wait_member(layout: &Layout, ends: &watch::Sender<u32>) -> anyhow::Result<Admin> {
    let deadline = Instant::now() + MEMBER_MAX;
    loop {
        let error = match enrol::connect(layout).await {
            Ok(mut admin) => match ready::ask(&mut admin).await {
                Ok(_) => return Ok(admin),
                Err(error) => error,
            },
            Err(error) => error,
        };
        give_up_after(deadline, ends, layout, "control-plane", error)?;
        sleep(ASK_EVERY).await;
    }
}

async fn wait_node(
    layout: &Layout,
    admin: &mut Admin,
    ends: &watch::Sender<u32>,
    reporter: &Reporter,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut told = false;
    loop {
        let error = match ready::ask(admin).await {
            Ok(health) if health.is_ready() => return Ok(()),
            Ok(_) => anyhow::anyhow!("the node has not registered yet"),
            Err(error) => error,
        };
        give_up_after(began + NODE_MAX, ends, layout, "node-agent", error)?;
        if !told && began.elapsed() > Duration::from_secs(3) {
            reporter.step("waiting for the node (the first time it fetches the guest's kernel)");
            told = true;
        }
        sleep(ASK_EVERY).await;
    }
}

fn give_up_after(
    deadline: Instant,
    ends: &watch::Sender<u32>,
    layout: &Layout,
    name: &str,
    error: anyhow::Error,
) -> anyhow::Result<()> {
    let ended = *ends.borrow();
    if ended < ENDS_MAX && Instant::now() < deadline {
        return Ok(());
    }
    let log = layout.log(name);
    let what = match ended < ENDS_MAX {
        true => "did not become ready in time",
        false => "ends as soon as it is started",
    };
    let tail = child::tail(&log, 3);
    let failure = Failure::new(format!("the embedded cluster's {name} {what}"))
        .hint(format!("see `{}`, or run `tow up -v`", log.display()));
    Err(match tail.is_empty() {
        true => failure.because(error),
        false => failure.because(anyhow::anyhow!("its log ends with:\n{tail}")),
    }
    .into())
}

/// What stops a supervisor.
struct Signals([tokio::signal::unix::Signal; 3]);

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening to signals");
        Ok(Self([
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
