//! A real helper, as root, that starts perl where a node's starts a VMM: what they can touch, and
//! that nothing outlives what it should end with.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should say where"
)]

use std::fs::{self, File};
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use towline_node_helper::client::{Helper, HelperError};
use towline_node_helper::process::start_time;
use towline_node_helper::protocol::{Access, Bounds, Given, Name, Running, Spawn};

/// The user and group of the node agent.
const AGENT: u32 = 47_110;
/// Users of each test's VMMs.
const UIDS: u32 = 8;
const WAIT_MAX: Duration = Duration::from_secs(60);

/// A helper with a folder of its own, and nothing of it left afterwards.
struct Node {
    folder: TempDir,
    program: PathBuf,
    cgroup: String,
    uids_first: u32,
    process: Child,
    client: Helper,
}

impl Node {
    fn start() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: the helper needs root");
            return None;
        }
        if fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .lines()
            .all(|it| !it.contains(" cgroup2 "))
        {
            eprintln!("SKIPPED: no cgroup2 file system is mounted");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let number = std::process::id() % 10_000 * 10 + NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("towline-test-{number}");
        let uids_first = 0x7000_0000 + number * UIDS;
        let program = fs::canonicalize("/usr/bin/perl").unwrap();
        let socket = folder.path().join("run/helper.sock");
        let config = format!(
            "agent_uid = {AGENT}\nagent_gid = {AGENT}\nprograms = ['{}']\nsocket = '{}'\n\
             uids_first = {uids_first}\nuids_count = {UIDS}\ncgroup = '{cgroup}'\n",
            program.display(),
            socket.display(),
        );
        fs::write(folder.path().join("helper.toml"), config).unwrap();
        let process = run_helper(folder.path());
        let client = Helper::new(&socket);
        let node = Self { folder, program, cgroup, uids_first, process, client };
        node.until("it answers", || node.client.list().is_ok());
        // Where file systems cannot map users, it says so, and there is nothing to test.
        let vm = node.vm("probe");
        match node.spawn(&vm, "exit 0", |_| {}) {
            Err(HelperError::Refused(problem)) if problem.contains("idmapped") => {
                eprintln!("SKIPPED: {problem}");
                return None;
            }
            started => drop(started.unwrap()),
        }
        node.until("it ends", || node.client.list().unwrap().is_empty());
        Some(node)
    }

    fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = run_helper(self.folder.path());
        self.until("it answers again", || self.client.list().is_ok());
    }

    /// A VM's folder, the node agent's alone.
    fn vm(&self, name: &str) -> PathBuf {
        let dir = self.folder.path().join("data").join(name).join("vm");
        fs::create_dir_all(&dir).unwrap();
        for part in [&dir, dir.parent().unwrap(), dir.parent().unwrap().parent().unwrap()] {
            fs::set_permissions(part, fs::Permissions::from_mode(0o700)).unwrap();
            chown(part, Some(AGENT), Some(AGENT)).unwrap();
        }
        self.file(&dir.parent().unwrap().join("disk"), AGENT);
        dir
    }

    fn file(&self, path: &Path, owner: u32) {
        fs::write(path, "secret\n").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(path, Some(owner), Some(owner)).unwrap();
    }

    /// Starts a script in a VM's folder, with its disk; `change` gives it other things.
    fn spawn(
        &self,
        dir: &Path,
        script: &str,
        change: impl FnOnce(&mut Spawn),
    ) -> Result<(Running, PipeReader), HelperError> {
        let given = |path: &Path, access| Given { path: path.to_str().unwrap().into(), access };
        let mut spawn = Spawn {
            name: Name::of(dir),
            program: self.program.to_str().unwrap().into(),
            args: vec!["-e".into(), format!("$| = 1; {script}")],
            files: vec![
                given(dir, Access::Own),
                given(&dir.parent().unwrap().join("disk"), Access::Write),
            ],
            dir: dir.to_str().unwrap().into(),
            bounds: Bounds {
                memory_bytes: 256 << 20,
                data_bytes: 256 << 20,
                file_bytes: 1 << 20,
                processes: 32,
                cpus: 1,
            },
            background: false,
            bound: false,
            inherit: None,
        };
        change(&mut spawn);
        let open = |given: &Given| -> OwnedFd {
            let path = File::options().read(true).custom_flags(libc::O_PATH).open(&given.path);
            path.unwrap().into()
        };
        let files: Vec<OwnedFd> = spawn.files.iter().map(open).collect();
        let log = File::create(self.folder.path().join("log")).unwrap();
        let (status, tells) = std::io::pipe().unwrap();
        let mut fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        fds.extend([log.as_fd(), tells.as_fd()]);
        let inherited = File::open(self.folder.path().join("helper.toml")).unwrap();
        fds.extend(spawn.inherit.map(|_| inherited.as_fd()));
        self.client.spawn(spawn, &fds).map(|running| (running, status))
    }

    /// What it said until its end, and how it ended.
    fn run(&self, dir: &Path, script: &str, change: impl FnOnce(&mut Spawn)) -> (String, String) {
        let (_, mut status) = self.spawn(dir, script, change).unwrap();
        let mut ended = String::new();
        status.read_to_string(&mut ended).unwrap();
        (fs::read_to_string(self.folder.path().join("log")).unwrap(), ended)
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + WAIT_MAX;
        while !done() {
            assert!(Instant::now() < until, "never: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let places = mounts.lines().filter(|line| line.contains("cgroup"));
        let places = places.filter_map(|line| line.split(' ').nth(1));
        places.map(|place| Path::new(place).join(&self.cgroup)).filter(|it| it.exists()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for running in self.client.list().unwrap_or_default() {
            let _ = self.client.end(running.name, true);
        }
        let ended = || self.client.list().is_ok_and(|running| running.is_empty());
        // One that has ended is listed no more; the helper removes its cgroups after that.
        let is_empty = |cgroup: &PathBuf| {
            let mut entries = fs::read_dir(cgroup).unwrap().flatten();
            !entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        };
        if !std::thread::panicking() {
            self.until("all end", ended);
            self.until("their cgroups go", || self.cgroups().iter().all(is_empty));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        for cgroup in self.cgroups() {
            // Empty: nothing of a VMM is left.
            let removed = fs::remove_dir(&cgroup);
            assert!(removed.is_ok() || std::thread::panicking(), "{}", cgroup.display());
        }
    }
}

fn run_helper(folder: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_towline-node-helper"))
        .arg("--config")
        .arg(folder.join("helper.toml"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_there(running: &Running) -> bool {
    start_time(running.pid) == Some(running.start_time)
}

#[test]
fn a_vmm_has_its_own_user_cgroup_and_root_and_no_network() {
    let Some(node) = Node::start() else { return };
    let dir = node.vm("one");
    let script = r#"
        sub show { open F, "<", $_[0] or print "$_[0]: $!\n"; print <F> }
        print "uid $< $> gid ", $( + 0, " ", $) + 0, "\n", "groups $)\n";
        printf "umask %04o\n", umask;
        -e and print "there: $_\n" for qw(/ /usr /dev/null /home /root /etc/passwd /run /dev/mem);
        show "/proc/self/$_" for qw(status net/dev cgroup); show "../disk";
        open F, ">", "../disk"; print F "more\n"; open F, ">", "made"; close F;
        print "in ", readlink "/proc/self/cwd", "\n"; exit 7"#;
    let (said, ended) = node.run(&dir, script, |_| {});
    let uid = node.uids_first;
    let ids = format!("uid {uid} {uid} gid {uid} {uid}\ngroups {uid}\numask 0077\n");
    assert!(said.starts_with(&ids), "{said}");
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    assert!(said.contains("CapEff:\t0000000000000000"), "{said}");
    let there: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("there: ")).collect();
    assert_eq!(there, ["/", "/usr", "/dev/null"]);
    let mut cards = said.lines().filter(|line| line.contains(": ") && line.contains(" 0 0 0 0 "));
    assert!(cards.all(|card| card.trim().starts_with("lo:")), "no network: {said}");
    assert!(said.contains("secret\n"), "its disk is its own: {said}");
    assert!(said.contains(&format!("/{}/{}", node.cgroup, Name::of(&dir))), "{said}");
    assert!(said.ends_with(&format!("in {}\n", dir.display())), "{said}");
    assert_eq!(ended, "exit 7");
    let made = fs::metadata(dir.join("made")).unwrap();
    assert_eq!(
        (made.uid(), made.mode() & 0o777),
        (AGENT, 0o600),
        "what it makes is the node agent's"
    );
    assert_eq!(fs::read_to_string(dir.parent().unwrap().join("disk")).unwrap(), "more\n");
}

#[test]
fn what_is_anothers_is_out_of_reach() {
    let Some(node) = Node::start() else { return };
    let (one, two) = (node.vm("one"), node.vm("two"));
    let socket = two.join("api.sock");
    let _listens = UnixListener::bind(&socket).unwrap();
    chown(&socket, Some(AGENT), Some(AGENT)).unwrap();
    let strangers = node.folder.path().join("strangers");
    node.file(&strangers, 0);
    let strangers = strangers.to_str().unwrap().to_owned();
    let (disk, other) = (two.parent().unwrap().join("disk"), two.display());
    let script = format!(
        r##"
        sub see {{ open F, $_[0], $_[1] or print "$_[1]: $!\n"; print <F>; close F }}
        see "<", $_ for qw({disk} {strangers} /etc/shadow);
        see ">", "{strangers}"; opendir D, "{other}" or print "no folder: $!\n"; print readdir D;
        open F, ">", "run"; print F "#!/usr/bin/perl\nprint 'ran'"; close F; chmod 0700, "run";
        exec "./run" or print "run: $!\n"; print "end\n""##,
        disk = disk.display()
    );
    // A descriptor of what the node agent could open but not read gives nothing.
    let given = Given { path: strangers.clone(), access: Access::Write };
    let (said, _) = node.run(&one, &script, |spawn| spawn.files.push(given));
    assert!(
        !said.contains("secret") && !said.contains("api.sock") && said.ends_with("end\n"),
        "{said}"
    );
    assert_eq!(
        said.matches("Permission denied").count(),
        3,
        "strangers', and what it made: {said}"
    );
    assert_eq!(fs::read_to_string(&strangers).unwrap(), "secret\n");

    // Nor outside of its root, were it to get there, as its user.
    let (running, _) = node.spawn(&one, "sleep 1000", |_| {}).unwrap();
    let as_vmm = |script: &str| {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).uid(running.uid).gid(running.uid);
        command.output().unwrap().status.success()
    };
    assert!(as_vmm("true"));
    assert!(!as_vmm(&format!("cat {}", disk.display())));
    assert!(!as_vmm(&format!("ls {other}")));
    let connect = format!(
        "perl -MIO::Socket::UNIX -e 'exit !IO::Socket::UNIX->new(Peer => q({}))'",
        socket.display()
    );
    assert!(Command::new("/bin/sh").args(["-c", &connect]).status().unwrap().success());
    assert!(!as_vmm(&connect), "another's API socket");
    assert!(!as_vmm(&format!("kill -0 {}", node.process.id())));
    let helper = node.client.socket().display();
    assert!(!as_vmm(&connect.replace(&socket.display().to_string(), &helper.to_string())));
}

#[test]
fn a_helper_that_was_killed_is_followed_by_one_that_knows_all() {
    let Some(mut node) = Node::start() else { return };
    let (one, two) = (node.vm("one"), node.vm("two"));
    let (first, mut status) = node.spawn(&one, "sleep 1000", |_| {}).unwrap();
    let (second, _) = node.spawn(&two, "$SIG{TERM} = sub { exit 3 }; sleep 1000", |_| {}).unwrap();
    assert_ne!(first.uid, second.uid);
    let before = node.client.list().unwrap();
    assert_eq!(before.len(), 2);
    assert!(before.iter().any(|it| it.dir == one.to_str().unwrap()), "{before:?}");
    node.restart();
    assert_eq!(node.client.list().unwrap(), before);
    let again = node.spawn(&one, "1", |_| {}).unwrap_err().to_string();
    assert!(again.contains("runs already"), "{again}");
    let third = node.vm("three");
    let (third, _) = node.spawn(&third, "sleep 1000", |_| {}).unwrap();
    assert!(third.uid != first.uid && third.uid != second.uid);
    node.client.end(Name::of(&one), true).unwrap();
    node.client.end(Name::of(&two), false).unwrap();
    node.until("both end", || !is_there(&first) && !is_there(&second));
    node.until("both are forgotten", || node.client.list().unwrap().len() == 1);
    let mut ended = String::new();
    status.read_to_string(&mut ended).unwrap();
    assert_eq!(ended, "", "the one that would have known is gone");
    let unknown = node.client.end(Name::of(&one), true).unwrap_err().to_string();
    assert!(unknown.contains("no VM"), "{unknown}");
}

#[test]
fn what_is_bound_ends_with_its_connection_and_with_all_its_processes() {
    let Some(mut node) = Node::start() else { return };
    let (one, two) = (node.vm("one"), node.vm("two"));
    let (stays, _) = node.spawn(&one, "sleep 1000", |_| {}).unwrap();
    let other = Helper::new(node.client.socket());
    let first = std::mem::replace(&mut node.client, other);
    let script = "if (my $child = fork) { open F, '>', 'child'; print F \"$child\\n\"; close F } \
                  else { setpgrp } sleep 1000";
    let (bound, _) = node.spawn(&two, script, |spawn| spawn.bound = true).unwrap();
    let child = two.join("child");
    node.until("it has a child", || fs::read_to_string(&child).is_ok_and(|it| it.ends_with('\n')));
    node.client = first;
    node.until("it ends", || !is_there(&bound));
    let child: i32 = fs::read_to_string(child).unwrap().trim().parse().unwrap();
    node.until("its child, too", || start_time(child).is_none());
    assert!(is_there(&stays));
}

#[test]
fn at_the_deadline_all_end_whoever_is_dead() {
    let Some(mut node) = Node::start() else { return };
    let dir = node.vm("one");
    let (vmm, _) = node.spawn(&dir, "sleep 1000", |_| {}).unwrap();
    let ahead = |ahead: Duration| Some(now() + u64::try_from(ahead.as_nanos()).unwrap());
    node.client.lease(ahead(Duration::from_secs(600))).unwrap();
    node.client.lease(Some(1)).unwrap_err();
    node.client.lease(ahead(Duration::from_secs(7200))).unwrap_err();
    assert!(is_there(&vmm));
    // The node agent says no more, and the helper dies, too.
    node.client.lease(ahead(Duration::from_millis(200))).unwrap();
    node.restart();
    node.until("it ends", || !is_there(&vmm));
    let refused = node.spawn(&dir, "1", |_| {}).unwrap_err().to_string();
    assert!(refused.contains("lease has ended"), "{refused}");
    node.client.lease(None).unwrap();
    node.until("it is forgotten", || node.client.list().unwrap().is_empty());
    assert_eq!(node.run(&dir, "exit 0", |_| {}).1, "exit 0");
}

#[test]
fn only_what_is_listed_is_done_and_only_for_the_node_agent() {
    let Some(node) = Node::start() else { return };
    let dir = node.vm("one");
    let refused =
        |change: fn(&mut Spawn)| node.spawn(&dir, "1", change).map(drop).unwrap_err().to_string();
    assert!(refused(|spawn| spawn.program = "/usr/bin/env".into()).contains("`programs`"));
    assert!(refused(|spawn| spawn.dir = "/".into()).contains("own folders"));
    assert!(refused(|spawn| spawn.bounds.cpus = 0).contains("no VM has"));
    // What does not come to run leaves nothing behind.
    let given = Given { path: "/usr/bin".into(), access: Access::Own };
    let (said, _) = node
        .run(&dir, "open F, '>', '/usr/bin/x'; print \"end\\n\"", |spawn| spawn.files.push(given));
    assert!(said.ends_with("end\n") && !Path::new("/usr/bin/x").exists(), "{said}");
    let (said, _) = node.run(
        &dir,
        "open F, '<&=9'; print scalar <F>; print readlink($_), \"\\n\" for </proc/self/fd/*>",
        |spawn| {
            spawn.inherit = Some(9);
        },
    );
    assert!(said.starts_with("agent_uid = "), "{said}");
    assert!(!said.contains("socket:") && !said.contains("pidfd"), "no others: {said}");

    let socket = node.client.socket().to_owned();
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    // Those who come to it all the same are hung up on.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let connect = |uid: u32| {
        let script = "use Socket; socket(S, PF_UNIX, SOCK_SEQPACKET, 0); \
                      connect(S, sockaddr_un(shift)) or die; \
                      send(S, '{\"verb\":\"list\"}', 0); recv(S, $answer, 4096, 0); print $answer";
        let mut perl = Command::new("perl");
        let output = perl.args(["-e", script]).arg(&socket).uid(uid).gid(uid).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(connect(AGENT), r#"{"answer":"vmms","running":[]}"#);
    assert_eq!(connect(AGENT + 1), "");
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).unwrap()
}
