//! Everything of a cluster that a sandbox could leave behind, as a set of lines that two moments are
//! compared by: processes, mounts, loop devices, cgroups, files, sockets, reservations.
//!
//! Logs, the write-ahead log and what people typed are not a sandbox's; they are left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::Cluster;

/// What is there at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

/// Folders that grow by themselves: the member's log, and what `tow` and the servers log.
const GROWING: &[&str] = &["towline/member", "towline/log"];

impl Leftovers {
    /// Looks everywhere. `ids` are the ids that sandboxes had: names of cgroups hold them.
    pub fn look(cluster: &Cluster, ids: &BTreeSet<String>) -> Self {
        let mut found = BTreeSet::new();
        let root = cluster.root().display().to_string();
        for process in cluster.processes() {
            found.insert(format!("process {}", process.command_line.trim()));
        }
        for line in read("/proc/self/mountinfo").lines().filter(|line| line.contains(&root)) {
            found.insert(format!("mount {line}"));
        }
        for device in entries(Path::new("/sys/block")) {
            let file = read(device.join("loop/backing_file"));
            if file.contains(&root) {
                found.insert(format!("loop device {} of {}", device.display(), file.trim()));
            }
        }
        let names = ids.iter().flat_map(|id| [id.clone(), cgroup_of(cluster, id)]).collect();
        cgroups(Path::new("/sys/fs/cgroup"), &names, 6, &mut found);
        for base in ["data", "state", "run", "config"] {
            files(&cluster.root().join(base), cluster.root(), &mut found);
        }
        for node in cluster.json(["node", "ls", "--json"]) {
            found.insert(format!("node {} has reserved {}", node["name"], node["reserved"]));
        }
        Self(found)
    }

    /// Waits until all is as it was; panics with what is there more or less.
    #[track_caller]
    pub fn wait_for_no_more(&self, cluster: &Cluster, ids: &BTreeSet<String>, bound: Duration) {
        let deadline = Instant::now() + bound;
        loop {
            let now = Self::look(cluster, ids);
            if now == *self {
                return;
            }
            if Instant::now() > deadline {
                let more: Vec<_> = now.0.difference(&self.0).collect();
                let gone: Vec<_> = self.0.difference(&now.0).collect();
                panic!("left behind: {more:#?}\nand gone: {gone:#?}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn entries(folder: &Path) -> Vec<std::path::PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Name of a `process` sandbox's cgroups: of its folder on the node.
fn cgroup_of(cluster: &Cluster, id: &str) -> String {
    let folder = cluster.root().join("data/towline/node/sandboxes").join(id).join("vm");
    let digest = Sha256::digest(folder.as_os_str().as_encoded_bytes());
    digest[..10].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn cgroups(folder: &Path, names: &BTreeSet<String>, depth: u32, found: &mut BTreeSet<String>) {
    for path in entries(folder).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        if name.is_some_and(|name| names.iter().any(|known| name.contains(known.as_str()))) {
            found.insert(format!("cgroup {}", path.display()));
        }
        if depth > 0 {
            cgroups(&path, names, depth - 1, found);
        }
    }
}

fn files(folder: &Path, root: &Path, found: &mut BTreeSet<String>) {
    for path in entries(folder) {
        let shown = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        if GROWING.iter().any(|grows| shown.ends_with(grows)) || shown.ends_with(".log") {
            continue;
        }
        found.insert(format!("file {shown}"));
        if path.is_dir() && !path.is_symlink() {
            files(&path, root, found);
        }
    }
}
