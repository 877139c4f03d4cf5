//! `tow rm`: removes sandboxes with their disks, and says what was destroyed.

use clap::Args;
use towline_proto::v1::{self, Desired};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::sandbox;
use crate::tunnel::files;

/// Arguments of `tow rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Accepted for habit's sake: what runs is removed anyway.
    #[arg(short, long, hide = true)]
    pub force: bool,
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: RmArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let mut all = Vec::new();
    for name in &args.names {
        all.push(sandbox::find(&cluster, name).await?);
    }
    for found in &all {
        remove(&cluster, found, env).await?;
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(found))?,
            false => {
                env.printer.answer(format!("removed {}{}", sandbox::name(found), lost(found)))?;
            }
        }
    }
    Ok(Exit::OK)
}

/// Removes one and waits until nothing is left of it.
pub(super) async fn remove(
    cluster: &Cluster,
    found: &v1::Sandbox,
    env: &Env,
) -> anyhow::Result<()> {
    let wanted = sandbox::set_desired(cluster, found, Desired::Deleted).await?;
    sandbox::wait_gone(cluster, &wanted, &env.printer).await?;
    files::forget(&found.id)
}

fn lost(found: &v1::Sandbox) -> String {
    let disk = found.spec.as_ref().and_then(|spec| spec.shape).unwrap_or_default().disk_mib;
    format!(" and its disk (up to {})", human::mib(disk))
}
