//! The node agent's configuration: one TOML file, checked whole before anything is done.
//!
//! An unknown key is an error that names the nearest known one, so that a typing mistake never
//! becomes a default.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use towline_link::identity::check_name;

use crate::egress::rules::{self, OperatorRules, RuleText};
use crate::hypervisor::DiskLimits;
use crate::hypervisor::cloud_hypervisor;
use crate::hypervisor::qemu::AccelChoice;

/// Names the static guest agent when the file does not.
pub const GUEST_AGENT_VARIABLE: &str = "TOWLINE_GUEST_AGENT";
/// Names the socket of the node's helper when the file does not.
pub const HELPER_VARIABLE: &str = "TOWLINE_HELPER";
/// Leases that can be kept: a restart of the node agent must fit in.
const LEASE_S: std::ops::RangeInclusive<u64> = 10..=3600;
/// Most guests of one image and shape that wait.
const READY_GUESTS_MAX: usize = 64;
/// Least limits of a VM's disks.
const DISK_MIB_S_MIN: u32 = 4;
const DISK_IOPS_MIN: u32 = 100;
/// The static guest agent's file beside this program.
const GUEST_AGENT_FILE: &str = "towline-guest-agent-static";

const KEYS: &[&str] = &[
    "name",
    "data_dir",
    "cache_dir",
    "control_plane",
    "token_file",
    "link_listen",
    "link_advertise",
    "embedded",
    "guest_agent",
    "memory_mib",
    "cpus",
    "disk_mib",
    "accel",
    "vmm",
    "cloud_hypervisor",
    "landlock",
    "helper",
    "lease_s",
    "disk_mib_s",
    "disk_iops",
    "guest_console",
    "warm",
    "ready_guests",
    "private_registries",
    "egress",
    "isolation_process",
];
/// Keys of `[egress]`.
const EGRESS_KEYS: &[&str] = &["allow"];

/// Says why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read `{path}`")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or a value has the wrong type.
    #[error("`{path}` cannot be used: {reason}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A key that means nothing.
    #[error("`{path}` has the unknown key `{key}`; did you mean `{nearest}`?")]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
    /// A value that makes no sense.
    #[error("`{path}`: {reason}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// What is wrong with which.
        reason: String,
    },
}

/// What the file says, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name, as in its certificate.
    pub name: String,
    /// Sandboxes, identity and lock.
    pub data_dir: PathBuf,
    /// Kernels, initramfs, layers, disk templates: all of it can be made again.
    pub cache_dir: PathBuf,
    /// `host:port` of members.
    pub control_plane: Vec<String>,
    /// Where a join token lies, for when there is no valid certificate.
    pub token_file: Option<PathBuf>,
    /// Where laptops reach this node by QUIC.
    pub link_listen: SocketAddr,
    /// What laptops are told instead of that, `host:port` or `host` (with the port listened on).
    pub link_advertise: Option<String>,
    /// It shares the laptop's machine.
    pub embedded: bool,
    /// The static guest agent.
    pub guest_agent: PathBuf,
    /// Memory for sandboxes, instead of a share of the machine's.
    pub memory_mib: Option<u64>,
    /// CPUs to promise, instead of the machine's times the oversubscription.
    pub cpus: Option<u32>,
    /// Disk to promise, instead of what is free.
    pub disk_mib: Option<u64>,
    /// KVM or emulation.
    pub accel: AccelChoice,
    /// What runs VMs.
    pub vmm: VmmChoice,
    /// The Cloud Hypervisor to use.
    pub cloud_hypervisor: Option<PathBuf>,
    /// Runs VMs only where the kernel keeps a VMM to its own files whole (landlock's ABI 3).
    pub landlock_required: bool,
    /// Where the node's helper listens, which starts VMMs. Without one they run as this user.
    pub helper: Option<PathBuf>,
    /// Has the helper kill all VMs when the node agent has been gone for so long; never by default.
    pub lease: Option<Duration>,
    /// What the disks of one VM may move.
    pub disk_limits: DiskLimits,
    /// Keeps each guest's console in a file, for debugging.
    pub guest_console: bool,
    /// Keeps guests that have booted as templates, and starts from them (the default).
    pub warm: bool,
    /// Guests that wait, restored and with disks, for each of the last images and shapes.
    pub ready_guests: usize,
    /// Registries on private addresses that images may be pulled from, as `host` or `host:port`.
    /// An embedded node pulls from any.
    pub private_registries: Vec<String>,
    /// What sandboxes may reach beyond their policy.
    pub egress: OperatorRules,
    /// Allows `--isolation process` here: sandboxes that share this machine's kernel.
    pub isolation_process: bool,
}

/// How `vmm` is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VmmChoice {
    /// Cloud Hypervisor where it is installed and a guest was seen to run under it, else QEMU.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor or nothing.
    CloudHypervisor,
}

#[derive(Default, Deserialize)]
struct EgressFile {
    #[serde(default)]
    allow: Vec<RuleText>,
}

#[derive(Deserialize)]
struct File {
    name: Option<String>,
    data_dir: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    #[serde(default)]
    control_plane: Vec<String>,
    token_file: Option<PathBuf>,
    link_listen: Option<String>,
    link_advertise: Option<String>,
    #[serde(default)]
    embedded: bool,
    guest_agent: Option<PathBuf>,
    memory_mib: Option<u64>,
    cpus: Option<u32>,
    disk_mib: Option<u64>,
    accel: Option<String>,
    vmm: Option<String>,
    cloud_hypervisor: Option<PathBuf>,
    landlock: Option<String>,
    helper: Option<PathBuf>,
    lease_s: Option<u64>,
    disk_mib_s: Option<u32>,
    disk_iops: Option<u32>,
    #[serde(default)]
    guest_console: bool,
    warm: Option<bool>,
    #[serde(default)]
    ready_guests: usize,
    #[serde(default)]
    private_registries: Vec<String>,
    #[serde(default)]
    egress: EgressFile,
    #[serde(default)]
    isolation_process: bool,
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let parse = |reason: String| ConfigError::Parse { path: path.into(), reason };
        let value = |reason: String| ConfigError::Value { path: path.into(), reason };
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| parse(e.to_string()))?;
        if let Some((key, nearest)) = unknown_key(&table) {
            return Err(ConfigError::UnknownKey { path: path.into(), key, nearest });
        }
        let file: File = table.try_into().map_err(|e: toml::de::Error| parse(e.to_string()))?;
        let ready_guests = ready_guests(&file).map_err(value)?;
        let missing = |key: &str| value(format!("`{key}` is missing"));
        let name = file.name.ok_or_else(|| missing("name"))?;
        check_name(&name).map_err(|error| value(error.to_string()))?;
        if file.control_plane.is_empty() {
            return Err(value("`control_plane` must name at least one member as host:port".into()));
        }
        let listen = file.link_listen.as_deref().unwrap_or("127.0.0.1:0");
        Ok(Self {
            name,
            data_dir: file.data_dir.ok_or_else(|| missing("data_dir"))?,
            cache_dir: file.cache_dir.or_else(default_cache).ok_or_else(|| missing("cache_dir"))?,
            control_plane: file.control_plane,
            token_file: file.token_file,
            link_listen: listen.parse().map_err(|_| {
                value(format!("`link_listen` is `{listen}`; an address and port is expected"))
            })?,
            link_advertise: file.link_advertise,
            embedded: file.embedded,
            guest_agent: file.guest_agent.unwrap_or_else(default_guest_agent),
            memory_mib: file.memory_mib,
            cpus: file.cpus,
            disk_mib: file.disk_mib,
            accel: match file.accel.as_deref() {
                None | Some("auto") => AccelChoice::Auto,
                Some("kvm") => AccelChoice::Kvm,
                Some("tcg") => AccelChoice::Tcg,
                Some(other) => {
                    return Err(value(format!(
                        "`accel` is `{other}`; auto, kvm or tcg is expected"
                    )));
                }
            },
            vmm: match file.vmm.as_deref() {
                None | Some("auto") => VmmChoice::Auto,
                Some("qemu") => VmmChoice::Qemu,
                Some("cloud-hypervisor") => VmmChoice::CloudHypervisor,
                Some(other) => {
                    return Err(value(format!(
                        "`vmm` is `{other}`; auto, qemu or cloud-hypervisor is expected"
                    )));
                }
            },
            cloud_hypervisor: file.cloud_hypervisor.or_else(cloud_hypervisor::find_program),
            landlock_required: match file.landlock.as_deref() {
                None | Some("auto") => false,
                Some("required") => true,
                Some(other) => {
                    return Err(value(format!(
                        "`landlock` is `{other}`; auto or required is expected"
                    )));
                }
            },
            lease: lease(file.lease_s, file.helper.as_deref()).map_err(value)?,
            helper: file.helper.or_else(helper_of_environment),
            disk_limits: DiskLimits {
                mib_s: at_least("disk_mib_s", file.disk_mib_s, DISK_MIB_S_MIN).map_err(value)?,
                iops: at_least("disk_iops", file.disk_iops, DISK_IOPS_MIN).map_err(value)?,
            },
            guest_console: file.guest_console,
            warm: file.warm.unwrap_or(true),
            ready_guests,
            private_registries: file.private_registries,
            egress: OperatorRules::parse(file.egress.allow).map_err(value)?,
            isolation_process: file.isolation_process,
        })
    }
}

fn at_least(key: &str, given: Option<u32>, min: u32) -> Result<Option<u32>, String> {
    match given {
        Some(given) if given < min => {
            Err(format!("`{key}` is {given}; with less than {min} a guest may not boot in time"))
        }
        given => Ok(given),
    }
}

fn ready_guests(file: &File) -> Result<usize, String> {
    match file.ready_guests {
        0 => Ok(0),
        _ if file.warm == Some(false) => {
            Err("`ready_guests` needs templates; leave `warm = false` away".into())
        }
        _ if file.guest_console => {
            Err("a guest that waits has no console; leave `ready_guests` or `guest_console` away"
                .into())
        }
        given @ 1..=READY_GUESTS_MAX => Ok(given),
        given => Err(format!("`ready_guests` is {given}; at most {READY_GUESTS_MAX} is expected")),
    }
}

/// A helper that the environment names, for a cluster that `tow up` configures.
fn helper_of_environment() -> Option<PathBuf> {
    Some(std::env::var_os(HELPER_VARIABLE).filter(|path| !path.is_empty())?.into())
}

fn lease(seconds: Option<u64>, helper: Option<&Path>) -> Result<Option<Duration>, String> {
    match (seconds, helper) {
        (None, _) => Ok(None),
        (Some(_), None) => Err("`lease_s` needs a `helper`, which alone can outlive this".into()),
        (Some(seconds), Some(_)) if LEASE_S.contains(&seconds) => {
            Ok(Some(Duration::from_secs(seconds)))
        }
        (Some(seconds), Some(_)) => Err(format!(
            "`lease_s` is {seconds}; {} to {} is expected",
            LEASE_S.start(),
            LEASE_S.end()
        )),
    }
}

/// The user's own cache of kernels and layers: `$XDG_CACHE_HOME/towline`, or `~/.cache/towline`.
pub fn default_cache() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty());
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    Some(cache.map(PathBuf::from).or_else(home)?.join("towline"))
}

fn default_guest_agent() -> PathBuf {
    if let Some(path) = std::env::var_os(GUEST_AGENT_VARIABLE).filter(|path| !path.is_empty()) {
        return path.into();
    }
    let program = std::env::current_exe().unwrap_or_default();
    program.with_file_name(GUEST_AGENT_FILE)
}

/// The first key that means nothing, and the known one that is most like it.
fn unknown_key(table: &toml::Table) -> Option<(String, &'static str)> {
    let unknown = |table: &toml::Table, known: &'static [&'static str]| {
        let key = table.keys().find(|key| !known.contains(&key.as_str()))?;
        Some((key.clone(), nearest(key, known)))
    };
    let egress = table.get("egress").and_then(toml::Value::as_table);
    let allow = egress.and_then(|egress| egress.get("allow")).and_then(toml::Value::as_array);
    let rules = allow.into_iter().flatten().filter_map(toml::Value::as_table);
    unknown(table, KEYS)
        .or_else(|| unknown(egress?, EGRESS_KEYS))
        .or_else(|| rules.into_iter().find_map(|rule| unknown(rule, rules::KEYS)))
}

fn nearest(key: &str, known: &'static [&'static str]) -> &'static str {
    known.iter().min_by_key(|known| distance(key, known)).expect("there are keys")
}

/// Edits that make one text of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "embedded"
        data_dir = "/d"
        cache_dir = "/c"
        control_plane = ["127.0.0.1:1"]
    "#;

    fn error(more: &str) -> String {
        Config::parse(Path::new("f"), &format!("{GOOD}{more}")).unwrap_err().to_string()
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let config = Config::parse(Path::new("f"), GOOD).unwrap();
        assert_eq!(config.link_listen.to_string(), "127.0.0.1:0");
        assert_eq!(config.accel, AccelChoice::Auto);
        assert!(!config.embedded && !config.landlock_required);
        assert!(!config.isolation_process, "never without being asked");
    }

    #[test]
    fn mistakes_are_named() {
        assert!(error("memry_mib = 1").contains("did you mean `memory_mib`?"));
        assert!(error("accel = \"xen\"").contains("auto, kvm or tcg"));
        assert!(error("landlock = \"yes\"").contains("auto or required"));
        assert!(error("vmm = \"xen\"").contains("auto, qemu or cloud-hypervisor"));
        assert!(error("lease_s = 20").contains("needs a `helper`"));
        assert!(error("helper = '/h'\nlease_s = 1").contains("10 to 3600"));
        assert!(error("disk_mib_s = 1").contains("with less than 4 a guest"));
        assert!(error("disk_iops = 0").contains("with less than 100 a guest"));
        assert!(error("link_listen = \"here\"").contains("`link_listen` is `here`"));
        assert!(error("cpus = \"two\"").contains("cpus"));
        assert!(error("egress.alow = []").contains("did you mean `allow`?"));
        let rule = "[[egress.allow]]\nrange = '10.0.0.0/8'\n";
        assert!(error(&format!("{rule}port = [1]")).contains("did you mean `ports`?"));
        assert!(error(&format!("{rule}name = 'a'")).contains("either a `name` or a `range`"));
        assert!(error(&format!("{rule}ports = ['a']")).contains("ports"));
        assert!(error("ready_guests = 65").contains("at most 64"));
        assert!(error("ready_guests = 1\nwarm = false").contains("leave `warm = false` away"));
        assert!(error("ready_guests = 1\nguest_console = true").contains("has no console"));
        let error = Config::parse(Path::new("f"), "data_dir = \"/d\"").unwrap_err();
        assert!(error.to_string().contains("`name` is missing"));
    }
}
