//! Finds and ends the processes of one cluster: those whose command line or environment names its
//! folder, or that run in it. Ends nothing else. What a helper has started (`TOWLINE_HELPER`) is
//! another user's, so it is asked for those.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use towline_node_helper::client::Helper;
use towline_node_helper::protocol::Name;

/// One process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its arguments, joined by spaces.
    pub command_line: String,
    started: Vec<u8>,
    /// As its helper calls it.
    name: Option<Name>,
}

/// Returns the processes that belong to `folder`.
pub fn of(folder: &Path) -> Vec<Process> {
    let dir = folder;
    let folder = folder.as_os_str().as_encoded_bytes();
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<i32>() else { continue };
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        let (command, environment) = (read("cmdline"), read("environ"));
        let works_in = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        let names_it = |bytes: &[u8]| bytes.windows(folder.len()).any(|part| part == folder);
        let belongs = names_it(&command)
            || names_it(&environment)
            || names_it(works_in.as_os_str().as_encoded_bytes());
        if name != own && !command.is_empty() && belongs {
            found.push(Process {
                pid,
                command_line: text(&command),
                started: start_time(pid),
                name: None,
            });
        }
    }
    found.extend(of_helper(dir));
    found
}

/// Those that the helper runs in a folder beneath this one.
fn of_helper(folder: &Path) -> Vec<Process> {
    let running = helper().map(|helper| helper.list().unwrap_or_default());
    let within = running.into_iter().flatten().filter(|it| Path::new(&it.dir).starts_with(folder));
    within
        .map(|it| {
            let command = std::fs::read(format!("/proc/{}/cmdline", it.pid)).unwrap_or_default();
            let (command_line, started) = (text(&command), start_time(it.pid));
            Process { pid: it.pid, command_line, started, name: Some(it.name) }
        })
        .collect()
}

fn helper() -> Option<Helper> {
    std::env::var_os("TOWLINE_HELPER").map(Helper::new)
}

fn text(command: &[u8]) -> String {
    String::from_utf8_lossy(command).replace('\0', " ")
}

impl Process {
    /// Sends a signal unless the process has gone and its id names another one.
    pub fn signal(&self, signal: Signal) {
        if !self.started.is_empty() && start_time(self.pid) == self.started {
            // It may end between the check and the signal: nothing is lost then.
            let _gone = Pid::from_raw(self.pid).map(|pid| kill_process(pid, signal));
        }
    }

    /// kill -9.
    pub fn kill(&self) {
        match (&self.name, helper()) {
            (Some(name), Some(helper)) => {
                let _gone = helper.end(name.clone(), true);
            }
            _ => self.signal(Signal::KILL),
        }
    }

    /// Whether it is still there (a zombie is not).
    pub fn alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let zombie = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'));
        !zombie && !self.started.is_empty() && start_time(self.pid) == self.started
    }
}

/// Field 22 of /proc/PID/stat; empty when there is no such process.
fn start_time(pid: i32) -> Vec<u8> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let rest = stat.rsplit(") ").next().unwrap_or_default();
    rest.split(' ').nth(19).unwrap_or_default().as_bytes().to_vec()
}
