//! `towline-control-plane --config F`: one member of the control plane. Ends with 0 on SIGTERM or
//! SIGINT, and with 1 and a reason when it cannot go on.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use towline_control_plane::{Config, start};

/// One member of Towline's control plane.
#[derive(Debug, Parser)]
#[command(name = "towline-control-plane", version)]
struct Args {
    /// Configuration file (TOML: data_dir, listen, member_name)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("starting the runtime")),
    };
    let (result, telemetry) = runtime.block_on(async {
        let telemetry = towline_link::telemetry::init("towline-control-plane");
        (run(args).await, telemetry)
    });
    telemetry.shutdown();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut running = start(config).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        error = running.failed() => return Err(error),
    }
    tracing::info!("stopping");
    running.shutdown().await
}

#[expect(clippy::print_stderr, reason = "the one place that says why the process ended")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
