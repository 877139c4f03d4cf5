//! `towline-node-agent --config F [prepare | doctor]`: arguments, signals, exit code. All else is in the
//! library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use towline_link::telemetry;
use towline_node_agent::config::{Config, default_cache};
use towline_node_agent::doctor::{self, Check, Grade};
use towline_node_agent::{kernel, memory, prepare, start};

/// Runs sandboxes as microVMs on this machine.
#[derive(Debug, Parser)]
#[command(name = "towline-node-agent", version)]
struct Arguments {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Fetch the guest kernel ahead and, with a configuration, make the initramfs; then exit
    Prepare,
    /// Say what this machine lacks to be a node, and what to do; exit code 1 when something is missing
    Doctor {
        /// Print an object per check
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    memory::be_frugal();
    let arguments = Arguments::parse();
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")
        .and_then(|runtime| {
            let result = runtime.block_on(run(arguments));
            // Blocking work (an import, a copy) may go on for long, and may be cut off anywhere.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the one place that says why the process ends")]
fn report(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let telemetry = telemetry::init("towline-node-agent");
    let config = arguments.config.map(|path| Config::load(&path)).transpose()?;
    let result = match arguments.verb {
        Some(Verb::Prepare) => {
            tokio::task::spawn_blocking(move || match config {
                Some(config) => prepare(&config).map(|_| ()),
                None => prepare_kernel(),
            })
            .await?
        }
        Some(Verb::Doctor { json }) => {
            let checks = doctor::check(config.as_ref()).await;
            show(&checks, json);
            let missing = checks.iter().any(|check| check.grade == Grade::Missing);
            return Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS });
        }
        None => {
            let config = config.context("--config FILE is missing")?;
            let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
            let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
            let stop = async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tracing::info!("stopping; sandboxes go on");
            };
            start(config, stop).await
        }
    };
    tokio::task::spawn_blocking(move || telemetry.shutdown()).await?;
    result.map(|()| ExitCode::SUCCESS)
}

#[expect(clippy::print_stdout, reason = "what was asked for")]
fn show(checks: &[Check], json: bool) {
    for check in checks {
        match json {
            true => println!("{}", check.object()),
            false => println!("{}", check.text()),
        }
    }
}

/// Fetches the guest kernel into the user's own cache.
fn prepare_kernel() -> anyhow::Result<()> {
    let cache = std::env::var_os("TOWLINE_CACHE")
        .filter(|folder| !folder.is_empty())
        .map(PathBuf::from)
        .or_else(default_cache)
        .context("neither XDG_CACHE_HOME nor HOME is set: name a --config FILE")?;
    kernel::ensure(&cache, &|text| tracing::info!("{text}")).context("getting the guest kernel")?;
    Ok(())
}
