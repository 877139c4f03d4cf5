//! What a node agent holds and does for each of 200 idle sandboxes, over the `process` driver.

use std::path::Path;
use std::time::Duration;

use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;
use towline_end_to_end::process::Process;

use crate::idle::pss_kib;
use crate::{Row, cold};

const GOAL_MIB: f64 = 2.0;
/// Less than one a minute is not a period of anybody's.
const GOAL_WAKE_UPS: f64 = 1.0;
const WINDOW: Duration = Duration::from_secs(60);
/// After the last one was created, until what that began has ended.
const SETTLE: Duration = Duration::from_secs(20);
/// What the node is to promise: a limit of each sandbox, none of which uses it.
const OFFERS: &str = "cpus = 100000\nmemory_mib = 10000000\ndisk_mib = 10000000\n";
const SHAPE: &[&str] = &["--cpus", "1", "--memory", "128MiB", "--disk", "1GiB"];

/// Compares the same node agent before and after it got them.
pub(crate) fn measure(bin_dir: &Path, sandboxes: u32) -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    let cluster = cluster.with("TOWLINE_ISOLATION_PROCESS", "1").with("TOWLINE_WARM", "off");
    cluster.configure_node(OFFERS);
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    cold::import(&cluster)?;
    // The first one of all makes what the others share.
    create(&cluster, "first");
    let node_agent = cluster.process(&["towline-node-agent", "--config"]);
    let before = look(&node_agent);
    for number in 0..sandboxes {
        create(&cluster, &format!("idle-{number}"));
    }
    let after = look(&node_agent);
    let each = |after: f64, before: f64| (after - before) / f64::from(sandboxes);
    let mib = each(after.mib, before.mib);
    let wake_ups = each(after.wake_ups, before.wake_ups);
    let guests = cluster.processes().into_iter().filter(is_guest);
    let guest_kib: u64 = guests.map(|guest| pss_kib(guest.pid)).sum();
    let guest_mib = guest_kib as f64 / 1024.0 / f64::from(sandboxes + 1);
    Ok(vec![
        Row {
            what: "node agent: memory (PSS) for each of 200 idle `process` sandboxes",
            goal: "≤ 2 MiB",
            measured: format!("{mib:.2} MiB (its guest agent beside: {guest_mib:.1} MiB)"),
            met: mib <= GOAL_MIB,
        },
        Row {
            what: "node agent: wake-ups for each of them",
            goal: "none that repeat (< 1 a minute)",
            measured: format!(
                "{wake_ups:.2} a minute ({:.0} a minute in all, {:.0} before)",
                after.wake_ups, before.wake_ups
            ),
            met: wake_ups < GOAL_WAKE_UPS,
        },
    ])
}

struct Look {
    mib: f64,
    wake_ups: f64,
}

fn create(cluster: &Cluster, name: &str) {
    let create = ["create", "--no-sync", "--isolation", "process", "--image", "bench:1", "--name"];
    cluster.tow(create.iter().chain(&[name]).chain(SHAPE)).finish(BOOT).ok();
}

fn is_guest(process: &Process) -> bool {
    process.command_line.contains("towline-process-sandbox")
}

fn look(process: &Process) -> Look {
    std::thread::sleep(SETTLE);
    let before = switches(process.pid);
    std::thread::sleep(WINDOW);
    let wake_ups = switches(process.pid).saturating_sub(before) as f64;
    Look { mib: pss_kib(process.pid) as f64 / 1024.0, wake_ups }
}

/// How often its threads went to sleep: each of these ends with a wake-up.
fn switches(pid: i32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"));
        let count = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        count.unwrap_or_default()
    };
    threads.map(|thread| of(thread.path())).sum()
}
