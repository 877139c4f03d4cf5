//! The signals that `tow` receives while a command runs.
//!
//! Without a terminal they are the command's. With one, keys arrive as bytes, and a signal means
//! that somebody wants `tow` itself to leave.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What happened to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// A signal that has a meaning for the command.
    Signal(i32),
    /// The window changed.
    Resized,
    /// We were stopped and go on: the terminal may have been used by others.
    Continued,
}

/// All that is listened to.
#[derive(Debug)]
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
    user1: Signal,
    user2: Signal,
    window: Signal,
    resume: Signal,
}

impl Signals {
    pub(super) fn listen() -> io::Result<Self> {
        let resume = SignalKind::from_raw(rustix::process::Signal::CONT.as_raw());
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
            window: signal(SignalKind::window_change())?,
            resume: signal(resume)?,
        })
    }

    /// Waits for the next one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Received {
        use rustix::process::Signal as S;
        let number = |signal: S| Received::Signal(signal.as_raw());
        tokio::select! {
            _ = self.interrupt.recv() => number(S::INT),
            _ = self.terminate.recv() => number(S::TERM),
            _ = self.hangup.recv() => number(S::HUP),
            _ = self.quit.recv() => number(S::QUIT),
            _ = self.user1.recv() => number(S::USR1),
            _ = self.user2.recv() => number(S::USR2),
            _ = self.window.recv() => Received::Resized,
            _ = self.resume.recv() => Received::Continued,
        }
    }
}
