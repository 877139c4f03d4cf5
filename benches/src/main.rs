//! `make bench`: the figures of docs/performance.md, each measured beside its peer in the same run.
//!
//! Leaves judging to the page: it prints medians, ratios and the goal of each, and writes the table
//! between the marks in docs/performance.md.

mod bare_boot;
mod cold;
mod egress;
mod exec;
mod fork;
mod idle;
mod machine;
mod many;
mod peer;
mod pull;
mod save;
mod stats;
mod throughput;
mod warm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use towline_end_to_end::Cluster;

/// Measure Towline beside its peers
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the release binaries
    #[arg(long)]
    bin_dir: PathBuf,
    /// Runs of `tow exec` and of ssh, alternating
    #[arg(long, default_value_t = 200)]
    exec_runs: usize,
    /// Cold starts
    #[arg(long, default_value_t = 9)]
    cold_runs: usize,
    /// Warm starts and cold ones, alternating
    #[arg(long, default_value_t = 15)]
    warm_runs: usize,
    /// Forks of four and four cold starts, alternating
    #[arg(long, default_value_t = 5)]
    fork_runs: usize,
    /// Pulls of a fresh image
    #[arg(long, default_value_t = 5)]
    pull_runs: usize,
    /// Saves and their peers, alternating
    #[arg(long, default_value_t = 5)]
    save_runs: usize,
    /// Only what `tow save` takes; the table is not written
    #[arg(long)]
    save: bool,
    /// Transfers through the node and direct ones, alternating
    #[arg(long, default_value_t = 7)]
    egress_runs: usize,
    /// Idle sandboxes of the `process` driver
    #[arg(long, default_value_t = 200)]
    idle_sandboxes: u32,
    /// Only what depends on the VMM, with the goals of one that runs under a nested KVM
    #[arg(long)]
    nested: bool,
    /// Write the table into docs/performance.md
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    write: bool,
}

/// One line of the table.
#[derive(Clone)]
struct Row {
    what: &'static str,
    goal: &'static str,
    measured: String,
    met: bool,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the table is what it is for")]
fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let bin_dir = args.bin_dir.canonicalize().context("the folder of the binaries")?;
    if args.nested {
        let cluster = booting(&bin_dir)?;
        let rows = of_vmm(&cluster, &bin_dir, &args, &Goals::NESTED)?.concat();
        println!("{}", table(&rows, "Cloud Hypervisor under an emulated KVM"));
        println!("Warm, ready and their cold starts: {}", Goals::NESTED.shape.join(" "));
        return Ok(());
    }
    let root = rustix::process::geteuid().is_root();
    if args.save {
        let rows = save::measure(&bin_dir, args.save_runs)?;
        println!("{}", table(&rows, "none"));
        return Ok(());
    }
    let (egress, many, saves) = if root {
        let egress = egress::measure(&bin_dir, args.egress_runs)?;
        let many = many::measure(&bin_dir, args.idle_sandboxes)?;
        (egress, many, save::measure(&bin_dir, args.save_runs)?)
    } else {
        eprintln!("SKIPPED: the `process` driver's figures need root");
        Default::default()
    };
    let pulls = pull::measure(&bin_dir, args.pull_runs)?;
    let cluster = booting(&bin_dir)?;
    let [cold, warm, forks] = of_vmm(&cluster, &bin_dir, &args, &Goals::EMULATED)?;
    let rows = [
        cold,
        warm,
        forks,
        exec::measure(&cluster, args.exec_runs)?,
        throughput::measure(&cluster)?,
        idle::measure(&cluster)?,
        pulls,
        egress,
        many,
        saves,
    ]
    .concat();
    let table = table(&rows, "QEMU with emulation (TCG)");
    println!("{table}");
    if args.write { write(&table) } else { Ok(()) }
}

/// What is aimed at where guests are emulated, and where they run under a KVM that is nested itself.
struct Goals {
    cold: (f64, &'static str),
    warm: (f64, Option<Duration>, &'static str),
    ready: (f64, Option<Duration>, &'static str),
    fork: (f64, &'static str),
    /// Of warm and cold starts; the default where nothing is said.
    shape: &'static [&'static str],
}

impl Goals {
    const EMULATED: Self = Self {
        cold: (1.3, "≤ 1.3 × a bare boot, spawn to hello"),
        warm: (0.35, Some(Duration::from_millis(600)), "≤ 0.35 × cold, and ≤ 600 ms"),
        ready: (0.25, Some(Duration::from_millis(600)), "≤ 0.25 × cold, and ≤ 600 ms"),
        fork: (0.35, "≤ 0.35 × four cold boots"),
        shape: &[],
    };
    const NESTED: Self = Self {
        cold: (1.25, "≤ 1.25 × a bare boot, spawn to hello"),
        warm: (0.6, None, "≤ 0.6 × cold"),
        ready: (0.6, None, "≤ 0.6 × cold"),
        fork: (0.6, "≤ 0.6 × four cold boots"),
        // Writing the template of a larger one takes minutes in there.
        shape: &["--memory", "512MiB", "--disk", "4GiB"],
    };
}

/// A cluster on which every start is a boot.
fn booting(bin_dir: &Path) -> anyhow::Result<Cluster> {
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    Ok(cluster.with("TOWLINE_WARM", "off"))
}

fn of_vmm(
    cluster: &Cluster,
    bin_dir: &Path,
    args: &Args,
    goals: &Goals,
) -> anyhow::Result<[Vec<Row>; 3]> {
    Ok([
        told(cold::measure(cluster, args.cold_runs, goals)?),
        told(warm::measure(cluster, bin_dir, args.warm_runs, goals)?),
        told(fork::measure(cluster, args.fork_runs, goals)?),
    ])
}

/// Says what was measured so far: what comes next may take long, or fail.
#[expect(clippy::print_stderr, reason = "progress")]
fn told(rows: Vec<Row>) -> Vec<Row> {
    rows.iter().for_each(|row| eprintln!("{}: {}", row.what, row.measured));
    rows
}

fn table(rows: &[Row], vmm: &str) -> String {
    let mut text = format!("{}\n\n", machine::describe(vmm));
    text += "| figure | goal | measured | met |\n|---|---|---|---|\n";
    for row in rows {
        let met = if row.met { "yes" } else { "**no**" };
        text += &format!("| {} | {} | {} | {met} |\n", row.what, row.goal, row.measured);
    }
    text
}

const BEGIN: &str = "<!-- figures: written by make bench -->\n";
const END: &str = "<!-- end of figures -->";

fn write(table: &str) -> anyhow::Result<()> {
    let page = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
    let text = std::fs::read_to_string(&page).context("reading docs/performance.md")?;
    let (before, rest) = text.split_once(BEGIN).context("the mark before the figures")?;
    let (_, after) = rest.split_once(END).context("the mark after the figures")?;
    std::fs::write(&page, format!("{before}{BEGIN}{table}{END}{after}")).context("writing it")
}
