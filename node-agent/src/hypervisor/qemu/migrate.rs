//! Saves a guest to a file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use serde_json::json;

use crate::hypervisor::Vm;
use crate::hypervisor::qmp::Qmp;

/// Largest file: a guest that has just booted holds about 100 MiB that are not zero.
pub(super) const SIZE_MAX: u64 = 1 << 30;

/// Halts the guest and writes memory and devices to the file.
pub(super) async fn migrate(vm: &Vm, file: &File) -> io::Result<()> {
    const NAME: &str = "template";
    let mut qmp = Qmp::connect(vm.dir()).await?;
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": events })).await?;
    // Its default is made for networks.
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 40 })).await?;
    qmp.execute("stop", json!({})).await?;
    qmp.hand_over(NAME, file.as_fd()).await?;
    qmp.execute("migrate", json!({ "uri": format!("fd:{NAME}") })).await?;
    loop {
        let status = qmp.event("MIGRATION").await?;
        match status["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let info = qmp.execute("query-migrate", json!({})).await?;
                let reason = info["error-desc"].as_str().unwrap_or("QEMU does not say why");
                return Err(io::Error::other(reason.to_owned()));
            }
            _ => {}
        }
    }
}
