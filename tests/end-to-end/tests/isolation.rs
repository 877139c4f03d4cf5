//! What `tow` shows of a sandbox, whichever its isolation: files, ports, what it reaches, stop, start,
//! and what dies. What a driver is asked on its own is in the node agent's conformance suite.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests: a panic is the failure, and which driver it was is said"
)]

use std::io::Read;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::http::{SERVER, get};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, Finished, skipped};

/// One isolation.
struct Kind {
    name: &'static str,
    own_kernel: bool,
}

/// What is in the command line of the process that is a sandbox, by driver.
const PROCESSES: [(&str, &str); 3] = [
    ("qemu", "qemu-system"),
    ("cloud-hypervisor", "cloud-hypervisor --api-socket"),
    ("process", "towline-process-sandbox"),
];

/// Waits until it is a copy.
const WAITS_FOR_FORK: &str = "
import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
libc.inotify_add_watch(fd, b'/run/towline/fork', 0x404)
open('/var/tmp/waiting', 'w').close()
os.read(fd, 4096)
open('/var/tmp/woke', 'w').write(open('/run/towline/fork').read())
";

/// What no two sandboxes may share, a line each.
const DRAWS: &str = "
cat /proc/sys/kernel/random/uuid
head -c 1048576 /dev/urandom | sha256sum
cat /etc/machine-id
echo name $(uname -n)
cat /etc/hostname
! type openssl > /dev/null || openssl genpkey -algorithm ed25519 | sed -n 2p
! type ssh-keygen > /dev/null || { rm -f /var/tmp/k*; ssh-keygen -q -t ed25519 -N '' -f /var/tmp/k; cut -d' ' -f2 /var/tmp/k.pub; }
";

#[test]
fn a_vm_is_what_a_sandbox_is() {
    is_a_sandbox(Kind { name: "vm", own_kernel: true });
}

#[test]
fn processes_are_what_a_sandbox_is() {
    if !rustix::process::geteuid().is_root() {
        skipped!("the `process` driver needs root");
    }
    is_a_sandbox(Kind { name: "process", own_kernel: false });
}

fn is_a_sandbox(kind: Kind) {
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster.allowing(kind.name),
        Err(why) => skipped!("{why}"),
    };
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let folder = cluster.folder(kind.name);
    std::fs::write(folder.join("hello"), "hello").unwrap();
    let memory = "1GiB";
    let mut sandbox = Sandbox { cluster: &cluster, kind, folder, memory, process: "" };
    sandbox.check_shown();
    sandbox.check_files();
    sandbox.check_ports();
    sandbox.check_egress();
    sandbox.check_node_agent_killed();
    sandbox.check_pause();
    sandbox.check_fork();
    sandbox.check_stop_and_start();
    sandbox.check_killed();
    sandbox.check_removed();
}

struct Sandbox<'c> {
    cluster: &'c Cluster,
    kind: Kind,
    folder: PathBuf,
    memory: &'static str,
    /// In the command line of the process that is the sandbox.
    process: &'static str,
}

impl Sandbox<'_> {
    fn run(&self, script: &str) -> Finished {
        // Small enough for two copies beside it on a small machine.
        let run = ["run", "--name", "it", "--isolation", self.kind.name, "--memory", self.memory];
        let command = ["--disk", "4GiB", "--", "sh", "-c", script];
        self.cluster.tow_in(&self.folder, run.into_iter().chain(command)).finish(BOOT)
    }

    fn inspect(&self) -> Value {
        self.cluster.inspect("it")
    }

    fn check_shown(&mut self) {
        let boot = "/proc/sys/kernel/random/boot_id";
        let done = self.run(&format!("pwd; cat {boot}; id -un; echo err >&2; exit 7")).expect(7);
        let out = done.out();
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(Path::new(lines[0]), self.folder.canonicalize().unwrap());
        let here = std::fs::read_to_string(boot).unwrap();
        assert_eq!(lines[1] != here.trim(), self.kind.own_kernel, "{out}");
        let shown = self.inspect();
        assert!(shown["isolation"].as_str().unwrap().starts_with(self.kind.name), "{shown}");
        let driver = shown["driver"].as_str().unwrap();
        println!("driver: {driver}");
        self.process = PROCESSES.iter().find(|(name, _)| *name == driver).unwrap().1;
        let all = self.cluster.tow(["ls"]).finish(SHORT).ok().out();
        assert!(all.contains(self.kind.name), "{all}");
        let other = if self.kind.own_kernel { "process" } else { "vm" };
        let run = ["run", "--name", "it", "--isolation", other, "--", "true"];
        let refused = self.cluster.tow_in(&self.folder, run).finish(SHORT);
        assert_eq!(refused.code, 125, "never the other one: {}", refused.err());
    }

    /// In before the command starts, back before the prompt returns.
    fn check_files(&self) {
        let at = |name: &str| self.folder.join(name);
        std::fs::create_dir(at("tree")).unwrap();
        std::fs::write(at("tree/from-here"), vec![7; 3_000_000]).unwrap();
        std::os::unix::fs::symlink("from-here", at("tree/link")).unwrap();
        let script = "cmp tree/from-here tree/link && stat -c %s tree/from-here && \
                      mkdir out && head -c 2000000 tree/from-here > out/from-there && \
                      ln -s from-there out/link && rm tree/link";
        assert_eq!(self.run(script).ok().out(), "3000000");
        assert_eq!(std::fs::read(at("out/from-there")).unwrap(), vec![7; 2_000_000]);
        assert_eq!(std::fs::read_link(at("out/link")).unwrap(), Path::new("from-there"));
        assert!(!at("tree/link").is_symlink(), "what is removed there is removed here");
    }

    fn check_ports(&self) {
        let serve = ["exec", "--no-sync", "-d", "it", "--"].into_iter().chain(SERVER);
        self.cluster.tow_in(&self.folder, serve).finish(SHORT).ok();
        let published = self.cluster.json(["ports", "--json", "it", "--publish", "8080"]);
        let port = published.iter().find_map(|port| port["published"][0]["host_port"].as_u64());
        let port = port.unwrap_or_else(|| panic!("{published:?}"));
        for host in ["127.0.0.1", "[::1]"] {
            if TcpListener::bind(format!("{host}:0")).is_err() {
                continue;
            }
            let address = format!("{host}:{port}");
            wait_for("the server in the sandbox", SHORT, || {
                get(&address, "/hello").filter(|body| body == b"hello")
            });
        }
    }

    /// The node's loopback hears nothing of it, and the rule is named.
    fn check_egress(&self) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(AtomicU64::new(0));
        let counts = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let read = stream.unwrap().read(&mut [0; 64]).unwrap_or(0);
                counts.fetch_add(1 + read as u64, Ordering::SeqCst);
            }
        });
        // The guest has a loopback of its own; `localhost` of the node is meant by other notations.
        let script = format!(
            "for to in 0.0.0.0 ::ffff:127.0.0.1 10.1.2.3 169.254.169.254; do \
             timeout 20 bash -c \"echo x > /dev/tcp/$to/{port}\" 2>&1 | tail -n 1; done"
        );
        let said = self.run(&script).out();
        assert_eq!(said.matches("refused").count(), 4, "{said}");
        assert_eq!(heard.load(Ordering::SeqCst), 0);
        let why = self.cluster.json(["why", "--json", "it"]).remove(0);
        let blocked = why["blocked"].as_array().unwrap();
        for (target, rule) in
            [("10.1.2.3", "private 10.0.0.0/8"), ("169.254.169.254", "metadata 169.254.169.254/32")]
        {
            let named = |one: &Value| one["target"] == target && one["rule"] == rule;
            assert!(blocked.iter().any(named), "{target}: {why}");
        }
    }

    /// What a running command has made.
    fn wait_for_file(&self, path: &str) {
        let look = ["exec", "--no-sync", "it", "--", "test", "-e", path];
        let there = || (self.cluster.tow(look).finish(SHORT).code == 0).then_some(());
        wait_for("a command to have begun", SHORT, there);
    }

    fn check_node_agent_killed(&self) {
        let count = "touch /var/tmp/counting; i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); sleep 0.02; done";
        let exec = ["exec", "--no-sync", "it", "--", "sh", "-c", count];
        let running = self.cluster.tow(exec);
        self.wait_for_file("/var/tmp/counting");
        self.cluster.process(&["towline-node-agent", "--config"]).kill();
        let done = running.finish(BOOT).ok();
        let wanted: Vec<_> = (0..200).map(|number| format!("line {number}")).collect();
        assert_eq!(done.out(), wanted.join("\n"));
    }

    /// All of it stands still and goes on where it was; whoever was let in before stays in.
    fn check_pause(&self) {
        let count = "touch /var/tmp/pausing; i=0; while [ $i -lt 100 ]; do echo line $i; \
                     i=$((i+1)); sleep 0.02; done";
        let exec = ["exec", "--no-sync", "it", "--", "sh", "-c", count];
        let running = self.cluster.tow(exec);
        self.wait_for_file("/var/tmp/pausing");
        self.cluster.tow(["pause", "it"]).finish(SHORT).ok();
        assert_eq!(self.inspect()["phase"], "paused");
        assert!(self.cluster.tow(["ls"]).finish(SHORT).ok().out().contains("paused"));
        let exec = ["exec", "--no-sync", "it", "--", "true"];
        let refused = self.cluster.tow(exec).finish(SHORT).expect(125);
        assert!(refused.err().contains("tow resume it"), "{}", refused.err());
        self.cluster.tow(["resume", "it"]).finish(SHORT).ok();
        let wanted: Vec<_> = (0..100).map(|number| format!("line {number}")).collect();
        assert_eq!(running.finish(BOOT).ok().out(), wanted.join("\n"));

        // A node agent that comes back finds it paused, and sees its clock right when it goes on.
        self.cluster.tow(["pause", "it"]).finish(SHORT).ok();
        self.cluster.process(&["towline-node-agent", "--config"]).kill();
        let is = |phase: &str| (self.inspect()["phase"] == phase).then_some(());
        wait_for("it to be found paused", SHORT, || is("paused"));
        self.cluster.tow(["resume", "it"]).finish(BOOT).ok();
        let seconds = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let before = seconds();
        let there: u64 = self.exec("it", "date +%s").parse().unwrap();
        assert!((before.saturating_sub(2)..=seconds() + 2).contains(&there), "{there} {before}");

        // What is paused can be stopped, and a run resumes it.
        self.cluster.tow(["pause", "it"]).finish(SHORT).ok();
        assert_eq!(self.run("echo resumed").ok().out(), "resumed");
    }

    fn exec(&self, name: &str, script: &str) -> String {
        let exec = ["exec", "--no-sync", name, "--", "sh", "-c", script];
        self.cluster.tow(exec).finish(BOOT).ok().out()
    }

    /// Copies go on where the original was, are others from their first instruction on, and share
    /// nothing with it afterwards.
    fn check_fork(&self) {
        if !self.kind.own_kernel {
            let refused = self.cluster.tow(["fork", "it"]).finish(SHORT);
            assert_ne!(refused.code, 0);
            assert!(refused.err().contains("cannot copy memory"), "{}", refused.err());
            return;
        }
        let tick = "i=0; while :; do i=$((i+1)); echo $i > /var/tmp/.t; mv /var/tmp/.t /var/tmp/tick; \
                    sleep 0.05; done";
        for argv in [["sh", "-c", tick], ["python3", "-c", WAITS_FOR_FORK]] {
            let exec = ["exec", "--no-sync", "-d", "it", "--"].into_iter().chain(argv);
            self.cluster.tow(exec.collect::<Vec<_>>()).finish(SHORT).ok();
        }
        self.wait_for_file("/var/tmp/tick");
        self.wait_for_file("/var/tmp/waiting");
        let before: u64 = self.exec("it", "cat /var/tmp/tick").parse().unwrap();
        let fork = ["fork", "it", "-n", "2", "--name", "copy"];
        let made = self.cluster.tow(fork).finish(BOOT).ok();
        assert_eq!(made.out(), "copy-1\ncopy-2");
        let all = ["it", "copy-1", "copy-2"];
        for name in all {
            wait_for("it to go on", SHORT, || {
                let now: u64 = self.exec(name, "cat /var/tmp/tick").parse().unwrap();
                (now > before).then_some(())
            });
        }
        let shown = self.cluster.inspect("copy-1");
        assert_eq!(
            (&shown["start"], &shown["forked_from"]),
            (&"fork".into(), &self.inspect()["id"])
        );
        // What it drew, and is called.
        let drawn = all.map(|name| self.exec(name, DRAWS));
        println!("{drawn:#?}");
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            for (a, b) in drawn[one].lines().zip(drawn[other].lines()) {
                assert_ne!(a, b, "{} and {} share it", all[one], all[other]);
            }
        }
        assert!(drawn[1].lines().count() >= 5 && drawn[1].contains("name copy-1"), "{}", drawn[1]);
        for name in ["copy-1", "copy-2"] {
            let told = self.exec(name, "cat /var/tmp/woke; cat /run/towline/fork");
            let lines: Vec<_> = told.lines().collect();
            let id = self.cluster.inspect(name)["id"].as_str().unwrap().to_owned();
            assert!(lines[0] == lines[1] && lines[0].ends_with(&id), "{told}");
        }
        assert_eq!(self.exec("it", "ls /var/tmp/woke 2>/dev/null; cat /run/towline/fork"), "");
        // Each has a disk and a way out of its own.
        self.exec("copy-1", "echo mine > /var/tmp/mine");
        assert!(self.exec("copy-2", "ls /var/tmp/mine 2>&1 || true").contains("No such"));
        let script = "bash -c 'echo x > /dev/tcp/10.1.2.3/80' 2>&1 | tail -n 1";
        assert!(self.exec("copy-1", script).contains("refused"));
        self.cluster.tow(["stop", "copy-1"]).finish(BOOT).ok();
        self.cluster.tow(["start", "copy-1"]).finish(BOOT).ok();
        assert_eq!(self.exec("copy-1", "cat /var/tmp/mine"), "mine");
        assert_ne!(self.cluster.inspect("copy-1")["start"], "fork", "only its first start is one");
        self.cluster.tow(["rm", "copy-1", "copy-2"]).finish(BOOT).ok();
        self.check_fork_killed();
        // Not this very shell.
        self.exec("it", "pkill -f 'mv /var/tmp/[.]t' || true");
    }

    /// Whenever the node agent dies while copies are made: the original goes on, and a copy runs or
    /// says why it does not.
    fn check_fork_killed(&self) {
        for (round, pause_ms) in [0, 150, 600, 1500].into_iter().enumerate() {
            let name = format!("late-{round}");
            let fork = self.cluster.tow(["fork", "it", "--name", name.as_str()]);
            std::thread::sleep(std::time::Duration::from_millis(pause_ms));
            self.cluster.process(&["towline-node-agent", "--config"]).kill();
            let done = fork.finish(BOOT);
            let phase = self.cluster.inspect(&name)["phase"].clone();
            println!("killed after {pause_ms} ms: {} {phase} {}", done.code, done.err());
            if done.code == 0 {
                assert_eq!(self.exec(&name, "cat /etc/hostname"), name);
            } else {
                assert_eq!(phase, "failed", "{}", done.err());
            }
            let before: u64 = self.exec("it", "cat /var/tmp/tick").parse().unwrap();
            wait_for("the original to go on", SHORT, || {
                let now: u64 = self.exec("it", "cat /var/tmp/tick").parse().unwrap();
                (now > before).then_some(())
            });
            self.cluster.tow(["rm", name.as_str()]).finish(BOOT).ok();
        }
    }

    fn check_stop_and_start(&mut self) {
        self.run("echo kept > /var/tmp/kept").ok();
        let process = self.cluster.process(&[self.process]);
        self.cluster.tow(["stop", "it"]).finish(BOOT).ok();
        wait_for("its end", SHORT, || (!process.alive()).then_some(()));
        assert_eq!(self.inspect()["phase"], "stopped");
        let resize = ["resize", "it", "--cpus", "1", "--memory", "768m"];
        self.cluster.tow(resize).finish(SHORT).ok();
        self.cluster.tow(["start", "it"]).finish(BOOT).ok();
        let other = self.run("true").expect(125);
        assert!(other.err().contains("memory (MiB) 768, not 1024"), "{}", other.err());
        self.memory = "768m";
        let sizes = "cat /var/tmp/kept; grep -c ^processor /proc/cpuinfo; \
                     sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let said = self.run(sizes).ok().out();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[0], "kept");
        if self.kind.own_kernel {
            assert_eq!(lines[1], "1", "{said}");
            let kib: u64 = lines[2].parse().unwrap();
            assert!(kib < 768 << 10 && kib > 600 << 10, "{said}");
        }
        let running = self.cluster.tow(["resize", "it", "--cpus", "2"]).finish(SHORT).expect(1);
        assert!(running.err().contains("`tow stop it`"), "{}", running.err());
    }

    fn check_killed(&self) {
        let exec = ["exec", "--no-sync", "it", "--", "sh", "-c", "touch /var/tmp/on; sleep 1000"];
        let running = self.cluster.tow(exec);
        self.wait_for_file("/var/tmp/on");
        self.cluster.process(&[self.process]).kill();
        let done = running.finish(SHORT).expect(125);
        for said in ["sandbox it is stopped", "tow start it"] {
            assert!(done.err().contains(said), "{said} is not in: {}", done.err());
        }
        self.cluster.tow(["start", "it"]).finish(BOOT).ok();
        assert_eq!(self.run("cat /var/tmp/kept").ok().out(), "kept");
    }

    fn check_removed(&self) {
        self.cluster.tow(["rm", "it"]).finish(BOOT).ok();
        let gone = || self.cluster.find(&[self.process]).is_none();
        wait_for("its end", SHORT, || gone().then_some(()));
        let root = self.cluster.root().display().to_string();
        wait_for("its mounts' end", SHORT, || {
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            (!mounts.contains(&format!("{root}/data/towline/node/sandboxes"))).then_some(())
        });
    }
}
