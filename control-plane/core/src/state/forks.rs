//! Copies of running sandboxes: created all at once or not at all, on the node of the one that they
//! are copies of, with its image, shape and owner. How a node makes them is its own affair.
//!
//! Each copy reserves all that its origin does: what they share of memory at first, they may not
//! share later, and nothing here is sold twice.

use std::collections::BTreeSet;

use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, Desired, Phase, SandboxRecord};

use super::sandboxes::{New, node_id, phase_name, sandbox_id, shape_of};
use super::{Changes, Done, State};
use crate::names;
use crate::refusal::{Refusal, RefusalKind};
use crate::resources::{Resources, Short, amount};

/// Most copies that are made at once.
pub const FORK_MAX: usize = 64;
/// Most names that are tried for a copy without one.
const NAME_ATTEMPTS_MAX: u32 = 10_000;

impl State {
    pub(super) fn fork_sandbox(
        &mut self,
        fork: &v1::ForkSandboxCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let (_, record) = self.sandboxes.owned(&fork.id, &fork.owner)?;
        let record = record.clone();
        let origin = record.sandbox.clone().unwrap_or_default();
        let ids = fork.ids.iter().map(|id| sandbox_id(id)).collect::<Result<Vec<_>, _>>()?;
        if ids.is_empty() || ids.len() > FORK_MAX {
            return Err(Refusal::invalid(format!("a fork makes 1 to {FORK_MAX} copies")));
        }
        self.can_be_forked(&origin)?;
        let names = self.names_of_copies(&origin.project, &fork.name, &ids)?;
        self.reserve_copies(&origin, ids.len())?;
        let mut made = Vec::new();
        for (id, name) in ids.into_iter().zip(names) {
            let spec = v1::SandboxSpec {
                name,
                // Nobody's command waits for it.
                remove_on_exit: false,
                ..origin.spec.clone().unwrap_or_default()
            };
            let new = New {
                id,
                project: origin.project.clone(),
                owner: origin.owner.clone(),
                spec,
                node_id: origin.node_id.clone(),
                forked_from: Some(v1::ForkOrigin {
                    sandbox_id: fork.id.clone(),
                    fork_id: fork.fork_id.clone(),
                }),
            };
            let sandbox = self.new_sandbox(new);
            let image_digest = record.image_digest.clone();
            let record =
                SandboxRecord { sandbox: Some(sandbox.clone()), image_digest, computing: true };
            self.sandboxes.insert(record)?;
            changes.sandboxes.insert(id);
            changes.desired.insert(id);
            made.push(sandbox);
        }
        Ok(Done::Forked(made))
    }

    fn can_be_forked(&self, origin: &v1::Sandbox) -> Result<(), Refusal> {
        let observed = origin.observed.clone().unwrap_or_default();
        let phase = self.view_phase(origin);
        if origin.desired() != Desired::Running || phase != Phase::Running {
            let name = origin.spec.as_ref().map_or("", |spec| spec.name.as_str());
            let (is, hint) = match origin.desired() {
                Desired::Paused => ("paused".to_owned(), format!("`tow resume {name}` first")),
                Desired::Deleted => ("being deleted".to_owned(), "choose another".to_owned()),
                _ => (phase_name(phase), format!("`tow start {name}` first")),
            };
            return Err(Refusal::precondition(format!(
                "only a running sandbox can be forked, and `{name}` is {is}: {hint}"
            )));
        }
        let node = self.nodes.get(node_id(&origin.node_id)?).and_then(|it| it.node.as_ref());
        let drivers = node.map(|node| node.drivers.as_slice()).unwrap_or_default();
        if drivers.iter().any(|driver| driver.name == observed.driver && driver.fork) {
            return Ok(());
        }
        Err(Refusal::precondition(format!(
            "its node runs it by the driver `{}`, which cannot copy memory: only VMs can be forked \
             (a sandbox made without `--isolation process`)",
            observed.driver
        )))
    }

    fn view_phase(&self, sandbox: &v1::Sandbox) -> Phase {
        let record = SandboxRecord { sandbox: Some(sandbox.clone()), ..Default::default() };
        self.view(&record).observed.as_ref().map_or(Phase::Placed, v1::Observed::phase)
    }

    fn reserve_copies(&mut self, origin: &v1::Sandbox, count: usize) -> Result<(), Refusal> {
        let node = node_id(&origin.node_id)?;
        let each = shape_of(origin);
        let all = (0..count).fold(Resources::default(), |sum, _| sum.plus(each));
        self.nodes.reserve_on_ready(node, all).map_err(|short| {
            let (free, name) = self.nodes.free_and_name(node);
            let (what, wanted, left) = match short {
                Some(Short::Memory) => ("memory", amount(all.memory_mib), amount(free.memory_mib)),
                Some(Short::Disk) => ("disk", amount(all.disk_mib), amount(free.disk_mib)),
                Some(Short::Cpus) => ("CPUs", all.cpus.to_string(), free.cpus.to_string()),
                None => {
                    return Refusal::precondition(format!(
                        "node `{name}` takes no sandboxes now, and copies can be made only there"
                    ));
                }
            };
            Refusal::new(
                RefusalKind::Exhausted,
                format!(
                    "{count} copies need {wanted} of {what}, and node `{name}`, where copies are \
                     made, has {left} free: make fewer, or stop another sandbox there"
                ),
            )
        })
    }

    /// The names of all copies; none of them is taken, or all of it is refused.
    fn names_of_copies(
        &self,
        project: &str,
        wanted: &str,
        ids: &[SandboxId],
    ) -> Result<Vec<String>, Refusal> {
        let mut taken = BTreeSet::new();
        let mut is_free = |name: &String| {
            self.sandboxes.by_name(project, name).is_none() && taken.insert(name.clone())
        };
        let name = |(number, id): (usize, &SandboxId)| {
            let wanted = match (wanted, ids.len()) {
                ("", _) => {
                    let made_up =
                        (0..NAME_ATTEMPTS_MAX).map(|attempt| names::from_id(*id, attempt));
                    let mut made_up = made_up.filter(&mut is_free);
                    return made_up.next().ok_or_else(|| {
                        Refusal::invalid("no made-up name is free; give one with --name")
                    });
                }
                (wanted, 1) => wanted.to_owned(),
                (wanted, _) => format!("{wanted}-{}", number + 1),
            };
            if is_free(&wanted) {
                return Ok(wanted);
            }
            Err(Refusal::new(
                RefusalKind::AlreadyExists,
                format!("the name `{wanted}` is taken: remove that sandbox or choose another name"),
            ))
        };
        ids.iter().enumerate().map(name).collect()
    }
}
