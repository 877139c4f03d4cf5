//! Where the daemon's socket, lock and log are: a 0700 folder of this user, and nobody else's.
//!
//! `$XDG_RUNTIME_DIR/towline`, or `towline-<uid>` in the temp directory. In a shared temp directory
//! somebody else may have made that name first: owner and mode are checked before it is used.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::env_vars;

/// `sun_path` has 108 bytes with the final NUL.
const SOCKET_PATH_MAX: usize = 107;

/// The daemon's folder, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    dir: PathBuf,
}

/// Says why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It could not be made or looked at.
    #[error("could not use the daemon's folder `{path}`")]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not ours alone.
    #[error(
        "`{path}` {wrong}: the daemon's folder must be a directory of uid {uid} with mode 0700"
    )]
    NotPrivate {
        /// The folder.
        path: PathBuf,
        /// What it is instead.
        wrong: String,
        /// Ours.
        uid: u32,
    },
    /// Too long for a Unix socket.
    #[error(
        "`{0}` is too long for a socket (107 bytes at most): set XDG_RUNTIME_DIR to a shorter folder"
    )]
    TooLong(PathBuf),
}

impl Place {
    /// The folder that the environment names, made if it is not there.
    pub fn discover() -> Result<Self, PlaceError> {
        let runtime = env_vars::get(env_vars::XDG_RUNTIME_DIR).map(PathBuf::from);
        match runtime.filter(|dir| dir.is_absolute()) {
            Some(runtime) => Self::at(runtime.join("towline")),
            None => {
                let uid = rustix::process::geteuid().as_raw();
                Self::at(std::env::temp_dir().join(format!("towline-{uid}")))
            }
        }
    }

    /// A folder by its path, made if it is not there.
    pub fn at(dir: PathBuf) -> Result<Self, PlaceError> {
        let io = |source| PlaceError::Io { path: dir.clone(), source };
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io)?;
            }
            Err(error) => return Err(io(error)),
        }
        check(&dir)?;
        let place = Self { dir };
        if place.socket().as_os_str().len() > SOCKET_PATH_MAX {
            return Err(PlaceError::TooLong(place.socket()));
        }
        Ok(place)
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("daemon.sock")
    }

    /// The file of published ports. Not in this folder, which does not outlive the machine's boot;
    /// named after it, because a daemon of another folder has ports of its own.
    pub fn ports(&self) -> Result<PathBuf, env_vars::NoHome> {
        let hash = blake3::hash(self.dir.as_os_str().as_encoded_bytes()).to_hex();
        Ok(env_vars::state_dir()?.join(format!("ports-{}.json", &hash.as_str()[..16])))
    }

    /// Held by the daemon that may touch the socket's name.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("daemon.lock")
    }

    /// The daemon's stderr.
    pub fn log(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }
}

fn check(dir: &Path) -> Result<(), PlaceError> {
    let uid = rustix::process::geteuid().as_raw();
    let meta =
        fs::symlink_metadata(dir).map_err(|source| PlaceError::Io { path: dir.into(), source })?;
    let wrong = if !meta.is_dir() {
        "is not a directory".into()
    } else if meta.uid() != uid {
        format!("belongs to uid {}", meta.uid())
    } else if meta.mode() & 0o077 != 0 {
        format!("has mode {:04o}", meta.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(PlaceError::NotPrivate { path: dir.into(), wrong, uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_private_directory_will_do() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/towline");
        let place = Place::at(dir.clone()).unwrap();
        assert_eq!(place.socket(), dir.join("daemon.sock"));
        Place::at(dir.clone()).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Place::at(dir.clone()).unwrap_err().to_string();
        assert!(error.contains("has mode 0755"), "{error}");
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(Place::at(link).unwrap_err().to_string().contains("not a directory"));
        let long = temp.path().join("x".repeat(100));
        assert!(matches!(Place::at(long), Err(PlaceError::TooLong(_))));
    }
}
