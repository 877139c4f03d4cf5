//! Which stream shows what: stdout carries the answer, stderr the rest, and progress and hints
//! only when stderr is a terminal.
//!
//! Leaves the look of tables to `human.rs` and of objects to `json.rs`. The only code of `tow`
//! that writes to stdout, beside a command's own bytes in `tunnel/`.

use std::io::{self, IsTerminal as _, Write as _};

use crate::env_vars;

pub mod events;
pub mod human;
pub mod json;
pub mod progress;

pub use progress::Progress;

/// What was asked of the output.
#[derive(Debug, Clone, Copy, Default)]
pub struct Style {
    /// One versioned object per line instead of text.
    pub json: bool,
    /// Neither progress nor hints.
    pub quiet: bool,
    /// More is said; progress bars would be in the way.
    pub verbose: bool,
}

/// Prints.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    style: Style,
    terminal: bool,
    colour: bool,
}

impl Printer {
    /// Looks at stderr and the environment once.
    pub fn new(style: Style) -> Self {
        let terminal = io::stderr().is_terminal();
        Self { style, terminal, colour: terminal && env_vars::get(env_vars::NO_COLOR).is_none() }
    }

    /// Whether objects are wanted.
    pub fn json(&self) -> bool {
        self.style.json
    }

    /// Whether more detail is wanted.
    pub fn verbose(&self) -> bool {
        self.style.verbose
    }

    /// Writes one line of the answer.
    pub fn answer(&self, line: impl AsRef<str>) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(line.as_ref().as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// Writes one object of the answer.
    pub fn object(&self, object: &serde_json::Value) -> io::Result<()> {
        self.answer(object.to_string())
    }

    /// Says something useful that nobody asked for: only to a person.
    pub fn hint(&self, text: impl AsRef<str>) {
        if self.hints() {
            self.note(text);
        }
    }

    /// Whether hints are seen by a person.
    pub fn hints(&self) -> bool {
        self.terminal && !self.style.quiet && !self.style.json
    }

    /// Says something that was asked for beside the answer.
    pub fn note(&self, text: impl AsRef<str>) {
        self.stderr(&format!("{} {}", self.dim("tow:"), text.as_ref()));
    }

    /// Says what happens to a running command's link, also while its terminal is in raw mode.
    pub fn notice(&self, text: impl AsRef<str>) {
        self.hint(format!("{}\r", text.as_ref()));
    }

    /// Says something that must not be missed, also by whoever reads a log.
    pub fn warning(&self, text: impl AsRef<str>) {
        self.stderr(&format!("{} {}", self.bold("33", "warning:"), text.as_ref()));
    }

    /// Says why the command failed.
    pub fn failure(&self, error: &anyhow::Error) {
        let text = crate::error::render(error);
        let rest = text.strip_prefix("error:").unwrap_or(&text);
        self.stderr(&format!("{}{rest}", self.bold("31", "error:")));
    }

    /// Starts showing progress, if anybody watches.
    pub fn progress(&self, text: impl Into<String>) -> Progress {
        let shown = self.terminal
            && !self.style.quiet
            && !self.style.json
            && !self.style.verbose
            && env_vars::get(env_vars::TOWLINE_NO_PROGRESS).is_none();
        Progress::start(shown, text.into())
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn bold(&self, colour: &str, text: &str) -> String {
        self.paint(&format!("1;{colour}"), text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        match self.colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    fn stderr(&self, line: &str) {
        // Nobody can be told that stderr is gone.
        let _ = writeln!(io::stderr().lock(), "{line}");
    }
}
