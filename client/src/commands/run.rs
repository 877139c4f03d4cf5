//! `tow run`: a command in this folder's sandbox, as if it ran here.
//!
//! [`RunArgs`] is what was typed, [`RunPlan`] what it means, [`run`] does it: find or create the
//! sandbox, bring the folder in, run, bring the folder back. The exit code is the command's.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::signal::unix::{SignalKind, signal};
use towline_proto::v1::{self, Desired};

use super::exec::{check, finish, say_news, start_and_follow};
use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::daemon::place::Place;
use crate::error::{Exit, Failure, Outcome};
use crate::folder::{FolderConfig, ProjectFolder};
use crate::forward::{self, ForwardArgs};
use crate::ports::{self, PortArgs};
use crate::spec::{self, EnvArgs, SpecArgs};
use crate::tunnel::exec::Ended;
use crate::tunnel::feed;
use crate::tunnel::guest::Guest;
use crate::tunnel::tty::{self, TtyArgs};
use crate::{git, ids, sandbox, sync, user};

/// Arguments of `tow run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// What a new sandbox should be.
    #[command(flatten)]
    pub spec: SpecArgs,
    /// Terminal flags.
    #[command(flatten)]
    pub tty: TtyArgs,
    /// Environment flags.
    #[command(flatten)]
    pub env: EnvArgs,
    /// Port flags.
    #[command(flatten)]
    pub ports: PortArgs,
    /// Forward flags.
    #[command(flatten)]
    pub forward: ForwardArgs,
    /// Make a new sandbox even if this folder has one
    #[arg(long)]
    pub new: bool,
    /// Make a new sandbox and remove it afterwards
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// User to run as, instead of the sandbox's: root, UID or UID:GID
    #[arg(short, long, value_name = "USER", value_parser = user::parse_typed)]
    pub user: Option<v1::User>,
    /// Working directory in the sandbox
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<OsString>,
    /// Bring no files in or back
    #[arg(long)]
    pub no_sync: bool,
    /// Leave the command running; prints the sandbox's name
    #[arg(short, long)]
    pub detach: bool,
    /// With -d, print the sandbox as an object
    #[arg(long)]
    pub json: bool,
    /// The command
    #[arg(value_name = "CMD", last = true)]
    pub command: Vec<OsString>,
}

/// What was meant.
#[derive(Debug)]
struct RunPlan {
    args: SpecArgs,
    spec: v1::SandboxSpec,
    folder: Option<ProjectFolder>,
    start: v1::ExecStart,
    tty: TtyArgs,
    ports: Vec<v1::PortMapping>,
    forward: ForwardArgs,
    always_new: bool,
    remove: bool,
    sync: bool,
}

impl RunPlan {
    fn new(args: RunArgs) -> anyhow::Result<Self> {
        let cwd = std::env::current_dir().context("finding the working directory")?;
        let folder = match (ProjectFolder::find(&cwd, user::home().as_deref()), args.no_sync) {
            (Ok(folder), _) => Some(folder),
            (Err(_), true) => None,
            (Err(error), false) => return Err(error),
        };
        let config =
            folder.as_ref().map_or_else(|| Ok(FolderConfig::default()), ProjectFolder::config)?;
        let always_new = args.new || args.rm;
        // Without files, the folder is only how a sandbox is found again: a new one needs none,
        // and starts where its image says.
        let folder = folder.filter(|_| !(args.no_sync && always_new));
        let mut spec = args.spec.to_spec(folder.as_ref(), &config)?;
        spec.remove_on_exit = args.rm;
        let mut env: Vec<Vec<u8>> =
            config.env.iter().map(|(name, value)| format!("{name}={value}").into_bytes()).collect();
        env.extend(args.env.collect()?);
        let start = v1::ExecStart {
            argv: spec::argv(args.command),
            env,
            cwd: workdir(args.workdir, folder.as_ref(), cwd),
            user: args.user,
            terminal: if args.detach { None } else { args.tty.terminal() },
            detached: args.detach,
            main: true,
            stdin_closed: args.detach,
        };
        check(&start)?;
        forward::refuse_detached(&args.forward, args.detach)?;
        if start.argv.is_empty() && spec.user.is_some() {
            return Err(Failure::usage("a local image has no command of its own")
                .hint("`tow run -- CMD…`, or `tow shell`")
                .into());
        }
        Ok(Self {
            ports: args.ports.wanted(&config)?,
            forward: args.forward,
            args: args.spec,
            spec,
            start,
            tty: args.tty,
            always_new,
            remove: args.rm,
            sync: !args.no_sync && folder.is_some(),
            folder,
        })
    }
}

/// Where the command starts: as said, else where `tow` was typed in the folder.
fn workdir(typed: Option<OsString>, folder: Option<&ProjectFolder>, cwd: PathBuf) -> Vec<u8> {
    if let Some(dir) = typed {
        return dir.into_vec();
    }
    let real = std::fs::canonicalize(&cwd).unwrap_or(cwd);
    match folder {
        Some(folder) if real.starts_with(&folder.path) => real.into_os_string().into_vec(),
        _ => Vec::new(),
    }
}

pub(super) async fn run(args: RunArgs, env: &Env) -> Outcome {
    let plan = RunPlan::new(args)?;
    plan.forward.check().await?;
    let cluster = Cluster::open(env, Start::Always).await?;
    let found = find_or_create(&cluster, &plan, env).await?;
    let ended = Box::pin(run_in(&cluster, &plan, env, found.clone())).await;
    if plan.remove && !plan.start.detached && !matches!(ended, Ok((Ended::Left, _))) {
        remove(&cluster, &found, env).await;
    }
    let (ended, published) = ended?;
    let name = sandbox::name(&found);
    if plan.start.detached {
        say_started(&cluster, &found, &published, env).await?;
        return Ok(Exit::OK);
    }
    Ok(finish(env, &ended, &name))
}

/// Keeps the promise of `--rm`; the command's own end is what the exit code tells all the same.
async fn remove(cluster: &Cluster, found: &v1::Sandbox, env: &Env) {
    if let Err(error) = super::rm::remove(cluster, found, env).await {
        let name = sandbox::name(found);
        env.printer.warning(format!("could not remove sandbox {name}: {error:#}"));
    }
}

async fn run_in(
    cluster: &Cluster,
    plan: &RunPlan,
    env: &Env,
    found: v1::Sandbox,
) -> anyhow::Result<(Ended, Vec<v1::PublishedPort>)> {
    let interrupted = || Ok((Ended::Signalled(INTERRUPT), Vec::new()));
    let folder = plan.folder.as_ref().filter(|_| plan.sync);
    let prepare = async {
        let running = sandbox::ensure_running(cluster, found, &env.printer).await?;
        let guest = Guest::of(env, cluster.clone(), &running)?;
        if let Some(folder) = folder {
            sync::before(&guest, &running, folder, env).await?;
        }
        anyhow::Ok((running, guest))
    };
    let Some(prepared) = or_interrupted(Box::pin(prepare)).await? else {
        return interrupted();
    };
    let (running, guest) = prepared?;
    // Those of a command in the foreground live as long as it does.
    let (_leased, published) = match plan.start.detached {
        true => (None, ports::keep(guest.daemon(), &running, &plan.ports, env).await?),
        false => {
            let leased = ports::lease(guest.daemon(), &running, &plan.ports, env).await?;
            (Some(leased), Vec::new())
        }
    };
    let io = match plan.start.detached {
        true => tty::detached(),
        false => plan.tty.io(plan.start.terminal.is_some()),
    };
    let mut start = plan.start.clone();
    let _forwarding = plan.forward.start(&guest, &mut start).await?;
    let follow = start_and_follow(&guest, ids::exec_id()?, start, io);
    let (ended, blocked) = Box::pin(feed::around(&guest, &env.printer, follow)).await;
    if let (Some(folder), Ok(Ended::Exited(_) | Ended::OutputClosed)) = (folder, &ended) {
        let back = sync::after(&guest, &running, folder, env);
        let Some(back) = or_interrupted(back).await? else {
            env.printer
                .warning("interrupted while bringing changes back: some are only in the sandbox");
            return interrupted();
        };
        back?;
    }
    if let Ok(ended) = &ended {
        say_news(&guest, &running, ended, env).await;
    }
    blocked.iter().for_each(|line| env.printer.hint(line));
    Ok((ended?, published))
}

const INTERRUPT: i32 = rustix::process::Signal::INT.as_raw();

/// Waits for `work`, or for Ctrl-C: `None`.
async fn or_interrupted<T>(work: impl Future<Output = T>) -> anyhow::Result<Option<T>> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listening to signals")?;
    Ok(tokio::select! {
        done = work => Some(done),
        _ = interrupt.recv() => None,
    })
}

async fn say_started(
    cluster: &Cluster,
    found: &v1::Sandbox,
    published: &[v1::PublishedPort],
    env: &Env,
) -> anyhow::Result<()> {
    if env.printer.json() {
        let now = sandbox::by_id(cluster, &found.id).await?.unwrap_or_else(|| found.clone());
        return Ok(env
            .printer
            .object(&crate::output::json::sandbox_with_ports(&now, published))?);
    }
    let name = sandbox::name(found);
    env.printer.answer(&name)?;
    env.printer
        .hint(format!("`tow logs -f {name}` shows its output, `tow attach {name}` takes it up"));
    Ok(())
}

/// Finds the folder's sandbox or makes one. Two `tow` in one folder take turns, so that they end
/// up in the same sandbox.
async fn find_or_create(
    cluster: &Cluster,
    plan: &RunPlan,
    env: &Env,
) -> anyhow::Result<v1::Sandbox> {
    // Before our turn, which others wait for: a pull may take long.
    if super::image::pull::may_need(&plan.spec) && existing(cluster, plan).await?.is_none() {
        super::image::pull::ensure(cluster, &plan.spec, env).await?;
    }
    let _turn = match &plan.folder {
        Some(folder) => Some(turn(folder).await?),
        None => None,
    };
    if let Some(found) = existing(cluster, plan).await? {
        if let Some(difference) = plan.args.contradicts(&found.spec.clone().unwrap_or_default()) {
            let name = sandbox::name(&found);
            let text = format!("this folder's sandbox {name} has {difference}");
            return Err(Failure::new(text)
                .hint(format!(
                    "`--new` makes another one; `tow resize {name}` changes CPUs and memory, and \
                     `tow rm {name}` removes this one"
                ))
                .code(crate::error::TOWLINE_FAILED)
                .into());
        }
        return Ok(found);
    }
    let folder = plan.folder.as_ref().map_or(Path::new("."), |folder| &folder.path);
    let spec = v1::SandboxSpec { git: git::identity(folder).await, ..plan.spec.clone() };
    let created = sandbox::create(cluster, spec).await?;
    env.printer.hint(format!("made sandbox {}", sandbox::name(&created)));
    Ok(created)
}

async fn existing(cluster: &Cluster, plan: &RunPlan) -> anyhow::Result<Option<v1::Sandbox>> {
    match (&plan.folder, plan.always_new) {
        (_, true) => Ok(None),
        (Some(folder), false) => folder_sandbox(cluster, folder, plan.args.name.as_deref()).await,
        (None, false) => match &plan.args.name {
            Some(name) => {
                let all = sandbox::list(cluster, None).await?;
                let same = |s: &v1::Sandbox| s.spec.as_ref().is_some_and(|spec| spec.name == *name);
                Ok(all.into_iter().filter(usable).find(same))
            }
            None => Ok(None),
        },
    }
}

/// Returns the newest sandbox of a folder (of this name, if one was said).
pub(super) async fn folder_sandbox(
    cluster: &Cluster,
    folder: &ProjectFolder,
    name: Option<&str>,
) -> anyhow::Result<Option<v1::Sandbox>> {
    let all = sandbox::list(cluster, Some(folder)).await?;
    // A copy is entered by its name only: its folder is still the other one's.
    let named = |s: &v1::Sandbox| match name {
        Some(name) => s.spec.as_ref().is_some_and(|spec| spec.name == name),
        None => s.forked_from.is_none(),
    };
    Ok(all.into_iter().filter(usable).filter(named).max_by_key(|s| (s.created_ms, s.id.clone())))
}

/// Finds the sandbox that was named, else this folder's.
pub(super) async fn named_or_here(
    cluster: &Cluster,
    name: Option<&str>,
) -> anyhow::Result<v1::Sandbox> {
    if let Some(name) = name {
        return sandbox::find(cluster, name).await;
    }
    let folder = ProjectFolder::find(&std::env::current_dir()?, user::home().as_deref())?;
    let found = folder_sandbox(cluster, &folder, None).await?;
    found.ok_or_else(|| {
        let text = format!("there is no sandbox for the folder `{}`", folder.path.display());
        Failure::new(text).hint("`tow run -- CMD` makes one; `tow ls` lists all").into()
    })
}

/// Whether `tow run` may enter it: not one that is on its way out.
fn usable(found: &v1::Sandbox) -> bool {
    let throwaway = found.spec.as_ref().is_some_and(|spec| spec.remove_on_exit);
    found.desired() != Desired::Deleted && !throwaway
}

/// How long another `tow` may take to find or make the folder's sandbox.
const TURN_MAX: Duration = Duration::from_secs(60);

/// Waits for our turn with this folder; dropping the file gives it to the next.
async fn turn(folder: &ProjectFolder) -> anyhow::Result<File> {
    let key = blake3::hash(folder.path.as_os_str().as_bytes()).to_hex();
    let name = format!("folder-{}.lock", &key.as_str()[..16]);
    let path = Place::discover()?.lock().with_file_name(name);
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("could not open `{}`", path.display()))?;
    let deadline = Instant::now() + TURN_MAX;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(Errno::WOULDBLOCK) => {
                let text =
                    "another `tow run` has been looking for this folder's sandbox for a minute";
                return Err(Failure::new(text).hint("see what it waits for: `tow ls`").into());
            }
            Err(error) => return Err(error).context("waiting for another `tow` in this folder"),
        }
    }
}
