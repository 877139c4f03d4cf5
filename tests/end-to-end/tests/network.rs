//! What a sandbox reaches, from root in the guest: of everything that it must not reach, nothing,
//! whichever way it tries; of what an operator allows, that.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::wire::{Side, Wire};
use towline_end_to_end::{Cluster, Running, skipped};

/// Tries to reach every address of argv\[1..\] by TCP, UDP and raw packets; prints what connected.
const PROBE: &str = include_str!("network/probe.py");
/// Stands on the other end of the wire: answers TCP and UDP, and prints who was meant by each packet
/// that came.
const WATCH: &str = include_str!("network/watch.py");

/// Tries from a network namespace within the sandbox.
const NESTED: &str = include_str!("network/nested.sh");

/// Where the other end is: one address of each kind that must not be reached, and a public one.
const FORBIDDEN: &[&str] = &[
    "10.77.0.1",
    "172.16.77.1",
    "192.168.77.1",
    "100.64.77.1",
    "169.254.169.254",
    "198.51.100.77",
    "fd00:77::1",
];
const PUBLIC: &str = "11.77.0.1";
/// Public, and nobody has a way there.
const UNROUTABLE: &str = "12.77.0.1";
/// The node's own, on its end of the wire.
const OWN: &[&str] = &["10.77.0.2", "11.77.0.2", "fd00:77::2"];
/// The node's loopback and other notations of it, which nobody but the node has.
const LOOPBACK: &[&str] = &[
    "127.0.0.1",
    "127.0.0.53",
    "0.0.0.0",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.77.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::1",
    "localhost.",
];
const PORT: u16 = 7777;

/// Starts a watcher in a namespace; what it saw goes into the file.
fn watch(wire: &mut Wire, netns: Side, device: &str, file: &Path) {
    let out = std::fs::File::create(file).unwrap();
    let mut watcher = wire.command(netns, "python3");
    watcher.args(["-c", WATCH, device, &PORT.to_string()]);
    wire.serve(watcher.stdout(out));
    wait_for("a watcher to listen", SHORT, || {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| line == "ready").then_some(())
    });
}

#[test]
fn root_in_the_guest_reaches_nothing_that_it_must_not() {
    let far: Vec<_> = FORBIDDEN.iter().copied().chain([PUBLIC]).collect();
    let mut wire = match Wire::new(OWN, &far) {
        Ok(wire) => wire,
        Err(why) => skipped!("{why}"),
    };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.within(wire.name(Side::Node)),
        Err(why) => skipped!("{why}"),
    };
    let [far, near] = ["far", "near"].map(|name| cluster.root().join(name));
    watch(&mut wire, Side::Far, Wire::DEVICE, &far);
    watch(&mut wire, Side::Node, "lo", &near);
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    for policy in ["public", "none"] {
        let folder = cluster.folder(policy);
        let reached = probe(&cluster, &folder, policy);
        let wanted: &[&str] = if policy == "public" { &[PUBLIC] } else { &[] };
        assert_eq!(reached, wanted, "under policy {policy}");
    }
    check_nested(&cluster, "public");
    let far = std::fs::read_to_string(&far).unwrap();
    for address in FORBIDDEN {
        assert!(!far.contains(&format!("packet {address}\n")), "{address} heard of it:\n{far}");
    }
    assert!(far.contains(&format!("packet {PUBLIC}\n")), "the watcher sees what comes:\n{far}");
    let near = std::fs::read_to_string(&near).unwrap();
    assert!(!near.contains("accepted") && !near.contains("datagram"), "{near}");
}

/// A namespace within the sandbox, as a container engine makes them, is told the truth, too.
fn check_nested(cluster: &Cluster, name: &str) {
    let port = PORT.to_string();
    let exec = ["exec", "--no-sync", "-u", "root", name, "--", "sh", "-c", NESTED, "nested"];
    let targets = [&port, PUBLIC, UNROUTABLE, "10.77.0.1", "169.254.169.254", "11.77.0.2"];
    let done = cluster.tow(exec.into_iter().chain(targets)).finish(BOOT).ok();
    let wanted = [
        format!("{PUBLIC}:{port} hello"),
        format!("{PUBLIC}:9 ECONNREFUSED"),
        format!("{UNROUTABLE}:{port} EHOSTUNREACH"),
        format!("10.77.0.1:{port} ECONNREFUSED"),
        format!("169.254.169.254:{port} ECONNREFUSED"),
        format!("11.77.0.2:{port} ECONNREFUSED"),
    ];
    let said = done.out();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines, wanted);
}

/// What root in a new sandbox reached.
fn probe(cluster: &Cluster, folder: &Path, policy: &str) -> Vec<String> {
    let mut command = cluster.tow_command(
        folder,
        ["run", "--new", "--no-sync", "--policy", policy, "--name", policy, "-u", "root", "--"],
    );
    command.args(["/usr/bin/python3", "-c", PROBE, &PORT.to_string(), PUBLIC]);
    command.args(FORBIDDEN).args(OWN).args(LOOPBACK);
    let done = Running::start(&mut command, None).finish(2 * BOOT).ok();
    let reached: Vec<String> = done.out().lines().map(str::to_owned).collect();
    let why = cluster.json(["why", "--json", policy]).remove(0);
    assert_eq!(why["policy"], policy);
    let blocked = why["blocked"].as_array().unwrap();
    let rule = |target: &str| {
        let found = blocked.iter().find(|one| one["target"] == target && one["protocol"] == "tcp");
        found.map(|one| one["rule"].as_str().unwrap().to_owned())
    };
    let wanted = |rule: &str| if policy == "none" { "policy none".into() } else { rule.to_owned() };
    assert_eq!(rule("10.77.0.1"), Some(wanted("private 10.0.0.0/8")), "{why}");
    let metadata = wanted("metadata 169.254.169.254/32");
    assert_eq!(rule("169.254.169.254"), Some(metadata), "{why}");
    let own = wanted("the node's own address 11.77.0.2/32");
    assert_eq!(rule("11.77.0.2"), Some(own), "{why}");
    reached
}

/// Host names of this machine's package index, as its pip says: the index itself, and where it
/// keeps its files.
fn index() -> Option<Vec<String>> {
    let names = "from pip._internal.models.index import PyPI as i; \
                 print(i.netloc, i.file_storage_domain)";
    let said = Command::new("/usr/bin/python3").args(["-c", names]).output().ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    let names: Vec<_> = said.split_whitespace().map(str::to_owned).collect();
    (names.len() == 2).then_some(names)
}

#[test]
fn a_package_comes_where_the_registry_is_allowed_and_the_rule_is_named_where_it_is_not() {
    let here = |command: &mut Command| {
        command.stdin(Stdio::null()).output().is_ok_and(|done| done.status.success())
    };
    let to = tempfile::tempdir().unwrap();
    let download = ["-m", "pip", "download", "--no-deps", "--no-cache-dir", "--retries", "0"];
    let mut pip = Command::new("/usr/bin/python3");
    if !here(pip.args(download).arg("--dest").arg(to.path()).arg("six")) {
        skipped!("this machine itself cannot download a package by pip");
    }
    let Some(index) = index() else { skipped!("this pip does not say which index it asks") };
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let rules: String = index
        .iter()
        .map(|name| format!("[[egress.allow]]\nname = \"{name}\"\nports = [443]\n"))
        .collect();
    cluster.configure_node(&rules);
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let folder = cluster.folder("pip");
    let run = |policy: &str| {
        let mut command = cluster.tow_command(
            &folder,
            ["run", "--new", "--no-sync", "--policy", policy, "--name", policy, "--"],
        );
        command.arg("/usr/bin/python3").args(download).args(["--dest", "/tmp/wheels", "six"]);
        // What this machine's own pip is told of certificates; its index is the default one.
        Running::start(&mut command, None).finish(2 * BOOT)
    };
    let closed = run("none");
    assert_ne!(closed.code, 0, "{}", closed.out());
    let why: Value = cluster.json(["why", "--json", "none"]).remove(0);
    let named = |one: &Value| one["target"] == index[0] && one["rule"] == "policy none";
    assert!(why["blocked"].as_array().unwrap().iter().any(named), "{why}");
    let open = run("public");
    assert_eq!(open.code, 0, "{}\n{}", open.out(), open.err());
}
