//! One attendant per running guest: holds its link, takes it up again when it is cut, hears what
//! the guest says, serves the streams that it opens, and sees the end of its VM.
//!
//! The guest is hostile: its texts are cut, its events slowed down, its streams counted, and what
//! it says decides about nothing but its own sandbox.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use towline_images::local;
use towline_node_core::{Input, Run};
use towline_proto::frame::{Frame, FrameError, FrameKind};
use towline_proto::ids::{ForkId, SandboxId};
use towline_proto::mux::GUEST_OPENED_MAX;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    Became, Become, ExitStatus, Freeze, Frozen, GuestCommand, GuestConfigure, GuestConfigured,
    GuestEvent, StreamErrorCode, Thaw, guest_command, guest_event,
};
use towline_streams::{FrameReader, Incoming, MuxHandle, MuxRecv, MuxSend};

use crate::egress::SandboxEgress;
use crate::gates::Refused;
use crate::guest_link::{Control, GuestLink, GuestLinkError};
use crate::hypervisor::{Vm, VmExit};
use crate::{local_image, streams};

/// How long a guest whose link was cut is waited for, before it counts as lost.
const RELINK_MAX: Duration = Duration::from_secs(120);
/// A link that lives shorter than this was not one.
const LINK_LIFE_MIN: Duration = Duration::from_secs(2);
/// So many of those in a row, and the guest is lost.
const SHORT_LINKS_MAX: u32 = 20;
/// Between two links.
const RELINK_PAUSE: Duration = Duration::from_millis(100);
/// A client's stream waits this long for a link that is being taken up again.
const LINK_WAIT: Duration = Duration::from_secs(20);
/// Between two events of a guest: each may cost the node a write to its disk.
const EVENT_PAUSE: Duration = Duration::from_millis(100);
/// Between two notices about a guest's local image: the control plane commits each.
const NOTICE_PAUSE: Duration = Duration::from_secs(1);
/// Until the workload is frozen: a process that waits for a disk is not before that has answered.
const FREEZE_MAX: Duration = Duration::from_secs(30);
/// Commands that wait for a link: a shutdown and a few clock settings.
const COMMANDS_MAX: usize = 8;
/// Longest text of or about a guest that is shown to people.
const TEXT_MAX: usize = 300;

/// One run's guest.
#[derive(Debug)]
pub struct Guest {
    /// Whose.
    pub sandbox: SandboxId,
    /// Which run.
    pub run: Run,
    /// Its VM.
    pub vm: Arc<Vm>,
    /// Held by who halts its VM or lets it go on; whether it is paused.
    pub orders: tokio::sync::Mutex<bool>,
    link: watch::Sender<Option<MuxHandle>>,
    commands: mpsc::Sender<GuestCommand>,
    frozen: watch::Sender<Option<Frozen>>,
}

impl Guest {
    /// Opens a stream to the guest agent, waiting for a link that is being taken up again.
    pub async fn open(
        &self,
        priority: towline_streams::Priority,
    ) -> Result<(MuxSend, MuxRecv), Refused> {
        let mut link = self.link.subscribe();
        let waiting = link.wait_for(|link| link.as_ref().is_some_and(|link| !link.is_ended()));
        let refused = |message: String| Refused::new(StreamErrorCode::NotRunning, message);
        let handle = match timeout(LINK_WAIT, waiting).await {
            Ok(Ok(handle)) => handle.clone(),
            Ok(Err(_)) => return Err(refused("the sandbox's VM has ended".into())),
            Err(_) => {
                let waited = LINK_WAIT.as_secs();
                return Err(refused(format!("the guest could not be reached for {waited} s")));
            }
        };
        let handle = handle.expect("waited for one");
        handle.open(priority).map_err(|error| {
            let message = format!("could not open a stream to the guest: {error}");
            Refused::new(StreamErrorCode::Limit, message)
        })
    }

    /// Has the guest agent freeze its workload, so that a copy can be made of it.
    pub async fn freeze(&self, fork: ForkId) -> Result<(), String> {
        self.frozen.send_replace(None);
        let mut frozen = self.frozen.subscribe();
        let command = guest_command::Command::Freeze(Freeze { fork_id: fork.to_vec() });
        if !self.command(GuestCommand { command: Some(command) }) {
            return Err("its guest agent takes no orders".into());
        }
        let fork = fork.to_vec();
        let answered = frozen.wait_for(|said| said.as_ref().is_some_and(|it| it.fork_id == fork));
        match timeout(FREEZE_MAX, answered).await {
            Ok(Ok(said)) => match said.as_ref().and_then(|said| said.error.as_ref()) {
                None => Ok(()),
                Some(error) => Err(cut(&error.message)),
            },
            Ok(Err(_)) => Err("its VM has ended".into()),
            Err(_) => {
                Err(format!("its guest agent did not answer within {} s", FREEZE_MAX.as_secs()))
            }
        }
    }

    /// Sends a command for which it waits within a bound; false when there was no room.
    pub async fn command_within(&self, command: GuestCommand, bound: Duration) -> bool {
        matches!(timeout(bound, self.commands.send(command)).await, Ok(Ok(())))
    }

    /// Sends a command when there is a link; false when too many wait already.
    pub fn command(&self, command: GuestCommand) -> bool {
        self.commands.try_send(command).is_ok()
    }
}

/// The guests of this node, by sandbox.
#[derive(Debug, Default)]
pub struct Guests {
    guests: Mutex<BTreeMap<SandboxId, Arc<Guest>>>,
    /// Their attendants, which end with the table.
    attendants: Mutex<JoinSet<()>>,
}

impl Guests {
    /// The guest of a sandbox.
    pub fn get(&self, sandbox: SandboxId) -> Option<Arc<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner).get(&sandbox).cloned()
    }

    fn put(&self, guest: Arc<Guest>) {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        guests.insert(guest.sandbox, guest);
    }

    fn remove(&self, guest: &Arc<Guest>) {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        if guests.get(&guest.sandbox).is_some_and(|other| Arc::ptr_eq(other, guest)) {
            guests.remove(&guest.sandbox);
        }
    }
}

/// What an attendant needs.
#[derive(Debug)]
pub struct Attendance {
    /// Whose guest.
    pub sandbox: SandboxId,
    /// Which run.
    pub run: Run,
    /// Its VM.
    pub vm: Arc<Vm>,
    /// Marks later sessions.
    pub secret: [u8; 32],
    /// What it may ask the node for.
    pub served: Arc<Served>,
    /// Where to tell what happens.
    pub inputs: mpsc::Sender<Input>,
    /// The newest that the guest said of being frozen.
    pub frozen: watch::Sender<Option<Frozen>>,
}

/// What serves the streams that a guest opens.
#[derive(Debug)]
pub struct Served {
    /// Its local image, if it has one.
    pub local: Option<Arc<local::Server>>,
    /// The newest that people should know about its local image; empty once it was told.
    pub notices: watch::Sender<String>,
    /// Its way out.
    pub egress: Arc<SandboxEgress>,
}

/// Attends to a guest from its first link on, until its VM has ended. Puts it into the table at
/// once, so that streams can be opened when this returns.
pub fn attend(guests: &Arc<Guests>, attendance: Attendance, link: GuestLink, opened: JoinSet<()>) {
    let (commands, waiting) = mpsc::channel(COMMANDS_MAX);
    let guest = Arc::new(Guest {
        sandbox: attendance.sandbox,
        run: attendance.run,
        vm: Arc::clone(&attendance.vm),
        orders: tokio::sync::Mutex::default(),
        link: watch::Sender::new(Some(link.handle.clone())),
        commands,
        frozen: attendance.frozen.clone(),
    });
    guests.put(Arc::clone(&guest));
    let table = Arc::downgrade(guests);
    let mut attendants = guests.attendants.lock().unwrap_or_else(PoisonError::into_inner);
    while attendants.try_join_next().is_some() {}
    attendants.spawn(async move {
        let exit = tokio::select! {
            exit = attendance.until_exit(&guest, link, opened, waiting) => exit,
            never = attendance.tell_notices() => match never {},
        };
        if let Some(guests) = table.upgrade() {
            guests.remove(&guest);
        }
        let (sandbox, run, reason) = (guest.sandbox, guest.run, exit_reason(&exit));
        tracing::info!(%sandbox, run, reason, "vm ended");
        let _ = attendance.inputs.send(Input::VmExited { sandbox, run, reason }).await;
    });
}

/// An exit in words for people.
pub fn exit_reason(exit: &VmExit) -> String {
    if exit.status == "exit status: 0" {
        return "the guest powered itself off, or its kernel crashed".into();
    }
    exit.to_string()
}

impl Attendance {
    /// Configures a guest. Serves its streams meanwhile: it wants its local image before it can
    /// answer. Returns the streams that go on.
    pub async fn configure(
        &self,
        link: &mut GuestLink,
        configure: &GuestConfigure,
        bound: Duration,
    ) -> Result<JoinSet<()>, GuestLinkError> {
        let configure = Frame::message(FrameKind::Configure, configure);
        self.ask(link, &configure, |frame| configured(Some(&frame)).map(Some), bound).await
    }

    /// Tells a copy who it is, and waits until it has become that. As `configure`.
    pub async fn become_copy(
        &self,
        link: &mut GuestLink,
        order: Become,
        bound: Duration,
    ) -> Result<JoinSet<()>, GuestLinkError> {
        let fork_id = order.fork_id.clone();
        let command = Some(guest_command::Command::Become(order));
        let order = Frame::message(FrameKind::Command, &GuestCommand { command });
        self.ask(link, &order, |frame| became(&frame, &fork_id), bound).await
    }

    /// Sends an order and waits for what answers it: `answer` takes the guest's frames until it has it.
    async fn ask(
        &self,
        link: &mut GuestLink,
        order: &Frame,
        mut answer: impl FnMut(Frame) -> Result<Option<()>, GuestLinkError>,
        bound: Duration,
    ) -> Result<JoinSet<()>, GuestLinkError> {
        let mut opened = JoinSet::new();
        let Control { events, commands } = &mut link.control;
        let ask = async {
            commands.send(order).await?;
            loop {
                let frame = events.next().await?;
                let frame = frame.ok_or_else(|| {
                    GuestLinkError::Protocol("it ended its control stream".to_owned())
                })?;
                if let Some(()) = answer(frame)? {
                    return Ok(());
                }
            }
        };
        let asked = tokio::select! {
            biased;
            asked = timeout(bound, ask) => asked,
            () = self.serve_incoming(&mut link.incoming, &mut opened) => {
                Ok(Err(link.handle.ended().await.into()))
            }
            exit = self.vm.wait_exit() => Ok(Err(GuestLinkError::Exited(exit))),
        };
        let what = "the guest to set itself up (disks, mounts)";
        asked.unwrap_or(Err(GuestLinkError::TimedOut { what, waited: bound }))?;
        Ok(opened)
    }

    async fn until_exit(
        &self,
        guest: &Guest,
        first: GuestLink,
        mut opened: JoinSet<()>,
        mut commands: mpsc::Receiver<GuestCommand>,
    ) -> VmExit {
        let (mut link, mut short) = (first, 0);
        loop {
            guest.link.send_replace(Some(link.handle.clone()));
            let since = Instant::now();
            tokio::select! {
                biased;
                exit = self.vm.wait_exit() => return exit,
                () = self.serve(&mut link, &mut opened, &mut commands) => {}
            }
            opened.shutdown().await;
            guest.link.send_replace(None);
            drop(link);
            short = if since.elapsed() < LINK_LIFE_MIN { short + 1 } else { 0 };
            link = match self.relink(short).await {
                Ok(mut link) => {
                    // The order to go on was lost with the session, unless a fork is under way.
                    if link.hello.frozen && guest.orders.try_lock().is_ok() {
                        let command = Some(guest_command::Command::Thaw(Thaw {}));
                        let thaw = GuestCommand { command };
                        let commands = &mut link.control.commands;
                        // A session that is cut again has the next one do it.
                        let _ = commands.send_message(FrameKind::Command, &thaw).await;
                    }
                    link
                }
                Err(GuestLinkError::Exited(exit)) => return exit,
                Err(error) => {
                    self.lost(crate::chain(&error)).await;
                    return self.vm.wait_exit().await;
                }
            };
        }
    }

    async fn relink(&self, short: u32) -> Result<GuestLink, GuestLinkError> {
        tracing::debug!(sandbox = %self.sandbox, "guest link was cut, taking it up again");
        if short > SHORT_LINKS_MAX {
            let problem = "it ends each session as soon as it begins".to_owned();
            return Err(GuestLinkError::Protocol(problem));
        }
        sleep(RELINK_PAUSE).await;
        let link = GuestLink::connect(&self.vm, self.secret, RELINK_MAX).await?;
        if !link.hello.configured {
            return Err(GuestLinkError::BeganAnew);
        }
        Ok(link)
    }

    async fn lost(&self, reason: String) {
        let (sandbox, run) = (self.sandbox, self.run);
        tracing::warn!(%sandbox, run, reason, "guest lost");
        let reason = format!("the guest agent is out of reach: {reason}");
        let _ = self.inputs.send(Input::GuestLost { sandbox, run, reason }).await;
    }

    /// Serves one session, until it ends.
    async fn serve(
        &self,
        link: &mut GuestLink,
        opened: &mut JoinSet<()>,
        commands: &mut mpsc::Receiver<GuestCommand>,
    ) {
        let events = self.hear(&mut link.control.events);
        let orders = async {
            while let Some(command) = commands.recv().await {
                let sent = link.control.commands.send_message(FrameKind::Command, &command).await;
                if sent.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = events => {}
            () = orders => {}
            () = self.serve_incoming(&mut link.incoming, opened) => {}
            _ = link.handle.ended() => {}
        }
    }

    /// Serves the streams that the guest opens, until the session ends.
    async fn serve_incoming(&self, incoming: &mut Incoming, opened: &mut JoinSet<()>) {
        while let Some((send, recv)) = incoming.next().await {
            while opened.try_join_next().is_some() {}
            // One too many is dropped, which resets it.
            if opened.len() < GUEST_OPENED_MAX {
                opened.spawn(serve_opened(Arc::clone(&self.served), send, recv));
            }
        }
    }

    /// Tells the newest notice, and the next one not before a pause.
    async fn tell_notices(&self) -> Infallible {
        let (sandbox, run) = (self.sandbox, self.run);
        let mut notices = self.served.notices.subscribe();
        loop {
            let some = notices.wait_for(|notice| !notice.is_empty()).await;
            drop(some.expect("we hold the sender"));
            let text = cut(&self.served.notices.send_replace(String::new()));
            tracing::info!(%sandbox, run, text, "local image");
            let _ = self.inputs.send(Input::GuestNotice { sandbox, run, text }).await;
            sleep(NOTICE_PAUSE).await;
        }
    }

    async fn hear(&self, events: &mut FrameReader<MuxRecv>) {
        let (sandbox, run) = (self.sandbox, self.run);
        loop {
            let said = match events.next().await {
                Ok(Some(frame)) => understand(&frame),
                Ok(None) | Err(_) => return,
            };
            let input = match said {
                Ok(Said::MainEnded(status)) => Input::MainExited { sandbox, run, status },
                Ok(Said::Notice(text)) => Input::GuestNotice { sandbox, run, text },
                Ok(Said::Frozen(said)) => {
                    self.frozen.send_replace(Some(said));
                    continue;
                }
                Ok(Said::Became(_) | Said::Nothing) => continue,
                Err(error) => {
                    tracing::warn!(%sandbox, %error, "guest breaks the protocol");
                    return;
                }
            };
            if self.inputs.send(input).await.is_err() {
                return;
            }
            sleep(EVENT_PAUSE).await;
        }
    }
}

/// Whether the guest's answer to CONFIGURE is that it is ready.
fn configured(frame: Option<&Frame>) -> Result<(), GuestLinkError> {
    let frame = frame.filter(|frame| frame.is(FrameKind::Configured)).ok_or_else(|| {
        GuestLinkError::Protocol("it did not answer CONFIGURE with CONFIGURED".into())
    })?;
    let answer: GuestConfigured =
        frame.decode().map_err(|error| GuestLinkError::Protocol(error.to_string()))?;
    match answer.error {
        None => Ok(()),
        Some(error) => Err(GuestLinkError::Refused(cut(&error.message))),
    }
}

/// Whether a frame is a copy's answer that it has become what it was told.
fn became(frame: &Frame, fork_id: &[u8]) -> Result<Option<()>, GuestLinkError> {
    match understand(frame).map_err(|error| GuestLinkError::Protocol(error.to_string()))? {
        Said::Became(said) if said.fork_id == fork_id => match said.error {
            None => Ok(Some(())),
            Some(error) => Err(GuestLinkError::Refused(cut(&error.message))),
        },
        // What it says besides is its source's, or comes again.
        _ => Ok(None),
    }
}

/// What a frame of the control stream means.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// The newest main command ended.
    MainEnded(ExitStatus),
    /// People should know.
    Notice(String),
    /// The workload is frozen, or could not be.
    Frozen(Frozen),
    /// A copy has become what it was told, or could not.
    Became(Became),
    /// Nothing that this node agent knows.
    Nothing,
}

/// Reads a frame that a guest sent on its control stream, and cuts its texts.
pub fn understand(frame: &Frame) -> Result<Said, FrameError> {
    if !frame.is(FrameKind::Event) {
        return Err(FrameError::Unexpected { got: frame.kind, wanted: "an EVENT" });
    }
    let event: GuestEvent = frame.decode()?;
    Ok(match event.event {
        Some(guest_event::Event::ExecEnded(ended)) if ended.main => {
            let mut status = ended.status.unwrap_or_default();
            status.reason = cut(&status.reason);
            Said::MainEnded(status)
        }
        Some(guest_event::Event::OutOfMemory(out)) => Said::Notice(cut(&out.message)),
        Some(guest_event::Event::Frozen(frozen)) => Said::Frozen(frozen),
        Some(guest_event::Event::Became(became)) => Said::Became(became),
        Some(guest_event::Event::ExecEnded(_)) | None => Said::Nothing,
    })
}

/// A text of or about a guest, fit for people and logs.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

async fn serve_opened(served: Arc<Served>, send: MuxSend, recv: MuxRecv) {
    let (mut reader, mut writer) = streams::framed(recv, send);
    let open = streams::read_open(&mut reader).await;
    let refused = match open.map(|open| open.kind) {
        Ok(Some(Kind::Fuse(_))) => match served.local.clone() {
            Some(server) => {
                return local_image::serve(server, served.notices.clone(), reader, writer).await;
            }
            None => Refused::new(StreamErrorCode::Unsupported, "this sandbox has no local image"),
        },
        Ok(Some(Kind::Egress(open))) => return served.egress.serve(open, reader, writer).await,
        Ok(Some(Kind::Lookup(open))) => return served.egress.serve_lookup(open, writer).await,
        Ok(_) => {
            Refused::new(StreamErrorCode::Unsupported, "the node serves no such stream to guests")
        }
        Err(refused) => refused,
    };
    streams::refuse(&mut writer, &refused).await;
}

/// Does to any bytes what is done to those that a guest sends on its control stream; for fuzzing.
pub fn fuzz_control(bytes: &[u8]) {
    let mut buffer = bytes::BytesMut::from(bytes);
    while let Ok(Some(frame)) = towline_proto::frame::decode(&mut buffer) {
        if let Ok(Said::Notice(text)) = understand(&frame) {
            assert!(text.chars().count() <= TEXT_MAX);
        }
        let _ = streams::open_of(&frame);
        let _ = configured(Some(&frame));
        let _ = became(&frame, b"");
        let _ = ExitStatus::decode(frame.body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towline_proto::v1::{ExecEnded, OutOfMemory};

    fn event(event: guest_event::Event) -> Frame {
        Frame::message(FrameKind::Event, &GuestEvent { event: Some(event) })
    }

    #[test]
    fn only_a_main_commands_end_is_told_and_texts_are_cut() {
        let ended = |main| {
            let status = ExitStatus { reason: "\x1b[2Jx".repeat(200), ..ExitStatus::default() };
            let status = Some(status);
            event(guest_event::Event::ExecEnded(ExecEnded { exec_id: vec![], main, status }))
        };
        assert_eq!(understand(&ended(false)), Ok(Said::Nothing));
        let Ok(Said::MainEnded(status)) = understand(&ended(true)) else { panic!("not told") };
        assert!(status.reason.chars().count() <= TEXT_MAX && !status.reason.contains('\x1b'));
        let message = "x".repeat(100_000);
        let out = event(guest_event::Event::OutOfMemory(OutOfMemory { message }));
        assert_eq!(understand(&out), Ok(Said::Notice("x".repeat(TEXT_MAX))));
        assert!(understand(&Frame::raw(FrameKind::Configure, vec![])).is_err());
        fuzz_control(&out.to_bytes());
        fuzz_control(&[32, 255, 0, 0, 0, 1]);
    }
}
