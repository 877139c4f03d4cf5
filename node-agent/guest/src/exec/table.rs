//! All execs of this guest, by id: starting twice attaches, and ended ones are forgotten oldest
//! first when there are too many.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use towline_proto::limits::EXECS_MAX;
use towline_proto::v1::{
    ExecEnded, ExecInfo, ExecList, ExecStart, ExitStatus, GuestEvent, OutOfMemory, StreamErrorCode,
    guest_event::Event,
};

use super::start::{outputs, start};
use super::{Exec, ExecKey, Life};
use crate::refusal::Refusal;
use crate::settings::Settings;
use crate::workload::Workload;

/// Events that wait for a node to connect; the oldest are dropped beyond it.
const EVENTS_MAX: usize = 256;
/// Ended execs whose spools are kept on the disk.
const SPOOLS_MAX: usize = 8;
/// Bytes of arguments that a list tells of one exec.
const LISTED_ARGV_MAX: usize = 512;

/// The execs, and what starts them.
#[derive(Debug)]
pub struct ExecTable {
    workload: Workload,
    settings: Arc<Settings>,
    execs: Mutex<Execs>,
    events: Mutex<VecDeque<GuestEvent>>,
    has_event: Notify,
}

#[derive(Debug, Default)]
struct Execs {
    by_key: BTreeMap<ExecKey, Arc<Exec>>,
    /// Keys in order of start.
    order: VecDeque<ExecKey>,
}

impl ExecTable {
    /// A table without execs.
    pub fn new(workload: Workload, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            workload,
            settings: Arc::new(settings),
            execs: Mutex::default(),
            events: Mutex::default(),
            has_event: Notify::new(),
        })
    }

    /// Where the processes live.
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// The project folder's path in the sandbox; empty without one.
    pub(crate) fn folder(&self) -> &[u8] {
        &self.settings.folder
    }

    pub(crate) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings)
    }

    /// The exec with this id, or the newest main one.
    pub(crate) fn find(&self, key: Option<ExecKey>) -> Result<Arc<Exec>, Refusal> {
        let execs = self.lock();
        let found = match key {
            Some(key) => execs.by_key.get(&key),
            None => execs.in_order().rev().find(|exec| exec.info.main),
        };
        found.cloned().ok_or_else(|| {
            let message = match key {
                Some(_) => {
                    "the sandbox does not know this command: it was restarted since, or the \
                            command ended long ago"
                }
                None => "nothing was started in this sandbox with `tow run -d` since it was booted",
            };
            Refusal::new(StreamErrorCode::UnknownExec, message)
        })
    }

    /// Starts an exec, unless it was started before; returns when its process runs.
    pub(crate) async fn start(
        self: &Arc<Self>,
        key: ExecKey,
        what: ExecStart,
    ) -> Result<Arc<Exec>, Refusal> {
        let (exec, is_new) = self.insert(key, &what)?;
        if is_new {
            // In a task of its own: a client that leaves meanwhile must not leave half an exec.
            let (table, exec) = (Arc::clone(self), Arc::clone(&exec));
            tokio::spawn(async move {
                if let Err(refusal) = start(&table, &exec, what).await {
                    table.remove(&exec.key);
                    exec.change(|state| state.life = Life::Refused(refusal));
                }
            });
        }
        exec.until(|state| match &state.life {
            Life::Starting => None,
            Life::Refused(refusal) => Some(Err(refusal.clone())),
            Life::Running(_) | Life::Ended(_) => Some(Ok(())),
        })
        .await?;
        Ok(exec)
    }

    fn insert(&self, key: ExecKey, what: &ExecStart) -> Result<(Arc<Exec>, bool), Refusal> {
        let mut execs = self.lock();
        if let Some(exec) = execs.by_key.get(&key) {
            return Ok((Arc::clone(exec), false));
        }
        execs.make_room()?;
        let [stdout, stderr] = outputs(what, &key, &self.workload)?;
        let info = ExecInfo {
            exec_id: key.to_vec(),
            argv: listed(&what.argv),
            main: what.main,
            detached: what.detached,
            terminal: what.terminal.is_some(),
            started_unix_ms: unix_ms(),
            ..ExecInfo::default()
        };
        let exec = Arc::new(Exec::new(key, info, stdout, stderr));
        execs.by_key.insert(key, Arc::clone(&exec));
        execs.order.push_back(key);
        Ok((exec, true))
    }

    fn remove(&self, key: &ExecKey) {
        self.lock().remove(key);
    }

    /// Notes an exit for the node.
    pub(crate) fn ended(&self, exec: &Exec, status: &ExitStatus) {
        if !status.reason.is_empty() {
            let message = status.reason.clone();
            self.push_event(Event::OutOfMemory(OutOfMemory { message }));
        }
        self.push_event(ended_event(exec, status));
    }

    /// Tells the node something.
    pub(crate) fn push_event(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(GuestEvent { event: Some(event) });
        drop(events);
        self.has_event.notify_one();
    }

    /// The next event for the node. Cancel-safe.
    pub async fn next_event(&self) -> GuestEvent {
        loop {
            let event = self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match event {
                Some(event) => return event,
                None => self.has_event.notified().await,
            }
        }
    }

    /// Takes an event back that could not be sent: the next session's.
    pub fn give_back(&self, event: GuestEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push_front(event);
        self.has_event.notify_one();
    }

    /// For a node that comes back: how the newest main exec ended, which it may have missed.
    pub fn repeat_main_exit(&self) {
        let Ok(exec) = self.find(None) else { return };
        let status = match &exec.lock().life {
            Life::Ended(status) => Some(status.clone()),
            Life::Running(running) => running.exited.clone(),
            Life::Starting | Life::Refused(_) => None,
        };
        if let Some(status) = status {
            self.push_event(ended_event(&exec, &status));
        }
    }

    /// What execs exist, in order of start.
    pub fn list(&self) -> ExecList {
        let execs = self.lock();
        ExecList { execs: execs.in_order().map(|exec| info(exec)).collect() }
    }

    fn lock(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Execs {
    fn in_order(&self) -> impl DoubleEndedIterator<Item = &Arc<Exec>> {
        self.order.iter().filter_map(|key| self.by_key.get(key))
    }

    fn remove(&mut self, key: &ExecKey) {
        self.by_key.remove(key);
        self.order.retain(|other| other != key);
    }

    /// Forgets ended execs where there are too many: those whose client has its exit first.
    fn make_room(&mut self) -> Result<(), Refusal> {
        let spools = self.in_order().filter(|exec| exec.info.detached && ended(exec)).count();
        if spools >= SPOOLS_MAX {
            let oldest =
                self.in_order().find(|exec| exec.info.detached && ended(exec)).map(|e| e.key);
            oldest.into_iter().for_each(|key| self.remove(&key));
        }
        if self.by_key.len() < EXECS_MAX {
            return Ok(());
        }
        let delivered = self.in_order().find(|exec| ended(exec) && exec.lock().delivered);
        let forgotten = delivered.or_else(|| self.in_order().find(|exec| ended(exec)));
        let Some(key) = forgotten.map(|exec| exec.key) else {
            return Err(Refusal::new(
                StreamErrorCode::Limit,
                format!("{EXECS_MAX} commands run in this sandbox already: end one first"),
            ));
        };
        self.remove(&key);
        Ok(())
    }
}

fn ended(exec: &Exec) -> bool {
    matches!(exec.lock().life, Life::Ended(_))
}

fn ended_event(exec: &Exec, status: &ExitStatus) -> Event {
    Event::ExecEnded(ExecEnded {
        exec_id: exec.key.to_vec(),
        main: exec.info.main,
        status: Some(status.clone()),
    })
}

fn info(exec: &Exec) -> ExecInfo {
    let mut info = exec.info.clone();
    match &exec.lock().life {
        Life::Running(running) => {
            info.pid = running.pid_inside;
            info.exited.clone_from(&running.exited);
        }
        Life::Ended(status) => info.exited = Some(status.clone()),
        Life::Starting | Life::Refused(_) => {}
    }
    info
}

/// A list of many execs must fit one frame.
fn listed(argv: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut left = LISTED_ARGV_MAX;
    let mut listed = Vec::new();
    for argument in argv {
        let len = argument.len().min(left);
        left -= len;
        listed.push(argument[..len].to_vec());
        if left == 0 || listed.len() == 32 {
            break;
        }
    }
    listed
}

fn unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
