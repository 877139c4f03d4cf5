//! Starts a supervisor in the background and waits until the cluster can be used.
//!
//! The background process is this same binary in a session of its own. Its stdout is a pipe to
//! us until it is ready, so its failure is ours to tell and nothing is guessed from silence.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout_at};

use super::child::open_log;
use super::layout::Layout;
use super::lock::Holder;
use super::ready;
use crate::error::Failure;
use crate::output::Printer;

/// Bound on all of it: the node may fetch the guest's kernel the first time.
const START_MAX: Duration = Duration::from_secs(240);
/// Pause between two questions to a cluster that somebody else starts.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// Makes sure that the embedded cluster is up. Returns whether it had to be started.
pub async fn ensure_started(layout: &Layout, printer: &Printer) -> anyhow::Result<bool> {
    if Holder::find(&layout.lock())?.is_some() {
        wait_for_other(layout, printer).await?;
        return Ok(false);
    }
    printer.hint("starting the embedded cluster on this machine (`tow down` stops it)");
    start_detached(layout, printer).await?;
    Ok(true)
}

/// Starts a supervisor in the background; returns once the cluster is ready.
pub async fn start_detached(layout: &Layout, printer: &Printer) -> anyhow::Result<()> {
    let log = layout.log("supervisor");
    let tow = std::env::current_exe().context("finding where `tow` itself is")?;
    let mut child = Command::new(tow)
        .args(["up", "--supervise"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(open_log(&log)?)
        .current_dir("/")
        .spawn()
        .context("could not start the supervisor of the embedded cluster")?;
    let lines = child.stdout.take().context("the supervisor has no stdout")?;
    let progress = printer.progress("starting the embedded cluster");
    match timeout_at(Instant::now() + START_MAX, follow(lines, &progress)).await {
        Ok(End::Ready) => Ok(()),
        Ok(End::Other) => wait_for_other(layout, printer).await,
        Ok(End::Failed(told)) if told.hint.is_empty() => Err(Failure::new(told.text)
            .hint("`tow doctor` checks this machine; `tow up -v` shows the servers' logs")
            .into()),
        Ok(End::Failed(told)) => Err(Failure::new(told.text).hint(told.hint).into()),
        Ok(End::Silent) => {
            let text = format!("the supervisor ended before it was ready; see `{}`", log.display());
            Err(Failure::new(text).into())
        }
        Err(_) => {
            let text =
                format!("the embedded cluster was not ready after {} s", START_MAX.as_secs());
            Err(Failure::new(text)
                .hint("`tow status` says how it is; `tow up -v` shows more")
                .into())
        }
    }
}

enum End {
    Ready,
    /// Another supervisor was faster.
    Other,
    Failed(Told),
    Silent,
}

/// Why it came to nothing, as the background process told it.
#[derive(Debug, serde::Deserialize)]
struct Told {
    text: String,
    hint: String,
}

async fn follow(stdout: ChildStdout, progress: &crate::output::Progress) -> End {
    let mut lines: Lines<BufReader<ChildStdout>> = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("step", text) => progress.set(text),
            ("ready", _) => return End::Ready,
            ("other", _) => return End::Other,
            ("failed", text) => {
                return serde_json::from_str(text).map_or(End::Silent, End::Failed);
            }
            _ => {}
        }
    }
    End::Silent
}

/// Somebody else's supervisor is at work: waits until its cluster answers.
async fn wait_for_other(layout: &Layout, printer: &Printer) -> anyhow::Result<()> {
    let progress = printer.progress("waiting for the embedded cluster");
    let deadline = Instant::now() + START_MAX;
    loop {
        let error = match ready::health(layout).await {
            Ok(health) if health.is_ready() => return Ok(()),
            Ok(_) => anyhow::anyhow!("its node is not ready"),
            Err(error) => error,
        };
        if Holder::find(&layout.lock())?.is_none() {
            return Err(Failure::new("the supervisor of the embedded cluster ended")
                .hint(format!("see `{}`", layout.log("supervisor").display()))
                .because(error)
                .into());
        }
        if Instant::now() >= deadline {
            return Err(Failure::new("the embedded cluster is started but not ready")
                .hint("`tow status` says how it is")
                .because(error)
                .into());
        }
        progress.set("waiting for the embedded cluster");
        sleep(ASK_EVERY).await;
    }
}

/// In the background process: leaves the terminal's session, so that closing it is no end.
pub fn own_session() -> io::Result<()> {
    match rustix::process::setsid() {
        // Already a leader: somebody else made the session.
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
