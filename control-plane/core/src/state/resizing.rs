//! Other CPUs and another memory for a sandbox that does not run, from its next start on.
//!
//! Nothing is reserved or released: what does not run holds its disk only, and the next start
//! reserves what the shape says by then. One that runs is refused: its VM is as large as it was
//! booted, and what is reserved must never be less than what a node uses.

use towline_proto::v1::{self, Desired};

use super::sandboxes::{node_id, stays};
use super::{Changes, Done, State};
use crate::planted;
use crate::refusal::{Refusal, RefusalKind};
use crate::resources::{Resources, Short, amount, fits};
use crate::state::nodes::limits_of;

impl State {
    pub(super) fn resize_sandbox(
        &mut self,
        resize: &v1::ResizeSandboxCommand,
        changes: &mut Changes,
    ) -> Result<Done, Refusal> {
        let (id, record) = self.sandboxes.owned(&resize.id, &resize.owner)?;
        let sandbox = record.sandbox.clone().unwrap_or_default();
        stays(id, &sandbox)?;
        let spec = sandbox.spec.clone().unwrap_or_default();
        let before = spec.shape.unwrap_or_default();
        let or = |new: u64, old: u64| if new == 0 { old } else { new };
        let shape = v1::Shape {
            cpus: if resize.cpus == 0 { before.cpus } else { resize.cpus },
            memory_mib: or(resize.memory_mib, before.memory_mib),
            ..before
        };
        if shape == before {
            return Ok(Done::Sandbox(Box::new(self.view(record))));
        }
        if record.computing && !planted::resize_unguarded() {
            let name = &spec.name;
            return Err(Refusal::precondition(format!(
                "`{name}` is not stopped, and CPUs and memory change between two starts: `tow stop \
                 {name}`, then resize it, then `tow start {name}`"
            )));
        }
        self.could_ever_start(&sandbox, &shape)?;
        let spec = v1::SandboxSpec { shape: Some(shape), ..spec };
        if let Some(record) = self.sandboxes.by_id.get_mut(&id) {
            record.sandbox.get_or_insert_default().spec = Some(spec);
        }
        // A newer generation that wants one running would start it, and nothing is reserved.
        let reason = sandbox.desired_reason.clone();
        Ok(Done::Sandbox(Box::new(self.steer(id, Desired::Stopped, &reason, changes))))
    }

    /// Whether its node, which has its disk, is large enough when nothing else runs there.
    fn could_ever_start(&self, sandbox: &v1::Sandbox, shape: &v1::Shape) -> Result<(), Refusal> {
        let node = self.nodes.get(node_id(&sandbox.node_id)?).and_then(|it| it.node.as_ref());
        let Some(node) = node else { return Ok(()) };
        let (limits, want) = (limits_of(node), Resources::of_shape(shape).compute());
        fits(limits, Resources::default(), want).map_err(|short| {
            let text = |of: Resources| match short {
                Short::Cpus => format!("{} CPUs", of.cpus),
                _ => format!("{} of memory", amount(of.memory_mib)),
            };
            let (has, wanted) = (text(limits), text(want));
            Refusal::new(
                RefusalKind::Exhausted,
                format!(
                    "node `{}`, which has its disk, offers {has} in all, and {wanted} are asked \
                     for: ask for less",
                    node.name
                ),
            )
        })
    }
}
