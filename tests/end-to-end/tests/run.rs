//! What a command run by `tow run` looks like from outside: exit codes, streams, names, bytes.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::Command;

use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::{Cluster, Running, skipped};

#[test]
fn the_command_looks_as_if_it_ran_here() {
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let folder = cluster.folder("plain");
    exit_codes(&cluster, &folder);
    streams(&cluster, &folder);
    same_path_and_user_but_another_kernel(&cluster, &folder);
    bytes_that_are_not_text(&cluster, &folder);
    refusals(&cluster, &folder);
    two_at_once(&cluster, &folder);
}

fn exit_codes(cluster: &Cluster, folder: &std::path::Path) {
    cluster.sh(folder, "exit 7").expect(7);
    cluster.sh(folder, "kill -TERM $$").expect(143);
    let missing = cluster.tow_in(folder, ["run", "--", "no-such-command"]).finish(BOOT).expect(127);
    assert!(missing.err().contains("no-such-command"), "{}", missing.err());
    std::fs::write(folder.join("not-executable"), "text").unwrap();
    cluster.tow_in(folder, ["run", "--", "./not-executable"]).finish(BOOT).expect(126);
    cluster.tow_in(folder, ["run", "--no-such-flag"]).finish(SHORT).expect(2);
}

fn streams(cluster: &Cluster, folder: &std::path::Path) {
    let mut od = cluster.tow_command(folder, ["run", "--", "od", "-An", "-c"]);
    let shown = Running::start(&mut od, Some(b"a\0b".to_vec())).finish(BOOT).ok();
    assert_eq!(shown.out().split_whitespace().collect::<Vec<_>>(), ["a", "\\0", "b"]);

    let apart = cluster.sh(folder, "echo to-out; echo to-err >&2").ok();
    assert_eq!(apart.out(), "to-out");
    assert!(apart.err().contains("to-err") && !apart.err().contains("to-out"), "{}", apart.err());

    // Descriptors that are closed on the laptop.
    let script = format!(
        "{} run -- sh -c 'cat; echo end' <&-",
        towline_end_to_end::cluster::bin_dir().join("tow").display()
    );
    let mut closed = cluster.command("sh", folder);
    closed.args(["-c", &script]);
    assert_eq!(Running::start(&mut closed, None).finish(BOOT).ok().out(), "end");
    let script = format!(
        "{} run -- sh -c 'yes | head -c 10000000' | head -c 5",
        towline_end_to_end::cluster::bin_dir().join("tow").display()
    );
    let mut cut = cluster.command("sh", folder);
    cut.args(["-c", &script]);
    assert_eq!(Running::start(&mut cut, None).finish(BOOT).ok().stdout, b"y\ny\ny");
}

fn same_path_and_user_but_another_kernel(cluster: &Cluster, folder: &std::path::Path) {
    let shown = cluster.sh(folder, "pwd; id -un; uname -r; cat /proc/1/comm").ok().out();
    let lines: Vec<&str> = shown.lines().collect();
    let host = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output().unwrap().stdout;
        String::from_utf8(output).unwrap().trim().to_owned()
    };
    assert_eq!(lines[0], folder.canonicalize().unwrap().to_str().unwrap());
    assert_eq!(lines[1], host("id", "-un"));
    assert_ne!(lines[2], host("uname", "-r"));
    assert_ne!(lines[3], std::fs::read_to_string("/proc/1/comm").unwrap().trim());

    let name = cluster.json(["ls", "--json"])[0]["name"].as_str().unwrap().to_owned();
    let known = cluster.inspect(&name);
    assert_eq!(known["driver"], "qemu");
    assert!(known["isolation"].as_str().unwrap().starts_with("vm ("), "{known}");
    assert!(known["node"].as_str().unwrap().starts_with("node_"), "{known}");
    assert_eq!(known["image"], "local");
    assert_eq!(known["phase"], "running");
    assert!(known["shape"]["memory_mib"].as_u64().unwrap() > 0, "{known}");
}

fn bytes_that_are_not_text(cluster: &Cluster, folder: &std::path::Path) {
    let odd = std::ffi::OsString::from_vec(b"x\xff\xfey".to_vec());
    let mut echo = cluster.tow_command(folder, ["run", "--", "printf", "%s"]);
    echo.arg(&odd);
    assert_eq!(Running::start(&mut echo, None).finish(BOOT).ok().stdout, odd.as_bytes());

    let mut variable = std::ffi::OsString::from("ODD=");
    variable.push(&odd);
    let mut print = cluster.tow_command(folder, ["run", "-e"]);
    print.arg(&variable).args(["--", "printenv", "ODD"]);
    let shown = Running::start(&mut print, None).finish(BOOT).ok();
    assert_eq!(shown.stdout, [odd.as_bytes(), b"\n"].concat());

    std::fs::write(folder.join(&odd), "here").unwrap();
    let mut read = cluster.tow_command(folder, ["run", "--", "sh", "-c", "cat x*y; mv x*y z*y"]);
    read.args(["sh"]);
    let mut rename = cluster.tow_command(folder, ["run", "--", "mv", "--"]);
    rename.arg(&odd).arg("renamed");
    Running::start(&mut rename, None).finish(BOOT).ok();
    assert!(!folder.join(&odd).exists(), "the old name is gone here too");
    assert_eq!(std::fs::read_to_string(folder.join("renamed")).unwrap(), "here");
}

fn refusals(cluster: &Cluster, folder: &std::path::Path) {
    // A name that the cluster does not know is pulled: of a registry that is not there.
    let image = "127.0.0.1:1/no-such-image";
    let unknown = cluster.tow_in(folder, ["run", "--new", "--image", image, "--", "true"]);
    let unknown = unknown.finish(BOOT).expect(125);
    assert!(
        unknown.err().contains("could not reach the registry 127.0.0.1:1"),
        "{}",
        unknown.err()
    );

    let huge = cluster.tow_in(folder, ["run", "--new", "--memory", "4TiB", "--", "true"]);
    let huge = huge.finish(SHORT).expect(125);
    assert!(huge.err().contains("the largest has"), "{}", huge.err());

    let absent = cluster.tow(["exec", "nobody", "--", "true"]).finish(SHORT).expect(125);
    assert!(absent.err().contains("nobody"), "{}", absent.err());
}

fn two_at_once(cluster: &Cluster, folder: &std::path::Path) {
    let first = cluster.tow_in(folder, ["run", "--", "sh", "-c", "echo one > one; sleep 1"]);
    let second = cluster.tow_in(folder, ["run", "--", "sh", "-c", "echo two > two; sleep 1"]);
    first.finish(BOOT).ok();
    second.finish(BOOT).ok();
    assert_eq!(std::fs::read_to_string(folder.join("one")).unwrap(), "one\n");
    assert_eq!(std::fs::read_to_string(folder.join("two")).unwrap(), "two\n");
}
