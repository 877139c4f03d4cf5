//! Which packages of the distribution were added, removed or replaced: from the lists that dpkg and
//! apk keep, before and now.
//!
//! The lists belong to the workload: read up to a bound, and what makes no sense is skipped.

use std::collections::BTreeMap;
use std::io;

use crate::credentials::RootFiles;

/// Most bytes read of a list.
const LIST_MAX: u64 = 32 << 20;
/// Packages that are told of, and bytes of a name or version.
const PACKAGES_MAX: usize = 100_000;
const TEXT_MAX: usize = 256;

/// A package manager whose list is read, by path and by the names of its fields.
struct Manager {
    name: &'static str,
    list: &'static str,
    package: &'static [u8],
    version: &'static [u8],
    architecture: &'static [u8],
    /// The field that says whether it is installed, and how it ends then.
    status: Option<(&'static [u8], &'static [u8])>,
}

const MANAGERS: [Manager; 2] = [
    Manager {
        name: "dpkg",
        list: "var/lib/dpkg/status",
        package: b"Package",
        version: b"Version",
        architecture: b"Architecture",
        status: Some((b"Status", b" installed")),
    },
    Manager {
        name: "apk",
        list: "lib/apk/db/installed",
        package: b"P",
        version: b"V",
        architecture: b"A",
        status: None,
    },
];

/// One package: its manager, name and architecture; and its versions, where it was or is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackageChange {
    pub(crate) manager: &'static str,
    pub(crate) name: String,
    pub(crate) architecture: String,
    pub(crate) before: Option<String>,
    pub(crate) now: Option<String>,
}

/// What changed between two roots, by manager and name.
pub(crate) fn packages_changed(
    before: &RootFiles,
    now: &RootFiles,
) -> io::Result<Vec<PackageChange>> {
    let mut changed = Vec::new();
    for manager in &MANAGERS {
        let (before, now) = (manager.packages(before)?, manager.packages(now)?);
        changed.extend(differences(manager.name, before, now));
    }
    Ok(changed)
}

/// Versions by name and architecture.
type Packages = BTreeMap<(String, String), String>;

fn differences(
    manager: &'static str,
    mut before: Packages,
    now: Packages,
) -> impl Iterator<Item = PackageChange> {
    let mut all: BTreeMap<_, (Option<String>, Option<String>)> = BTreeMap::new();
    for (key, version) in now {
        let was = before.remove(&key);
        if was.as_ref() != Some(&version) {
            all.insert(key, (was, Some(version)));
        }
    }
    all.extend(before.into_iter().map(|(key, version)| (key, (Some(version), None))));
    all.into_iter().map(move |((name, architecture), (before, now))| PackageChange {
        manager,
        name,
        architecture,
        before,
        now,
    })
}

impl Manager {
    fn packages(&self, root: &RootFiles) -> io::Result<Packages> {
        Ok(self.parse(&root.read_up_to(self.list, LIST_MAX)?))
    }

    /// Paragraphs of `Field: value`, apart by an empty line.
    fn parse(&self, list: &[u8]) -> Packages {
        let mut packages = Packages::new();
        let (mut name, mut version, mut architecture) = (None, None, None);
        let mut installed = self.status.is_none();
        for line in list.split(|&byte| byte == b'\n').chain([&b""[..]]) {
            if line.is_empty() {
                let found = (name.take(), version.take(), architecture.take());
                let was_installed = std::mem::replace(&mut installed, self.status.is_none());
                if let (Some(name), Some(version), architecture) = found
                    && was_installed
                    && packages.len() < PACKAGES_MAX
                {
                    packages.insert((name, architecture.unwrap_or_default()), version);
                }
                continue;
            }
            let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
            let (field, value) = (&line[..colon], line[colon + 1..].trim_ascii());
            let value_text = || {
                let text = String::from_utf8_lossy(value).into_owned();
                (text.len() <= TEXT_MAX && !text.is_empty()).then_some(text)
            };
            if field == self.package {
                name = value_text();
            } else if field == self.version {
                version = value_text();
            } else if field == self.architecture {
                architecture = value_text();
            } else if let Some((status, end)) = self.status
                && field == status
            {
                installed = value.ends_with(end);
            }
        }
        packages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Package: curl\nStatus: install ok installed\nArchitecture: amd64\n\
        Version: 7.88\nDescription: gets\n Version: not a field\n\nPackage: gone\n\
        Status: deinstall ok config-files\nVersion: 1\nArchitecture: all\n\n\
        Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36";

    #[test]
    fn lists_of_both_managers_are_read() {
        let [dpkg, apk] = &MANAGERS;
        let found = dpkg.parse(STATUS.as_bytes());
        let shown: Vec<_> = found.iter().map(|((n, a), v)| format!("{n}/{a} {v}")).collect();
        assert_eq!(shown, ["curl/amd64 7.88", "libc6/amd64 2.36"]);
        let found = apk.parse(b"C:Q1\nP:musl\nV:1.2\nA:x86_64\nF:lib\n\nP:broken\n\n");
        assert_eq!(found, Packages::from([(("musl".into(), "x86_64".into()), "1.2".into())]));
    }

    #[test]
    fn nonsense_is_skipped() {
        for text in ["", "\n\n", ":", "Package:", "Package: a\nStatus: x installed\nVersion:\n\n"] {
            assert!(MANAGERS[0].parse(text.as_bytes()).is_empty(), "{text:?}");
        }
        let long = format!("P:{}\nV:1\n", "x".repeat(TEXT_MAX + 1));
        assert!(MANAGERS[1].parse(long.as_bytes()).is_empty());
    }

    #[test]
    fn added_removed_and_replaced_are_told_in_order() {
        let list = |pairs: &[(&str, &str)]| -> Packages {
            pairs.iter().map(|(n, v)| (((*n).into(), "all".into()), (*v).into())).collect()
        };
        let before = list(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let now = list(&[("b", "2"), ("c", "1"), ("d", "1")]);
        let told: Vec<_> = differences("dpkg", before, now)
            .map(|change| (change.name, change.before.unwrap_or_default(), change.now))
            .collect();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            told,
            [
                ("a".into(), "1".into(), None),
                ("b".into(), "1".into(), text("2")),
                ("d".into(), String::new(), text("1")),
            ]
        );
    }
}
