//! Keeps a VM's process to its own files by landlock, as far as the kernel can, before it starts.
//!
//! Everything is prepared by the parent; between fork and exec only system calls remain.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest rules that are asked for; older kernels enforce what they know.
const NEWEST: ABI = ABI::V6;

/// What a process may touch.
#[derive(Debug, Clone, Default)]
pub struct Allowed {
    /// Trees and files to read.
    pub read: Vec<PathBuf>,
    /// Trees to read and run programs and libraries from.
    pub execute: Vec<PathBuf>,
    /// Files and devices to read and write.
    pub write: Vec<PathBuf>,
    /// Directories in which it may make and remove files and sockets.
    pub own: Vec<PathBuf>,
}

/// Whether this kernel has landlock.
pub fn is_available() -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .is_ok()
}

/// Prepares the rules; what does not exist is left out, as it could not be touched anyway.
pub fn prepare(allowed: &Allowed) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let own = file | read | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (paths, access) in [
        (&allowed.read, read),
        (&allowed.execute, read | AccessFs::Execute),
        (&allowed.write, file),
        (&allowed.own, own),
    ] {
        for path in paths {
            rules = add(rules, path, access)?;
        }
    }
    Ok(rules)
}

fn add(
    rules: RulesetCreated,
    path: &Path,
    access: landlock::BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(path) else { return Ok(rules) };
    // Rights of directories do not apply to files; the library would complain.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    rules.add_rule(PathBeneath::new(fd, access))
}
