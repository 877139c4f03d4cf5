//! Serves the node agent: one thread, one request at a time. It is crash-only: what runs is found in
//! the cgroups, and the deadline in a file, by the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt,
};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::time::{ClockId, clock_gettime};

use crate::cgroups::{Cgroup, Limits, Tree};
use crate::config::Config;
use crate::decide::{Connection, Table, Vmm};
use crate::packet;
use crate::process;
use crate::protocol::{Answer, Name, Request, Running, Spawn};
use crate::spawn::{self, Order};

/// Connections at a time: a node agent has one, and one more while it is replaced.
const CONNECTIONS_MAX: usize = 16;
/// Between two looks at VMMs that were killed.
const LOOK: Duration = Duration::from_millis(50);

/// The helper.
#[derive(Debug)]
pub struct Server {
    config: Config,
    cgroups: Arc<Tree>,
    table: Table,
    watched: BTreeMap<Name, Watched>,
    listener: OwnedFd,
    connections: BTreeMap<Connection, OwnedFd>,
    next: Connection,
    /// Of the deadline, and the place where roots are made.
    folder: PathBuf,
}

/// The process of a VMM.
#[derive(Debug)]
struct Watched {
    pidfd: OwnedFd,
    /// Is told how it ends, where it was started by this helper.
    tells: Option<fs::File>,
}

impl Server {
    /// Listens, and takes up what an earlier helper has left.
    pub fn new(config: Config) -> io::Result<Self> {
        let cgroups = Arc::new(Tree::find(&config.cgroup)?);
        let folder = config.socket.parent().unwrap_or(Path::new("/")).join("helper");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder.parent().unwrap_or(&folder))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder.join("root"))?;
        let (running, watched) = found(&cgroups, config.uids);
        tracing::info!(running = running.len(), "taken up");
        let programs = config.programs.iter().map(|path| path.to_string_lossy().into()).collect();
        let lease = fs::read_to_string(folder.join(LEASE)).ok();
        let lease = lease.and_then(|text| text.trim().parse().ok());
        let table = Table::new(programs, config.uids, running, lease);
        let listener = bind_to(&config)?;
        let connections = BTreeMap::new();
        Ok(Self { config, cgroups, table, watched, listener, connections, next: 0, folder })
    }

    /// Serves for ever.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.turn()?;
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let expired = self.table.expired(now());
        for name in &expired {
            tracing::warn!(%name, "the node's lease has ended, vmm is killed");
            self.kill(name);
        }
        let (listens, talks, ends) = self.wait(self.patience(!expired.is_empty()))?;
        for name in ends {
            self.ended(&name);
        }
        for connection in talks {
            self.serve(connection);
        }
        if listens && let Err(error) = self.accept() {
            tracing::warn!(%error, "connection not taken");
        }
        Ok(())
    }

    /// How long nothing needs to be done.
    fn patience(&self, killing: bool) -> Option<Timespec> {
        let look = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
        if killing {
            return Some(look);
        }
        // That of a lease which has ended is spent already.
        let until = self.table.lease().filter(|&until| until > now())?;
        let left = Duration::from_nanos(until - now());
        Timespec::try_from(left).ok().or(Some(look))
    }

    /// Waits for something to do: a connection, requests, ends.
    fn wait(&self, most: Option<Timespec>) -> io::Result<(bool, Vec<Connection>, Vec<Name>)> {
        let connections = self.connections.values().map(AsFd::as_fd);
        let processes = self.watched.values().map(|watched| watched.pidfd.as_fd());
        let fds = std::iter::once(self.listener.as_fd()).chain(connections).chain(processes);
        let mut fds: Vec<PollFd<'_>> =
            fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut fds, most.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let listens = ready.next().unwrap_or(false);
        let mut ready_of = |count: usize| ready.by_ref().take(count).collect::<Vec<bool>>();
        let (talks, ends) = (ready_of(self.connections.len()), ready_of(self.watched.len()));
        let talks = self.connections.keys().zip(talks).filter(|(_, ready)| *ready);
        let ends = self.watched.keys().zip(ends).filter(|(_, ready)| *ready);
        Ok((listens, talks.map(|(it, _)| *it).collect(), ends.map(|(it, _)| it.clone()).collect()))
    }

    /// Takes a connection of the node agent's; others are hung up on.
    fn accept(&mut self) -> io::Result<()> {
        let connection = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let peer = sockopt::socket_peercred(&connection)?.uid.as_raw();
        if peer != self.config.agent.0 && peer != 0 {
            return Err(io::Error::other(format!("user {peer} is not the node agent's")));
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other("too many"));
        }
        self.next += 1;
        self.connections.insert(self.next, connection);
        Ok(())
    }

    fn serve(&mut self, connection: Connection) {
        let Some(socket) = self.connections.get(&connection) else { return };
        let (packet, fds) = match packet::receive(socket) {
            Ok(Some(request)) => request,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Ok(None) | Err(_) => return self.closed(connection),
        };
        let answer = match Request::parse(&packet, fds.len()) {
            Ok(request) => self.answer(connection, request, fds),
            Err(error) => refused(&error),
        };
        if let Answer::Refused { problem } = &answer {
            tracing::warn!(problem, "refused");
        }
        let sent = serde_json::to_vec(&answer).map_err(io::Error::other).and_then(|answer| {
            let socket = self.connections.get(&connection).ok_or(io::ErrorKind::NotConnected)?;
            packet::send(socket, &answer, &[])
        });
        if let Err(error) = sent {
            tracing::warn!(%error, "answer not sent");
            self.closed(connection);
        }
    }

    fn closed(&mut self, connection: Connection) {
        self.connections.remove(&connection);
        for name in self.table.bound_to(connection) {
            self.kill(&name);
        }
    }

    fn answer(&mut self, connection: Connection, request: Request, fds: Vec<OwnedFd>) -> Answer {
        let done = match request {
            Request::Spawn(spawn) => return self.spawn(connection, spawn, fds),
            Request::List {} => return Answer::Vmms { running: self.running() },
            Request::End { name, kill } => self.end(&name, kill),
            Request::Lease { until_ns } => self.renew(until_ns),
        };
        done.map_or_else(|problem| Answer::Refused { problem }, |()| Answer::Done)
    }

    fn spawn(&mut self, connection: Connection, spawn: Spawn, mut fds: Vec<OwnedFd>) -> Answer {
        // Who saw an earlier one end may start the next before this has looked.
        if self.watched.get(&spawn.name).is_some_and(|watched| has_ended(&watched.pidfd)) {
            self.ended(&spawn.name);
        }
        let uid = match self.table.admit(&spawn, now()) {
            Ok(uid) => uid,
            Err(refusal) => return refused(&refusal),
        };
        let inherited = spawn.inherit.and_then(|_| fds.pop());
        let (Some(tells), Some(log)) = (fds.pop(), fds.pop()) else {
            return refused(&"descriptors are missing");
        };
        let bound = spawn.bound.then_some(connection);
        let place = self.folder.join("root");
        let order =
            Order { spawn, files: fds, log, inherited, agent: self.config.agent, uid, place };
        let cgroup = self.cgroups.named(order.spawn.name.clone());
        match start(&order, &cgroup) {
            Ok((pid, pidfd)) => {
                let name = order.spawn.name;
                tracing::info!(%name, pid, uid, program = order.spawn.program, "vmm started");
                self.table.started(name.clone(), Vmm { pid, uid, bound });
                let tells = Some(fs::File::from(tells));
                self.watched.insert(name.clone(), Watched { pidfd, tells });
                let start_time = process::start_time(pid).unwrap_or_default();
                Answer::Started(Running { name, pid, start_time, uid, dir: order.spawn.dir })
            }
            Err(error) => {
                let _ = cgroup.remove();
                let problem = format!("the VM {} was not started: {error}", order.spawn.name);
                Answer::Refused { problem }
            }
        }
    }

    fn running(&self) -> Vec<Running> {
        let running = self.table.iter().filter_map(|(name, vmm)| {
            let start_time = process::start_time(vmm.pid)?;
            let dir = process::directory(vmm.pid).unwrap_or_default();
            let dir = dir.to_string_lossy().into_owned();
            Some(Running { name: name.clone(), pid: vmm.pid, start_time, uid: vmm.uid, dir })
        });
        running.collect()
    }

    fn end(&mut self, name: &Name, kill: bool) -> Result<(), String> {
        self.table.get(name).map_err(|refusal| refusal.to_string())?;
        if kill {
            self.kill(name);
            return Ok(());
        }
        let Some(watched) = self.watched.get(name) else { return Ok(()) };
        match pidfd_send_signal(&watched.pidfd, Signal::TERM) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn kill(&self, name: &Name) {
        if let Err(error) = self.cgroups.named(name.clone()).kill() {
            tracing::error!(%name, %error, "vmm's cgroup not killed");
        }
        // Also where it was not in it yet.
        if let Some(watched) = self.watched.get(name) {
            let _ = pidfd_send_signal(&watched.pidfd, Signal::KILL);
        }
    }

    fn renew(&mut self, until_ns: Option<u64>) -> Result<(), String> {
        self.table.renew(until_ns, now()).map_err(|refusal| refusal.to_string())?;
        // A helper that is started again must know it, so it counts only when it is kept.
        keep_lease(&self.folder, until_ns).map_err(|error| format!("not kept: {error}"))
    }

    /// One has ended: says how, and leaves nothing of it.
    fn ended(&mut self, name: &Name) {
        let Some(watched) = self.watched.remove(name) else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::PidFd(watched.pidfd.as_fd()), options).ok().flatten();
        let status = status.map_or(String::new(), |status| {
            match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => String::new(),
            }
        });
        if let Err(error) = self.cgroups.named(name.clone()).remove() {
            tracing::error!(%name, %error, "vmm's cgroup not removed");
        }
        self.table.ended(name);
        tracing::info!(%name, status, "vmm ended");
        if let Some(mut tells) = watched.tells {
            let _ = tells.write_all(status.as_bytes());
        }
    }
}

const LEASE: &str = "lease";

fn keep_lease(folder: &Path, until_ns: Option<u64>) -> io::Result<()> {
    let path = folder.join(LEASE);
    let Some(until) = until_ns else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let new = folder.join(".lease");
    fs::write(&new, until.to_string())?;
    fs::rename(new, path)
}

/// What runs in the cgroups of an earlier helper. What is none of its users' was about to start.
fn found(
    cgroups: &Arc<Tree>,
    (first, count): (u32, u32),
) -> (BTreeMap<Name, Vmm>, BTreeMap<Name, Watched>) {
    let (mut running, mut watched, mut uids) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    for name in cgroups.names() {
        let cgroup = cgroups.named(name.clone());
        let one = cgroup.processes().into_iter().find_map(|pid| {
            let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::NONBLOCK).ok()?;
            let uid = process::user(pid).filter(|uid| (first..first + count).contains(uid))?;
            uids.insert(uid).then_some((Vmm { pid, uid, bound: None }, pidfd))
        });
        match one {
            Some((vmm, pidfd)) => {
                running.insert(name.clone(), vmm);
                watched.insert(name, Watched { pidfd, tells: None });
            }
            None => {
                if let Err(error) = cgroup.remove() {
                    tracing::error!(%name, %error, "cgroup of no vmm not removed");
                }
            }
        }
    }
    (running, watched)
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut ready, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn start(order: &Order, cgroup: &Cgroup) -> io::Result<(i32, OwnedFd)> {
    let bounds = order.spawn.bounds;
    let limits = Limits {
        memory_bytes: bounds.memory_bytes,
        processes: bounds.processes,
        cpus: bounds.cpus,
    };
    // Of one that a killed helper has left.
    cgroup.remove()?;
    cgroup.make(&limits, 0)?;
    spawn::start(order, cgroup)
}

/// The socket, which is the node agent's alone.
fn bind_to(config: &Config) -> io::Result<OwnedFd> {
    let path = &config.socket;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&listener, &SocketAddrUnix::new(path.as_path())?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::chown(path, Some(config.agent.0), Some(config.agent.1))?;
    listen(&listener, 16)?;
    Ok(listener)
}

fn refused(problem: &dyn std::fmt::Display) -> Answer {
    Answer::Refused { problem: problem.to_string() }
}

/// Of `CLOCK_BOOTTIME`, in nanoseconds.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let part = |value: i64| u64::try_from(value).unwrap_or_default();
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}
