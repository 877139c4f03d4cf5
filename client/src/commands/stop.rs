//! `tow stop`: stops sandboxes; their disks are kept.

use clap::Args;
use towline_proto::v1::{Desired, Phase};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::json;
use crate::sandbox;

/// Arguments of `tow stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: StopArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    for name in &args.names {
        let found = sandbox::find(&cluster, name).await?;
        let wanted = sandbox::set_desired(&cluster, &found, Desired::Stopped).await?;
        if !matches!(sandbox::phase(&wanted), Phase::Stopped | Phase::Failed | Phase::Lost) {
            sandbox::wait_stopped(&cluster, &wanted, &env.printer).await?;
        }
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(&sandbox::find(&cluster, name).await?))?,
            false => env.printer.answer(sandbox::name(&found))?,
        }
    }
    Ok(Exit::OK)
}
