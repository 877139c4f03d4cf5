//! The program: process 1 of the microVM, or, started by itself under another name, the workload's
//! init.

use std::path::Path;
use std::process::ExitCode;

use towline_guest_agent::{agent, boot, net, shutdown, workload};
use towline_proto::mux::PORT_NAME;
use towline_streams::{Marker, MuxDriver, Port};

/// Threads for what may block: root set-up, spools, start plans.
const BLOCKING_THREADS_MAX: usize = 32;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == workload::INIT_NAME) {
        let Some(root) = args.next() else { return ExitCode::from(2) };
        // Its parent is told by the pipe.
        let _ = workload::run_init(Path::new(&root));
        return ExitCode::FAILURE;
    }
    if std::process::id() != 1 {
        use std::io::Write;
        let message =
            "this is the first process of a Towline microVM; it is not for running by hand";
        let _ = writeln!(std::io::stderr(), "{message}");
        return ExitCode::from(2);
    }
    let error = match start() {
        Ok(()) => "the guest link's port is gone".to_owned(),
        Err(error) => error.to_string(),
    };
    agent::log(&format!("the guest agent cannot go on: {error}"));
    shutdown::power_off();
    ExitCode::FAILURE
}

fn start() -> std::io::Result<()> {
    boot::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()?;
    runtime.block_on(async {
        let port = Port::open(&Port::find(PORT_NAME)?)?;
        let network = net::start()?;
        let (sessions, driver) = MuxDriver::guest(port, Marker::BOOT);
        tokio::select! {
            result = driver => result,
            () = agent::run(sessions, network) => Ok(()),
        }
    })
}
