//! `tow logs`: what a sandbox's main command wrote, and which connections its policy blocked.

use clap::Args;
use towline_proto::v1;

use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::events;
use crate::sandbox;
use crate::tunnel::exec::{self, ExecClient, How, Io};
use crate::tunnel::feed;
use crate::tunnel::guest::Guest;

/// Arguments of `tow logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on showing what is written until the command ends
    #[arg(short, long)]
    pub follow: bool,
    /// Say which connections were blocked also where nobody watches
    #[arg(long)]
    pub blocked: bool,
    /// Print the connections that were blocked as objects, instead of the output
    #[arg(long, conflicts_with = "follow")]
    pub json: bool,
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
}

pub(super) async fn run(args: LogsArgs, env: &Env) -> Outcome {
    let guest = Guest::named(env, &args.name).await?;
    if args.json {
        for entry in feed::read(&guest, 0).await? {
            if let Some(object) = blocked(&entry) {
                env.printer.object(&object)?;
            }
        }
        return Ok(Exit::OK);
    }
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
    let why = match &shown {
        Ok(_) => None,
        Err(_) => guest.record().await.ok().flatten().filter(ended),
    };
    if args.blocked || env.printer.hints() {
        match feed::read(&guest, 0).await {
            Ok(entries) => {
                events::blocked_lines(&entries).iter().for_each(|line| env.printer.note(line));
            }
            Err(error) if args.blocked => return Err(error),
            Err(error) => tracing::debug!(%error, "feed not read"),
        }
    }
    match (shown, why) {
        (Ok(_), _) => Ok(Exit::OK),
        (Err(_), Some(found)) => Err(not_kept(&found)),
        (Err(error), None) => Err(error),
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

fn blocked(entry: &v1::FeedEntry) -> Option<serde_json::Value> {
    match &entry.what {
        Some(v1::feed_entry::What::Egress(decision)) if !decision.allowed => {
            Some(events::entry(entry))
        }
        _ => None,
    }
}
