//! `tow status`: how the cluster is. Exit code 1 when sandboxes cannot be placed.

use clap::Args;
use serde_json::json;
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::config::{Config, EMBEDDED};
use crate::embedded::{self, Holder, Layout};
use crate::error::{Exit, Outcome};
use crate::output::{human, json as objects};
use crate::session::Client;

/// Arguments of `tow status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

/// What is known, whoever said it.
struct Status {
    context: Option<String>,
    endpoint: Option<String>,
    supervisor: Option<u32>,
    cluster: Option<v1::ClusterStatus>,
    nodes: Vec<v1::Node>,
    problem: Option<String>,
}

pub(super) async fn run(_: StatusArgs, env: &Env) -> Outcome {
    let status = collect(env).await?;
    match env.printer.json() {
        true => env.printer.object(&object(&status))?,
        false => text(&status).iter().try_for_each(|line| env.printer.answer(line))?,
    }
    Ok(if ready(&status) { Exit::OK } else { Exit::NO })
}

fn ready(status: &Status) -> bool {
    status.nodes.iter().any(|node| node.state() == v1::NodeState::Ready)
}

async fn collect(env: &Env) -> anyhow::Result<Status> {
    let config = Config::load()?;
    let selected = config.selected(env.context.as_deref())?;
    let mut status = Status {
        context: selected.as_ref().map(|(name, _)| name.clone()),
        endpoint: selected.as_ref().map(|(_, context)| context.endpoint.clone()),
        supervisor: None,
        cluster: None,
        nodes: Vec::new(),
        problem: None,
    };
    let embedded = status.context.as_deref().is_none_or(|name| name == EMBEDDED);
    let asked =
        if embedded { ask_embedded(&mut status).await } else { ask(env, &mut status).await };
    if let Err(error) = asked {
        status.problem = Some(format!("{error:#}"));
    }
    Ok(status)
}

/// The embedded cluster is asked over its own socket: that works also without a certificate, and
/// asking starts nothing.
async fn ask_embedded(status: &mut Status) -> anyhow::Result<()> {
    let layout = Layout::new()?;
    status.supervisor = Holder::find(&layout.lock())?.map(|holder| holder.pid);
    if status.supervisor.is_none() {
        status.problem = Some("it is down; `tow up --detach` starts it".into());
        return Ok(());
    }
    let health = embedded::health(&layout).await?;
    status.cluster = Some(health.cluster);
    status.nodes = health.nodes;
    Ok(())
}

async fn ask(env: &Env, status: &mut Status) -> anyhow::Result<()> {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let asking = |mut client: Client| async move {
        client.get_cluster_status(v1::GetClusterStatusRequest {}).await
    };
    status.cluster = Some(cluster.call(asking).await?);
    let asking =
        |mut client: Client| async move { client.list_nodes(v1::ListNodesRequest {}).await };
    status.nodes = cluster.call(asking).await?.nodes;
    Ok(())
}

fn object(status: &Status) -> serde_json::Value {
    json!({
        "schema": "towline.status/1",
        "ready": ready(status),
        "context": status.context,
        "endpoint": status.endpoint,
        "supervisor_pid": status.supervisor,
        "problem": status.problem,
        "cluster": status.cluster.as_ref().map(|cluster| json!({
            "id": cluster.cluster_id,
            "version": cluster.version,
            "members": cluster.members,
            "leader": cluster.leader,
            "term": cluster.term,
            "commit_index": cluster.commit_index,
            "applied_index": cluster.applied_index,
        })),
        "nodes": status.nodes.iter().map(objects::node).collect::<Vec<_>>(),
    })
}

fn text(status: &Status) -> Vec<String> {
    let mut lines = Vec::new();
    let context = status.context.as_deref().unwrap_or("none configured");
    lines.push(match &status.endpoint {
        Some(endpoint) => format!("cluster: {context} at {endpoint}"),
        None => format!("cluster: {context}"),
    });
    if let Some(cluster) = &status.cluster {
        lines.push(format!(
            "control plane: {} member(s), leader {}, version {}",
            cluster.members, cluster.leader, cluster.version
        ));
    }
    for node in &status.nodes {
        let capacity = node.capacity.unwrap_or_default();
        let reserved = node.reserved.unwrap_or_default();
        lines.push(format!(
            "node {}: {}, {} of {} memory reserved, {} cpus, {}",
            human::printable(&node.name),
            objects::node_state(node),
            human::mib(reserved.memory_mib),
            human::mib(capacity.memory_mib),
            capacity.cpus,
            drivers(node),
        ));
    }
    if let Some(problem) = &status.problem {
        lines.push(format!("problem: {problem}"));
    } else if !ready(status) {
        lines.push("problem: no node is ready".into());
    }
    lines
}

/// Says how a node runs sandboxes, and plainly when that is no security boundary.
pub(super) fn drivers(node: &v1::Node) -> String {
    let one = |driver: &v1::Driver| match driver.accel.as_str() {
        "tcg" => format!("{} emulated (not a security boundary)", driver.name),
        "" => driver.name.clone(),
        accel => format!("{} {accel}", driver.name),
    };
    human::printable(&node.drivers.iter().map(one).collect::<Vec<_>>().join(", "))
}
