//! One file, as its bytes come: windows of a fixed size with what lies before and after, lines
//! counted, findings bounded.
//!
//! A place is judged by the bytes around it and nothing else ([`engine::BEFORE`] and
//! [`engine::AFTER`]), and by the window that it starts in. So what is found does not depend on how
//! the bytes were cut on their way here.

use std::fmt;

use super::engine::{self, AFTER, BEFORE};
use super::names::{self, Kind};
use super::{FINDINGS_MAX, Finding, Rule, assignment};

/// Bytes that are searched at once: large beside what is kept around them, small beside memory.
const WINDOW: usize = 128 << 10;

/// The scan of one file, bounded in memory whatever the file's size.
pub struct FileScan {
    path: Vec<u8>,
    kind: Kind,
    window: usize,
    /// What was searched and is kept as context, then what is to be searched.
    buffer: Vec<u8>,
    /// Bytes of the buffer that were searched.
    searched: usize,
    /// Lines that ended before the buffer begins.
    lines_before: u64,
    /// Whether any byte was more than white space.
    has_content: bool,
    found: Vec<(u64, Rule)>,
}

impl FileScan {
    /// Begins the scan of a file that has this path in the image.
    pub fn new(path: &[u8]) -> Self {
        Self::with(path, names::kind_of(path), WINDOW)
    }

    /// Begins the scan of a text that is no file.
    pub(super) fn of_text(place: &[u8]) -> Self {
        Self::with(place, Kind::Text, WINDOW)
    }

    pub(super) fn with(path: &[u8], kind: Kind, window: usize) -> Self {
        Self {
            path: path.to_vec(),
            kind,
            window,
            buffer: Vec::new(),
            searched: 0,
            lines_before: 0,
            has_content: false,
            found: Vec::new(),
        }
    }

    /// Takes the file's next bytes, in pieces of any size.
    pub fn data(&mut self, bytes: &[u8]) {
        self.has_content =
            self.has_content || bytes.iter().any(|b| *b != 0 && !b.is_ascii_whitespace());
        for piece in bytes.chunks(self.window) {
            if self.is_full() {
                return;
            }
            self.buffer.extend_from_slice(piece);
            while self.buffer.len() >= self.searched + self.window + AFTER {
                self.search(self.searched + self.window);
                self.forget();
            }
        }
    }

    /// Takes a hole of `len` zero bytes. Zeros beyond a window's surroundings cannot change what is
    /// found, so that a sparse file of any size costs nothing.
    pub fn zeros(&mut self, len: u64) {
        const ENOUGH: [u8; BEFORE + AFTER] = [0; BEFORE + AFTER];
        let enough = usize::try_from(len).map_or(ENOUGH.len(), |len| len.min(ENOUGH.len()));
        self.data(&ENOUGH[..enough]);
    }

    /// Ends the file, and returns what was found in it by line.
    pub fn finish(mut self) -> Vec<Finding> {
        self.search(self.buffer.len());
        if let Kind::Whole(rule) = self.kind
            && self.has_content
        {
            self.found.insert(0, (0, rule));
        }
        self.drop_what_is_told_twice();
        self.found.sort_by_key(|(line, rule)| (*line, rule.id));
        self.found.truncate(FINDINGS_MAX);
        let path = self.path;
        let finding =
            |(line, rule): (u64, Rule)| Finding { path: path.clone(), line, rule: rule.id };
        self.found.into_iter().map(finding).collect()
    }

    fn is_full(&self) -> bool {
        self.found.len() >= FINDINGS_MAX
    }

    /// Searches the buffer up to `end`.
    fn search(&mut self, end: usize) {
        let (mut counted, mut lines) = (0, self.lines_before);
        for (at, rule) in engine::search(&self.buffer, self.searched..end, self.kind) {
            if self.is_full() {
                break;
            }
            lines += newlines(&self.buffer[counted..at]);
            counted = at;
            if !self.found.contains(&(lines + 1, rule)) {
                self.found.push((lines + 1, rule));
            }
        }
        self.searched = end;
    }

    /// Drops what lies too far back to be context.
    fn forget(&mut self) {
        let drop = self.searched.saturating_sub(BEFORE);
        self.lines_before += newlines(&self.buffer[..drop]);
        self.buffer.drain(..drop);
        self.searched -= drop;
    }

    /// A line that a rule of its own explains needs no general one beside it.
    fn drop_what_is_told_twice(&mut self) {
        let explained: Vec<u64> = self
            .found
            .iter()
            .filter(|(_, rule)| *rule != assignment::RULE)
            .map(|(line, _)| *line)
            .collect();
        self.found.retain(|(line, rule)| *rule != assignment::RULE || !explained.contains(line));
    }
}

/// The buffer holds the file's own bytes: they stay out of logs.
impl fmt::Debug for FileScan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileScan")
            .field("path", &String::from_utf8_lossy(&self.path))
            .field("found", &self.found)
            .finish_non_exhaustive()
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}
