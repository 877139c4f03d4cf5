//! `tow ls`: the sandboxes.

use clap::Args;
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::sandbox;

/// Arguments of `tow ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
    /// Print names only
    #[arg(short = 'n', long)]
    pub names: bool,
}

/// Characters of a reason in the list; `tow inspect` shows all of it.
const REASON_SHOWN: usize = 40;

pub(super) async fn run(args: LsArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let all = sandbox::list(&cluster, None).await?;
    if env.printer.json() {
        all.iter().try_for_each(|sandbox| env.printer.object(&json::sandbox(sandbox)))?;
    } else if args.names {
        all.iter().try_for_each(|one| env.printer.answer(sandbox::name(one)))?;
    } else {
        let heading = ["NAME", "STATUS", "IMAGE", "CPUS", "MEMORY", "AGE", "FOLDER"];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        rows.extend(all.iter().map(row));
        human::table(&rows).iter().try_for_each(|line| env.printer.answer(line))?;
    }
    Ok(Exit::OK)
}

/// `stopped (timeout 2h)`: the phase, and why, where that was not what was asked for.
fn status(one: &v1::Sandbox) -> String {
    let (phase, reason) = (json::phase(one), sandbox::reason(one));
    let ended = matches!(sandbox::phase(one), v1::Phase::Stopped | v1::Phase::Failed);
    match reason.as_str() {
        "" | "stopped" => phase,
        reason if ended => format!("{phase} ({})", human::shortened(reason, REASON_SHOWN)),
        _ => phase,
    }
}

fn row(one: &v1::Sandbox) -> Vec<String> {
    let spec = one.spec.clone().unwrap_or_default();
    let shape = spec.shape.unwrap_or_default();
    vec![
        sandbox::name(one),
        status(one),
        json::image(&spec),
        shape.cpus.to_string(),
        human::mib(shape.memory_mib),
        human::age(one.created_ms),
        spec.folder.map(|folder| json::bytes(&folder.path)).unwrap_or_default(),
    ]
}
