//! The program: process 1 of the microVM; under another name, process 1 of a sandbox that shares the
//! node's kernel; or, started by itself under a third, the workload's init.

use std::path::Path;
use std::process::ExitCode;

use tokio::io::{AsyncRead, AsyncWrite};
use towline_guest_agent::boot::Kernel;
use towline_guest_agent::vsock::Vsock;
use towline_guest_agent::{agent, boot, net, process, shutdown, workload};
use towline_proto::mux::PORT_NAME;
use towline_proto::process::PROCESS_NAME;
use towline_streams::{LinkListener, Marker, MuxDriver, Port};

/// Threads for what may block: root set-up, spools, start plans.
const BLOCKING_THREADS_MAX: usize = 32;
/// How long a thread without work stays: for as long as the sandbox runs.
const KEEP_THREADS: std::time::Duration = std::time::Duration::from_secs(1 << 40);

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    if name == workload::INIT_NAME {
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
    let kernel = if name == PROCESS_NAME { Kernel::Shared } else { Kernel::Own };
    let result = match kernel {
        Kernel::Own => start(),
        Kernel::Shared => start_on_shared_kernel(),
    };
    let error = match result {
        Ok(()) => "the guest link is gone".to_owned(),
        Err(error) => error.to_string(),
    };
    agent::log(&format!("the guest agent cannot go on: {error}"));
    if kernel == Kernel::Own {
        shutdown::power_off(kernel);
    }
    ExitCode::FAILURE
}

fn start() -> std::io::Result<()> {
    boot::prepare()?;
    match Port::find(PORT_NAME) {
        Ok(device) => serve(Kernel::Own, || Port::open(&device)),
        // A VMM whose guest link goes over vsock.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            serve(Kernel::Own, || Ok(LinkListener::new(Vsock::listen()?)))
        }
        Err(error) => Err(error),
    }
}

fn start_on_shared_kernel() -> std::io::Result<()> {
    let link = process::prepare()?;
    boot::prepare_own_part()?;
    serve(Kernel::Shared, || LinkListener::of_unix(link))
}

fn serve<S>(kernel: Kernel, link: impl FnOnce() -> std::io::Result<S>) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(KEEP_THREADS)
        .build()?;
    // One is there for ever: at the sandbox's bound of processes no thread could be started.
    let first = runtime.spawn_blocking(|| ());
    runtime.block_on(async {
        first.await?;
        let network = net::start()?;
        let (sessions, driver) = MuxDriver::guest(link()?, Marker::BOOT);
        tokio::select! {
            result = driver => result,
            () = agent::run(sessions, kernel, network) => Ok(()),
        }
    })
}
