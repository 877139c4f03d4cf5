//! The clusters that the daemon has to do with, each with its session, links and tickets.

use std::path::Path;
use std::sync::Arc;

use super::failure::DaemonFailure;
use super::request::Cluster;
use crate::session::Sessions;

/// Clusters at once; the oldest is forgotten first.
const CLUSTERS_MAX: usize = 32;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Clusters {
    sessions: Sessions,
    known: tokio::sync::Mutex<Vec<Arc<Cluster>>>,
}

impl Clusters {
    /// The cluster of a context in a configuration file.
    pub(super) async fn get(
        &self,
        config: &Path,
        context: &str,
    ) -> Result<Arc<Cluster>, DaemonFailure> {
        let session = self.sessions.get(config, context).await?;
        let mut known = self.known.lock().await;
        if let Some(cluster) = known.iter().find(|c| Arc::ptr_eq(&c.session, &session)) {
            return Ok(Arc::clone(cluster));
        }
        // A session that was replaced is not found again: its streams keep what they need of it.
        known.retain(|c| c.session.context() != session.context());
        if known.len() >= CLUSTERS_MAX {
            known.remove(0);
        }
        let cluster = Arc::new(Cluster::new(session)?);
        known.push(Arc::clone(&cluster));
        Ok(cluster)
    }

    /// Links of all clusters.
    pub(super) async fn links(&self) -> usize {
        self.known.lock().await.iter().map(|c| c.links.count()).sum()
    }

    /// Says good-bye to all nodes.
    pub(super) async fn close(&self) {
        for cluster in self.known.lock().await.iter() {
            cluster.links.close().await;
        }
    }
}
