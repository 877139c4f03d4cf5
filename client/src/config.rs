//! The user's configuration, `$XDG_CONFIG_HOME/towline/config.toml`: which clusters there are
//! (contexts) and which one is meant.
//!
//! Leaves talking to a cluster to `session.rs` and the project folder's file to `folder.rs`. The
//! file is replaced as a whole and readable by its owner only; an unknown key is an error.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::env_vars;

/// Name of the context that `tow up` writes.
pub const EMBEDDED: &str = "embedded";

/// All contexts, and which one is current.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The context in use unless `TOWLINE_CONTEXT` says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// Contexts by name.
    #[serde(default)]
    pub context: BTreeMap<String, Context>,
}

/// How one cluster is reached and who we are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `host:port` of a member.
    pub endpoint: String,
    /// The cluster's CA certificate, PEM.
    pub ca_file: PathBuf,
    /// Our certificate, PEM.
    pub cert_file: PathBuf,
    /// Our key, PEM, 0600.
    pub key_file: PathBuf,
    /// The cluster's id.
    pub cluster_id: String,
}

/// Says why the configuration could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No place for it.
    #[error(transparent)]
    NoHome(#[from] env_vars::NoHome),
    /// The file could not be read or written.
    #[error("could not {what} `{path}`")]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("`{path}` is not a valid configuration: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A context that is not there.
    #[error("there is no context `{name}` in `{path}` (it has: {known})")]
    UnknownContext {
        /// What was asked for.
        name: String,
        /// The file.
        path: PathBuf,
        /// What there is.
        known: String,
    },
}

/// Returns the file's path.
pub fn path() -> Result<PathBuf, ConfigError> {
    Ok(env_vars::config_dir()?.join("config.toml"))
}

impl Config {
    /// Reads the file; a missing one is an empty configuration.
    pub fn load() -> Result<Self, ConfigError> {
        let path = path()?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(ConfigError::Io { what: "read", path, source }),
        };
        toml::from_str(&text).map_err(|error| ConfigError::Invalid {
            path,
            message: crate::nearest::explain_toml(&error),
        })
    }

    /// Replaces the file atomically.
    pub fn store(&self) -> Result<(), ConfigError> {
        let path = path()?;
        let text = toml::to_string_pretty(self).map_err(|error| ConfigError::Invalid {
            path: path.clone(),
            message: error.to_string(),
        })?;
        write_private(&path, text.as_bytes()).map_err(|source| ConfigError::Io {
            what: "write",
            path,
            source,
        })
    }

    /// Returns the context in use, by `name` if given, else by `TOWLINE_CONTEXT`, else the current
    /// one; `None` when nothing is configured.
    pub fn selected(&self, name: Option<&str>) -> Result<Option<(String, &Context)>, ConfigError> {
        let from_env = env_vars::get(env_vars::TOWLINE_CONTEXT)
            .map(|value| value.to_string_lossy().into_owned());
        let explicit = name.filter(|name| !name.is_empty()).map(str::to_owned).or(from_env);
        let Some(wanted) = explicit.or_else(|| self.current.clone()) else {
            return Ok(None);
        };
        match self.context.get(&wanted) {
            Some(context) => Ok(Some((wanted, context))),
            None => Err(ConfigError::UnknownContext {
                name: wanted,
                path: path()?,
                known: match self.context.is_empty() {
                    true => "none".into(),
                    false => self.context.keys().cloned().collect::<Vec<_>>().join(", "),
                },
            }),
        }
    }
}

/// Makes a folder and its parents, 0700.
pub fn ensure_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces a file atomically with bytes that only its owner may read, and makes it durable.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("the path has no folder"))?;
    ensure_private_dir(dir)?;
    let mut file = tempfile::Builder::new().prefix(".new-").make_in(dir, |path| {
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    })?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Config {
        let context = |n: u32| Context {
            endpoint: format!("127.0.0.1:{n}"),
            ca_file: "/c/ca.pem".into(),
            cert_file: "/c/cert.pem".into(),
            key_file: "/c/key.pem".into(),
            cluster_id: "cluster_x".into(),
        };
        Config {
            current: Some("b".into()),
            context: [("a".to_owned(), context(1)), ("b".to_owned(), context(2))].into(),
        }
    }

    #[test]
    fn round_trips_and_selects() {
        let text = toml::to_string_pretty(&two()).unwrap();
        let config: Config = toml::from_str(&text).unwrap();
        assert_eq!(config, two());
        assert_eq!(config.selected(None).unwrap().unwrap().0, "b");
        assert_eq!(config.selected(Some("a")).unwrap().unwrap().1.endpoint, "127.0.0.1:1");
        let error = config.selected(Some("c")).unwrap_err().to_string();
        assert!(error.contains("no context `c`") && error.contains("a, b"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        let error = toml::from_str::<Config>("curent = 'x'").unwrap_err();
        let text = crate::nearest::explain_toml(&error);
        assert!(text.contains("curent") && text.contains("`current`"), "{text}");
    }

    #[test]
    fn a_private_file_is_replaced_whole_and_is_0600() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
