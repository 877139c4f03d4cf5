//! What a new sandbox should be: flags over environment over the folder's `towline.toml`.
//!
//! Only turns what was typed into a checked [`v1::SandboxSpec`]; whether a cluster can give it is
//! the control plane's to say.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use clap::Args;
use towline_proto::v1;

use crate::env_vars;
use crate::error::Failure;
use crate::folder::{FolderConfig, ProjectFolder};
use crate::output::human;
use crate::{parse, user};

/// Name that means the laptop's own system as the image.
pub const LOCAL: &str = "local";
/// Where programs are in any Linux system.
const SYSTEM_PATH: &[&str] =
    &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// Variables that only say where a toolchain is; they hold no secrets, and without them the tools
/// of a local image would not find themselves.
const TOOLCHAIN_VARIABLES: &[&str] = &[
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "GOROOT",
    "GOPATH",
    "JAVA_HOME",
    "NVM_DIR",
    "NVM_BIN",
    "PYENV_ROOT",
    "PYENV_VERSION",
    "RBENV_ROOT",
    "SDKMAN_DIR",
    "VIRTUAL_ENV",
];

/// Flags that describe a sandbox.
#[derive(Debug, Clone, Default, Args)]
pub struct SpecArgs {
    /// Image to start from, or `local` for this machine's own system; pulled if it is not here
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// Name of the sandbox
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub cpus: Option<u32>,
    /// Memory, for example 512m or 2g
    #[arg(long, value_name = "SIZE", value_parser = parse::size_mib)]
    pub memory: Option<u64>,
    /// Disk, for example 20g
    #[arg(long, value_name = "SIZE", value_parser = parse::size_mib)]
    pub disk: Option<u64>,
    /// Stop it (never remove it) so long after each start, for example 30m or 2h
    #[arg(long, value_name = "D", value_parser = parse::timeout_s)]
    pub timeout: Option<u64>,
    /// Network policy: `public` (the default: the public internet) or `none`
    #[arg(long, value_name = "NAME", value_parser = policy)]
    pub policy: Option<String>,
    /// Isolation: `vm`, or `process` on nodes that allow it
    #[arg(long, value_name = "KIND", value_parser = isolation)]
    pub isolation: Option<v1::Isolation>,
}

fn policy(text: &str) -> Result<String, String> {
    match text {
        "public" | "none" => Ok(text.to_owned()),
        _ => Err("expected `public` (the public internet) or `none` (no network)".into()),
    }
}

fn isolation(text: &str) -> Result<v1::Isolation, String> {
    match text {
        "vm" => Ok(v1::Isolation::Vm),
        "process" => Ok(v1::Isolation::Process),
        _ => Err(format!("isolation `{text}` is unknown; `vm` and `process` are")),
    }
}

impl SpecArgs {
    /// Returns the spec for a new sandbox of this folder, or of none.
    pub fn to_spec(
        &self,
        folder: Option<&ProjectFolder>,
        config: &FolderConfig,
    ) -> anyhow::Result<v1::SandboxSpec> {
        let (image, user) = self.image(config)?;
        let local = user.is_some();
        let mut env = if local { local_env() } else { Vec::new() };
        env.extend(config.env.iter().map(|(name, value)| format!("{name}={value}").into_bytes()));
        Ok(v1::SandboxSpec {
            name: self.name.clone().unwrap_or_default(),
            image: Some(image),
            shape: Some(self.shape(config)?),
            isolation: self.isolation.unwrap_or(v1::Isolation::Vm).into(),
            policy: self.policy(config)?,
            folder: folder.map(ProjectFolder::to_proto),
            user,
            env,
            remove_on_exit: false,
            timeout_s: self.timeout_s(config)?,
            git: None,
        })
    }

    /// Returns the image's name as it was asked for, if it was.
    pub fn wanted_image(&self, config: &FolderConfig) -> Option<String> {
        let from_env =
            || Some(env_vars::get(env_vars::TOWLINE_IMAGE)?.to_string_lossy().into_owned());
        self.image.clone().or_else(from_env).or_else(|| config.image.clone())
    }

    fn image(&self, config: &FolderConfig) -> anyhow::Result<(v1::ImageRef, Option<v1::User>)> {
        use v1::image_ref::Source;
        let wanted = self.wanted_image(config).unwrap_or_else(|| LOCAL.to_owned());
        if wanted.is_empty() {
            return Err(Failure::usage("the image has no name").into());
        }
        if wanted != LOCAL {
            return Ok((v1::ImageRef { source: Some(Source::Oci(wanted)) }, None));
        }
        let user = user::current()?;
        let home = user.home.clone();
        Ok((v1::ImageRef { source: Some(Source::Local(v1::LocalImage { home })) }, Some(user)))
    }

    /// The flag, the folder's, or nothing: then the control plane says what is usual.
    fn policy(&self, config: &FolderConfig) -> anyhow::Result<String> {
        match (&self.policy, &config.policy) {
            (Some(name), _) => Ok(name.clone()),
            (None, Some(name)) => policy(name).map_err(|error| {
                Failure::usage(format!("`{}`: policy: {error}", crate::folder::FILE)).into()
            }),
            (None, None) => Ok(String::new()),
        }
    }

    fn shape(&self, config: &FolderConfig) -> anyhow::Result<v1::Shape> {
        let size = |flag: Option<u64>, text: &Option<String>, key: &str| match (flag, text) {
            (Some(mib), _) => Ok(mib),
            (None, Some(text)) => parse::size_mib(text).map_err(|error| {
                Failure::usage(format!("`{}`: shape.{key}: {error}", crate::folder::FILE))
            }),
            (None, None) => Ok(0),
        };
        Ok(v1::Shape {
            cpus: self.cpus.or(config.shape.cpus).unwrap_or(0),
            memory_mib: size(self.memory, &config.shape.memory, "memory")?,
            disk_mib: size(self.disk, &config.shape.disk, "disk")?,
            processes_max: 0,
        })
    }

    fn timeout_s(&self, config: &FolderConfig) -> anyhow::Result<u64> {
        match (self.timeout, &config.timeout) {
            (Some(seconds), _) => Ok(seconds),
            (None, Some(text)) => parse::timeout_s(text).map_err(|error| {
                Failure::usage(format!("`{}`: timeout: {error}", crate::folder::FILE)).into()
            }),
            (None, None) => Ok(0),
        }
    }

    /// Says which typed flag an existing sandbox does not fulfil.
    pub fn contradicts(&self, spec: &v1::SandboxSpec) -> Option<String> {
        let shape = spec.shape.unwrap_or_default();
        let has = crate::output::json::image(spec);
        let differs = |what: &str, wanted: String, has: String| {
            (wanted != has).then(|| format!("{what} {has}, not {wanted}"))
        };
        let number = |what, wanted: Option<u64>, has: u64| {
            wanted.and_then(|wanted| differs(what, wanted.to_string(), has.to_string()))
        };
        self.image
            .clone()
            .and_then(|wanted| differs("image", wanted, has))
            .or_else(|| {
                let wanted = self.policy.clone();
                wanted.and_then(|wanted| differs("policy", wanted, spec.policy.clone()))
            })
            .or_else(|| {
                let word = |isolation: v1::Isolation| {
                    isolation.as_str_name().trim_start_matches("ISOLATION_").to_lowercase()
                };
                let wanted = self.isolation?;
                differs("isolation", word(wanted), word(spec.isolation()))
            })
            .or_else(|| number("cpus", self.cpus.map(u64::from), shape.cpus.into()))
            .or_else(|| number("memory (MiB)", self.memory, shape.memory_mib))
            .or_else(|| number("disk (MiB)", self.disk, shape.disk_mib))
            .or_else(|| {
                differs("timeout", human::timeout(self.timeout?), human::timeout(spec.timeout_s))
            })
    }
}

/// The environment that makes a local image's tools work as they do here: where programs are, and
/// nothing else of ours.
fn local_env() -> Vec<Vec<u8>> {
    let home = user::home();
    let path = local_path(std::env::var_os("PATH").as_deref(), home.as_deref());
    let mut env = vec![[b"PATH=", path.as_bytes()].concat()];
    for name in TOOLCHAIN_VARIABLES {
        if let Some(value) = env_vars::get(name) {
            env.push([name.as_bytes(), b"=", value.as_bytes()].concat());
        }
    }
    env
}

/// Our `PATH` without what a local image does not serve, and with what is always there.
fn local_path(path: Option<&std::ffi::OsStr>, home: Option<&Path>) -> OsString {
    let mut dirs: Vec<PathBuf> = Vec::new();
    let mut add = |dir: PathBuf| {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    };
    let cargo = home.map(|home| home.join(".cargo/bin")).filter(|dir| dir.is_dir());
    cargo.into_iter().for_each(&mut add);
    for dir in path.map(std::env::split_paths).into_iter().flatten() {
        let served = dir.starts_with("/usr")
            || SYSTEM_PATH.iter().any(|known| dir == Path::new(known))
            || home.is_some_and(|home| dir.starts_with(home) && dir.is_dir());
        if dir.is_absolute() && served {
            add(dir);
        }
    }
    SYSTEM_PATH.iter().map(PathBuf::from).for_each(&mut add);
    // A colon in a name cannot be written in PATH: it was none of ours then.
    std::env::join_paths(&dirs).unwrap_or_else(|_| SYSTEM_PATH.join(":").into())
}

/// Flags that describe one command's environment.
#[derive(Debug, Clone, Default, Args)]
pub struct EnvArgs {
    /// Set a variable for the command; NAME alone passes this machine's value
    #[arg(short, long = "env", value_name = "K=V")]
    pub env: Vec<OsString>,
    /// Read variables from a file, one per line
    #[arg(long, value_name = "F")]
    pub env_file: Vec<PathBuf>,
}

impl EnvArgs {
    /// Returns the variables, files first, so that flags win.
    pub fn collect(&self) -> anyhow::Result<Vec<Vec<u8>>> {
        let lookup = |name: &std::ffi::OsStr| std::env::var_os(name);
        let mut all = Vec::new();
        for path in &self.env_file {
            let text = std::fs::read(path).map_err(|error| {
                Failure::usage(format!("could not read `{}`", path.display())).because(error)
            })?;
            let parsed = parse::env_file(&text, lookup)
                .map_err(|error| Failure::usage(format!("`{}`: {error}", path.display())))?;
            all.extend(parsed);
        }
        for text in &self.env {
            all.extend(parse::env(text, lookup).map_err(Failure::usage)?);
        }
        Ok(all)
    }
}

/// Returns words as bytes, as messages carry them.
pub fn argv(words: Vec<OsString>) -> Vec<Vec<u8>> {
    words.into_iter().map(OsString::into_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_keeps_what_is_served_in_order() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        std::fs::create_dir_all(home.join(".cargo/bin")).unwrap();
        std::fs::create_dir_all(home.join(".pyenv/shims")).unwrap();
        let ours = format!(
            "{0}/.pyenv/shims:{0}/gone:/snap/bin:relative:/usr/bin:/usr/bin",
            home.display()
        );
        let got = local_path(Some(ours.as_ref()), Some(home));
        let expected = format!(
            "{0}/.cargo/bin:{0}/.pyenv/shims:/usr/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin:/bin",
            home.display()
        );
        assert_eq!(got, OsString::from(expected));
    }

    #[test]
    fn flags_win_over_the_folder_and_contradictions_are_said() {
        let args =
            SpecArgs { image: Some("debian:12".into()), memory: Some(512), ..Default::default() };
        let config: FolderConfig = toml::from_str(
            "image='local'\ntimeout='2h'\nshape.cpus=3\nshape.memory='1g'\nenv.A='b'",
        )
        .unwrap();
        let spec = args.to_spec(None, &config).unwrap();
        let shape = spec.shape.unwrap();
        assert_eq!((shape.cpus, shape.memory_mib, shape.disk_mib), (3, 512, 0));
        assert_eq!(crate::output::json::image(&spec), "debian:12");
        assert_eq!((spec.env.as_slice(), spec.timeout_s), ([b"A=b".to_vec()].as_slice(), 7200));
        assert!(args.contradicts(&spec).is_none());
        let other = SpecArgs { isolation: Some(v1::Isolation::Process), ..Default::default() };
        assert_eq!(other.contradicts(&spec).unwrap(), "isolation vm, not process");
        assert_eq!(other.to_spec(None, &config).unwrap().isolation(), v1::Isolation::Process);
        let other = SpecArgs { memory: Some(1024), ..Default::default() };
        assert_eq!(other.contradicts(&spec).unwrap(), "memory (MiB) 512, not 1024");
        let other = SpecArgs { timeout: Some(0), ..Default::default() };
        assert_eq!(other.contradicts(&spec).unwrap(), "timeout 2h, not never");
        let closed: FolderConfig = toml::from_str("policy = 'none'").unwrap();
        let spec = SpecArgs::default().to_spec(None, &closed).unwrap();
        assert_eq!(spec.policy, "none");
        let open = SpecArgs { policy: Some("public".into()), ..Default::default() };
        assert_eq!(open.to_spec(None, &closed).unwrap().policy, "public");
        assert_eq!(open.contradicts(&spec).unwrap(), "policy none, not public");
        let unknown: FolderConfig = toml::from_str("policy = 'web'").unwrap();
        let error = SpecArgs::default().to_spec(None, &unknown).unwrap_err().to_string();
        assert!(error.contains("`towline.toml`: policy: expected `public`"), "{error}");
    }

    #[test]
    fn a_local_image_brings_the_user_and_not_the_environment() {
        let spec = SpecArgs::default().to_spec(None, &FolderConfig::default()).unwrap();
        assert_eq!(crate::output::json::image(&spec), LOCAL);
        assert_eq!(spec.user.unwrap().uid, rustix::process::getuid().as_raw());
        assert!(spec.env.iter().any(|v| v.starts_with(b"PATH=")));
        assert!(!spec.env.iter().any(|v| v.starts_with(b"CARGO_MANIFEST_DIR=")));
    }
}
