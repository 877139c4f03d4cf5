//! What the node agent and its helper say to each other: one packet each way per request, over a
//! `SOCK_SEQPACKET` socket, JSON with descriptors beside it.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Longest packet: the arguments of a VM with all of its disks are some 8 KiB.
pub const PACKET_MAX: usize = 64 << 10;
/// Most descriptors that come with a request: each disk, and what else a VM is made of.
pub const DESCRIPTORS_MAX: usize = 64;
/// Most arguments of a VMM.
const ARGUMENTS_MAX: usize = 512;
/// Longest path: as Linux has it.
const PATH_MAX: usize = 4096;
/// Descriptors that a VMM may have open; those that it is given are below.
const DESCRIPTOR_NUMBER_MAX: i32 = 1024;
/// Most CPUs and processes of a VMM, and its largest memory: beyond any machine.
const CPUS_MAX: u32 = 4096;
const PROCESSES_MAX: u64 = 16 << 10;
const BYTES_MAX: u64 = 1 << 50;
const PROCESSES_MIN: u64 = 16;
/// Farthest deadline: a node agent that wants to live longer says so again.
pub const LEASE_MAX_NS: u64 = 3600 * 1_000_000_000;

/// Which VM: made of its directory, the same after any restart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

const NAME_BYTES: usize = 10;

impl Name {
    /// The name of the VM in this directory, given without links.
    pub fn of(dir: &Path) -> Self {
        let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
        Self(digest[..NAME_BYTES].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// As it is a cgroup's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_name = text.len() == 2 * NAME_BYTES
            && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if is_name { Ok(Self(text)) } else { Err("a name is 20 hexadecimal digits") }
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// The verbs. There are no others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Starts a VMM. With it come, in this order: a descriptor for each of `files` (`O_PATH` is
    /// enough), its log, the end of a pipe that is told how it ends, and, where `inherit` is set,
    /// what it inherits.
    Spawn(Spawn),
    /// Ends a VMM.
    End {
        /// Which.
        name: Name,
        /// At once, with all of its cgroup; or else by `SIGTERM`, in order.
        kill: bool,
    },
    /// Lists the VMMs that run.
    List {},
    /// Has every VMM killed when this time of `CLOCK_BOOTTIME` has come, unless it is moved before.
    Lease {
        /// In nanoseconds; none: they may run for ever.
        until_ns: Option<u64>,
    },
}

/// How to start a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spawn {
    /// Of which VM.
    pub name: Name,
    /// One of the programs that the helper's configuration lists.
    pub program: String,
    /// Its arguments, without its name.
    pub args: Vec<String>,
    /// The files that there are for it, besides the system's.
    pub files: Vec<Given>,
    /// Which of them it runs in.
    pub dir: String,
    /// What it may use.
    pub bounds: Bounds,
    /// It has only the time that nobody else wants.
    #[serde(default)]
    pub background: bool,
    /// It ends with the connection that it was asked for on.
    #[serde(default)]
    pub bound: bool,
    /// Under which number it has the last descriptor.
    #[serde(default)]
    pub inherit: Option<i32>,
}

/// A file or folder that a VMM has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    /// Where it sees it.
    pub path: String,
    /// What it may do with it.
    pub access: Access,
}

/// What a VMM may do with what it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Read it.
    Read,
    /// Read and write the file.
    Write,
    /// Make and remove files and sockets in the folder.
    Own,
}

/// What a VMM may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// Memory, all of it.
    pub memory_bytes: u64,
    /// Private writable memory of its address space.
    pub data_bytes: u64,
    /// Size of any file that it writes.
    pub file_bytes: u64,
    /// Threads.
    pub processes: u64,
    /// CPUs at a time.
    pub cpus: u32,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The VMM runs.
    Started(Running),
    /// All that run.
    Vmms {
        /// In the order of their names.
        running: Vec<Running>,
    },
    /// It was done.
    Done,
    /// Nothing was done.
    Refused {
        /// Why.
        problem: String,
    },
}

/// A VMM that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Of which VM.
    pub name: Name,
    /// Its process.
    pub pid: i32,
    /// The start of that in clock ticks since boot, as in /proc.
    pub start_time: u64,
    /// Its user.
    pub uid: u32,
    /// The directory that it runs in, as it sees it; empty where that is not known.
    pub dir: String,
}

/// Says what is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is no request.
    #[error("not a request: {0}")]
    Syntax(String),
    /// It asks for what is never given.
    #[error("{0}")]
    Value(String),
    /// The descriptors are not those that the request speaks of.
    #[error("{given} descriptors came, and {wanted} are spoken of")]
    Descriptors {
        /// So many came.
        given: usize,
        /// So many should have.
        wanted: usize,
    },
}

impl Request {
    /// Reads and checks a request that came with so many descriptors.
    pub fn parse(packet: &[u8], descriptors: usize) -> Result<Self, Malformed> {
        let request: Self = serde_json::from_slice(packet)
            .map_err(|error| Malformed::Syntax(shown(&error.to_string())))?;
        let wanted = match &request {
            Self::Spawn(spawn) => {
                spawn.check()?;
                spawn.files.len() + 2 + usize::from(spawn.inherit.is_some())
            }
            Self::End { .. } | Self::List {} | Self::Lease { .. } => 0,
        };
        if descriptors != wanted {
            return Err(Malformed::Descriptors { given: descriptors, wanted });
        }
        Ok(request)
    }
}

impl Spawn {
    fn check(&self) -> Result<(), Malformed> {
        let refuse = |problem: String| Err(Malformed::Value(problem));
        if self.args.len() > ARGUMENTS_MAX {
            return refuse(format!("more than {ARGUMENTS_MAX} arguments"));
        }
        if self.args.iter().any(|arg| arg.contains('\0')) {
            return refuse("an argument holds a NUL".into());
        }
        for given in &self.files {
            check_path(&given.path)?;
        }
        let is_own = |given: &&Given| given.access == Access::Own && given.path == self.dir;
        if !self.files.iter().any(|given| is_own(&given)) {
            return refuse(format!("`{}` is not among its own folders", shown(&self.dir)));
        }
        if self.inherit.is_some_and(|number| !(3..DESCRIPTOR_NUMBER_MAX).contains(&number)) {
            return refuse(format!("a descriptor is inherited as 3 to {DESCRIPTOR_NUMBER_MAX}"));
        }
        self.bounds.check()
    }
}

impl Bounds {
    fn check(&self) -> Result<(), Malformed> {
        let bytes = [self.memory_bytes, self.data_bytes, self.file_bytes];
        let possible = bytes.iter().all(|&bytes| bytes > 0 && bytes <= BYTES_MAX)
            && (PROCESSES_MIN..=PROCESSES_MAX).contains(&self.processes)
            && (1..=CPUS_MAX).contains(&self.cpus);
        if possible { Ok(()) } else { Err(Malformed::Value(format!("no VM has {self:?}"))) }
    }
}

/// Folders of a VMM's root that are made by the helper, and by it alone.
const RESERVED: [&str; 3] = ["dev", "proc", "sys"];

/// Refuses what is not a plain absolute path.
fn check_path(path: &str) -> Result<(), Malformed> {
    let refuse = |problem: &str| Err(Malformed::Value(format!("`{}` {problem}", shown(path))));
    if path.len() > PATH_MAX || path.contains('\0') {
        return refuse("is no path");
    }
    let Some(names) = path.strip_prefix('/') else { return refuse("is not absolute") };
    let mut names = names.split('/');
    let first = names.clone().next().unwrap_or_default();
    if names.any(|name| matches!(name, "" | "." | "..")) {
        return refuse("is not in its plain form");
    }
    if RESERVED.contains(&first) {
        return refuse("is where the helper's own files are");
    }
    Ok(())
}

/// A text of the node agent's in a message: bounded, on one line.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spawn() -> serde_json::Value {
        json!({
            "verb": "spawn", "name": Name::of(Path::new("/a")), "program": "/usr/bin/vmm",
            "args": ["-x"], "dir": "/data/vm",
            "files": [{ "path": "/data/vm", "access": "own" }],
            "bounds": {
                "memory_bytes": 1 << 30, "data_bytes": 1 << 30, "file_bytes": 1 << 20,
                "processes": 64, "cpus": 2,
            },
        })
    }

    fn parse(request: &serde_json::Value, descriptors: usize) -> Result<Request, String> {
        Request::parse(&serde_json::to_vec(request).unwrap(), descriptors)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_request_is_what_it_was() {
        let request = parse(&spawn(), 3).unwrap();
        let again = serde_json::to_value(&request).unwrap();
        assert_eq!(parse(&again, 3).unwrap(), request);
        let inherits = {
            let mut it = spawn();
            it["inherit"] = json!(7);
            it
        };
        assert!(parse(&inherits, 4).is_ok());
        for other in [json!({"verb": "list"}), json!({"verb": "lease", "until_ns": null})] {
            assert!(parse(&other, 0).is_ok(), "{other}");
        }
    }

    #[test]
    fn what_is_outside_the_list_is_refused() {
        let name = Name::of(Path::new("/a"));
        for verb in ["exec", "", "Spawn", "chown", "mount"] {
            parse(&json!({"verb": verb, "name": name}), 0).unwrap_err();
        }
        parse(&json!({"verb": "list", "more": 1}), 0).unwrap_err();
        for name in ["", "../../x", "0123456789abcdef012G", "0123456789abcdef01234"] {
            let refused = parse(&json!({"verb": "end", "name": name, "kill": true}), 0);
            assert!(refused.unwrap_err().contains("20 hexadecimal"), "{name}");
        }
    }

    #[test]
    fn what_no_vm_has_is_refused() {
        let with = |change: fn(&mut serde_json::Value)| {
            let mut request = spawn();
            change(&mut request);
            let descriptors = request["files"].as_array().map_or(0, Vec::len) + 2;
            parse(&request, descriptors).unwrap_err()
        };
        for path in ["relative", "/", "/a/../b", "/a//b", "/proc/self", "/dev/kvm", "/a/."] {
            let mut request = spawn();
            request["files"][0]["path"] = json!(path);
            request["dir"] = json!(path);
            parse(&request, 3).unwrap_err();
        }
        assert!(with(|it| it["dir"] = json!("/other")).contains("own folders"));
        assert!(with(|it| it["files"][0]["access"] = json!("read")).contains("own folders"));
        assert!(with(|it| it["bounds"]["cpus"] = json!(0)).contains("no VM has"));
        assert!(with(|it| it["bounds"]["memory_bytes"] = json!(0)).contains("no VM has"));
        assert!(with(|it| it["args"] = json!(["a\0b"])).contains("NUL"));
        assert!(with(|it| it["inherit"] = json!(1)).contains("inherited"));
        assert!(parse(&spawn(), 2).unwrap_err().contains("2 descriptors came, and 3"));
        assert!(parse(&json!({"verb": "list"}), 1).is_err());
    }
}
