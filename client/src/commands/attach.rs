//! `tow attach`: takes up the newest main command of a sandbox; leaving never ends it.

use clap::Args;
use towline_proto::v1;

use super::exec::finish;
use crate::commands::Env;
use crate::error::Outcome;
use crate::tunnel::exec::{self, ExecClient, How, Io};
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
    Ok(finish(env, &ended, &args.name))
}
