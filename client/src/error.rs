//! From a failed command to what a person reads and what a script sees: an `error:` line, its
//! causes, a hint that can be pasted, and an exit code.
//!
//! Leaves the wording of each failure to whoever found it. The codes are those of design §9: of
//! `run`, `exec`, `shell` and `attach` 125 is Towline's own failure; elsewhere it is 1.

use std::error::Error as StdError;
use std::fmt;

/// Exit code of arguments that cannot be parsed.
pub const USAGE: u8 = 2;
/// Exit code of `run`, `exec`, `shell`, `attach` when Towline itself failed.
pub const TOWLINE_FAILED: u8 = 125;
/// Exit code of a command that exists but cannot be executed.
pub const CANNOT_EXECUTE: u8 = 126;
/// Exit code of a command that does not exist.
pub const NOT_FOUND: u8 = 127;

/// What a command ends with when it did not fail: usually 0, or the remote command's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit(pub u8);

impl Exit {
    /// All is well.
    pub const OK: Self = Self(0);
    /// Asked and answered: no (a failed check, an unhealthy cluster).
    pub const NO: Self = Self(1);

    /// What a shell reports for a command that a signal ended.
    pub fn of_signal(signal: i32) -> Self {
        Self(u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX))
    }
}

/// What any command returns.
pub type Outcome = anyhow::Result<Exit>;

/// A failure with a hint, and where needed an exit code of its own.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: Option<u8>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Failure {
    /// Something went wrong.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: None, source: None }
    }

    /// What was typed, or is written in a file of the user, makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(message).code(USAGE)
    }

    /// Adds what to type next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the exit code, whatever the verb.
    pub fn code(mut self, code: u8) -> Self {
        self.code = Some(code);
        self
    }

    /// Adds the cause.
    pub fn because(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.source = Some(cause.into().into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// Returns the exit code that the failure itself asks for.
pub fn wanted_code(error: &anyhow::Error) -> Option<u8> {
    error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.code)
}

/// Whether whoever read our stdout went away: nothing to say, nobody to say it to.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// Writes the failure as people read it.
pub fn render(error: &anyhow::Error) -> String {
    let mut text = String::from("error: ");
    let mut last = String::new();
    for (depth, cause) in error.chain().enumerate() {
        let line = cause.to_string();
        // Libraries often repeat their cause in their own text: once is enough.
        if depth > 0 && last.contains(&line) {
            continue;
        }
        if depth > 0 {
            text.push_str("\n  caused by: ");
        }
        text.push_str(line.trim_end());
        last = line;
    }
    if let Some(hint) = hint(error) {
        text.push_str("\nhint: ");
        text.push_str(hint);
    }
    text
}

/// Returns what to type next, if anybody on the way knew.
pub fn hint(error: &anyhow::Error) -> Option<&str> {
    error.chain().find_map(|cause| cause.downcast_ref::<Failure>()?.hint.as_deref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_causes_once_and_the_hint_last() {
        let inner = std::io::Error::other("connection refused");
        let error = anyhow::Error::from(
            Failure::new("could not reach the control plane").hint("tow up").because(inner),
        );
        assert_eq!(
            render(&error),
            "error: could not reach the control plane\n  caused by: connection refused\nhint: tow up"
        );
    }

    #[test]
    fn codes_are_found_through_context() {
        let error = anyhow::Error::from(Failure::usage("no")).context("reading it");
        assert_eq!(wanted_code(&error), Some(2));
        assert_eq!(wanted_code(&anyhow::anyhow!("x")), None);
        assert_eq!(Exit::of_signal(15), Exit(143));
    }
}
