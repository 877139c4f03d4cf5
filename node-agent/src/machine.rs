//! Carries out what the core decided about one sandbox: prepare, start, adopt, probe, stop, kill,
//! destroy. Each is a task of its own that ends with an input.
//!
//! The promise behind it: when a run is told to be over, no process of it lives. Every name derives
//! from the sandbox's id, so everything may be done twice.

mod copies;
mod pausing;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use towline_node_core::{Assignment, Failure, FoundVm, Input, ReadyKind, Record, Run};
use towline_proto::frame::FrameKind;
use towline_proto::ids::SandboxId;
use towline_proto::v1::{
    Desired, GuestCommand, Isolation, PingOpen, SetClock, Shutdown, StreamError, StreamOpen, Thaw,
    guest_command, stream_open,
};
use towline_streams::Priority;

use crate::capacity::boot_id;
use crate::disks::{self, DiskError};
use crate::egress::Egress;
use crate::egress::policy::Policy;
use crate::feed::Feeds;
use crate::forks::{Forks, Moment};
use crate::gates::Gates;
use crate::guest_configure::{guest_configure, random, unix_ns};
use crate::guest_link::GuestLink;
use crate::guests::{Attendance, Guests, Served, attend, exit_reason};
use crate::hypervisor::{Hypervisor, Hypervisors, Vm, VmSpec};
use crate::images::{Image, Images, lasting};
use crate::ready::{ReadyGuest, ReadyGuests};
use crate::store::{State, Store};
use crate::streams;
use crate::templates::Wishes;
use pausing::{ORDER_MAX, why};

/// From spawn to hello: shorter than the core's bound, so that the reason is the exact one.
const HELLO_MAX: Duration = Duration::from_secs(150);
/// From spawn to hello of a restored guest: it takes a fraction of a second, and where it does not,
/// booting is better.
const WARM_HELLO_MAX: Duration = Duration::from_secs(15);
/// Disks and mounts inside the guest.
const CONFIGURE_MAX: Duration = Duration::from_secs(60);
/// A busy guest of a restarted node agent: shorter than the core's bound, as above.
const ADOPT_MAX: Duration = Duration::from_secs(240);
const PROBE_MAX: Duration = Duration::from_secs(50);
/// A VMM that is killed may write its disks out first.
const QUIT_MAX: Duration = Duration::from_secs(2);

/// Said of a sandbox that ran here and has no disk: an empty one would look like its own.
const LOST_DISK: &str = "its disk is not on this node any more; remove the sandbox (`tow rm`) and \
                         create it anew";

/// What the tasks share.
#[derive(Debug)]
pub struct Machine {
    /// Records and folders.
    pub store: Arc<Store>,
    /// Images.
    pub images: Arc<Images>,
    /// VMs.
    pub hypervisors: Hypervisors,
    /// Running guests.
    pub guests: Arc<Guests>,
    /// Their way out.
    pub egress: Arc<Egress>,
    /// What happened to them.
    pub feeds: Arc<Feeds>,
    /// Moments of which copies are made.
    pub forks: Arc<Forks>,
    /// Whether it is open.
    pub gates: Arc<Gates>,
    /// The core's inputs.
    pub inputs: mpsc::Sender<Input>,
    /// Templates of disks.
    pub cache_dir: std::path::PathBuf,
    /// Keep consoles.
    pub console: bool,
    /// Start from templates where there are some.
    pub warm: bool,
    /// Has the missing ones made.
    pub templates: Wishes,
    /// Guests that wait for a sandbox.
    pub ready: Arc<ReadyGuests>,
    /// VMs that were started here, from the moment that they live: they are reaped with their last
    /// handle.
    pub vms: Mutex<BTreeMap<SandboxId, Arc<Vm>>>,
}

/// How a VM came to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StartedBy {
    Boot,
    Template,
    /// It waited already.
    Ready,
    /// As a copy of another one.
    Fork,
    /// An earlier node agent started it, and nobody knows how.
    Earlier,
}

impl StartedBy {
    /// As `Observed.start` says it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Boot => "cold",
            Self::Template => "warm",
            Self::Ready => "ready",
            Self::Fork => "fork",
            Self::Earlier => "",
        }
    }
}

impl Machine {
    /// What an earlier node agent left of a sandbox's VM.
    pub fn found_vm(&self, record: &Record) -> FoundVm {
        let dir = self.store.sandbox(record.assignment.sandbox);
        match self.hypervisors.adopt(&dir.vm()) {
            Ok(Some(_)) => return FoundVm::Alive,
            Ok(None) => {}
            Err(error) => {
                let (sandbox, reason) = (record.assignment.sandbox, crate::chain(&error));
                tracing::warn!(%sandbox, reason, "could not look for the sandbox's vm");
            }
        }
        let assignment = &record.assignment;
        let started = |state: &State| {
            record.came_up
                || (state.epoch, state.generation) == (assignment.epoch, assignment.generation)
        };
        match dir.state().filter(started) {
            _ if record.rest.is_some() => FoundVm::None,
            None => FoundVm::None,
            Some(state) if state.boot_id != boot_id() => {
                FoundVm::Ended { reason: "host restarted".into() }
            }
            Some(_) => {
                let what = match assignment.spec.isolation() {
                    Isolation::Unspecified | Isolation::Vm => "the VM's process",
                    Isolation::Process => "its first process",
                };
                FoundVm::Ended { reason: format!("{what} ended while the node agent was away") }
            }
        }
    }

    /// Ends the VM of a folder whose record cannot be read.
    pub async fn end_leftover(&self, sandbox: SandboxId) {
        if let Err(reason) = self.end_vm(sandbox).await {
            tracing::error!(%sandbox, reason, "vm of an unknown sandbox could not be ended");
        }
    }

    /// `Effect::Prepare`.
    pub async fn prepare(self: Arc<Self>, run: Run, assignment: Assignment) {
        let sandbox = assignment.sandbox;
        let result = match self.driver(&assignment) {
            Err(refusal) => Err(refusal),
            Ok(driver) => match self.prepare_fork(run, &assignment, driver).await {
                Err(refusal) => Err(refusal),
                Ok(moment) => self.prepare_blocking(run, assignment, moment).await,
            },
        };
        let input = match result {
            Ok(image_digest) => Input::Prepared { sandbox, run, image_digest },
            Err(failure) => {
                tracing::warn!(%sandbox, run, reason = failure.reason, "preparation failed");
                Input::PrepareFailed { sandbox, run, failure }
            }
        };
        self.tell(input).await;
    }

    /// The driver that the sandbox asks for, or why there is none: never another one instead.
    fn driver(&self, assignment: &Assignment) -> Result<&Arc<dyn Hypervisor>, Failure> {
        self.hypervisors.get(assignment.spec.isolation()).ok_or_else(|| {
            lasting(match assignment.spec.isolation() {
                Isolation::Unspecified | Isolation::Vm => "this node runs no VMs".into(),
                Isolation::Process => "this node does not allow `--isolation process`: leave it \
                     away, or set `isolation_process = true` in the node agent's configuration"
                    .into(),
            })
        })
    }

    async fn prepare_blocking(
        self: &Arc<Self>,
        run: Run,
        assignment: Assignment,
        moment: Option<Moment>,
    ) -> Result<String, Failure> {
        let machine = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let sandbox = assignment.sandbox;
            let dir = machine.store.sandbox(sandbox);
            dir.create().map_err(|error| transient(&error))?;
            if assignment.ran && !dir.upper().exists() {
                return Err(lasting(LOST_DISK.into()));
            }
            if let Some(moment) = &moment {
                // Of an earlier try that has come to nothing.
                moment.give_disk(&dir)?;
            }
            let mut progress = |text: String| {
                // Progress that does not fit is not worth waiting for.
                let _ = machine.inputs.try_send(Input::PrepareProgress { sandbox, run, text });
            };
            let image = machine.images.prepare(&assignment, &dir, &mut progress)?;
            let disk_mib = assignment.spec.shape.unwrap_or_default().disk_mib;
            disks::create(&machine.cache_dir, &dir.upper(), disk_mib).map_err(
                |error| match error {
                    DiskError::Io { .. } => transient(&error),
                    _ => lasting(crate::chain(&error)),
                },
            )?;
            Ok(image.digest)
        });
        work.await.unwrap_or_else(|error| Err(lasting(format!("preparing it broke: {error}"))))
    }

    /// `Effect::StartVm`.
    pub async fn start(self: Arc<Self>, run: Run, assignment: Assignment) {
        let result = self.start_vm(run, &assignment).await;
        self.started(run, &assignment, result).await;
    }

    /// `Effect::AdoptVm`.
    pub async fn adopt(self: Arc<Self>, run: Run, assignment: Assignment) {
        if assignment.desired == Desired::Paused {
            return self.adopt_paused(run, assignment.sandbox).await;
        }
        let result = self.adopt_vm(run, &assignment).await;
        self.started(run, &assignment, result).await;
    }

    async fn started(&self, run: Run, assignment: &Assignment, result: Result<StartedBy, Failure>) {
        let sandbox = assignment.sandbox;
        let result = result.and_then(|by| Ok((by, self.driver(assignment)?)));
        let input = match result {
            Ok((by, driver)) => {
                tracing::info!(%sandbox, run, by = by.as_str(), "vm started");
                let capabilities = driver.capabilities();
                let driver = capabilities.driver.to_owned();
                let isolation = capabilities.isolation().to_owned();
                Input::VmStarted { sandbox, run, driver, isolation, start: by.as_str().into() }
            }
            Err(failure) => {
                tracing::warn!(%sandbox, run, reason = failure.reason, "vm failed");
                Input::VmFailed { sandbox, run, failure }
            }
        };
        self.tell(input).await;
    }

    async fn start_vm(
        self: &Arc<Self>,
        run: Run,
        assignment: &Assignment,
    ) -> Result<StartedBy, Failure> {
        let secret = random::<32>().map_err(|error| transient(&error))?;
        // Of one that was started before, its disk may hold something.
        let first = !assignment.ran && self.store.sandbox(assignment.sandbox).state().is_none();
        let (image, spec) = self.spec(assignment, Some(secret)).await?;
        let driver = self.driver(assignment)?;
        let room = self.ready.room().await;
        room.map_err(|reason| Failure { reason, transient: true })?;
        if let Some(fork) = assignment.copies() {
            let moment = self.forks.open(fork.id, driver.as_ref())?;
            let vm = driver.start_copy(&spec, &moment.saved()).await;
            let vm = Arc::new(vm.map_err(|error| transient(&error))?);
            let vm = self.started_vm(assignment.sandbox, vm);
            let attendance = self.attendance(run, assignment, &vm, secret, Some(&image));
            self.take_up_copy(attendance, assignment, fork.id, &moment).await?;
            return Ok(StartedBy::Fork);
        }
        if driver.capabilities().snapshot && self.warm {
            let kind = ready_kind(assignment, &spec);
            let ready = if first { self.ready.claim(&kind) } else { None };
            self.ready.started(kind);
            if let Some(ready) = ready {
                match self.take_ready(run, assignment, &image, ready).await {
                    Ok(()) => return Ok(StartedBy::Ready),
                    Err(Failure { reason, .. }) => {
                        let sandbox = assignment.sandbox;
                        tracing::warn!(%sandbox, reason, "ready guest fails, another is started");
                        self.keep_state(assignment, secret).await?;
                    }
                }
            }
        }
        let take_up = async |vm, bound| {
            let vm = self.started_vm(assignment.sandbox, Arc::new(vm));
            let attendance = self.attendance(run, assignment, &vm, secret, Some(&image));
            self.take_up(attendance, assignment, Some(&image), bound, None).await
        };
        let mut not_warm = false;
        if let Some(vm) = self.restore(driver.as_ref(), &spec).await {
            match take_up(vm, WARM_HELLO_MAX).await {
                Ok(()) => return Ok(StartedBy::Template),
                Err(Failure { reason, .. }) => {
                    let sandbox = assignment.sandbox;
                    tracing::warn!(%sandbox, reason, "restored guest fails, it is booted instead");
                    not_warm = true;
                }
            }
        }
        let vm = driver.boot(&spec).await.map_err(|error| transient(&error))?;
        // What fails in both ways is the sandbox's own fault.
        take_up(vm, HELLO_MAX).await?;
        if not_warm {
            driver.drop_template(spec.shape());
        }
        if driver.capabilities().snapshot {
            self.templates.wish_for(spec.shape());
        }
        Ok(StartedBy::Boot)
    }

    /// A VM from the template of its shape, if there is one that can be used.
    async fn restore(&self, driver: &dyn Hypervisor, spec: &VmSpec) -> Option<Vm> {
        if !self.warm {
            return None;
        }
        driver.restore(spec).await.unwrap_or_else(|error| {
            tracing::warn!(reason = crate::chain(&error), "template not used");
            None
        })
    }

    /// Gives a sandbox that has not run yet a guest that was ready. On failure nothing of it lives.
    async fn take_ready(
        self: &Arc<Self>,
        run: Run,
        assignment: &Assignment,
        image: &Image,
        ready: ReadyGuest,
    ) -> Result<(), Failure> {
        let (dir, secret) = (self.store.sandbox(assignment.sandbox), ready.secret);
        // The secret first: a node agent that comes back needs it for whatever it finds.
        self.keep_state(assignment, secret).await?;
        let taken = dir.take(&ready.folder);
        let (vm, link) = ready.take();
        if let Err(error) = taken {
            end(&vm).await;
            return Err(transient(&error));
        }
        let vm = self.started_vm(assignment.sandbox, vm);
        let attendance = self.attendance(run, assignment, &vm, secret, Some(image));
        self.take_up(attendance, assignment, Some(image), CONFIGURE_MAX, Some(link)).await
    }

    fn started_vm(&self, sandbox: SandboxId, vm: Arc<Vm>) -> Arc<Vm> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(sandbox, Arc::clone(&vm));
        vm
    }

    async fn adopt_vm(
        self: &Arc<Self>,
        run: Run,
        assignment: &Assignment,
    ) -> Result<StartedBy, Failure> {
        let dir = self.store.sandbox(assignment.sandbox);
        let found = self.hypervisors.adopt(&dir.vm()).map_err(|error| transient(&error))?;
        let Some(vm) = found.map(Arc::new) else {
            return Err(lasting("the VM ended before it could be taken up again".into()));
        };
        // An earlier node agent may have died while it was halted, to be paused or saved.
        vm.open_link_ahead().await;
        match timeout(ORDER_MAX, vm.resume()).await {
            Ok(Ok(was_halted)) if was_halted => {
                tracing::info!(sandbox = %assignment.sandbox, "vm was halted, it goes on");
            }
            Ok(Ok(_)) => {}
            failed => {
                end(&vm).await;
                return Err(lasting(format!("the VM takes no orders: {}", why(failed))));
            }
        }
        let secret = dir.state().and_then(|state| state.resync_marker.try_into().ok());
        let Some(secret) = secret else {
            end(&vm).await;
            return Err(lasting("the VM's secret was lost, so that nobody can talk to it".into()));
        };
        // A running guest has its image; only a local one is still served from here.
        let image = match self.spec(assignment, None).await {
            Ok((image, _)) => Some(image),
            Err(Failure { reason, .. }) => {
                tracing::error!(sandbox = %assignment.sandbox, reason, "image out of reach");
                None
            }
        };
        let attendance = self.attendance(run, assignment, &vm, secret, image.as_ref());
        self.take_up(attendance, assignment, image.as_ref(), ADOPT_MAX, None).await?;
        Ok(StartedBy::Earlier)
    }

    fn attendance(
        &self,
        run: Run,
        assignment: &Assignment,
        vm: &Arc<Vm>,
        secret: [u8; 32],
        image: Option<&Image>,
    ) -> Attendance {
        let sandbox = assignment.sandbox;
        let egress = self.egress.of_sandbox(
            sandbox,
            Policy::of_spec(&assignment.spec.policy),
            self.feeds.of(sandbox),
            Arc::clone(&self.gates),
        );
        Attendance {
            sandbox,
            run,
            vm: Arc::clone(vm),
            secret,
            served: Arc::new(Served {
                local: image.and_then(|image| image.local.clone()),
                notices: watch::Sender::default(),
                egress,
            }),
            inputs: self.inputs.clone(),
            frozen: watch::Sender::default(),
        }
    }

    /// Looks the image up and, before a start, keeps the state that an adoption needs.
    async fn spec(
        self: &Arc<Self>,
        assignment: &Assignment,
        starting: Option<[u8; 32]>,
    ) -> Result<(Image, VmSpec), Failure> {
        let (machine, assignment) = (Arc::clone(self), assignment.clone());
        let work = tokio::task::spawn_blocking(move || {
            let dir = machine.store.sandbox(assignment.sandbox);
            let image = machine.images.prepare(&assignment, &dir, &mut |_| {})?;
            if let Some(secret) = starting {
                let state = state(&assignment, secret);
                dir.set_state(&state).map_err(|error| transient(&error))?;
            }
            let shape = assignment.spec.shape.unwrap_or_default();
            let spec = VmSpec {
                cpus: shape.cpus,
                memory_mib: shape.memory_mib,
                processes_max: shape.processes_max,
                layers: image.layers.clone(),
                upper: Some(dir.upper()),
                dir: dir.vm(),
                console: machine.console,
            };
            Ok((image, spec))
        });
        work.await.unwrap_or_else(|error| Err(lasting(format!("starting it broke: {error}"))))
    }

    /// Keeps the state that an adoption needs.
    async fn keep_state(&self, assignment: &Assignment, secret: [u8; 32]) -> Result<(), Failure> {
        let (dir, state) = (self.store.sandbox(assignment.sandbox), state(assignment, secret));
        let kept = tokio::task::spawn_blocking(move || dir.set_state(&state)).await;
        let kept = kept.map_err(|error| lasting(format!("keeping its state broke: {error}")))?;
        kept.map_err(|error| transient(&error))
    }

    /// Waits for the guest, unless it has been greeted, configures it if it was not, and has it attended
    /// to. On failure nothing of the VM lives.
    async fn take_up(
        &self,
        attendance: Attendance,
        assignment: &Assignment,
        image: Option<&Image>,
        bound: Duration,
        greeted: Option<GuestLink>,
    ) -> Result<(), Failure> {
        let vm = Arc::clone(&attendance.vm);
        let talk = async {
            let mut link = match greeted {
                Some(link) => link,
                None => GuestLink::connect(&vm, attendance.secret, bound)
                    .await
                    .map_err(|error| transient(&error))?,
            };
            let hello = &link.hello;
            tracing::debug!(
                sandbox = %attendance.sandbox, kernel = hello.kernel_release,
                agent = hello.agent_version, configured = hello.configured, "guest said hello",
            );
            let mut opened = JoinSet::new();
            if link.hello.configured {
                // It may have been halted for long.
                let clock = guest_command::Command::SetClock(SetClock { unix_ns: unix_ns() });
                let thaw = guest_command::Command::Thaw(Thaw {});
                let thaw = link.hello.frozen.then_some(thaw);
                for command in [Some(clock), thaw].into_iter().flatten() {
                    let command = GuestCommand { command: Some(command) };
                    let sent = link.control.commands.send_message(FrameKind::Command, &command);
                    sent.await.map_err(|error| transient(&error))?;
                }
            } else {
                let image = image.ok_or_else(|| lasting("it has no image".into()))?;
                let configure = guest_configure(assignment, image, attendance.secret)
                    .map_err(|error| transient(&error))?;
                let configured = attendance.configure(&mut link, &configure, CONFIGURE_MAX);
                opened = configured.await.map_err(|error| transient(&error))?;
            }
            Ok((link, opened))
        };
        let talked = talk.await;
        self.attend_or_end(attendance, talked).await
    }

    /// Has a guest attended to that was talked to; of one that was not, nothing lives afterwards.
    async fn attend_or_end(
        &self,
        attendance: Attendance,
        talked: Result<(GuestLink, JoinSet<()>), Failure>,
    ) -> Result<(), Failure> {
        match talked {
            Ok((link, opened)) => {
                attend(&self.guests, attendance, link, opened);
                Ok(())
            }
            Err(failure) => {
                end(&attendance.vm).await;
                Err(failure)
            }
        }
    }

    /// `Effect::Probe`: a ping through the very path that clients' streams take.
    pub async fn probe(self: Arc<Self>, sandbox: SandboxId, run: Run) {
        let answer = timeout(PROBE_MAX, self.ping(sandbox)).await;
        let input = match answer.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok(()) => Input::ProbeAnswered { sandbox, run },
            Err(reason) => Input::ProbeFailed { sandbox, run, reason },
        };
        self.tell(input).await;
    }

    async fn ping(&self, sandbox: SandboxId) -> Result<(), String> {
        let guest = self.guests.get(sandbox).ok_or("it has no guest")?;
        let (send, recv) =
            guest.open(Priority::Control).await.map_err(|refused| refused.message)?;
        let (mut reader, mut writer) = streams::framed(recv, send);
        let kind = Some(stream_open::Kind::Ping(PingOpen { guest: true }));
        let open = StreamOpen { kind, ..StreamOpen::default() };
        let sent = writer.send_message(FrameKind::Open, &open).await;
        sent.map_err(|error| error.to_string())?;
        match reader.next().await {
            Ok(Some(frame)) if frame.is(FrameKind::Pong) => Ok(()),
            Ok(Some(frame)) if frame.is(FrameKind::Error) => {
                let error = StreamError::decode(frame.body).unwrap_or_default();
                Err(error.message.chars().filter(|c| !c.is_control()).take(300).collect())
            }
            Ok(_) => Err("it answered something else".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// `Effect::StopVm`. The attendant tells the end; a guest that cannot be told meets the core's
    /// deadline.
    pub fn stop(&self, sandbox: SandboxId, grace: Duration) {
        let Some(guest) = self.guests.get(sandbox) else { return };
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let command = Some(guest_command::Command::Shutdown(Shutdown { grace_ms }));
        if !guest.command(GuestCommand { command }) {
            tracing::warn!(%sandbox, "guest takes no commands, it will be killed");
        }
    }

    /// `Effect::KillVm`, after the run's work has been given up.
    pub async fn kill(self: Arc<Self>, sandbox: SandboxId, run: Run) {
        let reason = match self.end_vm(sandbox).await {
            Ok(reason) => reason,
            Err(reason) => {
                // The core asks again: a run is over only when nothing of it lives.
                tracing::error!(%sandbox, run, reason, "vm could not be ended");
                return;
            }
        };
        self.tell(Input::VmExited { sandbox, run, reason }).await;
    }

    /// `Effect::Destroy`, after the sandbox's work has been given up.
    pub async fn destroy(self: Arc<Self>, sandbox: SandboxId) {
        let input = match self.remove(sandbox).await {
            Ok(freed_bytes) => {
                tracing::info!(%sandbox, freed_bytes, "sandbox destroyed");
                Input::Destroyed { sandbox, freed_bytes }
            }
            Err(reason) => {
                tracing::error!(%sandbox, reason, "sandbox could not be destroyed");
                Input::DestroyFailed { sandbox, reason }
            }
        };
        self.tell(input).await;
    }

    async fn remove(&self, sandbox: SandboxId) -> Result<u64, String> {
        if let Some(guest) = self.guests.get(sandbox) {
            guest.vm.kill().map_err(|error| error.to_string())?;
        }
        self.end_vm(sandbox).await?;
        let dir = self.store.sandbox(sandbox);
        let removed = tokio::task::spawn_blocking(move || dir.remove()).await;
        match removed {
            Ok(result) => result.map_err(|error| crate::chain(&error)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends whatever VM runs in the sandbox's folder.
    async fn end_vm(&self, sandbox: SandboxId) -> Result<String, String> {
        let known = self.vms.lock().unwrap_or_else(PoisonError::into_inner).remove(&sandbox);
        let vm = match (self.guests.get(sandbox), known) {
            (Some(guest), _) => Some(Arc::clone(&guest.vm)),
            (None, Some(vm)) => Some(vm),
            (None, None) => {
                let dir = self.store.sandbox(sandbox).vm();
                self.hypervisors.adopt(&dir).map_err(|error| crate::chain(&error))?.map(Arc::new)
            }
        };
        let Some(vm) = vm else { return Ok("it had no VM".into()) };
        vm.quit(QUIT_MAX).await.map(|exit| exit_reason(&exit)).map_err(|error| error.to_string())
    }

    async fn tell(&self, input: Input) {
        // Nobody listens only when the node agent stops.
        let _ = self.inputs.send(input).await;
    }
}

/// What is kept of a start.
fn state(assignment: &Assignment, secret: [u8; 32]) -> State {
    State {
        resync_marker: secret.to_vec(),
        boot_id: boot_id(),
        epoch: assignment.epoch,
        generation: assignment.generation,
    }
}

/// What a guest must be ready for to become this sandbox's.
fn ready_kind(assignment: &Assignment, spec: &VmSpec) -> ReadyKind {
    ReadyKind {
        layers: spec.layers.clone(),
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        disk_mib: assignment.spec.shape.unwrap_or_default().disk_mib,
    }
}

async fn end(vm: &Vm) {
    if let Err(error) = vm.kill() {
        tracing::error!(%error, dir = %vm.dir().display(), "vm could not be killed");
    }
    vm.wait_exit().await;
}

fn transient(error: &dyn std::error::Error) -> Failure {
    Failure { reason: crate::chain(error), transient: true }
}
