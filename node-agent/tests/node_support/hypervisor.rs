//! A hypervisor whose VM is a sleeping process with a socket beside it, behind which a tiny guest
//! runs in this process. Like QEMU's, the process outlives the node agent that started it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use towline_node_agent::hypervisor::{
    Accel, Capabilities, Hypervisor, HypervisorError, LINK_SOCKET, Vm, VmShape, VmSpec, Vmm,
};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    GuestCommand, GuestConfigure, GuestConfigured, GuestHello, Isolation, StreamOpen, guest_command,
};
use towline_streams::{
    FrameReader, FrameWriter, GuestSession, Marker, MuxDriver, MuxHandle, MuxRecv, MuxSend,
    Priority,
};

/// What one guest remembers, over all its sessions.
#[derive(Debug)]
struct Guest {
    pid: i32,
    configured: Option<GuestConfigure>,
    sessions: u32,
    /// The newest session's.
    handle: Option<MuxHandle>,
    halted: bool,
}

#[derive(Debug)]
pub(crate) struct Doubles {
    capabilities: Capabilities,
    /// Guests live here, in the test's runtime, not in the node agent's.
    runtime: Handle,
    guests: Mutex<Vec<Arc<Mutex<Guest>>>>,
    pub(crate) refuse_boot: Mutex<Option<String>>,
    pub(crate) template: Mutex<Template>,
    /// Shapes of which templates were wanted.
    pub(crate) wished: Mutex<Vec<VmShape>>,
}

/// The one template of all shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Template {
    Missing,
    Good,
    /// The VM ends before its guest says anything.
    Broken,
}

impl Doubles {
    pub(crate) fn new() -> Self {
        let capabilities = Capabilities {
            driver: "double",
            isolation: Isolation::Vm,
            version: "1".into(),
            accel: Accel::Tcg,
            accel_reason: String::new(),
            snapshot: true,
            hotplug: false,
            gpu: false,
            landlock: false,
            own_kernel: true,
            disk_limit: true,
            memory_limit: true,
            memory_limit_ends_commands: true,
            process_limit: true,
            missing: Vec::new(),
        };
        Self {
            capabilities,
            runtime: Handle::current(),
            guests: Mutex::default(),
            refuse_boot: Mutex::default(),
            template: Mutex::new(Template::Missing),
            wished: Mutex::default(),
        }
    }

    /// Pids of the VMs that were started, in order.
    pub(crate) fn pids(&self) -> Vec<i32> {
        self.guests.lock().unwrap().iter().map(|guest| guest.lock().unwrap().pid).collect()
    }

    /// How many sessions the VM's guest has had.
    pub(crate) fn sessions(&self, vm: usize) -> u32 {
        self.guests.lock().unwrap()[vm].lock().unwrap().sessions
    }

    /// Opens a stream to the node as the VM's guest: frames both ways.
    pub(crate) async fn open(
        &self,
        vm: usize,
        kind: Kind,
    ) -> (FrameReader<MuxRecv>, FrameWriter<MuxSend>) {
        let handle = self.guests.lock().unwrap()[vm].lock().unwrap().handle.clone().unwrap();
        let (send, recv) = handle.open(Priority::Interactive).unwrap();
        let (reader, mut writer) = (FrameReader::new(recv), FrameWriter::new(send));
        let open = StreamOpen { kind: Some(kind), ..StreamOpen::default() };
        writer.send_message(FrameKind::Open, &open).await.unwrap();
        (reader, writer)
    }

    pub(crate) fn configured(&self, vm: usize) -> GuestConfigure {
        self.try_configured(vm).unwrap()
    }

    pub(crate) fn try_configured(&self, vm: usize) -> Option<GuestConfigure> {
        self.guests.lock().unwrap()[vm].lock().unwrap().configured.clone()
    }

    /// kill -9 of a VM; returns when it has ended.
    pub(crate) async fn end(&self, vm: usize) {
        kill(self.pids()[vm]);
        let ended = async {
            while self.is_running(vm) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(super::WAIT_MAX, ended).await.expect("a killed process ends");
    }

    pub(crate) fn is_running(&self, vm: usize) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pids()[vm]));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    pub(crate) fn is_halted(&self, vm: usize) -> bool {
        self.guests.lock().unwrap()[vm].lock().unwrap().halted
    }

    pub(crate) fn end_all(&self) {
        self.pids().into_iter().for_each(kill);
    }
}

fn kill(pid: i32) {
    // It may have ended already, and the number be another's.
    if std::fs::read_link(format!("/proc/{pid}/exe")).ok() != Some(program()) {
        return;
    }
    let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
}

fn spawn(dir: &Path, seconds: &str) -> std::process::Child {
    let mut command = Command::new(program());
    command.arg(seconds).current_dir(dir).stdin(Stdio::null()).spawn().unwrap()
}

fn program() -> PathBuf {
    ["/usr/bin/sleep", "/bin/sleep"]
        .iter()
        .find_map(|path| std::fs::canonicalize(path).ok())
        .expect("there is a `sleep`")
}

impl Hypervisor for Doubles {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<Vm, HypervisorError>> {
        Box::pin(async move {
            spec.check()?;
            if let Some(reason) = self.refuse_boot.lock().unwrap().clone() {
                return Err(HypervisorError::Spec(reason));
            }
            let child = spawn(&spec.dir, "600");
            let pid = i32::try_from(child.id()).unwrap();
            let guest = Guest { pid, configured: None, sessions: 0, handle: None, halted: false };
            let guest = Arc::new(Mutex::new(guest));
            self.guests.lock().unwrap().push(Arc::clone(&guest));
            let socket = spec.dir.join(LINK_SOCKET);
            let _ = std::fs::remove_file(&socket);
            let _runtime = self.runtime.enter();
            let listener = UnixListener::bind(&socket).unwrap();
            self.runtime.spawn(serve(listener, Arc::clone(&guest)));
            let socket = spec.dir.join("qmp.sock");
            let _ = std::fs::remove_file(&socket);
            self.runtime.spawn(take_orders(UnixListener::bind(&socket).unwrap(), guest));
            Vm::started(child, &spec.dir, Vmm::Qemu)
        })
    }

    fn restore<'a>(
        &'a self,
        spec: &'a VmSpec,
    ) -> BoxFuture<'a, Result<Option<Vm>, HypervisorError>> {
        Box::pin(async move {
            let template = *self.template.lock().unwrap();
            match template {
                Template::Missing => Ok(None),
                Template::Good => self.boot(spec).await.map(Some),
                Template::Broken => {
                    Vm::started(spawn(&spec.dir, "0.2"), &spec.dir, Vmm::Qemu).map(Some)
                }
            }
        })
    }

    fn make_template(&self, shape: VmShape) -> BoxFuture<'_, Result<(), HypervisorError>> {
        self.wished.lock().unwrap().push(shape);
        Box::pin(async { Ok(()) })
    }

    fn fits(&self) -> Option<&str> {
        Some("these doubles")
    }

    fn drop_template(&self, _: VmShape) {
        *self.template.lock().unwrap() = Template::Missing;
    }

    fn adopt(&self, dir: &Path) -> Result<Option<Vm>, HypervisorError> {
        Ok(Vm::find(dir, &program(), Vmm::Qemu))
    }
}

/// Is halted and goes on, as a QEMU.
async fn take_orders(listener: UnixListener, guest: Arc<Mutex<Guest>>) {
    while let Ok((mut socket, _)) = listener.accept().await {
        let (read, mut write) = socket.split();
        let _ = write.write_all(b"{\"QMP\": {}}\n").await;
        let mut orders = BufReader::new(read).lines();
        while let Ok(Some(order)) = orders.next_line().await {
            let order: serde_json::Value = serde_json::from_str(&order).unwrap();
            let running = !guest.lock().unwrap().halted;
            let answer = serde_json::json!({ "return": { "running": running } });
            match order["execute"].as_str().unwrap() {
                "stop" => guest.lock().unwrap().halted = true,
                "cont" => guest.lock().unwrap().halted = false,
                _ => {}
            }
            let _ = write.write_all(format!("{answer}\n").as_bytes()).await;
        }
    }
}

/// One connection after another, as a chardev does it.
async fn serve(listener: UnixListener, guest: Arc<Mutex<Guest>>) {
    while let Ok((socket, _)) = listener.accept().await {
        // A host that goes away ends its session; its failure is of no interest to the next.
        let _ = connection(socket, &guest).await;
    }
}

async fn connection(socket: UnixStream, guest: &Arc<Mutex<Guest>>) -> Option<()> {
    let marker = match &guest.lock().unwrap().configured {
        Some(configure) => Marker::new(configure.resync_marker.clone().try_into().unwrap()),
        None => Marker::BOOT,
    };
    let (near, far) = tokio::io::split(socket);
    // The guest's driver takes a read of nothing for nobody being there; here it is the end.
    let (ended, end) = tokio::sync::oneshot::channel();
    let io = tokio::io::join(EndOf { inner: near, ended: Some(ended) }, far);
    let (mut sessions, driver) = MuxDriver::guest(io, marker);
    let work = async {
        while let Some(session) = sessions.next().await {
            attend(session, guest).await;
        }
    };
    tokio::select! {
        _ = driver => {}
        () = work => {}
        _ = end => {}
    }
    Some(())
}

/// Tells when the other end has hung up.
struct EndOf<R> {
    inner: R,
    ended: Option<tokio::sync::oneshot::Sender<()>>,
}

impl<R: tokio::io::AsyncRead + Unpin> tokio::io::AsyncRead for EndOf<R> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if self.ended.is_none() {
            return std::task::Poll::Pending;
        }
        let before = into.filled().len();
        let read = std::pin::Pin::new(&mut self.inner).poll_read(cx, into);
        if let std::task::Poll::Ready(result) = &read
            && (result.is_err() || into.filled().len() == before)
        {
            let _ = self.ended.take().map(|ended| ended.send(()));
        }
        read
    }
}

async fn attend(session: GuestSession, guest: &Arc<Mutex<Guest>>) {
    let GuestSession { handle, mut incoming } = session;
    guest.lock().unwrap().sessions += 1;
    guest.lock().unwrap().handle = Some(handle.clone());
    let configured = guest.lock().unwrap().configured.is_some();
    let hello = GuestHello { protocol: GUEST_PROTOCOL, configured, ..GuestHello::default() };
    let open = StreamOpen { kind: Some(Kind::Control(hello)), ..StreamOpen::default() };
    let Ok((send, recv)) = handle.open(Priority::Control) else { return };
    let (mut reader, mut writer) = (FrameReader::new(recv), FrameWriter::new(send));
    if writer.send(&Frame::message(FrameKind::Open, &open)).await.is_err() {
        return;
    }
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            stream = incoming.next() => match stream {
                Some((send, recv)) => { streams.spawn(pong(send, recv)); }
                None => return,
            },
            frame = reader.next() => match frame {
                Ok(Some(frame)) => control(&frame, &mut writer, guest).await,
                Ok(None) | Err(_) => return,
            },
        }
    }
}

async fn control(frame: &Frame, writer: &mut FrameWriter<MuxSend>, guest: &Arc<Mutex<Guest>>) {
    if frame.is(FrameKind::Configure) {
        guest.lock().unwrap().configured = Some(frame.decode().unwrap());
        let answer = Frame::message(FrameKind::Configured, &GuestConfigured::default());
        let _ = writer.send(&answer).await;
    } else if frame.is(FrameKind::Command) {
        let command: GuestCommand = frame.decode().unwrap();
        if matches!(command.command, Some(guest_command::Command::Shutdown(_))) {
            kill(guest.lock().unwrap().pid);
        }
    }
}

/// Answers a ping, and checks that the node took the ticket off.
async fn pong(send: MuxSend, recv: MuxRecv) {
    let (mut reader, mut writer) = (FrameReader::new(recv), FrameWriter::new(send));
    let Ok(Some(frame)) = reader.next().await else { return };
    let open: StreamOpen = frame.decode().unwrap();
    assert!(open.ticket.is_empty(), "the guest sees no ticket");
    if matches!(open.kind, Some(Kind::Ping(_))) {
        let _ = writer.send(&Frame::raw(FrameKind::Pong, vec![])).await;
        let _ = writer.finish().await;
    } else {
        // Holds any other stream open until the node ends it.
        while let Ok(Some(_)) = reader.next().await {}
    }
}
