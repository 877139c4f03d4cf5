//! Warm start: `tow run -- true` in a new sandbox of the default shape, from a template, against the
//! same command on a cluster that boots every sandbox; and the same where a guest waits for it.
//! Removing them is not measured.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::{BOOT, SHORT};

use crate::stats::{median, ms, ratio};
use crate::{Goals, Row, cold};

/// The template is made in the background after the first start.
const TEMPLATE_MAX: Duration = Duration::from_secs(1200);
/// Image, and what a start means with it for the reader of the table, from a template and where a guest
/// waits.
const IMAGES: [(&str, &str, &str); 2] = [
    (
        "bench:1",
        "warm: `tow run -- true` in a new sandbox, image imported before",
        "ready: the same where a guest waits (`ready_guests = 1`)",
    ),
    (
        "local",
        "warm: the same with this machine's own system as the image",
        "ready: the same with this machine's own system as the image",
    ),
];
/// Between two looks whether a guest waits: it is made 2 s after the last start.
const LOOK: Duration = Duration::from_secs(4);

/// Measures both clusters, alternating.
pub(crate) fn measure(
    booting: &Cluster,
    bin_dir: &Path,
    runs: usize,
    goals: &Goals,
) -> anyhow::Result<Vec<Row>> {
    let restoring = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    let waiting = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    waiting.configure_node("ready_guests = 1\n");
    let bring_up = |cluster: &Cluster| {
        cluster.tow(["up", "--detach"]).finish(BOOT).ok();
        cold::import(cluster)
    };
    bring_up(&restoring)?;
    wait_for_template(&restoring, goals.shape)?;
    // The template is in the cache that they share.
    bring_up(&waiting)?;
    let mut rows = Vec::new();
    for (image, warm_text, ready_text) in IMAGES {
        let (mut warm, mut ready, mut cold) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            cold.push(once(booting, image, goals.shape, "cold")?);
            warm.push(once(&restoring, image, goals.shape, "warm")?);
            ready.push(once_ready(&waiting, image, goals.shape)?);
        }
        let cold = median(&cold);
        for (what, took, (goal_share, goal, goal_text)) in
            [(warm_text, &warm, goals.warm), (ready_text, &ready, goals.ready)]
        {
            let took = median(took);
            let share = ratio(took, cold);
            rows.push(Row {
                what,
                goal: goal_text,
                measured: format!("{share:.2} × ({} against {}, {runs} runs)", ms(took), ms(cold)),
                met: share <= goal_share && goal.is_none_or(|goal| took <= goal),
            });
        }
    }
    Ok(rows)
}

/// Measures a start for which a guest has waited.
fn once_ready(cluster: &Cluster, image: &str, shape: &[&str]) -> anyhow::Result<Duration> {
    let until = Instant::now() + TEMPLATE_MAX;
    loop {
        std::thread::sleep(LOOK);
        let (took, started) = start(cluster, image, shape)?;
        if started == "ready" {
            return Ok(took);
        }
        anyhow::ensure!(Instant::now() < until, "no guest waited: {}", cluster.logs());
    }
}

fn wait_for_template(cluster: &Cluster, shape: &[&str]) -> anyhow::Result<()> {
    let until = Instant::now() + TEMPLATE_MAX;
    loop {
        let (took, how) = start(cluster, IMAGES[0].0, shape)?;
        if how == "warm" {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < until, "no sandbox started warm: {}", cluster.logs());
        // It is made at the lowest priority: while nothing else starts.
        std::thread::sleep((took * 5).max(Duration::from_secs(2)));
    }
}

fn once(cluster: &Cluster, image: &str, shape: &[&str], how: &str) -> anyhow::Result<Duration> {
    let (took, started) = start(cluster, image, shape)?;
    anyhow::ensure!(started == how, "a sandbox started {started} where {how} was to be measured");
    Ok(took)
}

/// Runs the command in a new sandbox; how long, and how the node started it.
fn start(cluster: &Cluster, image: &str, shape: &[&str]) -> anyhow::Result<(Duration, String)> {
    const NAME: &str = "bench-warm";
    let folder = cluster.root().join("work");
    let run = ["run", "--no-sync", "--name", NAME, "--image", image];
    let mut command = cluster.tow_command(&folder, run);
    command.args(shape).args(["--", "true"]);
    let start = Instant::now();
    let output = command.output().context("starting `tow`")?;
    let took = start.elapsed();
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "`tow run` failed: {said}");
    let started = cluster.inspect(NAME)["start"].as_str().unwrap_or_default().to_owned();
    cluster.tow(["rm", "--force", NAME]).finish(SHORT).ok();
    Ok((took, started))
}
