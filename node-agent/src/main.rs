//! `towline-node-agent --config F [prepare]`: arguments, signals, exit code. All else is in the
//! library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use towline_link::telemetry;
use towline_node_agent::config::{Config, default_cache};
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
        Ok(()) => ExitCode::SUCCESS,
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

async fn run(arguments: Arguments) -> anyhow::Result<()> {
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
    result
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
