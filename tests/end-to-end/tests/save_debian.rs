//! `tow save` of a real Debian with changes of all kinds and very many files: entry by entry, others
//! unpack what the sandbox saw.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests: a panic is the failure, and what is not asked is said"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use towline_end_to_end::cluster::{BOOT, in_path};
use towline_end_to_end::run::Running;
use towline_end_to_end::{Cluster, debian, oci, skipped};

const CHANGES: &str = include_str!("save_debian/changes.sh");
const MORE_CHANGES: &str = include_str!("save_debian/changes.pl");
const MANY_FILES: &str = include_str!("save_debian/many.pl");
const DEVICES: &str = include_str!("save_debian/devices.pl");
const LOOK: &str = include_str!("save_debian/look.pl");
/// Later times become this one.
const TIMESTAMP: i64 = 1_700_000_000;
/// Of one step over all files, emulated on a busy machine.
const LONG: Duration = Duration::from_secs(300);

/// All that a file is but its time, and that, by path.
type Tree = BTreeMap<String, (String, i64)>;

#[test]
fn others_unpack_of_a_debian_what_the_sandbox_saw() {
    if !rustix::process::geteuid().is_root() {
        skipped!("only root can unpack files of other owners, and device nodes");
    }
    for tool in ["skopeo", "umoci", "perl"] {
        if !in_path(tool) {
            skipped!("`{tool}` is not installed: make test installs it");
        }
    }
    let archive = match debian::archive(Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        Ok(archive) => archive,
        Err(why) => skipped!("no Debian: {why}"),
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing("process").with_own_images(),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let base = untar(&archive, &cluster.root().join("untarred"));
    let (layout, path) = (cluster.root().join("base"), "PATH=/usr/sbin:/usr/bin:/sbin:/bin");
    oci::layout(&layout, &[fs::read(archive).unwrap()], &json!({ "Env": [path] }));
    cluster.tow(["image", "import", layout.to_str().unwrap(), "debian:1"]).finish(LONG).ok();
    let saved = |sandbox: &Sandbox<'_>| {
        let folder = cluster.root().join(sandbox.name);
        let layout = folder.join("saved");
        fs::create_dir(&folder).unwrap();
        let digest = sandbox.save("debian:2", &["--output", layout.to_str().unwrap()]);
        (digest, unpack(&layout, &folder))
    };

    let process = Sandbox::create(&cluster, "process");
    process.change();
    process.run("perl", MANY_FILES, &[]);
    let (digest, unpacked) = saved(&process);
    let seen = process.look();
    assert!(seen.len() > 100_000, "{} files", seen.len());
    same(&unpacked, &expected(&seen, &base));

    // Its changes and some more, which are taken back: the same state is the same image.
    let vm = Sandbox::create(&cluster, "vm");
    vm.change();
    vm.run("perl", DEVICES, &["make"]);
    let (_, unpacked) = saved(&vm);
    let seen_by_vm = vm.look();
    same(&unpacked, &expected(&seen_by_vm, &base));
    vm.run("perl", DEVICES, &["undo"]);
    vm.run("perl", MANY_FILES, &[]);
    assert_eq!(vm.save("debian:3", &[]), digest);
    println!("the same: {} and {} entries", seen.len(), seen_by_vm.len());
}

/// One sandbox, of the isolation that is its name.
struct Sandbox<'a> {
    cluster: &'a Cluster,
    name: &'a str,
}

impl<'a> Sandbox<'a> {
    fn create(cluster: &'a Cluster, name: &'a str) -> Self {
        let create = ["create", "--image", "debian:1", "--no-sync", "--name", name];
        let shape = ["--isolation", name, "--memory", "1GiB", "--disk", "4GiB"];
        cluster.tow(create.into_iter().chain(shape)).finish(BOOT).ok();
        Self { cluster, name }
    }

    #[track_caller]
    fn run(&self, program: &str, script: &str, arguments: &[&str]) -> String {
        let flag = if program == "sh" { "-c" } else { "-e" };
        let exec = ["exec", "-u", "root", self.name, "--", program, flag, script];
        self.cluster.tow(exec.iter().chain(arguments)).finish(LONG).ok().out()
    }

    #[track_caller]
    fn change(&self) {
        self.run("sh", CHANGES, &[]);
        self.run("perl", MORE_CHANGES, &[]);
    }

    #[track_caller]
    fn look(&self) -> Tree {
        tree(&self.run("perl", LOOK, &["/", "overlay"]))
    }

    /// Not packed by zstd, which umoci cannot read.
    #[track_caller]
    fn save(&self, image: &str, more: &[&str]) -> String {
        let timestamp = TIMESTAMP.to_string();
        let save = ["save", "--compression", "gzip", "--timestamp", &timestamp, self.name, image];
        self.cluster.tow(save.iter().chain(more)).finish(LONG).ok().out()
    }
}

fn tree(text: &str) -> Tree {
    let line = |line: &str| {
        let [path, facts, time] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        (path.to_owned(), (facts.to_owned(), time.parse().unwrap()))
    };
    text.lines().map(line).collect()
}

/// What the image has of what was seen: other times alone are no change, and later ones are clamped.
fn expected(seen: &Tree, base: &Tree) -> Tree {
    let file = |(path, (facts, time)): (&String, &(String, i64))| {
        let unchanged = base.get(path).filter(|(before, _)| before == facts);
        let time = unchanged.map_or((*time).min(TIMESTAMP), |(_, time)| *time);
        (path.clone(), (facts.clone(), time))
    };
    seen.iter().map(file).collect()
}

#[track_caller]
fn same(one: &Tree, other: &Tree) {
    let paths = one.keys().chain(other.keys().filter(|path| !one.contains_key(*path)));
    let differ = paths.filter(|path| one.get(*path) != other.get(*path));
    let differ: Vec<_> = differ.map(|path| (path, one.get(path), other.get(path))).collect();
    assert!(differ.is_empty(), "{} differ: {:#?}", differ.len(), &differ[..differ.len().min(50)]);
}

/// A copy by skopeo, unpacked by umoci.
fn unpack(layout: &Path, scratch: &Path) -> Tree {
    let image = format!("{}:copy", scratch.join("copy").display());
    let (from, to) = (format!("oci:{}", layout.display()), format!("oci:{image}"));
    run("skopeo", &["copy", "--quiet", "--insecure-policy", &from, &to]);
    // It has the digests of all unpacked layers.
    let config = |of: &str| run("skopeo", &["inspect", "--config", "--raw", of]);
    assert_eq!(config(&from), config(&to));
    let bundle = scratch.join("bundle");
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    let rootfs = bundle.join("rootfs");
    for volatile in ["run/volatile", "tmp/volatile", "etc/hosts"] {
        assert!(!rootfs.join(volatile).exists(), "{volatile}");
    }
    look(&rootfs)
}

/// What is in an archive.
fn untar(archive: &Path, folder: &Path) -> Tree {
    fs::create_dir(folder).unwrap();
    let [archive, into] = [archive, folder].map(|path| path.to_str().unwrap());
    run("tar", &["--extract", "--preserve-permissions", "--file", archive, "--directory", into]);
    look(folder)
}

fn look(folder: &Path) -> Tree {
    tree(&run("perl", &["-e", LOOK, folder.to_str().unwrap(), "tree"]))
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    Running::start(Command::new(program).args(arguments), None).finish(LONG).ok().out()
}
