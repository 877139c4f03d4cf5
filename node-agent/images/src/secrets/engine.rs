//! One pass over a window for the words that every rule begins with, and the rule's own look at each
//! place where one stands.
//!
//! Ordinary data has few such words, so the pass decides the speed: one automaton over all of them.

use std::ops::Range;
use std::sync::{LazyLock, OnceLock};

use aho_corasick::{AhoCorasick, AhoCorasickKind, Input};
use regex::bytes::{Regex, RegexBuilder};

use super::formats::{self, Format};
use super::names::Kind;
use super::{Rule, assignment};

/// Bytes before a place that a rule may look at.
pub(super) const BEFORE: usize = 2 << 10;
/// Bytes from a place on that a rule may look at: a long signed token, or a private key's headers
/// and its first lines.
pub(super) const AFTER: usize = 8 << 10;

/// A place that has a format's form.
#[derive(Debug)]
pub(super) struct Hit<'w> {
    /// What comes before it.
    pub(super) before: &'w [u8],
    /// All that the pattern matched.
    pub(super) text: &'w [u8],
    /// The secret: the pattern's group, or all of the text.
    pub(super) value: &'w [u8],
    /// What comes after it.
    pub(super) after: &'w [u8],
}

/// Who looks at a place where a word stands.
#[derive(Debug, Clone, Copy)]
enum Reader {
    /// By its number.
    Format(usize),
    Assignment,
}

struct Engine {
    words: AhoCorasick,
    /// By a word's number.
    readers: Vec<Reader>,
    formats: Vec<&'static Format>,
    /// By a format's number. Made when first needed: most files need few.
    patterns: Vec<OnceLock<Regex>>,
    longest: usize,
}

static ENGINE: LazyLock<Engine> = LazyLock::new(Engine::new);

/// Searches the places that start in `range` of the window, and returns those that a rule matches,
/// in their order.
pub(super) fn search(window: &[u8], range: Range<usize>, kind: Kind) -> Vec<(usize, Rule)> {
    let engine = &*ENGINE;
    // A word that starts in the range may end after it.
    let reach = window.len().min(range.end + engine.longest);
    let input = Input::new(window).span(range.start..reach);
    let mut found = Vec::new();
    for word in engine.words.find_overlapping_iter(input) {
        if word.start() >= range.end {
            continue;
        }
        let start = word.start().saturating_sub(BEFORE);
        let near = &window[start..window.len().min(word.start() + AFTER)];
        let at = word.start() - start..word.end() - start;
        let rule = match engine.readers[word.pattern().as_usize()] {
            Reader::Format(number) => engine.look(number, near, at.start),
            Reader::Assignment => assignment::look(near, at, kind),
        };
        found.extend(rule.map(|rule| (word.start(), rule)));
    }
    found.sort_by_key(|(at, _)| *at);
    found
}

impl Engine {
    fn new() -> Self {
        let formats: Vec<&'static Format> = formats::all().collect();
        let of_formats = formats.iter().enumerate().flat_map(|(number, format)| {
            format.words.iter().map(move |word| (*word, Reader::Format(number)))
        });
        let of_assignments = assignment::words().map(|word| (word, Reader::Assignment));
        let (words, readers): (Vec<&str>, Vec<Reader>) = of_formats.chain(of_assignments).unzip();
        let longest = words.iter().map(|word| word.len()).max().unwrap_or(0);
        let patterns = formats.iter().map(|_| OnceLock::new()).collect();
        let words = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .kind(Some(AhoCorasickKind::DFA))
            .build(words)
            .expect("a few hundred short words make an automaton");
        Self { words, readers, formats, patterns, longest }
    }

    /// Returns the format's rule, if its word at `at` is part of a match.
    fn look(&self, number: usize, near: &[u8], at: usize) -> Option<Rule> {
        let format = self.formats[number];
        let place = at.checked_sub(format.back)?;
        if format.apart && !begins_apart(&near[..place]) {
            return None;
        }
        let found = self.pattern(number).captures(&near[place..])?;
        let text = found.get(0)?.as_bytes();
        let value = found.get(1).map_or(text, |group| group.as_bytes());
        let after = &near[place + text.len()..];
        let hit = Hit { before: &near[..place], text, value, after };
        (format.check)(&hit).then_some(format.rule)
    }

    fn pattern(&self, number: usize) -> &Regex {
        self.patterns[number].get_or_init(|| {
            // Bytes, not characters: files have any encoding.
            RegexBuilder::new(&format!(r"\A(?:{})", self.formats[number].pattern))
                .unicode(false)
                .build()
                .expect("the patterns are ours, and a test makes them all")
        })
    }
}

/// Says whether a token may begin after these bytes. The letter of an escape such as `\n` is no part
/// of what follows it.
fn begins_apart(before: &[u8]) -> bool {
    match before {
        [.., b'\\', b'n' | b'r' | b't'] | [] => true,
        [.., last] => !last.is_ascii_alphanumeric() && *last != b'_',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_patterns_are_well_formed() {
        for (number, format) in ENGINE.formats.iter().enumerate() {
            ENGINE.pattern(number);
            assert!(!format.words.is_empty(), "{}", format.rule.id);
        }
    }

    #[test]
    fn a_token_begins_after_an_escape_but_not_within_a_word() {
        assert!(begins_apart(b"") && begins_apart(b"x=") && begins_apart(br"x\n"));
        assert!(!begins_apart(b"x") && !begins_apart(b"_") && !begins_apart(b"n"));
    }
}
