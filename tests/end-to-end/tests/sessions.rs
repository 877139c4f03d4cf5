//! What outlives what: detached commands, terminals, killed processes.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::terminal::Terminal;
use towline_end_to_end::{Cluster, skipped};

#[test]
fn a_detached_command_is_reached_from_anywhere() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("detached");
    let script = "echo started; trap 'echo got-it' USR1; while :; do sleep 1; done";
    let name =
        cluster.tow_in(&folder, ["run", "-d", "--", "sh", "-c", script]).finish(BOOT).ok().out();
    assert_eq!(cluster.inspect(&name)["phase"], "running");
    assert_eq!(exec(&cluster, &name, "echo hello"), "hello");
    wait_for("the log's first line", SHORT, || {
        (cluster.tow(["logs", &name]).finish(SHORT).ok().out() == "started").then_some(())
    });

    // `attach` from another process, after the daemon was killed.
    cluster.process(&["tow", "daemon"]).kill();
    assert_eq!(exec(&cluster, &name, "echo again"), "again");
    let attached = cluster.tow(["attach", &name]);
    exec(&cluster, &name, "pkill -USR1 -o -f got-it");
    wait_for("the trap's line", SHORT, || {
        cluster.tow(["logs", &name]).finish(SHORT).ok().out().contains("got-it").then_some(())
    });
    assert_eq!(cluster.inspect(&name)["phase"], "running");

    cluster.tow(["stop", &name]).finish(BOOT).ok();
    assert_eq!(cluster.inspect(&name)["phase"], "stopped");
    // Whoever was attached is told, and does not hang.
    let told = attached.finish(SHORT);
    assert!(told.out().contains("got-it"), "{}", told.out());
    let refused = cluster.tow(["exec", &name, "--", "true"]).finish(SHORT).expect(125);
    assert!(refused.err().contains("tow start"), "{}", refused.err());

    cluster.tow(["start", &name]).finish(BOOT).ok();
    assert_eq!(exec(&cluster, &name, "echo back"), "back");
    cluster.tow(["rm", &name]).finish(BOOT).ok();
    let left: Vec<Value> = cluster.json(["ls", "--json"]);
    assert!(left.is_empty(), "{left:?}");
    wait_for("QEMU's end", SHORT, || cluster.find(&["qemu-system"]).is_none().then_some(()));
}

fn exec(cluster: &Cluster, name: &str, script: &str) -> String {
    cluster.tow(["exec", name, "--", "sh", "-c", script]).finish(SHORT).ok().out()
}

#[test]
fn a_terminal_is_the_commands_own() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    if !towline_end_to_end::cluster::in_path("tmux") {
        skipped!("tmux is not installed: make test installs it");
    }
    let folder = cluster.folder("terminal");
    // Boots it, so that what follows waits for no boot.
    cluster.sh(&folder, "true").ok();
    let tow = towline_end_to_end::cluster::bin_dir().join("tow");
    let tow = tow.to_str().unwrap();
    let terminal = Terminal::start(&cluster.tow_command(&folder, ["x"]), &folder, 100, 30);
    // Type only at the prompt: what is typed while a command ends is still the command's.
    terminal.line(&format!("{tow} run -t -- stty size; echo left-1"));
    terminal.wait("30 100", SHORT);
    terminal.wait("\nleft-1", SHORT);
    resize(&terminal, tow);
    ctrl_c(&terminal, tow);
    detach(&terminal, tow, &cluster, &folder);
}

fn resize(terminal: &Terminal, tow: &str) {
    terminal.line(&format!(
        "{tow} run -t -- sh -c 'trap \"stty size\" WINCH; echo wait-ing; while :; do sleep 0.2; done'; echo left-2"
    ));
    terminal.wait("\nwait-ing", SHORT);
    terminal.resize(91, 27);
    terminal.wait("27 91", SHORT);
    terminal.key("C-c");
    terminal.wait("\nleft-2", SHORT);
}

fn ctrl_c(terminal: &Terminal, tow: &str) {
    terminal.line(&format!("{tow} run -- sleep 100; echo code=$?"));
    std::thread::sleep(Duration::from_secs(3));
    terminal.key("C-c");
    terminal.wait("code=130", SHORT);
}

fn detach(terminal: &Terminal, tow: &str, cluster: &Cluster, folder: &Path) {
    terminal.line(&format!("{tow} run -t -- sh -c 'echo on-air; sleep 2; echo done > left'; echo"));
    terminal.wait("\non-air", SHORT);
    terminal.key("C-p");
    terminal.key("C-q");
    // The command goes on without anybody, and the next barrier brings what it made.
    wait_for("what the detached command made", BOOT, || {
        cluster.sh(folder, "true").ok();
        folder.join("left").exists().then_some(())
    });
}

#[test]
fn whatever_is_killed_somebody_says_so() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("killed");
    let name =
        cluster.tow_in(&folder, ["run", "-d", "--", "sleep", "1000"]).finish(BOOT).ok().out();

    // The node agent: an exec goes on through its death.
    let through = cluster.tow(["exec", &name, "--", "sh", "-c", "echo a; sleep 4; echo b; exit 5"]);
    std::thread::sleep(Duration::from_secs(1));
    cluster.process(&["towline-node-agent", "--config"]).kill();
    assert_eq!(through.finish(BOOT).expect(5).out(), "a\nb");

    // The control plane: running commands do not notice.
    let through = cluster.tow(["exec", &name, "--", "sh", "-c", "sleep 3; echo still"]);
    std::thread::sleep(Duration::from_millis(500));
    cluster.process(&["towline-control-plane", "--config"]).kill();
    assert_eq!(through.finish(BOOT).ok().out(), "still");
    assert_eq!(exec(&cluster, &name, "echo after"), "after");

    // `tow` itself: the command goes on.
    let gone = cluster.tow(["exec", &name, "--", "sh", "-c", "sleep 2; echo made > /tmp/made"]);
    std::thread::sleep(Duration::from_millis(1500));
    let pid = gone.pid();
    let process = cluster.processes().into_iter().find(|p| p.pid == pid).expect("tow runs");
    process.kill();
    gone.finish(SHORT).expect(137);
    wait_for("what the abandoned command made", SHORT, || {
        let shown = cluster.tow(["exec", &name, "--", "cat", "/tmp/made"]).finish(SHORT);
        (shown.out() == "made").then_some(())
    });

    // The supervisor: the next `tow` replaces it, and sandboxes live on.
    cluster.process(&["tow up"]).kill();
    assert_eq!(exec(&cluster, &name, "echo replaced"), "replaced");

    // QEMU: `tow` says so, and what to type next.
    let cut = cluster.tow(["exec", &name, "--", "sleep", "1000"]);
    std::thread::sleep(Duration::from_secs(1));
    cluster.process(&["qemu-system"]).kill();
    let told = cut.finish(SHORT).expect(125);
    assert!(told.err().contains("hint:"), "{}", told.err());
    wait_for("the sandbox to be called stopped", SHORT, || {
        (cluster.inspect(&name)["phase"] == "stopped").then_some(())
    });
    let reason = cluster.inspect(&name)["reason"].to_string();
    assert!(reason.contains("QEMU"), "{reason}");
    assert_eq!(cluster.sh(&folder, "echo up again").ok().out(), "up again");
}
