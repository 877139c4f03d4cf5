//! Tells the node's helper, again and again, how long VMs may run without this process: once it is
//! gone for that long, they are killed, whoever is dead.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::sleep;
use towline_node_helper::client::{Helper, HelperError};

/// So many renewals fit into a lease: one that is lost ends nothing.
const RENEWALS: u32 = 3;

/// Sets the deadline, or takes away that of an earlier node agent.
pub(crate) async fn renew(
    helper: &Arc<Helper>,
    lease: Option<Duration>,
) -> Result<(), HelperError> {
    let until = lease.map(|lease| {
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::try_from(now).unwrap_or_default();
        u64::try_from((now + lease).as_nanos()).unwrap_or(u64::MAX)
    });
    let helper = Arc::clone(helper);
    let renewed = tokio::task::spawn_blocking(move || helper.lease(until)).await;
    renewed.unwrap_or_else(|error| Err(HelperError::Refused(error.to_string())))
}

/// Renews it until this process ends.
pub(crate) async fn renew_forever(helper: &Arc<Helper>, lease: Duration) -> Infallible {
    loop {
        sleep(lease / RENEWALS).await;
        if let Err(error) = renew(helper, Some(lease)).await {
            tracing::error!(reason = crate::chain(&error), "lease not renewed");
        }
    }
}
