//! The helper's configuration: one TOML file that root writes. It is checked whole, an unknown key is
//! an error, and what it lists is all that is ever started.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the helper listens unless told otherwise.
pub const SOCKET: &str = "/run/towline/helper.sock";
/// Folder of the VMMs' cgroups unless told otherwise.
const CGROUP: &str = "towline-vmm";
/// The user ids of VMMs unless told otherwise: beyond those of people, services and containers
/// (systemd's `UIDS-GIDS`, "unused" from 0x70000000 on).
const UIDS_FIRST: u32 = 0x7000_0000;
const UIDS_COUNT: u32 = 4096;
/// What people and system services have.
const UIDS_MIN: u32 = 100_000;

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
    /// It does not say what it must.
    #[error("`{path}` cannot be used: {reason}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The node agent's user and group.
    pub agent: (u32, u32),
    /// Where to listen.
    pub socket: PathBuf,
    /// What may be started, without links.
    pub programs: Vec<PathBuf>,
    /// The first user id of VMMs, and how many there are.
    pub uids: (u32, u32),
    /// Folder of the VMMs' cgroups, in each hierarchy.
    pub cgroup: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    agent_uid: u32,
    agent_gid: u32,
    socket: Option<PathBuf>,
    programs: Vec<PathBuf>,
    uids_first: Option<u32>,
    uids_count: Option<u32>,
    cgroup: Option<String>,
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text).map_err(|reason| ConfigError::Value { path: path.into(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let uids = (file.uids_first.unwrap_or(UIDS_FIRST), file.uids_count.unwrap_or(UIDS_COUNT));
        let end = uids.0.checked_add(uids.1).filter(|_| uids.0 >= UIDS_MIN && uids.1 > 0);
        let Some(end) = end else {
            return Err(format!(
                "`uids_first` and `uids_count` are {} and {}; ids from {UIDS_MIN} on are expected",
                uids.0, uids.1
            ));
        };
        if (uids.0..end).contains(&file.agent_uid) {
            return Err("`agent_uid` is among the ids of VMMs".into());
        }
        if file.programs.is_empty() {
            return Err("`programs` lists none, so that nothing could be started".into());
        }
        let programs = file.programs.iter().map(|path| program(path)).collect::<Result<_, _>>()?;
        let socket = file.socket.unwrap_or_else(|| SOCKET.into());
        let cgroup = file.cgroup.unwrap_or_else(|| CGROUP.to_owned());
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if cgroup.is_empty() || !cgroup.bytes().all(is_plain) {
            return Err(format!("`cgroup` is `{cgroup}`; letters, digits and - are expected"));
        }
        Ok(Self { agent: (file.agent_uid, file.agent_gid), socket, programs, uids, cgroup })
    }
}

/// A program that only root can change.
fn program(path: &Path) -> Result<PathBuf, String> {
    let failed = |problem: &str| format!("`programs` lists `{}`, {problem}", path.display());
    if !path.is_absolute() {
        return Err(failed("which is not absolute"));
    }
    let path =
        fs::canonicalize(path).map_err(|error| failed(&format!("which is not there: {error}")))?;
    for part in path.ancestors() {
        let meta = fs::metadata(part).map_err(|error| failed(&error.to_string()))?;
        let is_sticky = meta.is_dir() && meta.mode() & 0o1000 != 0;
        if meta.uid() != 0 || (meta.mode() & 0o022 != 0 && !is_sticky) {
            let part = part.display();
            return Err(failed(&format!("but others than root can change `{part}`")));
        }
    }
    if !path.is_file() {
        return Err(failed("which is no file"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "agent_uid = 990\nagent_gid = 991\nprograms = ['/bin/true']\n";

    #[test]
    fn what_is_left_out_has_a_default() {
        let config = Config::parse(GOOD).unwrap();
        assert_eq!(config.agent, (990, 991));
        assert_eq!((config.socket.as_path(), config.uids), (Path::new(SOCKET), (UIDS_FIRST, 4096)));
        assert_eq!(config.programs, [fs::canonicalize("/bin/true").unwrap()]);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |more: &str| Config::parse(&format!("{GOOD}{more}")).unwrap_err();
        assert!(error("program = 1").contains("program"));
        assert!(error("uids_first = 1000").contains("100000"));
        assert!(error("uids_first = 4294967295").contains("uids_first"));
        assert!(error("cgroup = '../x'").contains("cgroup"));
        assert!(error("uids_count = 0").contains("uids_count"));
        let error = |text: &str| Config::parse(text).unwrap_err();
        assert!(error("agent_uid = 1\nagent_gid = 1\nprograms = []").contains("lists none"));
        assert!(error("agent_uid = 1\nagent_gid = 1\nprograms = ['true']").contains("absolute"));
        let among = "agent_uid = 0x70000001\nagent_gid = 1\nprograms = ['/bin/true']";
        assert!(error(among).contains("among"));
        let others = tempfile::Builder::new().tempdir().unwrap();
        let program = others.path().join("vmm");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let text = format!("agent_uid = 1\nagent_gid = 1\nprograms = ['{}']", program.display());
        assert!(error(&text).contains("others than root"), "{}", error(&text));
    }
}
