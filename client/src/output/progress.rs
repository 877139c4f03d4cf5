//! One line on stderr that says what is being waited for, and for how long already.
//!
//! Hidden unless a person watches; always gone before a command's own output begins.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A line of progress; dropping it removes it.
#[derive(Debug)]
pub struct Progress(Option<ProgressBar>);

impl Progress {
    pub(super) fn start(shown: bool, text: String) -> Self {
        if !shown {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        bar.set_style(style);
        bar.set_message(text);
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(Some(bar))
    }

    /// Says what is being waited for now.
    pub fn set(&self, text: impl Into<String>) {
        if let Some(bar) = &self.0 {
            bar.set_message(text.into());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}
