//! Writes the two servers' configuration files. The port is chosen once and kept, so that
//! certificates, contexts and nodes need not change when the cluster starts again.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use crate::config::write_private;
use crate::env_vars;
use crate::error::Failure;

/// Name of the only member.
const MEMBER: &str = "embedded";
/// Name of the only node.
pub(super) const NODE: &str = "embedded";

#[derive(Debug, Serialize, Deserialize)]
struct MemberConfig {
    data_dir: PathBuf,
    listen: SocketAddr,
    member_name: String,
}

#[derive(Debug, Serialize)]
struct NodeConfig {
    name: String,
    data_dir: PathBuf,
    cache_dir: PathBuf,
    control_plane: Vec<SocketAddr>,
    token_file: PathBuf,
    link_listen: SocketAddr,
    embedded: bool,
    accel: String,
    warm: bool,
    isolation_process: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_agent: Option<PathBuf>,
    #[serde(flatten)]
    offers: Offers,
    // A table: after all else.
    #[serde(skip_serializing_if = "toml::Table::is_empty")]
    egress: toml::Table,
}

/// What of this machine sandboxes may have together, and the disks of each, and how many guests wait;
/// left out: the node agent's own choice.
#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Offers {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_mib_s: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_iops: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready_guests: Option<u32>,
}

/// The part of a node's configuration that its user writes where there is no other operator.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserNodeConfig {
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    disk_mib: Option<u64>,
    disk_mib_s: Option<u32>,
    disk_iops: Option<u32>,
    ready_guests: Option<u32>,
    /// As the node agent reads it, which also checks it.
    #[serde(default)]
    egress: toml::Table,
}

/// Writes both files and returns where the control plane will listen.
pub(super) fn write(layout: &Layout) -> anyhow::Result<SocketAddr> {
    let listen =
        kept_port(layout).filter(|address| is_free(*address)).map_or_else(free_port, Ok)?;
    let member = MemberConfig { data_dir: layout.member(), listen, member_name: MEMBER.to_owned() };
    let accel = env_vars::get(env_vars::TOWLINE_ACCEL);
    let isolation_process = match env_vars::get(env_vars::TOWLINE_ISOLATION_PROCESS) {
        Some(value) if value == "1" => true,
        None => false,
        Some(value) => anyhow::bail!(
            "TOWLINE_ISOLATION_PROCESS is `{}`: set it to 1 to allow `--isolation process` on this \
             machine, or unset it",
            value.to_string_lossy()
        ),
    };
    let user = user_node_config(layout)?;
    let node = NodeConfig {
        name: NODE.to_owned(),
        data_dir: layout.node(),
        cache_dir: layout.cache.clone(),
        control_plane: vec![listen],
        token_file: layout.node_token(),
        link_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        embedded: true,
        accel: accel.map_or_else(|| "auto".into(), |accel| accel.to_string_lossy().into_owned()),
        warm: env_vars::get(env_vars::TOWLINE_WARM).is_none_or(|value| value != "off"),
        isolation_process,
        guest_agent: env_vars::get(env_vars::TOWLINE_GUEST_AGENT).map(PathBuf::from),
        offers: Offers {
            cpus: user.cpus,
            memory_mib: user.memory_mib,
            disk_mib: user.disk_mib,
            disk_mib_s: user.disk_mib_s,
            disk_iops: user.disk_iops,
            ready_guests: user.ready_guests,
        },
        egress: user.egress,
    };
    store(layout.member_config(), &member)?;
    store(layout.node_config(), &node)?;
    Ok(listen)
}

fn user_node_config(layout: &Layout) -> anyhow::Result<UserNodeConfig> {
    let path = layout.user_node_config();
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(error) => {
            let text = format!("could not read `{}`", path.display());
            return Err(Failure::new(text).because(error).into());
        }
    };
    toml::from_str(&text).map_err(|error| {
        let reason = crate::nearest::explain_toml(&error);
        Failure::usage(format!("`{}`: {reason}", path.display())).into()
    })
}

fn store(path: PathBuf, config: &impl Serialize) -> anyhow::Result<()> {
    let text = toml::to_string_pretty(config).context("writing a server's configuration")?;
    let text = format!("# Written by `tow up`; changes are overwritten.\n{text}");
    write_private(&path, text.as_bytes())
        .with_context(|| format!("could not write `{}`", path.display()))
}

fn kept_port(layout: &Layout) -> Option<SocketAddr> {
    let text = fs::read_to_string(layout.member_config()).ok()?;
    Some(toml::from_str::<MemberConfig>(&text).ok()?.listen)
}

fn is_free(address: SocketAddr) -> bool {
    TcpListener::bind(address).is_ok()
}

fn free_port() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("choosing a port")?;
    listener.local_addr().context("choosing a port")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_allows_is_passed_on_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            data: dir.path().join("data"),
            keys: dir.path().join("config/embedded"),
            cache: dir.path().join("cache"),
        };
        fs::create_dir(dir.path().join("config")).unwrap();
        let file = layout.user_node_config();
        let allow =
            "cpus = 3\ndisk_iops = 900\n[[egress.allow]]\nname = 'mirror.example'\nports = [443]\n";
        fs::write(&file, allow).unwrap();
        write(&layout).unwrap();
        let written: toml::Table =
            fs::read_to_string(layout.node_config()).unwrap().parse().unwrap();
        assert_eq!(written["egress"]["allow"][0]["name"].as_str(), Some("mirror.example"));
        assert_eq!(written["cpus"].as_integer(), Some(3));
        assert_eq!(written["disk_iops"].as_integer(), Some(900));
        assert!(!written.contains_key("memory_mib"), "{written}");
        assert_eq!(written["name"].as_str(), Some(NODE));
        fs::write(&file, "data_dir = '/elsewhere'").unwrap();
        let error = write(&layout).unwrap_err().to_string();
        assert!(error.contains("unknown key `data_dir`"), "{error}");
    }

    #[test]
    fn the_port_is_kept_unless_somebody_took_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            data: dir.path().join("data"),
            keys: dir.path().join("keys"),
            cache: dir.path().join("cache"),
        };
        let first = write(&layout).unwrap();
        assert_eq!(write(&layout).unwrap(), first);
        let _taken = TcpListener::bind(first).unwrap();
        assert_ne!(write(&layout).unwrap(), first);
    }
}
