//! What an idle daemon and embedded cluster use, VMs aside.

use std::time::{Duration, Instant};

use towline_end_to_end::Cluster;
use towline_end_to_end::process::Process;

use crate::Row;

const WINDOW: Duration = Duration::from_secs(30);
/// Linux on x86-64 counts processes' time in hundredths, whatever its own tick is.
const TICKS_PER_SECOND: f64 = 100.0;

/// Watches the processes for half a minute in which nobody asks for anything.
pub(crate) fn measure(cluster: &Cluster) -> anyhow::Result<Vec<Row>> {
    std::thread::sleep(Duration::from_secs(3));
    let (before, start) = (ticks(cluster), Instant::now());
    std::thread::sleep(WINDOW);
    let used = ticks(cluster).saturating_sub(before) as f64 / TICKS_PER_SECOND;
    let share = 100.0 * used / start.elapsed().as_secs_f64();
    let mib = memory_kib(cluster) >> 10;
    Ok(vec![
        Row {
            what: "idle: CPU of daemon and embedded cluster, VMs aside",
            goal: "< 1 % of a core",
            measured: format!("{share:.2} %"),
            met: share < 1.0,
        },
        Row {
            what: "idle: memory of daemon and embedded cluster (PSS), VMs aside",
            goal: "< 120 MiB",
            measured: format!("{mib} MiB"),
            met: mib < 120,
        },
    ])
}

fn ours(cluster: &Cluster) -> Vec<Process> {
    let mut processes = cluster.processes();
    processes.retain(|p| p.command_line.contains("tow") && !p.command_line.contains("qemu-system"));
    processes
}

/// Proportional set size of all of them, in KiB.
pub(crate) fn memory_kib(cluster: &Cluster) -> u64 {
    ours(cluster).iter().map(|process| pss_kib(process.pid)).sum()
}

/// Proportional set size of one, in KiB.
pub(crate) fn pss_kib(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// User and system time of all of them, in clock ticks.
fn ticks(cluster: &Cluster) -> u64 {
    let of = |process: &Process| -> u64 {
        let path = format!("/proc/{}/stat", process.pid);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let fields = text.rsplit(") ").next().unwrap_or_default();
        fields.split(' ').skip(11).take(2).filter_map(|text| text.parse::<u64>().ok()).sum()
    };
    ours(cluster).iter().map(of).sum()
}
