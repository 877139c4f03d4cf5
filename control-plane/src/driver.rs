//! The one task that owns the core. It gathers what arrived, steps once, and carries the effects
//! out in their order: writes to the log's thread, answers to callers, directives to nodes.
//!
//! Nothing here decides. The invariant: an effect that follows a write is only ever made by the
//! core after it was told of the write's end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use towline_control_core::{
    Answer, Caller, ControlPlane, Effect, Input, Now, Refusal, Request, RequestId, SessionId,
    WatchId,
};
use towline_proto::v1::{self, node_directive::Directive};
use tracing::{debug, error, info, warn};

use crate::api::status;
use crate::keys::unix_ms;
use crate::log_store::{LogStore, Write, Written};

/// Raft's tick.
const TICK: Duration = Duration::from_millis(100);
/// Messages that may wait for the driver; senders wait beyond it.
const INBOX_MAX: usize = 4096;
/// Inputs taken into one step.
const GATHER_MAX: usize = 1024;
/// Batches of directives that a node may be behind before its session is ended.
const SESSION_QUEUE_MAX: usize = 256;
/// Ticks between two looks for watchers that left.
const SWEEP_TICKS: u64 = 50;
/// Most watches and most sessions at once.
const WATCHES_MAX: usize = 20_000;
const SESSIONS_MAX: usize = 20_000;

/// What a watcher sees: the newest view, and whether it was the last.
#[derive(Debug, Clone, Default)]
pub struct Watched {
    /// The newest view.
    pub sandbox: Option<v1::Sandbox>,
    /// How it ended.
    pub end: Option<Result<(), Refusal>>,
}

/// A node's end of its session.
pub type Directives = mpsc::Receiver<Result<Vec<v1::NodeDirective>, tonic::Status>>;

#[derive(Debug)]
enum Message {
    Request(Caller, Request, oneshot::Sender<Result<Answer, Refusal>>),
    Watch(Caller, v1::GetSandboxRequest, watch::Sender<Watched>),
    Open(Box<v1::RegisterNode>, oneshot::Sender<(SessionId, Directives)>),
    Report(Input),
}

/// Speaks to the driver.
#[derive(Debug, Clone)]
pub struct Handle {
    inbox: mpsc::Sender<Message>,
}

impl Handle {
    /// Asks and waits for the answer.
    pub async fn request(&self, caller: Caller, request: Request) -> Result<Answer, tonic::Status> {
        let (reply, answer) = oneshot::channel();
        self.send(Message::Request(caller, request, reply)).await?;
        match tokio::time::timeout(ANSWER_MAX, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(refusal))) => Err(status(&refusal)),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(tonic::Status::unavailable(
                "the control plane did not commit it in time; it may yet be done: repeat the \
                 request with the same key",
            )),
        }
    }

    /// Watches one sandbox.
    pub async fn watch(
        &self,
        caller: Caller,
        which: v1::GetSandboxRequest,
    ) -> Result<watch::Receiver<Watched>, tonic::Status> {
        let (sender, receiver) = watch::channel(Watched::default());
        self.send(Message::Watch(caller, which, sender)).await?;
        Ok(receiver)
    }

    /// Opens a node's session.
    pub async fn open_session(
        &self,
        node: v1::RegisterNode,
    ) -> Result<(SessionId, Directives), tonic::Status> {
        let (reply, opened) = oneshot::channel();
        self.send(Message::Open(Box::new(node), reply)).await?;
        opened.await.map_err(|_| stopping())
    }

    /// Hands a node's report in.
    pub async fn report(&self, input: Input) -> Result<(), tonic::Status> {
        self.send(Message::Report(input)).await
    }

    async fn send(&self, message: Message) -> Result<(), tonic::Status> {
        self.inbox.send(message).await.map_err(|_| stopping())
    }
}

/// Longest wait for an answer. Longer than raft's own bounds, which say more.
const ANSWER_MAX: Duration = Duration::from_secs(20);

fn stopping() -> tonic::Status {
    tonic::Status::unavailable("the control plane is stopping: try again when it is back")
}

/// The task's state.
#[derive(Debug)]
pub struct Driver {
    core: ControlPlane,
    log: LogStore,
    inbox: mpsc::Receiver<Message>,
    /// Never more than the writes in flight, which the log bounds.
    written: mpsc::UnboundedReceiver<Written>,
    ticket_keys: Arc<[v1::TicketKey]>,
    callers: BTreeMap<RequestId, oneshot::Sender<Result<Answer, Refusal>>>,
    sessions: BTreeMap<SessionId, mpsc::Sender<Result<Vec<v1::NodeDirective>, tonic::Status>>>,
    watches: BTreeMap<WatchId, watch::Sender<Watched>>,
    next: u64,
    started: Instant,
    ticks: u64,
}

impl Driver {
    /// Makes the driver of a core whose log is open, and the handle to it.
    pub fn new(
        core: ControlPlane,
        log: LogStore,
        written: mpsc::UnboundedReceiver<Written>,
        ticket_keys: Vec<v1::TicketKey>,
    ) -> (Self, Handle) {
        let (sender, inbox) = mpsc::channel(INBOX_MAX);
        let driver = Self {
            core,
            log,
            inbox,
            written,
            ticket_keys: ticket_keys.into(),
            callers: BTreeMap::new(),
            sessions: BTreeMap::new(),
            watches: BTreeMap::new(),
            next: 0,
            started: Instant::now(),
            ticks: 0,
        };
        (driver, Handle { inbox: sender })
    }

    /// Runs until `stop`; an error means that the process must end now.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stop);
        loop {
            let mut inputs = Vec::new();
            tokio::select! {
                biased;
                () = &mut stop => break,
                Some(written) = self.written.recv() => self.take_written(written, &mut inputs)?,
                _ = tick.tick() => self.tick(&mut inputs),
                message = self.inbox.recv() => match message {
                    Some(message) => self.take(message, &mut inputs),
                    None => break,
                },
            }
            self.gather(&mut inputs)?;
            self.step(Input::Batch(inputs))?;
        }
        // What was accepted and not answered is answered by the connections' end; what was handed
        // to the log is written.
        self.sessions.clear();
        self.watches.clear();
        self.callers.clear();
        let log = self.log;
        tokio::task::spawn_blocking(move || log.finish()).await?;
        Ok(())
    }

    /// Takes in whatever else has arrived, so that it shares log entries and syncs.
    fn gather(&mut self, inputs: &mut Vec<Input>) -> anyhow::Result<()> {
        while inputs.len() < GATHER_MAX {
            if let Ok(written) = self.written.try_recv() {
                self.take_written(written, inputs)?;
            } else if let Ok(message) = self.inbox.try_recv() {
                self.take(message, inputs);
            } else {
                break;
            }
        }
        Ok(())
    }

    fn step(&mut self, input: Input) -> anyhow::Result<()> {
        let mono_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let effects = self.core.step(Now { mono_ms, unix_ms: unix_ms() }, input);
        for effect in effects {
            self.perform(effect)?;
        }
        Ok(())
    }

    fn tick(&mut self, inputs: &mut Vec<Input>) {
        self.ticks += 1;
        inputs.push(Input::Tick);
        if self.ticks.is_multiple_of(SWEEP_TICKS) {
            let gone = self.watches.iter().filter(|(_, sender)| sender.is_closed());
            let gone: Vec<WatchId> = gone.map(|(id, _)| *id).collect();
            for id in gone {
                self.watches.remove(&id);
                inputs.push(Input::Unwatch(id));
            }
        }
    }

    fn take_written(&mut self, written: Written, inputs: &mut Vec<Input>) -> anyhow::Result<()> {
        match written {
            Written::Persisted(number) => inputs.push(Input::Persisted(number)),
            Written::Saved(index) => {
                debug!(index, "snapshot saved");
                inputs.push(Input::SnapshotSaved(index));
            }
            Written::Failed(error) => {
                return Err(anyhow::Error::new(error).context(
                    "the log cannot be written any more; nothing unacknowledged was answered",
                ));
            }
        }
        Ok(())
    }

    fn take(&mut self, message: Message, inputs: &mut Vec<Input>) {
        self.next += 1;
        match message {
            Message::Request(caller, request, reply) => {
                let id = RequestId(self.next);
                self.callers.insert(id, reply);
                inputs.push(Input::Request(id, caller, request));
            }
            Message::Watch(caller, which, sender) => {
                let id = WatchId(self.next);
                if self.watches.len() >= WATCHES_MAX {
                    return; // the dropped sender ends the stream
                }
                self.watches.insert(id, sender);
                inputs.push(Input::Watch(id, caller, which));
            }
            Message::Open(node, reply) => {
                let id = SessionId(self.next);
                let (sender, receiver) = mpsc::channel(SESSION_QUEUE_MAX);
                if self.sessions.len() >= SESSIONS_MAX || reply.send((id, receiver)).is_err() {
                    return;
                }
                info!(node = node.name, session = id.0, "node session opens");
                self.sessions.insert(id, sender);
                inputs.push(Input::OpenSession(id, *node));
            }
            Message::Report(input) => {
                if let Input::CloseSession(id) = input {
                    self.sessions.remove(&id);
                }
                inputs.push(input);
            }
        }
    }

    fn perform(&mut self, effect: Effect) -> anyhow::Result<()> {
        match effect {
            Effect::Persist { number, entries, hard_state, sync } => {
                self.log.write(Write::Persist { number, entries, hard_state, sync })?;
            }
            Effect::InstallSnapshot { number, snapshot, hard_state, entries } => {
                self.log.write(Write::Install { number, snapshot, hard_state, entries })?;
            }
            Effect::SaveSnapshot(snapshot) => self.log.write(Write::Save(snapshot))?,
            Effect::Compact(through) => self.log.write(Write::Compact(through))?,
            // A group of one has nobody to write to.
            Effect::Send(messages) => debug!(count = messages.len(), "no other members yet"),
            Effect::Answer(id, answer) => {
                if let Some(caller) = self.callers.remove(&id) {
                    let _ = caller.send(answer);
                }
            }
            Effect::Directives(id, directives) => self.direct(id, directives),
            Effect::EndSession(id, refusal) => {
                if let Some(session) = self.sessions.remove(&id) {
                    info!(session = id.0, reason = %refusal, "node session ends");
                    let _ = session.try_send(Err(status(&refusal)));
                }
            }
            Effect::WatchUpdate(id, sandbox) => {
                if let Some(watch) = self.watches.get(&id) {
                    watch.send_modify(|watched| watched.sandbox = Some(*sandbox));
                }
            }
            Effect::WatchEnd(id, refusal) => {
                if let Some(watch) = self.watches.remove(&id) {
                    let end = refusal.map_or(Ok(()), Err);
                    watch.send_modify(|watched| watched.end = Some(end));
                }
            }
            Effect::Halt(reason) => {
                error!(%reason, "this member halts");
                anyhow::bail!("this member halts: {reason}");
            }
        }
        Ok(())
    }

    /// Hands directives to a node. One that does not take them is cut off: when it comes back it
    /// gets everything anew.
    fn direct(&mut self, id: SessionId, mut directives: Vec<v1::NodeDirective>) {
        for directive in &mut directives {
            if let Some(Directive::Registered(registered)) = &mut directive.directive {
                registered.ticket_keys = self.ticket_keys.to_vec();
            }
        }
        let Some(session) = self.sessions.get(&id) else { return };
        if session.try_send(Ok(directives)).is_err() {
            warn!(session = id.0, "node does not read its directives: session cut");
            self.sessions.remove(&id);
            // The reader of its reports sees the end and closes the session in the core.
        }
    }
}
