//! Which paths git tracks, read from `.git/index`: a tracked path is synced whatever the ignore
//! rules say, and is no secret to anybody who has the repository.
//!
//! Pure. Reads names only, of versions 2 to 4 with SHA-1; anything else counts as "nothing known".

use std::collections::BTreeSet;

use crate::path::TreePath;

/// Largest index that is read.
pub const INDEX_BYTES_MAX: u64 = 256 << 20;

/// Bytes of an entry in front of its flags.
const FIXED: usize = 60;

/// The tracked paths.
#[derive(Debug, Default, Clone)]
pub struct Tracked(BTreeSet<TreePath>);

impl Tracked {
    /// Reads an index; empty when it cannot be understood.
    pub fn parse(index: &[u8]) -> Self {
        Self(names(index).unwrap_or_default())
    }

    /// Whether the path is tracked.
    pub fn contains(&self, path: &TreePath) -> bool {
        self.0.contains(path)
    }

    /// Whether something below the directory is tracked.
    pub fn has_below(&self, directory: &TreePath) -> bool {
        self.0
            .range(directory..)
            .find(|path| *path != directory)
            .is_some_and(|path| path.is_below(directory))
    }
}

fn names(index: &[u8]) -> Option<BTreeSet<TreePath>> {
    let number = |at: usize| Some(u32::from_be_bytes(index.get(at..at + 4)?.try_into().ok()?));
    let version = number(4)?;
    if index.get(..4)? != b"DIRC" || !(2..=4).contains(&version) {
        return None;
    }
    let (mut at, mut names, mut previous) = (12, BTreeSet::new(), Vec::new());
    for _ in 0..number(8)? {
        let start = at;
        let flags = u16::from_be_bytes(index.get(at + FIXED..at + FIXED + 2)?.try_into().ok()?);
        at += FIXED + 2 + if version >= 3 && flags & 0x4000 != 0 { 2 } else { 0 };
        if version == 4 {
            let keep = previous.len().checked_sub(variable_length(index, &mut at)?)?;
            previous.truncate(keep);
        } else {
            previous.clear();
        }
        let length = index.get(at..)?.iter().position(|byte| *byte == 0)?;
        previous.extend_from_slice(&index[at..at + length]);
        at += length + 1;
        if version < 4 {
            at = start + (at - start).next_multiple_of(8);
        }
        if let Ok(path) = TreePath::from_bytes(&previous) {
            names.insert(path);
        }
    }
    Some(names)
}

/// Git's offset encoding, as in packs.
fn variable_length(index: &[u8], at: &mut usize) -> Option<usize> {
    let mut value = 0usize;
    for turn in 0..5 {
        let byte = *index.get(*at)?;
        *at += 1;
        value = (value << 7) + usize::from(byte & 0x7f) + usize::from(turn > 0) * 128;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(version: u32, previous: &str, name: &str) -> Vec<u8> {
        let mut entry = vec![0; FIXED];
        entry.extend_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        if version == 4 {
            let common = previous.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
            entry.push(u8::try_from(previous.len() - common).unwrap());
            entry.extend_from_slice(&name.as_bytes()[common..]);
            entry.push(0);
        } else {
            entry.extend_from_slice(name.as_bytes());
            entry.push(0);
            entry.resize(entry.len().next_multiple_of(8), 0);
        }
        entry
    }

    #[test]
    fn names_are_read_in_each_version() {
        for version in 2..=4 {
            let names = ["a.log", "src/lib.rs", "src/main.rs", "target/kept"];
            let mut index = b"DIRC".to_vec();
            index.extend_from_slice(&u32::to_be_bytes(version));
            index.extend_from_slice(&4u32.to_be_bytes());
            let mut previous = "";
            for name in names {
                index.extend(entry(version, previous, name));
                previous = name;
            }
            let tracked = Tracked::parse(&index);
            let path = |name: &str| TreePath::from_bytes(name.as_bytes()).unwrap();
            assert!(names.iter().all(|name| tracked.contains(&path(name))), "{version}");
            assert!(!tracked.contains(&path("src")));
            assert!(tracked.has_below(&path("target")) && !tracked.has_below(&path("tar")));
            for cut in 0..index.len() {
                let _ = Tracked::parse(&index[..cut]);
            }
        }
    }
}
