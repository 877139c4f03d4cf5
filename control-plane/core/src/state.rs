//! The replicated tables and what each command does to them.
//!
//! `apply` is total: every decodable command is done or refused, never a panic. It reads no clock
//! (time comes with the batch), no randomness, no float and no hash order, so that all members come
//! to the same state. Left out: how a batch is decided (`admission`, `placement`) and replicated.

pub mod dedup;
pub mod expiry;
pub mod forks;
pub mod images;
pub mod nodes;
pub mod projects;
pub mod resizing;
pub mod sandboxes;
pub mod tokens;

use std::collections::BTreeSet;

use towline_proto::ids::{NodeId, SandboxId, TokenId};
use towline_proto::v1::{self, Command, CommandBatch, command::What};

use crate::refusal::{Refusal, RefusalKind};

/// All that is replicated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Empty until the first batch names it.
    pub cluster_id: String,
    /// Grows by one with each command that changed something.
    pub revision: u64,
    /// Replicated time, Unix milliseconds.
    pub now_ms: u64,
    /// Sandboxes.
    pub sandboxes: sandboxes::Sandboxes,
    /// Nodes.
    pub nodes: nodes::Nodes,
    /// Projects and who belongs to which.
    pub projects: projects::Projects,
    /// Join tokens.
    pub tokens: tokens::Tokens,
    /// Imported images.
    pub images: images::Images,
    /// Answers kept for repeated requests.
    pub dedup: dedup::Dedup,
}

/// What one command did.
#[derive(Debug, Clone, PartialEq)]
pub enum Done {
    /// The sandbox after it.
    Sandbox(Box<v1::Sandbox>),
    /// The copies that it made.
    Forked(Vec<v1::Sandbox>),
    /// The image after it.
    Image(v1::Image),
    /// The token it made.
    Token(TokenId),
    /// A token let somebody in.
    Admitted {
        /// As what.
        role: v1::TokenRole,
        /// To which project.
        project: String,
    },
    /// A node registered.
    Node {
        /// Its id.
        id: NodeId,
        /// Its new epoch.
        epoch: u64,
    },
    /// Nothing to say.
    Nothing,
}

/// Which records a batch touched, for sessions and watches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Sandboxes whose record or view changed, removed ones among them.
    pub sandboxes: BTreeSet<SandboxId>,
    /// Sandboxes whose node must hear of it.
    pub desired: BTreeSet<SandboxId>,
    /// Sandboxes whose record is gone, with their last state.
    pub removed: Vec<v1::Sandbox>,
}

impl State {
    /// Applies one batch: results are in the order of its commands.
    pub fn apply(&mut self, batch: &CommandBatch) -> (Vec<Result<Done, Refusal>>, Changes) {
        let mut changes = Changes::default();
        self.now_ms = self.now_ms.max(batch.now_ms);
        self.dedup.expire(self.now_ms);
        self.tokens.expire(self.now_ms);
        self.stop_expired(&mut changes);
        let results =
            batch.commands.iter().map(|command| self.apply_once(command, &mut changes)).collect();
        (results, changes)
    }

    fn apply_once(&mut self, command: &Command, changes: &mut Changes) -> Result<Done, Refusal> {
        if let Some(key) = &command.idempotency
            && let Some(earlier) = self.dedup.earlier(key)
        {
            return earlier;
        }
        let done = self.apply_command(command, changes)?;
        if let Some(key) = &command.idempotency {
            self.dedup.remember(key, &done, self.now_ms);
        }
        Ok(done)
    }

    fn apply_command(&mut self, command: &Command, changes: &mut Changes) -> Result<Done, Refusal> {
        match &command.what {
            Some(What::CreateSandbox(create)) => self.create_sandbox(create, changes),
            Some(What::SetDesired(set)) => self.set_desired(set, changes),
            Some(What::ForkSandbox(fork)) => self.fork_sandbox(fork, changes),
            Some(What::SetExpiry(set)) => self.set_expiry(set, changes),
            Some(What::ResizeSandbox(resize)) => self.resize_sandbox(resize, changes),
            Some(What::RegisterNode(register)) => self.register_node(register, changes),
            Some(What::ReportObserved(report)) => self.report_observed(report, changes),
            Some(What::SetNodeState(set)) => self.set_node_state(set, changes),
            Some(What::PutImage(image)) => {
                self.revision += 1;
                Ok(Done::Image(self.images.put(image, self.now_ms)))
            }
            Some(What::DeleteImage(name)) => {
                self.images.delete(name)?;
                self.revision += 1;
                Ok(Done::Nothing)
            }
            Some(What::CreateToken(token)) => {
                let id = self.tokens.create(token)?;
                self.projects.ensure(&token.project, self.now_ms);
                self.revision += 1;
                Ok(Done::Token(id))
            }
            Some(What::RevokeToken(id)) => {
                self.tokens.revoke(id)?;
                self.revision += 1;
                Ok(Done::Nothing)
            }
            Some(What::UseToken(used)) => self.use_token(used),
            Some(What::InitCluster(id)) => self.init_cluster(id),
            Some(What::AdvanceTime(_)) => Ok(Done::Nothing),
            None => Err(Refusal::invalid("an empty command")),
        }
    }

    fn init_cluster(&mut self, id: &str) -> Result<Done, Refusal> {
        if !self.cluster_id.is_empty() && self.cluster_id != id {
            return Err(Refusal::new(
                RefusalKind::AlreadyExists,
                format!("the cluster is already named {}", self.cluster_id),
            ));
        }
        id.clone_into(&mut self.cluster_id);
        self.projects.ensure(projects::DEFAULT_PROJECT, self.now_ms);
        self.revision += 1;
        Ok(Done::Nothing)
    }

    fn use_token(&mut self, used: &v1::UseTokenCommand) -> Result<Done, Refusal> {
        let (role, project) = self.tokens.use_once(used, self.now_ms)?;
        if role != v1::TokenRole::Node {
            self.projects.admit(&used.name, &project);
        }
        self.revision += 1;
        Ok(Done::Admitted { role, project })
    }

    /// The sandbox as people see it: what its silent node last said of it is `unknown`.
    pub fn view(&self, record: &v1::SandboxRecord) -> v1::Sandbox {
        let mut sandbox = record.sandbox.clone().unwrap_or_default();
        let node =
            NodeId::try_from(sandbox.node_id.as_slice()).ok().and_then(|id| self.nodes.get(id));
        let Some(node) = node else { return sandbox };
        if !nodes::is_silent(node) || !sandboxes::is_moving(&sandbox) {
            return sandbox;
        }
        let name = node.node.as_ref().map_or("", |node| node.name.as_str());
        let observed = sandbox.observed.get_or_insert_default();
        observed.reason = format!(
            "node `{name}` is silent; it last said {}",
            sandboxes::phase_name(observed.phase())
        );
        observed.set_phase(v1::Phase::Unknown);
        sandbox.since_ms = sandbox.since_ms.max(node.since_ms);
        sandbox
    }
}
