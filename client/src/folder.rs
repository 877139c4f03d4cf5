//! The laptop's project folder: which one is meant, and what its `towline.toml` asks for.
//!
//! Leaves what goes in and out of it to `tunnel/files.rs`. A folder is known by its real path,
//! device and inode; `/`, the home and its ancestors are never one.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use towline_proto::v1;

use crate::error::Failure;
use crate::nearest;

/// Name of the folder's file.
pub const FILE: &str = "towline.toml";

/// A project folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProjectFolder {
    /// Its real path.
    pub path: PathBuf,
    /// Its device.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// What `towline.toml` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderConfig {
    /// An imported image, or `local`.
    pub image: Option<String>,
    /// Network policy of new sandboxes: `public` or `none`.
    pub policy: Option<String>,
    /// Size of new sandboxes.
    #[serde(default)]
    pub shape: ShapeConfig,
    /// Stop the sandbox so long after each start, as `--timeout` takes it.
    pub timeout: Option<String>,
    /// Environment of every command.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Ports that are published, as `-p` takes them.
    #[serde(default)]
    pub ports: Vec<String>,
}

/// Size of a sandbox as a folder asks for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeConfig {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory, as `--memory` takes it.
    pub memory: Option<String>,
    /// Disk, as `--disk` takes it.
    pub disk: Option<String>,
}

impl ProjectFolder {
    /// Returns the folder that a command typed in `cwd` is about.
    pub fn find(cwd: &Path, home: Option<&Path>) -> anyhow::Result<Self> {
        let cwd = fs::canonicalize(cwd).map_err(|error| {
            Failure::new(format!("cannot resolve the working directory `{}`", cwd.display()))
                .because(error)
        })?;
        let path = choose(&cwd);
        let home = home.and_then(|home| fs::canonicalize(home).ok());
        refuse_wide(&path, home.as_deref())?;
        Self::at(&path)
    }

    fn at(path: &Path) -> anyhow::Result<Self> {
        let meta = fs::metadata(path).map_err(|error| {
            Failure::new(format!("cannot look at the folder `{}`", path.display())).because(error)
        })?;
        Ok(Self { path: path.to_owned(), device: meta.dev(), inode: meta.ino() })
    }

    /// Returns the folder of a sandbox if it is still the same one on this machine.
    pub fn of_sandbox(spec: &v1::SandboxSpec) -> Option<Self> {
        let folder = spec.folder.as_ref()?;
        let path = Path::new(std::ffi::OsStr::from_bytes(&folder.path));
        let here = Self::at(path).ok()?;
        (here.to_proto() == *folder).then_some(here)
    }

    /// Returns it as messages carry it.
    pub fn to_proto(&self) -> v1::Folder {
        v1::Folder {
            path: self.path.as_os_str().as_bytes().to_vec(),
            device: self.device,
            inode: self.inode,
        }
    }

    /// Reads its `towline.toml`; a missing one asks for nothing.
    pub fn config(&self) -> anyhow::Result<FolderConfig> {
        let path = self.path.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(FolderConfig::default());
            }
            Err(error) => {
                let text = format!("could not read `{}`", path.display());
                return Err(Failure::new(text).because(error).into());
            }
        };
        toml::from_str(&text).map_err(|error| {
            let text = format!("`{}`: {}", path.display(), nearest::explain_toml(&error));
            Failure::usage(text).into()
        })
    }
}

/// The nearest ancestor with a `towline.toml`, else with `.git`, else `cwd` itself.
fn choose(cwd: &Path) -> PathBuf {
    let with = |name: &str| {
        cwd.ancestors().find(|dir| dir.join(name).symlink_metadata().is_ok()).map(Path::to_owned)
    };
    with(FILE).or_else(|| with(".git")).unwrap_or_else(|| cwd.to_owned())
}

fn refuse_wide(path: &Path, home: Option<&Path>) -> Result<(), Failure> {
    let what = match home {
        _ if path == Path::new("/") => "the root directory",
        Some(home) if path == home => "your home directory",
        Some(home) if home.starts_with(path) => "above your home directory",
        _ => return Ok(()),
    };
    let text = format!("`{}` is {what}: too wide to be a project folder", path.display());
    Err(Failure::usage(text).hint(
        "go to a project's folder, or use `--no-sync` to run without one (`-w DIR` says where)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn towline_toml_wins_over_git_wins_over_cwd() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let deep = root.join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        assert_eq!(ProjectFolder::find(&deep, None).unwrap().path, deep);
        fs::create_dir(root.join("a/b/.git")).unwrap();
        assert_eq!(ProjectFolder::find(&deep, None).unwrap().path, root.join("a/b"));
        fs::write(root.join("a").join(FILE), "").unwrap();
        assert_eq!(ProjectFolder::find(&deep, None).unwrap().path, root.join("a"));
    }

    #[test]
    fn root_home_and_its_ancestors_are_refused_also_through_a_link() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join("home/me");
        fs::create_dir_all(home.join("project")).unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&home, &link).unwrap();
        for wide in [Path::new("/"), &home, &link, &root.path().join("home")] {
            let error = ProjectFolder::find(wide, Some(&home)).unwrap_err();
            assert!(error.to_string().contains("too wide"), "{error}");
            assert_eq!(crate::error::wanted_code(&error), Some(2));
        }
        assert!(ProjectFolder::find(&home.join("project"), Some(&home)).is_ok());
    }

    #[test]
    fn unknown_keys_name_the_nearest() {
        let root = tempfile::tempdir().unwrap();
        let folder = ProjectFolder::find(root.path(), None).unwrap();
        fs::write(root.path().join(FILE), "[shape]\nmemroy = '1g'\n").unwrap();
        let error = folder.config().unwrap_err().to_string();
        assert!(error.contains("did you mean `memory`"), "{error}");
        fs::write(root.path().join(FILE), "image = 'a'\nshape.cpus = 2\nenv.A = 'b'\n").unwrap();
        let config = folder.config().unwrap();
        assert_eq!((config.image.as_deref(), config.shape.cpus), (Some("a"), Some(2)));
    }

    #[test]
    fn a_replaced_folder_is_not_the_sandboxs() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("p");
        fs::create_dir(&path).unwrap();
        let folder = ProjectFolder::find(&path, None).unwrap();
        let mut spec = v1::SandboxSpec { folder: Some(folder.to_proto()), ..Default::default() };
        assert_eq!(ProjectFolder::of_sandbox(&spec), Some(folder));
        spec.folder.as_mut().unwrap().inode += 1;
        assert_eq!(ProjectFolder::of_sandbox(&spec), None);
    }
}
