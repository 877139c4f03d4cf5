//! Puts the parts together: lock, keys, log, core, driver, listeners; and takes them apart again.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use towline_control_core::wal::Wal;
use towline_control_core::{Config as CoreConfig, ControlPlane};
use towline_link::rpc::{self, Listener, Routes};
use towline_link::tls::{ALPN_H2, CertStore, ClientAuth, server_config};
use tracing::{info, warn};

use crate::api::Service;
use crate::config::Config;
use crate::disk::{FileDisk, lock};
use crate::driver::{Driver, Handle};
use crate::keys::{Keys, random};
use crate::log_store::LogStore;

/// A snapshot is due after so many log entries.
const SNAPSHOT_ENTRIES: u64 = 10_000;
/// How often to see whether our own certificate wants renewal.
const RENEW_INTERVAL: Duration = Duration::from_secs(300);
/// Calls under way have so long to end when the process stops.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// A control plane that runs.
#[derive(Debug)]
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    stop: watch::Sender<bool>,
    tasks: JoinSet<Result<()>>,
    _lock: File,
}

/// Opens the data directory and serves.
pub async fn start(config: Config) -> Result<Running> {
    let lock = lock(&config.data_dir)?;
    let keys = Keys::load_or_create(&config.data_dir)?;
    let (driver, handle) = open_core(&config.data_dir, &keys)?;
    let keys = Arc::new(keys);
    let store = keys.own_store(&config.member_name).context("issuing our own certificate")?;
    let tls =
        server_config(&store, keys.authority.certificate(), ClientAuth::Optional, &[ALPN_H2])?;
    let tcp = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {} (is it in use?)", config.listen))?;
    let address = tcp.local_addr()?;
    let unix = bind_admin(&config.admin_socket())?;
    towline_link::authority::write_private(
        &config.data_dir.join("endpoint"),
        &format!("{address}\n"),
    )?;
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tasks.spawn(driver.run(until(stopped.clone())));
    for listener in [Listener::Tcp(tcp, tls), Listener::Unix(unix)] {
        tasks.spawn(serve(listener, routes(&handle, &keys), stopped.clone()));
    }
    tasks.spawn(renew(store, Arc::clone(&keys), config.member_name.clone(), stopped));
    info!(%address, cluster = keys.member.cluster_id, "control plane serves");
    Ok(Running { address, stop, tasks, _lock: lock })
}

impl Running {
    /// Waits until a part fails; then the process must end.
    pub async fn failed(&mut self) -> anyhow::Error {
        while let Some(ended) = self.tasks.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error,
                Err(error) => return error.into(),
            }
        }
        anyhow::anyhow!("every part of the control plane has ended")
    }

    /// Ends calls and sessions, and writes what the log was given.
    pub async fn shutdown(mut self) -> Result<()> {
        let _ = self.stop.send(true);
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(())
    }
}

fn open_core(data_dir: &Path, keys: &Keys) -> Result<(Driver, Handle)> {
    let disk = FileDisk::open(&data_dir.join("log"))?;
    let (wal, recovered) = Wal::open(disk, keys.member.member).context("opening the log")?;
    info!(
        snapshot = recovered.snapshot.as_ref().map_or(0, |snapshot| snapshot.index),
        entries = recovered.entries.len(),
        "log opened"
    );
    let seed = random::<16>()?;
    let (low, high) = seed.split_at(8);
    let core_config = CoreConfig {
        member: keys.member.member,
        voters: keys.member.voters.clone(),
        cluster_id: keys.member.cluster_id.clone(),
        seed: [u64::from_le_bytes(low.try_into()?), u64::from_le_bytes(high.try_into()?)],
        snapshot_entries: SNAPSHOT_ENTRIES,
    };
    let core = ControlPlane::new(core_config, recovered)
        .map_err(|reason| anyhow::anyhow!("starting from the log: {reason}"))?;
    // Bounded by the writes in flight: the log's thread reports at most one per write.
    let (report, written) = mpsc::unbounded_channel();
    let log = LogStore::start(wal, move |done| {
        let _ = report.send(done);
    })?;
    Ok(Driver::new(core, log, written, vec![keys.tickets.public_key()]))
}

fn routes(handle: &Handle, keys: &Arc<Keys>) -> Routes {
    let service = Service { core: handle.clone(), keys: Arc::clone(keys) };
    Routes::new(rpc::control_plane_server(service.clone()))
        .add_service(rpc::node_uplink_server(service))
}

/// Binds the admin socket; a stale one is ours, because we hold the lock.
fn bind_admin(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("listening on `{}`", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("making `{}` private", path.display()))?;
    Ok(listener)
}

async fn serve(listener: Listener, routes: Routes, stopped: watch::Receiver<bool>) -> Result<()> {
    let serving = rpc::serve(listener, routes, until(stopped.clone()));
    let too_long = async {
        until(stopped).await;
        tokio::time::sleep(DRAIN_MAX).await;
    };
    tokio::select! {
        served = serving => served.context("serving"),
        () = too_long => Ok(()),
    }
}

async fn until(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Renews our own certificate at half its life.
async fn renew(
    store: CertStore,
    keys: Arc<Keys>,
    name: String,
    stopped: watch::Receiver<bool>,
) -> Result<()> {
    let mut interval = tokio::time::interval(RENEW_INTERVAL);
    loop {
        tokio::select! {
            () = until(stopped.clone()) => return Ok(()),
            _ = interval.tick() => {}
        }
        if !store.wants_renewal(SystemTime::now()) {
            continue;
        }
        let renewed = keys.issue_own(&name).and_then(|(certificate, key)| {
            Ok(store.replace(&certificate, &key, keys.authority.certificate())?)
        });
        if let Err(error) = renewed {
            warn!(%error, "our own certificate was not renewed; trying again");
        }
    }
}
