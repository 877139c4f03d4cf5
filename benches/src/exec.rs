//! `tow exec NAME -- true` against `ssh 127.0.0.1 true`, alternating, with the parts shown.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;

use crate::Row;
use crate::peer::Ssh;
use crate::stats::{median, ms, percentile, ratio};

const GOAL: f64 = 0.2;
const NAME: &str = "bench";

/// Measures both, alternating.
pub(crate) fn measure(cluster: &Cluster, runs: usize) -> anyhow::Result<Vec<Row>> {
    let create = ["create", "--no-sync", "--name", NAME, "--image", "bench:1", "--cpus", "2"];
    cluster.tow(create).finish(BOOT).ok();
    let folder = cluster.root().join("work");
    let ssh = Ssh::start(cluster.root())?;
    let exec = || cluster.tow_command(&folder, ["exec", NAME, "--", "true"]);
    // What is paid once is not what is measured: the daemon's start, its link, page caches.
    for _ in 0..5 {
        timed(&mut exec())?;
        timed(&mut ssh.command("true"))?;
    }
    let (mut ours, mut theirs, mut start_only) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(timed(&mut exec())?);
        theirs.push(timed(&mut ssh.command("true"))?);
        start_only.push(timed(&mut cluster.tow_command(&folder, ["version"]))?);
    }
    let (p50, peer, start) = (median(&ours), median(&theirs), median(&start_only));
    let share = ratio(p50, peer);
    Ok(vec![Row {
        what: "`tow exec NAME -- true` in a running sandbox, p50",
        goal: "≤ 0.2 × `ssh 127.0.0.1 true`",
        measured: format!(
            "{share:.2} × ({} against {}, {runs} runs; p99 {} against {}; of ours, starting `tow` \
             is {})",
            ms(p50),
            ms(peer),
            ms(percentile(&ours, 0.99)),
            ms(percentile(&theirs, 0.99)),
            ms(start),
        ),
        met: share <= GOAL,
    }])
}

fn timed(command: &mut Command) -> anyhow::Result<Duration> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let status = command.status()?;
    let took = start.elapsed();
    anyhow::ensure!(status.success(), "{command:?}: {status}");
    Ok(took)
}
