//! `tow create`: makes a sandbox ready without running anything in it.

use std::path::Path;

use clap::Args;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::folder::{FolderConfig, ProjectFolder};
use crate::output::json;
use crate::ports::{self, PortArgs};
use crate::spec::SpecArgs;
use crate::tunnel::guest::Guest;
use crate::{git, sandbox, user};

/// Arguments of `tow create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// What it should be.
    #[command(flatten)]
    pub spec: SpecArgs,
    /// Port flags.
    #[command(flatten)]
    pub ports: PortArgs,
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
    let mut spec = args.spec.to_spec(folder.as_ref(), &config)?;
    spec.git = git::identity(folder.as_ref().map_or(Path::new("."), |f| &f.path)).await;
    let wanted = args.ports.wanted(&config)?;
    let cluster = Cluster::open(env, Start::Always).await?;
    super::image::pull::ensure(&cluster, &spec, env).await?;
    let mut created = sandbox::create(&cluster, spec).await?;
    if !args.no_wait {
        created = sandbox::wait_running(&cluster, &created, &env.printer).await?;
    }
    let guest = Guest::of(env, cluster, &created)?;
    let published = ports::keep(guest.daemon(), &created, &wanted, env).await?;
    match env.printer.json() {
        true => env.printer.object(&json::sandbox_with_ports(&created, &published))?,
        false => env.printer.answer(sandbox::name(&created))?,
    }
    Ok(Exit::OK)
}
