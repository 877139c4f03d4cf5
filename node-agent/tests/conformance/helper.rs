//! The suite under the node's helper: each VMM as another user, in a root of its own. With
//! `TOWLINE_HELPER` all of the suite's VMs are started by the one that listens there, and the suite
//! may run as any user; without, these tests start one, and need root.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use towline_node_agent::config::HELPER_VARIABLE;
use towline_node_agent::hypervisor::qemu::Qemu;
use towline_node_agent::hypervisor::{Hypervisor, Starter};
use towline_node_helper::client::Helper;

use super::guest::{BOOT_MAX, Guest, cache_dir, config, guest_agent, run_async, spec, vm_dir};
use super::{conforms, fork, warm};

const UIDS_FIRST: u32 = 0x7001_0000;
const UIDS: u32 = 16;

/// A helper that ends with the test.
struct OwnHelper {
    folder: TempDir,
    process: Child,
    cgroup: String,
}

impl Drop for OwnHelper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for place in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            let _ = std::fs::remove_dir(Path::new(place).join(&self.cgroup));
        }
    }
}

impl OwnHelper {
    fn start() -> Option<(Self, Starter)> {
        if std::env::var_os(HELPER_VARIABLE).is_some() {
            eprintln!("SKIPPED: all of the suite runs under {HELPER_VARIABLE}");
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: a helper needs root");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("helper.sock");
        let number = std::process::id() % 4096;
        let cgroup = format!("towline-suite-{number}");
        let text = format!(
            "agent_uid = 0\nagent_gid = 0\nprograms = ['/usr/bin/qemu-system-x86_64']\n\
             socket = '{}'\nuids_first = {}\nuids_count = {UIDS}\ncgroup = '{cgroup}'\n",
            socket.display(),
            UIDS_FIRST + number * UIDS,
        );
        let file = folder.path().join("helper.toml");
        std::fs::write(&file, text).unwrap();
        let process = Command::new(program()).arg("--config").arg(&file).spawn().unwrap();
        let own = Self { folder, process, cgroup };
        let helper = Helper::new(&socket);
        let until = Instant::now() + BOOT_MAX;
        while helper.list().is_err() {
            assert!(Instant::now() < until, "it never listens in {}", own.folder.path().display());
            std::thread::sleep(Duration::from_millis(10));
        }
        Some((own, Starter::Helper(Arc::new(helper))))
    }
}

/// The helper's program, which is built beside this one.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap().join("towline-node-helper");
    assert!(built.exists(), "{} is built with the workspace", built.display());
    built
}

async fn qemu(starter: Starter, cache: Option<&Path>) -> Option<Qemu> {
    let mut config = config()?;
    config.starter = starter;
    if let Some(cache) = cache {
        cache.clone_into(&mut config.cache_dir);
    }
    Some(Qemu::new(config).await.unwrap())
}

#[test]
fn qemu_of_another_user_keeps_to_what_every_driver_does() {
    run_async(async {
        let Some((_helper, starter)) = OwnHelper::start() else { return };
        let Some(driver) = qemu(starter, None).await else { return };
        conforms(&driver).await;
    });
}

#[test]
fn vm_of_another_user_is_restored_as_a_booted_one() {
    let Some((_helper, starter)) = OwnHelper::start() else { return };
    warm::restored_is_as_booted(&|cache| Box::pin(qemu(starter.clone(), Some(cache))));
}

#[test]
fn vm_of_another_user_is_copied() {
    run_async(async {
        let Some((_helper, starter)) = OwnHelper::start() else { return };
        let Some(driver) = qemu(starter, None).await else { return };
        fork::is_copied(&driver).await;
    });
}

/// A node agent with a lease, that knows no control plane.
struct LeasedAgent(Child);

impl LeasedAgent {
    fn start(folder: &Path) -> Self {
        let config = format!(
            "name = 'leased'\ncontrol_plane = ['127.0.0.1:1']\ntoken_file = '/nonexistent'\n\
             data_dir = '{folder}/data'\ncache_dir = '{}'\nguest_agent = '{}'\nvmm = 'qemu'\n\
             accel = 'tcg'\nhelper = '{folder}/helper.sock'\nlease_s = 10\n",
            cache_dir().display(),
            guest_agent().display(),
            folder = folder.display(),
        );
        let file = folder.join("node-agent.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_towline-node-agent"));
        Self(command.arg("--config").arg(file).spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for LeasedAgent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + BOOT_MAX;
    while !done() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Dead and standing still are alike to it; while it renews, VMs run on beyond any one deadline.
#[test]
fn vm_of_a_node_agent_that_stands_still_is_ended_at_the_deadline() {
    run_async(async {
        let Some((helper, starter)) = OwnHelper::start() else { return };
        let Some(driver) = qemu(starter, None).await else { return };
        let (_guard, dir) = vm_dir();
        let Some(guest) = Guest::boot(&driver, &dir).await else { return };
        let agent = LeasedAgent::start(helper.folder.path());
        let deadline = || std::fs::read_to_string(helper.folder.path().join("helper/lease")).ok();
        let mut last = None;
        // The first, and four renewals: longer than one lease.
        for _ in 0..5 {
            until("it renews", || deadline().is_some_and(|now| Some(now) != last)).await;
            last = deadline();
        }
        assert_eq!(guest.run(&["sh", "-c", "exit 7"]).await.code, 7);
        agent.signal(Signal::STOP);
        until("it is ended", || !guest.vm.is_running()).await;
        let (_guard, dir) = vm_dir();
        let refused = driver.boot(&spec(&dir, vec![])).await.unwrap_err().to_string();
        assert!(refused.contains("lease has ended"), "{refused}");
        agent.signal(Signal::CONT);
        until("it renews", || deadline() != last).await;
        let guest = Guest::boot(&driver, &dir).await.unwrap();
        assert_eq!(guest.run(&["sh", "-c", "exit 7"]).await.code, 7);
    });
}
