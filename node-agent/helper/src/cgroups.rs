//! Cgroups of sandboxes and of VMMs: one each, named by its folder, in every hierarchy that this
//! machine has. Version 2 where its controllers are; on machines that bind them to version 1, limits
//! are set there and version 2 is still what a sandbox's own tree is made in.
//!
//! Everything is idempotent and knows no state: a name is all that cleaning needs.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::protocol::Name;

/// The period of CPU quotas.
const PERIOD_US: u64 = 100_000;
/// How long killed processes may take to leave a cgroup.
const LEAVE_MAX: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(5);
/// How long processes may take to halt: one that waits for a disk does not before that has answered.
const FREEZE_MAX: Duration = Duration::from_secs(20);

/// What the processes of a cgroup may use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Memory.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub processes: u64,
    /// CPUs at a time.
    pub cpus: u32,
}

/// One hierarchy of cgroups.
trait Hierarchy: fmt::Debug + Send + Sync {
    /// Makes the cgroup and sets what it limits. It belongs to `owner` where it may have a tree.
    fn make(&self, name: &str, limits: &Limits, owner: u32) -> io::Result<()>;
    /// Where all of them are.
    fn base(&self) -> &Path;
    /// Where a cgroup is.
    fn path(&self, name: &str) -> PathBuf {
        self.base().join(name)
    }
    /// What is limited here.
    fn limits(&self) -> Vec<&str>;
    /// Whether a sandbox can limit its own commands here.
    fn is_the_sandboxs(&self) -> bool;
    /// Whether its processes can be halted here.
    fn freezes(&self) -> bool {
        false
    }
}

/// Version 2.
#[derive(Debug)]
struct Unified {
    base: PathBuf,
    controllers: Vec<&'static str>,
}

/// One controller of version 1.
#[derive(Debug)]
struct Controller {
    base: PathBuf,
    kind: &'static str,
}

/// The hierarchies of this machine.
#[derive(Debug)]
pub struct Tree {
    hierarchies: Vec<Box<dyn Hierarchy>>,
}

/// One's cgroups: the same in each hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    tree: Arc<Tree>,
    name: Name,
}

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

impl Tree {
    /// Looks at what is mounted, and makes the folder of all cgroups in each hierarchy. An error of
    /// kind `Unsupported` says that this machine has no cgroups to use.
    pub fn find(folder: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut hierarchies: Vec<Box<dyn Hierarchy>> = Vec::new();
        let mut unified = None;
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_, place, kind, options, ..] = fields[..] else { continue };
            match kind {
                "cgroup2" if unified.is_none() => {
                    let base = Path::new(place).join(folder);
                    make_folder(&base)?;
                    unified = Some(Unified { controllers: enable(Path::new(place), &base), base });
                }
                "cgroup" => {
                    let here = CONTROLLERS.iter().find(|c| options.split(',').any(|o| o == **c));
                    let Some(kind) = here else { continue };
                    let base = Path::new(place).join(folder);
                    make_folder(&base)?;
                    hierarchies.push(Box::new(Controller { base, kind }));
                }
                _ => {}
            }
        }
        let Some(unified) = unified else {
            let problem = "no cgroup2 file system is mounted here (mount -t cgroup2 cgroup2 \
                           /sys/fs/cgroup/unified)";
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        };
        hierarchies.push(Box::new(unified));
        Ok(Self { hierarchies })
    }

    fn iter(&self) -> impl Iterator<Item = &dyn Hierarchy> {
        self.hierarchies.iter().map(|hierarchy| &**hierarchy)
    }

    /// Removes cgroups in which nothing runs: those of sandboxes whose folders have been removed.
    pub fn sweep(&self) {
        let bases = self.iter().map(|hierarchy| hierarchy.base().to_owned());
        for group in bases.flat_map(|base| fs::read_dir(base).into_iter().flatten().flatten()) {
            let path = group.path();
            if path.is_dir() && is_empty(&path) {
                let _ = remove_tree(&path);
            }
        }
    }

    /// Whether this is limited somewhere.
    pub fn limits(&self, what: &str) -> bool {
        self.iter().any(|hierarchy| hierarchy.limits().contains(&what))
    }

    /// Whether a sandbox can limit the memory of each of its commands.
    pub fn limits_within(&self) -> bool {
        self.iter().any(|h| h.is_the_sandboxs() && h.limits().contains(&"memory"))
    }

    /// The limits that no hierarchy sets.
    pub fn missing(&self) -> Vec<String> {
        let missing = CONTROLLERS.iter().filter(|what| !self.limits(what));
        missing
            .map(|what| format!("cgroups: the `{what}` controller is not here: no such limit"))
            .collect()
    }

    /// The cgroups of what runs in this folder.
    pub fn of(self: &Arc<Self>, dir: &Path) -> Cgroup {
        self.named(Name::of(dir))
    }

    /// The cgroups of this name.
    pub fn named(self: &Arc<Self>, name: Name) -> Cgroup {
        Cgroup { tree: Arc::clone(self), name }
    }

    /// The names of all cgroups here.
    pub fn names(&self) -> Vec<Name> {
        let unified = self.iter().find(|hierarchy| hierarchy.freezes());
        let base = unified.map(|hierarchy| hierarchy.base().to_owned());
        let entries = base.and_then(|base| fs::read_dir(base).ok()).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| Name::try_from(entry.file_name().into_string().ok()?).ok())
            .collect()
    }
}

impl Cgroup {
    /// Makes it, within these limits; where it may have a tree of its own, it is this user's.
    pub fn make(&self, limits: &Limits, owner: u32) -> io::Result<()> {
        let make = |hierarchy: &dyn Hierarchy| {
            hierarchy.make(self.name.as_str(), limits, owner).map_err(|error| {
                let path = hierarchy.path(self.name.as_str());
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            })
        };
        self.tree.iter().try_for_each(make)
    }

    /// Puts a process into it.
    pub fn enter(&self, pid: i32) -> io::Result<()> {
        let enter = |h: &dyn Hierarchy| {
            fs::write(h.path(self.name.as_str()).join("cgroup.procs"), pid.to_string())
        };
        self.tree.iter().try_for_each(enter)
    }

    /// Halts all of its processes, or lets them go on; blocks until they are.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        let hierarchy = self.tree.iter().find(|hierarchy| hierarchy.freezes());
        let path = hierarchy.map(|hierarchy| hierarchy.path(self.name.as_str()));
        let path = path.ok_or_else(|| io::Error::other("no cgroup here can be frozen"))?;
        let wanted = i32::from(frozen).to_string();
        fs::write(path.join("cgroup.freeze"), &wanted)?;
        let until = Instant::now() + FREEZE_MAX;
        let state = format!("frozen {wanted}");
        while !fs::read_to_string(path.join("cgroup.events"))?.lines().any(|line| line == state) {
            if Instant::now() >= until {
                let _ = fs::write(path.join("cgroup.freeze"), "0");
                let bound = FREEZE_MAX.as_secs();
                let what = format!("a process of it did not halt within {bound} s");
                return Err(io::Error::other(what));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The processes in it.
    pub fn processes(&self) -> Vec<i32> {
        let unified = self.tree.iter().find(|hierarchy| hierarchy.freezes());
        let path = unified.map(|h| h.path(self.name.as_str()).join("cgroup.procs"));
        let text = path.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills all that is in it, at once.
    pub fn kill(&self) -> io::Result<()> {
        let unified = self.tree.iter().find(|hierarchy| hierarchy.freezes());
        let path = unified.map(|hierarchy| hierarchy.path(self.name.as_str()));
        let path = path.ok_or_else(|| io::Error::other("no cgroup here can be killed"))?;
        fs::write(path.join("cgroup.kill"), "1")
    }

    /// Kills what is left in it and removes it. That there is nothing is fine.
    pub fn remove(&self) -> io::Result<()> {
        let until = Instant::now() + LEAVE_MAX;
        for hierarchy in self.tree.iter() {
            let path = hierarchy.path(self.name.as_str());
            let _ = fs::write(path.join("cgroup.kill"), "1");
            loop {
                match remove_tree(&path) {
                    // Processes that were killed have not all gone yet.
                    Err(error)
                        if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until =>
                    {
                        std::thread::sleep(LOOK);
                    }
                    result => break result?,
                }
            }
        }
        Ok(())
    }
}

impl Hierarchy for Unified {
    fn make(&self, name: &str, limits: &Limits, owner: u32) -> io::Result<()> {
        let path = self.path(name);
        make_folder(&path)?;
        for controller in &self.controllers {
            match *controller {
                "memory" => {
                    fs::write(path.join("memory.max"), limits.memory_bytes.to_string())?;
                    // Not there on a machine without swap.
                    let _ = fs::write(path.join("memory.swap.max"), "0");
                }
                "pids" => fs::write(path.join("pids.max"), limits.processes.to_string())?,
                _ => {
                    let quota = u64::from(limits.cpus) * PERIOD_US;
                    fs::write(path.join("cpu.max"), format!("{quota} {PERIOD_US}"))?;
                }
            }
        }
        // The sandbox makes a tree of its own in it; its limits stay ours.
        for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            std::os::unix::fs::chown(path.join(file), Some(owner), Some(owner))?;
        }
        Ok(())
    }

    fn base(&self) -> &Path {
        &self.base
    }

    fn limits(&self) -> Vec<&str> {
        self.controllers.clone()
    }

    fn is_the_sandboxs(&self) -> bool {
        true
    }

    fn freezes(&self) -> bool {
        true
    }
}

impl Hierarchy for Controller {
    fn make(&self, name: &str, limits: &Limits, _: u32) -> io::Result<()> {
        let path = self.path(name);
        make_folder(&path)?;
        match self.kind {
            "memory" => {
                let bytes = limits.memory_bytes.to_string();
                fs::write(path.join("memory.limit_in_bytes"), &bytes)?;
                // Not there where swap is not accounted for.
                let _ = fs::write(path.join("memory.memsw.limit_in_bytes"), &bytes);
                Ok(())
            }
            "pids" => fs::write(path.join("pids.max"), limits.processes.to_string()),
            _ => {
                let quota = u64::from(limits.cpus) * PERIOD_US;
                fs::write(path.join("cpu.cfs_period_us"), PERIOD_US.to_string())?;
                fs::write(path.join("cpu.cfs_quota_us"), quota.to_string())
            }
        }
    }

    fn base(&self) -> &Path {
        &self.base
    }

    fn limits(&self) -> Vec<&str> {
        vec![self.kind]
    }

    fn is_the_sandboxs(&self) -> bool {
        false
    }
}

/// Lets cgroups beneath ours have the controllers that are here; returns which.
fn enable(root: &Path, base: &Path) -> Vec<&'static str> {
    let here = |what: &&&str| {
        let let_have = |path: &&Path| {
            fs::write(path.join("cgroup.subtree_control"), format!("+{what}")).is_ok()
        };
        [root, base].iter().all(let_have)
    };
    CONTROLLERS.iter().filter(here).copied().collect()
}

fn make_folder(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Whether no process is in it, or beneath it where there may be anything beneath.
fn is_empty(path: &Path) -> bool {
    match fs::read_to_string(path.join("cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "populated 0"),
        Err(_) => fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|procs| procs.is_empty()),
    }
}

/// Removes a cgroup and those beneath it: a cgroup's files go with it.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
