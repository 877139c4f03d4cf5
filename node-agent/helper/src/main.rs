//! `towline-node-helper --config F`: arguments and exit code. All else is in the library.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use towline_node_helper::config::Config;
use towline_node_helper::server::Server;

/// Starts each VMM of a node under a user, in a cgroup and in a root of its own
#[derive(Debug, Parser)]
#[command(name = "towline-node-helper", version)]
struct Arguments {
    /// Configuration file (TOML), which only root can write
    #[arg(long, value_name = "FILE", default_value = "/etc/towline/node-helper.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).init();
    match run(&Arguments::parse()) {
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

/// Each VMM takes two descriptors: as many are allowed as may be.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, ..limit };
    let _ = setrlimit(Resource::Nofile, all);
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the helper must be root: it gives ids away");
    let config = Config::load(&arguments.config)?;
    allow_descriptors();
    let socket = config.socket.clone();
    let mut server = Server::new(config).context("taking up the node's VMMs")?;
    tracing::info!(socket = %socket.display(), "listens");
    server.run().context("serving")
}
