//! What a pull or push has done so far, written by its many tasks and read by whoever waits for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::Progress;

/// The state of one pull or push.
#[derive(Debug, Default)]
pub(crate) struct Board {
    layers: Vec<Line>,
    /// Where layers are that are done.
    place: &'static str,
    /// What is being unpacked.
    unpacking: Mutex<String>,
}

/// The state of one layer.
#[derive(Debug, Default)]
pub(crate) struct Line {
    size: u64,
    got: AtomicU64,
    done: AtomicBool,
    /// What it waits for, if not for bytes.
    note: Mutex<String>,
}

impl Board {
    /// For layers that come here.
    pub(crate) fn new(sizes: impl IntoIterator<Item = u64>) -> Board {
        let line = |size| Line { size, ..Line::default() };
        let layers = sizes.into_iter().map(line).collect();
        Board { layers, place: "here", unpacking: Mutex::default() }
    }

    /// For layers that go there.
    pub(crate) fn sending(sizes: impl IntoIterator<Item = u64>) -> Board {
        Board { place: "there", ..Board::new(sizes) }
    }

    pub(crate) fn line(&self, number: usize) -> &Line {
        &self.layers[number]
    }

    pub(crate) fn set_unpacking(&self, what: String) {
        *self.unpacking.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// Returns what there is to show: bytes while something is downloaded, then what is unpacked.
    pub(crate) fn progress(&self) -> Progress {
        let count = self.layers.len();
        let done = self.layers.iter().filter(|l| l.done.load(Ordering::Relaxed)).count();
        let unpacking = self.unpacking.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if done == count {
            let stage = if unpacking.is_empty() { "checking".into() } else { unpacking };
            return Progress { stage, done: 0, total: 0 };
        }
        let mut stage = format!("{done} of {count} layers {}", self.place);
        if !unpacking.is_empty() {
            stage.push_str(&format!(", {unpacking}"));
        }
        let active = self.layers.iter().enumerate().filter(|(_, line)| line.is_active());
        for (number, line) in active {
            let (got, note) = (line.got.load(Ordering::Relaxed), line.note());
            let percent = got * 100 / line.size.max(1);
            let note = if note.is_empty() { format!("{percent} %") } else { note };
            stage.push_str(&format!(", layer {}: {note}", number + 1));
        }
        let got = self.layers.iter().map(|line| line.got.load(Ordering::Relaxed)).sum();
        let total = self.layers.iter().map(|line| line.size).sum();
        stage.push(',');
        Progress { stage, done: got, total }
    }
}

impl Line {
    /// Sets how many bytes of the layer are here.
    pub(crate) fn set(&self, got: u64) {
        self.got.store(got.min(self.size), Ordering::Relaxed);
    }

    pub(crate) fn finish(&self) {
        self.set(self.size);
        self.done.store(true, Ordering::Relaxed);
    }

    /// Says what is waited for; nothing once bytes come again.
    pub(crate) fn say(&self, note: impl Into<String>) {
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = note.into();
    }

    fn note(&self) -> String {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_active(&self) -> bool {
        let begun = self.got.load(Ordering::Relaxed) > 0 || !self.note().is_empty();
        begun && !self.done.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_is_shown_while_it_comes() {
        let board = Board::new([100, 200, 300]);
        board.line(0).finish();
        board.line(1).set(50);
        board.line(2).say("waiting for another pull");
        board.set_unpacking("unpacking layer 1 of 3".into());
        let shown = board.progress();
        assert_eq!((shown.done, shown.total), (150, 600));
        assert_eq!(
            shown.stage,
            "1 of 3 layers here, unpacking layer 1 of 3, layer 2: 25 %, \
             layer 3: waiting for another pull,"
        );
        board.line(1).finish();
        board.line(2).finish();
        let shown = board.progress();
        assert_eq!((&shown.stage[..], shown.total), ("unpacking layer 1 of 3", 0));
    }
}
