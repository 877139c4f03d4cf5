//! Every environment variable that `tow` reads, and the folders that follow from them.
//!
//! Leaves the files inside those folders to their owners. Folders are only named here; whoever
//! writes makes them, 0700.

use std::ffi::OsString;
use std::path::PathBuf;

/// Where the user's home is.
pub const HOME: &str = "HOME";
/// Base of the configuration folder; `~/.config` when unset.
pub const XDG_CONFIG_HOME: &str = "XDG_CONFIG_HOME";
/// Base of the data folder; `~/.local/share` when unset.
pub const XDG_DATA_HOME: &str = "XDG_DATA_HOME";
/// Base of the cache folder; `~/.cache` when unset.
pub const XDG_CACHE_HOME: &str = "XDG_CACHE_HOME";
/// Base of the state folder; `~/.local/state` when unset.
pub const XDG_STATE_HOME: &str = "XDG_STATE_HOME";
/// Base of the runtime folder; a 0700 folder in the temp directory when unset.
pub const XDG_RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";
/// Uses this context instead of the current one.
pub const TOWLINE_CONTEXT: &str = "TOWLINE_CONTEXT";
/// Cache folder (guest kernels, image layers) instead of `$XDG_CACHE_HOME/towline`.
pub const TOWLINE_CACHE: &str = "TOWLINE_CACHE";
/// Image of new sandboxes, over the folder's `towline.toml`.
pub const TOWLINE_IMAGE: &str = "TOWLINE_IMAGE";
/// Hides progress when set and not empty.
pub const TOWLINE_NO_PROGRESS: &str = "TOWLINE_NO_PROGRESS";
/// `auto`, `kvm` or `tcg`: how the embedded node runs its microVMs.
pub const TOWLINE_ACCEL: &str = "TOWLINE_ACCEL";
/// `off`: the embedded node boots each sandbox instead of starting from a saved guest.
pub const TOWLINE_WARM: &str = "TOWLINE_WARM";
/// `1` allows `--isolation process` on the embedded node, which must then run as root.
pub const TOWLINE_ISOLATION_PROCESS: &str = "TOWLINE_ISOLATION_PROCESS";
/// The static guest agent, instead of the file beside `tow`.
pub const TOWLINE_GUEST_AGENT: &str = "TOWLINE_GUEST_AGENT";
/// Folder of docker's configuration instead of `~/.docker`, for registry logins.
pub const DOCKER_CONFIG: &str = "DOCKER_CONFIG";
/// podman's file of registry logins, instead of `containers/auth.json` in the runtime folder.
pub const REGISTRY_AUTH_FILE: &str = "REGISTRY_AUTH_FILE";
/// Seconds since 1970 that later times become in a saved image (reproducible-builds.org).
pub const SOURCE_DATE_EPOCH: &str = "SOURCE_DATE_EPOCH";
/// Hides colour when set and not empty (no-color.org).
pub const NO_COLOR: &str = "NO_COLOR";

/// Returns the variable unless it is unset or empty.
pub fn get(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Says that a needed variable is missing.
#[derive(Debug, thiserror::Error)]
#[error(
    "neither {0} nor HOME is set to an absolute path, so there is no place for Towline's files"
)]
pub struct NoHome(&'static str);

fn base(variable: &'static str, below_home: &str) -> Result<PathBuf, NoHome> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    if let Some(path) = get(variable).map(PathBuf::from).and_then(absolute) {
        return Ok(path);
    }
    let home = get(HOME).map(PathBuf::from).and_then(absolute).ok_or(NoHome(variable))?;
    Ok(home.join(below_home))
}

/// Returns `$XDG_CONFIG_HOME/towline`: contexts and client keys.
pub fn config_dir() -> Result<PathBuf, NoHome> {
    Ok(base(XDG_CONFIG_HOME, ".config")?.join("towline"))
}

/// Returns `$XDG_DATA_HOME/towline`: the embedded cluster's member and node.
pub fn data_dir() -> Result<PathBuf, NoHome> {
    Ok(base(XDG_DATA_HOME, ".local/share")?.join("towline"))
}

/// Returns `$XDG_STATE_HOME/towline`: what is known of folders and their sandboxes.
pub fn state_dir() -> Result<PathBuf, NoHome> {
    Ok(base(XDG_STATE_HOME, ".local/state")?.join("towline"))
}

/// Returns the cache of guest kernels and image layers.
pub fn cache_dir() -> Result<PathBuf, NoHome> {
    match get(TOWLINE_CACHE) {
        Some(path) => Ok(std::path::absolute(&path).unwrap_or_else(|_| path.into())),
        None => Ok(base(XDG_CACHE_HOME, ".cache")?.join("towline")),
    }
}
