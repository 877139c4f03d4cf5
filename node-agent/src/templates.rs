//! Has templates made in the background, one at a time: of the usual shape when the node agent
//! starts, and of each shape that was just booted.
//!
//! Nothing waits for it and nothing fails by it: where a template cannot be made, VMs are booted.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::sleep;
use towline_proto::limits::{CPUS_DEFAULT, MEMORY_DEFAULT_MIB};

use crate::capacity::machine_cpus;
use crate::hypervisor::{Hypervisor, VmShape};

/// Shapes that wait; what does not fit is wished for again by the next start of its kind.
const WISHES_MAX: usize = 8;
/// A start that is under way, and what follows it, go first.
const PAUSE: Duration = Duration::from_secs(2);
/// Tries per shape: what failed so often fails again.
const TRIES_MAX: u32 = 3;

/// Where wishes go.
#[derive(Debug, Clone)]
pub struct Wishes(mpsc::Sender<VmShape>);

/// A queue of wishes.
pub(crate) fn wishes() -> (Wishes, mpsc::Receiver<VmShape>) {
    let (wishes, wanted) = mpsc::channel(WISHES_MAX);
    (Wishes(wishes), wanted)
}

impl Wishes {
    /// Says that a template of this shape would have been of use.
    pub fn wish_for(&self, shape: VmShape) {
        let _ = self.0.try_send(shape);
    }
}

/// Makes what is wished for, and first of all the usual shape. Ends with the last `Wishes`.
pub(crate) async fn make_forever(hypervisor: &dyn Hypervisor, mut wanted: mpsc::Receiver<VmShape>) {
    let mut tries = BTreeMap::new();
    let mut next = usual_shape();
    loop {
        if let Some(shape) = next {
            let tried: &mut u32 = tries.entry(shape).or_default();
            if *tried < TRIES_MAX {
                sleep(PAUSE).await;
                if let Err(error) = hypervisor.make_template(shape).await {
                    *tried += 1;
                    let (shape, reason) = (shape.to_string(), crate::chain(&error));
                    tracing::warn!(shape, reason, "no template, such vms are booted");
                }
            }
        }
        next = match wanted.recv().await {
            Some(shape) => Some(shape),
            None => return,
        };
    }
}

/// What a sandbox has that asks for nothing.
fn usual_shape() -> Option<VmShape> {
    let cpus = machine_cpus().ok()?.min(CPUS_DEFAULT);
    Some(VmShape { cpus, memory_mib: MEMORY_DEFAULT_MIB })
}
