//! The same change as others make an image or an archive of it. Those that are not installed are
//! left out, and said to be.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_end_to_end::cluster::in_path;

use crate::pull;

/// One thread of `tar | zstd`, with the level that we use.
pub(super) fn pack(changed: &Path, root: &Path) -> anyhow::Result<Duration> {
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

/// A bundle of the image with the change.
pub(super) struct Umoci {
    layout: PathBuf,
    bundle: PathBuf,
}

impl Umoci {
    pub(super) fn prepare(
        root: &Path,
        base: &Path,
        changed: &Path,
    ) -> anyhow::Result<Option<Self>> {
        if !installed("umoci") {
            return Ok(None);
        }
        let umoci = Self { layout: root.join("tagged"), bundle: root.join("bundle") };
        // It knows images by their names only.
        let mut named = Command::new("skopeo");
        named.args(["copy", "--quiet", "--insecure-policy"]).arg(format!("oci:{}", base.display()));
        pull::run(named.arg(format!("oci:{}", umoci.image("base"))))?;
        let mut unpack = Command::new("umoci");
        unpack.args(["unpack", "--image"]).arg(umoci.image("base")).arg(&umoci.bundle);
        pull::run(&mut unpack)?;
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(changed).arg(umoci.bundle.join("rootfs/changed"));
        pull::run(&mut copy)?;
        Ok(Some(umoci))
    }

    pub(super) fn repack(&self, run: usize) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let mut umoci = Command::new("umoci");
        umoci.args(["repack", "--image"]).arg(self.image(&format!("new{run}"))).arg(&self.bundle);
        pull::run(&mut umoci)?;
        Ok(start.elapsed())
    }

    fn image(&self, tag: &str) -> String {
        format!("{}:{tag}", self.layout.display())
    }
}

/// A container of the image with the change, in a store of its own.
pub(super) struct Buildah {
    store: PathBuf,
    container: String,
}

impl Buildah {
    pub(super) fn prepare(
        root: &Path,
        base: &Path,
        changed: &Path,
    ) -> anyhow::Result<Option<Self>> {
        if !installed("buildah") {
            return Ok(None);
        }
        let mut buildah = Self { store: root.join("buildah"), container: String::new() };
        let mut from = buildah.command("from");
        let from = from.arg(format!("oci:{}", base.display())).output().context("buildah from")?;
        let error = String::from_utf8_lossy(&from.stderr);
        anyhow::ensure!(from.status.success(), "buildah from: {error}");
        buildah.container = String::from_utf8(from.stdout)?.trim().to_owned();
        let mut copy = buildah.command("copy");
        pull::run(copy.args(["--quiet", &buildah.container]).arg(changed).arg("/changed"))?;
        Ok(Some(buildah))
    }

    pub(super) fn commit(&self, run: usize) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let mut commit = self.command("commit");
        pull::run(commit.args(["--quiet", &self.container, &format!("saved:{run}")]))?;
        Ok(start.elapsed())
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new("buildah");
        command.args(["--storage-driver", "overlay", "--root"]).arg(self.store.join("root"));
        command.arg("--runroot").arg(self.store.join("run")).arg(verb);
        command
    }
}

#[expect(clippy::print_stderr, reason = "what is not measured is said")]
fn installed(peer: &str) -> bool {
    let installed = in_path(peer);
    if !installed {
        eprintln!("SKIPPED: `{peer}` is not installed");
    }
    installed
}
