//! The local image against a fake machine with planted secrets, asked as a guest's kernel would,
//! and as an attacker's guest agent would.
#![expect(clippy::unwrap_used, reason = "a test that fails, fails here")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use towline_images::local::{self, Manifest, Server};

/// Stands in every planted secret's content, and in nothing else.
const SECRET: &str = "PLANTED-SECRET-b7f1";

/// Secrets by habit, with the permissions that careless people give them: every user may read
/// them, so that only the lists keep them out.
const PLANTED: &[&str] = &[
    "etc/shadow",
    "etc/gshadow-",
    "etc/sudoers.d/admin",
    "etc/ssh/ssh_host_ed25519_key",
    "etc/ssl/private/server.pem",
    "etc/NetworkManager/system-connections/home.nmconnection",
    "etc/wireguard/wg0.conf",
    "etc/krb5.keytab",
    "etc/machine-id",
    "etc/apt/auth.conf.d/private.conf",
    "etc/docker/key.json",
    "home/u/.ssh/id_ed25519",
    "home/u/.aws/credentials",
    "home/u/.config/gcloud/application_default_credentials.json",
    "home/u/.azure/msal_token_cache.json",
    "home/u/.kube/config",
    "home/u/.docker/config.json",
    "home/u/.netrc",
    "home/u/.git-credentials",
    "home/u/.npmrc",
    "home/u/.pypirc",
    "home/u/.cargo/credentials.toml",
    "home/u/.cargo/credentials",
    "home/u/.gnupg/private-keys-v1.d/k.key",
    "home/u/.password-store/mail.gpg",
    "home/u/.mozilla/firefox/p.default/logins.json",
    "home/u/.local/share/keyrings/login.keyring",
    "home/u/.local/share/uv/credentials/credentials.toml",
    "home/u/.bash_history",
    "home/u/passwords.kdbx",
    "home/u/.vault-token",
    "home/u/.m2/settings.xml",
    "home/u/documents/tax.txt",
    "home/v/.cargo/bin/of-somebody-else",
    "root/.ssh/id_rsa",
    "srv/backup/dump.sql",
    "var/lib/mysql/users.ibd",
    "run/secrets/token",
    // Inside of folders that are served.
    "usr/local/share/deploy/id_rsa",
    "usr/local/share/deploy/.env",
    "usr/local/share/deploy/.aws/credentials",
    "opt/app/.netrc",
    "opt/app/service_account.json",
    "home/u/.local/bin/.bash_history",
    "home/u/.pyenv/.git/config",
    "home/u/go/.npmrc",
    "home/u/.rustup/.config/gh/hosts.yml",
];

/// Secrets told by content: their names say nothing.
const PLANTED_CONTENT: &[(&str, &str)] = &[
    ("etc/app/server.conf", "-----BEGIN PRIVATE KEY-----"),
    ("etc/apt/sources.list.d/x.list", "deb https://user:pass@deb.example/ x main"),
    ("etc/environment", "https_proxy=http://user:pass@proxy.example:3128"),
    ("home/u/.cargo/config.toml", "[registries.x]\ntoken = \"t\""),
    ("home/u/.cargo/git/db/x/config", "url = https://token@git.example/x"),
];

/// What a build needs.
const NEEDED: &[&str] = &[
    "usr/bin/gcc",
    "usr/lib/libc.so",
    "usr/include/linux/id_map.h",
    "usr/share/keyrings/debian.gpg",
    "etc/passwd",
    "etc/ssl/certs/ca-certificates.crt",
    "var/lib/dpkg/status",
    "home/u/.cargo/bin/cargo",
    "home/u/.cargo/registry/src/x/credentials.rs",
    "home/u/.rustup/toolchains/stable/bin/rustc",
    "home/u/go/pkg/mod/sdk/credentials/provider.go",
];

struct Machine {
    folder: tempfile::TempDir,
    cache: tempfile::TempDir,
}

impl Machine {
    fn new() -> Machine {
        let machine =
            Machine { folder: tempfile::tempdir().unwrap(), cache: tempfile::tempdir().unwrap() };
        for path in NEEDED {
            machine.write(path, format!("content of {path}").as_bytes());
        }
        let people = "root:x:0:0::/root:/bin/sh\nu:x:1000:1000::/home/u:/bin/sh\n";
        machine.write("etc/passwd", people.as_bytes());
        symlink("usr/bin", machine.path("bin")).unwrap();
        machine
    }

    fn with_secrets() -> Machine {
        let machine = Machine::new();
        for path in PLANTED {
            machine.write(path, SECRET.as_bytes());
        }
        for (path, content) in PLANTED_CONTENT {
            machine.write(path, format!("{content}\n# {SECRET}").as_bytes());
        }
        machine
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.folder.path().join(path)
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.path(path);
        let folders: Vec<_> =
            path.ancestors().skip(1).take_while(|p| *p != self.folder.path()).collect();
        for folder in folders.iter().rev() {
            if !folder.exists() {
                fs::create_dir(folder).unwrap();
                fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn serve(&self) -> Guest {
        let home = Path::new("/home/u");
        let built = local::build(self.cache.path(), self.folder.path(), home, &mut |_| {}).unwrap();
        Guest(local::serve(built.manifest, self.folder.path()).unwrap())
    }
}

/// A guest's kernel: makes requests and takes answers apart.
struct Guest(Server);

const ENOENT: i32 = 2;
const ESTALE: i32 = 116;

impl Guest {
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut request = Vec::new();
        request.extend(u32::try_from(40 + body.len()).unwrap().to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(77u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        let answer = self.0.handle(&request).expect("an answer");
        assert_eq!(u32_at(&answer, 0) as usize, answer.len());
        assert_eq!(u64_at(&answer, 8), 77);
        match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&self, node: u64, name: &[u8]) -> Result<u64, i32> {
        let answer = self.ask(1, node, &[name, b"\0"].concat())?;
        assert_eq!(answer.len(), 128);
        match u64_at(&answer, 0) {
            0 => Err(ENOENT),
            node => Ok(node),
        }
    }

    fn find(&self, path: &str) -> Result<u64, i32> {
        path.split('/').try_fold(1, |node, name| self.lookup(node, name.as_bytes()))
    }

    fn read_at(&self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = vec![0; 40];
        body[8..16].copy_from_slice(&offset.to_le_bytes());
        body[16..20].copy_from_slice(&size.to_le_bytes());
        self.ask(15, node, &body)
    }

    fn read(&self, path: &str) -> Result<Vec<u8>, i32> {
        self.read_at(self.find(path)?, 0, 1 << 20)
    }

    /// Names, node ids and types of a folder, by READDIRPLUS in small pieces.
    fn list(&self, node: u64) -> Vec<(Vec<u8>, u64, u32)> {
        let mut found = Vec::new();
        let mut offset = 0u64;
        loop {
            let mut body = vec![0; 40];
            body[8..16].copy_from_slice(&offset.to_le_bytes());
            body[16..20].copy_from_slice(&600u32.to_le_bytes());
            let answer = self.ask(44, node, &body).unwrap();
            if answer.is_empty() {
                return found;
            }
            let mut at = 0;
            while at < answer.len() {
                let len = u32_at(&answer, at + 128 + 16) as usize;
                let name = answer[at + 128 + 24..][..len].to_vec();
                offset = u64_at(&answer, at + 128 + 8);
                let child = u64_at(&answer, at);
                if name != b"." && name != b".." {
                    found.push((name, child, u32_at(&answer, at + 128 + 20)));
                } else {
                    assert_eq!(child, 0, "the kernel takes no reference to dots");
                }
                at += 128 + (24 + len).next_multiple_of(8);
            }
        }
    }

    /// Every path below a node, with the node ids of files.
    fn walk(&self, node: u64, path: &str, found: &mut Vec<(String, u64)>) {
        for (name, child, kind) in self.list(node) {
            let path = format!("{path}/{}", String::from_utf8_lossy(&name));
            if kind == 4 {
                self.walk(child, &path, found);
            }
            found.push((path, child));
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn holds_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes())
}

/// Reads everything that any node id gives; none of it may be a secret.
fn read_all(guest: &Guest) -> usize {
    let mut read = 0;
    for node in 0..u64::from(guest.0.manifest().count()) + 100 {
        if let Ok(content) = guest.read_at(node, 0, 1 << 20) {
            let index = u32::try_from(node.saturating_sub(1)).unwrap();
            let path = String::from_utf8_lossy(&guest.0.manifest().path(index)).into_owned();
            assert!(!holds_secret(&content), "{path}");
            read += 1;
        }
    }
    read
}

#[test]
fn what_a_build_needs_is_served_and_no_planted_secret_is() {
    let machine = Machine::with_secrets();
    let guest = machine.serve();
    for path in NEEDED.iter().filter(|path| **path != "etc/passwd") {
        assert_eq!(guest.read(path).unwrap(), format!("content of {path}").as_bytes(), "{path}");
    }
    for path in PLANTED.iter().chain(PLANTED_CONTENT.iter().map(|(path, _)| path)) {
        match guest.read(path) {
            Err(error) => assert_eq!(error, ENOENT, "{path}"),
            // The sandbox has its own: an empty file to mount over.
            Ok(content) => assert!(content.is_empty() && *path == "etc/machine-id", "{path}"),
        }
    }
    assert!(read_all(&guest) >= NEEDED.len());
    let mut names = Vec::new();
    guest.walk(1, "", &mut names);
    for (path, _) in &names {
        let path = path.trim_start_matches('/');
        assert!(!PLANTED.contains(&path) || path == "etc/machine-id", "{path} is listed");
    }
    for mount_point in ["proc", "sys", "dev", "run", "tmp", "home/u", "root", "var/tmp"] {
        guest.find(mount_point).unwrap_or_else(|e| panic!("{mount_point}: {e}"));
    }
    assert!(guest.0.take_messages().is_empty());
}

#[test]
fn other_ways_to_a_secret_lead_nowhere() {
    let machine = Machine::with_secrets();
    // By symlinks from folders that are served, also of folders, also by the way of /proc.
    machine.write("usr/share/links/x", b"");
    for (name, target) in [
        ("absolute", machine.path("home/u/.ssh/id_ed25519")),
        ("relative", "../../../home/u/.ssh/id_ed25519".into()),
        ("folder", "../../../home/u/.ssh".into()),
        ("root", "/".into()),
        ("proc", "/proc/1/root/etc/shadow".into()),
    ] {
        symlink(target, machine.path(&format!("usr/share/links/{name}"))).unwrap();
    }
    // By hard links under harmless names.
    for (name, secret) in [
        ("usr/share/links/hard1", "home/u/.ssh/id_ed25519"),
        ("usr/share/links/hard2", "etc/shadow"),
        ("home/u/.local/bin/hard3", "home/u/.netrc"),
        ("opt/app/hard4", "home/u/.cargo/credentials.toml"),
        ("usr/share/links/hard5", "usr/local/share/deploy/id_rsa"),
        ("usr/share/links/hard6", "etc/app/server.conf"),
        ("usr/share/links/hard7", "home/u/.config/gcloud/application_default_credentials.json"),
    ] {
        fs::hard_link(machine.path(secret), machine.path(name)).unwrap();
    }
    let guest = machine.serve();
    for n in 1..=7 {
        for folder in ["usr/share/links", "home/u/.local/bin", "opt/app"] {
            assert_eq!(guest.find(&format!("{folder}/hard{n}")), Err(ENOENT), "{n}");
        }
    }
    // A link is only a text for the guest's own kernel; asking behind it is asking a non-folder.
    for name in ["absolute", "relative", "folder", "root", "proc"] {
        let node = guest.find(&format!("usr/share/links/{name}")).unwrap();
        assert!(guest.read_at(node, 0, 4096).is_err());
        assert!(guest.lookup(node, b"id_ed25519").is_err());
        assert!(guest.ask(28, node, &[0; 40]).is_err());
    }
    // Names that a kernel never asks.
    let usr = guest.find("usr").unwrap();
    for name in [
        &b".."[..],
        b".",
        b"",
        b"../etc/shadow",
        b"bin/../../etc/shadow",
        b"/etc/shadow",
        b"bin\0/../../etc/shadow",
        &[b'x'; 5000],
    ] {
        assert!(guest.lookup(usr, name).is_err(), "{name:?}");
        assert!(guest.lookup(1, name).is_err(), "{name:?}");
    }
    read_all(&guest);
}

#[test]
fn only_what_every_user_may_read_is_served() {
    let machine = Machine::new();
    machine.write("usr/lib/private", SECRET.as_bytes());
    machine.write("usr/lib/closed/inside", SECRET.as_bytes());
    fs::set_permissions(machine.path("usr/lib/private"), fs::Permissions::from_mode(0o640))
        .unwrap();
    fs::set_permissions(machine.path("usr/lib/closed"), fs::Permissions::from_mode(0o751)).unwrap();
    let guest = machine.serve();
    assert_eq!(guest.find("usr/lib/private"), Err(ENOENT));
    assert_eq!(guest.find("usr/lib/closed"), Err(ENOENT));
    // Closed after the image was made: not read any more.
    fs::set_permissions(machine.path("usr/bin/gcc"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(guest.read("usr/bin/gcc"), Err(ESTALE));
}

#[test]
fn homes_inside_a_served_folder_are_not_served_with_it() {
    let machine = Machine::new();
    machine.write("etc/passwd", b"w:x:1001:1001::/opt/people/w:/bin/sh\n");
    machine.write("opt/people/w/diary", SECRET.as_bytes());
    machine.write("opt/people/tool", b"served");
    machine.write("opt/home/u/diary", SECRET.as_bytes());
    machine.write("opt/home/u/.cargo/bin/cargo", b"cargo");
    let built = local::build(
        machine.cache.path(),
        machine.folder.path(),
        Path::new("/opt/home/u/"),
        &mut |_| {},
    )
    .unwrap();
    let guest = Guest(local::serve(built.manifest, machine.folder.path()).unwrap());
    assert_eq!(guest.read("opt/people/tool").unwrap(), b"served");
    assert_eq!(guest.find("opt/people/w/diary"), Err(ENOENT));
    assert_eq!(guest.find("opt/home/u/diary"), Err(ENOENT));
    assert_eq!(guest.read("opt/home/u/.cargo/bin/cargo").unwrap(), b"cargo");
    for home in ["/", "", "home/u", "/home/../etc", "/home//u", "/."] {
        let built =
            local::build(machine.cache.path(), machine.folder.path(), Path::new(home), &mut |_| {});
        assert!(built.is_err(), "{home}");
    }
}

#[test]
fn a_home_and_toolchains_behind_symlinks_are_found() {
    let machine = Machine::new();
    fs::remove_dir_all(machine.path("home")).unwrap();
    machine.write("data/home/u/.cargo/bin/cargo", b"cargo");
    machine.write("data/home/u/diary", SECRET.as_bytes());
    machine.write("data/home/v/diary", SECRET.as_bytes());
    machine.write("data/rust/toolchains/stable/bin/rustc", b"rustc");
    machine.write("data/rust/.netrc", SECRET.as_bytes());
    machine.write("data/opt/tool", b"tool");
    symlink("/data/home", machine.path("home")).unwrap();
    symlink("../../rust", machine.path("data/home/u/.rustup")).unwrap();
    symlink("data/opt", machine.path("opt")).unwrap();
    // Links that would take in more than they should.
    symlink("/data/home/u", machine.path("data/home/u/.pyenv")).unwrap();
    symlink("/", machine.path("data/home/u/.nvm")).unwrap();
    symlink("../v", machine.path("data/home/u/go")).unwrap();
    symlink("/data", machine.path("data/home/u/.volta")).unwrap();
    machine.write("data/dump.sql", SECRET.as_bytes());
    machine.write("etc/passwd", b"v:x:1001:1001::/home/v:/bin/sh\n");
    symlink("circle", machine.path("data/home/u/circle")).unwrap();
    symlink("circle", machine.path("data/home/u/.sdkman")).unwrap();
    let guest = machine.serve();
    assert_eq!(
        guest.0.manifest().find(b"home").map(|i| guest.0.manifest().entry(i).unwrap().kind),
        Some(local::manifest::Kind::Symlink)
    );
    assert_eq!(guest.read("data/home/u/.cargo/bin/cargo").unwrap(), b"cargo");
    assert_eq!(guest.read("data/rust/toolchains/stable/bin/rustc").unwrap(), b"rustc");
    assert_eq!(guest.read("data/opt/tool").unwrap(), b"tool");
    for path in ["data/home/u/diary", "data/home/v/diary", "data/rust/.netrc", "data/dump.sql"] {
        assert_eq!(guest.find(path), Err(ENOENT), "{path}");
    }
    read_all(&guest);
}

#[test]
fn a_replaced_library_gives_the_old_content_while_it_is_open() {
    let machine = Machine::new();
    let old = vec![b'o'; 300_000];
    machine.write("usr/lib/libz.so", &old);
    let guest = machine.serve();
    let node = guest.find("usr/lib/libz.so").unwrap();
    assert_eq!(guest.read_at(node, 0, 4096).unwrap(), vec![b'o'; 4096]);
    machine.write("usr/lib/new", &vec![b'n'; 300_000]);
    fs::rename(machine.path("usr/lib/new"), machine.path("usr/lib/libz.so")).unwrap();
    for offset in [0, 4096, 200_000] {
        assert_eq!(guest.read_at(node, offset, 4096).unwrap(), vec![b'o'; 4096]);
    }
    assert!(guest.0.take_messages().is_empty());
    // A server that had not opened it (the node agent was restarted) says so.
    let again = Guest(local::serve(Arc::clone(guest.0.manifest()), machine.folder.path()).unwrap());
    assert_eq!(again.read_at(node, 0, 4096), Err(ESTALE));
    let messages = again.0.take_messages();
    assert_eq!(messages.len(), 1);
    assert!(messages[0].starts_with("/usr/lib/libz.so changed on the laptop"), "{messages:?}");
    assert!(messages[0].contains("--new"));
    assert_eq!(again.read_at(node, 8192, 4096), Err(ESTALE));
    assert!(again.0.take_messages().is_empty(), "said once");
    // A new image has the new one.
    assert_eq!(machine.serve().read_at(node, 0, 4).unwrap(), b"nnnn");
}

#[test]
fn a_library_written_in_place_is_an_error_and_never_a_mix() {
    for rewrite in 0..4 {
        let machine = Machine::new();
        machine.write("usr/lib/libz.so", &vec![b'o'; 300_000]);
        let guest = machine.serve();
        let node = guest.find("usr/lib/libz.so").unwrap();
        guest.read_at(node, 0, 4096).unwrap();
        let path = machine.path("usr/lib/libz.so");
        let before = fs::metadata(&path).unwrap();
        // A tick of the file system's clock passes before the change.
        let probe = machine.path("usr/lib/probe");
        let tick = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            fs::write(&probe, b"").unwrap();
            let (probe, seen) = (fs::metadata(&probe).unwrap(), fs::metadata(path).unwrap());
            (probe.ctime(), probe.ctime_nsec()) > (seen.ctime(), seen.ctime_nsec())
        };
        while !tick(&path) {}
        match rewrite {
            0 => fs::write(&path, vec![b'n'; 300_000]).unwrap(),
            1 => fs::write(&path, b"short").unwrap(),
            2 => {
                use std::io::Write;
                let mut file = fs::File::options().append(true).open(&path).unwrap();
                file.write_all(b"more").unwrap();
            }
            _ => {
                // Same size, and the time set back: the change time tells.
                fs::write(&path, vec![b'n'; 300_000]).unwrap();
                let file = fs::File::options().append(true).open(&path).unwrap();
                file.set_modified(before.modified().unwrap()).unwrap();
            }
        }
        for offset in [0, 4096, 250_000] {
            assert_eq!(guest.read_at(node, offset, 4096), Err(ESTALE), "rewrite {rewrite}");
        }
        assert_eq!(guest.0.take_messages().len(), 1);
    }
}

#[test]
fn a_file_swapped_for_a_way_out_is_not_followed() {
    let machine = Machine::with_secrets();
    let guest = machine.serve();
    let (gcc, lib) = (guest.find("usr/bin/gcc").unwrap(), guest.find("usr/lib/libc.so").unwrap());
    fs::remove_file(machine.path("usr/bin/gcc")).unwrap();
    symlink(machine.path("etc/shadow"), machine.path("usr/bin/gcc")).unwrap();
    fs::rename(machine.path("usr/lib"), machine.path("usr/lib.old")).unwrap();
    symlink(machine.path("home/u/.ssh"), machine.path("usr/lib")).unwrap();
    machine.write("home/u/.ssh/libc.so", SECRET.as_bytes());
    assert_eq!(guest.read_at(gcc, 0, 4096), Err(ESTALE));
    assert_eq!(guest.read_at(lib, 0, 4096), Err(ESTALE));
    // A FIFO must not make the server wait.
    fs::remove_file(machine.path("usr/bin/gcc")).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    rustix::fs::mknodat(rustix::fs::CWD, machine.path("usr/bin/gcc"), fifo, mode, 0).unwrap();
    assert_eq!(guest.read_at(gcc, 0, 4096), Err(ESTALE));
}

#[test]
fn hard_links_are_one_node_and_more_files_than_descriptors_can_be_read() {
    let machine = Machine::new();
    fs::hard_link(machine.path("usr/bin/gcc"), machine.path("usr/bin/cc")).unwrap();
    for n in 0..600 {
        machine.write(&format!("usr/lib/m/{n}"), format!("module {n}").as_bytes());
    }
    let guest = machine.serve();
    let node = guest.find("usr/bin/gcc").unwrap();
    assert_eq!(guest.find("usr/bin/cc").unwrap(), node);
    let attributes = guest.ask(3, node, &[0; 16]).unwrap();
    assert_eq!(u32_at(&attributes, 16 + 64), 2, "two names");
    for _ in 0..2 {
        for n in 0..600 {
            assert_eq!(
                guest.read(&format!("usr/lib/m/{n}")).unwrap(),
                format!("module {n}").as_bytes()
            );
        }
    }
    let folder = guest.find("usr/lib/m").unwrap();
    assert_eq!(guest.list(folder).len(), 600);
    // A new name for a file that is served changes its times and not its content.
    fs::hard_link(machine.path("usr/lib/m/7"), machine.path("usr/lib/other")).unwrap();
    assert_eq!(guest.read("usr/lib/m/7").unwrap(), b"module 7");
}

#[test]
fn the_same_machine_gives_the_same_image_and_node_ids_outlive_a_server() {
    let machine = Machine::with_secrets();
    let build = || {
        let home = Path::new("/home/u");
        local::build(machine.cache.path(), machine.folder.path(), home, &mut |_| {}).unwrap()
    };
    let (one, two) = (build(), build());
    assert_eq!((one.id, &one.path), (two.id, &two.path));
    let opened = local::open(&one.path).unwrap();
    assert_eq!(opened.digest(), one.id);
    for index in 0..opened.count() {
        assert_eq!(opened.path(index), one.manifest.path(index));
        assert_eq!(opened.find(&opened.path(index)), Some(index));
    }
    machine.write("usr/bin/new", b"new");
    assert_ne!(build().id, one.id);
    for n in 0..8 {
        machine.write("usr/bin/new", format!("new {n}").as_bytes());
        build();
    }
    let kept = fs::read_dir(machine.cache.path().join("images/local")).unwrap().count();
    assert!(kept <= 6, "old manifests are forgotten: {kept} are kept");
    assert!(build().summary.denied > 10);
}

#[test]
fn a_damaged_manifest_is_an_error() {
    let machine = Machine::new();
    let home = Path::new("/home/u");
    let built =
        local::build(machine.cache.path(), machine.folder.path(), home, &mut |_| {}).unwrap();
    let bytes = fs::read(&built.path).unwrap();
    for cut in 0..bytes.len() {
        if cut % 7 == 0 {
            assert!(Manifest::parse(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }
    for at in (0..bytes.len()).step_by(3) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x55;
        towline_images::fuzzing::local_manifest(&damaged);
    }
}

#[test]
fn what_changes_something_is_refused_and_the_unknown_is_unknown() {
    let guest = Machine::new().serve();
    for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51] {
        assert_eq!(guest.ask(opcode, 1, &[0; 64]), Err(30), "EROFS");
    }
    for opcode in [0, 14, 18, 20, 22, 23, 25, 26, 27, 34, 37, 38, 39, 40, 46, 4096, u32::MAX] {
        assert_eq!(guest.ask(opcode, 1, &[0; 64]), Err(38), "ENOSYS");
    }
    assert_eq!(guest.ask(17, 1, b"").unwrap().len(), 80);
    let request = |opcode: u32| {
        let mut bytes = vec![0; 48];
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes
    };
    for silent in [2, 36, 42] {
        assert!(guest.0.handle(&request(silent)).is_none());
    }
    for node in [0, u64::MAX, u64::from(u32::MAX) + 2, 1 << 63] {
        assert_eq!(guest.ask(3, node, &[0; 16]), Err(ENOENT));
    }
    let file = guest.find("usr/bin/gcc").unwrap();
    assert!(guest.read_at(file, u64::MAX, 4096).unwrap().is_empty());
    assert!(guest.read_at(file, u64::MAX - 10, 1 << 20).unwrap().is_empty());
    assert_eq!(guest.read_at(file, 0, (1 << 20) + 1), Err(22), "EINVAL");
    assert_eq!(guest.read_at(file, 0, u32::MAX), Err(22), "EINVAL");
    assert_eq!(guest.read_at(1, 0, 4096), Err(21), "EISDIR");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_request_gets_a_bounded_answer(
        opcode in prop_oneof![0u32..60, any::<u32>()],
        node in prop_oneof![0u64..8, any::<u64>()],
        body in proptest::collection::vec(any::<u8>(), 0..80),
        cut in 0usize..120,
    ) {
        let mut request = vec![0; 40];
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[16..24].copy_from_slice(&node.to_le_bytes());
        request.extend(body);
        towline_images::fuzzing::fuse_request(&request);
        request.truncate(cut);
        towline_images::fuzzing::fuse_request(&request);
    }

    #[test]
    fn any_bytes_are_a_document_a_layer_or_an_error(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
    ) {
        towline_images::fuzzing::oci_document(&bytes);
        towline_images::fuzzing::layer_archive(&bytes);
        towline_images::fuzzing::local_manifest(&bytes);
        towline_images::fuzzing::fuse_request(&bytes);
    }
}
