//! Checks what a client asks for before it becomes a command: bounds, names, what this version does
//! not do. Left out: whether it fits (`placement`) and whether the name is free (the applier).

use towline_proto::limits::ARGV_ENV_MAX;
use towline_proto::v1::{self, Isolation, SandboxSpec, image_ref::Source};

use crate::names;
use crate::placement::Want;
use crate::refusal::Refusal;

/// Bounds of a shape: what no machine has, or no guest can live on, is refused early.
const CPUS_MAX: u32 = 1024;
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 128..=(16 << 20);
const DISK_MIB: std::ops::RangeInclusive<u64> = 256..=(64 << 20);
const PROCESSES: std::ops::RangeInclusive<u32> = 32..=4_000_000;
/// Longest path in a spec.
const PATH_MAX: usize = 4096;
/// Longest name or address of a git identity.
const GIT_TEXT_MAX: usize = 256;
/// Longest image name, user name or policy.
const TEXT_MAX: usize = 512;
/// Most groups of a user, as Linux bounds them.
const GROUPS_MAX: usize = 65536;
/// Longest timeout; no sum of it and a time overflows.
const TIMEOUT_S_MAX: u64 = 10 * 365 * 24 * 3600;
/// Egress policies; the first is the default.
const POLICIES: [&str; 2] = ["public", "none"];
/// Length of an idempotency key.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 8..=64;

/// Checks an idempotency key.
pub(crate) fn check_key(key: &[u8]) -> Result<(), Refusal> {
    if KEY_BYTES.contains(&key.len()) {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "the idempotency key has {} bytes: send {} to {} random ones, the same for each retry",
        key.len(),
        KEY_BYTES.start(),
        KEY_BYTES.end()
    )))
}

/// Checks a spec and writes down what it left unsaid, but for name and shape.
pub(crate) fn check_spec(spec: &mut SandboxSpec) -> Result<Want, Refusal> {
    if !spec.name.is_empty() {
        names::check(&spec.name)?;
    }
    check_policy(&mut spec.policy)?;
    let isolation = check_isolation(spec)?;
    let local_image = check_image(spec.image.as_ref())?;
    let shape = spec.shape.unwrap_or_default();
    check_shape(&shape)?;
    check_places(spec)?;
    check_env(&spec.env)?;
    check_timeout(spec.timeout_s)?;
    check_git(spec.git.as_ref())?;
    Ok(Want { shape, isolation, local_image })
}

/// Checks after how long a sandbox is to be stopped.
pub(crate) fn check_timeout(seconds: u64) -> Result<(), Refusal> {
    if seconds <= TIMEOUT_S_MAX {
        return Ok(());
    }
    Err(Refusal::invalid("a timeout is at most ten years: `never` is none at all"))
}

fn check_policy(policy: &mut String) -> Result<(), Refusal> {
    if policy.is_empty() {
        POLICIES[0].clone_into(policy);
    }
    if POLICIES.contains(&policy.as_str()) {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "there is no policy `{}`: use `public` (the public internet; the default) or `none` (no \
         network)",
        shown(policy)
    )))
}

fn check_isolation(spec: &mut SandboxSpec) -> Result<Isolation, Refusal> {
    match Isolation::try_from(spec.isolation) {
        Ok(Isolation::Unspecified | Isolation::Vm) => {
            spec.set_isolation(Isolation::Vm);
            Ok(Isolation::Vm)
        }
        // Which nodes allow it, placement sees by their drivers.
        Ok(Isolation::Process) => Ok(Isolation::Process),
        Err(_) => Err(Refusal::invalid("this isolation is unknown to this version: upgrade it")),
    }
}

fn check_image(image: Option<&v1::ImageRef>) -> Result<bool, Refusal> {
    match image.and_then(|image| image.source.as_ref()) {
        None => Err(Refusal::invalid("no image: name one with --image, or use --image local")),
        Some(Source::Oci(name)) if name.is_empty() || name.len() > TEXT_MAX => {
            Err(Refusal::invalid(format!("an image name has 1 to {TEXT_MAX} bytes")))
        }
        Some(Source::Oci(_)) => Ok(false),
        Some(Source::Local(local)) => {
            check_path("the home directory", &local.home)?;
            Ok(true)
        }
    }
}

/// Checks amounts; what is 0 was left out.
pub(crate) fn check_shape(shape: &v1::Shape) -> Result<(), Refusal> {
    let bad = |what: &str, range: String| {
        Err(Refusal::invalid(format!("{what} must be in {range}, or left out")))
    };
    if shape.cpus > CPUS_MAX {
        return bad("CPUs", format!("1 to {CPUS_MAX}"));
    }
    if shape.memory_mib != 0 && !MEMORY_MIB.contains(&shape.memory_mib) {
        return bad("memory", format!("{} MiB to {} MiB", MEMORY_MIB.start(), MEMORY_MIB.end()));
    }
    if shape.disk_mib != 0 && !DISK_MIB.contains(&shape.disk_mib) {
        return bad("disk", format!("{} MiB to {} MiB", DISK_MIB.start(), DISK_MIB.end()));
    }
    if shape.processes_max != 0 && !PROCESSES.contains(&shape.processes_max) {
        return bad("processes", format!("{} to {}", PROCESSES.start(), PROCESSES.end()));
    }
    Ok(())
}

fn check_places(spec: &SandboxSpec) -> Result<(), Refusal> {
    if let Some(folder) = &spec.folder {
        check_path("the folder", &folder.path)?;
    }
    let Some(user) = &spec.user else { return Ok(()) };
    if user.name.len() > TEXT_MAX || user.groups.len() > GROUPS_MAX {
        return Err(Refusal::invalid("the user has too long a name or too many groups"));
    }
    check_path("the user's home", &user.home)?;
    check_path("the user's shell", &user.shell)
}

/// Empty or absolute, without NUL, and no longer than Linux allows.
fn check_path(what: &str, path: &[u8]) -> Result<(), Refusal> {
    let absolute = path.is_empty() || path[0] == b'/';
    if absolute && path.len() <= PATH_MAX && !path.contains(&0) {
        return Ok(());
    }
    Err(Refusal::invalid(format!("{what} must be an absolute path of at most {PATH_MAX} bytes")))
}

/// Both go into a configuration file, a line each.
fn check_git(git: Option<&v1::GitIdentity>) -> Result<(), Refusal> {
    let texts = git.into_iter().flat_map(|git| [&git.name, &git.email]);
    for text in texts {
        if text.len() > GIT_TEXT_MAX || text.chars().any(char::is_control) {
            return Err(Refusal::invalid(format!(
                "the git identity's name and email have at most {GIT_TEXT_MAX} bytes and no \
                 control characters; see `git config user.name` and `git config user.email`"
            )));
        }
    }
    Ok(())
}

fn check_env(env: &[Vec<u8>]) -> Result<(), Refusal> {
    let total: usize = env.iter().map(|entry| entry.len() + 1).sum();
    if total > ARGV_ENV_MAX {
        return Err(Refusal::invalid(format!(
            "the environment has {total} bytes; at most {ARGV_ENV_MAX} are allowed"
        )));
    }
    for entry in env {
        if entry.contains(&0) || entry.iter().position(|b| *b == b'=').is_none_or(|at| at == 0) {
            return Err(Refusal::invalid(format!(
                "environment entry `{}` is not NAME=value",
                shown(&String::from_utf8_lossy(entry))
            )));
        }
    }
    Ok(())
}

fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> SandboxSpec {
        let source = Some(Source::Oci("debian:12".into()));
        SandboxSpec { image: Some(v1::ImageRef { source }), ..Default::default() }
    }

    fn refused(change: impl FnOnce(&mut SandboxSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        check_spec(&mut spec).unwrap_err().message
    }

    #[test]
    fn what_is_unsaid_is_written_down() {
        let mut spec = spec();
        check_spec(&mut spec).unwrap();
        assert_eq!(spec.policy, "public");
        spec.policy = "none".into();
        check_spec(&mut spec).unwrap();
        assert_eq!(spec.policy, "none");
        assert_eq!(spec.isolation(), Isolation::Vm);
    }

    #[test]
    fn refusals_say_what_to_change() {
        let policy = refused(|s| s.policy = "web".into());
        assert!(policy.contains("`public`") && policy.contains("`none`"), "{policy}");
        let mut spec = spec();
        spec.set_isolation(Isolation::Process);
        assert_eq!(check_spec(&mut spec).unwrap().isolation, Isolation::Process);
        assert!(refused(|s| s.image = None).contains("--image local"));
        assert!(refused(|s| s.name = "a/b".into()).contains("not a name"));
        assert!(refused(|s| s.env = vec![b"=x".to_vec()]).contains("NAME=value"));
        assert!(refused(|s| s.env = vec![b"x".to_vec()]).contains("NAME=value"));
        let tiny = v1::Shape { memory_mib: 1, ..Default::default() };
        assert!(refused(|s| s.shape = Some(tiny)).contains("128 MiB"));
        let folder = v1::Folder { path: b"a/b".to_vec(), ..Default::default() };
        assert!(refused(|s| s.folder = Some(folder)).contains("absolute"));
    }

    #[test]
    fn a_key_has_bounds() {
        assert!(check_key(b"").is_err());
        assert!(check_key(&[1; 16]).is_ok());
        assert!(check_key(&[1; 65]).is_err());
    }
}
