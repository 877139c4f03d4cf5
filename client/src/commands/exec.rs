//! `tow exec`: a command in a sandbox that runs.
//!
//! It talks to the daemon only, unless it was typed in the sandbox's folder or something is wrong.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use clap::Args;
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::folder::ProjectFolder;
use crate::forward::{self, ForwardArgs};
use crate::output::human;
use crate::spec::{self, EnvArgs};
use crate::tunnel::exec::{self, Ended, ExecClient, How, Io};
use crate::tunnel::feed;
use crate::tunnel::guest::Guest;
use crate::tunnel::tty::{self, TtyArgs};
use crate::{ids, sandbox, sync, user};

/// Arguments of `tow exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Terminal flags.
    #[command(flatten)]
    pub tty: TtyArgs,
    /// Environment flags.
    #[command(flatten)]
    pub env: EnvArgs,
    /// Forward flags.
    #[command(flatten)]
    pub forward: ForwardArgs,
    /// User to run as, instead of the sandbox's: root, UID or UID:GID
    #[arg(short, long, value_name = "USER", value_parser = user::parse_typed)]
    pub user: Option<v1::User>,
    /// Working directory in the sandbox
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// Bring no files in or back
    #[arg(long)]
    pub no_sync: bool,
    /// Leave the command running; prints its id
    #[arg(short, long)]
    pub detach: bool,
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The command
    #[arg(
        value_name = "CMD",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<OsString>,
}

pub(super) async fn run(args: ExecArgs, env: &Env) -> Outcome {
    let terminal = if args.detach { None } else { args.tty.terminal() };
    forward::refuse_detached(&args.forward, args.detach)?;
    args.forward.check().await?;
    let mut start = v1::ExecStart {
        argv: spec::argv(args.command),
        env: args.env.collect()?,
        cwd: args.workdir.map(OsString::into_vec).unwrap_or_default(),
        user: args.user,
        terminal,
        detached: args.detach,
        main: false,
        stdin_closed: args.detach,
    };
    check(&start)?;
    let io = if args.detach { tty::detached() } else { args.tty.io(start.terminal.is_some()) };
    let (guest, synced) = reach(&args.name, args.no_sync, env).await?;
    let exec_id = ids::exec_id()?;
    if let Some((found, folder)) = &synced {
        sync::before(&guest, found, folder, env).await?;
    }
    let _forwarding = args.forward.start(&guest, &mut start).await?;
    let follow = start_and_follow(&guest, exec_id, start, io);
    let (ended, blocked) = Box::pin(feed::around(&guest, &env.printer, follow)).await;
    let ended = ended?;
    if args.detach {
        env.printer.answer(exec_id.to_string())?;
        return Ok(Exit::OK);
    }
    if let (Some((found, folder)), Ended::Exited(_)) = (&synced, &ended) {
        sync::after(&guest, found, folder, env).await?;
    }
    if let Some((found, _)) = &synced {
        say_news(&guest, found, &ended, env).await;
    }
    blocked.iter().for_each(|line| env.printer.hint(line));
    Ok(finish(env, &ended, &args.name))
}

/// The way to the sandbox, and its folder if we are in it: then the command sees every edit, and
/// what it makes comes back. Elsewhere nobody but the daemon is asked.
async fn reach<'a>(
    name: &str,
    no_sync: bool,
    env: &'a Env,
) -> anyhow::Result<(Guest<'a>, Option<(v1::Sandbox, ProjectFolder)>)> {
    let Some(folder) = sync::known_folder().filter(|_| !no_sync) else {
        return Ok((Guest::named(env, name).await?, None));
    };
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = sandbox::find(&cluster, name).await?;
    let guest = Guest::of(env, cluster, &found)?;
    let same = found.spec.as_ref().and_then(ProjectFolder::of_sandbox).as_ref() == Some(&folder);
    let running = sandbox::phase(&found) == v1::Phase::Running;
    Ok((guest, (same && running).then_some((found, folder))))
}

/// Refuses what no guest could start.
pub(super) fn check(start: &v1::ExecStart) -> anyhow::Result<()> {
    let too_long = start.argv.iter().chain(&start.env).map(Vec::len).sum::<usize>()
        > towline_proto::limits::ARGV_ENV_MAX;
    if too_long {
        return Err(Failure::usage("the arguments and environment are too long").into());
    }
    if start.argv.iter().chain([&start.cwd]).any(|word| word.contains(&0)) {
        return Err(Failure::usage("an argument holds a NUL byte").into());
    }
    Ok(())
}

/// Starts a command and stays with it as `io` says.
pub(super) async fn start_and_follow(
    guest: &Guest<'_>,
    exec_id: towline_proto::ids::ExecId,
    start: v1::ExecStart,
    io: Io,
) -> anyhow::Result<Ended> {
    exec::run(guest, ExecClient::new(exec_id.to_vec(), How::Start(start)), io).await
}

/// After a command that failed without saying why, says what was said of its sandbox meanwhile:
/// that it met a file of the local image which changed, for one.
pub(super) async fn say_news(guest: &Guest<'_>, before: &v1::Sandbox, ended: &Ended, env: &Env) {
    let Ended::Exited(status) = ended else { return };
    if ended.exit() == Exit::OK || !status.reason.is_empty() {
        return;
    }
    if let Some(news) = guest.news(before).await {
        env.printer.warning(news);
    }
}

/// Says what a person should know about the end, and returns the exit code.
pub(super) fn finish(env: &Env, ended: &Ended, name: &str) -> Exit {
    match ended {
        Ended::Exited(status) if !status.reason.is_empty() => {
            env.printer.warning(human::printable(&status.reason));
        }
        Ended::Left => env.printer.hint(format!("left; `tow attach {name}` takes it up again")),
        _ => {}
    }
    ended.exit()
}
