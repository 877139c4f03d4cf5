//! `tow logs`: what a sandbox's main command wrote.

use clap::Args;
use towline_proto::v1;

use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::tunnel::exec::{self, ExecClient, How, Io};
use crate::tunnel::guest::Guest;

/// Arguments of `tow logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on showing what is written until the command ends
    #[arg(short, long)]
    pub follow: bool,
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
}

pub(super) async fn run(args: LogsArgs, env: &Env) -> Outcome {
    let guest = Guest::named(env, &args.name).await?;
    let resume =
        v1::ExecResume { newest_main: true, no_follow: !args.follow, ..Default::default() };
    let io = Io {
        stdin: false,
        terminal: false,
        forward_signals: false,
        detach_keys: Vec::new(),
        only_start: false,
    };
    exec::run(&guest, ExecClient::new(Vec::new(), How::Attach(resume)), io).await?;
    Ok(Exit::OK)
}
