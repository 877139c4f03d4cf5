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
    Ok(v1::User {
        gid: getgid().as_raw(),
        groups: getgroups()?.into_iter().map(rustix::process::Gid::as_raw).collect(),
        ..record
    })
}

/// Returns the home directory: `HOME`, else the user database's.
pub fn home() -> Option<PathBuf> {
    let from_env = env_vars::get(env_vars::HOME).map(PathBuf::from).filter(|p| p.is_absolute());
    from_env.or_else(|| Some(PathBuf::from(OsString::from_vec(current().ok()?.home))))
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
    fn the_identity_name_is_always_allowed() {
        towline_link::identity::check_name(&identity_name()).unwrap();
    }
}
