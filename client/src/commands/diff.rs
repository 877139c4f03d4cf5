//! `tow diff`: what a sandbox changed against its image.

use std::fmt::Write as _;

use clap::Args;
use serde_json::json;
use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, DiffDone, FileChange, FileChangeKind, FileType, PackageChange};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json as objects};
use crate::sandbox;
use crate::tunnel::diff::diff;
use crate::tunnel::guest::Guest;

/// Arguments of `tow diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Print an object per change
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: DiffArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = sandbox::find(&cluster, &args.name).await?;
    sandbox::must_run(&found, "compared")?;
    let guest = Guest::of(env, cluster, &found)?;
    let shown = env.printer.progress("comparing with the image");
    let (mut totals, printer) = (Totals::default(), &env.printer);
    let done = diff(&guest, |part| {
        shown.set(format!("comparing with the image: {} files looked at", part.looked_at));
        for change in &part.changes {
            totals.add(change);
            match printer.json() {
                true => printer.object(&change_object(&found, change))?,
                false => printer.answer(line(change))?,
            }
        }
        for package in &part.packages {
            match printer.json() {
                true => printer.object(&package_object(&found, package))?,
                false => printer.answer(package_line(package))?,
            }
        }
        Ok(())
    });
    let done = done.await?;
    drop(shown);
    printer.hint(totals.text(&done));
    Ok(Exit::OK)
}

/// What all changes are together.
#[derive(Debug, Default)]
struct Totals {
    added: u64,
    changed: u64,
    removed: u64,
    bytes: u64,
}

impl Totals {
    fn add(&mut self, change: &FileChange) {
        match change.kind() {
            FileChangeKind::Added => self.added += 1,
            FileChangeKind::Changed => self.changed += 1,
            FileChangeKind::Removed | FileChangeKind::Unspecified => self.removed += 1,
        }
        let has_bytes = change.r#type() == FileType::Regular
            && (change.kind() == FileChangeKind::Added || change.content_differs);
        if has_bytes {
            self.bytes = self.bytes.saturating_add(change.size);
        }
    }

    fn text(&self, done: &DiffDone) -> String {
        let mut text = format!(
            "{} added, {} changed, {} removed; {} of new content",
            self.added,
            self.changed,
            self.removed,
            human::bytes(self.bytes)
        );
        if done.sockets > 0 {
            let _ = write!(text, "; {} sockets are left out", done.sockets);
        }
        text
    }
}

/// As `docker diff` has it, with what it does not say after the path.
fn line(change: &FileChange) -> String {
    let letter = match change.kind() {
        FileChangeKind::Added => 'A',
        FileChangeKind::Changed => 'C',
        FileChangeKind::Removed | FileChangeKind::Unspecified => 'D',
    };
    let mut line = format!("{letter} {}", human::printable(&String::from_utf8_lossy(&change.path)));
    let is_directory = change.r#type() == FileType::Directory;
    if is_directory {
        line.push('/');
    }
    let mut more = Vec::new();
    if change.kind() == FileChangeKind::Changed {
        more.extend(differences(change).into_iter().map(str::to_owned));
    }
    if change.r#type() == FileType::Regular && change.kind() != FileChangeKind::Removed {
        let size = human::bytes(change.size);
        match change.content_differs && change.size != change.size_before {
            true => more.push(format!("{} -> {size}", human::bytes(change.size_before))),
            false => more.push(size),
        }
    } else if !is_directory && change.kind() != FileChangeKind::Removed {
        more.push(type_name(change.r#type()).to_owned());
    }
    if !more.is_empty() {
        let _ = write!(line, "  ({})", more.join(", "));
    }
    line
}

fn differences(change: &FileChange) -> Vec<&'static str> {
    [
        (change.type_differs, "type"),
        (change.content_differs, "content"),
        (change.mode_differs, "mode"),
        (change.owner_differs, "owner"),
        (change.xattrs_differ, "xattrs"),
        (change.links_differ, "names"),
    ]
    .into_iter()
    .filter_map(|(differs, what)| differs.then_some(what))
    .collect()
}

fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Regular | FileType::Unspecified => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Fifo => "fifo",
    }
}

fn package_line(package: &PackageChange) -> String {
    let (letter, versions) = match (&package.version_before[..], &package.version[..]) {
        ("", now) => ('A', now.to_owned()),
        (before, "") => ('D', before.to_owned()),
        (before, now) => ('C', format!("{before} -> {now}")),
    };
    let line = format!("{letter} {} package {} {versions}", package.manager, package_name(package));
    human::printable(&line)
}

fn package_name(package: &PackageChange) -> String {
    match &package.architecture[..] {
        "" | "all" | "noarch" => package.name.clone(),
        architecture => format!("{}:{architecture}", package.name),
    }
}

fn change_object(found: &v1::Sandbox, change: &FileChange) -> serde_json::Value {
    let kind = match change.kind() {
        FileChangeKind::Added => "added",
        FileChangeKind::Changed => "changed",
        FileChangeKind::Removed | FileChangeKind::Unspecified => "removed",
    };
    json!({
        "schema": "towline.file-change/1",
        "sandbox": sandbox::name(found),
        "sandbox_id": objects::id_text::<SandboxId>(&found.id),
        "path": String::from_utf8_lossy(&change.path),
        "change": kind,
        "type": type_name(change.r#type()),
        "size": change.size,
        "size_before": change.size_before,
        "differs": differences(change),
    })
}

fn package_object(found: &v1::Sandbox, package: &PackageChange) -> serde_json::Value {
    let version = |text: &String| (!text.is_empty()).then(|| text.clone());
    json!({
        "schema": "towline.package-change/1",
        "sandbox": sandbox::name(found),
        "sandbox_id": objects::id_text::<SandboxId>(&found.id),
        "manager": package.manager,
        "package": package.name,
        "architecture": package.architecture,
        "version_before": version(&package.version_before),
        "version": version(&package.version),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, kind: FileChangeKind, file: FileType) -> FileChange {
        FileChange {
            path: path.into(),
            kind: kind.into(),
            r#type: file.into(),
            ..FileChange::default()
        }
    }

    #[test]
    fn changes_are_told_as_docker_tells_them_and_more() {
        use FileChangeKind::{Added, Changed, Removed};
        let grown = FileChange {
            size: 2048,
            size_before: 12,
            content_differs: true,
            mode_differs: true,
            ..change("/etc/conf", Changed, FileType::Regular)
        };
        let mut totals = Totals::default();
        let cases = [
            (grown, "C /etc/conf  (content, mode, 12 B -> 2 KiB)"),
            (
                FileChange { size: 5, ..change("/opt/a\nb", Added, FileType::Regular) },
                "A /opt/a\u{fffd}b  (5 B)",
            ),
            (change("/opt", Added, FileType::Directory), "A /opt/"),
            (change("/opt/link", Added, FileType::Symlink), "A /opt/link  (symlink)"),
            (
                FileChange { owner_differs: true, ..change("/srv", Changed, FileType::Directory) },
                "C /srv/  (owner)",
            ),
            (change("/usr/games", Removed, FileType::Directory), "D /usr/games/"),
            (
                FileChange { size_before: 9, ..change("/usr/bin/x", Removed, FileType::Regular) },
                "D /usr/bin/x",
            ),
        ];
        for (change, text) in cases {
            totals.add(&change);
            assert_eq!(line(&change), text);
        }
        let done = DiffDone { sockets: 2, ..DiffDone::default() };
        assert_eq!(
            totals.text(&done),
            "3 added, 2 changed, 2 removed; 2 KiB of new content; 2 sockets are left out"
        );
    }

    /// What programs read: a change here is a change of the contract.
    #[test]
    fn changes_are_printed_as_reviewed() {
        let found = v1::Sandbox {
            id: SandboxId::from_parts(1, [0; 10]).to_vec(),
            spec: Some(v1::SandboxSpec { name: "web".into(), ..Default::default() }),
            ..Default::default()
        };
        let package = PackageChange {
            manager: "dpkg".into(),
            name: "jq".into(),
            architecture: "amd64".into(),
            version_before: String::new(),
            version: "1.6".into(),
        };
        assert_eq!(package_line(&package), "A dpkg package jq:amd64 1.6");
        let change = FileChange {
            size: 3,
            content_differs: true,
            ..change("/a", FileChangeKind::Changed, FileType::Regular)
        };
        insta::assert_json_snapshot!([
            change_object(&found, &change),
            package_object(&found, &package)
        ]);
    }
}
