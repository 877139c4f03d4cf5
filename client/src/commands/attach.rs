//! `tow attach`: takes up the newest main command of a sandbox; leaving never ends it.

use clap::Args;
use towline_proto::v1;

use super::exec::finish;
use crate::commands::Env;
use crate::error::Outcome;
use crate::folder::ProjectFolder;
use crate::sync;
use crate::tunnel::exec::{self, Ended, ExecClient, How, Io};
use crate::tunnel::guest::Guest;
use crate::tunnel::tty::DetachKeys;

/// Arguments of `tow attach`.
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Only watch: give the command no input
    #[arg(long)]
    pub no_stdin: bool,
    /// Keys that leave without ending the command
    #[arg(long, value_name = "K", default_value = "ctrl-p,ctrl-q", value_parser = keys)]
    pub detach_keys: DetachKeys,
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
}

fn keys(text: &str) -> Result<DetachKeys, String> {
    crate::parse::detach_keys(text).map(DetachKeys)
}

pub(super) async fn run(args: AttachArgs, env: &Env) -> Outcome {
    let guest = Guest::named(env, &args.name).await?;
    let resume =
        v1::ExecResume { newest_main: true, take_stdin: !args.no_stdin, ..Default::default() };
    let io = Io {
        stdin: !args.no_stdin,
        // The guest says whether it has one.
        terminal: false,
        // A signal ends our visit, not the command.
        forward_signals: false,
        detach_keys: args.detach_keys.0,
        only_start: false,
    };
    let ended = exec::run(&guest, ExecClient::new(Vec::new(), How::Attach(resume)), io).await?;
    if let Ended::Exited(_) = ended {
        bring_back(&guest, env).await?;
    }
    Ok(finish(env, &ended, &args.name))
}

/// What the command made comes back to its folder, if that is on this machine.
async fn bring_back(guest: &Guest<'_>, env: &Env) -> anyhow::Result<()> {
    let Some(found) = guest.record().await? else { return Ok(()) };
    match found.spec.as_ref().and_then(ProjectFolder::of_sandbox) {
        Some(folder) => sync::after(guest, &found, &folder, env).await,
        None => Ok(()),
    }
}
