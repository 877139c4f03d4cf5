//! A sandbox with the real guest agent for tests: drivers, layer, disk, configuration, commands.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use towline_node_agent::config::HELPER_VARIABLE;
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::cloud_hypervisor::{
    CloudHypervisor, CloudHypervisorConfig, PROGRAM_VARIABLE,
};
use towline_node_agent::hypervisor::process::Process;
use towline_node_agent::hypervisor::qemu::{AccelChoice, Qemu, QemuConfig};
use towline_node_agent::hypervisor::{
    Capabilities, DiskLimits, Hypervisor, HypervisorError, Starter, Vm, VmSpec,
};
use towline_node_agent::{disks, initramfs, kernel};
use towline_node_helper::client::Helper;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    ExecAck, ExecExit, ExecOpen, ExecStart, GuestConfigure, StreamError, StreamOpen, User,
    exec_open::How, exit_status, stream_open::Kind,
};
use towline_streams::{FrameReader, FrameWriter, MuxRecv, MuxSend, Priority};

pub(crate) const SECRET: [u8; 32] = [0x5e; 32];
/// A boot, or anything else, on a machine where everything else runs too.
pub(crate) const BOOT_MAX: Duration = Duration::from_secs(90);
/// For what a command says next: one that moves 50 MB in a guest of an emulated machine takes long.
const FRAME_MAX: Duration = Duration::from_secs(300);
pub(crate) const PROCESSES_MAX: u32 = 60;
const MEMORY_MIB: u64 = 320;

/// What the tests run; each is taken from this machine with its libraries.
const PROGRAMS: [&str; 26] = [
    "bash",
    "sh",
    "cat",
    "head",
    "tail",
    "ls",
    "id",
    "stat",
    "dd",
    "df",
    "rm",
    "mkdir",
    "sleep",
    "stty",
    "tty",
    "uname",
    "touch",
    "mount",
    "perl",
    "find",
    "sort",
    "env",
    "mknod",
    "umount",
    "seq",
    "sha256sum",
];
/// These too, where this machine has them.
const PROGRAMS_MAYBE: [&str; 2] = ["kmod", "ssh-keygen"];
pub(crate) struct Guest {
    pub(crate) capabilities: Capabilities,
    pub(crate) vm: Machine,
    pub(crate) link: GuestLink,
    pub(crate) next_key: std::cell::Cell<u128>,
}

/// A VM that does not outlive a test that fails.
pub(crate) struct Machine(pub(crate) Vm);

impl std::ops::Deref for Machine {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.0
    }
}

impl Machine {
    /// What a restarted node agent does: the handle is gone, the VM is found in its directory.
    pub(crate) fn adopted(self, driver: &dyn Hypervisor) -> Self {
        let (dir, identity) = (self.dir().to_owned(), self.identity().clone());
        std::mem::forget(self);
        let vm = driver.adopt(&dir).unwrap().expect("a running VM is found");
        assert_eq!(vm.identity(), &identity);
        Self(vm)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// How a command went.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) reason: String,
    pub(crate) refused: Option<StreamError>,
}

impl Guest {
    /// Boots with the test's layer, and configures.
    pub(crate) async fn boot(driver: &dyn Hypervisor, dir: &Path) -> Option<Self> {
        let mut guest = Self::boot_only(driver, dir, vec![layer(dir)?]).await;
        let configure = GuestConfigure {
            layers: 1,
            memory_max_bytes: if guest.capabilities.own_kernel { 0 } else { MEMORY_MIB << 20 },
            ..configuration()
        };
        guest.link.configure(&guest.vm, &configure, BOOT_MAX).await.unwrap();
        Some(guest)
    }

    /// Boots to the hello.
    pub(crate) async fn boot_only(
        driver: &dyn Hypervisor,
        dir: &Path,
        layers: Vec<PathBuf>,
    ) -> Self {
        let vm = driver.boot(&spec(dir, layers)).await.unwrap();
        Self::hello(driver, vm).await
    }

    /// Restores from the template of this shape to the hello.
    pub(crate) async fn restore_only(
        driver: &dyn Hypervisor,
        dir: &Path,
        layers: Vec<PathBuf>,
    ) -> Self {
        let vm = driver.restore(&spec(dir, layers)).await.unwrap().expect("there is a template");
        Self::hello(driver, vm).await
    }

    async fn hello(driver: &dyn Hypervisor, vm: Vm) -> Self {
        let vm = Machine(vm);
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        assert!(!link.hello.configured);
        let capabilities = driver.capabilities().clone();
        Self { capabilities, vm, link, next_key: std::cell::Cell::new(0) }
    }

    /// Whether a check is to be made of this driver; says which capability is missing, if not.
    pub(crate) fn asked(&self, check: &str, capability: &str, has: bool) -> bool {
        if !has {
            let driver = self.capabilities.driver;
            eprintln!("SKIPPED: {check} on {driver}: no capability {capability}");
        }
        has
    }

    pub(crate) async fn run(&self, argv: &[&str]) -> Outcome {
        self.run_as(start(argv)).await
    }

    pub(crate) async fn run_as_root(&self, script: &str) -> Outcome {
        let user = Some(User { name: "root".into(), ..User::default() });
        self.run_as(ExecStart { user, ..start(&["sh", "-c", script]) }).await
    }

    pub(crate) async fn run_as(&self, what: ExecStart) -> Outcome {
        let (mut reader, mut writer) = self.open(what).await;
        writer.send_data(FrameKind::StdinEof, 0, &[]).await.unwrap();
        to_the_end(&mut reader, &mut writer).await
    }

    pub(crate) async fn open(
        &self,
        what: ExecStart,
    ) -> (FrameReader<MuxRecv>, FrameWriter<MuxSend>) {
        self.next_key.set(self.next_key.get() + 1);
        let exec_id = self.next_key.get().to_le_bytes().to_vec();
        self.open_stream(Kind::Exec(ExecOpen { exec_id, how: Some(How::Start(what)) })).await
    }

    pub(crate) async fn open_stream(
        &self,
        kind: Kind,
    ) -> (FrameReader<MuxRecv>, FrameWriter<MuxSend>) {
        let (send, recv) = self.link.open(Priority::Interactive).unwrap();
        let mut writer = FrameWriter::new(send);
        let open = StreamOpen { kind: Some(kind), ..StreamOpen::default() };
        writer.send_message(FrameKind::Open, &open).await.unwrap();
        (FrameReader::new(recv), writer)
    }
}

/// With a disk of its own in the VM's directory.
pub(crate) fn spec(dir: &Path, layers: Vec<PathBuf>) -> VmSpec {
    let upper = dir.join("upper.img");
    disks::create(&cache_dir(), &upper, 96).unwrap();
    VmSpec {
        cpus: 1,
        memory_mib: MEMORY_MIB,
        processes_max: PROCESSES_MAX,
        layers,
        upper: Some(upper),
        dir: dir.to_owned(),
        console: std::env::var_os("TOWLINE_TEST_CONSOLE").is_some(),
    }
}

/// The configuration but for the image.
pub(crate) fn configuration() -> GuestConfigure {
    GuestConfigure {
        resync_marker: SECRET.to_vec(),
        hostname: "first-light".into(),
        unix_ns: 1_800_000_000_000_000_000,
        entropy: vec![7; 64],
        machine_id: vec![0xab; 16],
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
    }
}

/// The cache that the product uses too, so that the kernel is downloaded once.
pub(crate) fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("towline")
}

/// A directory of its own for a VM.
pub(crate) fn vm_dir() -> (TempDir, PathBuf) {
    let guard = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(guard.path()).unwrap();
    (guard, dir)
}

pub(crate) fn run_async(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

pub(crate) fn start(argv: &[&str]) -> ExecStart {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    ExecStart { argv, ..ExecStart::default() }
}

pub(crate) async fn frame(reader: &mut FrameReader<MuxRecv>) -> Frame {
    let next = tokio::time::timeout(FRAME_MAX, reader.next()).await.expect("a frame in time");
    next.unwrap().expect("a frame before the end")
}

pub(crate) async fn until_shown(reader: &mut FrameReader<MuxRecv>, words: &str) -> String {
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

pub(crate) async fn message<M: prost::Message + Default>(
    reader: &mut FrameReader<MuxRecv>,
    kind: FrameKind,
) -> M {
    let frame = frame(reader).await;
    assert!(frame.is(kind), "{kind:?} expected, not {frame:?}");
    frame.decode().unwrap()
}

pub(crate) async fn to_the_end(
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

/// The `qemu` driver, or `None` with a word why.
pub(crate) async fn qemu() -> Option<Qemu> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return None;
    }
    Some(Qemu::new(config()?).await.unwrap())
}

/// The `cloud-hypervisor` driver, or `None` with a word why.
pub(crate) async fn cloud_hypervisor() -> Option<CloudHypervisor> {
    cloud_hypervisor_in(None, DiskLimits::default()).await
}

/// The same with a cache of its own for templates.
pub(crate) async fn cloud_hypervisor_in(
    cache: Option<&Path>,
    disk_limits: DiskLimits,
) -> Option<CloudHypervisor> {
    let Some(program) = std::env::var_os(PROGRAM_VARIABLE).filter(|path| !path.is_empty()) else {
        eprintln!("SKIPPED: no Cloud Hypervisor binary");
        return None;
    };
    let QemuConfig { cache_dir, kernel, initramfs, starter, .. } = config()?;
    let cache_dir = cache.map_or(cache_dir, Path::to_owned);
    let program = program.into();
    let wanted =
        CloudHypervisorConfig { cache_dir, program, kernel, initramfs, starter, disk_limits };
    match CloudHypervisor::new(wanted).await {
        Ok(driver) => Some(driver),
        Err(HypervisorError::NoKvm(why)) => {
            eprintln!("SKIPPED: no KVM for Cloud Hypervisor: {why}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Who starts the suite's VMs: the helper that the environment names, or the test itself.
fn starter() -> Starter {
    let socket = std::env::var_os(HELPER_VARIABLE).filter(|socket| !socket.is_empty());
    socket.map_or(Starter::Own, |socket| Starter::Helper(Arc::new(Helper::new(socket))))
}

/// What the driver is made of; `None`, with a word why, where a VM cannot be run at all.
pub(crate) fn config() -> Option<QemuConfig> {
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
    let (accel, starter, disk_limits) = (AccelChoice::Auto, starter(), DiskLimits::default());
    Some(QemuConfig { cache_dir: cache, kernel, initramfs, accel, starter, disk_limits })
}

/// The `process` driver, or `None` with a word why.
pub(crate) fn process() -> Option<Process> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: the `process` driver needs root");
        return None;
    }
    match Process::new(&guest_agent()) {
        Ok(process) => Some(process),
        Err(error @ HypervisorError::Spec(_)) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// The static guest agent: the one named by the environment, or built now.
pub(crate) fn guest_agent() -> PathBuf {
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

/// A layer of this machine's own shell and tools with their libraries, made once per VM.
pub(crate) fn layer(folder: &Path) -> Option<PathBuf> {
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
    for program in PROGRAMS.into_iter().chain(PROGRAMS_MAYBE) {
        let path = Path::new("/usr/bin").join(program);
        if PROGRAMS_MAYBE.contains(&program) && !path.exists() {
            continue;
        }
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
