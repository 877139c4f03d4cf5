//! The verbs, one file each: arguments as typed, a plan that is checked, and the run.

pub mod attach;
pub mod completions;
pub mod cp;
pub mod create;
pub mod daemon;
pub mod diff;
pub mod doctor;
pub mod down;
pub mod events;
pub mod exec;
pub mod fork;
pub mod image;
pub mod inspect;
pub mod logs;
pub mod ls;
pub mod node;
pub mod pause;
pub mod ports;
pub mod prune;
pub mod resize;
pub mod rm;
pub mod run;
pub mod save;
pub mod shell;
pub mod start;
pub mod status;
pub mod stop;
pub mod ttl;
pub mod up;
pub mod version;
pub mod why;

use crate::cli::{Cli, Verb};
use crate::error::Outcome;
use crate::output::Printer;

/// What every verb may use.
#[derive(Debug)]
pub struct Env {
    /// Where answers, hints and errors go.
    pub printer: Printer,
    /// `--context`.
    pub context: Option<String>,
}

/// Runs what was typed.
pub async fn run(cli: Cli, env: Env) -> Outcome {
    match cli.verb {
        Verb::Up(args) => up::run(args, &env).await,
        Verb::Down(args) => down::run(args, &env).await,
        Verb::Status(args) => status::run(args, &env).await,
        Verb::Run(args) => Box::pin(run::run(*args, &env)).await,
        Verb::Create(args) => Box::pin(create::run(*args, &env)).await,
        Verb::Exec(args) => Box::pin(exec::run(*args, &env)).await,
        Verb::Shell(args) => Box::pin(shell::run(*args, &env)).await,
        Verb::Attach(args) => Box::pin(attach::run(args, &env)).await,
        Verb::Ls(args) => ls::run(args, &env).await,
        Verb::Inspect(args) => inspect::run(args, &env).await,
        Verb::Logs(args) => Box::pin(logs::run(args, &env)).await,
        Verb::Diff(args) => Box::pin(diff::run(args, &env)).await,
        Verb::Save(args) => Box::pin(save::run(*args, &env)).await,
        Verb::Cp(args) => Box::pin(cp::run(args, &env)).await,
        Verb::Ports(args) => Box::pin(ports::run(args, &env)).await,
        Verb::Why(args) => Box::pin(why::run(args, &env)).await,
        Verb::Events(args) => Box::pin(events::run(args, &env)).await,
        Verb::Pause(args) => pause::pause(args, &env).await,
        Verb::Resume(args) => pause::resume(args, &env).await,
        Verb::Fork(args) => fork::run(args, &env).await,
        Verb::Stop(args) => stop::run(args, &env).await,
        Verb::Start(args) => start::run(args, &env).await,
        Verb::Resize(args) => resize::run(args, &env).await,
        Verb::Rm(args) => rm::run(args, &env).await,
        Verb::Prune(args) => Box::pin(prune::run(args, &env)).await,
        Verb::Ttl(args) => ttl::run(args, &env).await,
        Verb::Doctor(args) => doctor::run(args, &env).await,
        Verb::Completions(args) => completions::run(&args),
        Verb::Version(args) => version::run(&args, &env),
        Verb::Image(verb) => image::run(verb, &env).await,
        Verb::Node(verb) => node::run(verb, &env).await,
        Verb::Daemon(args) => daemon::run(args, &env).await,
    }
}
