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
use towline_proto::ids::SandboxId;
use towline_proto::mux::GUEST_OPENED_MAX;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    ExitStatus, GuestCommand, GuestConfigure, GuestConfigured, GuestEvent, StreamErrorCode,
    guest_event,
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
    link: watch::Sender<Option<MuxHandle>>,
    commands: mpsc::Sender<GuestCommand>,
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
        link: watch::Sender::new(Some(link.handle.clone())),
        commands,
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
        return "the guest powered itself off".into();
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
        let mut opened = JoinSet::new();
        let Control { events, commands } = &mut link.control;
        let ask = async {
            commands.send_message(FrameKind::Configure, configure).await?;
            let frame = events.next().await?;
            configured(frame.as_ref())
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
                Ok(link) => link,
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
            return Err(GuestLinkError::Protocol("it forgot its configuration".into()));
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
                Ok(Said::Nothing) => continue,
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

/// What a frame of the control stream means.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// The newest main command ended.
    MainEnded(ExitStatus),
    /// People should know.
    Notice(String),
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
