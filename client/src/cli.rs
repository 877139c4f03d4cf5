//! What can be typed: the tree of verbs and the flags that all of them share.
//!
//! Leaves each verb's own arguments to its file in `commands/`. A verb or flag of design §9 whose
//! feature does not exist yet is absent here, and `not_yet` says so instead of "unknown".

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};

use crate::commands;

/// Run commands in microVMs elsewhere as if they ran here
#[derive(Debug, Parser)]
#[command(name = "tow", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Say more about what is being done
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Say nothing but the answer and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Use this context instead of the current one
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Start the embedded cluster on this machine
    Up(commands::up::UpArgs),
    /// Stop the embedded cluster and its sandboxes; their disks are kept
    Down(commands::down::DownArgs),
    /// Say how the cluster is
    Status(commands::status::StatusArgs),
    /// Run a command in this folder's sandbox
    Run(Box<commands::run::RunArgs>),
    /// Create a sandbox without running anything in it; prints its name
    Create(Box<commands::create::CreateArgs>),
    /// Run a command in a running sandbox
    Exec(Box<commands::exec::ExecArgs>),
    /// Open a shell in a sandbox
    Shell(Box<commands::shell::ShellArgs>),
    /// Take up the newest main command of a sandbox
    Attach(commands::attach::AttachArgs),
    /// List sandboxes
    Ls(commands::ls::LsArgs),
    /// Say everything known about sandboxes
    Inspect(commands::inspect::InspectArgs),
    /// Show the output of a sandbox's main command
    Logs(commands::logs::LogsArgs),
    /// Copy files to and from a running sandbox
    Cp(commands::cp::CpArgs),
    /// Show what a sandbox changed against its image
    Diff(commands::diff::DiffArgs),
    /// Save a running sandbox as an image
    Save(Box<commands::save::SaveArgs>),
    /// Show and publish a sandbox's ports
    Ports(commands::ports::PortsArgs),
    /// Say what a sandbox is doing, what keeps it, and what its network policy blocked
    Why(commands::why::WhyArgs),
    /// Show what happened to a sandbox
    Events(commands::events::EventsArgs),
    /// Halt sandboxes with all that they have in memory
    Pause(commands::pause::PauseArgs),
    /// Let paused sandboxes go on where they were
    Resume(commands::pause::PauseArgs),
    /// Copy a running sandbox, with its memory and its disk
    Fork(commands::fork::ForkArgs),
    /// Stop sandboxes; their disks are kept
    Stop(commands::stop::StopArgs),
    /// Start stopped sandboxes
    Start(commands::start::StartArgs),
    /// Give a stopped sandbox other CPUs or another memory
    Resize(commands::resize::ResizeArgs),
    /// Remove sandboxes and their disks
    Rm(commands::rm::RmArgs),
    /// Remove stopped sandboxes and images that nobody uses
    Prune(commands::prune::PruneArgs),
    /// Say or change when a sandbox is stopped by itself
    Ttl(commands::ttl::TtlArgs),
    /// Check this machine, say what to do, mend what can be mended
    Doctor(commands::doctor::DoctorArgs),
    /// Print a shell's completion script
    Completions(commands::completions::CompletionsArgs),
    /// Print versions
    Version(commands::version::VersionArgs),
    /// Images to start sandboxes from
    #[command(subcommand)]
    Image(commands::image::ImageVerb),
    /// Machines that run sandboxes
    #[command(subcommand)]
    Node(commands::node::NodeVerb),
    /// What goes on after `tow` returned
    #[command(hide = true)]
    Daemon(commands::daemon::DaemonArgs),
}

impl Verb {
    /// Whether the verb's exit code is a remote command's, so that Towline's own failure is 125.
    pub fn carries_a_command(&self) -> bool {
        matches!(self, Self::Run(_) | Self::Exec(_) | Self::Shell(_) | Self::Attach(_))
    }

    /// Whether objects are wanted instead of text.
    pub fn json(&self) -> bool {
        match self {
            Self::Status(args) => args.json,
            Self::Run(args) => args.json,
            Self::Create(args) => args.json,
            Self::Ls(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Diff(args) => args.json,
            Self::Save(args) => args.json,
            Self::Ports(args) => args.json,
            Self::Logs(args) => args.json,
            Self::Why(args) => args.json,
            Self::Events(args) => args.json,
            Self::Pause(args) | Self::Resume(args) => args.json,
            Self::Fork(args) => args.json,
            Self::Stop(args) => args.json,
            Self::Start(args) => args.json,
            Self::Resize(args) => args.json,
            Self::Rm(args) => args.json,
            Self::Prune(args) => args.json,
            Self::Ttl(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Version(args) => args.json,
            Self::Image(verb) => verb.json(),
            Self::Node(verb) => verb.json(),
            _ => false,
        }
    }
}

/// Parses arguments; a word of the contract that this version lacks is refused as such.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(args).map_err(|error| not_yet(&error).unwrap_or(error))
}

const LATER_VERBS: &[&str] = &[
    "sync",
    "checkpoint",
    "restore",
    "pool",
    "quota",
    "member",
    "token",
    "login",
    "context",
    "offer",
    "cordon",
    "uncordon",
    "drain",
];
const LATER_FLAGS: &[(&str, &str)] =
    &[("--reverse", "reverse ports"), ("--gpus", "GPUs"), ("--watch", "watching")];

fn not_yet(error: &clap::Error) -> Option<clap::Error> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let text = match error.kind() {
        ErrorKind::UnknownArgument => {
            let flag = named(ContextKind::InvalidArg)?;
            let name = flag.split(['=', ' ']).next().unwrap_or(&flag);
            let (_, what) = LATER_FLAGS.iter().find(|(later, _)| *later == name)?;
            format!("`{name}`: {what} are not in this version of tow\n")
        }
        ErrorKind::InvalidSubcommand => {
            let verb = named(ContextKind::InvalidSubcommand)?;
            LATER_VERBS.contains(&verb.as_str()).then(|| {
                format!("`{verb}` is not in this version of tow; `tow --help` lists what is\n")
            })?
        }
        _ => return None,
    };
    Some(clap::Error::raw(error.kind(), text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn refused(args: &[&str]) -> String {
        let args = ["tow"].iter().chain(args).map(OsString::from);
        parse(args).unwrap_err().to_string()
    }

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_not_in_this_version_is_refused_as_such() {
        let cases: [&[&str]; 5] = [
            &["run", "--reverse", "80", "--", "true"],
            &["run", "--gpus", "1", "--", "true"],
            &["run", "--gpus=1", "--", "true"],
            &["checkpoint", "a"],
            &["ls", "--watch"],
        ];
        for case in cases {
            let text = refused(case);
            assert!(text.contains("not in this version"), "{case:?}: {text}");
        }
    }

    #[test]
    fn a_typing_error_is_not_a_missing_feature() {
        let text = refused(&["run", "--memori", "1g", "--", "true"]);
        assert!(text.contains("--memory"), "{text}");
    }

    #[test]
    fn help_is_as_reviewed() {
        insta::assert_snapshot!(Cli::command().render_long_help().to_string());
    }

    #[test]
    fn help_of_run_is_as_reviewed() {
        let mut tree = Cli::command();
        let run = tree.find_subcommand_mut("run").unwrap();
        insta::assert_snapshot!(run.render_help().to_string());
    }
}
