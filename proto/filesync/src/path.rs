//! Paths below a folder's root: a list of components, kept joined by `/` for the kernel.
//!
//! A `TreePath` cannot be absolute, hold `..`, or be longer than both ends agreed; it says nothing
//! about symlinks, which is why it is only ever resolved beneath the root's descriptor. It orders
//! by components, so that everything below a directory follows it without a gap.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use towline_proto::limits::{PATH_COMPONENT_MAX, PATH_DEPTH_MAX};

/// Bytes of a whole path, as Linux bounds those that it resolves.
pub const PATH_BYTES_MAX: usize = 4095;

/// A path below the root; any bytes that Linux allows in names.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TreePath(Box<[u8]>);

/// Says what was wrong with a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It has no components.
    #[error("a path has no components")]
    Empty,
    /// A component cannot be a file name.
    #[error("`{0}` cannot be a file name in a path")]
    Component(String),
    /// A component is too long.
    #[error("a file name has {0} bytes; at most {PATH_COMPONENT_MAX} are allowed")]
    ComponentLength(usize),
    /// Too many components.
    #[error("a path has {0} components; at most {PATH_DEPTH_MAX} are allowed")]
    Depth(usize),
    /// Too many bytes.
    #[error("a path has {0} bytes; at most {PATH_BYTES_MAX} are allowed")]
    Length(usize),
}

impl TreePath {
    /// Checks components that came from elsewhere.
    pub fn from_components<C: AsRef<[u8]>>(components: &[C]) -> Result<Self, PathError> {
        if components.is_empty() {
            return Err(PathError::Empty);
        }
        if components.len() > PATH_DEPTH_MAX {
            return Err(PathError::Depth(components.len()));
        }
        let mut joined = Vec::new();
        for component in components {
            let component = component.as_ref();
            check_component(component)?;
            if !joined.is_empty() {
                joined.push(b'/');
            }
            joined.extend_from_slice(component);
        }
        Self::bounded(joined)
    }

    /// Checks a relative path, as a rule file or a command line has it.
    pub fn from_bytes(path: &[u8]) -> Result<Self, PathError> {
        if path.is_empty() {
            return Err(PathError::Empty);
        }
        let components: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        Self::from_components(&components)
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, PathError> {
        check_component(name)?;
        if self.depth() >= PATH_DEPTH_MAX {
            return Err(PathError::Depth(self.depth() + 1));
        }
        let mut joined = Vec::with_capacity(self.0.len() + 1 + name.len());
        joined.extend_from_slice(&self.0);
        joined.push(b'/');
        joined.extend_from_slice(name);
        Self::bounded(joined)
    }

    fn bounded(joined: Vec<u8>) -> Result<Self, PathError> {
        if joined.len() > PATH_BYTES_MAX {
            return Err(PathError::Length(joined.len()));
        }
        Ok(Self(joined.into_boxed_slice()))
    }

    /// The components, first to last.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }

    /// How many components there are.
    pub fn depth(&self) -> usize {
        self.components().count()
    }

    /// The last component.
    pub fn name(&self) -> &[u8] {
        self.components().next_back().unwrap_or_default()
    }

    /// The directory that holds it; `None` when that is the root.
    pub fn parent(&self) -> Option<Self> {
        let cut = self.0.iter().rposition(|byte| *byte == b'/')?;
        Some(Self(self.0[..cut].into()))
    }

    /// Whether it lies below `other`.
    pub fn is_below(&self, other: &Self) -> bool {
        self.0.len() > other.0.len()
            && self.0.starts_with(&other.0)
            && self.0[other.0.len()] == b'/'
    }

    /// The bytes, joined by `/`.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The same for functions that want a path. Only ever resolved beneath a root's descriptor.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// The components as a message has them.
    pub fn to_wire(&self) -> Vec<Vec<u8>> {
        self.components().map(<[u8]>::to_vec).collect()
    }
}

fn check_component(component: &[u8]) -> Result<(), PathError> {
    if component.len() > PATH_COMPONENT_MAX {
        return Err(PathError::ComponentLength(component.len()));
    }
    let forbidden = component.is_empty()
        || component == b"."
        || component == b".."
        || component.contains(&b'/')
        || component.contains(&0);
    if forbidden {
        return Err(PathError::Component(component.escape_ascii().to_string()));
    }
    Ok(())
}

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for TreePath {
    /// For people: control characters and broken UTF-8 are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                if character.is_control() {
                    write!(f, "{}", character.escape_default())?;
                } else {
                    write!(f, "{character}")?;
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{self}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_could_leave_the_root_is_no_path() {
        for bad in
            [&b""[..], b"..", b"a/..", b"../a", b"/a", b"a//b", b"a/", b".", b"a/./b", b"a\0"]
        {
            assert!(TreePath::from_bytes(bad).is_err(), "{}", bad.escape_ascii());
        }
        assert!(TreePath::from_components(&[b"a/b"]).is_err());
        assert!(TreePath::from_components(&[&[b'x'; 256][..]]).is_err());
        assert!(TreePath::from_components(&[b"d"; 129]).is_err());
        assert!(TreePath::from_components(&[&[b'x'; 200][..]; 40]).is_err());
        assert!(TreePath::from_bytes(b"\xff\xfe/...").is_ok());
    }

    #[test]
    fn it_prints_without_terminal_tricks() {
        let path = TreePath::from_bytes("a\x1b[2J\u{fc}/\u{9b}".as_bytes()).unwrap();
        assert_eq!(path.to_string(), "a\\u{1b}[2Jü/\\u{9b}");
        assert_eq!(TreePath::from_bytes(b"x\xff").unwrap().to_string(), "x\\xff");
    }

    proptest! {
        #[test]
        fn what_is_below_a_directory_follows_it_without_a_gap(
            names in prop::collection::btree_set("[a-c!/-]{1,6}", 1..30),
        ) {
            let mut paths: Vec<TreePath> =
                names.iter().filter_map(|name| TreePath::from_bytes(name.as_bytes()).ok()).collect();
            paths.sort();
            for (at, directory) in paths.iter().enumerate() {
                let below = paths.iter().filter(|path| path.is_below(directory)).count();
                let run = paths[at + 1..].iter().take_while(|path| path.is_below(directory)).count();
                prop_assert_eq!(below, run);
            }
        }
    }
}
