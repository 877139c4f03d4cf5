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
        let freed = remove(&cluster, found, env).await?;
        match env.printer.json() {
            true => env.printer.object(&json::sandbox(found))?,
            false => {
                let name = sandbox::name(found);
                env.printer.answer(format!("removed {name}{}", lost(found, freed)))?;
            }
        }
    }
    Ok(Exit::OK)
}

/// Removes one and waits until nothing is left of it; returns what that freed, if that is known.
pub(super) async fn remove(
    cluster: &Cluster,
    found: &v1::Sandbox,
    env: &Env,
) -> anyhow::Result<Option<u64>> {
    let wanted = sandbox::set_desired(cluster, found, Desired::Deleted).await?;
    let freed = sandbox::wait_gone(cluster, &wanted, &env.printer).await?;
    files::forget(&found.id)?;
    Ok(freed)
}

/// What was destroyed.
pub(super) fn lost(found: &v1::Sandbox, freed: Option<u64>) -> String {
    if let Some(freed) = freed {
        return format!(" and its disk ({} freed)", human::bytes(freed));
    }
    let disk = found.spec.as_ref().and_then(|spec| spec.shape).unwrap_or_default().disk_mib;
    format!(" and its disk (up to {})", human::mib(disk))
}
