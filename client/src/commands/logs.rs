//! `tow logs`: what a sandbox's main command wrote.

use clap::Args;
use towline_proto::v1;

use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::sandbox;
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
    let shown = exec::run(&guest, ExecClient::new(Vec::new(), How::Attach(resume)), io).await;
    match shown {
        Ok(_) => Ok(Exit::OK),
        Err(error) => match guest.record().await {
            Ok(Some(found)) if ended(&found) => Err(not_kept(&found)),
            _ => Err(error),
        },
    }
}

fn ended(found: &v1::Sandbox) -> bool {
    matches!(sandbox::phase(found), v1::Phase::Stopped | v1::Phase::Failed)
}

/// The output lies on the sandbox's disk, which nothing outside ever reads, and goes with the boot.
fn not_kept(found: &v1::Sandbox) -> anyhow::Error {
    let name = sandbox::name(found);
    let reason = match sandbox::reason(found) {
        reason if reason.is_empty() || reason == "stopped" => String::new(),
        reason => format!(" ({reason})"),
    };
    Failure::new(format!(
        "sandbox {name} is stopped{reason}, and what its commands wrote was kept only while it ran"
    ))
    .hint("have the command write what must last to a file: `sh -c 'CMD >log 2>&1'`")
    .into()
}
