//! The node's end of the guest link: connects to a VM's socket, starts a session, takes the guest's
//! control stream and its hello.
//!
//! What comes from the guest is hostile: frames are bounded, waits have an end, and one that breaks
//! the rules loses its link. A session that is cut is started anew with the secret marker.

use std::io;
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use towline_proto::frame::FrameKind;
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{GuestConfigure, GuestConfigured, GuestHello, StreamOpen};
use towline_streams::{
    FrameReader, FrameWriter, Incoming, Marker, MuxDriver, MuxHandle, MuxRecv, MuxSend, Priority,
};

use crate::hypervisor::{Vm, VmExit};

/// How often the socket of a VMM that is just starting is tried.
const RETRY: Duration = Duration::from_millis(2);
/// How long a guest may say nothing before it is connected to once more; each time it is twice as long.
/// In QEMU (7.2), what a guest writes at the very moment when its connection ends can hold its serial
/// port up until the next connection has ended, too.
const SILENT_FIRST: Duration = Duration::from_secs(2);
/// How long after its socket the end of a VMM's process may be seen.
const EXIT_SEEN_MAX: Duration = Duration::from_secs(2);
/// Longest string that is taken from a guest's hello.
const HELLO_TEXT_MAX: usize = 256;

/// Says why there is no link to a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestLinkError {
    /// The VM ended first.
    #[error("{0}")]
    Exited(VmExit),
    /// The bound passed.
    #[error("waited {waited:?} for {what}, in vain")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The guest broke the rules.
    #[error("the guest agent does not keep to the protocol: {0}")]
    Protocol(String),
    /// A guest that was configured is not any more.
    #[error("the guest began anew: its kernel crashed, or something in it rebooted it")]
    BeganAnew,
    /// The guest agent speaks another version.
    #[error("the guest agent speaks protocol {0}, this node agent {GUEST_PROTOCOL}")]
    Version(u32),
    /// The guest agent could not apply its configuration.
    #[error("the guest could not be set up: {0}")]
    Refused(String),
    /// The link broke.
    #[error("the guest link broke")]
    Io(#[from] io::Error),
}

/// The control stream of a session.
#[derive(Debug)]
pub struct Control {
    /// EVENT frames come here.
    pub events: FrameReader<MuxRecv>,
    /// COMMAND frames go here.
    pub commands: FrameWriter<MuxSend>,
}

/// One session with a guest. Dropping it ends the session, not the guest.
#[derive(Debug)]
pub struct GuestLink {
    /// Opens streams to the guest agent.
    pub handle: MuxHandle,
    /// Streams that the guest opens: the first frame of each is a `StreamOpen`.
    pub incoming: Incoming,
    /// The control stream.
    pub control: Control,
    /// What the guest said.
    pub hello: GuestHello,
    _driver: Driver,
}

/// Ends the session's task when it is dropped.
#[derive(Debug)]
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl GuestLink {
    /// Connects to a VM that has just been started or was adopted, and waits for its guest's hello.
    /// `secret` is the sandbox's `GuestConfigure.resync_marker`, whether it was already sent or not.
    pub async fn connect(
        vm: &Vm,
        secret: [u8; 32],
        bound: Duration,
    ) -> Result<Self, GuestLinkError> {
        Self::connect_as(vm, &[Marker::new(secret), Marker::BOOT], bound).await
    }

    /// As [`GuestLink::connect`], to a copy of the guest whose secret was `source`, which is about to
    /// take `secret` in its place (`Become.resync_marker`), in the midst of this session.
    pub async fn connect_copy(
        vm: &Vm,
        secret: [u8; 32],
        source: [u8; 32],
        bound: Duration,
    ) -> Result<Self, GuestLinkError> {
        Self::connect_as(vm, &[Marker::new(secret), Marker::new(source)], bound).await
    }

    async fn connect_as(
        vm: &Vm,
        markers: &[Marker],
        bound: Duration,
    ) -> Result<Self, GuestLinkError> {
        let waiting = Waiting::new(bound);
        let work = Self::connect_within(vm, markers, &waiting);
        until_exit(vm, &waiting, work).await
    }

    /// Waits, without a bound, until a guest that has just been booted answers at all.
    pub async fn answers(vm: &Vm) -> Result<(), GuestLinkError> {
        let waiting = Waiting::new(Duration::from_secs(24 * 3600));
        let work = Self::connect_within(vm, &[Marker::BOOT], &waiting);
        until_exit(vm, &waiting, work).await.map(|_| ())
    }

    /// Sends the configuration, once per boot, and waits until the guest has applied it.
    pub async fn configure(
        &mut self,
        vm: &Vm,
        configure: &GuestConfigure,
        bound: Duration,
    ) -> Result<(), GuestLinkError> {
        let waiting = Waiting::new(bound);
        waiting.now_for("the guest to set itself up (disks, mounts)");
        let control = &mut self.control;
        let work = async {
            control.commands.send_message(FrameKind::Configure, configure).await?;
            let answer = control.events.next().await?;
            let frame =
                answer.filter(|frame| frame.is(FrameKind::Configured)).ok_or_else(|| {
                    GuestLinkError::Protocol("it did not answer CONFIGURE with CONFIGURED".into())
                })?;
            let configured: GuestConfigured =
                frame.decode().map_err(|error| GuestLinkError::Protocol(error.to_string()))?;
            match configured.error {
                None => Ok(()),
                Some(error) => Err(GuestLinkError::Refused(short(&error.message))),
            }
        };
        until_exit(vm, &waiting, work).await
    }

    /// Opens a stream to the guest agent.
    pub fn open(&self, priority: Priority) -> io::Result<(MuxSend, MuxRecv)> {
        self.handle.open(priority)
    }

    async fn connect_within(
        vm: &Vm,
        markers: &[Marker],
        waiting: &Waiting,
    ) -> Result<Self, GuestLinkError> {
        let mut silent = if vm.link_can_be_held_up() { SILENT_FIRST } else { waiting.bound };
        loop {
            let socket = Self::open_socket(vm, waiting).await;
            waiting.now_for("the guest to boot and its guest agent to say hello");
            if let Ok(greeted) = timeout(silent, Self::greet(socket, markers)).await {
                return greeted;
            }
            silent *= 2;
        }
    }

    async fn open_socket(vm: &Vm, waiting: &Waiting) -> UnixStream {
        waiting.now_for("the VM to open its guest link's socket");
        loop {
            match vm.open_link().await {
                Ok(socket) => return socket,
                Err(_) => sleep(RETRY).await,
            }
        }
    }

    async fn greet(socket: UnixStream, markers: &[Marker]) -> Result<Self, GuestLinkError> {
        let mut nonce = [0; 16];
        getrandom(&mut nonce, GetRandomFlags::empty()).map_err(io::Error::from)?;
        let (handle, mut incoming, driver) = MuxDriver::host(socket, markers, nonce);
        let driver = Driver(tokio::spawn(async move {
            // Everybody who holds a part of the session is told the reason by it.
            let _ = driver.await;
        }));
        let Some((send, recv)) = incoming.next().await else {
            return Err(handle.ended().await.into());
        };
        let mut events = FrameReader::new(recv);
        let hello = read_hello(&mut events).await?;
        let control = Control { events, commands: FrameWriter::new(send) };
        Ok(Self { handle, incoming, control, hello, _driver: driver })
    }
}

async fn read_hello(events: &mut FrameReader<MuxRecv>) -> Result<GuestHello, GuestLinkError> {
    let protocol = |problem: &str| GuestLinkError::Protocol(problem.to_owned());
    let frame = events.next().await?.ok_or_else(|| protocol("its first stream is empty"))?;
    if !frame.is(FrameKind::Open) {
        return Err(protocol("its first stream does not begin with OPEN"));
    }
    let open: StreamOpen = frame.decode().map_err(|error| protocol(&error.to_string()))?;
    let Some(Kind::Control(mut hello)) = open.kind else {
        return Err(protocol("its first stream is not the control stream"));
    };
    if hello.protocol != GUEST_PROTOCOL {
        return Err(GuestLinkError::Version(hello.protocol));
    }
    for text in [&mut hello.agent_version, &mut hello.kernel_release, &mut hello.boot_id] {
        *text = short(text);
    }
    Ok(hello)
}

/// A guest's text, fit for a log line: bounded and without control characters.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(HELLO_TEXT_MAX).collect()
}

/// A bound, and what is being waited for.
#[derive(Debug)]
struct Waiting {
    start: Instant,
    bound: Duration,
    what: watch::Sender<&'static str>,
}

impl Waiting {
    fn new(bound: Duration) -> Self {
        Self { start: Instant::now(), bound, what: watch::Sender::new("the guest") }
    }

    fn now_for(&self, what: &'static str) {
        self.what.send_replace(what);
    }
}

/// Does the work unless the VM ends or the bound passes before.
async fn until_exit<T>(
    vm: &Vm,
    waiting: &Waiting,
    work: impl Future<Output = Result<T, GuestLinkError>>,
) -> Result<T, GuestLinkError> {
    let both = async {
        tokio::select! {
            biased;
            result = work => match result {
                // A VMM that dies cuts its socket a moment before its end is seen.
                Err(GuestLinkError::Io(error)) => match timeout(EXIT_SEEN_MAX, vm.wait_exit()).await {
                    Ok(exit) => Err(GuestLinkError::Exited(exit)),
                    Err(_) => Err(GuestLinkError::Io(error)),
                },
                other => other,
            },
            exit = vm.wait_exit() => Err(GuestLinkError::Exited(exit)),
        }
    };
    timeout_at(waiting.start + waiting.bound, both).await.unwrap_or_else(|_| {
        let what = *waiting.what.borrow();
        Err(GuestLinkError::TimedOut { what, waited: waiting.bound })
    })
}
