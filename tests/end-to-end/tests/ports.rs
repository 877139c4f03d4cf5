//! Servers in a sandbox from here: both loopbacks, many at once, through the death of the daemon and
//! of the node agent; the laptop's git identity and ssh agent; files by `tow cp`.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sha2::{Digest, Sha256};
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::http::{SERVER, get};
use towline_end_to_end::run::wait_for;
use towline_end_to_end::{Cluster, skipped};

fn port_of(object: &serde_json::Value) -> u16 {
    let port = object["ports"][0]["host_port"].as_u64().unwrap_or_else(|| panic!("{object}"));
    u16::try_from(port).unwrap()
}

#[test]
fn a_server_in_a_sandbox_answers_here_whatever_dies() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("web");
    let big: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(folder.join("big"), &big).unwrap();
    std::fs::write(folder.join("hello"), "hello").unwrap();
    let args = ["run", "-d", "--json", "-p", "8080", "--"];
    let started = cluster.tow_in(&folder, args.into_iter().chain(SERVER));
    let started = started.finish(BOOT).ok().out();
    let started: serde_json::Value = serde_json::from_str(&started).unwrap();
    let port = port_of(&started);
    let name = started["name"].as_str().unwrap().to_owned();

    // Both loopbacks, after `tow` returned.
    let v4 = format!("127.0.0.1:{port}");
    let hello = || get(&v4, "/hello").filter(|body| body == b"hello");
    wait_for("the server in the sandbox", BOOT, hello);
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        assert_eq!(get(&format!("[::1]:{port}"), "/hello").unwrap(), b"hello");
    }

    // Who listens is told.
    let ports = cluster.json(["ports", "--json", &name]);
    let ours = ports.iter().find(|port| port["port"] == 8080).unwrap();
    assert_eq!(ours["listening"][0]["process"], "python3", "{ours}");
    assert_eq!(ours["published"][0]["host_port"], port, "{ours}");

    // 500 at once.
    let requests: Vec<_> = (0..500)
        .map(|_| {
            let address = v4.clone();
            std::thread::spawn(move || get(&address, "/hello"))
        })
        .collect();
    let answered = requests.into_iter().filter_map(|request| request.join().unwrap());
    assert_eq!(answered.filter(|body| body == b"hello").count(), 500);

    // A slow transfer goes on when the node agent is killed in the middle of it.
    let mut stream = TcpStream::connect(&v4).unwrap();
    stream.set_read_timeout(Some(BOOT)).unwrap();
    write!(stream, "GET /big HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let mut piece = vec![0; 64 << 10];
    let mut kills = 0;
    loop {
        let len = stream.read(&mut piece).unwrap();
        if len == 0 {
            break;
        }
        answer.extend_from_slice(&piece[..len]);
        if kills < 2 && answer.len() > (kills + 1) * big.len() / 4 {
            kills += 1;
            cluster.process(&["towline-node-agent", "--config"]).kill();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let body = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(kills, 2);
    assert_eq!(Sha256::digest(&answer[body..]), Sha256::digest(&big));

    // The daemon is killed: the next `tow` that needs it brings the port back where it was.
    cluster.process(&["tow", "daemon"]).kill();
    wait_for("the port to be free", SHORT, || TcpStream::connect(&v4).is_err().then_some(()));
    let ports = cluster.json(["ports", "--json", &name]);
    assert_eq!(
        ports.iter().find(|p| p["port"] == 8080).unwrap()["published"][0]["host_port"],
        port
    );
    wait_for("the server again", SHORT, hello);

    // A stopped sandbox keeps its port; a removed one does not.
    cluster.tow(["stop", &name]).finish(BOOT).ok();
    let ports = cluster.json(["ports", "--json", &name]);
    assert_eq!(ports[0]["published"][0]["host_port"], port);
    cluster.tow(["rm", &name]).finish(BOOT).ok();
    wait_for("the port to be free", SHORT, || TcpStream::connect(&v4).is_err().then_some(()));
}

#[test]
fn a_taken_port_is_said_and_a_foreground_port_ends_with_its_command() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("web");
    std::fs::write(folder.join("hello"), "hello").unwrap();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().port();
    let spec = format!("{taken}:8080");
    let serve = ["run", "-p", &spec, "--"];
    let server = cluster.tow_in(&folder, serve.into_iter().chain(SERVER));
    let ports = || {
        let all = cluster.json(["ports", "--json"]);
        let port = all.first()?["published"][0]["host_port"].as_u64()?;
        u16::try_from(port).ok()
    };
    let port = wait_for("the port to be published", BOOT, ports);
    assert_ne!(port, taken);
    let address = format!("127.0.0.1:{port}");
    let hello = || get(&address, "/hello").filter(|body| body == b"hello");
    wait_for("the server in the sandbox", BOOT, hello);
    let pid = rustix::process::Pid::from_raw(server.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let done = server.finish(BOOT);
    let said = format!("port {taken} is in use on this machine");
    assert!(done.err().contains(&said), "{}", done.err());
    wait_for("the port to be free", SHORT, || TcpStream::connect(&address).is_err().then_some(()));
}

#[test]
fn git_identity_and_ssh_agent_come_along() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("commits");
    let git = |args: &[&str]| cluster.command("git", &folder).args(args).output();
    if git(&["init", "--quiet"]).is_err() {
        skipped!("`git` is not installed");
    }
    git(&["config", "user.name", "Ada \"of\" Here"]).unwrap();
    git(&["config", "user.email", "ada@example.org"]).unwrap();
    let script = "cd /tmp && git init -q r && cd r && git commit -q --allow-empty -m x && \
                  git log -1 --format='%an <%ae>'";
    let done = cluster.sh(&folder, script).ok();
    assert_eq!(done.out(), "Ada \"of\" Here <ada@example.org>");

    let forward = ["run", "--forward", "ssh-agent", "--", "ssh-add", "-l"];
    let refused = cluster.tow_in(&folder, forward).finish(BOOT).expect(125);
    assert!(refused.err().contains("SSH_AUTH_SOCK is not set"), "{}", refused.err());

    let socket = cluster.root().join("agent.sock");
    let agent = cluster.command("ssh-agent", &folder).arg("-D").arg("-a").arg(&socket).spawn();
    let Ok(mut agent) = agent else { skipped!("`ssh-agent` is not installed") };
    wait_for("the agent's socket", SHORT, || socket.exists().then_some(()));
    let key = cluster.root().join("key");
    let run = |command: &mut Command| {
        let output = command.env("SSH_AUTH_SOCK", &socket).output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
    };
    let mut keygen = cluster.command("ssh-keygen", &folder);
    run(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "key-of-the-laptop", "-f"]).arg(&key));
    run(cluster.command("ssh-add", &folder).arg("-q").arg(&key));
    let mut command = cluster.tow_command(&folder, forward);
    command.env("SSH_AUTH_SOCK", &socket);
    let listed = towline_end_to_end::Running::start(&mut command, None).finish(BOOT).ok();
    assert!(listed.out().contains("key-of-the-laptop"), "{}", listed.out());
    // Only that command had it.
    let without = cluster.sh(&folder, "echo \"[$SSH_AUTH_SOCK]\"; ls /run | grep -c ^towline-");
    assert_eq!(without.out(), "[]\n0");
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn files_are_copied_both_ways_as_docker_copies_them() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("copies");
    let name =
        cluster.tow_in(&folder, ["run", "-d", "--", "sleep", "1000"]).finish(BOOT).ok().out();
    let here = cluster.root().join("work");
    let copy = |from: &str, to: &str| cluster.tow_in(&here, ["cp", from, to]).finish(BOOT);
    std::fs::create_dir_all(here.join("tree/deep")).unwrap();
    let bytes: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(here.join("tree/deep/file"), &bytes).unwrap();
    std::os::unix::fs::symlink("deep/file", here.join("tree/link")).unwrap();

    copy("tree", &format!("{name}:/tmp/there")).ok();
    let owner = cluster.tow(["exec", &name, "--", "stat", "-c", "%U %a", "/tmp/there/deep/file"]);
    let owner = owner.finish(SHORT).ok().out();
    let me = cluster.tow(["exec", &name, "--", "id", "-un"]).finish(SHORT).ok().out();
    assert_eq!(owner, format!("{me} 644"));
    copy(&format!("{name}:/tmp/there"), "back").ok();
    assert_eq!(std::fs::read(here.join("back/deep/file")).unwrap(), bytes);
    assert_eq!(std::fs::read_link(here.join("back/link")).unwrap(), Path::new("deep/file"));
    let archive = copy(&format!("{name}:/tmp/there/deep"), "-").ok().stdout;
    let mut into = cluster.tow_command(&here, ["cp", "-", &format!("{name}:/tmp")]);
    towline_end_to_end::Running::start(&mut into, Some(archive)).finish(BOOT).ok();
    let same = ["exec", &name, "--", "cmp", "/tmp/deep/file", "/tmp/there/deep/file"];
    cluster.tow(same).finish(SHORT).ok();

    let absent = copy(&format!("{name}:/tmp/absent"), "x").expect(1);
    assert!(absent.err().contains("/tmp/absent"), "{}", absent.err());
    cluster.tow(["stop", &name]).finish(BOOT).ok();
    let stopped = copy(&format!("{name}:/tmp/there"), "y").expect(1);
    assert!(stopped.err().contains(&format!("tow start {name}")), "{}", stopped.err());
}
