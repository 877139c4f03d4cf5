//! tow: the laptop's side of Towline. It asks; what runs where is decided by the control plane.
//!
//! Reading order: `cli.rs` (what can be typed), `commands/` (one file per verb), `sandbox.rs`
//! (request, follow, result), `tunnel/` (bytes to and from a guest), `embedded.rs` (the cluster on
//! this machine), `daemon/` (what goes on after `tow` returned).

pub mod cli;
pub mod cluster;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod embedded;
pub mod env_vars;
pub mod error;
pub mod folder;
pub mod forward;
pub mod git;
pub mod ids;
pub mod nearest;
pub mod output;
pub mod parse;
pub mod ports;
pub mod registry_login;
pub mod sandbox;
pub mod session;
pub mod spec;
pub mod sync;
pub mod tunnel;
pub mod user;

use std::ffi::OsString;
use std::process::ExitCode;

use crate::cli::{Cli, Verb};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{Printer, Style};

/// Runs `tow` with these arguments.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match cli::parse(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers; the rest is clap's own text on stderr.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { error::USAGE } else { 0 });
        }
    };
    let json = cli.verb.json();
    let printer = Printer::new(Style { json, quiet: cli.quiet, verbose: cli.verbose });
    let failed = if cli.verb.carries_a_command() { error::TOWLINE_FAILED } else { 1 };
    match run(cli, printer) {
        Ok(Exit(code)) => ExitCode::from(code),
        Err(error) if error::is_broken_pipe(&error) => ExitCode::from(failed),
        Err(error) => {
            printer.failure(&error);
            ExitCode::from(error::wanted_code(&error).unwrap_or(failed))
        }
    }
}

fn run(cli: Cli, printer: Printer) -> Outcome {
    // The daemon carries every stream of this user; a short-lived `tow` carries one, and threads
    // that it does not use would only make it start later.
    let mut builder = match cli.verb {
        Verb::Daemon(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = builder.enable_all().build()?;
    let env = Env { printer, context: cli.context.clone() };
    let verbose = cli.verbose;
    let outcome = runtime.block_on(async {
        let own = matches!(cli.verb, Verb::Daemon(_) | Verb::Up(_));
        let level = if verbose || own { "info" } else { "off" };
        let telemetry = towline_link::telemetry::init_at("tow", level);
        let outcome = commands::run(cli, env).await;
        (outcome, telemetry)
    });
    // A thread that waits for standard input cannot be taken back; the process ends without it.
    runtime.shutdown_background();
    outcome.1.shutdown();
    outcome.0
}
