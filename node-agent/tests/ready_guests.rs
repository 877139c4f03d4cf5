//! Guests that wait for a sandbox, between doubles: they are taken over, go first where memory is
//! short, and leave nothing behind.

#![allow(clippy::unwrap_used, reason = "tests")]

mod node_support;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use node_support::{Template, WAIT_MAX, World, desired, sandbox};
use towline_node_agent::hypervisor::{Hypervisor, VmSpec};
use towline_proto::v1::{Desired, DesiredSandbox, Phase};

/// Waits until it holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(WAIT_MAX, waiting).await.is_ok(), "waited in vain for {what}");
}

async fn world(ready_guests: usize) -> Option<World> {
    let mut world = World::new().await?;
    *world.doubles.template.lock().unwrap() = Template::Good;
    world.more = format!("ready_guests = {ready_guests}\n");
    world.start();
    Some(world)
}

impl World {
    fn wants(&self, all: &[(u8, u64, Desired)]) {
        let all = all.iter().map(|&(n, generation, what)| desired(n, generation, what));
        self.control.want(all.collect());
    }

    fn ready_folders(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.data().join("ready")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn vm_of(&self, n: u8) -> PathBuf {
        self.data().join("sandboxes").join(sandbox(n).to_string()).join("vm")
    }

    /// VMs that run, by number.
    fn running(&self) -> Vec<usize> {
        let started = self.doubles.pids().len();
        (0..started).filter(|&vm| self.doubles.is_running(vm)).collect()
    }

    /// Asks for sandboxes beside number 1, from this number on, until one takes a guest over that was
    /// ready; the others are removed again. Returns its number and that of its VM.
    async fn until_ready(&self, from: u8) -> (u8, usize) {
        for n in from..from + 100 {
            self.wants(&[(1, 1, Desired::Running), (n, 1, Desired::Running)]);
            let start = self.control.until(n, 1, Phase::Running).await.start;
            let vm = self.running().into_iter().find(|&vm| {
                let configured = self.doubles.try_configured(vm);
                configured.is_some_and(|configured| configured.hostname == format!("box-{n}"))
            });
            if start == "ready" {
                return (n, vm.unwrap());
            }
            assert_eq!(start, "warm");
            self.wants(&[(1, 1, Desired::Running), (n, 2, Desired::Deleted)]);
            self.control.until(n, 2, Phase::Gone).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no guest was ready");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ready_guest_becomes_the_next_sandbox_and_outlives_the_node_agent() {
    let Some(mut world) = world(1).await else { return };
    world.wants(&[(1, 1, Desired::Running)]);
    assert_eq!(world.control.until(1, 1, Phase::Running).await.start, "warm");
    let (n, vm) = world.until_ready(2).await;
    let configured = [0, vm].map(|vm| world.doubles.configured(vm));
    assert_ne!(configured[0].entropy, configured[1].entropy);
    assert_ne!(configured[0].resync_marker, configured[1].resync_marker);
    let taken = std::fs::canonicalize(world.vm_of(n)).unwrap();
    let (taken, disk) = (taken.parent().unwrap(), world.vm_of(n).with_file_name("upper.img"));
    assert!(world.ready_folders().iter().any(|folder| folder == taken));
    let inode = |disk: &Path| std::fs::metadata(disk).unwrap().ino();
    assert_eq!(inode(&disk), inode(&taken.join("upper.img")));
    // Another one waits.
    until("another one", || world.running().len() == 3).await;

    // What was taken is a sandbox like any other: it is taken up again, stopped, started, removed.
    world.kill().await;
    until("the end of the one that waits", || world.running() == [0, vm]).await;
    world.start();
    world.wants(&[(1, 1, Desired::Running), (n, 1, Desired::Running)]);
    let laptop = world.laptop().await;
    until("sessions anew", || [0, vm].iter().all(|&vm| world.doubles.sessions(vm) > 1)).await;
    world.ping(&laptop, &world.ticket(&laptop, n)).await.unwrap();
    world.wants(&[(1, 1, Desired::Running), (n, 2, Desired::Stopped)]);
    world.control.until(n, 2, Phase::Stopped).await;
    assert!(disk.exists());
    let again = DesiredSandbox { ran: true, ..desired(n, 3, Desired::Running) };
    world.control.want(vec![desired(1, 1, Desired::Running), again]);
    let start = world.control.until(n, 3, Phase::Running).await.start;
    assert_eq!(start, "warm", "its own disk has what it wrote");
    world.wants(&[(1, 2, Desired::Deleted), (n, 4, Desired::Deleted)]);
    world.control.until(1, 2, Phase::Gone).await;
    world.control.until(n, 4, Phase::Gone).await;
    assert!(!taken.exists());
    assert_eq!(std::fs::read_dir(world.data().join("sandboxes")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_promised_goes_before_what_is_ready() {
    // 1024 MiB are offered, and 128 wanted by each.
    let Some(world) = world(3).await else { return };
    let mut wanted = vec![desired(1, 1, Desired::Running)];
    world.control.want(wanted.clone());
    world.control.until(1, 1, Phase::Running).await;
    until("three that wait", || world.running().len() == 4).await;
    // A sandbox of another shape takes all that is left but one guest's memory.
    let mut large = desired(2, 1, Desired::Running);
    large.spec.as_mut().unwrap().shape.as_mut().unwrap().memory_mib = 700;
    wanted.push(large);
    world.control.want(wanted.clone());
    world.control.until(2, 1, Phase::Running).await;
    // 1024 - 128 - 700 = 196: one of them may stay, and those that ended did so before it started.
    assert_eq!(world.running().len(), 3);
    until("folders that are gone", || world.ready_folders().len() == 1).await;
    wanted[1] = DesiredSandbox { generation: 2, ..wanted[1].clone() };
    wanted[1].set_desired(Desired::Deleted);
    world.control.want(wanted);
    world.control.until(2, 2, Phase::Gone).await;
    until("three that wait again", || world.running().len() == 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_dies_is_replaced_and_a_claim_of_it_still_starts() {
    let Some(world) = world(1).await else { return };
    world.wants(&[(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    until("one that waits", || world.running().len() == 2).await;
    let folder = world.ready_folders();
    world.doubles.end(1).await;
    // Whether its end was noticed before or not.
    world.wants(&[(1, 1, Desired::Running), (2, 1, Desired::Running)]);
    assert_eq!(world.control.until(2, 1, Phase::Running).await.start, "warm");
    world.wants(&[(1, 2, Desired::Deleted), (2, 2, Desired::Deleted)]);
    world.control.until(1, 2, Phase::Gone).await;
    world.control.until(2, 2, Phase::Gone).await;
    assert!(!folder[0].exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_node_agent_left_waiting_is_ended_and_what_was_taken_is_not() {
    let Some(mut world) = world(1).await else { return };
    world.wants(&[(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    let (n, vm) = world.until_ready(2).await;
    world.kill().await;
    let dir = world.data().join("ready/guest-left/vm");
    std::fs::create_dir_all(&dir).unwrap();
    let (layers, upper) = (Vec::new(), None);
    let spec =
        VmSpec { cpus: 1, memory_mib: 128, processes_max: 0, layers, upper, dir, console: false };
    // Nobody holds it, and it is nobody's child any more when the next node agent looks.
    let left = world.doubles.pids().len();
    let held = world.doubles.boot(&spec).await.unwrap();
    assert!(world.doubles.is_running(left));
    world.more = "ready_guests = 0\n".to_owned();
    world.start();
    until("the end of what waited", || !world.doubles.is_running(left)).await;
    drop(held);
    until("its folder to go", || world.ready_folders().len() == 1).await;
    until("sessions anew", || [0, vm].iter().all(|&vm| world.doubles.sessions(vm) > 1)).await;
    assert!(world.vm_of(n).join("vm.json").exists());
    assert_eq!(world.running(), [0, vm]);
}
