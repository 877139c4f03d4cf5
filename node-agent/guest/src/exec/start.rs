//! Starts an exec: descriptors, clone, and the child's report, then the tasks that serve it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::Pid;
use tokio::io::AsyncReadExt;
use towline_proto::v1::{ExecStart, StreamErrorCode, Terminal};

use super::child::{Child, REPORT_LEN, Stage};
use super::output::Output;
use super::plan::{Plan, plan};
use super::pumps::{Which, pump_output, pump_stdin, settle};
use super::spool::Spool;
use super::table::ExecTable;
use super::{Exec, ExecKey, Life, Running, end};
use crate::nonblocking::NonBlocking;
use crate::refusal::Refusal;
use crate::workload::{ExecCgroup, Workload};

/// The agent's ends of a process' descriptors.
struct Ends {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: bool,
}

/// The outputs of an exec to be: spooled when it is detached.
pub(crate) fn outputs(
    start: &ExecStart,
    key: &ExecKey,
    workload: &Workload,
) -> Result<[Output; 2], Refusal> {
    if !start.detached {
        return Ok([Output::in_memory(), Output::in_memory()]);
    }
    let name: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let spool = |kind: &str| match Spool::create(&workload.spool().join(format!("{name}.{kind}"))) {
        Ok(spool) => Ok(Output::spooled(spool)),
        Err(error) => Err(Refusal::io("cannot make the spool for the command's output", &error)),
    };
    Ok([spool("out")?, spool("err")?])
}

/// Starts the process and the tasks that serve it. On success the exec is `Running`.
pub(crate) async fn start(
    table: &Arc<ExecTable>,
    exec: &Arc<Exec>,
    start: ExecStart,
) -> Result<(), Refusal> {
    let workload = table.workload();
    let settings = table.settings();
    let become_user = workload.becomes_users();
    let no_stdin = start.stdin_closed || (start.detached && start.terminal.is_none());
    // Reads files of the sandbox, which may come from afar.
    let plan =
        tokio::task::spawn_blocking(move || plan(&start, &settings, become_user)).await.map_err(
            |_| Refusal::new(StreamErrorCode::Internal, "the guest agent could not plan"),
        )??;
    let (ends, stdio) = match &plan.terminal {
        Some(terminal) => terminal_ends(workload, terminal, &plan)?,
        None => pipe_ends(no_stdin)
            .map_err(|error| Refusal::io("cannot make pipes for the command", &error))?,
    };
    let entry = workload.enter().await?;
    let cgroup = workload.exec_cgroup(&exec.key)?;
    let (report, child_report) = pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| Refusal::io("cannot make a pipe for the command", &error.into()))?;
    let what = describe(&plan);
    let into = cgroup.as_ref().map(ExecCgroup::open).transpose()?;
    let child = Child::new(plan, stdio, child_report, entry.init.clone(), into);
    let (pid, pidfd) = entry.spawner.spawn(child).await.map_err(|error| no_process(&error))?;
    match child_result(report, &what).await {
        Ok(pid_inside) => run(table, exec, ends, pid, pid_inside, pidfd, cgroup)
            .map_err(|error| Refusal::io("cannot serve the command's descriptors", &error)),
        Err(refusal) => {
            // It exits by itself; its status is of no interest but must be collected.
            if let Ok(exit) = NonBlocking::new(pidfd) {
                tokio::spawn(async move {
                    let _ = exit.ready().await;
                    let _ =
                        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
                    drop(cgroup);
                });
            }
            Err(refusal)
        }
    }
}

/// What messages call the command and its directory.
struct What {
    command: String,
    cwd: String,
    user: String,
}

fn describe(plan: &Plan) -> What {
    What {
        command: plan.argv[0].to_string_lossy().into_owned(),
        cwd: plan.cwd.to_string_lossy().into_owned(),
        user: plan.user.as_ref().map_or_else(String::new, |user| user.name.clone()),
    }
}

fn no_process(error: &io::Error) -> Refusal {
    if error.kind() == io::ErrorKind::WouldBlock {
        return Refusal::new(
            StreamErrorCode::Limit,
            "the sandbox has as many processes as it may have: end some of them, or `tow stop` it",
        );
    }
    Refusal::io("cannot make a process", error)
}

/// Starts the tasks. From here on the exec lives by itself.
fn run(
    table: &Arc<ExecTable>,
    exec: &Arc<Exec>,
    ends: Ends,
    pid: Pid,
    pid_inside: u32,
    pidfd: OwnedFd,
    cgroup: Option<ExecCgroup>,
) -> io::Result<()> {
    let exit = NonBlocking::new(pidfd)?;
    let stdout = Arc::new(NonBlocking::new(ends.stdout)?);
    let stderr = ends.stderr.map(NonBlocking::new).transpose()?.map(Arc::new);
    let terminal = ends.terminal.then(|| Arc::clone(&stdout));
    let stdin = match (&terminal, ends.stdin) {
        (Some(terminal), _) => Some(Arc::clone(terminal)),
        (None, Some(stdin)) => Some(Arc::new(NonBlocking::new(stdin)?)),
        (None, None) => None,
    };
    let is_terminal = terminal.is_some();
    exec.change(|state| {
        if stdin.is_none() {
            state.stdin.kill();
        }
        state.stderr.closed = stderr.is_none();
        state.life = Life::Running(Running { pid, pid_inside, terminal, exited: None });
    });
    if let Some(stdin) = stdin {
        tokio::spawn(pump_stdin(Arc::clone(exec), stdin, is_terminal));
    }
    tokio::spawn(pump_output(Arc::clone(exec), Which::Stdout, stdout));
    if let Some(stderr) = stderr {
        tokio::spawn(pump_output(Arc::clone(exec), Which::Stderr, stderr));
    }
    let (table, exec) = (Arc::clone(table), Arc::clone(exec));
    tokio::spawn(async move {
        let status = end::wait_for_exit(&exec, pid, exit, cgroup.as_ref()).await;
        table.ended(&exec, &status);
        drop(cgroup);
        settle(&exec).await;
    });
    Ok(())
}

/// The pid inside, or why there is no command.
async fn child_result(report: OwnedFd, what: &What) -> Result<u32, Refusal> {
    let bytes = read_report(report)
        .await
        .map_err(|error| Refusal::io("cannot hear from the command's process", &error))?;
    let (mut pid, mut failure) = (None, None);
    for piece in bytes.chunks_exact(REPORT_LEN) {
        let number = i32::from_le_bytes([piece[1], piece[2], piece[3], piece[4]]);
        match Stage::from_number(piece[0]) {
            Some(Stage::Pid) => pid = u32::try_from(number).ok(),
            Some(stage) => failure = Some((stage, number)),
            None => {}
        }
    }
    match (failure, pid) {
        (Some((stage, errno)), _) => Err(explain(stage, errno, what)),
        (None, Some(pid)) => Ok(pid),
        (None, None) => Err(Refusal::new(
            StreamErrorCode::Limit,
            format!("`{}` was killed before it began", what.command),
        )),
    }
}

async fn read_report(report: OwnedFd) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(report)?;
    pipe.take(2 * REPORT_LEN as u64).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

fn explain(stage: Stage, errno: i32, what: &What) -> Refusal {
    let error = io::Error::from_raw_os_error(errno);
    let What { command, cwd, user } = what;
    let cannot = |message: String| Refusal::new(StreamErrorCode::CannotExecute, message);
    match stage {
        Stage::Execute if errno == libc::ENOENT => Refusal::new(
            StreamErrorCode::CommandNotFound,
            if command.contains('/') {
                format!("`{command}` does not exist in the sandbox")
            } else {
                format!("`{command}` is in no folder of the sandbox's PATH")
            },
        ),
        Stage::Execute => cannot(format!("cannot execute `{command}`: {error}")),
        Stage::Interpreter if errno == libc::ENOENT => cannot(format!(
            "cannot execute `{command}`: the interpreter or loader that it names does not exist"
        )),
        Stage::Interpreter => cannot(format!(
            "cannot execute `{command}`: it is no program for this machine and no script"
        )),
        Stage::WorkingDirectory => {
            cannot(format!("cannot enter the working directory `{cwd}` as `{user}`: {error}"))
        }
        Stage::User => cannot(format!("cannot become user `{user}`: {error}")),
        Stage::Namespaces => Refusal::io("cannot enter the workload", &error),
        Stage::Terminal | Stage::Pid => Refusal::io("cannot set up the terminal", &error),
    }
}

/// Size of a command's pipes, of which each process may have hundreds.
const PIPE_BYTES: usize = 256 << 10;

fn pipe_ends(no_stdin: bool) -> io::Result<(Ends, [OwnedFd; 3])> {
    let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let (child_stdin, stdin) = if no_stdin {
        (std::fs::File::open("/dev/null")?.into(), None)
    } else {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (read, Some(write))
    };
    for pipe in stdin.iter().chain([&stdout]) {
        // Fewer turns of an emulated CPU; a kernel that refuses leaves the pipe as it was.
        let _ = fcntl_setpipe_size(pipe, PIPE_BYTES);
    }
    let ends = Ends { stdin, stdout, stderr: Some(stderr), terminal: false };
    Ok((ends, [child_stdin, child_stdout, child_stderr]))
}

fn terminal_ends(
    workload: &Workload,
    terminal: &Terminal,
    plan: &Plan,
) -> Result<(Ends, [OwnedFd; 3]), Refusal> {
    let refuse = |error: io::Error| Refusal::io("cannot make a terminal", &error);
    let (master, slave) = workload.open_terminal().map_err(refuse)?;
    let size = window(terminal.rows, terminal.columns);
    rustix::termios::tcsetwinsize(&master, size).map_err(|error| refuse(error.into()))?;
    if let Some(user) = &plan.user {
        let owner = rustix::fs::Uid::from_raw(user.uid);
        rustix::fs::fchown(&slave, Some(owner), None).map_err(|error| refuse(error.into()))?;
    }
    let copy = || slave.try_clone().map_err(refuse);
    let stdio = [copy()?, copy()?, slave.try_clone().map_err(refuse)?];
    Ok((Ends { stdin: None, stdout: master, stderr: None, terminal: true }, stdio))
}

/// A window of at most 65535 by 65535.
pub(crate) fn window(rows: u32, columns: u32) -> rustix::termios::Winsize {
    let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    rustix::termios::Winsize {
        ws_row: short(rows),
        ws_col: short(columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
