//! Finds secrets in what is about to become an image: files that a sandbox changed, and the texts of
//! the image's config and history.
//!
//! In reading order: [`scan`] cuts a file that comes in pieces into windows and counts lines,
//! [`engine`] finds the places worth a closer look, [`formats`] knows secrets that have a form of
//! their own, [`assignment`] knows `password = ...`, [`names`] knows files by their path, and
//! [`value`] tells a secret from a placeholder. Nothing here touches a file. The invariant: what is
//! found is told by place and rule, and the secret itself never leaves this module.

mod assignment;
mod engine;
mod formats;
mod names;
mod scan;
#[cfg(test)]
mod tests;
mod value;

pub use scan::FileScan;

/// Findings that are told of one file or text; a file that is full of secrets needs no longer list
/// to be refused.
pub const FINDINGS_MAX: usize = 20;

/// One kind of secret that is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// A stable name such as `aws-access-key`.
    pub id: &'static str,
    /// What it finds, in one sentence.
    pub finds: &'static str,
}

/// One secret that was found: where, and by which rule. Never the secret itself.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The path as the scan was given it, or the place of a text.
    pub path: Vec<u8>,
    /// Counted from 1; 0 means the whole file, by its name.
    pub line: u64,
    /// The [`Rule::id`] that found it.
    pub rule: &'static str,
}

/// Returns all rules: first those on a secret's form, then those on files, then the general one.
pub fn rules() -> impl Iterator<Item = Rule> {
    let formats = formats::all().map(|format| format.rule);
    let names = names::ALL.iter().map(|named| named.rule);
    formats.chain(names).chain([assignment::RULE])
}

/// Looks for secrets in a text of an image's config or history. `place` says which, such as
/// `config: env` or `history 3`, and comes back as the path of what is found.
pub fn scan_text(place: &str, text: &str) -> Vec<Finding> {
    let mut scan = FileScan::of_text(place.as_bytes());
    scan.data(text.as_bytes());
    scan.finish()
}
