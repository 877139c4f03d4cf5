//! What `tow diff` tells of a sandbox, whichever its isolation.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests: a panic is the failure, and what is not asked is said"
)]

use std::fs;

use serde_json::{Value, json};
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::oci::{File, layer, layout};
use towline_end_to_end::{Cluster, skipped};

/// Changes of all kinds, in a shell of busybox.
const CHANGES: &str = r"
set -e
echo new > /data/new; echo now > /data/changed
rm /data/deleted; rm -r /data/tree
mv /data/from /data/to
touch /data/touched; chmod 4755 /data/mode; chown 7:8 /data/owner
cp /data/same /data/again; mv /data/again /data/same
rm /data/file; mkdir /data/file; echo in > /data/file/in
rm -r /data/folder; echo file > /data/folder
rm -r /data/back; mkdir -p /data/back/deep; echo kept > /data/back/kept
echo deeply > /data/back/deep/kept
ln -sf elsewhere /data/link; ln /data/new /data/new-2; mkfifo /data/pipe
truncate -s 1G /data/sparse
echo volatile > /tmp/volatile; echo volatile > /run/volatile; echo own > /etc/hosts
printf 'Package: tool\nStatus: install ok installed\nVersion: 2\nArchitecture: all\n' \
  > /var/lib/dpkg/status
";

#[test]
fn what_a_sandbox_changed_is_told_whichever_its_isolation() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing("process"),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let file = |path, content| File { path, mode: 0o644, content };
    let lower = layer(&[
        File { path: "bin/busybox", mode: 0o755, content: &busybox },
        File { path: "bin/sh", mode: 0o755, content: &busybox },
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
        file("var/lib/dpkg/status", b"Package: tool\nStatus: install ok installed\nVersion: 1\nArchitecture: all\n\nPackage: gone\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n"),
        file("data/hidden", b"by the layer above"),
        file("data/back/deep/kept", b"deeply\n"),
        file("data/back/deep/gone", b"gone"),
        file("data/back/kept", b"kept\n"),
        file("data/changed", b"was"),
        file("data/deleted", b"deleted"),
        file("data/file", b"file"),
        file("data/folder/in", b"in"),
        file("data/from", b"moved"),
        file("data/link", b"no link"),
        file("data/mode", b"mode"),
        file("data/owner", b"owner"),
        file("data/same", b"same"),
        file("data/tree/a/b", b"b"),
    ]);
    let upper = layer(&[file("data/.wh.hidden", b""), file("data/touched", b"touched")]);
    let folder = cluster.root().join("layout");
    layout(&folder, &[lower, upper], &json!({ "Env": ["PATH=/bin"] }));
    cluster.tow(["image", "import", folder.to_str().unwrap(), "base:1"]).finish(SHORT).ok();

    let of = |isolation: &str| {
        let create = ["create", "--image", "base:1", "--no-sync", "--name", isolation];
        let shape = ["--isolation", isolation, "--memory", "512MiB", "--disk", "2GiB"];
        cluster.tow(create.into_iter().chain(shape)).finish(BOOT).ok();
        let nothing = cluster.tow(["diff", isolation]).finish(SHORT).ok().out();
        assert_eq!(nothing, "", "a sandbox that ran nothing changed nothing");
        let change = ["exec", "-u", "root", isolation, "--", "/bin/busybox", "sh", "-c"];
        cluster.tow(change.into_iter().chain([CHANGES])).finish(SHORT).ok();
        cluster.json(["diff", "--json", isolation])
    };
    let told = of("vm");
    let text: Vec<String> = told.iter().map(shown).collect();
    assert_eq!(
        text,
        [
            "removed file /data/back/deep/gone 4 0",
            "changed file /data/changed 3 4 content",
            "removed file /data/deleted 7 0",
            "changed directory /data/file 4 0 type",
            "added file /data/file/in 0 3",
            "changed file /data/folder 0 5 type",
            "removed file /data/from 5 0",
            "changed symlink /data/link 7 9 type",
            "changed file /data/mode 4 4 mode",
            "added file /data/new 0 4",
            "added file /data/new-2 0 4",
            "changed file /data/owner 5 5 owner",
            "added fifo /data/pipe 0 0",
            "added file /data/sparse 0 1073741824",
            "added file /data/to 0 5",
            "removed directory /data/tree 0 0",
            "changed file /var/lib/dpkg/status 147 72 content",
            "package gone 1 none",
            "package tool 1 2",
        ]
    );
    cluster.tow(["stop", "vm"]).finish(BOOT).ok();
    let refused = cluster.tow(["diff", "vm"]).finish(SHORT).expect(1);
    assert!(refused.err().contains("tow start vm"), "{}", refused.err());

    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: the `process` driver needs root");
        return;
    }
    let same: Vec<String> = of("process").iter().map(shown).collect();
    assert_eq!(same, text);
}

/// A folder, a home and names are made in every sandbox: they are none of its changes. What lies in
/// the local image is compared by way of the laptop.
#[test]
fn a_sandbox_of_this_machine_changes_nothing_by_itself() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("untouched");
    fs::write(folder.join("file"), "of the project").unwrap();
    let run = |script: &str| {
        let run = ["run", "--name", "here", "--", "sh", "-c", script];
        cluster.tow_in(&folder, run).finish(BOOT).ok();
        cluster.json(["diff", "--json", "here"]).iter().map(shown).collect::<Vec<_>>()
    };
    assert_eq!(run("cat file > copy"), [""; 0]);
    let program = "cp /usr/bin/env /var/tmp/env && cp /var/tmp/env \"$HOME/env\"";
    let told = run(program);
    let home = std::env::var("HOME").unwrap_or_default();
    let has = |path: &str| told.iter().any(|line| line.contains(path));
    assert!(has("added file /var/tmp/env "), "{told:?}");
    assert!(home.is_empty() || has("/env "), "{told:?}");
    assert!(!has("untouched"), "the project folder is no part of the image: {told:?}");
}

fn shown(object: &Value) -> String {
    if object["schema"] == "towline.package-change/1" {
        let parts = ["package", "version_before", "version"];
        let [name, before, now] = parts.map(|key| object[key].as_str().unwrap_or("none"));
        return format!("package {name} {before} {now}");
    }
    let text = |key: &str| object[key].as_str().unwrap().to_owned();
    let differs: Vec<_> =
        object["differs"].as_array().unwrap().iter().map(|d| d.as_str().unwrap()).collect();
    let (before, now) = (&object["size_before"], &object["size"]);
    let line =
        [text("change"), text("type"), text("path"), format!("{before} {now}"), differs.join(",")];
    line.join(" ").trim_end().to_owned()
}
