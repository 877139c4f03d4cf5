//! A pull from a registry and the first run of what came, against `skopeo copy` and mksquashfs of
//! the same layers.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use towline_end_to_end::Cluster;
use towline_end_to_end::cluster::BOOT;
use towline_end_to_end::oci::{File, layer, layout};
use towline_end_to_end::registry::Registry;

use crate::Row;
use crate::stats::{median, ms, ratio};

const GOAL: f64 = 1.2;
/// Layers and bytes of each, before compression.
const LAYERS: usize = 3;
const LAYER_BYTES: usize = 36 << 20;
const FILE_BYTES: usize = 64 << 10;

/// Measures both, alternating, each run with another image so that nothing is known already; in a
/// cluster of its own, whose images go with it.
pub(crate) fn measure(bin_dir: &Path, runs: usize) -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::prepare_in(bin_dir).map_err(anyhow::Error::msg)?.with_own_images();
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let registry = Registry::start(&cluster.root().join("bench-registry"), false);
    let registry = registry.map_err(anyhow::Error::msg)?;
    let (mut ours, mut pulls, mut peers, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for run in 0..runs {
        let name = format!("bench{run}");
        let folder = cluster.root().join(&name);
        make(&folder, run)?;
        registry.push(&folder, &name);
        let reference = format!("{}/{name}", registry.address());
        bytes = registry.layers(&name).iter().map(|digest| size(&registry.blob(digest))).sum();
        peers.push(peer(cluster.root(), &reference)?);
        let start = Instant::now();
        cluster.tow(["image", "pull", &reference]).finish(BOOT).ok();
        pulls.push(start.elapsed());
        let first = ["run", "--rm", "--no-sync", "--image", &reference, "--", "true"];
        cluster.tow(first).finish(BOOT).ok();
        ours.push(start.elapsed());
    }
    let (ours, pull, peer) = (median(&ours), median(&pulls), median(&peers));
    let share = ratio(ours, peer);
    Ok(vec![Row {
        what: "pull of a 60 MB image from a registry on loopback, and its first run",
        goal: "≤ 1.2 × `skopeo copy` and mksquashfs (lz4) of the same layers",
        measured: format!(
            "{share:.2} × ({} against {}, {runs} runs of {} MB; the pull alone {})",
            ms(ours),
            ms(peer),
            bytes / 1_000_000,
            ms(pull)
        ),
        met: share <= GOAL,
    }])
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |meta| meta.len())
}

/// Layers of files that compress to about half, no two runs alike.
fn make(folder: &Path, run: usize) -> anyhow::Result<()> {
    let busybox = std::fs::read("/bin/busybox").context("busybox-static is needed")?;
    let mut noise = Noise::new(run);
    let mut layers = vec![layer(&[
        File { path: "bin/true", mode: 0o755, content: &busybox },
        File { path: "bin/sh", mode: 0o755, content: &busybox },
    ])];
    for number in 0..LAYERS {
        let content = noise.bytes(LAYER_BYTES);
        let paths: Vec<_> =
            (0..LAYER_BYTES / FILE_BYTES).map(|file| format!("data/{number}/{file}")).collect();
        let files: Vec<_> = paths
            .iter()
            .zip(content.chunks(FILE_BYTES))
            .map(|(path, content)| File { path, mode: 0o644, content })
            .collect();
        layers.push(layer(&files));
    }
    layout(folder, &layers, &json!({"Env": ["PATH=/bin"]}));
    Ok(())
}

/// Bytes that compress to about half, by xorshift.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: usize) -> Self {
        Self(0x9e37_79b9_7f4a_7c15_u64 ^ ((seed as u64) << 32))
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut content = Vec::with_capacity(len);
        while content.len() < len {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            content.extend_from_slice(&self.0.to_le_bytes());
            content.extend_from_slice(b"the same");
        }
        content
    }
}

/// `skopeo copy` to a folder, then each layer through mksquashfs with the options that we use.
fn peer(root: &Path, reference: &str) -> anyhow::Result<Duration> {
    let folder = tempfile::tempdir_in(root)?;
    let copied = folder.path().join("image");
    let start = Instant::now();
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--quiet", "--insecure-policy", "--src-tls-verify=false"]);
    skopeo.arg(format!("docker://{reference}")).arg(format!("dir:{}", copied.display()));
    run(&mut skopeo)?;
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(copied.join("manifest.json"))?)?;
    for (number, layer) in manifest["layers"].as_array().context("layers")?.iter().enumerate() {
        let digest = layer["digest"].as_str().context("a digest")?;
        let file = std::fs::File::open(copied.join(digest.trim_start_matches("sha256:")))?;
        let mut unpack = Command::new("gzip");
        unpack.arg("-dc").stdin(file).stdout(Stdio::piped());
        let mut unpack = unpack.spawn().context("gzip")?;
        let tar = unpack.stdout.take().context("a pipe")?;
        let mut imager = Command::new("mksquashfs");
        imager.arg("-").arg(folder.path().join(format!("{number}.squashfs")));
        imager.args(["-tar", "-quiet", "-no-progress", "-comp", "lz4", "-b", "131072"]);
        run(imager.stdin(tar))?;
        anyhow::ensure!(unpack.wait()?.success(), "gzip failed");
    }
    Ok(start.elapsed())
}

pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.stdout(Stdio::null()).status();
    let status = status.with_context(|| format!("{command:?}"))?;
    anyhow::ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
