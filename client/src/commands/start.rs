//! `tow start`: starts stopped sandboxes and waits until they run.

use clap::Args;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::json;
use crate::sandbox;

/// Arguments of `tow start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: StartArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::Always).await?;
    for name in &args.names {
        let found = sandbox::find(&cluster, name).await?;
        let running = sandbox::ensure_running(&cluster, found, &env.printer).await?;
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(&running))?,
            false => env.printer.answer(sandbox::name(&running))?,
        }
    }
    Ok(Exit::OK)
}
