//! Secrets that have a form of their own, as tables: private keys, tokens with a service's prefix,
//! hashes of passwords, URLs with passwords.
//!
//! A format is found by a word that it cannot be without, then by a pattern from a fixed number of
//! bytes before the word, then by a check of the value. Only its word is looked for in every byte,
//! so a format costs nothing where its word is rare.

mod cloud;
mod code;
mod keys;
mod logins;
mod models;
mod services;

use super::Rule;
use super::engine::Hit;
use super::value;

/// One format.
#[derive(Debug)]
pub(super) struct Format {
    pub(super) rule: Rule,
    /// Whatever has this format has one of these, in any case.
    pub(super) words: &'static [&'static str],
    /// Bytes of the format before the word.
    pub(super) back: usize,
    /// Whether no letter, digit or underscore may come just before.
    pub(super) apart: bool,
    /// What it looks like from there on; the first group, if any, is the secret.
    pub(super) pattern: &'static str,
    /// The last look.
    pub(super) check: fn(&Hit<'_>) -> bool,
}

/// Returns all formats.
pub(super) fn all() -> impl Iterator<Item = &'static Format> {
    let tables = [keys::ALL, cloud::ALL, code::ALL, models::ALL, services::ALL, logins::ALL];
    tables.into_iter().flatten()
}

/// A secret that stands for itself: apart from what is before it, and random.
const fn token(
    id: &'static str,
    finds: &'static str,
    words: &'static [&'static str],
    pattern: &'static str,
) -> Format {
    Format { rule: Rule { id, finds }, words, back: 0, apart: true, pattern, check: is_token }
}

impl Format {
    /// The format begins this many bytes before its word.
    const fn back(self, back: usize) -> Self {
        Self { back, ..self }
    }

    /// The word may be the end of a longer one, as in `MY_CLOUDFLARE_TOKEN`.
    const fn anywhere(self) -> Self {
        Self { apart: false, ..self }
    }

    const fn check(self, check: fn(&Hit<'_>) -> bool) -> Self {
        Self { check, ..self }
    }
}

/// The value is no example, and ends where the pattern does.
fn is_token(hit: &Hit<'_>) -> bool {
    let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    let goes_on = hit.text.last().is_some_and(word) && hit.after.first().is_some_and(word);
    !goes_on && value::is_token(hit.value)
}
