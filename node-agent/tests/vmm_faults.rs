//! A Cloud Hypervisor that is none, is too old, refuses, hangs, talks nonsense or dies, at each order
//! of a start: the start fails with the reason, and nothing of it lives.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use towline_node_agent::hypervisor::cloud_hypervisor::{CloudHypervisor, CloudHypervisorConfig};
use towline_node_agent::hypervisor::{DiskLimits, Hypervisor, HypervisorError, Starter, VmSpec};
use towline_node_agent::kernel::Kernel;

/// The orders of a start, in their order.
const ORDERS: [&str; 3] = ["vmm.ping", "vm.create", "vm.boot"];

/// The fake of this fault, under the name that tells it.
fn fake(dir: &Path, fault: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().unwrap().with_file_name("examples/fake-vmm");
    let to = dir.join(format!("fake-vmm.{fault}"));
    std::fs::copy(&built, &to).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    to
}

fn driver(dir: &Path, fault: &str) -> Result<CloudHypervisor, HypervisorError> {
    let vmlinux = dir.join("vmlinux");
    std::fs::write(&vmlinux, "").unwrap();
    CloudHypervisor::find(&CloudHypervisorConfig {
        cache_dir: dir.to_owned(),
        program: fake(dir, fault),
        kernel: Kernel {
            digest: "none".into(),
            release: "none".into(),
            vmlinux: vmlinux.clone(),
            modules: dir.to_owned(),
            module_order: Vec::new(),
            modules_disk: None,
        },
        initramfs: vmlinux,
        starter: Starter::Own,
        disk_limits: DiskLimits::default(),
    })
}

fn spec(dir: &Path) -> VmSpec {
    let vm = dir.join("vm");
    std::fs::create_dir(&vm).unwrap();
    VmSpec {
        cpus: 1,
        memory_mib: 256,
        processes_max: 0,
        layers: Vec::new(),
        upper: None,
        dir: vm,
        console: false,
    }
}

/// Starts one with this fault: why it failed, and what it was told.
async fn start(fault: &str) -> (String, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(dir.path(), fault).unwrap();
    let spec = spec(dir.path());
    let error = driver.boot(&spec).await.expect_err(fault);
    assert!(driver.adopt(&spec.dir).unwrap().is_none(), "{fault}: it lives on");
    let told = std::fs::read_to_string(spec.dir.join("told")).unwrap_or_default();
    (towline_node_agent::chain(&error), told.lines().map(str::to_owned).collect())
}

#[test]
fn what_is_none_or_too_old_is_refused_before_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (version, reason) in [
        ("cloud-hypervisor v52.1", "it is v52.1; v53 or newer is needed"),
        ("cloud-hypervisor vNext", "does not say that it is a Cloud Hypervisor"),
        ("QEMU emulator version 7.2.0", "does not say that it is a Cloud Hypervisor"),
    ] {
        let error = driver(dir.path(), &format!("version.{version}")).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    for version in ["cloud-hypervisor v53.0", "cloud-hypervisor v60.2"] {
        let found = driver(dir.path(), &format!("version.{version}")).unwrap();
        let is_new = found.capabilities().missing.iter().any(|what| what.contains("newer than"));
        assert_eq!(is_new, version.contains("60"), "{version}");
    }
}

#[tokio::test]
async fn one_that_does_as_it_is_told_is_told_three_things() {
    let dir = tempfile::tempdir().unwrap();
    let driver = driver(dir.path(), "no.fault").unwrap();
    let spec = spec(dir.path());
    let vm = driver.boot(&spec).await.unwrap();
    assert!(vm.is_running());
    vm.kill().unwrap();
    vm.wait_exit().await;
    let told = std::fs::read_to_string(spec.dir.join("told")).unwrap();
    assert_eq!(told.lines().collect::<Vec<_>>(), ORDERS);
}

#[tokio::test]
async fn after_a_fault_it_is_told_nothing_more_and_killed() {
    for fault in ["500", "404", "junk", "endless", "exit"] {
        for (number, order) in ORDERS.into_iter().enumerate() {
            // What it says of itself besides its name is of no interest.
            let (error, told) = start(&format!("{fault}.{order}")).await;
            assert_eq!(told, ORDERS[..=number], "{fault} at {order}: {error}");
            let says = match fault {
                "exit" => "exit status: 3",
                "500" | "404" => fault,
                _ => order,
            };
            assert!(error.contains(says), "{fault} at {order}: {error}");
        }
    }
    let (error, told) = start("exit.start").await;
    assert!(told.is_empty() && error.contains("exit status: 3"), "{error}");
}

#[tokio::test]
async fn one_that_hangs_is_given_up_and_killed() {
    let hang = async |order| start(&format!("hang.{order}")).await;
    let (ping, create, boot) = tokio::join!(hang(ORDERS[0]), hang(ORDERS[1]), hang(ORDERS[2]));
    for (number, (error, told)) in [ping, create, boot].into_iter().enumerate() {
        assert_eq!(told, ORDERS[..=number], "{error}");
        assert!(error.contains("no answer within") && error.contains(ORDERS[number]), "{error}");
    }
}
