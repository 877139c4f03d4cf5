//! 1 GiB through `tow exec NAME -- wc -c`, and what the processes on its way hold meanwhile.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;

use crate::{Row, idle};

const BYTES: u64 = 1 << 30;
const GOAL_MB_S: f64 = 100.0;
const GOAL_MIB: u64 = 150;

/// Its image is the machine's own, for a `wc` that reads in blocks (busybox's reads bytes).
const NAME: &str = "bench-local";

/// Measures once: it is a minute of steady state, not a start.
pub(crate) fn measure(cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    let folder = cluster.root().join("work");
    let create = ["create", "--no-sync", "--name", NAME, "--image", "local", "--cpus", "2"];
    cluster.tow(create).finish(BOOT).ok();
    let mut command = cluster.tow_command(&folder, ["exec", NAME, "--", "wc", "-c"]);
    let (over, peak_kib) = (AtomicBool::new(false), AtomicU64::new(0));
    let (took, counted) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                peak_kib.fetch_max(idle::memory_kib(cluster), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let result = push(&mut command);
        over.store(true, Ordering::Relaxed);
        result
    })?;
    anyhow::ensure!(counted == BYTES, "{counted} bytes arrived of {BYTES}");
    let rate = BYTES as f64 / 1e6 / took.as_secs_f64();
    let peak_mib = peak_kib.load(Ordering::Relaxed) >> 10;
    Ok(vec![
        Row {
            what: "1 GiB through `tow exec NAME -- wc -c`",
            goal: "≥ 100 MB/s under TCG",
            measured: format!("{rate:.0} MB/s"),
            met: rate >= GOAL_MB_S,
        },
        Row {
            what: "memory meanwhile: `tow`, daemon, node agent, control plane together (PSS)",
            goal: "< 150 MiB",
            measured: format!("{peak_mib} MiB at most"),
            met: peak_mib < GOAL_MIB,
        },
    ])
}

fn push(command: &mut std::process::Command) -> anyhow::Result<(Duration, u64)> {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut pipe = child.stdin.take().context("a pipe")?;
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..BYTES / piece.len() as u64 {
        pipe.write_all(&piece).context("writing to `tow`")?;
    }
    drop(pipe);
    let output = child.wait_with_output()?;
    let took = start.elapsed();
    anyhow::ensure!(output.status.success(), "`tow exec` failed: {}", output.status);
    Ok((took, String::from_utf8_lossy(&output.stdout).trim().parse().context("a count")?))
}
