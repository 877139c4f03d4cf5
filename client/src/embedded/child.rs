//! One child process, started again with back-off whenever it ends, until told to stop.
//!
//! A child dies with the thread that started it (PR_SET_PDEATHSIG), so it must be started from the
//! supervisor's main thread: these futures are polled there and never spawned.
#![expect(unsafe_code, reason = "PR_SET_PDEATHSIG has to be set between fork and exec")]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal,
};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// First and longest pause before a child is started again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A child that lived this long was healthy: the next pause is the first one again.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);
/// How long a child may take to stop when asked.
const STOP_MAX: Duration = Duration::from_secs(10);
/// A log is started anew (one old one is kept) beyond this size.
const LOG_MAX: u64 = 16 << 20;

/// What to run.
#[derive(Debug)]
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) program: PathBuf,
    pub(super) config: PathBuf,
    pub(super) log: PathBuf,
    /// Its stderr is ours instead of the log.
    pub(super) inherit_output: bool,
}

/// Tells children to stop.
pub(super) type Stopping = watch::Receiver<bool>;

/// Keeps the child running; returns after it was told to stop and has. `ends` counts its ends.
pub(super) async fn keep_running(
    spec: &Spec,
    mut stopping: Stopping,
    ends: &watch::Sender<u32>,
) -> anyhow::Result<()> {
    let mut pause = PAUSES.0;
    loop {
        let started = Instant::now();
        let mut child = spawn(spec)?;
        tracing::info!(child = spec.name, pid = child.id(), "started");
        tokio::select! {
            status = child.wait() => say_end(spec, status, ends),
            _ = stopping.wait_for(|stop| *stop) => return stop(spec, &mut child).await,
        }
        if started.elapsed() >= HEALTHY_AFTER {
            pause = PAUSES.0;
        }
        tokio::select! {
            () = sleep(pause) => {}
            _ = stopping.wait_for(|stop| *stop) => return Ok(()),
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

fn say_end(spec: &Spec, status: io::Result<ExitStatus>, ends: &watch::Sender<u32>) {
    match status {
        Ok(status) => tracing::warn!(child = spec.name, %status, "ended; starting it again"),
        Err(error) => tracing::warn!(child = spec.name, %error, "lost; starting it again"),
    }
    ends.send_modify(|count| *count = count.saturating_add(1));
}

fn spawn(spec: &Spec) -> anyhow::Result<Child> {
    let mut command = Command::new(&spec.program);
    command.arg("--config").arg(&spec.config).stdin(Stdio::null()).kill_on_drop(true);
    match spec.inherit_output {
        true => command.stdout(io::stderr()).stderr(Stdio::inherit()),
        false => {
            let log = open_log(&spec.log)?;
            command.stdout(log.try_clone().context("sharing the log")?).stderr(log)
        }
    };
    let parent = getpid();
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory of
    // the parent; both are async-signal-safe.
    unsafe {
        command.pre_exec(move || die_with(parent));
    }
    command.spawn().with_context(|| format!("could not start `{}`", spec.program.display()))
}

fn die_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    match getppid() == Some(parent) {
        true => Ok(()),
        // It died before the call above: nobody would tell us.
        false => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

async fn stop(spec: &Spec, child: &mut Child) -> anyhow::Result<()> {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // Not reaped yet, so the pid is still its.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(STOP_MAX, child.wait()).await.is_err() {
        tracing::warn!(child = spec.name, "did not stop when asked; killing it");
        child.kill().await.with_context(|| format!("killing {}", spec.name))?;
    }
    Ok(())
}

/// Opens a log for appending; one that grew too large is put aside first.
pub(super) fn open_log(path: &Path) -> anyhow::Result<File> {
    let open = || -> io::Result<File> {
        if let Some(dir) = path.parent() {
            crate::config::ensure_private_dir(dir)?;
        }
        if path.metadata().is_ok_and(|meta| meta.len() > LOG_MAX) {
            std::fs::rename(path, path.with_extension("log.old"))?;
        }
        File::options().append(true).create(true).open(path)
    };
    open().with_context(|| format!("could not open the log `{}`", path.display()))
}

/// Returns the last lines of a log, for an error.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    const READ_MAX: u64 = 8 << 10;
    let read = || -> io::Result<String> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(READ_MAX)))?;
        let mut bytes = Vec::new();
        file.take(READ_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
