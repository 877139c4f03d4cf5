//! Classes of paths: what is synced, what stays on its own side, and what is never looked at.
//!
//! Pure: rule files come in as bytes, from the root downwards. `.gitignore` has git's grammar and
//! counts inside a git repository only; `.towignore` has the same grammar, counts everywhere and is
//! stronger. An ignored path stays on the side where it is; a path that git tracks is never ignored.

use std::path::Path;

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::git_index::Tracked;
use crate::path::TreePath;

/// Largest rule file that is read.
pub const RULES_BYTES_MAX: usize = 1 << 20;

/// Where ends keep what is theirs, at the root of a folder.
pub const OWN_NAMES: [&[u8]; 2] = [b".tow", b".tow-stage"];

/// What happens to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// It goes both ways.
    Sync,
    /// It stays on its side because an ignore rule says so.
    Ignored,
    /// It is nobody's business: editor locks, git's locks, our own.
    Never,
    /// It looks like a secret by its name and does not go up.
    Secret,
    /// It is a secret if it holds a private key.
    SecretIfKey,
}

/// The rules that hold at one place of a tree while it is walked.
#[derive(Debug)]
pub struct Rules {
    git: bool,
    secrets_stay: bool,
    outside: Gitignore,
    tracked: Tracked,
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    directory: Option<TreePath>,
    tow: Gitignore,
    git: Gitignore,
    /// The directory itself is ignored: only what git tracks counts in it.
    ignored: bool,
}

/// Rule files of one directory; empty where there are none.
#[derive(Debug, Default)]
pub struct RuleFiles {
    /// `.gitignore`.
    pub git: Vec<u8>,
    /// `.towignore`.
    pub tow: Vec<u8>,
}

impl Rules {
    /// Rules for a tree. `git`: it is part of a git repository. `secrets_stay`: this is the laptop.
    /// `outside`: rules of the user and of `.git/info/exclude`.
    pub fn new(git: bool, secrets_stay: bool, outside: &[u8], tracked: Tracked) -> Self {
        Self { git, secrets_stay, outside: compile(outside), tracked, levels: Vec::new() }
    }

    /// Enters a directory (`None`: the root) that has these rule files.
    pub fn enter(&mut self, directory: Option<TreePath>, files: &RuleFiles, ignored: bool) {
        let git = if self.git { compile(&files.git) } else { Gitignore::empty() };
        self.levels.push(Level { directory, tow: compile(&files.tow), git, ignored });
    }

    /// Leaves the directory that was entered last.
    pub fn leave(&mut self) {
        self.levels.pop();
    }

    /// Whether an ignored directory must be entered all the same.
    pub fn tracks_below(&self, directory: &TreePath) -> bool {
        self.tracked.has_below(directory)
    }

    /// The class of a path in the directory that was entered last.
    pub fn class(&self, path: &TreePath, is_directory: bool) -> Class {
        if is_nobodys(path) {
            return Class::Never;
        }
        if path.components().any(|name| name == b".git") || self.tracked.contains(path) {
            return Class::Sync;
        }
        match self.verdict(path, is_directory) {
            Some(true) => Class::Ignored,
            Some(false) => Class::Sync,
            None if self.secrets_stay && !is_directory => secret(path),
            None => Class::Sync,
        }
    }

    /// `Some(false)`: a `.towignore` lets it through by name.
    fn verdict(&self, path: &TreePath, is_directory: bool) -> Option<bool> {
        if self.levels.last().is_some_and(|level| level.ignored) {
            return Some(true);
        }
        if let Some(verdict) = self.innermost(path, is_directory, |level| &level.tow) {
            return Some(verdict);
        }
        let git = self.innermost(path, is_directory, |level| &level.git);
        let outside = || answer(&self.outside, path.as_path(), is_directory);
        git.or_else(outside).filter(|ignored| *ignored)
    }

    fn innermost(
        &self,
        path: &TreePath,
        is_directory: bool,
        of: impl Fn(&Level) -> &Gitignore,
    ) -> Option<bool> {
        self.levels.iter().rev().find_map(|level| {
            let skip =
                level.directory.as_ref().map_or(0, |directory| directory.as_bytes().len() + 1);
            let inside = std::os::unix::ffi::OsStrExt::from_bytes(&path.as_bytes()[skip..]);
            let inside: &std::ffi::OsStr = inside;
            answer(of(level), Path::new(inside), is_directory)
        })
    }
}

fn answer(rules: &Gitignore, path: &Path, is_directory: bool) -> Option<bool> {
    let verdict = rules.matched(path, is_directory);
    if verdict.is_ignore() {
        Some(true)
    } else if verdict.is_whitelist() {
        Some(false)
    } else {
        None
    }
}

/// Lines that are no rules are left out, as git does.
fn compile(text: &[u8]) -> Gitignore {
    if text.is_empty() {
        return Gitignore::empty();
    }
    let mut builder = GitignoreBuilder::new("");
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    for line in text[..text.len().min(RULES_BYTES_MAX)].split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Ok(line) = std::str::from_utf8(line) {
            let _ = builder.add_line(None, line);
        }
    }
    builder.build().unwrap_or_else(|_| Gitignore::empty())
}

/// Files that only mean something to a process on their own side.
pub fn is_nobodys(path: &TreePath) -> bool {
    let name = path.name();
    if path.components().next().is_some_and(|first| OWN_NAMES.contains(&first)) {
        return true;
    }
    if path.components().any(|component| component == b".git") {
        return is_git_lock(path)
            || name == b"gc.pid"
            || path.components().any(|component| component.starts_with(b"fsmonitor--daemon"));
    }
    name == b".DS_Store"
        || name.starts_with(b".#")
        || (name.starts_with(b".") && (name.ends_with(b".swp") || name.ends_with(b".swo")))
}

/// Whether it is a lock by which git commands keep each other out.
pub fn is_git_lock(path: &TreePath) -> bool {
    path.name().ends_with(b".lock") && path.components().any(|name| name == b".git")
}

/// Names that usually hold secrets. Examples and templates of them do not.
fn secret(path: &TreePath) -> Class {
    let name = path.name().to_ascii_lowercase();
    let harmless = [&b"example"[..], b"sample", b"template", b"dist", b"defaults"];
    if let Some(rest) = name.strip_prefix(b".env") {
        let is_env = rest.is_empty() || rest[0] == b'.';
        let is_example = rest.split(|byte| *byte == b'.').any(|word| harmless.contains(&word));
        return if is_env && !is_example { Class::Secret } else { Class::Sync };
    }
    let secrets = [
        &b"id_rsa"[..],
        b"id_dsa",
        b"id_ecdsa",
        b"id_ed25519",
        b"id_ecdsa_sk",
        b"id_ed25519_sk",
        b".netrc",
        b".pgpass",
        b".git-credentials",
        b".vault-token",
    ];
    if secrets.contains(&&name[..]) {
        return Class::Secret;
    }
    if name.ends_with(b".pem") || name.ends_with(b".key") {
        Class::SecretIfKey
    } else {
        Class::Sync
    }
}

/// Whether the beginning of a file shows a private key in one of the text forms.
pub fn holds_private_key(beginning: &[u8]) -> bool {
    beginning.windows(16).any(|window| window == b"PRIVATE KEY-----")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::from_bytes(text.as_bytes()).unwrap()
    }

    fn rules(git: bool, gitignore: &str, towignore: &str) -> Rules {
        let mut rules = Rules::new(git, true, b"*.global\n", Tracked::default());
        let files = RuleFiles { git: gitignore.into(), tow: towignore.into() };
        rules.enter(None, &files, false);
        rules
    }

    #[test]
    fn gitignore_counts_in_a_repository_only() {
        let git = rules(true, "/target\n*.log\n!keep.log\nbuild/\n", "");
        assert_eq!(git.class(&path("target"), true), Class::Ignored);
        assert_eq!(git.class(&path("src/target"), true), Class::Sync);
        assert_eq!(git.class(&path("a/b.log"), false), Class::Ignored);
        assert_eq!(git.class(&path("keep.log"), false), Class::Sync);
        assert_eq!(git.class(&path("build"), false), Class::Sync, "the rule is for directories");
        assert_eq!(git.class(&path("x.global"), false), Class::Ignored);
        let plain = rules(false, "/target\n", "");
        assert_eq!(plain.class(&path("target"), true), Class::Sync);
    }

    #[test]
    fn towignore_is_stronger_and_inner_levels_win() {
        let mut rules = rules(true, "*.o\n.env\n", "!special.o\n/big\n!.env\n");
        assert_eq!(rules.class(&path("special.o"), false), Class::Sync);
        assert_eq!(rules.class(&path("big"), true), Class::Ignored);
        assert_eq!(rules.class(&path(".env"), false), Class::Sync, "let through by name");
        let files = RuleFiles { git: b"!*.o\n/gen\n".to_vec(), tow: Vec::new() };
        rules.enter(Some(path("sub")), &files, false);
        assert_eq!(rules.class(&path("sub/x.o"), false), Class::Sync);
        assert_eq!(rules.class(&path("sub/gen"), false), Class::Ignored);
        rules.leave();
        assert_eq!(rules.class(&path("gen"), false), Class::Sync);
    }

    #[test]
    fn secrets_locks_and_our_own_stay() {
        let rules = rules(true, "", "");
        for name in [".env", ".env.local", "a/.ENV", "id_ed25519", ".netrc"] {
            assert_eq!(rules.class(&path(name), false), Class::Secret, "{name}");
        }
        for name in [".env.example", "env", "id_map.rs", ".envoy.yaml", ".environment", "key.pub"] {
            assert_eq!(rules.class(&path(name), false), Class::Sync, "{name}");
        }
        assert_eq!(rules.class(&path("tls/server.pem"), false), Class::SecretIfKey);
        for name in [".git/index.lock", ".git/gc.pid", ".tow/conflicts", ".tow-stage", ".a.swp"] {
            assert_eq!(rules.class(&path(name), false), Class::Never, "{name}");
        }
        assert_eq!(rules.class(&path(".git/config"), false), Class::Sync);
        assert_eq!(rules.class(&path("a/.tow"), true), Class::Sync);
        assert!(holds_private_key(b"x\n-----BEGIN RSA PRIVATE KEY-----\nMII"));
        assert!(!holds_private_key(b"-----BEGIN CERTIFICATE-----"));
    }

    #[test]
    fn names_that_are_not_text_are_matched_too() {
        let rules = rules(true, "*.log\n", "");
        assert_eq!(
            rules.class(&TreePath::from_bytes(b"\xff\xfe.log").unwrap(), false),
            Class::Ignored
        );
    }
}
