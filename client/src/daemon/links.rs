//! Links to the nodes of one cluster: one connection per node and address, made when it is first
//! needed, kept warm for a while, and given up early when the node has gone elsewhere.
//!
//! QUIC notices a dead peer after 30 s. A node agent that was restarted has a new port or has
//! forgotten us, and execs wait for the answer: so a link that sends and hears nothing is checked
//! each second against what the control plane knows and by dialling anew. Where that gives no
//! answer either, the network is to blame and the link is left to come back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};
use towline_link::endpoint::{CLOSE_DONE, CLOSE_GOING_AWAY, LinkClient, LinkConnection, LinkError};
use towline_proto::ids::NodeId;
use towline_proto::v1::ListNodesRequest;

use crate::session::Session;

/// A person waits for this.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A link without streams is closed after this.
const LINGER: Duration = Duration::from_secs(300);
/// How often a link in use is looked at.
const TICK: Duration = Duration::from_secs(1);
/// Looks without an answer before it is suspected.
const SILENT_TICKS: u32 = 2;

/// How long the peer of a probed link has to acknowledge, once it is known to answer others.
const SECOND_CHANCE: Duration = Duration::from_secs(2);

type Key = (NodeId, String);

/// All links of one cluster.
#[derive(Debug)]
pub(super) struct Links {
    session: Arc<Session>,
    client: LinkClient,
    slots: std::sync::Mutex<HashMap<Key, Arc<Slot>>>,
}

type Slot = tokio::sync::Mutex<Option<Link>>;

/// One link. While a [`Lease`] of it lives it is in use.
#[derive(Debug, Clone)]
struct Link {
    connection: LinkConnection,
    uses: Arc<AtomicU32>,
}

/// A use of a link.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) connection: LinkConnection,
    uses: Arc<AtomicU32>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.uses.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Link {
    fn lease(&self) -> Lease {
        self.uses.fetch_add(1, Ordering::Relaxed);
        Lease { connection: self.connection.clone(), uses: Arc::clone(&self.uses) }
    }
}

impl Links {
    pub(super) fn new(session: Arc<Session>) -> Result<Self, LinkError> {
        let client = LinkClient::new(session.store(), session.ca())?;
        Ok(Self { session, client, slots: std::sync::Mutex::default() })
    }

    /// The link to a node that is there already.
    pub(super) async fn existing(&self, node: NodeId, endpoint: &str) -> Option<Lease> {
        let slot = self.slot(node, endpoint);
        let current = slot.lock().await;
        current.as_ref().filter(|link| !link.connection.is_closed()).map(Link::lease)
    }

    /// The link to a node, made if it is not there; callers at the same time share one attempt.
    pub(super) async fn get(
        self: &Arc<Self>,
        node: NodeId,
        endpoint: &str,
    ) -> Result<Lease, LinkError> {
        let slot = self.slot(node, endpoint);
        let mut current = slot.lock().await;
        if let Some(link) = current.as_ref().filter(|link| !link.connection.is_closed()) {
            return Ok(link.lease());
        }
        let connection = self.connect(endpoint).await?;
        let link = Link { connection, uses: Arc::default() };
        let lease = link.lease();
        tokio::spawn(watch(Arc::downgrade(self), (node, endpoint.to_owned()), link.clone()));
        *current = Some(link);
        Ok(lease)
    }

    /// How many links there are.
    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Says good-bye to all nodes.
    pub(super) async fn close(&self) {
        self.client.close().await;
    }

    async fn connect(&self, endpoint: &str) -> Result<LinkConnection, LinkError> {
        match timeout(CONNECT_MAX, self.client.connect(endpoint, None)).await {
            Ok(connected) => connected,
            Err(_) => Err(LinkError::Connection {
                address: endpoint.into(),
                reason: format!("the node did not answer within {} s", CONNECT_MAX.as_secs()),
            }),
        }
    }

    /// Where the control plane says that the node is.
    async fn endpoint_of(&self, node: NodeId) -> Option<String> {
        let mut client = self.session.client();
        let answer = timeout(Duration::from_secs(2), client.list_nodes(ListNodesRequest {})).await;
        let nodes = answer.ok()?.ok()?.into_inner().nodes;
        nodes.into_iter().find(|n| n.id == node.as_bytes()).map(|n| n.link_endpoint)
    }

    fn slot(&self, node: NodeId, endpoint: &str) -> Arc<Slot> {
        Arc::clone(self.lock().entry((node, endpoint.to_owned())).or_default())
    }

    fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks after one link until it ends.
async fn watch(links: std::sync::Weak<Links>, key: Key, link: Link) {
    let (mut heard, mut sent) = (0, 0);
    let mut silent = 0;
    let mut last_used = Instant::now();
    loop {
        if timeout(TICK, link.connection.closed()).await.is_ok() {
            break;
        }
        let Some(links) = links.upgrade() else {
            link.connection.close(CLOSE_DONE, "");
            return;
        };
        if link.uses.load(Ordering::Relaxed) > 0 {
            last_used = Instant::now();
        } else if last_used.elapsed() > LINGER {
            link.connection.close(CLOSE_DONE, "idle");
            continue;
        }
        let stats = link.connection.stats();
        let (heard_now, sent_now) = (stats.udp_rx.datagrams, stats.udp_tx.datagrams);
        // Sending without hearing is suspicious; sending nothing is only quiet.
        match (heard_now == heard, sent_now == sent) {
            (false, _) => silent = 0,
            (true, false) => silent += 1,
            (true, true) => silent += u32::from(silent > 0),
        }
        (heard, sent) = (heard_now, sent_now);
        if silent > 0 {
            link.connection.probe();
        }
        if silent >= SILENT_TICKS && is_elsewhere(&links, &key, &link, heard).await {
            tracing::info!(node = %key.0, endpoint = key.1, "link given up: the node was restarted");
            link.connection.close(CLOSE_GOING_AWAY, "no answer");
        }
    }
    if let Some(links) = links.upgrade() {
        links.forget(&key);
    }
}

/// Whether the node answers others, or elsewhere, but not this link.
async fn is_elsewhere(links: &Links, key: &Key, link: &Link, heard: u64) -> bool {
    if links.endpoint_of(key.0).await.is_some_and(|endpoint| endpoint != key.1) {
        return true;
    }
    let Ok(fresh) = links.connect(&key.1).await else { return false };
    fresh.close(CLOSE_DONE, "only looking");
    // The network may just have come back: this link gets its chance too.
    link.connection.probe();
    tokio::time::sleep(SECOND_CHANCE).await;
    link.connection.stats().udp_rx.datagrams == heard
}
