//! `tow save`: what an image holds of a sandbox, whichever its isolation, and what others read of it.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests: a panic is the failure, and what is not asked is said"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::oci::{File, layer, layout};
use towline_end_to_end::registry::Registry;
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, skipped};

/// Changes of all kinds, in a shell of busybox.
const CHANGES: &str = r#"
set -e
cd /data
echo new > new; echo now > changed; rm deleted; rm -r tree; mv from to; mv folder moved
chmod 4755 mode; chown 7:8 owner; touch touched
rm file; mkdir file; echo in > file/in
rm -r replaced; echo file > replaced
rm -r back; mkdir -p back/deep; echo kept > back/kept; echo deeply > back/deep/kept
ln -sf elsewhere link; ln new new-2; ln same same-2; mkfifo -m 640 pipe
dd if=/dev/zero of=sparse bs=1 count=1 seek=67108863 2>/dev/null; echo mid | dd of=sparse bs=1M seek=32 conv=notrunc 2>/dev/null
touch 'a b' "$(printf 'new\nline')" "$(printf 'latin\351')" -- '-dash' 'a*?[x]'
i=0; while [ $i -lt 300 ]; do echo $i > many-$i; i=$((i+1)); done
(mkdir -p "$(printf 'n%.0s' $(seq 200))/$(printf 'm%.0s' $(seq 200))"; cd n*/m*; echo deep > file)
seq 1 300000 > large; truncate -s 0 empty; mkdir -p deep/er; touch deep/er/.hidden
chmod 1777 sticky; touch -d '1999-12-31 23:59:59' old
"#;

/// All that a tree has, a line each.
const LOOK: &str = r"
find . -type d -exec stat -c '%n %F %a %u %g' {} + | sort
find . ! -type d -exec stat -c '%n %F %a %u %g %h' {} + | sort
find . -type f -exec sha256sum {} + | sort
find . -type l -exec readlink {} + | sort
";

#[test]
fn a_saved_image_is_what_the_sandbox_was() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing("process"),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let file = |path, content| File { path, mode: 0o644, content };
    let base = layer(&[
        File { path: "bin/busybox", mode: 0o755, content: &busybox },
        File { path: "bin/sh", mode: 0o755, content: &busybox },
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
        file("data/back/deep/gone", b"gone"),
        file("data/back/deep/kept", b"deeply\n"),
        file("data/back/kept", b"kept\n"),
        file("data/changed", b"was"),
        file("data/deleted", b"deleted"),
        file("data/file", b"file"),
        file("data/folder/in", b"in"),
        file("data/from", b"moved"),
        file("data/link", b"no link"),
        file("data/mode", b"mode"),
        file("data/owner", b"owner"),
        file("data/replaced/by/file", b"x"),
        file("data/same", b"same"),
        file("data/sticky/in", b"x"),
        file("data/touched", b"touched"),
        file("data/tree/a/b", b"b"),
    ]);
    let folder = cluster.root().join("layout");
    layout(&folder, &[base], &json!({ "Env": ["PATH=/bin"] }));
    cluster.tow(["image", "import", folder.to_str().unwrap(), "base:1"]).finish(SHORT).ok();
    let here = Saves(&cluster);
    let create = |name: &str, image: &str, isolation: &str| here.create(name, image, isolation);
    let shell = |name: &str, script: &str| here.shell(name, script);
    let look = |name: &str| here.look(name);
    let save = |name: &str, image: &str| here.save(name, image);

    create("vm", "base:1", "vm");
    let base = cluster.json(["image", "inspect", "--json", "base:1"])[0]["digest"].clone();
    assert_eq!(save("vm", "nothing:1"), base, "nothing changed: it is the base itself");
    shell("vm", CHANGES);
    let seen = look("vm");
    let digest = save("vm", "saved:1");
    assert_eq!(save("vm", "saved:2"), digest, "the same state is the same image");
    let gzip = ["save", "--json", "--compression", "gzip", "vm", "saved:gz"];
    assert_ne!(cluster.json(gzip)[0]["digest"], digest.as_str());

    for (name, image) in [("copy", "saved:1"), ("copy-gz", "saved:gz")] {
        create(name, image, "vm");
        same(&look(name), &seen);
    }
    assert_eq!(save("copy", "saved:3"), digest, "nothing was added to the copy");
    // One bit of the mode is another image.
    shell("copy", "chmod 600 /data/new; chmod 644 /data/new; chmod 645 /data/mode");
    assert_ne!(save("copy", "saved:4"), digest);

    let refused = cluster.tow(["save", "--timestamp", "x", "vm", "a:1"]).finish(SHORT).expect(2);
    assert!(refused.err().contains("--timestamp"), "{}", refused.err());
    shell("vm", "touch /data/.wh.mine");
    let refused = cluster.tow(["save", "vm", "a:1"]).finish(SHORT).expect(1);
    assert!(refused.err().contains("/data/.wh.mine"), "{}", refused.err());
    // The sandbox goes on, and the next save works.
    shell("vm", "rm /data/.wh.mine");
    assert_eq!(save("vm", "saved:5"), digest);

    // Written in pieces: nobody's search for secrets should find it here.
    let login = format!("machine example.com login me password {}\n", ["q7Zr9", "Lm2Xv4"].concat());
    shell("vm", &format!("mkdir -p /root; printf '{}' > /root/.netrc", login.trim()));
    let refused = cluster.tow(["save", "vm", "a:1"]).finish(SHORT).expect(1);
    assert!(refused.err().contains("/root/.netrc:1: "), "{}", refused.err());
    assert!(!refused.err().contains("Lm2Xv4"), "the secret itself is not told");
    assert!(!cluster.tow(["image", "ls"]).finish(SHORT).ok().out().contains("a:1"));
    let allow = ["save", "vm", "a:2", "--allow-secret", "/root/.netrc", "--reason", "a test's"];
    cluster.tow(allow).finish(SHORT).ok();
    shell("vm", "rm /root/.netrc");
    assert_eq!(save("vm", "saved:7"), digest);

    match Registry::start(&cluster.root().join("registry"), false) {
        Ok(registry) => {
            let name = format!("{}/team/saved:1", registry.address());
            let push = ["save", "--push", "--timestamp", "1700000000", "vm", &name];
            assert_eq!(cluster.tow(push).finish(SHORT).ok().out(), digest);
            cluster.tow(["image", "pull", &name]).finish(SHORT).ok();
            let pulled = cluster.json(["image", "inspect", "--json", &name]);
            assert_eq!(pulled[0]["digest"], digest.as_str());
        }
        Err(why) => println!("SKIPPED: no registry: {why}"),
    }
    let squash = |name: &str, image: &str| here.squash(name, image);
    let squashed = squash("vm", "squashed:1");
    assert_eq!(squashed["layers"], 1, "{squashed}");
    create("squashed", "squashed:1", "vm");
    same(&look("squashed"), &seen);
    assert_eq!(squash("squashed", "squashed:2")["digest"], squashed["digest"]);

    let out = cluster.root().join("exported");
    let gzip = ["save", "--compression", "gzip", "vm", "saved:gz2", "--output"];
    cluster.tow(gzip.into_iter().chain([out.to_str().unwrap()])).finish(SHORT).ok();
    others_agree(&out, &cluster.root().join("others"), &seen);

    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: the `process` driver needs root");
        return;
    }
    // Another node, another driver, another time: the same bytes.
    let there = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing("process").with_own_images(),
        Err(why) => skipped!("{why}"),
    };
    there.tow(["up", "--detach"]).finish(BOOT).ok();
    there.tow(["image", "import", folder.to_str().unwrap(), "base:1"]).finish(SHORT).ok();
    let there = Saves(&there);
    there.create("process", "base:1", "process");
    there.shell("process", CHANGES);
    same(&there.look("process"), &seen);
    assert_eq!(there.save("process", "saved:6"), digest);
    assert_eq!(there.squash("process", "squashed:3")["digest"], squashed["digest"]);
}

/// What the tests do with a cluster.
struct Saves<'a>(&'a Cluster);

impl Saves<'_> {
    fn create(&self, name: &str, image: &str, isolation: &str) {
        let create = ["create", "--image", image, "--no-sync", "--name", name];
        let shape = ["--isolation", isolation, "--memory", "512MiB", "--disk", "2GiB"];
        self.0.tow(create.into_iter().chain(shape)).finish(BOOT).ok();
    }

    fn shell(&self, name: &str, script: &str) -> String {
        let exec = ["exec", "-u", "root", name, "--", "/bin/busybox", "sh", "-c"];
        self.0.tow(exec.into_iter().chain([script])).finish(SHORT).ok().out()
    }

    fn look(&self, name: &str) -> String {
        self.shell(name, &format!("cd /data{LOOK}"))
    }

    /// The image's digest.
    fn save(&self, name: &str, image: &str) -> String {
        let saved = self.0.json(["save", "--timestamp", "1700000000", "--json", name, image]);
        assert_eq!(saved[0]["one_instant"], true, "{saved:?}");
        saved[0]["digest"].as_str().unwrap().to_owned()
    }

    fn squash(&self, name: &str, image: &str) -> serde_json::Value {
        let save = ["save", "--squash", "--timestamp", "1700000000", "--json", name, image];
        self.0.json(save)[0].clone()
    }
}

/// As it is in the sandbox, whoever made it there; and not where no image could hold it.
#[test]
fn the_project_folder_goes_into_an_image_when_it_is_asked_for() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let programs = ["bin/busybox", "bin/sh"];
    let base = layer(&programs.map(|path| File { path, mode: 0o755, content: &busybox }));
    let layout_at = cluster.root().join("layout");
    layout(&layout_at, &[base], &json!({ "Env": ["PATH=/bin"] }));
    cluster.tow(["image", "import", layout_at.to_str().unwrap(), "base:1"]).finish(SHORT).ok();
    // Not beneath /tmp, of which images hold nothing.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::create_dir(folder.path().join("src")).unwrap();
    fs::write(folder.path().join("src/main"), "from here\n").unwrap();
    let make = "cat src/main && echo there > built && ln -s built link";
    let run = |name: &str, folder: &Path, rest: &[&str]| {
        let run = ["run", "--image", "base:1", "--name", name, "--memory", "512MiB"];
        let shell = ["--disk", "2GiB", "--", "/bin/busybox", "sh", "-c"];
        let all = [&run[..], &shell, rest].concat();
        cluster.tow_in(folder, all).finish(BOOT).ok().out()
    };
    assert_eq!(run("it", folder.path(), &[make]), "from here");

    fs::write(folder.path().join("src/main"), "edited here\n").unwrap();
    let save = |image: &str, folder: &[&str]| {
        let save = ["save", "--json", "--timestamp", "1700000000", "it", image];
        cluster.json([&save[..], folder].concat())[0].clone()
    };
    let (without, with) = (save("without:1", &[]), save("with:1", &["--with-folder"]));
    assert_eq!(without["changes"], 0, "{without}");
    assert_eq!(with["one_instant"], true, "{with}");
    assert_eq!(save("with:2", &["--with-folder"])["digest"], with["digest"]);
    let here = Saves(&cluster);
    here.create("copy", "with:1", "vm");
    let place = folder.path().to_str().unwrap();
    let look = format!("cd {place}; cat src/main link; find . | sort");
    let expected = "edited here\nthere\n.\n./built\n./link\n./src\n./src/main";
    assert_eq!(here.shell("copy", &look), expected);
    // Its secrets are its secrets.
    let login = format!("machine example.com login me password {}\n", ["q7Zr9", "Lm2Xv4"].concat());
    let shell = ["exec", "it", "--", "/bin/busybox", "sh", "-c"];
    let write = format!("printf '{}' > .netrc", login.trim());
    cluster.tow_in(folder.path(), shell.into_iter().chain([&write[..]])).finish(SHORT).ok();
    let refused = cluster.tow(["save", "--with-folder", "it", "no:1"]).finish(SHORT).expect(1);
    assert!(refused.err().contains(&format!("{place}/.netrc:1: ")), "{}", refused.err());
    cluster.tow(["save", "it", "without:2"]).finish(SHORT).ok();

    let refused = cluster.tow(["save", "--with-folder", "copy", "no:1"]).finish(SHORT).expect(1);
    assert!(refused.err().contains("--no-sync"), "{}", refused.err());
    run("beneath", &cluster.folder("beneath"), &["true"]);
    if cluster.root().starts_with("/tmp") {
        let save = cluster.tow(["save", "--with-folder", "beneath", "no:1"]);
        let refused = save.finish(SHORT).expect(1);
        assert!(refused.err().contains("no image holds"), "{}", refused.err());
    }
}

/// That two lists have the same lines; tells those that are in one alone.
fn same(one: &str, other: &str) {
    let (left, right): (BTreeSet<_>, BTreeSet<_>) =
        (one.lines().collect(), other.lines().collect());
    assert!(left.len() > 300, "{one}");
    let differ: Vec<_> = left.symmetric_difference(&right).collect();
    assert!(differ.is_empty(), "{differ:#?}");
}

/// Whoever dies: no image, nothing left, and the sandbox goes on.
#[test]
fn a_save_that_is_cut_off_leaves_the_sandbox_as_it_was() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.with_own_images(),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let base = layer(&[
        File { path: "bin/busybox", mode: 0o755, content: &busybox },
        File { path: "bin/sh", mode: 0o755, content: &busybox },
    ]);
    let folder = cluster.root().join("layout");
    layout(&folder, &[base], &json!({ "Env": ["PATH=/bin"] }));
    cluster.tow(["image", "import", folder.to_str().unwrap(), "base:1"]).finish(SHORT).ok();
    let here = Saves(&cluster);
    here.create("it", "base:1", "vm");
    let shell = |script: &str| here.shell("it", script);
    // Enough to be in the middle of, and a workload that shows whether it runs.
    shell("dd if=/dev/urandom of=/large bs=1M count=128 2>/dev/null");
    shell("(while true; do date +%s%N > /tmp/tick; sleep 0.1; done) > /dev/null 2>&1 &");
    let images = cluster.cache().join("images");
    let count = |folder: &str| fs::read_dir(images.join(folder)).unwrap().count();
    let before = (count("images"), count("blobs/sha256"));
    let begin = || {
        let saving = cluster.tow(["save", "it", "cut:1"]);
        wait_for("a layer that is half written", SHORT, || {
            let scratch = fs::read_dir(images.join("tmp")).unwrap().flatten();
            let layers = scratch.filter_map(|entry| entry.path().join("layer").metadata().ok());
            layers.map(|layer| layer.len()).find(|len| *len > 8 << 20)
        });
        saving
    };
    let goes_on = || {
        let tick = shell("cat /tmp/tick");
        wait_for("the workload", SHORT, || (shell("cat /tmp/tick") != tick).then_some(()));
    };

    let saving = begin();
    kill(saving.pid());
    saving.finish(SHORT);
    goes_on();
    wait_for("the node agent gives it up", SHORT, || (count("tmp") == 0).then_some(()));
    let saving = begin();
    cluster.process(&["towline-node-agent"]).kill();
    let failed = saving.finish(SHORT).expect(1);
    assert!(failed.err().contains("save it again"), "{}", failed.err());
    goes_on();
    assert_eq!((count("images"), count("blobs/sha256")), before, "nothing has a name");

    let digest = cluster.tow(["save", "it", "whole:1"]).finish(SHORT).ok().out();
    assert!(digest.starts_with("sha256:"), "{digest}");
    assert_eq!(count("tmp"), 0, "nothing is left");
    goes_on();
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// What other tools make of a layout is what the sandbox saw.
fn others_agree(layout: &Path, scratch: &Path, seen: &str) {
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).env("LC_ALL", "C").output();
        done.map(|done| {
            let err = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{program} {args:?}: {err}");
            String::from_utf8_lossy(&done.stdout).into_owned()
        })
    };
    fs::create_dir(scratch).unwrap();
    let (oci, copy) = (format!("oci:{}", layout.display()), scratch.join("copy"));
    match run("skopeo", &["copy", "--quiet", &oci, &format!("oci:{}:copy", copy.display())]) {
        Ok(_) => {
            // The copy's layers are all packed; their content, and all else, is the same.
            let config = |of: &str| run("skopeo", &["inspect", "--config", "--raw", of]).unwrap();
            assert_eq!(config(&oci), config(&format!("oci:{}:copy", copy.display())));
        }
        Err(error) => println!("SKIPPED: skopeo: {error}"),
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: umoci needs root to make files of other owners");
        return;
    }
    let bundle = scratch.join("bundle");
    let image = format!("{}:copy", copy.display());
    match run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]) {
        Ok(_) => {
            let script = format!("cd {}/rootfs/data{LOOK}", bundle.display());
            same(&run("/bin/busybox", &["sh", "-c", &script]).unwrap(), seen);
        }
        Err(error) => println!("SKIPPED: umoci: {error}"),
    }
}
