//! The node agent: runs sandboxes as microVMs and splices clients' streams to guests.
//!
//! ```text
//!   control plane ⇄ uplink ─┐                      ┌─▶ machine ─▶ images, disks, hypervisor
//!                           ├─▶ driver (the core) ─┤
//!   guests ⇄ attendants ────┘                      └─▶ gates
//!                                                        ▲
//!   laptops ⇄ tunnel ─────────────────────────── asks ───┘      tunnel ⇄ guests: bytes only
//! ```
//! [`start`] puts it together. It is crash-only: it may be killed at any moment, VMs live on, and
//! the next one takes them up again.

pub mod capacity;
pub mod cleaning;
pub mod config;
pub mod disks;
pub mod doctor;
pub mod driver;
pub mod egress;
pub mod feed;
pub mod forks;
pub mod gates;
pub mod guest_configure;
pub mod guest_link;
pub mod guests;
pub mod hypervisor;
mod image_export;
mod image_import;
mod image_pull;
mod image_push;
pub mod images;
pub mod initramfs;
pub mod kernel;
mod lease;
mod local_image;
pub mod machine;
pub mod membership;
pub mod memory;
pub mod ready;
mod save;
pub mod seal;
pub mod store;
mod streams;
mod templates;
pub mod tunnel;
pub mod uplink;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use towline_images::registry::Private;
use towline_link::endpoint::LinkServer;
use towline_node_core::NodeAgent;
use towline_node_helper::client::Helper;
use towline_proto::v1::{Driver as DriverInfo, Isolation, RegisterNode};

use config::{Config, VmmChoice};
use driver::{Driver, INPUTS_MAX, Parts};
use egress::Egress;
use egress::own::Own;
use egress::resolver::{Resolve, SystemResolver};
use feed::Feeds;
use forks::Forks;
use gates::Gates;
use guests::Guests;
use hypervisor::cloud_hypervisor::{CloudHypervisor, CloudHypervisorConfig};
use hypervisor::launch::require_landlock;
use hypervisor::process::Process;
use hypervisor::qemu::{AccelChoice, Qemu, QemuConfig};
use hypervisor::{Hypervisor, HypervisorError, Hypervisors, Starter, Vm, Vmm};
use images::Images;
use machine::Machine;
use membership::Membership;
use ready::ReadyGuests;
use store::Store;
use tunnel::Tunnel;
use uplink::Uplink;

/// An error and its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Fetches and makes ahead what the first start of a VM needs: the guest kernel, the initramfs.
/// Blocks, for minutes when it must download.
pub fn prepare(config: &Config) -> anyhow::Result<QemuConfig> {
    let progress = |text: &str| tracing::info!("{text}");
    let kernel =
        kernel::ensure(&config.cache_dir, &progress).context("getting the guest kernel")?;
    let initramfs = initramfs::ensure(&config.cache_dir, &kernel, &config.guest_agent)
        .context("making the guest's initramfs")?;
    let (cache_dir, accel, starter) = (config.cache_dir.clone(), config.accel, starter(config));
    let disk_limits = config.disk_limits;
    Ok(QemuConfig { cache_dir, kernel, initramfs, accel, starter, disk_limits })
}

/// Who starts VMMs, as configured.
fn starter(config: &Config) -> Starter {
    let helper = config.helper.as_ref().map(|socket| Arc::new(Helper::new(socket)));
    helper.map_or(Starter::Own, Starter::Helper)
}

/// Runs a node agent with the drivers of this machine until `stop` is ready. VMs live on.
pub async fn start(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    // The only one on these data, or it has no say about a lease.
    let store = Arc::new(Store::open(&config.data_dir)?);
    let helper = config.helper.as_ref().map(|socket| Arc::new(Helper::new(socket)));
    if let Some(helper) = &helper {
        lease::renew(helper, config.lease).await.context("`helper` is configured")?;
    }
    // Also while a kernel is fetched, or a VMM is tried: VMs of the node agent before run meanwhile.
    let lease = config.lease;
    let running = Box::pin(start_on(store, config, stop));
    match (&helper, lease) {
        (Some(helper), Some(lease)) => tokio::select! {
            result = running => result,
            never = lease::renew_forever(helper, lease) => match never {},
        },
        _ => running.await,
    }
}

async fn start_on(
    store: Arc<Store>,
    config: Config,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let wanted = config.clone();
    let qemu = tokio::task::spawn_blocking(move || prepare(&wanted)).await??;
    let running = running_vmm(&store);
    let mut drivers =
        vec![vm_driver(&config, running, qemu).await.context("looking for a hypervisor")?];
    if config.isolation_process {
        let process = Process::new(&config.guest_agent);
        drivers.push(Arc::new(process.context("`isolation_process = true` is configured")?));
    }
    for driver in &drivers {
        let capabilities = driver.capabilities();
        let (accel, reason) = (capabilities.accel.as_str(), &capabilities.accel_reason);
        tracing::info!(driver = capabilities.driver, accel, reason, "hypervisor ready");
        for missing in &capabilities.missing {
            tracing::warn!(driver = capabilities.driver, missing, "a limit is missing here");
        }
    }
    let outside = Outside {
        own: Own::of_machine(config.control_plane.clone(), config.link_advertise.as_deref()),
        resolver: Arc::new(SystemResolver::default()),
    };
    run(config, store, Hypervisors::new(drivers), outside, Path::new("/"), stop).await
}

/// What VMs of an earlier node agent run under, if there are some.
fn running_vmm(store: &Store) -> Option<Vmm> {
    let sandboxes = store.sandboxes().unwrap_or_default();
    sandboxes.into_iter().find_map(|id| Vm::vmm_in(&store.sandbox(id).vm()))
}

/// The driver for VMs, as configured. Where VMs of an earlier node agent run, it is theirs.
async fn vm_driver(
    config: &Config,
    running: Option<Vmm>,
    qemu: QemuConfig,
) -> Result<Arc<dyn Hypervisor>, HypervisorError> {
    if config.landlock_required {
        require_landlock(hypervisor::confine::abi())?;
    }
    let choice = match (config.vmm, running) {
        (choice, None)
        | (choice @ VmmChoice::Qemu, Some(Vmm::Qemu))
        | (choice @ VmmChoice::CloudHypervisor, Some(Vmm::CloudHypervisor)) => choice,
        (VmmChoice::Auto, Some(Vmm::Qemu)) => VmmChoice::Qemu,
        (VmmChoice::Auto, Some(Vmm::CloudHypervisor)) => VmmChoice::CloudHypervisor,
        (VmmChoice::Qemu | VmmChoice::CloudHypervisor, Some(running)) => {
            return Err(HypervisorError::InUse { running: running.as_str() });
        }
    };
    let wanted = match choice {
        VmmChoice::Qemu => None,
        VmmChoice::Auto if config.accel == AccelChoice::Tcg => None,
        VmmChoice::Auto => config.cloud_hypervisor.clone(),
        VmmChoice::CloudHypervisor => {
            Some(config.cloud_hypervisor.clone().unwrap_or("cloud-hypervisor".into()))
        }
    };
    if let Some(program) = wanted {
        let QemuConfig { cache_dir, kernel, initramfs, starter, disk_limits, .. } = qemu.clone();
        let wanted =
            CloudHypervisorConfig { cache_dir, program, kernel, initramfs, starter, disk_limits };
        match CloudHypervisor::new(wanted).await {
            Ok(driver) => return Ok(Arc::new(driver)),
            Err(error) if choice == VmmChoice::CloudHypervisor => return Err(error),
            Err(error) => tracing::info!(reason = chain(&error), "cloud hypervisor not used"),
        }
    }
    Ok(Arc::new(Qemu::new(qemu).await?))
}

/// For the end of guests that wait; a stop takes longer only where one cannot be killed.
const READY_END_MAX: Duration = Duration::from_secs(5);

/// What egress knows of the world outside of the node.
#[derive(Debug)]
pub struct Outside {
    /// What counts as the node itself.
    pub own: Own,
    /// Looks names up.
    pub resolver: Arc<dyn Resolve>,
}

/// Runs a node agent on the given store and drivers; local images are images of `root`.
pub async fn run(
    config: Config,
    store: Arc<Store>,
    hypervisors: Hypervisors,
    outside: Outside,
    root: &Path,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let capacity = capacity::capacity(&config).context("measuring this machine")?;
    let private = match config.embedded {
        true => Private::Any,
        false => Private::Only(config.private_registries.clone()),
    };
    let images = Images::open(&config.cache_dir, root, config.embedded, private)?;
    let (images, gates, guests) = (Arc::new(images), Arc::default(), Arc::new(Guests::default()));
    let (inputs, waiting) = mpsc::channel(INPUTS_MAX);
    let feeds = Feeds::new(Arc::clone(&store));
    let egress =
        Egress::new(config.egress.clone(), outside.own, outside.resolver, capacity::sockets_max());
    let tunnel = Tunnel::new(
        Arc::clone(&gates),
        Arc::clone(&guests),
        Arc::clone(&images),
        Arc::clone(&feeds),
        Arc::clone(&store),
    );
    let (wishes, wanted) = templates::wishes();
    let ready = Arc::new(ReadyGuests::new(config.ready_guests, &store, &config.cache_dir));
    let machine = Arc::new(Machine {
        store: Arc::clone(&store),
        images,
        hypervisors: hypervisors.clone(),
        guests,
        egress,
        feeds,
        forks: Arc::new(Forks::new(&config.data_dir)),
        gates: Arc::<Gates>::clone(&gates),
        inputs: inputs.clone(),
        cache_dir: config.cache_dir.clone(),
        console: config.guest_console,
        warm: config.warm,
        templates: wishes,
        ready: Arc::clone(&ready),
        vms: Mutex::default(),
    });
    let (reports, outgoing) = uplink::channel();
    let (registered, on_registered) = watch::channel(None);
    let core = NodeAgent::new(capacity);
    let driver = Driver::new(Parts {
        core,
        machine,
        gates: Arc::<Gates>::clone(&gates),
        tunnel: Arc::clone(&tunnel),
        reports,
        registered: on_registered,
    });

    let (data, cache) = (config.data_dir.clone(), config.cache_dir.clone());
    for driver in hypervisors.iter() {
        for folder in [data.join("sandboxes"), store.ready()] {
            cleaning::end_strays(driver.as_ref(), &folder).await;
        }
    }
    let ended = ready::end_leftovers(&hypervisors, &store).await;
    ended.context("ending the ready guests of an earlier node agent")?;
    tokio::task::spawn_blocking(move || cleaning::remove_temporary(&data, &cache)).await?;

    // What runs is taken up at once; the control plane and laptops follow when they can.
    let outside = async {
        let membership = Membership::obtain(&config).await?;
        let server = Arc::new(bind(&config, &store, &membership)?);
        let endpoint = advertised(&config, server.local_addr()?);
        tracing::info!(endpoint, "link listens");
        let register = watch::Sender::new(RegisterNode {
            name: config.name.clone(),
            boot_id: capacity::boot_id(),
            capacity: Some(capacity),
            link_endpoint: endpoint,
            drivers: hypervisors.iter().map(|driver| driver_info(driver.as_ref())).collect(),
            embedded: config.embedded,
            version: env!("CARGO_PKG_VERSION").into(),
            machine_cpus: capacity::machine_cpus()?,
        });
        let renewal = membership.clone().renew_forever(config.control_plane.clone());
        let uplink = Uplink {
            membership,
            endpoints: config.control_plane.clone(),
            register: register.subscribe(),
            inputs,
            registered,
        };
        tokio::select! {
            () = uplink.run(outgoing) => {}
            () = tunnel.serve(Arc::clone(&server)) => {}
            () = renewal => {}
        }
        anyhow::Ok(())
    };
    let vms = hypervisors.get(Isolation::Vm).filter(|_| config.warm);
    let (stop_ready, stopped) = oneshot::channel::<Infallible>();
    let kept_ready = vms.map(|vms| {
        let stop = async { drop(stopped.await) };
        tokio::spawn(Arc::clone(&ready).keep(Arc::clone(vms), stop))
    });
    let templates = async {
        if config.warm
            && let Some(vms) = hypervisors.get(Isolation::Vm)
        {
            templates::make_forever(vms.as_ref(), wanted).await;
        }
        std::future::pending::<Infallible>().await
    };
    let result = tokio::select! {
        result = driver.run(waiting, stop) => result,
        result = outside => result.context("taking part in the cluster"),
        never = templates => match never {},
    };
    // What no sandbox has taken is nobody's when this ends.
    drop(stop_ready);
    if let Some(kept) = kept_ready
        && timeout(READY_END_MAX, kept).await.is_err()
    {
        tracing::warn!("ready guests are left to the next node agent, which ends them");
    }
    result
}

/// Listens where laptops may know this node from before.
fn bind(config: &Config, store: &Store, membership: &Membership) -> anyhow::Result<LinkServer> {
    let mut address = config.link_listen;
    let wants_any = address.port() == 0;
    if wants_any && let Some(port) = store.link_port() {
        address.set_port(port);
    }
    let bind = |address| LinkServer::bind(address, &membership.store, &membership.ca);
    let server = match bind(address) {
        Err(_) if wants_any && address.port() != 0 => bind(config.link_listen),
        result => result,
    }?;
    if wants_any && let Err(error) = store.set_link_port(server.local_addr()?.port()) {
        tracing::warn!(reason = chain(&error), "link port not kept");
    }
    Ok(server)
}

fn advertised(config: &Config, listening: SocketAddr) -> String {
    let port = listening.port();
    match &config.link_advertise {
        Some(endpoint) if endpoint.contains(':') => endpoint.clone(),
        Some(host) => format!("{host}:{port}"),
        None if listening.ip().is_unspecified() => {
            let name = rustix::system::uname();
            format!("{}:{port}", name.nodename().to_string_lossy())
        }
        None => listening.to_string(),
    }
}

fn driver_info(hypervisor: &dyn Hypervisor) -> DriverInfo {
    let capabilities = hypervisor.capabilities();
    DriverInfo {
        name: capabilities.driver.into(),
        isolation: capabilities.isolation.into(),
        snapshot: capabilities.snapshot,
        hotplug: capabilities.hotplug,
        gpu: capabilities.gpu,
        fork: hypervisor.fits().is_some(),
        accel: capabilities.accel.as_str().into(),
    }
}
