//! Who commits are by, as git on this machine says for a folder: so that commits in a sandbox are by
//! the same person. Nothing where git is absent, slow or unconfigured.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use towline_proto::v1::GitIdentity;

/// A person waits for this; git reads a few files.
const GIT_MAX: Duration = Duration::from_secs(2);
/// Longest name or address, as the control plane bounds them.
const TEXT_MAX: usize = 256;

/// Returns the identity that is effective in a folder.
pub async fn identity(folder: &Path) -> Option<GitIdentity> {
    let mut git = Command::new("git");
    git.args(["config", "--null", "--get-regexp", r"^user\.(name|email)$"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(GIT_MAX, git.output()).await.ok()?.ok()?;
    read(&output.stdout)
}

/// Records of `key LF value NUL`; the last of a key is the one in effect.
fn read(output: &[u8]) -> Option<GitIdentity> {
    let mut identity = GitIdentity::default();
    for record in output.split(|&b| b == 0) {
        let Some((key, value)) = std::str::from_utf8(record).ok().and_then(|r| r.split_once('\n'))
        else {
            continue;
        };
        if value.len() > TEXT_MAX || value.chars().any(char::is_control) {
            continue;
        }
        match key {
            "user.name" => value.clone_into(&mut identity.name),
            "user.email" => value.clone_into(&mut identity.email),
            _ => {}
        }
    }
    (identity != GitIdentity::default()).then_some(identity)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stderr, reason = "says what was skipped")]

    use super::*;

    #[test]
    fn the_last_value_of_each_key_counts_and_odd_ones_do_not() {
        let output = b"user.name\nOld\0user.email\na@example.org\0user.name\nAda \"B\" L\0";
        let identity = read(output).unwrap();
        assert_eq!(
            (identity.name.as_str(), identity.email.as_str()),
            ("Ada \"B\" L", "a@example.org")
        );
        assert_eq!(read(b""), None);
        assert_eq!(read(b"user.name\nA\nB\0"), None, "a line break is no name");
        assert_eq!(read(b"user.name\0"), None, "a key without a value");
    }

    #[tokio::test]
    async fn a_folders_own_identity_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let run = |args: &[&str]| {
            let mut git = std::process::Command::new("git");
            git.args(args).current_dir(folder.path()).output()
        };
        if run(&["init", "--quiet"]).is_err() {
            eprintln!("SKIPPED: git is not installed");
            return;
        }
        run(&["config", "user.name", "Ada in here"]).unwrap();
        run(&["config", "user.email", "ada@example.org"]).unwrap();
        let identity = identity(folder.path()).await.unwrap();
        assert_eq!(
            (identity.name.as_str(), identity.email.as_str()),
            ("Ada in here", "ada@example.org")
        );
    }
}
