//! Our own terminal: whether there is one, its size, and raw mode that is always given back.
//!
//! The settings are restored when the guard is dropped and when `tow` panics.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd;
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Size when there is no terminal to ask.
const DEFAULT_SIZE: (u32, u32) = (24, 80);

/// Whether a command gets a terminal unless it was said.
pub fn all_three() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal() && io::stderr().is_terminal()
}

/// Returns rows and columns of the first of our descriptors that is a terminal.
pub fn size() -> (u32, u32) {
    fn of(fd: impl AsFd) -> Option<(u32, u32)> {
        let size = tcgetwinsize(fd).ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then(|| (size.ws_row.into(), size.ws_col.into()))
    }
    of(io::stdout())
        .or_else(|| of(io::stdin()))
        .or_else(|| of(io::stderr()))
        .unwrap_or(DEFAULT_SIZE)
}

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of standard input, until dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode; nothing happens when standard input is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        restore_on_panic();
        SAVED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(before);
        let guard = Self(());
        guard.again()?;
        Ok(Some(guard))
    }

    /// Sets raw mode again, after somebody else had the terminal.
    pub fn again(&self) -> io::Result<()> {
        let stdin = io::stdin();
        let mut raw = tcgetattr(&stdin)?;
        raw.make_raw();
        Ok(tcsetattr(&stdin, OptionalActions::Drain, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = saved {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &before);
    }
}

fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            before(info);
        }));
    });
}
