//! `tow fork`: copies of a running sandbox, with its memory, its processes and its disk.

use clap::Args;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::json;
use crate::sandbox;

/// Arguments of `tow fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    /// The running sandbox that is copied: its name or id
    #[arg(value_name = "NAME")]
    pub name: String,
    /// How many copies, all of the same moment
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub count: u32,
    /// The name of the copy; several are called NEW-1, NEW-2… [default: made up]
    #[arg(long = "name", value_name = "NEW")]
    pub new_name: Option<String>,
    /// Print an object per copy
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: ForkArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let source = sandbox::find(&cluster, &args.name).await?;
    let name = args.new_name.unwrap_or_default();
    let copies = sandbox::fork(&cluster, &source, args.count, name).await?;
    // All are on their way: the first that fails does not keep the others from being told.
    let mut failed = None;
    for copy in &copies {
        match sandbox::wait_running(&cluster, copy, &env.printer).await {
            Ok(running) if env.printer.json() => env.printer.object(&json::sandbox(&running))?,
            Ok(running) => env.printer.answer(sandbox::name(&running))?,
            Err(error) => {
                if let Some(earlier) = failed.replace(error) {
                    env.printer.warning(earlier.to_string());
                }
            }
        }
    }
    failed.map_or(Ok(Exit::OK), Err)
}
