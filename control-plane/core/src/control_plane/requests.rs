//! Requests of callers: who may ask what, and the command or read that each becomes.

use prost::Message;
use towline_proto::ids::TokenId;
use towline_proto::v1::{self, Command, Desired, Idempotency, TokenRole, command::What};

use super::{ControlPlane, Read};
use crate::admission::{check_key, check_shape, check_spec, check_timeout};
use crate::input::{Answer, Caller, Effect, Request, RequestId, Role};
use crate::placement::place;
use crate::proposals::{Creation, IN_FLIGHT_MAX, Waiter};
use crate::random::fingerprint;
use crate::refusal::Refusal;
use crate::resources::Resources;
use crate::state::forks::FORK_MAX;
use crate::state::projects::DEFAULT_PROJECT;

/// Longest life of a join token.
const TOKEN_LIFE_MAX_S: u64 = 30 * 24 * 3600;
/// Most uses of a join token.
const TOKEN_USES_MAX: u32 = 10_000;
/// Longest name of a project, image, user or node.
const NAME_MAX: usize = 512;
/// Times a creation is placed again when the room it was given is gone.
const PLACE_AGAIN_MAX: u32 = 8;

impl ControlPlane {
    pub(super) fn request(
        &mut self,
        id: RequestId,
        caller: Caller,
        request: Request,
        effects: &mut Vec<Effect>,
    ) {
        if let Err(refusal) = self.admit(id, caller, request) {
            effects.push(Effect::Answer(id, Err(refusal)));
        }
    }

    fn admit(&mut self, id: RequestId, caller: Caller, request: Request) -> Result<(), Refusal> {
        may(&caller, &request)?;
        if let Some(refusal) = self.not_leading() {
            return Err(refusal);
        }
        if self.proposals.is_full() || self.early.len() >= IN_FLIGHT_MAX {
            return Err(Refusal::unavailable("the control plane is busy: try again shortly"));
        }
        if !self.ready {
            self.early.push((id, caller, request));
            return Ok(());
        }
        match request {
            Request::CreateSandbox(request) => {
                check_key(&request.idempotency_key)?;
                self.create(Creation { request_id: id, caller, request, attempts: 0, placed: None })
            }
            Request::SetDesired(set) => self.set_desired(id, &caller, &set),
            Request::ForkSandbox(fork) => self.fork(id, &caller, fork),
            Request::SetExpiry(set) => {
                check_timeout(set.ttl_s)?;
                let key = keyed(&caller, &set.idempotency_key, &set)?;
                let owner = owner_asked(&caller);
                let command = v1::SetExpiryCommand { id: set.id, ttl_s: set.ttl_s, owner };
                self.pend(id, Some(key), What::SetExpiry(command));
                Ok(())
            }
            Request::ResizeSandbox(resize) => self.resize(id, &caller, &resize),
            Request::PutImage(put) => self.put_image(id, &caller, &put),
            Request::DeleteImage(delete) => {
                let key = keyed(&caller, &delete.idempotency_key, &delete)?;
                self.pend(id, Some(key), What::DeleteImage(delete.name));
                Ok(())
            }
            Request::CreateToken { request, id: token, secret_sha256 } => {
                self.create_token(id, &caller, &request, token, secret_sha256)
            }
            Request::RevokeToken(revoke) => {
                let key = keyed(&caller, &revoke.idempotency_key, &revoke)?;
                self.pend(id, Some(key), What::RevokeToken(revoke.token_id));
                Ok(())
            }
            Request::UseToken(used) => {
                self.pend(id, None, What::UseToken(used));
                Ok(())
            }
            read => {
                self.reads.fresh.push(Read::Request(id, caller, Box::new(read)));
                Ok(())
            }
        }
    }

    fn pend(&mut self, id: RequestId, idempotency: Option<Idempotency>, what: What) {
        self.pending.push((Waiter::Request(id), Command { idempotency, what: Some(what) }));
    }

    /// Places a sandbox and pends its creation; called again when the room was taken meanwhile.
    pub(super) fn create(&mut self, mut creation: Creation) -> Result<(), Refusal> {
        let caller = &creation.caller;
        let key = keyed(caller, &creation.request.idempotency_key, &creation.request)?;
        let repeated = self.proposals.has_key(caller, &key.key);
        let mut spec = creation.request.spec.clone().unwrap_or_default();
        let want = check_spec(&mut spec)?;
        let known = self.state.dedup.earlier(&key).is_some();
        let node = if known || repeated {
            // The applier finds the first one's answer, and reserves nothing for this one.
            Vec::new()
        } else {
            self.state.images.digest_of(spec.image.as_ref())?;
            let placed = place(&self.state.nodes, self.proposals.reserved(), &want)?;
            spec.shape = Some(placed.shape);
            creation.placed = Some((placed.node, Resources::of_shape(&placed.shape)));
            placed.node.to_vec()
        };
        let command = v1::CreateSandboxCommand {
            id: self.new_id().to_vec(),
            project: self.project_of(&creation.caller).to_owned(),
            owner: creation.caller.name.clone(),
            spec: Some(spec),
            node_id: node,
        };
        self.proposals.begin(&creation);
        let command = Command { idempotency: Some(key), what: Some(What::CreateSandbox(command)) };
        self.pending.push((Waiter::Create(Box::new(creation)), command));
        Ok(())
    }

    /// Places again what lost a race, a bounded number of times.
    pub(super) fn create_again(
        &mut self,
        mut creation: Creation,
        why: Refusal,
    ) -> Result<(), Refusal> {
        creation.attempts += 1;
        creation.placed = None;
        if creation.attempts > PLACE_AGAIN_MAX {
            return Err(Refusal::unavailable(why.message));
        }
        self.create(creation)
    }

    fn project_of(&self, caller: &Caller) -> &str {
        self.state.projects.of_user(&caller.name)
    }

    fn set_desired(
        &mut self,
        id: RequestId,
        caller: &Caller,
        set: &v1::SetDesiredRequest,
    ) -> Result<(), Refusal> {
        if set.desired() == Desired::Unspecified {
            return Err(Refusal::invalid(
                "say what is desired: running, paused, stopped or deleted",
            ));
        }
        let key = keyed(caller, &set.idempotency_key, set)?;
        let command = v1::SetDesiredCommand {
            id: set.id.clone(),
            desired: set.desired,
            expect_generation: set.expect_generation,
            owner: owner_asked(caller),
        };
        self.pend(id, Some(key), What::SetDesired(command));
        Ok(())
    }

    fn fork(
        &mut self,
        id: RequestId,
        caller: &Caller,
        fork: v1::ForkSandboxRequest,
    ) -> Result<(), Refusal> {
        let key = keyed(caller, &fork.idempotency_key, &fork)?;
        let count = usize::try_from(fork.count).unwrap_or(usize::MAX);
        if !(1..=FORK_MAX).contains(&count) {
            return Err(Refusal::invalid(format!(
                "a fork makes 1 to {FORK_MAX} copies, not {count}"
            )));
        }
        if !fork.name.is_empty() {
            crate::names::check(&fork.name)?;
            crate::names::check(&format!("{}-{count}", fork.name))?;
        }
        let command = v1::ForkSandboxCommand {
            id: fork.id,
            fork_id: self.new_id().to_vec(),
            ids: (0..count).map(|_| self.new_id().to_vec()).collect(),
            name: fork.name,
            owner: owner_asked(caller),
        };
        self.pend(id, Some(key), What::ForkSandbox(command));
        Ok(())
    }

    fn resize(
        &mut self,
        id: RequestId,
        caller: &Caller,
        resize: &v1::ResizeSandboxRequest,
    ) -> Result<(), Refusal> {
        let key = keyed(caller, &resize.idempotency_key, resize)?;
        let (cpus, memory_mib) = (resize.cpus, resize.memory_mib);
        if cpus == 0 && memory_mib == 0 {
            return Err(Refusal::invalid("say how many CPUs or how much memory it should have"));
        }
        check_shape(&v1::Shape { cpus, memory_mib, ..Default::default() })?;
        let owner = owner_asked(caller);
        let command = v1::ResizeSandboxCommand { id: resize.id.clone(), cpus, memory_mib, owner };
        self.pend(id, Some(key), What::ResizeSandbox(command));
        Ok(())
    }

    fn put_image(
        &mut self,
        id: RequestId,
        caller: &Caller,
        put: &v1::PutImageRequest,
    ) -> Result<(), Refusal> {
        let key = keyed(caller, &put.idempotency_key, put)?;
        let image = put.image.clone().unwrap_or_default();
        let hex = image.digest.strip_prefix("sha256:").unwrap_or("");
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Refusal::invalid(
                "an image needs its manifest digest, `sha256:` and 64 hex",
            ));
        }
        check_name("an image", &image.name)?;
        let image = v1::Image { sandboxes: 0, ..image };
        self.pend(id, Some(key), What::PutImage(image));
        Ok(())
    }

    fn create_token(
        &mut self,
        id: RequestId,
        caller: &Caller,
        request: &v1::CreateTokenRequest,
        token: TokenId,
        secret_sha256: Vec<u8>,
    ) -> Result<(), Refusal> {
        let key = keyed(caller, &request.idempotency_key, request)?;
        if request.role() == TokenRole::Unspecified {
            return Err(Refusal::invalid(
                "say what the token is for: a user, a node or an operator",
            ));
        }
        if request.ttl_s == 0 || request.ttl_s > TOKEN_LIFE_MAX_S {
            return Err(Refusal::invalid(format!("a token lives 1 to {TOKEN_LIFE_MAX_S} seconds")));
        }
        if request.uses_max == 0 || request.uses_max > TOKEN_USES_MAX {
            return Err(Refusal::invalid(format!("a token has 1 to {TOKEN_USES_MAX} uses")));
        }
        let project = match request.project.as_str() {
            "" => DEFAULT_PROJECT,
            project => project,
        };
        check_name("a project", project)?;
        let now_ms = self.now.unix_ms.max(self.state.now_ms);
        let record = v1::TokenRecord {
            id: token.to_vec(),
            secret_sha256,
            role: request.role,
            project: project.to_owned(),
            expires_ms: now_ms.saturating_add(request.ttl_s * 1000),
            uses_left: request.uses_max,
            name: request.name.clone(),
        };
        self.pend(id, Some(key), What::CreateToken(record));
        Ok(())
    }

    /// Answers a read from the applied state.
    pub(super) fn answer(&mut self, caller: &Caller, request: &Request) -> Result<Answer, Refusal> {
        use crate::reads::{find, list, ticket};
        match request {
            Request::GetSandbox(which) => {
                let (_, record) = find(&self.state, caller, which)?;
                Ok(Answer::Sandbox(Box::new(self.state.view(record))))
            }
            Request::ListSandboxes(request) => list(&self.state, caller, request),
            Request::IssueTicket(request) => ticket(&self.state, caller, request),
            Request::ListImages => Ok(Answer::Images(crate::reads::images(&self.state))),
            Request::ListNodes => {
                let nodes = self.state.nodes.iter().filter_map(|(_, record)| record.node.clone());
                Ok(Answer::Nodes(nodes.collect()))
            }
            Request::ClusterStatus => Ok(Answer::Status(v1::ClusterStatus {
                cluster_id: self.state.cluster_id.clone(),
                version: String::new(),
                leader: self.replica.leader(),
                member: self.replica.member(),
                term: self.replica.term(),
                commit_index: self.replica.commit_index(),
                applied_index: self.applied,
                members: u32::try_from(self.replica.voters()).unwrap_or(u32::MAX),
            })),
            _ => Err(Refusal::invalid("not a question")),
        }
    }
}

/// Who may ask what.
fn may(caller: &Caller, request: &Request) -> Result<(), Refusal> {
    let allowed = match request {
        Request::UseToken(_) => true,
        Request::CreateToken { .. } | Request::RevokeToken(_) => caller.role == Role::Operator,
        _ => matches!(caller.role, Role::User | Role::Operator),
    };
    if allowed {
        return Ok(());
    }
    Err(match caller.role {
        Role::Stranger => Refusal::denied("enroll first: this call needs a certificate"),
        Role::Node => Refusal::denied("a node may not do this"),
        Role::User | Role::Operator => Refusal::denied("only an operator may do this"),
    })
}

/// Whose a sandbox must be that the caller changes; an operator's may be anybody's.
fn owner_asked(caller: &Caller) -> String {
    match caller.role {
        Role::Operator => String::new(),
        _ => caller.name.clone(),
    }
}

fn keyed(caller: &Caller, key: &[u8], request: &impl Message) -> Result<Idempotency, Refusal> {
    check_key(key)?;
    Ok(Idempotency {
        caller: caller.name.clone(),
        key: key.to_vec(),
        fingerprint: fingerprint(&request.encode_to_vec()),
    })
}

fn check_name(what: &str, name: &str) -> Result<(), Refusal> {
    let good = !name.is_empty() && name.len() <= NAME_MAX && !name.chars().any(char::is_control);
    if good {
        return Ok(());
    }
    Err(Refusal::invalid(format!("{what} needs a name of 1 to {NAME_MAX} plain characters")))
}
