//! Which secrets the image would give away: those of the files that changed, and of the settings that
//! the request changes. What the base holds or says is its own.

use serde_json::{Value, json};

use super::{Allowed, SaveError, SaveRequest, Settings};
use crate::secrets::{FileScan, Finding, scan_text};
use crate::tar::{Header, Type};

/// Secrets that are told of; whoever has more sees them when these are gone.
const FINDINGS_MAX: usize = 500;

/// The scan of one image.
#[derive(Default)]
pub(super) struct Scan {
    allowed: Vec<Allowed>,
    /// Of the file at hand.
    file: Option<FileScan>,
    refused: Vec<Finding>,
    let_through: Vec<Finding>,
    more: bool,
}

impl Scan {
    pub(super) fn new(allowed: Vec<Allowed>) -> Self {
        Self { allowed, ..Self::default() }
    }

    /// Begins with an entry; whatever had content before it is whole.
    pub(super) fn entry(&mut self, header: &Header) {
        self.end_of_file();
        if header.kind == Type::Regular && header.size > 0 {
            self.file = Some(FileScan::new(&[b"/", &header.path[..]].concat()));
        }
    }

    pub(super) fn data(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file {
            file.data(bytes);
        }
    }

    pub(super) fn zeros(&mut self, len: u64) {
        if let Some(file) = &mut self.file {
            file.zeros(len);
        }
    }

    fn end_of_file(&mut self) {
        let Some(file) = self.file.take() else { return };
        for finding in file.finish() {
            let is_allowed = covering(&self.allowed, &finding).is_some();
            let list = if is_allowed { &mut self.let_through } else { &mut self.refused };
            match list.len() < FINDINGS_MAX {
                true => list.push(finding),
                false => self.more = true,
            }
        }
    }

    /// Ends it; returns the secrets that were let through.
    pub(super) fn finish(mut self, settings: &Settings) -> Result<Vec<Finding>, SaveError> {
        self.end_of_file();
        let mut found = self.refused;
        for (place, text) in texts(settings) {
            found.extend(scan_text(&place, &text));
        }
        match found.is_empty() {
            true => Ok(self.let_through),
            false => Err(SaveError::Secrets { found, more: self.more }),
        }
    }
}

/// Where a setting is, and what it says.
fn texts(settings: &Settings) -> Vec<(String, String)> {
    let Settings { cmd, entrypoint, env, labels, message, .. } = settings;
    let lists = [("--cmd", cmd), ("--entrypoint", entrypoint)];
    let arguments = lists.iter().filter_map(|(place, list)| {
        list.as_ref().map(|list| ((*place).to_owned(), list.join(" ")))
    });
    let pairs = [("--env", env), ("--label", labels)].into_iter().flat_map(|(place, pairs)| {
        pairs
            .iter()
            .map(move |(name, value)| (format!("{place} {name}"), format!("{name}={value}")))
    });
    arguments.chain(pairs).chain([("--message".to_owned(), message.clone())]).collect()
}

fn covering<'a>(allowed: &'a [Allowed], finding: &Finding) -> Option<&'a Allowed> {
    let path = finding.path.strip_prefix(b"/").unwrap_or(&finding.path);
    allowed.iter().find(|allowed| {
        let rest = path.strip_prefix(&allowed.path[..]);
        rest.is_some_and(|rest| {
            rest.is_empty() || allowed.path.is_empty() || rest.starts_with(b"/")
        })
    })
}

/// What an image says of the secrets that were let into it, in an order that is theirs.
pub(super) fn record(let_through: &[Finding], request: &SaveRequest) -> Vec<Value> {
    let mut record: Vec<_> = let_through
        .iter()
        .map(|finding| {
            let reason = covering(&request.allowed, finding).map_or("", |it| &it.reason);
            (String::from_utf8_lossy(&finding.path).into_owned(), finding.rule, reason)
        })
        .collect();
    record.sort_unstable();
    record.dedup();
    let object = |(path, rule, reason)| json!({"path": path, "rule": rule, "reason": reason});
    record.into_iter().map(object).collect()
}
