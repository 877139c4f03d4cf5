//! Copies of this guest: its workload is frozen before it is saved, so that nothing of it runs in a
//! copy before that has become somebody else: other random numbers, clock, names and secret.
//!
//! Software inside learns of it by the file `/run/towline/fork`: empty in a sandbox that is no copy,
//! and replaced by another file (so that whoever watches it wakes) in each copy.

use std::io;
use std::path::Path;

use towline_proto::v1::Become;

use crate::boot::{self, Kernel};
use crate::configure::{ENTROPY_MIN, checked_hostname, set_clock};
use crate::refusal::Refusal;
use crate::root;
use crate::serve::Services;
use crate::workload::Halt;

/// Halts the workload.
pub(crate) async fn freeze(services: &Services, kernel: Kernel) -> Result<(), Refusal> {
    if kernel == Kernel::Shared {
        return Err(Refusal::invalid("only a guest with a kernel of its own can be copied"));
    }
    let frozen = services.execs.workload().freeze(Halt::Fork).await;
    frozen.map_err(|error| Refusal::io("cannot freeze the workload", &error))
}

/// Lets the workload go on.
pub(crate) fn thaw(services: &Services) {
    if let Err(error) = services.execs.workload().thaw(Halt::Fork) {
        crate::agent::log(&format!("cannot thaw the workload: {error}"));
    }
}

/// Makes this guest, whose workload is frozen, another one.
pub(crate) async fn become_copy(services: &Services, order: &Become) -> Result<(), Refusal> {
    // First of all: until then it draws the same numbers as its source and all other copies.
    if order.entropy.len() < ENTROPY_MIN {
        return Err(Refusal::invalid("the node gave too little entropy"));
    }
    boot::add_entropy(&order.entropy)
        .map_err(|error| Refusal::io("cannot take the node's entropy", &error))?;
    set_clock(order.unix_ns)?;
    let hostname = checked_hostname(&order.hostname)?;
    let fork = order.fork_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let announced = format!("{fork} {}\n", order.sandbox_id.escape_default());
    services
        .execs
        .workload()
        .set_hostname(&hostname)
        .await
        .map_err(|error| Refusal::io("cannot set the hostname", &error))?;
    let machine_id = order.machine_id.clone();
    let renamed = move || -> io::Result<()> {
        root::write_own_names(&hostname, &machine_id)?;
        root::announce_fork(Path::new(root::ROOT), &announced)
    };
    // Files of the sandbox may come from afar.
    let renamed = tokio::task::spawn_blocking(renamed).await.map_err(io::Error::other);
    renamed
        .and_then(|renamed| renamed)
        .map_err(|error| Refusal::io("cannot write the sandbox's new names", &error))
}
