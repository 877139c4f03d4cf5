//! `tow node`: the machines that run sandboxes.

use clap::{Args, Subcommand};
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::session::Client;

/// Verbs of `tow node`.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// List nodes
    Ls(NodeLsArgs),
}

/// Arguments of `tow node ls`.
#[derive(Debug, Args)]
pub struct NodeLsArgs {
    /// Print an object per node
    #[arg(long)]
    pub json: bool,
}

impl NodeVerb {
    pub(crate) fn json(&self) -> bool {
        let Self::Ls(args) = self;
        args.json
    }
}

pub(super) async fn run(verb: NodeVerb, env: &Env) -> Outcome {
    let NodeVerb::Ls(_) = verb;
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let call = |mut client: Client| async move { client.list_nodes(v1::ListNodesRequest {}).await };
    let nodes = cluster.call(call).await?.nodes;
    if env.printer.json() {
        nodes.iter().try_for_each(|node| env.printer.object(&json::node(node)))?;
        return Ok(Exit::OK);
    }
    let heading = ["NAME", "STATE", "CPUS", "MEMORY", "RESERVED", "DRIVERS"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(nodes.iter().map(row));
    human::table(&rows).iter().try_for_each(|line| env.printer.answer(line))?;
    Ok(Exit::OK)
}

fn row(node: &v1::Node) -> Vec<String> {
    let capacity = node.capacity.unwrap_or_default();
    let reserved = node.reserved.unwrap_or_default();
    vec![
        node.name.clone(),
        json::node_state(node),
        capacity.cpus.to_string(),
        human::mib(capacity.memory_mib),
        human::mib(reserved.memory_mib),
        super::status::drivers(node),
    ]
}
