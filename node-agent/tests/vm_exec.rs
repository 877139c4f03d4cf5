//! The real guest agent in a real microVM: configured with a squashfs layer and an ext4 disk, it
//! runs commands and survives what they do to the machine.

mod vm_support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::qemu::{AccelChoice, Qemu, QemuConfig};
use towline_node_agent::hypervisor::{Hypervisor, Vm, VmSpec};
use towline_node_agent::{disks, initramfs, kernel};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    ExecAck, ExecExit, ExecOpen, ExecSignal, ExecStart, ExecStarted, GuestCommand, GuestConfigure,
    GuestEvent, PingOpen, Shutdown, StreamError, StreamErrorCode, StreamOpen, Terminal, User,
    exec_open::How, exit_status, guest_command, guest_event, stream_open::Kind,
};
use towline_streams::{FrameReader, FrameWriter, MuxRecv, MuxSend, Priority};
use vm_support::{BOOT_MAX, SECRET, cache_dir, run_async, vm_dir};

/// What the tests run; each is taken from this machine with its libraries.
const PROGRAMS: [&str; 18] = [
    "bash", "sh", "cat", "head", "tail", "ls", "id", "stat", "dd", "df", "rm", "mkdir", "sleep",
    "stty", "tty", "uname", "touch", "mount",
];
const PROCESSES_MAX: u32 = 60;

#[test]
fn vm_runs_commands_and_survives_them() {
    run_async(async {
        let Some(driver) = driver().await else { return };
        let (_guard, dir) = vm_dir();
        let Some(mut guest) = Guest::boot(&driver, &dir).await else { return };
        guest.check_commands().await;
        guest.check_terminal().await;
        guest.check_isolation().await;
        guest.check_fork_bomb().await;
        guest.check_out_of_memory().await;
        guest.check_full_disk().await;
        guest = guest.check_new_session().await;
        guest.check_reboot_inside().await;
        guest.check_shutdown().await;
        let again = Guest::boot(&driver, &dir).await.expect("it boots again");
        let kept = again.run(&["cat", "/kept"]).await;
        assert_eq!(kept.stdout, "kept\n", "{kept:?}");
        again.vm.kill().unwrap();
    });
}

struct Guest {
    vm: Machine,
    link: GuestLink,
    next_key: std::cell::Cell<u8>,
}

/// A VM that does not outlive a test that fails.
struct Machine(Vm);

impl std::ops::Deref for Machine {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.0
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// How a command went.
#[derive(Debug, Default)]
struct Outcome {
    code: i32,
    stdout: String,
    stderr: String,
    reason: String,
    refused: Option<StreamError>,
}

impl Guest {
    async fn boot(driver: &Qemu, dir: &Path) -> Option<Self> {
        let layer = layer()?;
        let upper = dir.join("upper.img");
        disks::create(&cache_dir(), &upper, 96).unwrap();
        let spec = VmSpec {
            cpus: 1,
            memory_mib: 320,
            layers: vec![layer],
            upper: Some(upper),
            dir: dir.to_owned(),
            console: std::env::var_os("TOWLINE_TEST_CONSOLE").is_some(),
        };
        let vm = Machine(driver.boot(&spec).await.unwrap());
        let mut link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        assert!(!link.hello.configured);
        let configure = GuestConfigure {
            resync_marker: SECRET.to_vec(),
            hostname: "first-light".into(),
            unix_ns: 1_800_000_000_000_000_000,
            entropy: vec![7; 64],
            machine_id: vec![0xab; 16],
            layers: 1,
            folder: b"/home/ann/project".to_vec(),
            user: Some(User {
                name: "ann".into(),
                uid: 1000,
                gid: 1000,
                home: b"/home/ann".to_vec(),
                ..User::default()
            }),
            env: vec![b"FROM_IMAGE=yes".to_vec()],
            processes_max: PROCESSES_MAX,
            ..GuestConfigure::default()
        };
        link.configure(&vm, &configure, BOOT_MAX).await.unwrap();
        Some(Self { vm, link, next_key: std::cell::Cell::new(0) })
    }

    async fn run(&self, argv: &[&str]) -> Outcome {
        self.run_as(start(argv)).await
    }

    async fn run_as_root(&self, script: &str) -> Outcome {
        let user = Some(User { name: "root".into(), ..User::default() });
        self.run_as(ExecStart { user, ..start(&["sh", "-c", script]) }).await
    }

    async fn run_as(&self, what: ExecStart) -> Outcome {
        let (mut reader, mut writer) = self.open(what).await;
        writer.send_data(FrameKind::StdinEof, 0, &[]).await.unwrap();
        to_the_end(&mut reader, &mut writer).await
    }

    async fn open(&self, what: ExecStart) -> (FrameReader<MuxRecv>, FrameWriter<MuxSend>) {
        self.next_key.set(self.next_key.get() + 1);
        let exec_id = vec![self.next_key.get(); 16];
        self.open_stream(Kind::Exec(ExecOpen { exec_id, how: Some(How::Start(what)) })).await
    }

    async fn open_stream(&self, kind: Kind) -> (FrameReader<MuxRecv>, FrameWriter<MuxSend>) {
        let (send, recv) = self.link.open(Priority::Interactive).unwrap();
        let mut writer = FrameWriter::new(send);
        let open = StreamOpen { kind: Some(kind), ..StreamOpen::default() };
        writer.send_message(FrameKind::Open, &open).await.unwrap();
        (FrameReader::new(recv), writer)
    }

    async fn check_commands(&self) {
        let (mut pong, _writer) = self.open_stream(Kind::Ping(PingOpen { guest: true })).await;
        assert!(frame(&mut pong).await.is(FrameKind::Pong));
        let out = self.run(&["sh", "-c", "echo $FROM_IMAGE $HOME; id -u; id -g; uname -n; cat /etc/hostname /etc/machine-id; echo err >&2; exit 3"]).await;
        let wanted =
            format!("yes /home/ann\n1000\n1000\nfirst-light\nfirst-light\n{}\n", "ab".repeat(16));
        assert_eq!(
            (out.code, out.stdout.as_str(), out.stderr.as_str()),
            (3, wanted.as_str(), "err\n")
        );
        let out = self.run(&["sh", "-c", "pwd; touch here && ls; stat -c %u:%g . /home/ann"]).await;
        assert_eq!(out.stdout, "/home/ann/project\nhere\n1000:1000\n1000:1000\n", "{out:?}");
        let out = self.run(&["sh", "-c", "kill -SEGV $$"]).await;
        assert_eq!(out.code, 128 + 11);
        let refused = self.run(&["no-such-command"]).await.refused.unwrap();
        assert_eq!(refused.code(), StreamErrorCode::CommandNotFound);
        let refused = self.run(&["/etc/hostname"]).await.refused.unwrap();
        assert_eq!(refused.code(), StreamErrorCode::CannotExecute, "{refused:?}");
        let out = self.run_as_root("echo kept > /kept; id -u").await;
        assert_eq!(out.stdout, "0\n", "{out:?}");
    }

    async fn check_terminal(&self) {
        let terminal = Some(Terminal { rows: 33, columns: 77, term: "xterm".into() });
        let what = ExecStart { terminal, ..start(&["sh", "-c", "tty; stty size; cat"]) };
        let (mut reader, mut writer) = self.open(what).await;
        let shown = until_shown(&mut reader, "33 77\r\n").await;
        assert!(shown.contains("/dev/pts/0\r\n"), "{shown}");
        writer.send_data(FrameKind::Stdin, 0, b"typed\n").await.unwrap();
        until_shown(&mut reader, "typed\r\ntyped\r\n").await;
        writer.send_data(FrameKind::Stdin, 6, b"\x03").await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!(out.code, 130, "ctrl-c interrupts: {out:?}");
    }

    /// Root in the sandbox sees neither the agent nor its disk, and cannot end it.
    async fn check_isolation(&self) {
        let out = self
            .run_as_root("cat /proc/1/comm; kill -9 1; kill -9 -1; ls / /proc/1/root/; cat /proc/mounts; ls /dev")
            .await;
        assert!(out.stdout.starts_with("towline-init\n"), "{out:?}");
        assert!(!out.stdout.contains("spool"), "{out:?}");
        for wanted in ["\nnull\n", "\nfull\n", "/home/ann/project ext4"] {
            assert!(out.stdout.contains(wanted), "{wanted}: {out:?}");
        }
        let out = self.run_as_root("ls /run/towline").await;
        assert!(out.stderr.contains("No such file"), "the agent's own mounts: {out:?}");
        let out = self.run_as_root("echo x > /sys/kernel/mm/uevent_seqnum").await;
        assert!(out.stderr.contains("Read-only"), "{out:?}");
    }

    async fn check_fork_bomb(&self) {
        let bomb = "bomb() { bomb | bomb & }; bomb; sleep 1000";
        let (mut reader, mut writer) = self.open(start(&["bash", "-c", bomb])).await;
        let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        // At its limit nothing new can be started, and the refusal says so.
        let refused = loop {
            let out = self.run(&["sh", "-c", "true"]).await;
            if let Some(refused) = out.refused {
                break refused;
            }
        };
        assert_eq!(refused.code(), StreamErrorCode::Limit, "{refused:?}");
        assert!(refused.message.contains("processes"), "{refused:?}");
        writer.send_message(FrameKind::Signal, &ExecSignal { signal: 9 }).await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!(out.code, 128 + 9);
        self.eventually_runs().await;
    }

    /// Processes that were killed are gone a moment later.
    async fn eventually_runs(&self) {
        let runs = async {
            loop {
                let out = self.run(&["sh", "-c", "ls > /dev/null && echo alive"]).await;
                if out.stdout == "alive\n" {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(BOOT_MAX, runs).await.expect("commands run again");
    }

    async fn check_out_of_memory(&mut self) {
        // A second command, which must not be the one that is killed.
        let (mut other, mut other_writer) = self.open(start(&["cat"])).await;
        let _started: ExecStarted = message(&mut other, FrameKind::Started).await;
        // One endless line, which tail must keep whole.
        let out = self.run(&["sh", "-c", "head -c 1000m /dev/zero | tail; echo survived"]).await;
        assert_eq!((out.code, out.stdout.as_str()), (137, ""), "{out:?}");
        assert!(out.reason.starts_with("killed: out of memory (limit 2"), "{out:?}");
        other_writer.send_data(FrameKind::StdinEof, 0, &[]).await.unwrap();
        assert_eq!(to_the_end(&mut other, &mut other_writer).await.code, 0);
        self.eventually_runs().await;
        let event = tokio::time::timeout(BOOT_MAX, self.out_of_memory_event()).await.unwrap();
        assert!(event.contains("out of memory"), "{event}");
    }

    async fn out_of_memory_event(&mut self) -> String {
        loop {
            let frame = self.link.control.events.next().await.unwrap().unwrap();
            let event: GuestEvent = frame.decode().unwrap();
            if let Some(guest_event::Event::OutOfMemory(event)) = event.event {
                return event.message;
            }
        }
    }

    async fn check_full_disk(&self) {
        let out = self.run_as_root("cat /dev/zero > /big; echo full; df /").await;
        assert!(out.stderr.contains("No space left"), "{out:?}");
        // A detached one cannot even make its spool, or keeps its output in memory.
        let what = ExecStart { detached: true, ..start(&["sh", "-c", "echo spooled"]) };
        let (mut reader, mut writer) = self.open(what).await;
        let out = to_the_end(&mut reader, &mut writer).await;
        let no_space = out.refused.as_ref().is_some_and(|e| e.code() == StreamErrorCode::NoSpace);
        assert!(out.stdout == "spooled\n" || no_space, "{out:?}");
        let out = self.run_as_root("rm /big && echo freed > /freed && cat /freed").await;
        assert_eq!(out.stdout, "freed\n", "{out:?}");
    }

    /// As a restarted node agent: the command goes on, and its output is taken up again.
    async fn check_new_session(self) -> Self {
        let script = "echo before; read line; echo after $line";
        let (mut reader, _writer) = self.open(start(&["sh", "-c", script])).await;
        let started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        let shown = frame(&mut reader).await.split_data().unwrap().1;
        assert_eq!(&shown[..], b"before\n");
        let Self { vm, link, next_key } = self;
        drop(link);
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        assert!(link.hello.configured);
        let guest = Self { vm, link, next_key };
        let resume = towline_proto::v1::ExecResume { stdout_offset: 7, ..Default::default() };
        let open = ExecOpen { exec_id: started.exec_id, how: Some(How::Resume(resume)) };
        let (mut reader, mut writer) = guest.open_stream(Kind::Exec(open)).await;
        writer.send_data(FrameKind::Stdin, 0, b"all\n").await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!((out.code, out.stdout.as_str()), (0, "after all\n"));
        guest
    }

    /// `reboot` in a pid namespace ends its init: the next command finds a new one.
    async fn check_reboot_inside(&self) {
        let script = "import ctypes; ctypes.CDLL(None).reboot(0x01234567)";
        let user = Some(User { name: "root".into(), ..User::default() });
        let what = ExecStart { user, ..start(&["python3", "-S", "-c", script]) };
        let out = self.run_as(what).await;
        if out.refused.is_some() {
            eprintln!("SKIPPED: a reboot inside: this machine's python3 could not be packed");
            return;
        }
        assert_eq!(out.code, 137, "{out:?}");
        self.eventually_runs().await;
    }

    async fn check_shutdown(mut self) {
        let (mut reader, _writer) = self
            .open(start(&[
                "sh",
                "-c",
                "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done",
            ]))
            .await;
        let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        assert!(frame(&mut reader).await.is(FrameKind::Stdout));
        let command = Some(guest_command::Command::Shutdown(Shutdown { grace_ms: 20_000 }));
        let commands = &mut self.link.control.commands;
        commands.send_message(FrameKind::Command, &GuestCommand { command }).await.unwrap();
        let exit =
            tokio::time::timeout(BOOT_MAX, self.vm.wait_exit()).await.expect("it powers off");
        assert_eq!(exit.status, "exit status: 0", "{exit}");
    }
}

fn start(argv: &[&str]) -> ExecStart {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    ExecStart { argv, ..ExecStart::default() }
}

async fn frame(reader: &mut FrameReader<MuxRecv>) -> Frame {
    let next = tokio::time::timeout(BOOT_MAX, reader.next()).await.expect("a frame in time");
    next.unwrap().expect("a frame before the end")
}

async fn until_shown(reader: &mut FrameReader<MuxRecv>, words: &str) -> String {
    let mut shown = String::new();
    while !shown.contains(words) {
        let frame = frame(reader).await;
        if !frame.is(FrameKind::Started) && !frame.is(FrameKind::Ack) {
            assert!(frame.is(FrameKind::Stdout), "{shown:?} and then {frame:?}");
            shown += &String::from_utf8_lossy(&frame.split_data().unwrap().1);
        }
    }
    shown
}

async fn message<M: prost::Message + Default>(
    reader: &mut FrameReader<MuxRecv>,
    kind: FrameKind,
) -> M {
    let frame = frame(reader).await;
    assert!(frame.is(kind), "{kind:?} expected, not {frame:?}");
    frame.decode().unwrap()
}

async fn to_the_end(
    reader: &mut FrameReader<MuxRecv>,
    writer: &mut FrameWriter<MuxSend>,
) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let frame = frame(reader).await;
        if frame.is(FrameKind::Stdout) || frame.is(FrameKind::Stderr) {
            let into = if frame.is(FrameKind::Stdout) { &mut stdout } else { &mut stderr };
            into.extend_from_slice(&frame.split_data().unwrap().1);
            let ack = ExecAck {
                stdout_offset: stdout.len() as u64,
                stderr_offset: stderr.len() as u64,
                ..ExecAck::default()
            };
            let _ = writer.send_message(FrameKind::Ack, &ack).await;
        } else if frame.is(FrameKind::Exit) {
            let status = frame.decode::<ExecExit>().unwrap().status.unwrap();
            let code = match status.how.unwrap() {
                exit_status::How::Code(code) => code,
                exit_status::How::Signal(signal) => 128 + signal,
            };
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            let (stdout, stderr) = (text(stdout), text(stderr));
            return Outcome { code, stdout, stderr, reason: status.reason, refused: None };
        } else if frame.is(FrameKind::Error) {
            return Outcome { refused: Some(frame.decode().unwrap()), ..Outcome::default() };
        }
    }
}

async fn driver() -> Option<Qemu> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return None;
    }
    let cache = cache_dir();
    let kernel = match kernel::ensure(&cache, &|text| eprintln!("{text}")) {
        Ok(kernel) => kernel,
        Err(error @ kernel::KernelError::Tool { .. }) => {
            eprintln!("SKIPPED: no guest kernel: {error}");
            return None;
        }
        Err(error) => panic!("{error:?}"),
    };
    let initramfs = initramfs::ensure(&cache, &kernel, &guest_agent()).unwrap();
    let config = QemuConfig { cache_dir: cache, kernel, initramfs, accel: AccelChoice::Auto };
    Some(Qemu::new(config).await.unwrap())
}

/// The static guest agent: the one named by the environment, or built now.
fn guest_agent() -> PathBuf {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    if let Some(given) = std::env::var_os("TOWLINE_GUEST_AGENT") {
        return given.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target_dir =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let built = Command::new(env!("CARGO"))
        .current_dir(root)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", "-q", "-p", "towline-guest-agent", "--profile", "guest"])
        .args(["--target", TARGET])
        .status()
        .unwrap();
    assert!(built.success(), "building the guest agent: {built}");
    target_dir.join(TARGET).join("guest/towline-guest-agent")
}

/// A layer of this machine's own shell and tools with their libraries, made once per test run.
fn layer() -> Option<PathBuf> {
    let folder = std::env::temp_dir().join(format!("towline-vm-exec-{}", std::process::id()));
    let image = folder.join("layer.sq");
    if image.exists() {
        return Some(image);
    }
    let root = folder.join("root");
    for name in ["usr/bin", "etc", "root"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["bin", "lib", "lib64"] {
        std::fs::create_dir_all(root.join("usr").join(name)).unwrap();
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
    let mut files = BTreeSet::new();
    for program in PROGRAMS {
        let path = Path::new("/usr/bin").join(program);
        assert!(path.exists(), "{} is on every Debian", path.display());
        let libraries = Command::new("ldd").arg(&path).output().unwrap().stdout;
        let libraries = String::from_utf8(libraries).unwrap();
        files.extend(
            libraries.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from),
        );
        files.insert(path);
    }
    for file in files {
        let target = root.join(file.strip_prefix("/").unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&file, target).unwrap();
    }
    let made = Command::new("mksquashfs")
        .args([&root, &image])
        .args(["-comp", "lz4", "-all-root", "-no-progress", "-quiet"])
        .status();
    let Ok(made) = made else {
        eprintln!("SKIPPED: mksquashfs is not installed (package squashfs-tools)");
        return None;
    };
    assert!(made.success(), "{made}");
    Some(image)
}
