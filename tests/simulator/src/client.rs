//! One client: creates, pauses, copies, stops, starts and removes sandboxes of its own, repeats each
//! request with its key until it is answered, and remembers what it was told.

use std::collections::BTreeMap;

use towline_control_core::{Answer, Caller, Refusal, RefusalKind, Request, Role};
use towline_proto::v1::{self, Desired};

use crate::rng::Rng;

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) name: String,
    rng: Rng,
    pub(crate) operation: u64,
    pub(crate) attempt: u64,
    pub(crate) left: u64,
    current: Option<Operation>,
    /// By mark: what was acknowledged last.
    pub(crate) acknowledged: BTreeMap<String, Known>,
    /// Creations whose refusal came after attempts of unknown fate.
    pub(crate) maybe: Vec<String>,
}

#[derive(Debug, Clone)]
struct Operation {
    request: Request,
    mark: String,
    unsure: bool,
}

impl Operation {
    /// Of what it may make.
    fn marks(&self) -> Vec<String> {
        match &self.request {
            Request::ForkSandbox(fork) if fork.count > 1 => {
                (1..=fork.count).map(|number| format!("{}-{number}", self.mark)).collect()
            }
            _ => vec![self.mark.clone()],
        }
    }
}

/// What a client knows of one sandbox.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Known {
    pub(crate) id: Vec<u8>,
    pub(crate) desired: Desired,
    /// A change of unknown fate was tried since.
    pub(crate) unsure: bool,
}

impl Client {
    pub(crate) fn new(number: usize, seed: u64, operations: u64) -> Self {
        Self {
            name: format!("client-{number}"),
            rng: Rng::new(seed ^ ((number as u64 + 1) << 40)),
            operation: 0,
            attempt: 0,
            left: operations,
            current: None,
            acknowledged: BTreeMap::new(),
            maybe: Vec::new(),
        }
    }

    pub(crate) fn caller(&self) -> Caller {
        Caller { role: Role::User, name: self.name.clone() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.current.is_none()
    }

    /// The request of the next attempt, if there is one to make.
    pub(crate) fn next(&mut self) -> Option<Request> {
        if self.current.is_none() {
            self.left = self.left.checked_sub(1)?;
            self.operation += 1;
            self.current = Some(self.invent());
        }
        self.attempt += 1;
        self.current.as_ref().map(|operation| operation.request.clone())
    }

    fn invent(&mut self) -> Operation {
        let mut key = self.name.clone().into_bytes();
        key.extend(self.operation.to_be_bytes());
        let live: Vec<_> = self
            .acknowledged
            .iter()
            .filter(|(_, known)| known.desired != Desired::Deleted)
            .map(|(mark, known)| (mark.clone(), known.id.clone()))
            .collect();
        if live.is_empty() || self.rng.percent(40) {
            return self.invent_creation(key);
        }
        let (mark, id) = live[self.rng.index(live.len())].clone();
        if self.rng.percent(15) {
            // Seconds, so that many come while faults go on; sometimes none at all.
            let ttl_s = self.rng.range(0, 12);
            let set = v1::SetExpiryRequest { idempotency_key: key, id, ttl_s };
            return Operation { request: Request::SetExpiry(set), mark, unsure: false };
        }
        if self.rng.percent(12) {
            return self.invent_fork(key, id);
        }
        if self.rng.percent(10) {
            let (cpus, memory_mib) = (0, 256 * self.rng.range(1, 6));
            let resize = v1::ResizeSandboxRequest { idempotency_key: key, id, cpus, memory_mib };
            return Operation { request: Request::ResizeSandbox(resize), mark, unsure: false };
        }
        let desired = match self.rng.range(0, 12) {
            10.. => Desired::Paused,
            0..4 => Desired::Stopped,
            4..6 => Desired::Running,
            _ => Desired::Deleted,
        };
        let request = Request::SetDesired(v1::SetDesiredRequest {
            idempotency_key: key,
            id,
            desired: desired.into(),
            expect_generation: 0,
        });
        Operation { request, mark, unsure: false }
    }

    fn invent_fork(&mut self, key: Vec<u8>, id: Vec<u8>) -> Operation {
        let mark = format!("{}-{}", self.name, self.operation);
        let request = Request::ForkSandbox(v1::ForkSandboxRequest {
            idempotency_key: key,
            id,
            count: u32::try_from(self.rng.range(1, 3)).unwrap_or(1),
            name: mark.clone(),
        });
        Operation { request, mark, unsure: false }
    }

    fn invent_creation(&mut self, key: Vec<u8>) -> Operation {
        let mark = format!("{}-{}", self.name, self.operation);
        let local = v1::LocalImage { home: b"/home/x".to_vec() };
        let shape = v1::Shape {
            cpus: 1,
            memory_mib: 256 * self.rng.range(1, 6),
            disk_mib: 256,
            processes_max: 0,
        };
        let named = self.rng.percent(50);
        let spec = v1::SandboxSpec {
            name: if named { mark.clone() } else { String::new() },
            image: Some(v1::ImageRef { source: Some(v1::image_ref::Source::Local(local)) }),
            shape: Some(shape),
            env: vec![format!("MARK={mark}").into_bytes()],
            timeout_s: if self.rng.percent(25) { self.rng.range(1, 20) } else { 0 },
            ..Default::default()
        };
        let request = Request::CreateSandbox(v1::CreateSandboxRequest {
            idempotency_key: key,
            spec: Some(spec),
        });
        Operation { request, mark, unsure: false }
    }

    /// An attempt got no answer in time, or one that means nothing.
    pub(crate) fn missed(&mut self) {
        if let Some(operation) = &mut self.current {
            operation.unsure = true;
        }
    }

    /// Takes an answer in; false if the request must be tried again.
    pub(crate) fn answered(&mut self, answer: &Result<Answer, Refusal>) -> Result<bool, String> {
        let Some(operation) = self.current.clone() else { return Ok(true) };
        match answer {
            Ok(Answer::Sandbox(sandbox)) => {
                let mark = mark_of(sandbox);
                if mark != operation.mark {
                    return Err(format!("asked about {}, answered about {mark}", operation.mark));
                }
                let unsure = match &operation.request {
                    // It changes nothing of what is desired.
                    Request::SetExpiry(_) => {
                        self.acknowledged.get(&mark).is_some_and(|known| known.unsure)
                    }
                    _ => false,
                };
                let known = Known { id: sandbox.id.clone(), desired: sandbox.desired(), unsure };
                self.acknowledged.insert(mark, known);
            }
            Ok(Answer::Forked(copies)) => {
                let made: Vec<String> = copies.iter().map(mark_of).collect();
                if made != operation.marks() {
                    return Err(format!("asked for {:?}, got {made:?}", operation.marks()));
                }
                for sandbox in copies {
                    let (id, desired) = (sandbox.id.clone(), sandbox.desired());
                    let known = Known { id, desired, unsure: false };
                    self.acknowledged.insert(mark_of(sandbox), known);
                }
            }
            Ok(other) => return Err(format!("a strange answer: {other:?}")),
            Err(refusal) => match refusal.kind {
                RefusalKind::NotLeader { .. } | RefusalKind::Unavailable => return Ok(false),
                RefusalKind::Unknown => {
                    self.missed();
                    return Ok(false);
                }
                _ => self.refused(&operation, refusal)?,
            },
        }
        self.current = None;
        Ok(true)
    }

    fn refused(&mut self, operation: &Operation, refusal: &Refusal) -> Result<(), String> {
        match (&operation.request, self.acknowledged.get_mut(&operation.mark)) {
            (Request::SetDesired(set), Some(known)) => {
                // Only its own removal may make it unknown, and no other client touches it.
                let gone = refusal.kind == RefusalKind::NotFound;
                let removing = set.desired() == Desired::Deleted && operation.unsure;
                if gone && !removing && !known.unsure {
                    return Err(format!("{} was acknowledged and is lost", operation.mark));
                }
                known.unsure |= operation.unsure;
                if gone {
                    known.desired = Desired::Deleted;
                }
            }
            (Request::SetExpiry(_) | Request::ResizeSandbox(_), Some(known)) => {
                let gone = refusal.kind == RefusalKind::NotFound;
                if gone && !known.unsure {
                    return Err(format!("{} was acknowledged and is lost", operation.mark));
                }
                if gone {
                    known.desired = Desired::Deleted;
                }
            }
            _ if operation.unsure => self.maybe.extend(operation.marks()),
            _ => {}
        }
        Ok(())
    }
}

/// Which operation made a sandbox.
pub(crate) fn mark_of(sandbox: &v1::Sandbox) -> String {
    // Copies have all of what they are copies of, but its name.
    if sandbox.forked_from.is_some() {
        return sandbox.spec.as_ref().map(|spec| spec.name.clone()).unwrap_or_default();
    }
    let env = sandbox.spec.as_ref().and_then(|spec| spec.env.first().cloned()).unwrap_or_default();
    String::from_utf8_lossy(&env).trim_start_matches("MARK=").to_owned()
}
