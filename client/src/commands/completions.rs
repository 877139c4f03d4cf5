//! `tow completions`: a shell's completion script on stdout.

use std::io::Write as _;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::error::{Exit, Outcome};

/// Arguments of `tow completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Which shell's
    pub shell: Shell,
}

pub(super) fn run(args: &CompletionsArgs) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tow", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(Exit::OK)
}
