//! `tow save` of 200 MB of changed files, against its peers with the same change; and of few changed
//! files, against the same on an image that has hardly any.

mod many_files;
mod peers;

use std::fs::File as Output;
use std::io::BufWriter;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;
use towline_end_to_end::oci::{File, Layer, layout_of_file};

use crate::stats::{median, ms, ratio};
use crate::{Row, idle, pull};
use peers::{Buildah, Umoci};

/// Of the image, beside busybox, and of what is changed; in files of this size.
const BASE_BYTES: usize = 2 << 30;
const CHANGED_BYTES: usize = 200 << 20;
const FILE_BYTES: usize = 64 << 10;
const GOAL: f64 = 1.15;
const GOAL_MIB: u64 = 64;

/// Measures all of them, one after the other in each run; the large change in a sandbox of the
/// `process` driver, so that nobody's files are emulated. In a cluster of its own, whose images go
/// with it.
pub(crate) fn measure(bin_dir: &Path, runs: usize) -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?;
    let cluster = cluster.with("TOWLINE_ISOLATION_PROCESS", "1").with_own_images();
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let mut rows = large_change(&cluster, runs)?;
    rows.push(many_files::measure(&cluster, runs)?);
    Ok(rows)
}

fn large_change(cluster: &Cluster, runs: usize) -> anyhow::Result<Vec<Row>> {
    let (base, changed) = (cluster.root().join("base"), cluster.root().join("changed"));
    make(&base, &changed)?;
    start(cluster, &base)?;
    let umoci = Umoci::prepare(cluster.root(), &base, &changed)?;
    let buildah = Buildah::prepare(cluster.root(), &base, &changed)?;
    let node_agent = cluster.process(&["towline-node-agent", "--config"]).pid;
    let before_kib = idle::pss_kib(node_agent);
    let (over, peak_kib) = (AtomicBool::new(false), AtomicU64::new(0));
    let [mut ours, mut packed, mut repacked, mut committed] = [const { Vec::new() }; 4];
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
            packed.push(peers::pack(&changed, cluster.root())?);
            if let Some(umoci) = &umoci {
                repacked.push(umoci.repack(run)?);
            }
            if let Some(buildah) = &buildah {
                committed.push(buildah.commit(run)?);
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
            what: "`tow save` of 200 MB of changed files on an image of 2 GB, `process` driver",
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
    let peers = [
        (
            "the same against `umoci repack`, which packs with gzip",
            "≤ 1 × `umoci repack` of the same change",
            repacked,
        ),
        (
            "the same against `buildah commit`, which packs nothing",
            "≤ 1 × `buildah commit` of the same change",
            committed,
        ),
    ];
    for (what, goal, peer) in peers.into_iter().filter(|(_, _, peer)| !peer.is_empty()) {
        let peer = median(&peer);
        let measured = format!("{:.2} × ({} against {})", ratio(ours, peer), ms(ours), ms(peer));
        rows.push(Row { what, goal, measured, met: ours <= peer });
    }
    Ok(rows)
}

/// The image's layout, and the files that are to be changed.
fn make(base: &Path, changed: &Path) -> anyhow::Result<()> {
    let mut noise = pull::Noise::new(7);
    let contents = (0..BASE_BYTES / FILE_BYTES).map(|number| {
        let content = noise.bytes(FILE_BYTES);
        (format!("data/{number}"), content)
    });
    image(base, contents)?;
    std::fs::create_dir(changed)?;
    for number in 0..CHANGED_BYTES / FILE_BYTES {
        std::fs::write(changed.join(number.to_string()), noise.bytes(FILE_BYTES))?;
    }
    Ok(())
}

/// Writes the layout of an image with busybox and these files, one after the other.
fn image(folder: &Path, files: impl IntoIterator<Item = (String, Vec<u8>)>) -> anyhow::Result<()> {
    let busybox = std::fs::read("/bin/busybox").context("busybox-static is needed")?;
    let path = folder.with_extension("layer");
    let mut layer = Layer::new(BufWriter::new(Output::create(&path)?));
    for program in ["bin/true", "bin/sh", "bin/tar", "bin/seq"] {
        layer.add(&File { path: program, mode: 0o755, content: &busybox })?;
    }
    for (path, content) in files {
        layer.add(&File { path: &path, mode: 0o644, content: &content })?;
    }
    layer.finish()?.into_inner().context("writing the layer")?;
    layout_of_file(folder, &path, &json!({"Env": ["PATH=/bin"]}));
    Ok(())
}

/// A sandbox with the files in it.
fn start(cluster: &Cluster, base: &Path) -> anyhow::Result<()> {
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
