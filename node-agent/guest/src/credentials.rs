//! Who a command runs as: a user that the laptop named, or `user[:group]` of an image, looked up in
//! the sandbox's own /etc/passwd and /etc/group.
//!
//! Those files belong to the workload: they are opened beneath its root, only if regular, and read
//! up to a bound; lines that make no sense are skipped. No NSS.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use towline_proto::v1::User;

use crate::refusal::Refusal;

/// Most bytes read of /etc/passwd or /etc/group.
const FILE_MAX: u64 = 1 << 20;
/// Most supplementary groups, as Linux bounds them.
const GROUPS_MAX: usize = 65_536;

/// The root directory beneath which account files are read.
#[derive(Debug, Clone, Default)]
pub struct RootFiles(Option<Arc<OwnedFd>>);

impl RootFiles {
    /// Reads beneath this directory.
    pub fn beneath(root: OwnedFd) -> Self {
        Self(Some(Arc::new(root)))
    }

    /// An account file, or nothing if there is none that can be read safely.
    pub(crate) fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.read_up_to(path, FILE_MAX)
    }

    /// So many bytes of a file, or nothing if there is none that can be read safely.
    pub(crate) fn read_up_to(&self, path: &str, max: u64) -> io::Result<Vec<u8>> {
        let Some(root) = &self.0 else { return Ok(Vec::new()) };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match rustix::fs::openat2(
            root,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        ) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Ok(Vec::new());
        }
        let mut content = Vec::new();
        std::fs::File::from(file).take(max).read_to_end(&mut content)?;
        Ok(content)
    }
}

/// Completes a user that was named by numbers: home and shell from /etc/passwd where absent.
pub fn complete(mut user: User, files: &RootFiles) -> io::Result<User> {
    if user.groups.len() > GROUPS_MAX {
        user.groups.truncate(GROUPS_MAX);
    }
    if user.name.is_empty() || user.home.is_empty() || user.shell.is_empty() {
        let passwd = files.read("etc/passwd")?;
        if let Some(entry) = accounts(&passwd).find(|entry| entry.uid == user.uid) {
            if user.name.is_empty() {
                user.name = String::from_utf8_lossy(entry.name).into_owned();
            }
            if user.home.is_empty() {
                user.home = entry.home.to_vec();
            }
            if user.shell.is_empty() {
                user.shell = entry.shell.to_vec();
            }
        }
    }
    fill(&mut user);
    Ok(user)
}

/// Resolves `user[:group]` of an image's config; empty means root.
pub fn of_image(spec: &str, files: &RootFiles) -> Result<User, Refusal> {
    let read = |path: &str| {
        files.read(path).map_err(|error| Refusal::io(format!("cannot read /{path}"), &error))
    };
    let (passwd, group) = (read("etc/passwd")?, read("etc/group")?);
    resolve(spec, &passwd, &group)
}

fn resolve(spec: &str, passwd: &[u8], group: &[u8]) -> Result<User, Refusal> {
    let (name, group_name) = match spec.split_once(':') {
        Some((name, group_name)) => (name, Some(group_name).filter(|name| !name.is_empty())),
        None => (spec, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let number = name.parse::<u32>().ok();
    let entry = accounts(passwd)
        .find(|entry| entry.name == name.as_bytes())
        .or_else(|| accounts(passwd).find(|entry| Some(entry.uid) == number));
    let mut user = match (entry, number) {
        (Some(entry), _) => User {
            name: String::from_utf8_lossy(entry.name).into_owned(),
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            home: entry.home.to_vec(),
            shell: entry.shell.to_vec(),
        },
        (None, Some(uid)) => User { uid, ..User::default() },
        (None, None) => {
            return Err(Refusal::invalid(format!(
                "the image runs as user `{name}`, which its /etc/passwd does not know"
            )));
        }
    };
    match group_name {
        // As docker does: a group that is named replaces the supplementary ones.
        Some(wanted) => user.gid = group_id(wanted, group)?,
        None => user.groups = member_of(&user.name, group),
    }
    fill(&mut user);
    Ok(user)
}

fn group_id(wanted: &str, group: &[u8]) -> Result<u32, Refusal> {
    let found = groups(group).find(|(name, _, _)| *name == wanted.as_bytes());
    match (found, wanted.parse()) {
        (Some((_, gid, _)), _) | (None, Ok(gid)) => Ok(gid),
        (None, Err(_)) => Err(Refusal::invalid(format!(
            "the image runs as group `{wanted}`, which its /etc/group does not know"
        ))),
    }
}

fn member_of(name: &str, group: &[u8]) -> Vec<u32> {
    groups(group)
        .filter(|(_, _, members)| members.split(|&b| b == b',').any(|m| m == name.as_bytes()))
        .map(|(_, gid, _)| gid)
        .take(GROUPS_MAX)
        .collect()
}

fn fill(user: &mut User) {
    if user.name.is_empty() {
        user.name = if user.uid == 0 { "root".into() } else { user.uid.to_string() };
    }
    if user.home.is_empty() {
        user.home = if user.uid == 0 { b"/root".to_vec() } else { b"/".to_vec() };
    }
    if user.shell.is_empty() {
        user.shell = b"/bin/sh".to_vec();
    }
}

struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
    shell: &'a [u8],
}

fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    passwd.split(|&b| b == b'\n').filter_map(|line| {
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        let (home, shell) = (fields.nth(1)?, fields.next().unwrap_or_default());
        Some(Account { name, uid, gid, home, shell })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    group.split(|&b| b == b'\n').filter_map(|line| {
        let mut fields = line.split(|&b| b == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/bash\n\nbroken\nnode:x:1000:1001::/home/node:/bin/sh\n";
    const GROUP: &[u8] = b"root:x:0:\nnode:x:1001:\nwheel:x:10:other,node\ndocker:x:99:nodes\n";

    #[test]
    fn image_users_resolve_as_docker_resolves_them() {
        let ids = |spec: &str| {
            resolve(spec, PASSWD, GROUP).map(|user| (user.uid, user.gid, user.groups)).ok()
        };
        assert_eq!(ids(""), Some((0, 0, vec![])));
        assert_eq!(ids("node"), Some((1000, 1001, vec![10])));
        assert_eq!(ids("1000"), Some((1000, 1001, vec![10])));
        assert_eq!(ids("node:wheel"), Some((1000, 10, vec![])));
        assert_eq!(ids("4242:77"), Some((4242, 77, vec![])));
        assert_eq!(ids("nobody"), None);
        assert_eq!(ids("node:nogroup"), None);
    }

    #[test]
    fn account_files_that_are_traps_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let fd = std::fs::File::open(root.path()).unwrap();
        let files = RootFiles::beneath(fd.into());
        assert_eq!(of_image("", &files).unwrap().home, b"/root");

        // A fifo would block for ever, a link out of the root would read the agent's own files.
        let passwd = root.path().join("etc/passwd");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &passwd,
            FileType::Fifo,
            Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        assert_eq!(of_image("0", &files).unwrap().uid, 0);
        std::fs::remove_file(&passwd).unwrap();
        std::os::unix::fs::symlink("/../../etc/passwd", &passwd).unwrap();
        assert!(of_image("root", &files).is_err());
    }
}
