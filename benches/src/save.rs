//! `tow save` of 200 MB of changed files, against one thread of `tar | zstd` of the same files, and
//! against `umoci repack` of the same change.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;
use towline_end_to_end::oci::{File, layer, layout};

use crate::stats::{median, ms, ratio};
use crate::{Row, idle, pull};

/// Of the image, beside busybox, and of what is changed; in files of this size.
const BASE_BYTES: usize = 1 << 30;
const CHANGED_BYTES: usize = 200 << 20;
const FILE_BYTES: usize = 64 << 10;
const GOAL: f64 = 1.15;
const GOAL_MIB: u64 = 64;

/// Measures all three, one after the other in each run; in a sandbox of the `process` driver, so that
/// nobody's files are emulated, and in a cluster of its own, whose images go with it.
pub(crate) fn measure(bin_dir: &Path, runs: usize) -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    let cluster = cluster.with("TOWLINE_ISOLATION_PROCESS", "1").with_own_images();
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let (base, bundle) = (cluster.root().join("base"), cluster.root().join("bundle"));
    let changed = cluster.root().join("changed");
    make(&base, &changed)?;
    import(&cluster, &base)?;
    let has_umoci = unpack(&base, &bundle, &changed)?;
    let node_agent = cluster.process(&["towline-node-agent", "--config"]).pid;
    let before_kib = idle::pss_kib(node_agent);
    let (over, peak_kib) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut ours, mut packed, mut repacked) = (Vec::new(), Vec::new(), Vec::new());
    let watched = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                peak_kib.fetch_max(idle::pss_kib(node_agent), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let result = (0..runs).try_for_each(|run| {
            let start = Instant::now();
            cluster.tow(["save", "changed", &format!("saved:{run}")]).finish(BOOT).ok();
            ours.push(start.elapsed());
            packed.push(pack(&changed, cluster.root())?);
            if has_umoci {
                repacked.push(repack(&base, &bundle, run)?);
            }
            anyhow::Ok(())
        });
        over.store(true, Ordering::Relaxed);
        result
    });
    watched?;
    let (ours, packed) = (median(&ours), median(&packed));
    let share = ratio(ours, packed);
    let grown_mib = peak_kib.load(Ordering::Relaxed).saturating_sub(before_kib) >> 10;
    let mut rows = vec![
        Row {
            what: "`tow save` of 200 MB of changed files on an image of 1 GB, `process` driver",
            goal: "≤ 1.15 × one thread of `tar | zstd -3` of the same files",
            measured: format!("{share:.2} × ({} against {}, {runs} runs)", ms(ours), ms(packed)),
            met: share <= GOAL,
        },
        Row {
            what: "memory of the node agent meanwhile (PSS)",
            goal: "≤ 64 MiB over idle",
            measured: format!("{grown_mib} MiB over idle at most"),
            met: grown_mib <= GOAL_MIB,
        },
    ];
    if has_umoci {
        let repacked = median(&repacked);
        rows.push(Row {
            what: "the same against `umoci repack`",
            goal: "≤ 1 × `umoci repack` of the same change",
            measured: format!(
                "{:.2} × ({} against {})",
                ratio(ours, repacked),
                ms(ours),
                ms(repacked)
            ),
            met: ours <= repacked,
        });
    }
    Ok(rows)
}

/// The image's layout, and the files that are to be changed.
fn make(base: &Path, changed: &Path) -> anyhow::Result<()> {
    let busybox = std::fs::read("/bin/busybox").context("busybox-static is needed")?;
    let mut noise = pull::Noise::new(7);
    let content = noise.bytes(BASE_BYTES);
    let paths: Vec<_> = (0..BASE_BYTES / FILE_BYTES).map(|file| format!("data/{file}")).collect();
    let files = paths.iter().zip(content.chunks(FILE_BYTES));
    let files = files.map(|(path, content)| File { path, mode: 0o644, content });
    let programs =
        ["bin/true", "bin/sh", "bin/tar"].map(|path| File { path, mode: 0o755, content: &busybox });
    let files: Vec<_> = programs.into_iter().chain(files).collect();
    layout(base, &[layer(&files)], &json!({"Env": ["PATH=/bin"]}));
    std::fs::create_dir(changed)?;
    for (number, content) in noise.bytes(CHANGED_BYTES).chunks(FILE_BYTES).enumerate() {
        std::fs::write(changed.join(number.to_string()), content)?;
    }
    Ok(())
}

fn import(cluster: &Cluster, base: &Path) -> anyhow::Result<()> {
    let base = base.to_str().context("a path")?;
    cluster.tow(["image", "import", base, "base:1"]).finish(BOOT).ok();
    let create = ["create", "--no-sync", "--image", "base:1", "--name", "changed"];
    let shape = ["--isolation", "process", "--disk", "4GiB"];
    cluster.tow(create.into_iter().chain(shape)).finish(BOOT).ok();
    let from = cluster.root().join("changed");
    let from = from.to_str().context("a path")?;
    cluster.tow(["cp", "-u", "root", from, "changed:/changed"]).finish(BOOT).ok();
    Ok(())
}

/// The same change for umoci, where that is installed.
fn unpack(base: &Path, bundle: &Path, changed: &Path) -> anyhow::Result<bool> {
    if !towline_end_to_end::cluster::in_path("umoci") {
        return Ok(false);
    }
    // It knows images by their names only.
    let mut named = Command::new("skopeo");
    named.args(["copy", "--quiet", "--insecure-policy"]).arg(format!("oci:{}", base.display()));
    pull::run(named.arg(format!("oci:{}:base", tagged(base).display())))?;
    let mut umoci = Command::new("umoci");
    umoci.args(["unpack", "--image"]).arg(image(&tagged(base), "base")?).arg(bundle);
    pull::run(&mut umoci)?;
    let mut copy = Command::new("cp");
    copy.arg("-r").arg(changed).arg(bundle.join("rootfs/changed"));
    pull::run(&mut copy)?;
    Ok(true)
}

fn tagged(base: &Path) -> PathBuf {
    base.with_extension("tagged")
}

fn image(layout: &Path, tag: &str) -> anyhow::Result<String> {
    Ok(format!("{}:{tag}", layout.to_str().context("a path")?))
}

fn pack(changed: &Path, root: &Path) -> anyhow::Result<Duration> {
    let out = std::fs::File::create(root.join("packed.tar.zst"))?;
    let start = Instant::now();
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(changed).args(["-cf", "-", "."]).stdout(Stdio::piped());
    let mut tar = tar.spawn().context("tar")?;
    let pipe = tar.stdout.take().context("a pipe")?;
    let zstd =
        Command::new("zstd").args(["-3", "-T1", "-q", "-c"]).stdin(pipe).stdout(out).status();
    anyhow::ensure!(zstd.context("zstd is needed")?.success(), "zstd failed");
    anyhow::ensure!(tar.wait()?.success(), "tar failed");
    Ok(start.elapsed())
}

fn repack(base: &Path, bundle: &Path, run: usize) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut umoci = Command::new("umoci");
    umoci.args(["repack", "--image"]).arg(image(&tagged(base), &format!("new{run}"))?).arg(bundle);
    pull::run(&mut umoci)?;
    Ok(start.elapsed())
}
