//! A real microVM with the smallest guest that speaks the guest link: boots, answers, carries bytes,
//! and is taken over after a kill -9 of the process that started it.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test says what it measured"
)]

mod vm_support;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towline_node_agent::disks;
use towline_node_agent::guest_link::{GuestLink, GuestLinkError};
use towline_node_agent::hypervisor::qemu::{AccelChoice, Qemu};
use towline_node_agent::hypervisor::{Accel, Hypervisor, LAYER_DISKS_MAX, VmSpec};
use towline_streams::{MuxHandle, Priority};
use vm_support::{BOOT_MAX, SECRET, cache_dir, config, driver, run_async, vm_dir};

/// Names the VM's directory to a child of the test that plays the node agent.
const CHILD_DIR: &str = "TOWLINE_TEST_VM_CHILD_DIR";

fn spec(dir: &Path) -> VmSpec {
    VmSpec {
        cpus: 1,
        memory_mib: 256,
        processes_max: 64,
        layers: Vec::new(),
        upper: None,
        dir: dir.to_owned(),
        console: std::env::var_os("TOWLINE_TEST_CONSOLE").is_some(),
    }
}

/// As many disks as a VM may have: each needs a slot of the machine.
fn with_all_disks(mut spec: VmSpec) -> VmSpec {
    for number in 0..LAYER_DISKS_MAX {
        let layer = spec.dir.join(format!("layer,{number}.img"));
        std::fs::write(&layer, vec![0; 1 << 16]).unwrap();
        spec.layers.push(layer);
    }
    let upper = spec.dir.join("upper.img");
    disks::create(&cache_dir(), &upper, 96).unwrap();
    spec.upper = Some(upper);
    spec
}

/// Sends bytes through an echo stream and checks that exactly they come back.
async fn echo(handle: &MuxHandle, len: usize) {
    let (mut send, mut recv) = handle.open(Priority::Interactive).unwrap();
    let sent: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let copy = sent.clone();
    let writer = tokio::spawn(async move {
        send.write_all(b"e").await.unwrap();
        send.write_all(&copy).await.unwrap();
        send.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    recv.read_to_end(&mut got).await.unwrap();
    writer.await.unwrap();
    assert!(got == sent, "{} bytes came back of {}, or others", got.len(), sent.len());
}

async fn sink(handle: &MuxHandle, len: u64) -> Duration {
    let (mut send, mut recv) = handle.open(Priority::Bulk).unwrap();
    let start = Instant::now();
    send.write_all(b"s").await.unwrap();
    let piece = vec![7; 64 << 10];
    let mut left = len;
    while left > 0 {
        let step = usize::try_from(left).unwrap().min(piece.len());
        send.write_all(&piece[..step]).await.unwrap();
        left -= step as u64;
    }
    send.shutdown().await.unwrap();
    assert_eq!(recv.read_u64().await.unwrap(), len);
    start.elapsed()
}

async fn make(handle: &MuxHandle, len: u64) -> Duration {
    let (mut send, mut recv) = handle.open(Priority::Bulk).unwrap();
    let start = Instant::now();
    send.write_all(b"m").await.unwrap();
    send.write_u64(len).await.unwrap();
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    loop {
        let len = recv.read(&mut buffer).await.unwrap();
        if len == 0 {
            break;
        }
        total += len as u64;
    }
    assert_eq!(total, len);
    start.elapsed()
}

#[test]
fn vm_boots_says_hello_and_carries_bytes() {
    run_async(async {
        let Some(driver) = driver().await else { return };
        let capabilities = driver.capabilities();
        println!("{capabilities:?}");
        if capabilities.accel == Accel::Tcg {
            assert!(!capabilities.accel_reason.is_empty());
        }
        let (_guard, dir) = vm_dir();
        let spec = with_all_disks(spec(&dir));
        let start = Instant::now();
        let vm = driver.boot(&spec).await.unwrap();
        let spawned = start.elapsed();
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        println!("spawn {spawned:?}, hello {:?}", start.elapsed());
        assert_eq!(link.hello.agent_version, "echo");
        assert!(!link.hello.configured);
        let mut times = Vec::new();
        for _ in 0..50 {
            let start = Instant::now();
            echo(&link.handle, 16).await;
            times.push(start.elapsed());
        }
        times.sort();
        println!("echo of 16 bytes on a new stream: p50 {:?}, worst {:?}", times[25], times[49]);
        tokio::join!(echo(&link.handle, 300_000), echo(&link.handle, 1_000_000));
        let mib = 64;
        let (there, back) =
            (sink(&link.handle, mib << 20).await, make(&link.handle, mib << 20).await);
        let rate = |time: Duration| (mib << 20) as f64 / 1e6 / time.as_secs_f64();
        println!("host to guest {:.0} MB/s, guest to host {:.0} MB/s", rate(there), rate(back));
        let exit = vm.quit(Duration::from_secs(20)).await.unwrap();
        assert_eq!(exit.status, "exit status: 0", "{exit}");
        assert!(!vm.is_running());
        assert!(driver.adopt(&dir).unwrap().is_none());
    });
}

#[test]
fn vm_that_ends_at_boot_says_so_and_does_not_hang() {
    run_async(async {
        let Some(driver) = driver().await else { return };
        let (_guard, dir) = vm_dir();
        let vm = driver.boot(&spec(&dir)).await.unwrap();
        vm.kill().unwrap();
        let error = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap_err();
        assert!(matches!(error, GuestLinkError::Exited(_)), "{error}");
        assert!(error.to_string().contains("signal: 9"), "{error}");
        let vm = driver.boot(&spec(&dir)).await.unwrap();
        let error = GuestLink::connect(&vm, SECRET, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("waited 50ms for"), "{error}");
        vm.kill().unwrap();
        vm.wait_exit().await;
    });
}

#[test]
fn vm_whose_kernel_is_damaged_is_an_error_with_the_reason() {
    run_async(async {
        let Some(mut config) = config() else { return };
        config.accel = AccelChoice::Tcg;
        config.kernel.vmlinux = config.kernel.modules.join("order");
        let driver = Qemu::new(config).await.unwrap();
        let (_guard, dir) = vm_dir();
        let error = match driver.boot(&spec(&dir)).await {
            Ok(vm) => GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap_err().to_string(),
            Err(error) => format!("{error}: {:?}", std::error::Error::source(&error)),
        };
        assert!(error.contains("exit status: 1") && error.contains("kernel"), "{error}");
    });
}

#[test]
fn vm_with_an_impossible_shape_is_refused_before_anything_starts() {
    run_async(async {
        let Some(driver) = driver().await else { return };
        let (_guard, dir) = vm_dir();
        let good = spec(&dir);
        for (wrong, why) in [
            (VmSpec { cpus: 0, ..good.clone() }, "at least one CPU"),
            (VmSpec { memory_mib: 10, ..good.clone() }, "needs 96 MiB"),
            (VmSpec { upper: Some(dir.join("no.img")), ..good.clone() }, "not a file"),
            (VmSpec { layers: vec![dir.clone(); 17], ..good.clone() }, "at most 16"),
        ] {
            let error = driver.boot(&wrong).await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(driver.adopt(&dir).unwrap().is_none());
    });
}

#[test]
fn vm_outlives_a_kill_of_whoever_started_it_and_is_taken_over() {
    run_async(async {
        let Some(driver) = driver().await else { return };
        let (_guard, dir) = vm_dir();
        let rounds = 6;
        for round in 0..rounds {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "vm_child_that_plays_the_node_agent", "--nocapture"])
                .env(CHILD_DIR, &dir)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // It says when it is in the middle of transfers both ways; then it is killed there.
            let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            while !line.contains("in the middle") {
                line.clear();
                let len = std::io::BufRead::read_line(&mut output, &mut line).unwrap();
                assert!(len > 0, "the child ended: {:?}", child.wait());
            }
            child.kill().unwrap();
            child.wait().unwrap();
            let vm = driver.adopt(&dir).unwrap().expect("the VM outlives the process");
            if round % 2 == 1 {
                // Without its note, as when the node agent dies right after the spawn.
                std::fs::remove_file(dir.join("vm.json")).unwrap();
                let found = driver.adopt(&dir).unwrap().expect("the VM is found by its directory");
                assert_eq!(found.identity(), vm.identity());
            }
            let start = Instant::now();
            let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
            println!("round {round}: in sync again after {:?}", start.elapsed());
            assert!(link.hello.configured, "a new boot instead of a new session");
            echo(&link.handle, 400_000).await;
        }
        let vm = driver.adopt(&dir).unwrap().unwrap();
        vm.quit(Duration::from_secs(20)).await.unwrap();
    });
}

/// Not a test by itself: started by the one above, boots or adopts the VM and keeps it busy.
#[test]
fn vm_child_that_plays_the_node_agent() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let dir = Path::new(&dir);
    run_async(async {
        let driver = driver().await.unwrap();
        let vm = match driver.adopt(dir).unwrap() {
            Some(vm) => vm,
            None => driver.boot(&spec(dir)).await.unwrap(),
        };
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        let (mut send, mut recv) = link.handle.open(Priority::Bulk).unwrap();
        send.write_all(b"e").await.unwrap();
        tokio::spawn(async move { while send.write_all(&[9; 50_000]).await.is_ok() {} });
        let mut buffer = vec![0; 1 << 20];
        for round in 0.. {
            recv.read_exact(&mut buffer).await.unwrap();
            if round == 3 {
                println!("in the middle");
                std::io::stdout().flush().unwrap();
            }
        }
    });
}
