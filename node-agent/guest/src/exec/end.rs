//! How a process ended: its status, what it used, and why it was ended from outside.
#![expect(unsafe_code, reason = "wait4 is the only call that tells status and usage together")]

use std::io;
use std::sync::Arc;

use rustix::process::Pid;
use towline_proto::v1::{ExitStatus, Usage, exit_status::How};

use super::{Exec, Life};
use crate::nonblocking::NonBlocking;
use crate::workload::ExecCgroup;

/// Waits for the exit and notes it. Returns the status for whoever reports it.
pub(crate) async fn wait_for_exit(
    exec: &Arc<Exec>,
    pid: Pid,
    exit: NonBlocking,
    cgroup: Option<&ExecCgroup>,
) -> ExitStatus {
    let mut status = match exit.ready().await.and_then(|()| wait4(pid)) {
        Ok(status) => status,
        Err(error) => ExitStatus {
            how: Some(How::Signal(libc::SIGKILL)),
            reason: format!("the guest agent could not learn how it ended: {error}"),
            usage: None,
        },
    };
    let wall = exec.started.elapsed().as_micros();
    if let Some(usage) = &mut status.usage {
        usage.wall_us = u64::try_from(wall).unwrap_or(u64::MAX);
    }
    if let Some(reason) = cgroup.and_then(ExecCgroup::out_of_memory) {
        status.reason = reason;
    }
    exec.change(|state| {
        if let Life::Running(running) = &mut state.life {
            running.exited = Some(status.clone());
        }
    });
    status
}

fn wait4(pid: Pid) -> io::Result<ExitStatus> {
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for writing.
    let got = unsafe {
        libc::wait4(pid.as_raw_nonzero().get(), &raw mut status, libc::WNOHANG, &raw mut usage)
    };
    match got {
        -1 => Err(io::Error::last_os_error()),
        0 => Err(io::Error::other("its pidfd was readable while it runs")),
        _ => Ok(ExitStatus {
            how: Some(if libc::WIFSIGNALED(status) {
                How::Signal(libc::WTERMSIG(status))
            } else {
                How::Code(libc::WEXITSTATUS(status))
            }),
            reason: String::new(),
            usage: Some(Usage {
                user_us: micros(usage.ru_utime),
                system_us: micros(usage.ru_stime),
                rss_max_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
                wall_us: 0,
            }),
        }),
    }
}

fn micros(time: libc::timeval) -> u64 {
    let parts = (u64::try_from(time.tv_sec), u64::try_from(time.tv_usec));
    let (Ok(seconds), Ok(micros)) = parts else { return 0 };
    seconds.saturating_mul(1_000_000).saturating_add(micros)
}
