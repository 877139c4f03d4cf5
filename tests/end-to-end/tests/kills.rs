//! kill -9 at random moments: what was acknowledged is there, once; streams lose and double nothing.
//! `TOWLINE_KILLS` says how often (20 here, 200 in `make soak`).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::moments::{Moments, kills};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, Running, skipped};

/// What the load was told, by sandbox name: `Some(phase)` when the last answer was a success.
type Acknowledged = BTreeMap<String, Option<&'static str>>;

#[test]
fn kill_of_the_control_plane_loses_nothing_acknowledged() {
    let cluster = match Cluster::up() {
        Ok(cluster) => Arc::new(cluster),
        Err(why) => skipped!("{why}"),
    };
    let over = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(Mutex::new(Acknowledged::new()));
    let loads: Vec<_> = (0..2)
        .map(|worker| {
            let (cluster, over, acknowledged) =
                (Arc::clone(&cluster), Arc::clone(&over), Arc::clone(&acknowledged));
            std::thread::spawn(move || load(&cluster, worker, &over, &acknowledged))
        })
        .collect();
    let mut moments = Moments::default();
    for round in 0..kills(20) {
        std::thread::sleep(Duration::from_millis(200 + moments.below(1800)));
        cluster.process(&["towline-control-plane", "--config"]).kill();
        // It is there again, and nothing that was there is doubled.
        let names = wait_for("the control plane's restart", SHORT, || listed(&cluster));
        let distinct: BTreeSet<_> = names.iter().map(|(name, _)| name).collect();
        assert_eq!(distinct.len(), names.len(), "round {round}: a name is there twice: {names:?}");
    }
    over.store(true, Ordering::SeqCst);
    for load in loads {
        load.join().expect("the load ran to its end");
    }
    let names = wait_for("the list", SHORT, || listed(&cluster));
    let there: BTreeMap<_, _> = names.into_iter().collect();
    let acknowledged = acknowledged.lock().unwrap();
    assert!(!acknowledged.is_empty(), "the load did something");
    for (name, told) in acknowledged.iter() {
        match told {
            Some("gone") => assert!(!there.contains_key(name), "{name} was removed"),
            Some(phase) => assert_eq!(there.get(name).map(String::as_str), Some(*phase), "{name}"),
            None => {}
        }
    }
}

fn listed(cluster: &Cluster) -> Option<Vec<(String, String)>> {
    let done = cluster.tow(["ls", "--json"]).finish(SHORT);
    (done.code == 0).then(|| {
        let parse = |line: &str| {
            let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let text = |key: &str| value[key].as_str().expect("text").to_owned();
            (text("name"), text("desired"))
        };
        done.out().lines().map(parse).collect()
    })
}

/// Creates, stops and removes sandboxes until told to end; notes each answer. What a kill left in
/// between is removed before the next one is made, so that the machine does not fill up.
fn load(cluster: &Cluster, worker: u32, over: &AtomicBool, told: &Mutex<Acknowledged>) {
    let note = |name: &str, what| {
        told.lock().unwrap().insert(name.to_owned(), what);
    };
    let mut unknown: Vec<String> = Vec::new();
    for number in 0.. {
        if over.load(Ordering::SeqCst) {
            return;
        }
        unknown.retain(|name| {
            let done = cluster.tow(["rm", name]).finish(BOOT);
            if done.code == 0 {
                note(name, Some("gone"));
            }
            done.code != 0 && !done.err().contains("there is no sandbox")
        });
        let name = format!("load-{worker}-{number}");
        let shape = ["--cpus", "1", "--memory", "256MiB", "--disk", "1GiB"];
        let steps: [(Vec<&str>, &'static str); 3] = [
            ([&["create", "--no-sync", "--name", &name], &shape[..]].concat(), "running"),
            (vec!["stop", &name], "stopped"),
            (vec!["rm", &name], "gone"),
        ];
        for (arguments, outcome) in steps {
            note(&name, None);
            let done = cluster.tow(&arguments).finish(BOOT);
            if done.code != 0 {
                // The fate of this one is unknown: that is what the answer said.
                unknown.push(name.clone());
                break;
            }
            note(&name, Some(outcome));
        }
    }
}

#[test]
fn kill_of_node_agent_and_daemon_loses_no_byte() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("stream");
    let name =
        cluster.tow_in(&folder, ["run", "-d", "--", "sleep", "10000"]).finish(BOOT).ok().out();
    let rounds = (kills(20) / 10).max(2);
    let mut moments = Moments::default();
    for round in 0..rounds {
        let victim: &[&str] =
            if round % 2 == 0 { &["towline-node-agent", "--config"] } else { &["tow", "daemon"] };
        stream_through_kill(&cluster, &folder, &name, victim, &mut moments);
    }
}

const STREAM_BYTES: usize = 100_000_000;

/// 100 MB go in and come back changed while the victim is killed again and again.
fn stream_through_kill(
    cluster: &Cluster,
    folder: &Path,
    name: &str,
    victim: &[&str],
    moments: &mut Moments,
) {
    let input: Vec<u8> =
        (0..STREAM_BYTES / 8).flat_map(|i| mixed(i as u64).to_le_bytes()).collect();
    let expected = Sha256::digest(&input);
    let mut command = cluster.tow_command(folder, ["exec", name, "--", "cat"]);
    let mut stream = Running::start(&mut command, Some(input));
    let mut killed = 0;
    while !stream.ended() && killed < 5 {
        std::thread::sleep(Duration::from_millis(300 + moments.below(1500)));
        if let Some(process) = cluster.find(victim) {
            process.kill();
            killed += 1;
        }
    }
    assert!(killed > 0, "the stream outlived at least one kill");
    let done = stream.finish(BOOT * 2).ok();
    assert_eq!(done.stdout.len(), STREAM_BYTES, "after {killed} kills of {victim:?}");
    assert_eq!(Sha256::digest(&done.stdout), expected, "after {killed} kills of {victim:?}");
}

/// Bytes that repeat nowhere (splitmix64).
fn mixed(index: u64) -> u64 {
    let mut value = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
