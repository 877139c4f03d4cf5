//! What GuestConfigure says about the commands that run here: defaults, and who they run as.
//!
//! Only data. `configure` makes it once per boot; `exec` reads it for each start.

use towline_proto::v1::{GuestConfigure, User};

use crate::credentials::RootFiles;

/// Where programs are sought when the environment names no PATH.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Defaults of every exec.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The image's and the sandbox's environment.
    pub env: Vec<Vec<u8>>,
    /// The image's working directory.
    pub cwd: Vec<u8>,
    /// The project folder's path in the sandbox; empty without one.
    pub folder: Vec<u8>,
    /// The image's entrypoint.
    pub entrypoint: Vec<Vec<u8>>,
    /// The image's command.
    pub cmd: Vec<Vec<u8>>,
    /// The sandbox's user, where the laptop named one.
    pub user: Option<User>,
    /// `user[:group]` of the image.
    pub image_user: String,
    /// Where /etc/passwd and /etc/group are read; none outside a sandbox (tests).
    pub files: RootFiles,
}

impl Settings {
    /// Takes what concerns commands out of a configuration.
    pub fn new(configure: &GuestConfigure, files: RootFiles) -> Self {
        Self {
            env: configure.env.clone(),
            cwd: configure.cwd.clone(),
            folder: configure.folder.clone(),
            entrypoint: configure.entrypoint.clone(),
            cmd: configure.cmd.clone(),
            user: configure.user.clone(),
            image_user: configure.image_user.clone(),
            files,
        }
    }

    /// Where a command runs that names no directory: the project folder, else the image's.
    pub fn default_cwd(&self) -> &[u8] {
        [&self.folder, &self.cwd]
            .into_iter()
            .find(|path| !path.is_empty())
            .map_or(b"/", |path| path)
    }
}
