//! A sandbox's connections through the node against direct ones, from the node's network namespace
//! to a server in another one. Over the `process` driver, so that emulation is not what is measured.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;
use towline_end_to_end::wire::{Side, Wire};

use crate::Row;
use crate::stats::{median, ms, ratio};

const GOAL_SHARE: f64 = 0.5;
const GOAL_CONNECT: Duration = Duration::from_millis(1);
const BYTES: u64 = 512 << 20;
const CONNECTS: u32 = 300;
const NAME: &str = "bench-egress";
/// Public ranges, so that the usual policy lets them pass.
const NEAR: &str = "11.77.0.2";
const FAR: &str = "11.77.0.1";
const PORT: &str = "7777";
const SERVE: &str = include_str!("egress/serve.py");
const ASK: &str = include_str!("egress/ask.py");

/// What one run took.
struct Sample {
    down: Duration,
    up: Duration,
    connect: Duration,
}

/// Measures both, alternating.
pub(crate) fn measure(bin_dir: &Path, runs: usize) -> anyhow::Result<Vec<Row>> {
    let mut wire = Wire::new(&[NEAR], &[FAR]).map_err(anyhow::Error::msg)?;
    let mut server = wire.command(Side::Far, "/usr/bin/python3");
    wire.serve(server.args(["-c", SERVE, FAR, PORT]).stdout(Stdio::null()));
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    let cluster = cluster.with("TOWLINE_ISOLATION_PROCESS", "1").within(wire.name(Side::Node));
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let create = ["create", "--no-sync", "--name", NAME, "--isolation", "process"];
    cluster.tow(create.iter().chain(&["--image", "local"])).finish(BOOT).ok();
    let folder = cluster.root().join("work");
    let (mut ours, mut direct) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        direct.push(ask(&mut wire.command(Side::Node, "/usr/bin/python3"))?);
        let exec = ["exec", "--no-sync", NAME, "--", "/usr/bin/python3"];
        ours.push(ask(&mut cluster.tow_command(&folder, exec))?);
    }
    Ok(vec![throughput(&ours, &direct), connect(&ours, &direct)])
}

fn ask(command: &mut Command) -> anyhow::Result<Sample> {
    command.args(["-c", ASK, FAR, PORT, &BYTES.to_string(), &CONNECTS.to_string()]);
    let output = command.stdin(Stdio::null()).output().context("starting the client")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "the client failed: {said}");
    let said: Value = serde_json::from_slice(&output.stdout).context("what the client says")?;
    let seconds = |key: &str| -> anyhow::Result<Duration> {
        Ok(Duration::from_secs_f64(said[key].as_f64().context("a number of seconds")?))
    };
    Ok(Sample { down: seconds("d")?, up: seconds("u")?, connect: seconds("c")? })
}

fn middle(samples: &[Sample], of: impl Fn(&Sample) -> Duration) -> Duration {
    median(&samples.iter().map(of).collect::<Vec<_>>())
}

fn throughput(ours: &[Sample], direct: &[Sample]) -> Row {
    let way = |of: fn(&Sample) -> Duration| {
        let (ours, direct) = (middle(ours, of), middle(direct, of));
        let rate = |took: Duration| BYTES as f64 / 1e6 / took.as_secs_f64();
        (ratio(direct, ours), format!("{:.0} against {:.0} MB/s", rate(ours), rate(direct)))
    };
    let (down, up) = (way(|sample| sample.down), way(|sample| sample.up));
    Row {
        what: "egress through the node, `process` driver, a server in another network namespace",
        goal: "≥ 0.5 × direct TCP",
        measured: format!(
            "{:.2} × down ({}), {:.2} × up ({}), {} runs of {} MiB",
            down.0,
            down.1,
            up.0,
            up.1,
            ours.len(),
            BYTES >> 20
        ),
        met: down.0 >= GOAL_SHARE && up.0 >= GOAL_SHARE,
    }
}

fn connect(ours: &[Sample], direct: &[Sample]) -> Row {
    let of = |sample: &Sample| sample.connect;
    let (ours, direct) = (middle(ours, of), middle(direct, of));
    Row {
        what: "egress: connect, p50",
        goal: "≤ direct + 1 ms",
        measured: format!("{} against {}", ms(ours), ms(direct)),
        met: ours <= direct + GOAL_CONNECT,
    }
}
