//! Guests that wait, through the whole product and on a real VMM: what a sandbox takes over is its own
//! from then on, and nothing of it or of what waits is left behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, Finished, skipped};

/// A template is made at the lowest priority, after that of the usual shape, then a guest from it; and
/// nested, the writing of each takes minutes.
const READY_MAX: Duration = Duration::from_secs(900);
/// Nested, this machine's own system takes minutes to look at.
const CREATE_MAX: Duration = Duration::from_secs(600);
/// What no two sandboxes may share.
const DRAWS: &str = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id \
                     /etc/machine-id /etc/hostname; head -c 1048576 /dev/urandom | sha256sum";

fn exec(cluster: &Cluster, name: &str, script: &str) -> Finished {
    cluster.tow(["exec", "--no-sync", name, "--", "sh", "-c", script]).finish(BOOT).ok()
}

/// Makes sandboxes until one takes a guest over that waited, which is kept.
fn claim(cluster: &Cluster, prefix: &str) -> String {
    let until = Instant::now() + READY_MAX;
    for number in 0.. {
        let name = format!("{prefix}{number}");
        let create = ["create", "--no-sync", "--name", &name, "--image", "local"];
        // Two of them, and a copy, on a small machine.
        let shape = ["--memory", "384MiB", "--disk", "2GiB"];
        cluster.tow(create.into_iter().chain(shape)).finish(CREATE_MAX).ok();
        if cluster.inspect(&name)["start"] == "ready" {
            return name;
        }
        assert!(Instant::now() < until, "no guest was ready in {READY_MAX:?}");
        cluster.tow(["rm", "--force", &name]).finish(SHORT).ok();
        std::thread::sleep(Duration::from_secs(1));
    }
    unreachable!()
}

fn folders(cluster: &Cluster) -> Vec<PathBuf> {
    let dir = cluster.root().join("data/towline/node/ready");
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn vm_that_waited_becomes_a_sandbox_like_any_other() {
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    cluster.configure_node("ready_guests = 1\n");
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let first = claim(&cluster, "first");
    let second = claim(&cluster, "second");
    let draws = [&first, &second].map(|name| exec(&cluster, name, DRAWS).out());
    for (one, other) in draws[0].lines().zip(draws[1].lines()) {
        assert_ne!(one, other, "two sandboxes share what they draw");
    }
    assert_eq!((draws[0].lines().count(), draws[1].lines().count()), (5, 5));

    // It outlives its node agent, and keeps its disk over a stop.
    exec(&cluster, &first, "echo kept > /var/tmp/kept; sync");
    cluster.process(&["towline-node-agent"]).kill();
    assert_eq!(exec(&cluster, &first, "cat /var/tmp/kept").out(), "kept");
    cluster.tow(["stop", &first]).finish(SHORT).ok();
    cluster.tow(["start", &first]).finish(BOOT).ok();
    assert_ne!(cluster.inspect(&first)["start"], "ready");
    assert_eq!(exec(&cluster, &first, "cat /var/tmp/kept").out(), "kept");

    // It is halted, goes on, and is copied.
    exec(&cluster, &second, "echo too > /var/tmp/kept");
    cluster.tow(["pause", &second]).finish(SHORT).ok();
    cluster.tow(["resume", &second]).finish(SHORT).ok();
    cluster.tow(["fork", "-n", "1", &second]).finish(BOOT).ok();
    let copy = cluster.json(["ls", "--json"]).into_iter().find_map(|it| {
        let name = it["name"].as_str()?.to_owned();
        (name != first && name != second).then_some(name)
    });
    let copy = copy.expect("a copy");
    assert_eq!(exec(&cluster, &copy, "cat /var/tmp/kept").out(), "too");

    cluster.tow(["rm", "--force", &first, &second, &copy]).finish(SHORT).ok();
    wait_for("one folder at most, that of the next", SHORT, || {
        (folders(&cluster).len() <= 1).then_some(())
    });
    cluster.tow(["down"]).finish(SHORT).ok();
    wait_for("the end of every VM", SHORT, || {
        let vms = ["qemu-system", "cloud-hypervisor"];
        let lives = |vm: &str| cluster.find(&[vm]).is_some();
        (!vms.into_iter().any(lives)).then_some(())
    });
}
