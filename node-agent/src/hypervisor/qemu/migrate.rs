//! Saves a guest to a file, and halts and resumes one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::hypervisor::Vm;
use crate::hypervisor::qmp::Qmp;

/// Largest file: a guest that has just booted holds about 100 MiB that are not zero.
pub(super) const SIZE_MAX: u64 = 1 << 30;

/// What a saved guest's file holds besides its memory: devices, and a few bytes for each page.
pub(super) const DEVICES_MIB: u64 = 256;
/// Reading all of a guest's memory back, on a busy disk.
const LOAD_MAX: Duration = Duration::from_secs(120);
/// Between two looks at a QEMU that is just starting or reads memory: it tells of neither.
const LOOK: Duration = Duration::from_millis(2);

/// Lets a guest go on that was saved while it was halted, as soon as all of it is read.
pub(super) async fn go_on(vm: &Vm) -> io::Result<()> {
    let work = async {
        let mut qmp = loop {
            match Qmp::connect(vm.dir()).await {
                Ok(qmp) => break qmp,
                Err(_) => sleep(LOOK).await,
            }
        };
        while qmp.execute("query-status", json!({})).await?["status"] == "inmigrate" {
            sleep(LOOK).await;
        }
        qmp.execute("cont", json!({})).await.map(drop)
    };
    tokio::select! {
        biased;
        done = timeout(LOAD_MAX, work) => done.unwrap_or_else(|_| {
            Err(io::Error::other(format!("not restored within {} s", LOAD_MAX.as_secs())))
        }),
        exit = vm.wait_exit() => Err(io::Error::other(exit.to_string())),
    }
}

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
