//! The peer of a cold start: the VMM that a node would use, with the same kernel and initramfs, from spawn to the guest
//! agent's hello, with nothing else of Towline running.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::cloud_hypervisor::{
    self, CloudHypervisor, CloudHypervisorConfig,
};
use towline_node_agent::hypervisor::qemu::{AccelChoice, Qemu, QemuConfig};
use towline_node_agent::hypervisor::{DiskLimits, Hypervisor, Starter, VmSpec};
use towline_node_agent::{initramfs, kernel};

const BOUND: Duration = Duration::from_secs(120);

/// Boots once; gives the time and the accelerator's name.
pub(crate) fn once(
    cache: &Path,
    guest_agent: &Path,
    shape: (u32, u64),
) -> anyhow::Result<Duration> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("a runtime")?;
    runtime.block_on(boot(cache.to_owned(), guest_agent, shape))
}

async fn boot(
    cache_dir: PathBuf,
    guest_agent: &Path,
    (cpus, memory_mib): (u32, u64),
) -> anyhow::Result<Duration> {
    let kernel = kernel::ensure(&cache_dir, &|_| {})?;
    let initramfs = initramfs::ensure(&cache_dir, &kernel, guest_agent)?;
    let (starter, disk_limits) = (Starter::Own, DiskLimits::default());
    let driver: Box<dyn Hypervisor> = match cloud_hypervisor::find_program() {
        Some(program) => {
            let config = CloudHypervisorConfig {
                cache_dir,
                program,
                kernel,
                initramfs,
                starter,
                disk_limits,
            };
            Box::new(CloudHypervisor::new(config).await?)
        }
        None => {
            let accel = AccelChoice::Auto;
            let config = QemuConfig { cache_dir, kernel, initramfs, accel, starter, disk_limits };
            Box::new(Qemu::new(config).await?)
        }
    };
    let folder = tempfile::tempdir()?;
    let spec = VmSpec {
        cpus,
        memory_mib,
        processes_max: 64,
        layers: Vec::new(),
        upper: None,
        dir: folder.path().to_owned(),
        console: false,
    };
    let start = Instant::now();
    let vm = driver.boot(&spec).await?;
    let link = GuestLink::connect(&vm, [7; 32], BOUND).await;
    let took = start.elapsed();
    vm.kill().context("ending the guest")?;
    vm.wait_exit().await;
    link.map(|_| took).context("waiting for the guest agent's hello")
}
