//! `tow shell`: the user's shell in a sandbox, this folder's unless one is named.

use clap::Args;
use towline_proto::v1;

use super::exec::{finish, start_and_follow};
use super::run::named_or_here;
use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::Outcome;
use crate::folder::ProjectFolder;
use crate::forward::ForwardArgs;
use crate::spec::EnvArgs;
use crate::tunnel::exec::Ended;
use crate::tunnel::guest::Guest;
use crate::tunnel::tty::TtyArgs;
use crate::{ids, sandbox, sync, user};

/// Arguments of `tow shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
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
    /// Bring no files in or back
    #[arg(long)]
    pub no_sync: bool,
    /// Name or id of the sandbox; this folder's when there is none
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

pub(super) async fn run(args: ShellArgs, env: &Env) -> Outcome {
    args.forward.check().await?;
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = named_or_here(&cluster, args.name.as_deref()).await?;
    let found = sandbox::ensure_running(&cluster, found, &env.printer).await?;
    let terminal = args.tty.terminal();
    let mut start = v1::ExecStart {
        argv: shell(&found),
        env: args.env.collect()?,
        terminal,
        user: args.user,
        ..Default::default()
    };
    let io = args.tty.io(start.terminal.is_some());
    let guest = Guest::of(env, cluster, &found)?;
    let folder = found.spec.as_ref().and_then(ProjectFolder::of_sandbox).filter(|_| !args.no_sync);
    if let Some(folder) = &folder {
        sync::before(&guest, &found, folder, env).await?;
    }
    let _forwarding = args.forward.start(&guest, &mut start).await?;
    let ended = start_and_follow(&guest, ids::exec_id()?, start, io).await?;
    if let (Some(folder), Ended::Exited(_)) = (&folder, &ended) {
        sync::after(&guest, &found, folder, env).await?;
    }
    Ok(finish(env, &ended, &sandbox::name(&found)))
}

/// The user's own shell with a local image; else the best there is in any image.
fn shell(found: &v1::Sandbox) -> Vec<Vec<u8>> {
    let user = found.spec.as_ref().and_then(|spec| spec.user.as_ref());
    match user.map(|user| user.shell.clone()).filter(|shell| !shell.is_empty()) {
        Some(shell) => vec![shell, b"-l".to_vec()],
        None => {
            let best = "command -v bash >/dev/null 2>&1 && exec bash -l; exec sh -l";
            vec![b"/bin/sh".to_vec(), b"-c".to_vec(), best.into()]
        }
    }
}
