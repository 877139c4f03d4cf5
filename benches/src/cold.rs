//! Cold start: `tow run` to the first byte of output, against a bare boot.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::oci::{File, layer, layout};

use crate::stats::{median, ms, ratio};
use crate::{Goals, Row, bare_boot};

/// CPUs and MiB of both, where the machine has so many CPUs.
const SHAPE: (u32, u64) = (2, 2048);

fn shape() -> (u32, u64) {
    let here = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (SHAPE.0.min(u32::try_from(here).unwrap_or(u32::MAX)), SHAPE.1)
}

/// Measures both, alternating.
pub(crate) fn measure(cluster: &Cluster, runs: usize, goals: &Goals) -> anyhow::Result<Vec<Row>> {
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    import(cluster)?;
    let guest_agent = cluster.bin().join("towline-guest-agent-static");
    let (mut tow, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        bare.push(bare_boot::once(&cluster.cache(), &guest_agent, shape())?);
        tow.push(first_byte(cluster)?);
    }
    let (tow, bare) = (median(&tow), median(&bare));
    let share = ratio(tow, bare);
    Ok(vec![Row {
        what: "cold: `tow run` to the first byte of output, image imported before",
        goal: goals.cold.1,
        measured: format!("{share:.2} × ({} against {}, {runs} runs)", ms(tow), ms(bare)),
        met: share <= goals.cold.0,
    }])
}

pub(crate) fn import(cluster: &Cluster) -> anyhow::Result<()> {
    let busybox = std::fs::read("/bin/busybox").context("busybox-static is needed")?;
    let file = |path| File { path, mode: 0o755, content: &busybox[..] };
    let base = layer(&[file("bin/echo"), file("bin/sh"), file("bin/wc"), file("bin/true")]);
    let folder = cluster.root().join("bench-image");
    layout(&folder, &[base], &json!({"Env": ["PATH=/bin"]}));
    let path = folder.to_str().context("a path that is text")?;
    cluster.tow(["image", "import", path, "bench:1"]).finish(SHORT).ok();
    Ok(())
}

fn first_byte(cluster: &Cluster) -> anyhow::Result<Duration> {
    let folder = cluster.root().join("work");
    let (cpus, memory) = shape();
    let (cpus, memory) = (cpus.to_string(), format!("{memory}MiB"));
    let arguments = ["run", "--rm", "--no-sync", "--image", "bench:1", "--cpus", &cpus];
    let mut command = cluster.tow_command(&folder, arguments);
    command.args(["--memory", &memory, "--", "echo", "x"]);
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut byte = [0];
    child.stdout.take().context("a pipe")?.read_exact(&mut byte).context("the first byte")?;
    let took = start.elapsed();
    anyhow::ensure!(child.wait()?.success(), "`tow run` failed");
    Ok(took)
}
