//! Guarded paths and symlinks: what a sandbox may not put on the laptop by itself, because it could
//! run code there or lead out of the folder. It is held, and said.
//!
//! Pure. Inside `.git` the rule is a list of what may pass; elsewhere a list of what may not. Names
//! are compared as the most generous file system would: case, ignorable characters, `git~1`.

use crate::path::TreePath;

/// Why a path is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Held {
    /// Git would run it, or be led elsewhere by it.
    Git,
    /// A tool or shell on the laptop would run it, or Towline would obey it.
    Tool,
    /// A symlink that is absolute or leaves the folder.
    Symlink,
    /// A git command holds a lock.
    GitLocked,
    /// Most of the folder vanished at once.
    MassDeletion,
    /// It only ever goes up.
    UpOnly,
}

impl Held {
    /// In words, after the path.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Git => "git could run code from it",
            Self::Tool => "a tool on this machine could run code from it",
            Self::Symlink => "the symlink leaves the folder",
            Self::GitLocked => "a git command in progress holds a lock",
            Self::MassDeletion => "more than half of the folder vanished at once",
            Self::UpOnly => "it only goes up",
        }
    }
}

/// Directories that are guarded with all that is in them, at any depth.
const DIRECTORIES: &[&str] =
    &[".vscode", ".idea", ".husky", ".devcontainer", ".zed", ".nvim", ".githooks", ".direnv"];

/// Files that are guarded at any depth.
const FILES: &[&str] = &[
    ".envrc",
    ".npmrc",
    ".yarnrc",
    ".yarnrc.yml",
    ".pnpmfile.cjs",
    ".gdbinit",
    ".lldbinit",
    ".exrc",
    ".vimrc",
    ".nvimrc",
    ".nvim.lua",
    ".dir-locals.el",
    ".bashrc",
    ".bash_profile",
    ".bash_login",
    ".bash_logout",
    ".bash_aliases",
    ".profile",
    ".zshrc",
    ".zshenv",
    ".zprofile",
    ".zlogin",
    ".zlogout",
    ".kshrc",
    ".mkshrc",
    ".cshrc",
    ".tcshrc",
    ".login",
    ".inputrc",
    ".tmux.conf",
    ".screenrc",
    ".gitconfig",
    ".mise.toml",
    "mise.toml",
    ".pypirc",
    ".netrc",
    ".towignore",
    "towline.toml",
];

/// What may pass inside a git directory: data that git only reads as data.
const GIT_PASSES: &[&str] = &[
    "objects",
    "refs",
    "logs",
    "head",
    "packed-refs",
    "orig_head",
    "fetch_head",
    "merge_head",
    "cherry_pick_head",
    "revert_head",
    "commit_editmsg",
    "merge_msg",
    "squash_msg",
    "tag_editmsg",
    "merge_mode",
    "auto_merge",
    "shallow",
    "description",
    "branches",
    "reftable",
];

/// Whether the sandbox's version of this path is held, and why. `is_git_dir` says whether a
/// directory has the make-up of a bare repository (HEAD, objects, refs), which git obeys too.
pub fn guarded(path: &TreePath, is_git_dir: impl Fn(&TreePath) -> bool) -> Option<Held> {
    let names: Vec<String> = path.components().map(fold).collect();
    for (at, name) in names.iter().enumerate() {
        if is_dot_git(name) {
            return guarded_in_git(&names[at + 1..]);
        }
        if DIRECTORIES.contains(&name.as_str()) {
            return Some(Held::Tool);
        }
        if name == ".cargo" && names.get(at + 1).is_none_or(|next| next.starts_with("config")) {
            return names.get(at + 1).map(|_| Held::Tool);
        }
        if name == ".config" && names.get(at + 1).is_some_and(|next| next == "fish") {
            return Some(Held::Tool);
        }
    }
    if names.last().is_some_and(|name| FILES.contains(&name.as_str())) {
        return Some(Held::Tool);
    }
    in_bare_repository(path, &names, is_git_dir)
}

/// Whether this is the index of a repository: it goes up, whole, and never comes down.
pub fn goes_up_only(path: &TreePath) -> bool {
    let mut names = path.components().rev();
    names.next().is_some_and(|name| name == b"index")
        && names.next().is_some_and(|name| name == b".git")
}

/// Whether this says where a repository's branches are: it waits while git holds a lock.
pub fn waits_for_git(path: &TreePath) -> bool {
    let mut inside = path.components().skip_while(|name| *name != b".git").skip(1);
    inside.next().is_some_and(|name| {
        name == b"refs" || name == b"packed-refs" || name == b"index" || name.ends_with(b"HEAD")
    })
}

/// Whether a symlink at `path` with this target would lead out of the folder. After the first
/// ordinary component no `..` is allowed: that component may be a symlink itself.
pub fn leaves(path: &TreePath, target: &[u8]) -> bool {
    if target.is_empty() || target[0] == b'/' {
        return true;
    }
    let mut above = path.depth() - 1;
    let mut went_down = false;
    for component in target.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if went_down || above == 0 => return true,
            b".." => above -= 1,
            _ => went_down = true,
        }
    }
    false
}

/// Symlinks inside git directories and under guarded names are held whatever their target.
pub fn symlink_held(path: &TreePath, target: &[u8]) -> Option<Held> {
    let in_git = path.components().any(|name| is_dot_git(&fold(name)));
    (in_git || leaves(path, target)).then_some(if in_git { Held::Git } else { Held::Symlink })
}

fn guarded_in_git(inside: &[String]) -> Option<Held> {
    let Some(first) = inside.first() else {
        // `.git` itself: a directory passes, anything else is caught by `dot_git_held`.
        return None;
    };
    let rest = &inside[1..];
    match first.as_str() {
        "modules" => guarded_in_modules(rest),
        "objects" => {
            let leads_elsewhere = rest.first().is_some_and(|name| name == "info")
                && rest.get(1).is_some_and(|name| name.contains("alternates"));
            leads_elsewhere.then_some(Held::Git)
        }
        "info" => {
            let passes = rest.first().is_none_or(|name| name == "exclude" || name == "refs");
            (!passes).then_some(Held::Git)
        }
        "index" if rest.is_empty() => None,
        name if GIT_PASSES.contains(&name) => None,
        _ => Some(Held::Git),
    }
}

/// `modules/NAME`, where a name may have several components, is a git directory of its own.
fn guarded_in_modules(rest: &[String]) -> Option<Held> {
    let plain = |name: &String| GIT_PASSES.contains(&name.as_str()) && name != "branches";
    if rest.iter().skip(1).any(plain) {
        let leads_elsewhere = rest.iter().any(|name| name.contains("alternates"));
        return leads_elsewhere.then_some(Held::Git);
    }
    // Directories on the way to it carry nothing by themselves.
    (rest.len() > 1).then_some(Held::Git)
}

/// Whether an entry at this path that is not a directory stands in for a `.git` directory.
pub fn dot_git_held(path: &TreePath) -> Option<Held> {
    is_dot_git(&fold(path.name())).then_some(Held::Git)
}

fn in_bare_repository(
    path: &TreePath,
    names: &[String],
    is_git_dir: impl Fn(&TreePath) -> bool,
) -> Option<Held> {
    let mut directory = path.parent();
    let mut inside = names.len() - 1;
    while let Some(parent) = directory {
        if is_git_dir(&parent) {
            return guarded_in_git(&names[inside..]);
        }
        inside -= 1;
        directory = parent.parent();
    }
    None
}

fn is_dot_git(folded: &str) -> bool {
    folded == ".git" || folded == "git~1"
}

/// A name as the most generous file system would see it.
fn fold(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let folded: String =
        name.chars().filter(|c| !is_ignorable(*c)).flat_map(char::to_lowercase).collect();
    folded.trim_end_matches(['.', ' ']).to_owned()
}

/// Characters that HFS+ leaves out of comparisons.
fn is_ignorable(character: char) -> bool {
    matches!(character, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(path: &str) -> bool {
        let path = TreePath::from_bytes(path.as_bytes()).unwrap();
        guarded(&path, |_| false).is_some()
    }

    #[test]
    fn what_could_run_code_is_held_under_every_spelling() {
        for path in [
            ".git/hooks/pre-commit",
            ".git/hooks",
            ".git/config",
            ".git/config.worktree",
            ".GIT/config",
            ".g\u{200c}it/hooks/x",
            "git~1/config",
            "sub/.git/config",
            ".Git /hooks/x",
            ".git/info/attributes",
            ".git/modules/a/config",
            ".git/modules/a/b/hooks/x",
            ".git/objects/info/alternates",
            ".git/commondir",
            ".git/rebase-merge/git-rebase-todo",
            ".git/worktrees/w/commondir",
            ".envrc",
            "a/.ENVRC",
            ".vscode/tasks.json",
            ".vscode",
            ".idea/x",
            ".husky/pre-push",
            ".devcontainer/devcontainer.json",
            ".cargo/config",
            ".cargo/config.toml",
            "x/.cargo/CONFIG.TOML",
            ".npmrc",
            ".bashrc",
            "home/.zshrc",
            ".config/fish/config.fish",
            ".towignore",
            "towline.toml",
            ".git/unheard-of",
            ".git/modules/a/config.worktree",
        ] {
            assert!(held(path), "{path}");
        }
    }

    #[test]
    fn ordinary_paths_and_git_data_pass() {
        for path in [
            "src/main.rs",
            ".git",
            ".git/HEAD",
            ".git/refs/heads/main",
            ".git/objects/ab/cdef",
            ".git/objects/info/packs",
            ".git/packed-refs",
            ".git/logs/HEAD",
            ".gitignore",
            ".git/modules/a/objects/12/34",
            ".git/modules",
            ".git/modules/a",
            ".git/info/exclude",
            ".cargo/registry",
            ".cargo",
            "config",
            "hooks/x",
            ".github/workflows/ci.yml",
            ".env",
        ] {
            assert!(!held(path), "{path}");
        }
    }

    #[test]
    fn a_bare_repository_is_guarded_like_any() {
        let bare = TreePath::from_bytes(b"a/b").unwrap();
        let check = |path: &[u8]| {
            guarded(&TreePath::from_bytes(path).unwrap(), |directory| *directory == bare).is_some()
        };
        assert!(check(b"a/b/config"));
        assert!(check(b"a/b/hooks/post-checkout"));
        assert!(!check(b"a/b/objects/12/3"));
        assert!(!check(b"a/config"));
    }

    #[test]
    fn symlinks_that_could_leave_are_known() {
        let leaves = |path: &str, target: &str| {
            super::leaves(&TreePath::from_bytes(path.as_bytes()).unwrap(), target.as_bytes())
        };
        assert!(!leaves("a", "b"));
        assert!(!leaves("d/a", "../b"));
        assert!(!leaves("d/e/a", "../../b/c"));
        assert!(!leaves("a", "./b//c"));
        assert!(leaves("a", "/etc/passwd"));
        assert!(leaves("a", ".."));
        assert!(leaves("d/a", "../../x"));
        assert!(leaves("a", "b/../c"), "`b` may be a symlink");
        assert!(leaves("p/q/a", "../../b/../.."));
    }
}
