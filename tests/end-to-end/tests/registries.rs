//! Images from a real registry and from archives, to a program that runs in a microVM.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::oci::{File, layer, layout};
use towline_end_to_end::registry::Registry;
use towline_end_to_end::run::{Running, wait_for};
use towline_end_to_end::{Cluster, skipped};

/// An image whose every setting shows in what it prints, with a layer of noise.
fn image(folder: &Path, busybox: &[u8]) -> PathBuf {
    let program = |path| File { path, mode: 0o755, content: busybox };
    let text = |path, content| File { path, mode: 0o644, content };
    let lower = layer(&[
        program("bin/sh"),
        program("bin/id"),
        program("bin/pwd"),
        program("bin/cat"),
        text("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1234:1234::/srv:/bin/sh\n"),
        text("etc/group", b"root:x:0:\napp:x:1234:\n"),
        text("srv/deleted", b"deleted"),
    ]);
    let mut noise = 1u32;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.to_be_bytes()[0]
    })
    .take(3 << 20)
    .collect();
    let upper = layer(&[
        text("srv/.wh.deleted", b""),
        text("srv/kept", b"kept"),
        text("srv/noise", &content),
    ]);
    let config = json!({
        "Env": ["PATH=/bin", "GREETING=hello"], "User": "app", "WorkingDir": "/srv",
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $GREETING; pwd; id -un; echo *; cat kept"],
    });
    let path = folder.join("layout");
    layout(&path, &[lower, upper], &config);
    path
}

const PRINTED: &str = "hello\n/srv\napp\nkept noise\nkept";

#[test]
fn an_image_comes_from_a_registry_whatever_happens_to_it() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare().map(Cluster::with_own_images) {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let mut registry = match Registry::start(&cluster.root().join("registry"), false) {
        Ok(registry) => registry,
        Err(why) => skipped!("{why}"),
    };
    let layout = image(cluster.root(), &busybox);
    registry.push(&layout, "x");
    let name = format!("{}/x", registry.address());
    let run = || cluster.tow(["run", "--rm", "--no-sync", "--image", &name]).finish(BOOT);
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();

    // It lies about a digest.
    let blob = registry.blob(registry.layers("x").last().unwrap());
    let honest = fs::read(&blob).unwrap();
    let mut wrong = honest.clone();
    wrong[1 << 20] ^= 1;
    fs::write(&blob, &wrong).unwrap();
    let failed = run().expect(125);
    assert!(failed.err().contains("does not have the content that its digest"), "{}", failed.err());

    // It dies in the middle: what came is on disk, and the next pull goes on from there.
    fs::write(&blob, &honest[..2 << 20]).unwrap();
    let failed = run().expect(125);
    assert!(failed.err().contains("of layer 2 of 2 after"), "{}", failed.err());
    registry.stop();
    let failed = run().expect(125);
    assert!(failed.err().contains("could not reach the registry"), "{}", failed.err());
    assert!(cluster.json(["image", "ls", "--json"]).is_empty(), "no half image has a name");
    let partial = fs::read_dir(cluster.cache().join("images/partial")).unwrap();
    let kept: u64 = partial.flatten().map(|entry| entry.metadata().unwrap().len()).sum();
    assert_eq!(kept, 2 << 20, "what came is kept");
    fs::write(&blob, &honest).unwrap();
    registry.start_again();
    assert_eq!(run().ok().out(), PRINTED);
    let partial = fs::read_dir(cluster.cache().join("images/partial")).unwrap();
    assert_eq!(partial.count(), 0, "nothing is left behind");

    // The name is the cluster's now: no registry is needed any more, another name neither.
    registry.stop();
    let images = cluster.json(["image", "ls", "--json"]);
    assert_eq!(images[0]["name"], json!(name));
    cluster.tow(["image", "tag", &name, "mine:1"]).finish(SHORT).ok();
    let shown =
        cluster.tow(["run", "--rm", "--no-sync", "--image", "mine:1"]).finish(BOOT).ok().out();
    assert_eq!(shown, PRINTED);
}

#[test]
fn a_registry_with_logins_and_archives_of_docker() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::prepare().map(Cluster::with_own_images) {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let registry = match Registry::start(&cluster.root().join("registry"), true) {
        Ok(registry) => registry,
        Err(why) => skipped!("{why}"),
    };
    let layout = image(cluster.root(), &busybox);
    registry.push(&layout, "x");
    let name = format!("{}/x", registry.address());
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let pull = || cluster.tow(["image", "pull", "--json", &name]).finish(SHORT);

    let failed = pull().expect(1);
    let hint = format!("`docker login {}`", registry.address());
    assert!(failed.err().contains("wants a login") && failed.err().contains(&hint));
    let docker = cluster.home().join(".docker");
    fs::create_dir_all(&docker).unwrap();
    let config = docker.join("config.json");
    // alice:wrong, then a helper that knows better.
    let auths = json!({"auths": {registry.address(): {"auth": "YWxpY2U6d3Jvbmc="}}});
    fs::write(&config, auths.to_string()).unwrap();
    let failed = pull().expect(1);
    assert!(failed.err().contains("does not accept the credentials"), "{}", failed.err());
    let helpers = cluster.root().join("helpers");
    fs::create_dir_all(&helpers).unwrap();
    let helper = helpers.join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\nread -r server || [ -n \"$server\" ]\n[ \"$1 $server\" = \"get {}\" ] || exit 1\n\
         echo '{{\"Username\":\"alice\",\"Secret\":\"s3cret\"}}'\n",
        registry.address()
    );
    fs::write(&helper, script).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&helper, executable).unwrap();
    let stores = json!({"credHelpers": {registry.address(): "test"}});
    fs::write(&config, stores.to_string()).unwrap();
    let mut command =
        cluster.tow_command(&cluster.root().join("work"), ["image", "pull", "--json"]);
    let path = std::env::var("PATH").unwrap();
    command.arg(&name).env("PATH", format!("{}:{path}", helpers.display()));
    let pulled = Running::start(&mut command, None).finish(SHORT).ok();
    let pulled: serde_json::Value = serde_json::from_str(&pulled.out()).unwrap();
    assert_eq!(pulled["name"], json!(name));
    let logs = cluster.logs();
    assert!(!logs.contains("s3cret") && !logs.contains("YWxpY2U6"), "no log knows a password");

    // The same image as `docker save` writes it, by skopeo's own hand.
    let archive = cluster.root().join("saved.tar");
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--insecure-policy"]);
    command.arg(format!("oci:{}", layout.display()));
    command.arg(format!("docker-archive:{}:saved:1", archive.display()));
    Running::start(&mut command, None).finish(SHORT).ok();
    cluster.tow(["image", "import", archive.to_str().unwrap(), "saved:1"]).finish(SHORT).ok();
    let shown =
        cluster.tow(["run", "--rm", "--no-sync", "--image", "saved:1"]).finish(BOOT).ok().out();
    assert_eq!(shown, PRINTED);
}

#[test]
fn an_image_goes_out_to_a_registry_and_to_files() {
    let cluster = match Cluster::prepare().map(Cluster::with_own_images) {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let registry = match Registry::start(&cluster.root().join("registry"), true) {
        Ok(registry) => registry,
        Err(why) => skipped!("{why}"),
    };
    let layout = image(cluster.root(), b"no program");
    cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    let import = |path: &Path, name: &str| {
        cluster.tow(["image", "import", path.to_str().unwrap(), name]).finish(SHORT).ok().out()
    };
    let digest = import(&layout, "app:1");
    let target = format!("{}/team/app:1", registry.address());
    let push = |name: &str, target: &str| {
        cluster.tow(["image", "push", "--json", name, target]).finish(SHORT)
    };
    let failed = push("app:1", &target).expect(1);
    let hint = format!("`docker login {}`", registry.address());
    assert!(failed.err().contains("wants a login to write to team/app"), "{}", failed.err());
    assert!(failed.err().contains(&hint), "{}", failed.err());
    log_in(&cluster, &registry);
    let told = |finished: towline_end_to_end::Finished| {
        serde_json::from_str::<serde_json::Value>(&finished.ok().out()).unwrap()
    };
    let pushed = told(push("app:1", &target));
    assert_eq!((&pushed["blobs_sent"], &pushed["digest"]), (&json!(3), &json!(digest)));
    assert_eq!(registry.layers_of("team/app", "1").len(), 2);
    let again = told(push("app:1", &target));
    assert_eq!((&again["blobs_sent"], &again["bytes_sent"]), (&json!(0), &json!(0)));
    // Under its own name by now: the registry has its layers in the other repository.
    let other = format!("{}/other/app:2", registry.address());
    for name in [&target, &other] {
        cluster.tow(["image", "tag", "app:1", name]).finish(SHORT).ok();
    }
    let mounted = told(cluster.tow(["image", "push", "--json", &other]).finish(SHORT));
    assert_eq!((&mounted["blobs_sent"], &mounted["blobs_mounted"]), (&json!(0), &json!(3)));
    assert!(!cluster.logs().contains("s3cret"), "no log knows a password");

    let export = |to: &str| cluster.tow(["image", "export", "app:1", to]).finish(SHORT);
    let at = |name: &str| cluster.root().join(name);
    let (archive, folder) = (at("out.tar"), at("out"));
    assert_eq!(export(archive.to_str().unwrap()).ok().out(), digest);
    assert_eq!(export(folder.to_str().unwrap()).ok().out(), digest);
    assert!(export("-").ok().stdout == fs::read(&archive).unwrap(), "the same bytes");
    assert_eq!(import(&archive, "again:1"), digest);
    assert_eq!(import(&folder, "again:2"), digest);
    let failed = export(folder.to_str().unwrap()).expect(1);
    assert!(failed.err().contains("is not empty"), "{}", failed.err());
    let failed = cluster.tow(["image", "export", "nope", "x.tar"]).finish(SHORT).expect(1);
    assert!(failed.err().contains("there is no image `nope`"), "{}", failed.err());

    // A blob that its disk has damaged leaves nothing behind.
    let blobs = fs::read_dir(cluster.cache().join("images/blobs/sha256")).unwrap();
    let blobs = blobs.map(|entry| entry.unwrap().path());
    let largest = blobs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    bytes[1 << 20] ^= 1;
    fs::write(&largest, bytes).unwrap();
    for to in ["bad.tar", "bad"] {
        let failed = export(at(to).to_str().unwrap()).expect(1);
        assert!(failed.err().contains("is damaged on this node"), "{}", failed.err());
        assert!(!at(to).exists(), "{to}");
    }
    let failed = export("-").expect(1);
    assert!(failed.stdout.len() > 1 << 20, "what was read until then went out");
    let left = fs::read_dir(cluster.root()).unwrap().flatten();
    assert!(left.into_iter().all(|e| !e.file_name().to_string_lossy().starts_with(".tow-export")));
}

/// What `docker login` writes.
fn log_in(cluster: &Cluster, registry: &Registry) {
    let docker = cluster.home().join(".docker");
    fs::create_dir_all(&docker).unwrap();
    // alice:s3cret
    let auths = json!({"auths": {registry.address(): {"auth": "YWxpY2U6czNjcmV0"}}});
    fs::write(docker.join("config.json"), auths.to_string()).unwrap();
}

/// Two clusters that share nothing but a registry, without logins and with them.
#[test]
fn what_is_saved_here_starts_elsewhere_and_only_what_is_new_is_sent() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let [here, elsewhere] = match [Cluster::prepare(), Cluster::prepare()] {
        [Ok(here), Ok(elsewhere)] => [here, elsewhere].map(Cluster::with_own_images),
        [Err(why), _] | [_, Err(why)] => skipped!("{why}"),
    };
    for cluster in [&here, &elsewhere] {
        cluster.tow(["up", "--detach"]).finish(BOOT).ok();
    }
    let layout = image(here.root(), &busybox);
    here.tow(["image", "import", layout.to_str().unwrap(), "base:1"]).finish(SHORT).ok();
    here.tow(["create", "--image", "base:1", "--no-sync", "--name", "it"]).finish(BOOT).ok();
    let append = |text: &str| {
        let script = format!("echo {text} >> /srv/kept");
        let exec = ["exec", "-u", "root", "it", "--", &script];
        here.tow(exec).finish(SHORT).ok();
    };
    for login in [false, true] {
        let folder = here.root().join(format!("registry-{login}"));
        let registry = match Registry::start(&folder, login) {
            Ok(registry) => registry,
            Err(why) => skipped!("{why}"),
        };
        if login {
            for cluster in [&here, &elsewhere] {
                log_in(cluster, &registry);
            }
        }
        let mut sent = 0;
        for tag in ["1", "2"] {
            append(&format!("{tag}-{login}"));
            let name = format!("{}/team/app:{tag}", registry.address());
            let digest = here.tow(["save", "--push", "it", &name]).finish(SHORT).ok().out();
            let copy = here.root().join(format!("copy-{login}-{tag}"));
            assert_eq!(registry.pull("team/app", tag, &copy), digest);
            let manifest = registry.manifest("team/app", tag);

            let manifest_at = format!("/v2/team/app/manifests/{tag}");
            let taken = wait_for("the registry's log", SHORT, || {
                let taken = registry.taken().split_off(sent);
                taken.contains(&manifest_at).then_some(taken)
            });
            sent += taken.len();
            let of = |blob: &serde_json::Value| blob["digest"].as_str().unwrap().to_owned();
            let layers = manifest["layers"].as_array().unwrap();
            assert_eq!(layers.len(), 3);
            // The layers of the base only once.
            let new = layers.iter().skip(if tag == "1" { 0 } else { 2 }).map(of);
            let new: Vec<_> = new.chain([of(&manifest["config"])]).collect();
            let mut expected = vec!["begun".to_owned(); new.len()];
            expected.extend(new);
            expected.push(manifest_at);
            same(taken, expected);

            let run = ["run", "--rm", "--no-sync", "--image", &name, "--", "cat kept"];
            let shown = elsewhere.tow(run).finish(BOOT).ok().out();
            assert!(shown.ends_with(&format!("{tag}-{login}")), "{shown}");
        }
    }
}

fn same(mut one: Vec<String>, mut other: Vec<String>) {
    one.sort();
    other.sort();
    assert_eq!(one, other);
}
