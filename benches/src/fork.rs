//! Four copies of a running sandbox, all answering a command, against four sandboxes that boot, and
//! the memory that each four take.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::{BOOT, SHORT};

use crate::stats::{median, ms, ratio};
use crate::{Goals, Row, idle};

const COPIES: usize = 4;
/// Of each: four and the original fit into a small machine.
const SHAPE: [&str; 6] = ["--cpus", "1", "--memory", "512MiB", "--disk", "2GiB"];
/// Of the VMMs' command lines.
const VMMS: [&str; 2] = ["qemu-system", "cloud-hypervisor --api-socket"];

/// What four sandboxes took.
struct Took {
    time: Duration,
    memory_kib: u64,
}

/// Measures both, alternating, on a cluster that boots every sandbox.
pub(crate) fn measure(cluster: &Cluster, runs: usize, goals: &Goals) -> anyhow::Result<Vec<Row>> {
    let (mut copied, mut booted) = (Vec::new(), Vec::new());
    start(cluster, "original")?;
    for _ in 0..runs {
        booted.push(four(cluster, "booted", boot)?);
        copied.push(four(cluster, "copy", fork)?);
    }
    cluster.tow(["rm", "original"]).finish(SHORT).ok();
    let time = |all: &[Took]| median(&all.iter().map(|took| took.time).collect::<Vec<_>>());
    let memory = |all: &[Took]| {
        let mut kib: Vec<_> = all.iter().map(|took| took.memory_kib).collect();
        kib.sort_unstable();
        kib.get(kib.len() / 2).copied().unwrap_or(0)
    };
    let share = ratio(time(&copied), time(&booted));
    let (copies_kib, booted_kib) = (memory(&copied), memory(&booted));
    anyhow::ensure!(copies_kib > 0 && booted_kib > 0, "the VMMs' memory could not be read");
    let memory_share = copies_kib as f64 / booted_kib.max(1) as f64;
    let (took, cold) = (ms(time(&copied)), ms(time(&booted)));
    Ok(vec![
        Row {
            what: "`tow fork -n 4` of a running sandbox, all four answering `tow exec`",
            goal: goals.fork.1,
            measured: format!("{share:.2} × ({took} against {cold}, {runs} runs)"),
            met: share <= goals.fork.0,
        },
        Row {
            what: "memory of those four VMMs (PSS)",
            goal: "≤ 0.5 × of four that booted",
            measured: format!(
                "{memory_share:.2} × ({} against {} MiB)",
                copies_kib >> 10,
                booted_kib >> 10
            ),
            met: memory_share <= 0.5,
        },
    ])
}

fn run<'a>(name: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    let run = ["run", "--no-sync", "--name", name, "--image", "bench:1"];
    [&run[..], &SHAPE, rest].concat()
}

fn start(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let command = run(name, &["--", "true"]);
    let done = cluster.tow(command).finish(BOOT);
    anyhow::ensure!(done.code == 0, "`tow run` failed: {}", done.err());
    Ok(())
}

/// Has four made, and removes them.
fn four(
    cluster: &Cluster,
    kind: &str,
    make: impl Fn(&Cluster, &[String]) -> anyhow::Result<()>,
) -> anyhow::Result<Took> {
    let before = vmms(cluster);
    let names: Vec<_> = (1..=COPIES).map(|number| format!("{kind}-{number}")).collect();
    let begun = Instant::now();
    make(cluster, &names)?;
    let time = begun.elapsed();
    let new = vmms(cluster).into_iter().filter(|pid| !before.contains(pid));
    let memory_kib = new.map(idle::pss_kib).sum();
    let remove = ["rm", "--force"].into_iter().chain(names.iter().map(String::as_str));
    cluster.tow(remove).finish(BOOT).ok();
    Ok(Took { time, memory_kib })
}

fn boot(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    all(cluster, names.iter().map(|name| run(name, &["--", "true"])))
}

fn fork(cluster: &Cluster, names: &[String]) -> anyhow::Result<()> {
    let count = names.len().to_string();
    let fork = ["fork", "original", "-n", &count, "--name", "copy"];
    let done = cluster.tow(fork).finish(BOOT);
    anyhow::ensure!(done.code == 0, "`tow fork` failed: {}", done.err());
    all(cluster, names.iter().map(|name| vec!["exec", "--no-sync", name, "--", "true"]))
}

/// Runs all of these beside each other.
fn all<'a>(cluster: &Cluster, commands: impl Iterator<Item = Vec<&'a str>>) -> anyhow::Result<()> {
    let folder = cluster.root().join("work");
    let spawn = |command| cluster.tow_command(&folder, command).spawn().context("starting `tow`");
    let children: Vec<Child> = commands.map(spawn).collect::<Result<_, _>>()?;
    for mut child in children {
        anyhow::ensure!(child.wait()?.success(), "`tow` failed");
    }
    Ok(())
}

fn vmms(cluster: &Cluster) -> Vec<i32> {
    let is_vmm = |line: &str| VMMS.iter().any(|vmm| line.contains(vmm));
    let processes = cluster.processes().into_iter();
    processes.filter(|process| is_vmm(&process.command_line)).map(|process| process.pid).collect()
}
