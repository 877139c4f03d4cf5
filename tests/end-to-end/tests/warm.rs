//! Warm starts through the whole product: a template comes by itself after the first start, and a
//! cluster that is told so boots every sandbox.

#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::time::{Duration, Instant};

use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::{Cluster, skipped};

/// A template is made at the lowest priority, on a machine where other tests run.
const TEMPLATE_MAX: Duration = Duration::from_secs(300);

/// How a new sandbox of this name was started.
fn start(cluster: &Cluster, name: &str) -> String {
    let run = ["run", "--no-sync", "--name", name, "--image", "local", "--memory", "384MiB", "--"];
    let said = cluster.tow(run.into_iter().chain(["echo", "said"])).finish(BOOT).ok();
    assert_eq!(said.out(), "said");
    let start = cluster.inspect(name)["start"].as_str().unwrap().to_owned();
    cluster.tow(["rm", name]).finish(SHORT).ok();
    start
}

#[test]
fn a_later_sandbox_of_the_same_shape_starts_warm_unless_that_is_off() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let until = Instant::now() + TEMPLATE_MAX;
    let mut number = 0;
    while start(&cluster, &format!("box{number}")) != "warm" {
        assert!(Instant::now() < until, "no start was warm in {TEMPLATE_MAX:?}");
        number += 1;
        std::thread::sleep(Duration::from_secs(1));
    }
    let booting = Cluster::prepare().unwrap().with("TOWLINE_WARM", "off");
    booting.tow(["up", "--detach"]).finish(BOOT).ok();
    assert_eq!(start(&booting, "box"), "cold");
}
