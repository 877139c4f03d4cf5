//! How the embedded cluster is: asked over the admin socket, so it needs no certificate.

use std::time::Duration;

use anyhow::Context as _;
use towline_link::status::RpcError;
use towline_proto::v1;

use super::enrol::{self, Admin};
use super::layout::Layout;

/// Bound on one question.
const ASK_MAX: Duration = Duration::from_secs(5);

/// What the cluster says of itself.
#[derive(Debug, Clone)]
pub struct Health {
    /// Of the control plane.
    pub cluster: v1::ClusterStatus,
    /// All nodes.
    pub nodes: Vec<v1::Node>,
}

impl Health {
    /// Whether sandboxes can be placed.
    pub fn is_ready(&self) -> bool {
        self.nodes.iter().any(|node| node.state() == v1::NodeState::Ready)
    }
}

/// Asks the running cluster how it is.
pub async fn health(layout: &Layout) -> anyhow::Result<Health> {
    let ask = async { ask(&mut enrol::connect(layout).await?).await };
    tokio::time::timeout(ASK_MAX, ask).await.context("the control plane did not answer in 5 s")?
}

pub(super) async fn ask(admin: &mut Admin) -> anyhow::Result<Health> {
    let cluster = admin.get_cluster_status(v1::GetClusterStatusRequest {}).await;
    let nodes = admin.list_nodes(v1::ListNodesRequest {}).await;
    Ok(Health {
        cluster: cluster.map_err(RpcError::from)?.into_inner(),
        nodes: nodes.map_err(RpcError::from)?.into_inner().nodes,
    })
}
