//! Published ports: listeners on the laptop whose connections go to a port of a sandbox.
//!
//! `listen.rs` takes addresses and accepts, `dial.rs` opens streams, `watch.rs` notices that a
//! sandbox runs or is gone, `state.rs` is the file from which a daemon that was killed is taken up.
//! A port is kept (until it is unpublished or its sandbox removed) or leased (for as long as a
//! client stays connected). Only the kept ones are in the file; which address a port got is part of
//! it, so that it comes back where it was.

mod dial;
mod listen;
mod state;
mod watch;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use tokio::sync::{Mutex, Semaphore};
use towline_proto::ids::SandboxId;
use towline_proto::v1::{PortMapping, PublishedPort, StreamErrorCode};
use towline_streams::Memory;

use super::clusters::Clusters;
use super::failure::DaemonFailure;
use listen::Listening;
use watch::Watch;

/// Published ports of all sandboxes.
const PORTS_MAX: usize = 256;
/// Forwarded connections at once; further ones wait to be accepted.
const CONNECTIONS_MAX: u32 = 2048;
/// Bytes of all connections in memory before each is held to little.
const HELD_MAX: usize = 256 << 20;

/// Whose ports: a sandbox of a context in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) config: PathBuf,
    pub(super) context: String,
    pub(super) sandbox: SandboxId,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping {
    /// `None`: both loopbacks.
    pub(super) host: Option<IpAddr>,
    /// 0: any that is free.
    pub(super) host_port: u16,
    pub(super) port: u16,
}

impl Mapping {
    /// Reads a mapping of a request.
    pub(super) fn parse(wire: &PortMapping) -> Result<Self, DaemonFailure> {
        let wrong = |what: &str| DaemonFailure::invalid(format!("the request has {what}"));
        let host = match wire.host.len() {
            0 => None,
            4 => <[u8; 4]>::try_from(&wire.host[..]).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(&wire.host[..]).ok().map(IpAddr::from),
            _ => return Err(wrong("an address that is none")),
        };
        let port = |number| u16::try_from(number).map_err(|_| wrong("a port that is none"));
        Ok(Self { host, host_port: port(wire.host_port)?, port: port(wire.port)? })
    }

    fn to_wire(self) -> PortMapping {
        let host = match self.host {
            None => Vec::new(),
            Some(IpAddr::V4(ip)) => ip.octets().to_vec(),
            Some(IpAddr::V6(ip)) => ip.octets().to_vec(),
        };
        PortMapping { host, host_port: self.host_port.into(), port: self.port.into() }
    }

    /// Whether this names it, when ports are to be unpublished.
    fn names(self, other: Self) -> bool {
        self.port == other.port
            && (self.host_port == 0 || self.host_port == other.host_port)
            && (self.host.is_none() || self.host == other.host)
    }
}

/// One published port.
#[derive(Debug)]
struct Entry {
    scope: Scope,
    name: String,
    asked: Mapping,
    kept: bool,
    leases: u32,
    connections: Arc<AtomicU32>,
    listening: Listening,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Ports {
    clusters: Arc<Clusters>,
    file: PathBuf,
    book: Mutex<Book>,
    slots: Arc<Semaphore>,
    memory: Arc<Memory>,
    me: Weak<Self>,
}

#[derive(Debug, Default)]
struct Book {
    entries: Vec<Entry>,
    watches: Vec<Watch>,
}

impl Ports {
    /// None published yet; `file` is where the kept ones are written.
    pub(super) fn new(clusters: Arc<Clusters>, file: PathBuf) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            clusters,
            file,
            book: Mutex::default(),
            slots: Arc::new(Semaphore::new(CONNECTIONS_MAX as usize)),
            memory: Memory::new(HELD_MAX),
            me: me.clone(),
        })
    }

    /// Listens again where the file says.
    pub(super) async fn take_up(&self) {
        let records = match state::load(&self.file) {
            Ok(records) => records,
            Err(error) => return tracing::warn!(%error, "published ports not taken up"),
        };
        let mut book = self.book.lock().await;
        for record in records.into_iter().take(PORTS_MAX) {
            match listen::bind(record.asked, record.host_port) {
                Ok(bound) => self.add(&mut book, record.scope, record.name, record.asked, bound),
                Err(error) => {
                    tracing::warn!(%error, port = record.asked.port, "port not taken up");
                    continue;
                }
            };
            if let Some(entry) = book.entries.last_mut() {
                entry.kept = true;
            }
        }
    }

    /// Publishes ports of a sandbox; those that are already are left as they are.
    pub(super) async fn publish(
        &self,
        scope: &Scope,
        name: &str,
        wanted: &[Mapping],
        leased: bool,
    ) -> Result<Vec<PublishedPort>, DaemonFailure> {
        let mut book = self.book.lock().await;
        let added = self.add_missing(&mut book, scope, name, wanted);
        if added.is_ok() {
            for entry in &mut book.entries {
                let times = wanted.iter().filter(|mapping| entry.is(scope, **mapping)).count();
                entry.kept |= !leased && times > 0;
                entry.leases += u32::from(leased && times > 0);
            }
        }
        // What was begun and is not wanted as a whole.
        book.retain(Entry::is_wanted);
        added?;
        self.store(&book)?;
        Ok(book.of(|entry| entry.scope == *scope))
    }

    fn add_missing(
        &self,
        book: &mut Book,
        scope: &Scope,
        name: &str,
        wanted: &[Mapping],
    ) -> Result<(), DaemonFailure> {
        for mapping in wanted {
            if mapping.port == 0 {
                return Err(DaemonFailure::invalid("0 is no port of a sandbox"));
            }
            if book.entries.iter().any(|entry| entry.is(scope, *mapping)) {
                continue;
            }
            if book.entries.len() >= PORTS_MAX {
                let text = format!("{PORTS_MAX} ports are published already");
                return Err(DaemonFailure::new(StreamErrorCode::Limit, text)
                    .hint("tow ports --unpublish PORT"));
            }
            let bound = listen::bind(*mapping, mapping.host_port)?;
            self.add(book, scope.clone(), name.to_owned(), *mapping, bound);
        }
        Ok(())
    }

    /// Ends a lease of these ports.
    pub(super) async fn release(&self, scope: &Scope, leased: &[Mapping]) {
        let mut book = self.book.lock().await;
        for mapping in leased {
            if let Some(entry) = book.entries.iter_mut().find(|e| e.is(scope, *mapping)) {
                entry.leases = entry.leases.saturating_sub(1);
            }
        }
        book.retain(Entry::is_wanted);
    }

    /// Unpublishes these ports, or all of the sandbox; connections that are open go on. Returns
    /// what is left.
    pub(super) async fn unpublish(
        &self,
        scope: &Scope,
        which: &[Mapping],
    ) -> Result<Vec<PublishedPort>, DaemonFailure> {
        let mut book = self.book.lock().await;
        let mine = |entry: &Entry| entry.scope == *scope;
        let unknown = which.iter().find(|wanted| {
            !book.entries.iter().any(|entry| mine(entry) && wanted.names(entry.where_it_is()))
        });
        if let Some(unknown) = unknown {
            let text = format!("port {} of the sandbox is not published there", unknown.port);
            return Err(DaemonFailure::new(StreamErrorCode::NotFound, text).hint("tow ports"));
        }
        book.retain(|entry| {
            let named =
                which.is_empty() || which.iter().any(|wanted| wanted.names(entry.where_it_is()));
            !(mine(entry) && named)
        });
        self.store(&book)?;
        Ok(book.of(mine))
    }

    /// What is published of a sandbox, or of all of a context.
    pub(super) async fn list(
        &self,
        config: &std::path::Path,
        context: &str,
        sandbox: Option<SandboxId>,
    ) -> Vec<PublishedPort> {
        self.book.lock().await.of(|entry| {
            let scope = &entry.scope;
            scope.config == config
                && scope.context == context
                && sandbox.is_none_or(|sandbox| scope.sandbox == sandbox)
        })
    }

    /// A sandbox was removed.
    async fn forget(&self, scope: &Scope) {
        let mut book = self.book.lock().await;
        book.retain(|entry| entry.scope != *scope);
        if let Err(error) = self.store(&book) {
            tracing::warn!(%error, "removed sandbox's ports");
        }
        tracing::info!(sandbox = %scope.sandbox, "sandbox is gone: its ports are free");
    }

    /// How many are published.
    pub(super) async fn count(&self) -> usize {
        self.book.lock().await.entries.len()
    }

    /// Whether somebody may come: a running sandbox has published ports, or connections are open.
    pub(super) async fn are_in_use(&self) -> bool {
        self.slots.available_permits() < CONNECTIONS_MAX as usize
            || self.book.lock().await.watches.iter().any(Watch::is_running)
    }

    /// Leaves the kept ports to the next daemon; connections that are open go on.
    pub(super) async fn leave(&self) {
        let mut book = self.book.lock().await;
        book.retain(|entry| !entry.kept);
    }

    /// Waits until no connection is open.
    pub(super) async fn drained(&self) {
        let _ = self.slots.acquire_many(CONNECTIONS_MAX).await;
    }

    fn add(
        &self,
        book: &mut Book,
        scope: Scope,
        name: String,
        asked: Mapping,
        bound: listen::Bound,
    ) {
        let connections = Arc::<AtomicU32>::default();
        let way = dial::Way {
            clusters: Arc::clone(&self.clusters),
            scope: scope.clone(),
            port: asked.port,
            memory: Arc::clone(&self.memory),
            connections: Arc::clone(&connections),
        };
        let listening = Listening::start(bound, &way, &self.slots);
        if !book.watches.iter().any(|watch| watch.scope == scope) {
            let watch = Watch::start(self.me.clone(), Arc::clone(&self.clusters), scope.clone());
            book.watches.push(watch);
        }
        book.entries.push(Entry {
            scope,
            name,
            asked,
            kept: false,
            leases: 0,
            connections,
            listening,
        });
    }

    fn store(&self, book: &Book) -> Result<(), DaemonFailure> {
        let kept = book.entries.iter().filter(|entry| entry.kept).map(|entry| state::Record {
            scope: entry.scope.clone(),
            name: entry.name.clone(),
            asked: entry.asked,
            host_port: entry.listening.port,
        });
        state::store(&self.file, kept.collect()).map_err(|error| {
            let text = format!("could not note the published ports: {error}");
            DaemonFailure::new(StreamErrorCode::Internal, text)
        })
    }
}

impl Book {
    fn of(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<PublishedPort> {
        self.entries.iter().filter(|entry| wanted(entry)).map(Entry::to_wire).collect()
    }

    /// Lets go of all other entries, and of what was there for them only.
    fn retain(&mut self, wanted: impl Fn(&Entry) -> bool) {
        self.entries.retain(wanted);
        let entries = &self.entries;
        self.watches.retain(|watch| entries.iter().any(|entry| entry.scope == watch.scope));
    }
}

impl Entry {
    fn is(&self, scope: &Scope, asked: Mapping) -> bool {
        self.scope == *scope && (self.asked == asked || self.where_it_is() == asked)
    }

    fn is_wanted(&self) -> bool {
        self.kept || self.leases > 0
    }

    fn where_it_is(&self) -> Mapping {
        Mapping { host_port: self.listening.port, ..self.asked }
    }

    fn to_wire(&self) -> PublishedPort {
        PublishedPort {
            sandbox_id: self.scope.sandbox.to_vec(),
            sandbox_name: self.name.clone(),
            asked: Some(self.asked.to_wire()),
            addresses: self.listening.addresses.iter().map(ToString::to_string).collect(),
            host_port: self.listening.port.into(),
            connections: self.connections.load(Ordering::Relaxed),
            problem: self.listening.problem.clone(),
            leased: !self.kept,
        }
    }
}
