//! One embedded cluster in folders of its own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{self, Process};
use crate::run::{Finished, Running, wait_for};

/// Bound of anything that may boot a microVM on a busy machine without hardware virtualisation.
pub const BOOT: Duration = Duration::from_secs(180);
/// Bound of anything else.
pub const SHORT: Duration = Duration::from_secs(60);

/// Names the socket of a node's helper.
const HELPER: &str = "TOWLINE_HELPER";

/// A cluster, ended with all it started when dropped.
#[derive(Debug)]
pub struct Cluster {
    root: TempDir,
    bin: PathBuf,
    variables: Vec<(&'static str, &'static str)>,
    own_cache: bool,
    /// Name of the network namespace that everything runs in, if not the test's own.
    netns: Option<String>,
}

impl Cluster {
    /// Makes the folders; starts nothing. `Err` says what is missing on this machine.
    pub fn prepare() -> Result<Self, String> {
        Self::prepare_in(&bin_dir())
    }

    /// The same with the binaries of another folder.
    pub fn prepare_in(bin: &Path) -> Result<Self, String> {
        let bin = bin.to_owned();
        for name in
            ["tow", "towline-control-plane", "towline-node-agent", "towline-guest-agent-static"]
        {
            if !bin.join(name).is_file() {
                return Err(format!("`{}` is not built: make build", bin.join(name).display()));
            }
        }
        for tool in ["qemu-system-x86_64", "mksquashfs", "mke2fs"] {
            if !in_path(tool) {
                return Err(format!("`{tool}` is not installed: make test installs it"));
            }
        }
        // Short: Unix sockets live below it.
        let root = tempfile::Builder::new().prefix("tow-").tempdir().map_err(|e| e.to_string())?;
        for folder in ["run", "home", "data", "config", "state", "work"] {
            std::fs::create_dir(root.path().join(folder)).map_err(|e| e.to_string())?;
        }
        Ok(Self { root, bin, variables: Vec::new(), own_cache: false, netns: None })
    }

    /// The same with one more variable in its environment.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.variables.push((name, value));
        self
    }

    /// Allows sandboxes of this isolation. `process` needs root.
    #[must_use]
    pub fn allowing(self, isolation: &str) -> Self {
        if isolation == "process" { self.with("TOWLINE_ISOLATION_PROCESS", "1") } else { self }
    }

    /// Gives it an image store of its own, which begins empty; guest kernels stay the caller's.
    #[track_caller]
    pub fn with_own_images(mut self) -> Self {
        let shared = self.cache();
        let own = self.root().join("cache");
        std::fs::create_dir(&own).expect("a cache");
        for entry in std::fs::read_dir(shared).into_iter().flatten().flatten() {
            if entry.file_name() != "images" {
                let link = own.join(entry.file_name());
                std::os::unix::fs::symlink(entry.path(), link).expect("a link to the cache");
            }
        }
        self.own_cache = true;
        self
    }

    /// Makes one and brings it up.
    #[track_caller]
    pub fn up() -> Result<Self, String> {
        let cluster = Self::prepare()?;
        cluster.tow(["up", "--detach"]).finish(BOOT).ok();
        Ok(cluster)
    }

    /// Makes everything that is started from now on run in a network namespace (`ip netns`).
    pub fn within(mut self, netns: &str) -> Self {
        self.netns = Some(netns.to_owned());
        self
    }

    /// Writes what its user says of the node: what it offers, what sandboxes may reach beyond their
    /// policy. Read when the cluster comes up.
    pub fn configure_node(&self, text: &str) {
        let folder = self.root().join("config/towline");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("node-agent.toml"), text).expect("a file");
    }

    /// The temporary folder that holds everything.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The home that the cluster's user has.
    pub fn home(&self) -> PathBuf {
        self.root().join("home")
    }

    /// The folder of the binaries.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Guest kernels and layers: the caller's own cache, so that the kernel is downloaded once.
    pub fn cache(&self) -> PathBuf {
        if self.own_cache {
            return self.root().join("cache");
        }
        let from = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let base = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")));
        from("TOWLINE_CACHE")
            .unwrap_or_else(|| base.unwrap_or_else(std::env::temp_dir).join("towline"))
    }

    /// Makes a project folder, which is also where `tow` runs unless told otherwise.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.root().join("work").join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        std::fs::write(path.join("towline.toml"), "image = \"local\"\n").expect("towline.toml");
        path
    }

    /// A command with the cluster's environment.
    pub fn command(&self, program: impl AsRef<OsStr>, folder: &Path) -> Command {
        let mut command = match &self.netns {
            None => Command::new(program),
            Some(netns) => {
                let mut enter = Command::new("nsenter");
                enter.arg(format!("--net=/run/netns/{netns}")).arg("--").arg(program);
                enter
            }
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env_clear().current_dir(folder);
        command.env("PATH", path).env("HOME", self.home()).env("LANG", "C.UTF-8");
        command.env("TOWLINE_CACHE", self.cache());
        for (variable, name) in [
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_DATA_HOME", "data"),
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_STATE_HOME", "state"),
        ] {
            command.env(variable, self.root().join(name));
        }
        // Whoever may not start VMMs has them started.
        command.envs(std::env::var_os(HELPER).map(|helper| (HELPER, helper)));
        command.envs(self.variables.iter().copied());
        command
    }

    /// `tow` in a folder, not yet started.
    pub fn tow_command<A: AsRef<OsStr>>(
        &self,
        folder: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = self.command(self.bin.join("tow"), folder);
        command.args(arguments);
        command
    }

    /// Starts `tow` outside any project folder.
    #[track_caller]
    pub fn tow<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Running {
        Running::start(&mut self.tow_command(&self.root().join("work"), arguments), None)
    }

    /// Starts `tow` in a folder.
    #[track_caller]
    pub fn tow_in<A: AsRef<OsStr>>(
        &self,
        folder: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Running {
        Running::start(&mut self.tow_command(folder, arguments), None)
    }

    /// Runs `tow run -- sh -c SCRIPT` in a folder to its end.
    #[track_caller]
    pub fn sh(&self, folder: &Path, script: &str) -> Finished {
        self.tow_in(folder, ["run", "--", "sh", "-c", script]).finish(BOOT)
    }

    /// Every object that a `--json` verb prints.
    #[track_caller]
    pub fn json<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Vec<Value> {
        let done = self.tow(arguments).finish(SHORT).ok();
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        done.out().lines().map(parse).collect()
    }

    /// The sandbox of this name.
    #[track_caller]
    pub fn inspect(&self, name: &str) -> Value {
        self.json(["inspect", "--json", name]).remove(0)
    }

    /// All processes of this cluster.
    pub fn processes(&self) -> Vec<Process> {
        process::of(self.root())
    }

    /// Waits for the process whose command line has all of these words.
    #[track_caller]
    pub fn process(&self, words: &[&str]) -> Process {
        wait_for(&format!("a process {words:?}"), SHORT, || self.find(words))
    }

    /// The process whose command line has all of these words, if there is one now.
    pub fn find(&self, words: &[&str]) -> Option<Process> {
        let matches = |p: &Process| words.iter().all(|word| p.command_line.contains(word));
        self.processes().into_iter().find(matches)
    }

    /// What the servers and the daemon logged, for messages of failed tests.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for base in ["data", "state", "run"] {
            collect_logs(&self.root().join(base), &mut text);
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(clippy::print_stderr, reason = "a failed test shows what the servers said")]
            {
                eprintln!("{}", self.logs());
            }
        }
        // The supervisor first, so that it restarts nothing; then all the rest, a few rounds.
        for _ in 0..50 {
            let mut processes = self.processes();
            if processes.is_empty() {
                break;
            }
            processes.sort_by_key(|p| !p.command_line.contains(" up"));
            processes.iter().for_each(Process::kill);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn collect_logs(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect_logs(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let bytes = std::fs::read(&path).unwrap_or_default();
            let tail = &bytes[bytes.len().saturating_sub(6000)..];
            *text += &format!("--- {}\n{}\n", path.display(), String::from_utf8_lossy(tail));
        }
    }
}

/// `TOWLINE_BIN_DIR`, or the build folder that this test was built in.
pub fn bin_dir() -> PathBuf {
    if let Some(folder) = std::env::var_os("TOWLINE_BIN_DIR") {
        return folder.into();
    }
    let test = std::env::current_exe().expect("the test's own path");
    let folder = test.parent().expect("a folder");
    if folder.ends_with("deps") { folder.parent().expect("a folder").into() } else { folder.into() }
}

/// Whether a program is found, also where only root's PATH looks.
pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).any(|folder| folder.join(program).is_file())
}
