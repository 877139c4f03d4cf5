//! Who is at the laptop: name, ids, home and shell, as the system's user database knows them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{getgid, getgroups, getuid};
use towline_proto::v1;

use crate::env_vars;
use crate::error::Failure;

/// Longest name that an identity may have (`towline_link::identity::NAME_MAX`).
const NAME_MAX: usize = towline_link::identity::NAME_MAX;

/// Returns the user that runs `tow`.
pub fn current() -> anyhow::Result<v1::User> {
    let uid = getuid().as_raw();
    let record = from_file(uid).or_else(|| from_name_service(uid)).ok_or_else(|| {
        Failure::new(format!("the user database does not know uid {uid}"))
            .hint("run `tow` as a user that `getent passwd` lists, or use an image with --image")
    })?;
    let home = home_of_environment().map(|home| home.into_os_string().into_vec());
    Ok(v1::User {
        gid: getgid().as_raw(),
        groups: getgroups()?.into_iter().map(rustix::process::Gid::as_raw).collect(),
        home: home.unwrap_or(record.home),
        ..record
    })
}

fn home_of_environment() -> Option<PathBuf> {
    env_vars::get(env_vars::HOME).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Reads `--user`: `root`, or `UID[:GID]`; the guest knows what belongs to a number.
pub fn parse_typed(text: &str) -> Result<v1::User, String> {
    let wrong = || format!("`{text}` is not a user: write root, or a number as UID[:GID]");
    let (uid, gid) = text.split_once(':').unwrap_or((text, ""));
    let uid: u32 = if uid == "root" { 0 } else { uid.parse().map_err(|_| wrong())? };
    let gid = if gid.is_empty() { uid } else { gid.parse().map_err(|_| wrong())? };
    Ok(v1::User { uid, gid, ..Default::default() })
}

/// Returns the home directory: `HOME`, else the user database's.
pub fn home() -> Option<PathBuf> {
    home_of_environment().or_else(|| Some(PathBuf::from(OsString::from_vec(current().ok()?.home))))
}

/// Returns our name as an identity may hold it.
pub fn identity_name() -> String {
    let name = current().map(|user| user.name).unwrap_or_default();
    let clean: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .take(NAME_MAX)
        .collect();
    match towline_link::identity::check_name(&clean) {
        Ok(()) => clean,
        Err(_) => format!("uid-{}", getuid().as_raw()),
    }
}

fn from_file(uid: u32) -> Option<v1::User> {
    parse(&fs::read("/etc/passwd").ok()?, uid)
}

/// Directories such as LDAP are asked through `getent`, which knows how.
fn from_name_service(uid: u32) -> Option<v1::User> {
    let output = Command::new("getent")
        .args(["passwd", &uid.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    parse(&output.stdout, uid)
}

fn parse(passwd: &[u8], uid: u32) -> Option<v1::User> {
    passwd.split(|&b| b == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&b| b == b':').collect();
        let [name, _, id, gid, _, home, shell] = fields[..] else { return None };
        let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<u32>().ok();
        (number(id)? == uid).then_some(())?;
        let shell = if shell.is_empty() { b"/bin/sh" } else { shell };
        Some(v1::User {
            name: std::ffi::OsStr::from_bytes(name).to_str()?.to_owned(),
            uid,
            gid: number(gid)?,
            groups: Vec::new(),
            home: home.to_vec(),
            shell: shell.to_vec(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_user_database() {
        let text = b"root:x:0:0:root:/root:/bin/bash\nbad line\nme:x:1000:100::/home/me:\n";
        let me = parse(text, 1000).unwrap();
        assert_eq!((me.name.as_str(), me.gid), ("me", 100));
        assert_eq!((&me.home[..], &me.shell[..]), (&b"/home/me"[..], &b"/bin/sh"[..]));
        assert!(parse(text, 7).is_none());
    }

    #[test]
    fn typed_users_are_root_or_numbers() {
        assert_eq!(parse_typed("root").map(|user| (user.uid, user.gid)), Ok((0, 0)));
        assert_eq!(parse_typed("1000:7").map(|user| (user.uid, user.gid)), Ok((1000, 7)));
        assert!(
            parse_typed("me").is_err() && parse_typed("").is_err() && parse_typed("1:x").is_err()
        );
    }

    #[test]
    fn the_identity_name_is_always_allowed() {
        towline_link::identity::check_name(&identity_name()).unwrap();
    }
}
