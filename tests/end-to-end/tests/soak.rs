//! Sandboxes are created, used and removed while node agent, daemon and QEMU are killed at random:
//! afterwards nothing is left of them, and what is said to run is what runs.
//! `TOWLINE_KILLS` says how often (5 here, 200 in `make soak`).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::collections::BTreeSet;
use std::time::Duration;

use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::leftovers::Leftovers;
use towline_end_to_end::moments::{Moments, kills};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, Finished, Running, skipped};

const NODE_AGENT: &[&str] = &["towline-node-agent", "--config"];
const DAEMON: &[&str] = &["tow", "daemon"];
const QEMU: &[&str] = &["qemu-system"];
const SHAPE: &[&str] = &["--cpus", "1", "--memory", "256MiB", "--disk", "1GiB"];

/// In the command line of the process that is a sandbox, by isolation.
const ISOLATIONS: [(&str, &[&str]); 2] = [("vm", QEMU), ("process", PROCESS)];
const PROCESS: &[&str] = &["towline-process-sandbox"];

#[test]
fn kill_of_anything_leaves_nothing_behind() {
    leaves_nothing_behind(0);
}

#[test]
fn kill_of_anything_leaves_nothing_of_process_sandboxes_behind() {
    if !rustix::process::geteuid().is_root() {
        skipped!("the `process` driver needs root");
    }
    leaves_nothing_behind(1);
}

fn leaves_nothing_behind(isolation: usize) {
    let (isolation, sandbox) = ISOLATIONS[isolation];
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing(isolation),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let mut soak = Soak::new(&cluster, isolation);
    // Once without faults: what a first use leaves (a daemon, its lock) is no leftover.
    soak.round(0, &[]);
    let before = Leftovers::look(&cluster, &soak.ids);
    let rounds = kills(5);
    for round in 1..=rounds {
        let victims: &[&[&str]] = match round % 5 {
            0 => &[NODE_AGENT, sandbox],
            1 => &[NODE_AGENT],
            2 => &[sandbox],
            3 => &[DAEMON],
            _ => &[NODE_AGENT, DAEMON],
        };
        soak.round(round, victims);
        if round.is_multiple_of(10) || round == rounds {
            soak.check_what_runs(sandbox);
            soak.remove_all();
        }
    }
    // What was to be killed may have ended a moment before.
    assert!(soak.killed * 2 >= rounds, "{} kills in {rounds} rounds", soak.killed);
    before.wait_for_no_more(&cluster, &soak.ids, SHORT);
}

struct Soak<'c> {
    cluster: &'c Cluster,
    isolation: &'static str,
    moments: Moments,
    ids: BTreeSet<String>,
    killed: u32,
}

impl<'c> Soak<'c> {
    fn new(cluster: &'c Cluster, isolation: &'static str) -> Self {
        Self { cluster, isolation, moments: Moments::default(), ids: BTreeSet::new(), killed: 0 }
    }

    /// Creates, uses, stops (every other time) and removes one sandbox; kills while one of these is
    /// under way. A step may fail by a kill, with a reason; removal must succeed.
    fn round(&mut self, round: u32, victims: &[&[&str]]) {
        let name = format!("soak-{round}");
        let create = ["create", "--no-sync", "--name", &name, "--isolation", self.isolation];
        let create = [&create[..], SHAPE].concat();
        let used = ["exec", "--no-sync", &name, "--", "sh", "-c", "echo used"];
        let steps: [&[&str]; 3] = [&create, &used, &["stop", &name]];
        let when = self.moments.below(4);
        for (number, step) in (0..).zip(steps) {
            if number == 2 && round.is_multiple_of(2) {
                continue;
            }
            let strike = if number == when { victims } else { &[] };
            self.step(step, strike);
            self.note(&name);
        }
        if round % 3 == 1 && round > 1 {
            return; // It stays for a while, beside the next ones.
        }
        let strike = if when == 3 || self.killed < round { victims } else { &[] };
        let removed = self.step(&["rm", &name], strike);
        if removed.code != 0 {
            // A kill may cut the answer off, not the removal: asked again, it is done.
            let again = self.cluster.tow(["rm", &name]).finish(BOOT);
            let gone = again.code == 0 || again.err().contains("there is no sandbox");
            assert!(gone, "rm: {}\nthen: {}", removed.err(), again.err());
        }
        assert!(!self.listed().contains(&name), "{name} was removed");
    }

    /// Runs `tow` and kills meanwhile. Whatever fails says why.
    fn step(&mut self, arguments: &[&str], victims: &[&[&str]]) -> Finished {
        let running = self.cluster.tow(arguments);
        for victim in victims {
            // Creation boots a VM; the rest is done in a moment.
            let bound = if arguments[0] == "create" { 8000 } else { 800 };
            self.moments.pause(Duration::from_millis(bound));
            if let Some(process) = self.cluster.find(victim) {
                process.kill();
                self.killed += 1;
            }
        }
        let done = running.finish(BOOT * 2);
        let quiet = victims.is_empty() && self.killed == 0;
        assert!(done.code == 0 || !quiet, "`tow {arguments:?}`: {}", done.err());
        assert!(done.code == 0 || done.err().contains("error: "), "{arguments:?}: {}", done.err());
        done
    }

    /// Remembers the id: names of what is made on the node derive from it.
    fn note(&mut self, name: &str) {
        let all = self.cluster.json(["ls", "--json"]);
        let of = all.iter().find(|sandbox| sandbox["name"] == name);
        self.ids.extend(of.and_then(|sandbox| Some(sandbox["id"].as_str()?.to_owned())));
    }

    fn listed(&self) -> BTreeSet<String> {
        let all = self.cluster.json(["ls", "--json"]);
        all.iter().filter_map(|sandbox| Some(sandbox["name"].as_str()?.to_owned())).collect()
    }

    fn remove_all(&self) {
        for name in self.listed() {
            self.cluster.tow(["rm", &name]).finish(BOOT).ok();
        }
    }

    /// What is said to run has its process, and nothing else runs.
    fn check_what_runs(&self, sandbox: &[&str]) {
        wait_for("`tow ls` to say what runs", SHORT, || {
            let all = self.cluster.json(["ls", "--json"]);
            let said: BTreeSet<String> = all
                .iter()
                .filter(|sandbox| sandbox["phase"] == "running")
                .filter_map(|sandbox| Some(sandbox["id"].as_str()?.to_owned()))
                .collect();
            let runs: BTreeSet<String> = self
                .cluster
                .processes()
                .iter()
                .filter(|process| process.command_line.contains(sandbox[0]))
                .filter_map(|process| id_in(&process.command_line))
                .collect();
            (said == runs).then_some(())
        });
    }
}

/// The sandbox's id in a VMM's command line: its disk is in the sandbox's folder.
fn id_in(command_line: &str) -> Option<String> {
    let rest = command_line.split("/sandboxes/").nth(1)?;
    Some(rest.split('/').next()?.to_owned())
}

const LINES: u32 = 60;

#[test]
fn kill_of_node_agent_and_daemon_shows_each_line_once() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let create = [&["create", "--no-sync", "--name", "lines"][..], SHAPE].concat();
    cluster.tow(&create).finish(BOOT).ok();
    let mut moments = Moments::default();
    for victim in [NODE_AGENT, DAEMON, NODE_AGENT] {
        let running = count(&cluster, LINES);
        moments.pause(Duration::from_secs(4));
        cluster.process(victim).kill();
        let done = running.finish(BOOT).ok();
        assert_eq!(done.out(), numbered(LINES), "{victim:?} was killed");
    }

    // Without its VM the command is lost: said at once, with what to type.
    let running = count(&cluster, 1_000_000);
    moments.pause(Duration::from_secs(3));
    cluster.process(QEMU).kill();
    let done = running.finish(SHORT).expect(125);
    for said in ["sandbox lines is stopped", "QEMU", "tow start lines"] {
        assert!(done.err().contains(said), "{said} is not in: {}", done.err());
    }
    let shown = done.out();
    let lines = u32::try_from(shown.lines().count()).unwrap();
    // The last line may be cut off in the middle.
    assert!(numbered(lines).starts_with(&shown), "{shown}");
    let refused = cluster.tow(["exec", "lines", "--", "true"]).finish(SHORT).expect(125);
    assert!(refused.err().contains("tow start lines"), "{}", refused.err());
    let logs = cluster.tow(["logs", "lines"]).finish(SHORT).expect(1);
    assert!(logs.err().contains("kept only while it ran"), "{}", logs.err());
    cluster.tow(["start", "lines"]).finish(BOOT).ok();
    cluster.tow(["rm", "lines"]).finish(BOOT).ok();
}

fn count(cluster: &Cluster, lines: u32) -> Running {
    let script =
        format!("i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); sleep 0.01; done");
    cluster.tow(["exec", "--no-sync", "lines", "--", "sh", "-c", &script])
}

fn numbered(lines: u32) -> String {
    (0..lines).map(|number| format!("line {number}")).collect::<Vec<_>>().join("\n")
}

#[test]
fn kill_of_a_node_agent_whose_folder_was_removed_ends_its_vms() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let create = [&["create", "--no-sync", "--name", "orphan"][..], SHAPE].concat();
    cluster.tow(&create).finish(BOOT).ok();
    let vm = cluster.process(QEMU);
    let sandboxes = cluster.root().join("data/towline/node/sandboxes");
    std::fs::remove_dir_all(&sandboxes).unwrap();
    assert!(vm.alive(), "a VM outlives its folder");
    cluster.process(NODE_AGENT).kill();
    wait_for("the stray VM's end", SHORT, || (!vm.alive()).then_some(()));
    // Its disk went with the folder: it is not started with an empty one.
    wait_for("the sandbox's failure", SHORT, || {
        (cluster.inspect("orphan")["phase"] == "failed").then_some(())
    });
    let refused = cluster.tow(["start", "orphan"]).finish(BOOT).expect(1);
    assert!(refused.err().contains("its disk is not on this node any more"), "{}", refused.err());
    cluster.tow(["rm", "orphan"]).finish(BOOT).ok();
}

#[test]
fn a_timeout_stops_a_sandbox_and_says_so() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let create = [&["create", "--no-sync", "--name", "brief"][..], SHAPE].concat();
    cluster.tow(&create).finish(BOOT).ok();
    assert_eq!(cluster.tow(["ttl", "brief"]).finish(SHORT).ok().out(), "never");
    cluster.tow(["ttl", "brief", "2s"]).finish(SHORT).ok();
    wait_for("the timeout", SHORT, || {
        (cluster.inspect("brief")["phase"] == "stopped").then_some(())
    });
    assert_eq!(cluster.inspect("brief")["reason"], "timeout 2s");
    assert!(cluster.tow(["ls"]).finish(SHORT).ok().out().contains("stopped (timeout 2s)"));
    assert_eq!(cluster.tow(["ttl", "brief"]).finish(SHORT).ok().out(), "2s after its next start");
    cluster.tow(["ttl", "brief", "never"]).finish(SHORT).ok();
    cluster.tow(["start", "brief"]).finish(BOOT).ok();
    cluster.tow(["rm", "brief"]).finish(BOOT).ok();
}

#[test]
fn prune_removes_what_rests_and_says_what_that_freed() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    for name in ["rests", "runs"] {
        let create = [&["create", "--no-sync", "--name", name][..], SHAPE].concat();
        cluster.tow(&create).finish(BOOT).ok();
    }
    cluster.tow(["stop", "rests"]).finish(BOOT).ok();
    let refused = cluster.tow(["prune"]).finish(SHORT).expect(1);
    assert!(refused.err().contains("sandbox rests with its disk"), "{}", refused.err());
    assert!(refused.err().contains("tow prune --force"), "{}", refused.err());
    let done = cluster.json(["prune", "--sandboxes", "--force", "--json"]);
    let freed = |kind: &str| {
        let of = done.iter().find(|one| one["kind"] == kind);
        of.unwrap_or_else(|| panic!("{kind}: {done:?}"))["freed_bytes"].as_u64().unwrap()
    };
    assert!(freed("sandbox") > 0 && freed("total") >= freed("sandbox"), "{done:?}");
    let left = cluster.json(["ls", "--json"]);
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["name"], "runs");
    cluster.tow(["rm", "runs"]).finish(BOOT).ok();
}

#[test]
fn doctor_mends_what_died() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let supervisor = cluster.process(&["up --supervise"]);
    supervisor.kill();
    wait_for("the supervisor's end", SHORT, || (!supervisor.alive()).then_some(()));
    let folder = cluster.root().join("run/towline");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let done = cluster.tow(["doctor", "--fix", "--json"]).finish(BOOT);
    let lines = done.out();
    let fixed = |name: &str| {
        let mut lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.any(|line: serde_json::Value| {
            line["schema"] == "towline.fix/1" && line["name"] == name && line["fixed"] == true
        })
    };
    assert!(fixed("daemon") && fixed("cluster"), "{lines}\n{}", done.err());
    cluster.tow(["status"]).finish(SHORT).ok();
    let again = cluster.tow(["doctor", "--fix", "--json"]).finish(BOOT);
    assert!(!again.out().contains("towline.fix/1"), "{}", again.out());
}
