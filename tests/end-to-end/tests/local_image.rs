//! `--image local`: the laptop's tools are there, its secrets are not, and a file that changes on
//! the laptop is never a mix.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::run::{Finished, wait_for};
use towline_end_to_end::{Cluster, skipped};

const MARK: &str = "planted-secret-do-not-leak";

/// Where people keep what must not leave: below the home.
const SECRETS: &[&str] = &[
    ".ssh/id_ed25519",
    ".ssh/config",
    ".aws/credentials",
    ".config/gcloud/application_default_credentials.json",
    ".azure/accessTokens.json",
    ".kube/config",
    ".docker/config.json",
    ".netrc",
    ".git-credentials",
    ".config/gh/hosts.yml",
    ".npmrc",
    ".pypirc",
    ".cargo/credentials.toml",
    ".cargo/credentials",
    ".gnupg/private-keys-v1.d/key.key",
    ".password-store/bank.gpg",
    ".mozilla/firefox/x.default/logins.json",
    ".config/google-chrome/Default/Login Data",
    ".local/share/keyrings/login.keyring",
    ".bash_history",
    ".vault-token",
    ".terraform.d/credentials.tfrc.json",
];

#[test]
fn secrets_stay_out_and_libraries_are_never_a_mix() {
    let cluster = match Cluster::prepare() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    plant(&cluster.home());
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let folder = cluster.folder("work");
    secrets(&cluster, &folder);
    replaced_library(&cluster, &folder);
    through_a_kill(&cluster, &folder);
}

fn plant(home: &Path) {
    for secret in SECRETS {
        let path = home.join(secret);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, MARK).unwrap();
        // Even where its owner was careless.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    // Links from a folder that is served into what is not.
    let tools = home.join(".cargo/bin");
    fs::create_dir_all(&tools).unwrap();
    fs::write(tools.join("tool"), "#!/bin/sh\necho tool-runs\n").unwrap();
    fs::set_permissions(tools.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink(home.join(".ssh/id_ed25519"), tools.join("absolute-link")).unwrap();
    symlink("../../.ssh/id_ed25519", tools.join("relative-link")).unwrap();
    symlink("/proc/self/root/etc/shadow", tools.join("proc-link")).unwrap();
    fs::write(tools.join("changing"), "old-content\n").unwrap();
    fs::write(tools.join("unread"), "old-content\n").unwrap();
}

fn secrets(cluster: &Cluster, folder: &Path) {
    let home = cluster.home();
    let home = home.to_str().unwrap();
    assert_eq!(cluster.sh(folder, "PATH=$HOME/.cargo/bin:$PATH tool").ok().out(), "tool-runs");
    let mut script = String::from("cd /\n");
    for secret in SECRETS {
        for form in [
            format!("{home}/{secret}"),
            format!("{home}/.cargo/bin/../../{secret}"),
            format!("/proc/self/root/{home}/{secret}"),
            format!("/proc/1/root/{home}/{secret}"),
        ] {
            script += &format!("cat '{form}' 2>/dev/null\n");
        }
    }
    for link in ["absolute-link", "relative-link", "proc-link"] {
        script += &format!("cat {home}/.cargo/bin/{link} 2>/dev/null\n");
    }
    // What only root can read, and what names a machine.
    for file in ["/etc/shadow", "/etc/gshadow", "/etc/sudoers"] {
        script +=
            &format!("cat {file} 2>/dev/null | sed 's/^/LEAK {}: /'\n", file.replace('/', "."));
    }
    script += "for f in /etc/ssh/ssh_host_*_key /etc/ssl/private/*; do cat \"$f\" 2>/dev/null | sed 's/^/LEAK key: /'; done\n";
    script += &format!("grep -r --exclude=unread '{MARK}' {home} 2>/dev/null\n");
    script += "echo looked\n";
    let name = cluster.json(["ls", "--json"])[0]["name"].as_str().unwrap().to_owned();
    for as_root in [false, true] {
        let shell = if as_root {
            cluster.tow(["exec", "--user", "root", &name, "--", "sh", "-c", &script])
        } else {
            cluster.tow(["exec", &name, "--", "sh", "-c", &script])
        };
        let shown = shell.finish(BOOT).ok().out();
        assert!(shown.ends_with("looked"), "{shown}");
        assert!(!shown.contains(MARK), "as root {as_root}: {shown}");
        assert!(!shown.contains("LEAK"), "as root {as_root}: {shown}");
    }
}

/// Replaced on the laptop: the old file or a clear error, never a mix.
fn replaced_library(cluster: &Cluster, folder: &Path) {
    let file = cluster.home().join(".cargo/bin/changing");
    let show = "cat $HOME/.cargo/bin/changing";
    assert_eq!(cluster.sh(folder, show).ok().out(), "old-content");
    let fresh = file.with_extension("new");
    fs::write(&fresh, "new-content-that-is-longer\n").unwrap();
    fs::rename(&fresh, &file).unwrap();
    // The guest may still have the old one in its page cache, or the node have it open.
    let again = cluster.sh(folder, &format!("{show} || {{ echo refused; exit 3; }}"));
    let shown = again.out();
    assert!(
        ["old-content", "refused"].contains(&shown.as_str()),
        "a mix, or the new content under the old name: {shown}\n{}",
        again.err()
    );
    told_if_refused(cluster, &again, "changing");
    // Nobody in the guest has read this one: there is nothing but the new one.
    fs::write(file.with_file_name("unread"), "rewritten in place\n").unwrap();
    let script = "cat $HOME/.cargo/bin/unread || { echo refused; exit 3; }";
    let again = cluster.sh(folder, script).expect(3);
    assert_eq!(again.out(), "refused", "{}", again.err());
    told_if_refused(cluster, &again, "unread");
    let other = file.with_file_name("tool");
    fs::write(&other, "#!/bin/sh\necho rewritten in place\n").unwrap();
    let again = cluster.sh(folder, "cat $HOME/.cargo/bin/tool || echo refused").ok();
    let old = "#!/bin/sh\necho tool-runs";
    assert!([old, "refused"].contains(&again.out().as_str()), "{}\n{}", again.out(), again.err());
    told_if_refused(cluster, &again, "tool");
}

/// Whoever meets a file that has changed is told which, and what to do: by `tow run` where the
/// news came before the command's end, and by `tow inspect` in any case.
fn told_if_refused(cluster: &Cluster, run: &Finished, file: &str) {
    if run.out() != "refused" {
        return;
    }
    let name = cluster.json(["ls", "--json"])[0]["name"].as_str().unwrap().to_owned();
    let tells = |text: &str| text.contains(&format!("/{file} changed")) && text.contains("--new");
    wait_for("the reason to name the changed file", SHORT, || {
        tells(cluster.inspect(&name)["reason"].as_str()?).then_some(())
    });
    let warnings = run.err().lines().filter(|line| line.starts_with("warning:")).count();
    assert!(warnings <= 1, "{}", run.err());
    assert!(warnings == 0 || tells(&run.err()), "{}", run.err());
}

/// A build reads the laptop's compiler while the node agent that serves it is killed.
fn through_a_kill(cluster: &Cluster, folder: &Path) {
    fs::write(folder.join("hello.c"), "#include <stdio.h>\nint main(void){puts(\"built\");}\n")
        .unwrap();
    if !towline_end_to_end::cluster::in_path("cc") {
        skipped!("no C compiler: make test installs one");
    }
    let script = "for i in 1 2 3 4 5; do cc -O1 -o hello hello.c || exit 1; done; ./hello";
    let build = cluster.tow_in(folder, ["run", "--", "sh", "-c", script]);
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        cluster.process(&["towline-node-agent", "--config"]).kill();
        wait_for("the node agent's restart", SHORT, || {
            cluster.find(&["towline-node-agent", "--config"])
        });
    }
    assert_eq!(build.finish(BOOT * 2).ok().out(), "built");
    assert!(folder.join("hello").exists(), "the artefact is back");
}
