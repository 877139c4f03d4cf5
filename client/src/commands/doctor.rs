//! `tow doctor`: checks this machine and says what to do. Exit code 1 when something is missing
//! that an embedded cluster needs. Changes nothing without `--fix`.

mod fix;

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use serde_json::json;
use towline_link::identity::CertificateInfo;

use crate::commands::Env;
use crate::config::{Config, EMBEDDED};
use crate::daemon::client::DaemonClient;
use crate::daemon::place::{Place, PlaceError};
use crate::embedded::{self, Holder, Layout};
use crate::env_vars;
use crate::error::{Exit, Outcome};
use crate::output::human;
use fix::Fix;

/// Arguments of `tow doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Mend what can be mended without another user's rights, and say what was done
    #[arg(long)]
    pub fix: bool,
    /// Print an object per check
    #[arg(long)]
    pub json: bool,
}

/// Programs that a node runs, and the Debian package that each is in.
const PROGRAMS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("mksquashfs", "squashfs-tools"),
    ("mke2fs", "e2fsprogs"),
];
/// Tools that fetch and unpack the guest's kernel the first time.
const KERNEL_TOOLS: &[(&str, &str)] = &[("apt-get", "apt"), ("dpkg-deb", "dpkg")];
/// Less free space than this and images or disks will soon not fit.
const DISK_MIN: u64 = 5 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Ok,
    /// Works, but something should be known.
    Note,
    Missing,
}

#[derive(Debug)]
struct Check {
    name: &'static str,
    grade: Grade,
    found: String,
    todo: String,
    fix: Option<Fix>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, grade: Grade::Ok, found: found.into(), todo: String::new(), fix: None }
    }

    fn note(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, grade: Grade::Note, found: found.into(), todo: todo.into(), fix: None }
    }

    fn missing(name: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { name, grade: Grade::Missing, found: found.into(), todo: todo.into(), fix: None }
    }

    fn with_fix(self, fix: Option<Fix>) -> Self {
        Self { fix, ..self }
    }
}

pub(super) async fn run(args: DoctorArgs, env: &Env) -> Outcome {
    let layout = Layout::new()?;
    let mut checks = check_all(&layout).await;
    if args.fix && mend(&checks, &layout, env).await? {
        checks = check_all(&layout).await;
    }
    for check in &checks {
        match env.printer.json() {
            true => env.printer.object(&object(check))?,
            false => text(check).iter().try_for_each(|line| env.printer.answer(line))?,
        }
    }
    if let Some(line) = install(&checks).filter(|_| !env.printer.json()) {
        env.printer.answer(line)?;
    }
    let fixable = checks.iter().filter(|check| check.fix.is_some()).count();
    if fixable > 0 && !args.fix {
        env.printer.hint(format!("`tow doctor --fix` mends {fixable} of these"));
    }
    let missing = checks.iter().any(|check| check.grade == Grade::Missing);
    Ok(if missing { Exit::NO } else { Exit::OK })
}

/// Does what can be done; whether anything was.
async fn mend(checks: &[Check], layout: &Layout, env: &Env) -> anyhow::Result<bool> {
    let mut any = false;
    for (check, fix) in checks.iter().filter_map(|check| Some((check, check.fix.as_ref()?))) {
        let done = fix.apply(layout, &env.printer).await;
        any |= done.is_ok();
        let (mark, fixed, text) = match done {
            Ok(text) => ("fixed  ", true, text),
            Err(error) => ("FAILED ", false, format!("{error:#}")),
        };
        match env.printer.json() {
            true => env.printer.object(&json!({
                "schema": "towline.fix/1", "name": check.name, "fixed": fixed, "did": text,
            }))?,
            false => env.printer.answer(format!("{mark} {}: {text}", check.name))?,
        }
    }
    Ok(any)
}

/// The one line that installs all packages that lack. It is the user's to run: only root may.
fn install(checks: &[Check]) -> Option<String> {
    let lacks =
        |name: &str| checks.iter().any(|check| check.name == name && check.grade == Grade::Missing);
    let packages: Vec<&str> =
        PROGRAMS.iter().filter(|(name, _)| lacks(name)).map(|(_, package)| *package).collect();
    (!packages.is_empty()).then(|| {
        let sudo = if rustix::process::geteuid().is_root() { "" } else { "sudo " };
        format!("install what is missing: {sudo}apt-get install -y {}", packages.join(" "))
    })
}

async fn check_all(layout: &Layout) -> Vec<Check> {
    let mut checks: Vec<Check> =
        PROGRAMS.iter().map(|(name, package)| program(name, package)).collect();
    checks.extend(["towline-control-plane", "towline-node-agent"].map(binary));
    checks.push(guest_agent());
    checks.push(kernel(layout));
    checks.push(kvm());
    checks.push(disk(layout));
    checks.push(memory());
    checks.push(folders(layout));
    checks.push(leftovers(layout));
    checks.push(daemon().await);
    checks.push(cluster(layout).await);
    checks.push(certificate(layout));
    checks
}

/// The first of our folders that we cannot use.
fn folders(layout: &Layout) -> Check {
    const NAME: &str = "folders";
    let keys = layout.keys.parent().unwrap_or(&layout.keys);
    for path in [keys, &layout.data, &layout.cache] {
        if let Err((found, fix)) = fix::folder(path) {
            let uid = rustix::process::geteuid().as_raw();
            let todo = match &fix {
                Some(fix) => fix.describe(),
                None => format!("give it to you: chown -R {uid} '{}'", path.display()),
            };
            return Check::missing(NAME, found, todo).with_fix(fix);
        }
    }
    Check::ok(NAME, format!("`{}` and others can be written to", layout.data.display()))
}

/// VMs that nobody will ever end.
fn leftovers(layout: &Layout) -> Check {
    const NAME: &str = "leftovers";
    match fix::strays(layout) {
        strays if strays.is_empty() => Check::ok(NAME, "none"),
        strays => {
            let fix = Fix::End(strays);
            let found = "VMs run whose folders were removed";
            Check::note(NAME, found, fix.describe()).with_fix(Some(fix))
        }
    }
}

fn certificate(layout: &Layout) -> Check {
    const NAME: &str = "certificate";
    let context = match Config::load() {
        Ok(mut config) => match config.context.remove(EMBEDDED) {
            Some(context) => context,
            None => return Check::ok(NAME, "none yet; made when the embedded cluster starts"),
        },
        Err(error) => return Check::missing(NAME, error.to_string(), "mend or remove that file"),
    };
    let wrong = match std::fs::read_to_string(&context.cert_file) {
        Err(error) => format!("`{}`: {error}", context.cert_file.display()),
        Ok(pem) => match CertificateInfo::from_pem(&pem) {
            Err(error) => format!("`{}`: {error}", context.cert_file.display()),
            Ok(info) if info.not_after <= SystemTime::now() => "it has expired".into(),
            Ok(info) => {
                let left = info.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                return Check::ok(NAME, format!("good for {}", human::duration(left)));
            }
        },
    };
    // A cluster that is down gives a new one when it is started.
    match Holder::find(&layout.lock()) {
        Ok(Some(_)) => {
            Check::missing(NAME, wrong, Fix::Renew.describe()).with_fix(Some(Fix::Renew))
        }
        _ => Check::note(NAME, wrong, "`tow up --detach` renews it"),
    }
}

fn object(check: &Check) -> serde_json::Value {
    let grade = match check.grade {
        Grade::Ok => "ok",
        Grade::Note => "note",
        Grade::Missing => "missing",
    };
    json!({
        "schema": "towline.check/1", "name": check.name, "grade": grade,
        "found": check.found, "todo": check.todo, "fix": check.fix.as_ref().map(Fix::describe),
    })
}

fn text(check: &Check) -> Vec<String> {
    let mark = match check.grade {
        Grade::Ok => "ok     ",
        Grade::Note => "note   ",
        Grade::Missing => "MISSING",
    };
    let mut lines = vec![format!("{mark} {}: {}", check.name, check.found)];
    if !check.todo.is_empty() {
        lines.push(format!("        {}", check.todo));
    }
    lines
}

/// Looks where root's PATH looks too: that is where these programs are for everybody.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn program(name: &'static str, package: &str) -> Check {
    match find_program(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::missing(name, "not found", format!("apt-get install {package}")),
    }
}

fn binary(name: &'static str) -> Check {
    match Layout::binary(name) {
        Ok(path) => Check::ok(name, path.display().to_string()),
        Err(error) => Check::missing(name, error.to_string(), "make build"),
    }
}

fn guest_agent() -> Check {
    const NAME: &str = "guest agent";
    let named = env_vars::get(env_vars::TOWLINE_GUEST_AGENT).map(PathBuf::from);
    let path = match named.map_or_else(|| Layout::binary("towline-guest-agent-static"), Ok) {
        Ok(path) => path,
        Err(error) => return Check::missing(NAME, error.to_string(), "make build"),
    };
    match std::fs::read(&path) {
        Ok(bytes) if is_static(&bytes) => Check::ok(NAME, path.display().to_string()),
        Ok(_) => Check::missing(
            NAME,
            format!("`{}` is not statically linked", path.display()),
            "make build",
        ),
        Err(error) => Check::missing(NAME, format!("`{}`: {error}", path.display()), "make build"),
    }
}

/// Whether an ELF file asks for no interpreter: nothing else is in the initramfs to run it.
fn is_static(elf: &[u8]) -> bool {
    const INTERPRETER: u32 = 3;
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    if elf.get(..5) != Some(b"\x7fELF\x02") {
        return false;
    }
    let headers = || {
        let offset = usize::try_from(u64_at(32)?).ok()?;
        let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
        (0..count).map(|n| u32_at(offset.checked_add(n * size)?)).collect::<Option<Vec<u32>>>()
    };
    headers().is_some_and(|kinds| !kinds.contains(&INTERPRETER))
}

fn kernel(layout: &Layout) -> Check {
    const NAME: &str = "guest kernel";
    let dir = layout.cache.join("kernels");
    let cached = std::fs::read_dir(&dir).map(|entries| entries.flatten().count()).unwrap_or(0);
    if cached > 0 {
        return Check::ok(NAME, format!("cached in `{}`", dir.display()));
    }
    let lacking: Vec<&str> = KERNEL_TOOLS
        .iter()
        .filter(|(name, _)| find_program(name).is_none())
        .map(|(name, _)| *name)
        .collect();
    match lacking.is_empty() {
        true => Check::note(
            NAME,
            "not fetched yet",
            "the first sandbox fetches it with apt-get download",
        ),
        false => Check::missing(
            NAME,
            format!("not fetched yet, and {} is not here to do it", lacking.join(", ")),
            "Debian 12 or its derivatives have these tools",
        ),
    }
}

/// Only what the device says: whether it can run our kernel is found out by the node, once.
fn kvm() -> Check {
    const NAME: &str = "isolation";
    const EMULATED: &str = "microVMs are emulated (TCG): slower, and not a security boundary";
    let open = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    match open {
        Ok(_) => Check::ok(
            NAME,
            "/dev/kvm opens; the node tries it once and falls back to emulation (`tow node ls` says which)",
        ),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Check::note(
            NAME,
            format!("/dev/kvm is there but not for you; {EMULATED}"),
            "add yourself to the group `kvm` and log in again",
        ),
        Err(_) => Check::note(
            NAME,
            format!("no /dev/kvm; {EMULATED}"),
            "run only what you trust, or use a machine with hardware virtualisation",
        ),
    }
}

fn disk(layout: &Layout) -> Check {
    const NAME: &str = "disk space";
    let existing = |path: &Path| path.ancestors().find(|dir| dir.is_dir()).map(Path::to_owned);
    let Some(dir) = existing(&layout.data) else {
        return Check::missing(NAME, format!("`{}` cannot be made", layout.data.display()), "");
    };
    match rustix::fs::statvfs(&dir) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{} free at `{}`", human::bytes(free), dir.display());
            match free >= DISK_MIN {
                true => Check::ok(NAME, found),
                false => Check::note(
                    NAME,
                    found,
                    "images and disks need room: free some, or set XDG_DATA_HOME",
                ),
            }
        }
        Err(error) => Check::missing(NAME, format!("`{}`: {error}", dir.display()), ""),
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = text.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    match total_kib {
        Some(kib) => {
            let admitted = kib / 4 * 3;
            let found = format!(
                "{}; an embedded node admits {}",
                human::bytes(kib << 10),
                human::bytes(admitted << 10)
            );
            match admitted >= 2 << 20 {
                true => Check::ok(NAME, found),
                false => {
                    Check::note(NAME, found, "give sandboxes less than the default: --memory 512m")
                }
            }
        }
        None => Check::note(NAME, "unknown", ""),
    }
}

async fn daemon() -> Check {
    const NAME: &str = "daemon";
    let ask = async {
        let place = Place::discover()?;
        DaemonClient::new(place, EMBEDDED)?.status().await
    };
    match ask.await {
        Ok(Some(status)) if status.version == crate::daemon::VERSION => Check::ok(
            NAME,
            format!(
                "version {}, pid {}, {} links, {} streams",
                status.version, status.pid, status.links, status.streams
            ),
        ),
        Ok(Some(status)) => Check::note(
            NAME,
            format!("version {} runs; this is {}", status.version, crate::daemon::VERSION),
            "the next `tow run` or `tow exec` replaces it",
        ),
        Ok(None) => match stale_socket() {
            None => Check::ok(NAME, "not running; started when needed"),
            Some(path) => {
                let found = format!("not running; `{}` is a dead one's", path.display());
                let fix = Fix::Socket(path);
                Check::note(NAME, found, fix.describe()).with_fix(Some(fix))
            }
        },
        Err(error) => {
            let fix = match error.downcast_ref::<PlaceError>() {
                // Of another user's folder nothing is changed.
                Some(PlaceError::NotPrivate { path, .. }) if is_our_folder(path) => {
                    Some(Fix::Mode(path.clone(), 0o700))
                }
                _ => None,
            };
            let todo = match &fix {
                Some(fix) => fix.describe(),
                None => "remove what is in its way, or set XDG_RUNTIME_DIR".into(),
            };
            Check::missing(NAME, format!("{error:#}"), todo).with_fix(fix)
        }
    }
}

fn is_our_folder(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::symlink_metadata(path)
        .is_ok_and(|meta| meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw())
}

/// The daemon's socket, if there is one that refuses.
fn stale_socket() -> Option<PathBuf> {
    let path = Place::discover().ok()?.socket();
    let refused = std::os::unix::net::UnixStream::connect(&path).err()?;
    (refused.kind() == std::io::ErrorKind::ConnectionRefused).then_some(path)
}

async fn cluster(layout: &Layout) -> Check {
    const NAME: &str = "cluster";
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => return Check::missing(NAME, error.to_string(), "mend or remove that file"),
    };
    match config.current.as_deref() {
        Some(name) if name != EMBEDDED => {
            return Check::ok(NAME, format!("context `{name}`; `tow status` asks it"));
        }
        _ => {}
    }
    match Holder::find(&layout.lock()) {
        Ok(None) => {
            let check = Check::note(NAME, "the embedded cluster is down", "tow up --detach");
            // One that was taken down is down on purpose, and one that never was is nobody's wish.
            let died = config.context.contains_key(EMBEDDED) && !layout.down_mark().exists();
            return check.with_fix(died.then_some(Fix::Start));
        }
        Ok(Some(_)) => {}
        Err(error) => return Check::missing(NAME, error.to_string(), ""),
    }
    match embedded::health(layout).await {
        Ok(health) if health.is_ready() => {
            let drivers: Vec<_> = health.nodes.iter().map(super::status::drivers).collect();
            Check::ok(NAME, format!("embedded, ready; sandboxes run in: {}", drivers.join("; ")))
        }
        Ok(_) => Check::missing(
            NAME,
            "the embedded cluster is up but its node is not ready",
            format!("see `{}`", layout.log("node-agent").display()),
        ),
        Err(error) => Check::missing(
            NAME,
            format!("the embedded cluster does not answer: {error:#}"),
            format!("see `{}`", layout.log("control-plane").display()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_none() {
        let dynamic = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&dynamic), "test binaries are linked dynamically");
        assert!(!is_static(b"#!/bin/sh") && !is_static(b""));
        // An ELF header without program headers asks for nothing.
        let mut header = vec![0; 64];
        header[..5].copy_from_slice(b"\x7fELF\x02");
        assert!(is_static(&header));
    }
}
