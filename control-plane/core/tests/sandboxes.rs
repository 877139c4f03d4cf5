//! One member in memory: what creation, stops, starts, removal and reports do to reservations,
//! generations and repeated requests.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use towline_control_core::{
    Answer, Caller, Config, ControlPlane, Effect, Input, Now, Recovered, Refusal, RefusalKind,
    Request, RequestId, Role, SessionId, WatchId, invariants,
};
use towline_proto::v1::{self, Desired, Phase, node_directive::Directive};

const SESSION: SessionId = SessionId(1);

struct World {
    core: ControlPlane,
    now: u64,
    key: u64,
    sequence: u64,
    log: Vec<v1::LogEntry>,
    hard: v1::HardState,
    seen: Vec<Effect>,
}

fn config() -> Config {
    Config {
        member: 1,
        voters: vec![1],
        cluster_id: "cluster_t".into(),
        seed: [1, 2],
        snapshot_entries: 1000,
    }
}

impl World {
    fn new() -> Self {
        let core = ControlPlane::new(config(), Recovered::default()).unwrap();
        let (hard, log) = (v1::HardState::default(), Vec::new());
        let mut world = Self { core, now: 0, key: 0, sequence: 0, log, hard, seen: Vec::new() };
        world.input(Input::Tick);
        world.register(8192);
        world
    }

    /// Steps, and is a disk that is done at once.
    fn input(&mut self, input: Input) {
        let mut todo = vec![input];
        while let Some(input) = todo.pop() {
            let now = Now { mono_ms: self.now, unix_ms: 1_000_000 + self.now };
            for effect in self.core.step(now, input) {
                if let Effect::Persist { number, entries, hard_state, .. } = &effect {
                    self.log.extend(entries.clone());
                    self.hard = hard_state.unwrap_or(self.hard);
                    todo.insert(0, Input::Persisted(*number));
                }
                self.seen.push(effect);
            }
            invariants::check(self.core.state()).unwrap();
        }
    }

    fn register(&mut self, memory_mib: u64) {
        let driver = v1::Driver {
            name: "vm".into(),
            isolation: v1::Isolation::Vm.into(),
            fork: true,
            ..Default::default()
        };
        let node = v1::RegisterNode {
            name: "n".into(),
            capacity: Some(v1::Capacity { cpus: 16, memory_mib, disk_mib: 100_000 }),
            drivers: vec![driver],
            embedded: true,
            machine_cpus: 2,
            ..Default::default()
        };
        self.input(Input::OpenSession(SESSION, node));
    }

    fn ask(&mut self, name: &str, request: Request) -> Result<Answer, Refusal> {
        self.key += 1;
        let id = RequestId(self.key);
        let role = if name == "root" { Role::Operator } else { Role::User };
        self.input(Input::Request(id, Caller { role, name: name.into() }, request));
        let answers = self.seen.iter().rev();
        let mut answers = answers.filter_map(|effect| match effect {
            Effect::Answer(to, answer) if *to == id => Some(answer.clone()),
            _ => None,
        });
        answers.next().expect("every request is answered")
    }

    fn key(&mut self) -> Vec<u8> {
        self.key += 1;
        [b"a key---".to_vec(), self.key.to_be_bytes().to_vec()].concat()
    }

    fn create(&mut self, name: &str, memory_mib: u64) -> Result<v1::Sandbox, Refusal> {
        let idempotency_key = self.key();
        self.create_with(idempotency_key, name, memory_mib)
    }

    fn create_with(
        &mut self,
        idempotency_key: Vec<u8>,
        name: &str,
        memory_mib: u64,
    ) -> Result<v1::Sandbox, Refusal> {
        let source = Some(v1::image_ref::Source::Local(v1::LocalImage::default()));
        let spec = v1::SandboxSpec {
            name: name.into(),
            image: Some(v1::ImageRef { source }),
            shape: Some(v1::Shape { memory_mib, ..Default::default() }),
            ..Default::default()
        };
        let request = v1::CreateSandboxRequest { idempotency_key, spec: Some(spec) };
        self.ask("ada", Request::CreateSandbox(request)).map(sandbox)
    }

    fn expire(&mut self, id: &[u8], ttl_s: u64) -> Result<v1::Sandbox, Refusal> {
        let idempotency_key = self.key();
        let request = v1::SetExpiryRequest { idempotency_key, id: id.to_vec(), ttl_s };
        self.ask("ada", Request::SetExpiry(request)).map(sandbox)
    }

    /// Lets time pass as the driver does: by ticks.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now += 100;
            self.input(Input::Tick);
        }
    }

    fn set(&mut self, id: &[u8], desired: Desired) -> Result<v1::Sandbox, Refusal> {
        let request = v1::SetDesiredRequest {
            idempotency_key: self.key(),
            id: id.to_vec(),
            desired: desired.into(),
            expect_generation: 0,
        };
        self.ask("ada", Request::SetDesired(request)).map(sandbox)
    }

    fn resize(&mut self, id: &[u8], cpus: u32, memory_mib: u64) -> Result<v1::Sandbox, Refusal> {
        let (idempotency_key, id) = (self.key(), id.to_vec());
        let request = v1::ResizeSandboxRequest { idempotency_key, id, cpus, memory_mib };
        self.ask("ada", Request::ResizeSandbox(request)).map(sandbox)
    }

    fn report(&mut self, of: &v1::Sandbox, phase: Phase) {
        self.sequence += 1;
        let observed = v1::Observed {
            sandbox_id: of.id.clone(),
            epoch: of.epoch,
            generation: of.generation,
            phase: phase.into(),
            ..Default::default()
        };
        let batch = v1::ObservedBatch { sequence: self.sequence, observed: vec![observed] };
        self.input(Input::Observed(SESSION, batch));
    }

    fn get(&mut self, id: &[u8]) -> Result<v1::Sandbox, Refusal> {
        let which = Some(v1::get_sandbox_request::Which::Id(id.to_vec()));
        self.ask("ada", Request::GetSandbox(v1::GetSandboxRequest { which })).map(sandbox)
    }

    fn reserved(&self) -> v1::Capacity {
        let (_, record) = self.core.state().nodes.iter().next().unwrap();
        record.node.as_ref().unwrap().reserved.unwrap()
    }

    fn directives(&self) -> Vec<Directive> {
        let sent = self.seen.iter().filter_map(|effect| match effect {
            Effect::Directives(_, directives) => Some(directives.clone()),
            _ => None,
        });
        sent.flatten().filter_map(|directive| directive.directive).collect()
    }
}

fn sandbox(answer: Answer) -> v1::Sandbox {
    match answer {
        Answer::Sandbox(sandbox) => *sandbox,
        other => panic!("not a sandbox: {other:?}"),
    }
}

fn phase(sandbox: &v1::Sandbox) -> Phase {
    sandbox.observed.as_ref().map(v1::Observed::phase).unwrap()
}

#[test]
fn stopping_gives_cpu_and_memory_back_and_keeps_the_disk() {
    let mut world = World::new();
    let made = world.create("one", 6000).unwrap();
    assert_eq!(made.spec.as_ref().unwrap().shape.unwrap().cpus, 2, "min(4, the machine's)");
    assert_eq!((world.reserved().memory_mib, world.reserved().disk_mib), (6000, 20 << 10));
    world.report(&made, Phase::Running);
    let stopped = world.set(&made.id, Desired::Stopped).unwrap();
    assert_eq!(world.reserved().memory_mib, 6000, "it still runs");
    world.report(&stopped, Phase::Stopped);
    assert_eq!((world.reserved().memory_mib, world.reserved().disk_mib), (0, 20 << 10));
    world.create("two", 6000).unwrap();
    let refused = world.set(&made.id, Desired::Running).unwrap_err();
    assert!(refused.message.contains("needs 5.8 GiB of memory and node `n`"), "{refused}");
    assert_eq!(phase(&world.get(&made.id).unwrap()), Phase::Stopped);
}

#[test]
fn another_shape_is_reserved_by_the_next_start() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    world.report(&made, Phase::Running);
    let same = world.resize(&made.id, 0, 1000).unwrap();
    assert_eq!(same.generation, made.generation, "it has that much");
    let running = world.resize(&made.id, 0, 2000).unwrap_err();
    assert!(running.message.contains("`tow stop one`"), "{running}");
    let stopped = world.set(&made.id, Desired::Stopped).unwrap();
    world.resize(&made.id, 0, 2000).expect_err("its node has not stopped it yet");
    world.report(&stopped, Phase::Stopped);
    let resized = world.resize(&made.id, 0, 6000).unwrap();
    let shape = resized.spec.as_ref().unwrap().shape.unwrap();
    assert_eq!((shape.cpus, shape.memory_mib, shape.disk_mib), (2, 6000, 20 << 10));
    assert_eq!((world.reserved().memory_mib, world.reserved().disk_mib), (0, 20 << 10));
    let told = world.directives().into_iter().rev().find_map(|directive| match directive {
        Directive::Desired(desired) => desired.spec.and_then(|spec| spec.shape),
        _ => None,
    });
    assert_eq!(told, Some(shape));
    world.report(&resized, Phase::Stopped);
    let started = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!((world.reserved().memory_mib, world.reserved().cpus), (6000, 2));
    world.report(&started, Phase::Running);
    let stopped = world.set(&made.id, Desired::Stopped).unwrap();
    world.report(&stopped, Phase::Stopped);
    assert_eq!(world.reserved().memory_mib, 0);
}

#[test]
fn no_shape_is_given_that_could_never_start() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    world.report(&made, Phase::Failed);
    assert_eq!(world.resize(&made.id, 0, 0).unwrap_err().kind, RefusalKind::Invalid);
    assert_eq!(world.resize(&made.id, 0, 1).unwrap_err().kind, RefusalKind::Invalid);
    let large = world.resize(&made.id, 0, 9000).unwrap_err();
    assert!(large.message.contains("offers 8 GiB of memory in all"), "{large}");
    let many = world.resize(&made.id, 17, 0).unwrap_err();
    assert!(many.message.contains("offers 16 CPUs in all, and 17 CPUs are asked"), "{many}");
    // It was wanted running: a node that starts what it is told of anew has nothing reserved.
    let resized = world.resize(&made.id, 1, 0).unwrap();
    assert_eq!(resized.desired(), Desired::Stopped);
    assert_eq!(world.reserved().memory_mib, 0);
    let (idempotency_key, id) = (world.key(), made.id.clone());
    let request = v1::ResizeSandboxRequest { idempotency_key, id, cpus: 2, memory_mib: 0 };
    let other = world.ask("eve", Request::ResizeSandbox(request)).unwrap_err();
    assert_eq!(other.kind, RefusalKind::NotFound);
    world.set(&made.id, Desired::Deleted).unwrap();
    assert_eq!(world.resize(&made.id, 2, 0).unwrap_err().kind, RefusalKind::Precondition);
}

#[test]
fn a_vm_that_ended_by_itself_starts_again_only_by_a_new_generation() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    world.report(&made, Phase::Running);
    let same = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!(same.generation, 1, "it is wanted so already");
    world.report(&made, Phase::Stopped);
    world.report(&made, Phase::Running);
    assert_eq!(phase(&world.get(&made.id).unwrap()), Phase::Stopped, "not at the same generation");
    let again = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!((again.generation, phase(&again)), (2, Phase::Placed));
    world.report(&made, Phase::Stopped);
    assert_eq!(phase(&world.get(&made.id).unwrap()), Phase::Placed, "stale reports are ignored");
    assert_eq!(world.reserved().memory_mib, 1000);
}

#[test]
fn a_removed_sandbox_frees_its_name_at_once_and_its_disk_when_the_node_says_so() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    world.input(Input::Watch(
        WatchId(9),
        Caller { role: Role::User, name: "ada".into() },
        v1::GetSandboxRequest { which: Some(v1::get_sandbox_request::Which::Id(made.id.clone())) },
    ));
    let deleted = world.set(&made.id, Desired::Deleted).unwrap();
    assert!(matches!(world.directives().last(), Some(Directive::Bookmark(_))));
    let refused = world.set(&made.id, Desired::Running).unwrap_err();
    assert!(refused.message.contains("is being deleted"));
    world.create("one", 1000).unwrap();
    world.report(&deleted, Phase::Gone);
    assert_eq!(world.get(&made.id).unwrap_err().kind, RefusalKind::NotFound);
    assert_eq!(world.reserved().memory_mib, 1000);
    assert!(world.seen.contains(&Effect::WatchEnd(WatchId(9), None)));
}

#[test]
fn a_repeated_request_gets_the_first_answer_even_after_a_restart() {
    let mut world = World::new();
    let key = world.key();
    let made = world.create_with(key.clone(), "", 1000).unwrap();
    assert_eq!(world.create_with(key.clone(), "", 1000).unwrap(), made);
    let recovered =
        Recovered { snapshot: None, hard_state: world.hard, entries: world.log.clone() };
    world.core = ControlPlane::new(config(), recovered).unwrap();
    assert_eq!(world.create_with(key.clone(), "", 1000).unwrap(), made);
    let refused = world.create_with(key, "", 2000).unwrap_err();
    assert!(refused.message.contains("used for another request"));
    assert_eq!(world.core.state().sandboxes.len(), 1);
}

#[test]
fn many_requests_at_once_share_an_entry_and_do_not_oversell() {
    let mut world = World::new();
    let before = world.log.len();
    let source = Some(v1::image_ref::Source::Local(v1::LocalImage::default()));
    let inputs = (0..20u64).map(|n| {
        let spec = v1::SandboxSpec {
            image: Some(v1::ImageRef { source: source.clone() }),
            shape: Some(v1::Shape { cpus: 1, memory_mib: 1000, ..Default::default() }),
            ..Default::default()
        };
        let idempotency_key = [b"burst---".to_vec(), n.to_be_bytes().to_vec()].concat();
        let request = v1::CreateSandboxRequest { idempotency_key, spec: Some(spec) };
        let caller = Caller { role: Role::User, name: "ada".into() };
        Input::Request(RequestId(1000 + n), caller, Request::CreateSandbox(request))
    });
    world.input(Input::Batch(inputs.collect()));
    assert_eq!(world.log.len(), before + 1, "one entry for all");
    let answers = world.seen.iter().filter_map(|effect| match effect {
        Effect::Answer(_, answer) => Some(answer.is_ok()),
        _ => None,
    });
    assert_eq!(answers.filter(|ok| *ok).count(), 4, "4 × 20 GiB of disk fit");
}

#[test]
fn a_silent_nodes_sandboxes_are_unknown_until_it_is_back() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    world.report(&made, Phase::Running);
    for _ in 0..120 {
        world.now += 100;
        world.input(Input::Tick);
    }
    let lost = world.get(&made.id).unwrap();
    assert_eq!(phase(&lost), Phase::Unknown);
    assert!(lost.observed.unwrap().reason.contains("node `n` is silent; it last said running"));
    let refused = world.create("two", 1000).unwrap_err();
    assert!(refused.message.contains("is silent"), "{refused}");
    world.input(Input::Heartbeat(SESSION, v1::Heartbeat::default()));
    world.input(Input::Tick);
    assert_eq!(phase(&world.get(&made.id).unwrap()), Phase::Running);
}

#[test]
fn others_sandboxes_do_not_exist_and_operators_see_all() {
    let mut world = World::new();
    let made = world.create("one", 1000).unwrap();
    let which = Some(v1::get_sandbox_request::Which::Id(made.id.clone()));
    let get = Request::GetSandbox(v1::GetSandboxRequest { which });
    assert_eq!(world.ask("bob", get.clone()).unwrap_err().kind, RefusalKind::NotFound);
    assert!(world.ask("root", get).is_ok());
    let list = Request::ListSandboxes(v1::ListSandboxesRequest::default());
    let Ok(Answer::Sandboxes(page)) = world.ask("bob", list) else { panic!("a page") };
    assert!(page.sandboxes.is_empty());
}

#[test]
fn the_whole_state_survives_a_snapshot() {
    let mut world = World::new();
    world.create("one", 1000).unwrap();
    let made = world.create("", 1000).unwrap();
    world.set(&made.id, Desired::Deleted).unwrap();
    let bytes = towline_control_core::snapshot::encode(world.core.state());
    let again = towline_control_core::snapshot::decode(1, &bytes).unwrap();
    assert_eq!(&again, world.core.state());
    assert!(towline_control_core::snapshot::decode(1, &bytes[..bytes.len() - 3]).is_err());
}

#[test]
fn a_timeout_stops_and_never_deletes_and_counts_anew_with_each_start() {
    let mut world = World::new();
    let made = world.create("a", 1024).unwrap();
    world.report(&made, Phase::Running);
    assert_eq!(world.core.next_deadline_unix_ms(), None);
    let set = world.expire(&made.id, 60).unwrap();
    assert_eq!(set.spec.unwrap().timeout_s, 60);
    assert_eq!(world.core.next_deadline_unix_ms(), Some(set.expires_ms));
    world.pass(59_000);
    assert_eq!(world.get(&made.id).unwrap().desired(), Desired::Running);
    world.pass(1_500);
    let expired = world.get(&made.id).unwrap();
    assert_eq!(expired.desired(), Desired::Stopped);
    assert_eq!((expired.desired_reason.as_str(), expired.expires_ms), ("timeout 1m", 0));
    let told = world.directives().into_iter().rev().find_map(|directive| match directive {
        Directive::Desired(desired) => Some((desired.desired(), desired.reason)),
        _ => None,
    });
    assert_eq!(told, Some((Desired::Stopped, "timeout 1m".to_owned())));
    world.report(&expired, Phase::Stopped);
    world.pass(120_000);
    assert_eq!(world.get(&made.id).unwrap().desired(), Desired::Stopped);

    let started = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!(started.desired_reason, "");
    assert!(started.expires_ms > world.now + 1_000_000 + 59_000, "it counts anew");
    world.expire(&made.id, 0).unwrap();
    world.pass(120_000);
    assert_eq!(world.get(&made.id).unwrap().desired(), Desired::Running);
}

#[test]
fn a_timeout_does_not_touch_what_ended_by_itself() {
    let mut world = World::new();
    let made = world.create("a", 1024).unwrap();
    world.expire(&made.id, 10).unwrap();
    let now = world.get(&made.id).unwrap();
    world.report(&now, Phase::Stopped);
    assert_eq!(world.core.next_deadline_unix_ms(), None);
    let generation = world.get(&made.id).unwrap().generation;
    world.pass(20_000);
    assert_eq!(world.get(&made.id).unwrap().generation, generation);
}

#[test]
fn only_the_owner_sets_a_timeout_and_none_is_absurd() {
    let mut world = World::new();
    let made = world.create("a", 1024).unwrap();
    let idempotency_key = world.key();
    let request = v1::SetExpiryRequest { idempotency_key, id: made.id.clone(), ttl_s: 1 };
    let refusal = world.ask("eve", Request::SetExpiry(request)).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::NotFound);
    assert_eq!(world.expire(&made.id, u64::MAX).unwrap_err().kind, RefusalKind::Invalid);
    world.set(&made.id, Desired::Deleted).unwrap();
    assert_eq!(world.expire(&made.id, 5).unwrap_err().kind, RefusalKind::Precondition);
}

#[test]
fn timeouts_survive_a_snapshot() {
    let mut world = World::new();
    let made = world.create("a", 1024).unwrap();
    let set = world.expire(&made.id, 60).unwrap();
    let bytes = towline_control_core::snapshot::encode(world.core.state());
    let state = towline_control_core::snapshot::decode(9, &bytes).unwrap();
    assert_eq!(&state, world.core.state());
    assert_eq!(state.sandboxes.next_expiry_ms(), Some(set.expires_ms));
}

#[test]
fn a_ticket_to_collect_images_names_all_that_are_used() {
    let mut world = World::new();
    let digest = |n: u8| format!("sha256:{}", char::from(n).to_string().repeat(64));
    for (name, number) in [("named:1", b'a'), ("used:1", b'b')] {
        let image = v1::Image {
            name: name.into(),
            digest: digest(number),
            sandboxes: 9,
            ..Default::default()
        };
        let put = v1::PutImageRequest { idempotency_key: world.key(), image: Some(image) };
        world.ask("ada", Request::PutImage(put)).unwrap();
    }
    let source = Some(v1::image_ref::Source::Oci("used:1".into()));
    let spec = v1::SandboxSpec {
        image: Some(v1::ImageRef { source }),
        shape: Some(v1::Shape { memory_mib: 256, ..Default::default() }),
        ..Default::default()
    };
    let create = v1::CreateSandboxRequest { idempotency_key: world.key(), spec: Some(spec) };
    let made = sandbox(world.ask("ada", Request::CreateSandbox(create)).unwrap());
    let Ok(Answer::Images(images)) = world.ask("eve", Request::ListImages) else { panic!() };
    let used: Vec<_> = images.iter().map(|image| image.sandboxes).collect();
    assert_eq!(used, [0, 1], "somebody else's count too");
    let delete = v1::DeleteImageRequest { idempotency_key: world.key(), name: "used:1".into() };
    world.ask("ada", Request::DeleteImage(delete)).unwrap();

    let request = |collect| v1::IssueTicketRequest {
        node_id: made.node_id.clone(),
        collect,
        ..Default::default()
    };
    let answer = world.ask("ada", Request::IssueTicket(request(true)));
    let Ok(Answer::Ticket { keep: Some(keep), .. }) = answer else { panic!("{answer:?}") };
    assert_eq!(keep, [digest(b'a'), digest(b'b')]);
    let answer = world.ask("ada", Request::IssueTicket(request(false)));
    assert!(matches!(answer, Ok(Answer::Ticket { keep: None, .. })), "{answer:?}");
}

#[test]
fn a_node_is_told_whether_a_sandbox_has_had_a_vm_there() {
    let mut world = World::new();
    let made = world.create("a", 1024).unwrap();
    let told = |world: &World| {
        let last = world.directives().into_iter().rev().find_map(|directive| match directive {
            Directive::Desired(desired) => Some(desired.ran),
            _ => None,
        });
        last.unwrap()
    };
    assert!(!told(&world));
    world.sequence += 1;
    let observed = v1::Observed {
        sandbox_id: made.id.clone(),
        epoch: 1,
        generation: 1,
        phase: Phase::Running.into(),
        driver: "qemu".into(),
        ..Default::default()
    };
    let batch = v1::ObservedBatch { sequence: world.sequence, observed: vec![observed] };
    world.input(Input::Observed(SESSION, batch));
    let stopped = world.set(&made.id, Desired::Stopped).unwrap();
    assert!(told(&world));
    // A restarted node agent names no driver; that it ran is known all the same.
    world.report(&stopped, Phase::Stopped);
    world.set(&made.id, Desired::Running).unwrap();
    assert!(told(&world));
}

impl World {
    /// One that runs by this driver of the node's.
    fn running(&mut self, name: &str, memory_mib: u64, driver: &str) -> v1::Sandbox {
        let made = self.create(name, memory_mib).unwrap();
        self.report_by(&made, Phase::Running, driver);
        self.get(&made.id).unwrap()
    }

    fn report_by(&mut self, of: &v1::Sandbox, phase: Phase, driver: &str) {
        self.sequence += 1;
        let observed = v1::Observed {
            sandbox_id: of.id.clone(),
            epoch: of.epoch,
            generation: of.generation,
            phase: phase.into(),
            driver: driver.into(),
            ..Default::default()
        };
        let batch = v1::ObservedBatch { sequence: self.sequence, observed: vec![observed] };
        self.input(Input::Observed(SESSION, batch));
    }

    fn fork(&mut self, id: &[u8], count: u32, name: &str) -> Result<Vec<v1::Sandbox>, Refusal> {
        let idempotency_key = self.key();
        self.fork_with(idempotency_key, id, count, name)
    }

    fn fork_with(
        &mut self,
        idempotency_key: Vec<u8>,
        id: &[u8],
        count: u32,
        name: &str,
    ) -> Result<Vec<v1::Sandbox>, Refusal> {
        let request =
            v1::ForkSandboxRequest { idempotency_key, id: id.to_vec(), count, name: name.into() };
        self.ask("ada", Request::ForkSandbox(request)).map(|answer| match answer {
            Answer::Forked(made) => made,
            other => panic!("{other:?}"),
        })
    }

    fn reserved_mib(&self) -> u64 {
        let mut nodes = self.core.state().nodes.iter();
        nodes.next().unwrap().1.node.as_ref().unwrap().reserved.unwrap().memory_mib
    }
}

fn named(sandbox: &v1::Sandbox) -> &str {
    &sandbox.spec.as_ref().unwrap().name
}

#[test]
fn a_paused_sandbox_keeps_its_memory_its_main_exit_and_its_timeout() {
    let mut world = World::new();
    let made = world.running("a", 1024, "vm");
    world.expire(&made.id, 60).unwrap();
    let paused = world.set(&made.id, Desired::Paused).unwrap();
    assert_eq!((paused.desired(), paused.generation), (Desired::Paused, 2));
    assert_eq!(paused.observed.as_ref().unwrap().phase(), Phase::Running, "it still runs");
    world.report_by(&paused, Phase::Paused, "vm");
    let paused = world.get(&made.id).unwrap();
    assert_eq!((paused.observed.unwrap().phase(), world.reserved_mib()), (Phase::Paused, 1024));
    let resumed = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!(resumed.observed.as_ref().unwrap().phase(), Phase::Paused, "until the node says so");
    assert_eq!(resumed.expires_ms, paused.expires_ms);
    world.set(&made.id, Desired::Paused).unwrap();
    world.pass(61_000);
    let stopped = world.get(&made.id).unwrap();
    assert_eq!(
        (stopped.desired(), stopped.desired_reason.as_str()),
        (Desired::Stopped, "timeout 1m")
    );
}

#[test]
fn only_what_runs_can_be_paused() {
    let mut world = World::new();
    let made = world.running("a", 1024, "vm");
    let stopped = world.set(&made.id, Desired::Stopped).unwrap();
    let refused = world.set(&made.id, Desired::Paused).unwrap_err();
    assert!(refused.message.contains("`tow start a` first"), "{refused:?}");
    world.report(&stopped, Phase::Stopped);
    // One whose VM ended while it was paused begins anew, with its memory reserved anew.
    let running = world.set(&made.id, Desired::Running).unwrap();
    world.report_by(&running, Phase::Running, "vm");
    let paused = world.set(&made.id, Desired::Paused).unwrap();
    world.report_by(&paused, Phase::Stopped, "vm");
    assert_eq!(world.reserved_mib(), 0);
    let again = world.set(&made.id, Desired::Running).unwrap();
    assert_eq!((again.observed.unwrap().phase(), world.reserved_mib()), (Phase::Placed, 1024));
}

#[test]
fn copies_are_made_all_or_none_where_the_original_runs() {
    let mut world = World::new();
    let made = world.running("a", 1536, "vm");
    let copies = world.fork(&made.id, 2, "b").unwrap();
    assert_eq!(copies.iter().map(named).collect::<Vec<_>>(), ["b-1", "b-2"]);
    let origins: Vec<_> = copies.iter().map(|copy| copy.forked_from.clone().unwrap()).collect();
    assert!(origins.iter().all(|origin| *origin == origins[0] && origin.sandbox_id == made.id));
    assert!(copies.iter().all(|copy| copy.node_id == made.node_id && copy.owner == "ada"));
    assert_eq!(world.reserved_mib(), 3 * 1536);
    // The node is told what each begins as.
    let told = world.seen.iter().rev().find_map(|effect| match effect {
        Effect::Directives(_, directives) => Some(directives),
        _ => None,
    });
    let told = told.unwrap().iter().filter_map(|one| match &one.directive {
        Some(Directive::Desired(desired)) => Some(desired.forked_from.clone()),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), vec![Some(origins[0].clone()); 2]);

    let refused = world.fork(&made.id, 5, "").unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Exhausted);
    assert!(refused.message.contains("5 copies need 7.5 GiB of memory"), "{refused:?}");
    let refused = world.fork(&made.id, 2, "b").unwrap_err();
    assert_eq!(refused.kind, RefusalKind::AlreadyExists);
    assert_eq!(world.reserved_mib(), 3 * 1536);
    let unnamed = world.fork(&made.id, 1, "").unwrap();
    assert!(!named(&unnamed[0]).is_empty());
    let refused = world.fork(&made.id, 1, "").unwrap_err();
    assert!(refused.message.contains("20 GiB of disk"), "{refused:?}");
}

#[test]
fn a_repeated_fork_makes_no_more_copies() {
    let mut world = World::new();
    let made = world.running("a", 1024, "vm");
    let key = world.key();
    let first = world.fork_with(key.clone(), &made.id, 2, "").unwrap();
    assert_eq!(world.fork_with(key, &made.id, 2, "").unwrap(), first);
    assert_eq!(world.core.state().sandboxes.len(), 3);
}

#[test]
fn what_cannot_be_forked_is_refused_before_anything_is_done() {
    let mut world = World::new();
    let made = world.running("a", 1024, "process");
    let refused = world.fork(&made.id, 1, "").unwrap_err();
    assert!(refused.message.contains("the driver `process`"), "{refused:?}");
    let other = world.running("b", 1024, "vm");
    assert_eq!(world.fork(&other.id, 0, "").unwrap_err().kind, RefusalKind::Invalid);
    assert_eq!(world.fork(&other.id, 65, "").unwrap_err().kind, RefusalKind::Invalid);
    assert_eq!(world.fork(&other.id, 1, "sbx_x").unwrap_err().kind, RefusalKind::Invalid);
    let paused = world.set(&other.id, Desired::Paused).unwrap();
    world.report_by(&paused, Phase::Paused, "vm");
    let refused = world.fork(&other.id, 1, "").unwrap_err();
    assert!(refused.message.contains("`tow resume b` first"), "{refused:?}");
    assert_eq!(world.core.state().sandboxes.len(), 2);
}
