//! `tow create`: makes a sandbox ready without running anything in it.

use clap::Args;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::folder::{FolderConfig, ProjectFolder};
use crate::output::json;
use crate::spec::SpecArgs;
use crate::{sandbox, user};

/// Arguments of `tow create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// What it should be.
    #[command(flatten)]
    pub spec: SpecArgs,
    /// Give it no project folder
    #[arg(long)]
    pub no_sync: bool,
    /// Return as soon as it is committed, before it runs
    #[arg(long)]
    pub no_wait: bool,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: CreateArgs, env: &Env) -> Outcome {
    let folder = match args.no_sync {
        true => None,
        false => Some(ProjectFolder::find(&std::env::current_dir()?, user::home().as_deref())?),
    };
    let config =
        folder.as_ref().map_or_else(|| Ok(FolderConfig::default()), ProjectFolder::config)?;
    let spec = args.spec.to_spec(folder.as_ref(), &config)?;
    let cluster = Cluster::open(env, Start::Always).await?;
    let mut created = sandbox::create(&cluster, spec).await?;
    if !args.no_wait {
        created = sandbox::wait_running(&cluster, &created, &env.printer).await?;
    }
    match env.printer.json() {
        true => env.printer.object(&json::sandbox(&created))?,
        false => env.printer.answer(sandbox::name(&created))?,
    }
    Ok(Exit::OK)
}
