//! What a barrier did, and the few lines of it that people should read.

use std::path::PathBuf;

use towline_filesync::TreePath;
use towline_filesync::guard::Held;

/// Most paths that one line names.
const NAMED: usize = 3;

/// What a barrier did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Paths that went to the sandbox.
    pub went_up: usize,
    /// Paths that came to the laptop.
    pub came_down: usize,
    /// Paths removed in the sandbox.
    pub removed_there: usize,
    /// Paths removed on the laptop.
    pub removed_here: usize,
    /// Bytes of content moved, both ways.
    pub bytes: u64,
    /// The sandbox's versions that were kept aside: the path, and where its version lies.
    pub conflicts: Vec<(TreePath, PathBuf)>,
    /// What the sandbox changed and this machine does not take.
    pub held: Vec<(TreePath, Held)>,
    /// Ignored paths in the sandbox.
    pub ignored_count: u64,
    /// The first of them.
    pub ignored: Vec<TreePath>,
    /// What looks like a secret and did not go up.
    pub secrets: Vec<TreePath>,
    /// What did not go up because the sandbox itself changed the ignore rules that kept it back.
    pub kept_back: Vec<TreePath>,
    /// What cannot be synced, and why.
    pub skipped: Vec<(TreePath, String)>,
    /// What failed, and why.
    pub failed: Vec<(TreePath, String)>,
    /// What did not stop changing.
    pub unsettled: Vec<TreePath>,
}

impl Report {
    /// The lines to show, most important first.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, aside) in &self.conflicts {
            let aside = aside.display();
            lines.push(format!("conflict: {path} changed on both sides; this machine's stays, the sandbox's is in {aside}"));
        }
        lines.truncate(20);
        if self.conflicts.len() > 20 {
            lines.push(format!("conflict: {} more, see .tow/conflicts", self.conflicts.len() - 20));
        }
        for (held, paths) in by_reason(&self.held) {
            lines.push(format!("held: {} ({})", named(&paths), held.reason()));
        }
        for (reason, paths) in by_reason(&self.failed) {
            lines.push(format!("not synced: {} ({reason})", named(&paths)));
        }
        if !self.unsettled.is_empty() {
            let paths: Vec<&TreePath> = self.unsettled.iter().collect();
            lines.push(format!("not synced yet: {} (still changing)", named(&paths)));
        }
        for (reason, paths) in by_reason(&self.skipped) {
            lines.push(format!("not synced: {} ({reason})", named(&paths)));
        }
        lines.extend(self.stayed_here());
        if self.ignored_count > 0 {
            let paths: Vec<&TreePath> = self.ignored.iter().collect();
            let count = counted(self.ignored_count, "ignored path");
            let more =
                if self.ignored_count > NAMED.min(paths.len()) as u64 { ", …" } else { "" };
            let names: Vec<String> = paths.iter().take(NAMED).map(ToString::to_string).collect();
            lines.push(format!("{count} stayed in the sandbox ({}{more})", names.join(", ")));
        }
        lines
    }

    fn stayed_here(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.secrets.is_empty() {
            let paths: Vec<&TreePath> = self.secrets.iter().collect();
            let first = String::from_utf8_lossy(self.secrets[0].name()).into_owned();
            lines.push(format!(
                "stayed here: {} (looks like a secret; a line `!{first}` in .towignore lets it go up)",
                named(&paths)
            ));
        }
        if !self.kept_back.is_empty() {
            let paths: Vec<&TreePath> = self.kept_back.iter().collect();
            lines.push(format!(
                "stayed here: {} (ignored until the sandbox changed the ignore rules; edit them here to let it go up)",
                named(&paths)
            ));
        }
        lines
    }
}

fn by_reason<R: PartialEq>(items: &[(TreePath, R)]) -> Vec<(&R, Vec<&TreePath>)> {
    let mut groups: Vec<(&R, Vec<&TreePath>)> = Vec::new();
    for (path, reason) in items {
        match groups.iter_mut().find(|(other, _)| *other == reason) {
            Some((_, paths)) => paths.push(path),
            None => groups.push((reason, vec![path])),
        }
    }
    groups
}

/// The first few of these paths; what lies below a named one is not named again.
fn named(paths: &[&TreePath]) -> String {
    let tops: Vec<&&TreePath> =
        paths.iter().filter(|path| !paths.iter().any(|other| path.is_below(other))).collect();
    let mut text: Vec<String> = tops.iter().take(NAMED).map(ToString::to_string).collect();
    if tops.len() > NAMED {
        text.push(format!("and {} more", tops.len() - NAMED));
    }
    text.join(", ")
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath::from_bytes(text.as_bytes()).unwrap()
    }

    #[test]
    fn lines_are_few_and_say_what_to_do() {
        let report = Report {
            held: vec![
                (path(".git/hooks"), Held::Git),
                (path(".git/hooks/pre-commit"), Held::Git),
                (path("l"), Held::Symlink),
            ],
            ignored_count: 5,
            ignored: vec![path("target"), path("a.log")],
            secrets: vec![path("sub/.env")],
            ..Report::default()
        };
        assert_eq!(
            report.lines(),
            [
                "held: .git/hooks (git could run code from it)",
                "held: l (the symlink leaves the folder)",
                "stayed here: sub/.env (looks like a secret; a line `!.env` in .towignore lets it go up)",
                "5 ignored paths stayed in the sandbox (target, a.log, …)",
            ]
        );
    }
}
