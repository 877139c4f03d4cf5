//! `tow pause` and `tow resume`: a sandbox is halted with all that it has in memory, and goes on where
//! it was. Its memory stays reserved meanwhile.

use clap::Args;
use towline_proto::v1::Desired;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::json;
use crate::sandbox;

/// Arguments of `tow pause` and `tow resume`.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn pause(args: PauseArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    for name in &args.names {
        let found = sandbox::find(&cluster, name).await?;
        let wanted = sandbox::set_desired(&cluster, &found, Desired::Paused).await?;
        let paused = sandbox::wait_paused(&cluster, &wanted, &env.printer).await?;
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(&paused))?,
            false => env.printer.answer(sandbox::name(&paused))?,
        }
    }
    Ok(Exit::OK)
}

pub(super) async fn resume(args: PauseArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    for name in &args.names {
        let found = sandbox::find(&cluster, name).await?;
        let running = sandbox::resume(&cluster, found, &env.printer).await?;
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(&running))?,
            false => env.printer.answer(sandbox::name(&running))?,
        }
    }
    Ok(Exit::OK)
}
