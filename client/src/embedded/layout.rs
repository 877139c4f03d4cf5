//! Where the embedded cluster's files are. Names only; whoever writes makes the folders.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::env_vars;

/// The paths of one user's embedded cluster.
#[derive(Debug, Clone)]
pub struct Layout {
    /// `$XDG_DATA_HOME/towline`.
    pub data: PathBuf,
    /// `$XDG_CONFIG_HOME/towline/embedded`: our certificate and key there.
    pub keys: PathBuf,
    /// Guest kernels and image layers.
    pub cache: PathBuf,
}

impl Layout {
    /// Returns the paths that the environment says.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            data: env_vars::data_dir()?,
            keys: env_vars::config_dir()?.join("embedded"),
            cache: env_vars::cache_dir()?,
        })
    }

    /// The control plane member's data.
    pub fn member(&self) -> PathBuf {
        self.data.join("member")
    }

    /// The node agent's data.
    pub fn node(&self) -> PathBuf {
        self.data.join("node")
    }

    /// The control plane's socket for the owner of its data.
    pub fn admin_socket(&self) -> PathBuf {
        self.member().join("admin.sock")
    }

    /// Configuration of the member.
    pub fn member_config(&self) -> PathBuf {
        self.data.join("control-plane.toml")
    }

    /// Configuration of the node agent.
    pub fn node_config(&self) -> PathBuf {
        self.data.join("node-agent.toml")
    }

    /// What the user wants of the node agent: `[[egress.allow]]`. Only read.
    pub fn user_node_config(&self) -> PathBuf {
        self.keys.with_file_name("node-agent.toml")
    }

    /// The node agent's join token.
    pub fn node_token(&self) -> PathBuf {
        self.data.join("node.token")
    }

    /// Held by the supervisor.
    pub fn lock(&self) -> PathBuf {
        self.data.join("supervisor.lock")
    }

    /// Exists after `tow down`, until the next start.
    pub fn down_mark(&self) -> PathBuf {
        self.data.join("down")
    }

    /// A log: `supervisor`, `control-plane` or `node-agent`.
    pub fn log(&self, name: &str) -> PathBuf {
        self.data.join("log").join(format!("{name}.log"))
    }

    /// A sibling of the running `tow`.
    pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
        let tow = std::env::current_exe().context("finding where `tow` itself is")?;
        let path = tow.with_file_name(name);
        if !path.is_file() {
            let text = format!("`{}` is missing: it belongs beside `tow`", path.display());
            return Err(crate::error::Failure::new(text)
                .hint("install all of Towline's binaries in one folder (`make build`)")
                .into());
        }
        Ok(path)
    }
}
