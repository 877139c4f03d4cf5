//! `tow resize`: how many CPUs and how much memory a sandbox has from its next start on.

use clap::Args;
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::session::{Client, new_key};
use crate::{parse, sandbox};

/// Arguments of `tow resize`.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, args = ["cpus", "memory"])]
pub struct ResizeArgs {
    /// Name or id of the sandbox, which must be stopped
    #[arg(value_name = "NAME")]
    pub name: String,
    /// CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: Option<u32>,
    /// Memory, as 512m or 2g
    #[arg(long, value_name = "SIZE", value_parser = parse::size_mib)]
    pub memory: Option<u64>,
    /// Print the sandbox as an object
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: ResizeArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = sandbox::find(&cluster, &args.name).await?;
    let request = v1::ResizeSandboxRequest {
        idempotency_key: new_key(),
        id: found.id,
        cpus: args.cpus.unwrap_or_default(),
        memory_mib: args.memory.unwrap_or_default(),
    };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.resize_sandbox(request).await }
    };
    let resized = cluster.call(call).await?;
    match env.printer.json() {
        true => env.printer.object(&json::sandbox(&resized))?,
        false => {
            let name = sandbox::name(&resized);
            env.printer.answer(&name)?;
            let shape = resized.spec.and_then(|spec| spec.shape).unwrap_or_default();
            let memory = human::mib(shape.memory_mib);
            env.printer.hint(format!(
                "{} CPUs and {memory} of memory from its next start on (`tow start {name}`)",
                shape.cpus
            ));
        }
    }
    Ok(Exit::OK)
}
