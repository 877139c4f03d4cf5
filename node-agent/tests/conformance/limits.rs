//! The limits of what a VM's disks move are the VMM's, whichever way a guest came up.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};
use towline_node_agent::hypervisor::qemu::Qemu;
use towline_node_agent::hypervisor::{DiskLimits, Hypervisor};

use crate::guest::{BOOT_MAX, Guest, cloud_hypervisor_in, config, layer, run_async, vm_dir};
use crate::warm::{SHAPE, configure};

const LIMITS: DiskLimits = DiskLimits { mib_s: Some(64), iops: Some(5000) };

#[test]
fn vm_disks_share_their_limits() {
    run_async(async {
        let cache = tempfile::tempdir().unwrap();
        let Some(mut config) = config() else { return };
        cache.path().clone_into(&mut config.cache_dir);
        config.disk_limits = LIMITS;
        let driver = Qemu::new(config).await.unwrap();
        are_shared(&driver, |dir| {
            let mut orders = connect(&dir.join("qmp.sock"));
            let ask = b"{\"execute\": \"qmp_capabilities\"} {\"execute\": \"query-block\"}\n";
            orders.write_all(ask).unwrap();
            // A greeting, and an answer to the first.
            let said = BufReader::new(orders).lines().map(Result::unwrap);
            let said = said.filter(|line| line.contains("\"return\"")).nth(1).unwrap();
            let said: Value = serde_json::from_str(&said).unwrap();
            let disks = said["return"].as_array().unwrap().iter().map(|disk| &disk["inserted"]);
            // The places for disks that it does not have are none.
            let real = disks.filter(|disk| disk["drv"] == "raw");
            let limits = |disk: &Value| {
                assert_eq!((&disk["bps"], &disk["iops"]), (&json!(64 << 20), &json!(5000)));
                disk["group"].as_str().unwrap().to_owned()
            };
            real.filter(|disk| disk["image"]["virtual-size"] != 0).map(limits).collect()
        })
        .await;
    });
}

#[test]
fn cloud_hypervisor_disks_share_their_limits() {
    run_async(async {
        let cache = tempfile::tempdir().unwrap();
        let Some(driver) = cloud_hypervisor_in(Some(cache.path()), LIMITS).await else { return };
        are_shared(&driver, |dir| {
            let mut api = connect(&dir.join("api.sock"));
            api.write_all(b"GET /api/v1/vm.info HTTP/1.1\r\nHost: vmm\r\n\r\n").unwrap();
            let mut answer = BufReader::new(api);
            let mut len = 0;
            loop {
                let mut line = String::new();
                answer.read_line(&mut line).unwrap();
                let line = line.to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    len = value.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; len];
            answer.read_exact(&mut body).unwrap();
            let said: Value = serde_json::from_slice(&body).unwrap();
            let limits = &said["config"]["rate_limit_groups"][0]["rate_limiter_config"];
            assert_eq!(limits["bandwidth"]["size"], 64 << 20, "{said}");
            assert_eq!(limits["ops"]["size"], 5000);
            let disks = said["config"]["disks"].as_array().unwrap().iter();
            disks.map(|disk| disk["rate_limit_group"].as_str().unwrap().to_owned()).collect()
        })
        .await;
    });
}

/// To a VMM that may be taken over, and then never answers.
fn connect(socket: &Path) -> UnixStream {
    let socket = UnixStream::connect(socket).unwrap();
    socket.set_read_timeout(Some(BOOT_MAX)).unwrap();
    socket
}

/// `groups` asks the VMM in a directory for the group of each of its disks.
async fn are_shared(driver: &dyn Hypervisor, groups: impl Fn(&Path) -> Vec<String>) {
    let dirs = [vm_dir(), vm_dir()];
    let [(_, first), (_, second)] = &dirs;
    let check = async |guest: &Guest| {
        let read = guest.run_as_root("cat /usr/bin/* > /dev/null; echo read").await;
        assert_eq!(read.stdout, "read\n", "{read:?}");
        let groups = groups(guest.vm.dir());
        // Its own, one layer, and the kernel's modules where this machine could make their disk.
        assert_eq!(groups, vec!["disks"; groups.len()]);
        assert!(groups.len() >= 2, "{groups:?}");
    };
    let Some(booted) = Guest::boot(driver, first).await else { return };
    check(&booted).await;
    driver.make_template(SHAPE).await.unwrap();
    let layers = vec![layer(second).unwrap()];
    let mut restored = Guest::restore_only(driver, second, layers).await;
    configure(&mut restored, 1).await;
    check(&restored).await;
}
