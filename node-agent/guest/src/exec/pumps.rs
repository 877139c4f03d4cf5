//! The tasks between a process' descriptors and its exec's state: one per output, one for input.
//!
//! An output pump stops reading when the bound of kept bytes is met, which holds the process back;
//! after the exit it reads what the process left behind and never waits for its descendants.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use towline_proto::limits::{DATA_CHUNK_MAX, DETACHED_OUTPUT_MAX, OUTPUT_ACK_STEP, UNACKED_MAX};

use super::output::Output;
use super::stdin::{Next, Stdin};
use super::{Exec, Life, State, spool};
use crate::nonblocking::NonBlocking;

/// Bytes of all execs together that are kept in memory before each is held to little: the agent
/// must stay small beside the workload.
const HELD_MAX: usize = 24 << 20;
/// What each output and input may keep then.
const PRESSED_MAX: usize = 16 << 10;
/// The same of an output that has a client: it acknowledges in steps, and the next one must fit.
const PRESSED_OWNED_MAX: usize = OUTPUT_ACK_STEP + DATA_CHUNK_MAX;
/// Bytes kept in memory for all execs.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Stdout,
    Stderr,
}

impl State {
    pub(crate) fn output(&mut self, which: Which) -> &mut Output {
        match which {
            Which::Stdout => &mut self.stdout,
            Which::Stderr => &mut self.stderr,
        }
    }

    /// Bytes that may still be read from the process.
    fn room(&mut self, which: Which) -> usize {
        let bound = match (is_pressed(), self.is_owned()) {
            (true, true) => PRESSED_OWNED_MAX,
            (true, false) => PRESSED_MAX,
            (false, true) => UNACKED_MAX,
            (false, false) => DETACHED_OUTPUT_MAX,
        };
        let output = self.output(which);
        if output.holds_back() { bound.saturating_sub(output.held()) } else { DATA_CHUNK_MAX }
    }

    /// Changes an output and keeps the count of all memory right.
    pub(crate) fn with_output<T>(&mut self, which: Which, f: impl FnOnce(&mut Output) -> T) -> T {
        self.counted(|state| f(state.output(which)))
    }

    /// Changes the input and keeps the count of all memory right.
    pub(crate) fn with_stdin<T>(&mut self, f: impl FnOnce(&mut Stdin) -> T) -> T {
        self.counted(|state| f(&mut state.stdin))
    }

    /// Whether more input may be taken: always a little, more while memory is left. All of it while an
    /// output is full: what makes room there may come behind it on the stream.
    pub(crate) fn takes_input(&mut self) -> bool {
        !is_pressed()
            || self.stdin.held() < PRESSED_MAX
            || self.room(Which::Stdout) == 0
            || self.room(Which::Stderr) == 0
    }

    fn counted<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.held();
        let result = f(self);
        let after = self.held();
        if after >= before {
            HELD.fetch_add(after - before, Ordering::Relaxed);
        } else {
            HELD.fetch_sub(before - after, Ordering::Relaxed);
        }
        result
    }

    fn held(&self) -> usize {
        self.stdin.held() + self.stdout.held() + self.stderr.held()
    }
}

fn is_pressed() -> bool {
    HELD.load(Ordering::Relaxed) > HELD_MAX
}

impl Drop for State {
    fn drop(&mut self) {
        HELD.fetch_sub(self.held(), Ordering::Relaxed);
    }
}

/// Reads an output to its end.
pub(crate) async fn pump_output(exec: Arc<Exec>, which: Which, from: Arc<NonBlocking>) {
    let mut buffer = vec![0; DATA_CHUNK_MAX];
    loop {
        let room = exec
            .until(|state| Some(state.room(which)).filter(|&room| room > 0))
            .await
            .min(DATA_CHUNK_MAX);
        match read_some(&exec, &from, &mut buffer[..room]).await {
            Ok(0) | Err(_) => break,
            Ok(len) => keep(&exec, which, &buffer[..len]).await,
        }
    }
    exec.change(|state| state.output(which).closed = true);
}

/// Reads what there is; zero when nothing will come, or nothing is there after the exit.
async fn read_some(exec: &Exec, from: &NonBlocking, into: &mut [u8]) -> io::Result<usize> {
    loop {
        // Asked before the read: what the process wrote before its exit is then in this read.
        let exited = exec.lock().has_exited();
        match from.try_read(into) {
            Err(error) if is_wait(&error) || is_hung_up(&error) => {
                if exited {
                    return Ok(0);
                }
            }
            result => return result,
        }
        tokio::select! {
            result = from.read(into) => match result {
                // A terminal that nobody has open now; a process of the session may open it again.
                Err(error) if is_hung_up(&error) => {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
                result => return result,
            },
            () = exec.until(|state| state.has_exited().then_some(())) => {}
        }
    }
}

fn is_wait(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn is_hung_up(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::IO)
}

/// Keeps bytes in memory or in the spool.
async fn keep(exec: &Exec, which: Which, bytes: &[u8]) {
    let target = {
        let mut state = exec.lock();
        let end = state.output(which).end();
        state.output(which).spool().map(|spool| (spool.file(), spool.excess(bytes.len()), end))
    };
    if let Some((file, hole, end)) = target {
        let copy = bytes.to_vec();
        let written =
            tokio::task::spawn_blocking(move || spool::write(&file, hole, end, &copy)).await;
        if matches!(written, Ok(Ok(()))) {
            return exec.change(|state| state.output(which).spooled_more(bytes.len()));
        }
        // The disk is full: from here on the newest output is kept in memory instead.
        if let Some(spool) = exec.lock().output(which).spool() {
            spool.broken = true;
        }
    }
    exec.change(|state| {
        let keep = if is_pressed() { PRESSED_MAX } else { DETACHED_OUTPUT_MAX };
        state.with_output(which, |output| {
            let keep = (!output.holds_back()).then_some(keep);
            output.push(bytes, keep);
        });
    });
}

/// Writes the input to the process until its end, then closes it.
pub(crate) async fn pump_stdin(exec: Arc<Exec>, to: Arc<NonBlocking>, terminal: bool) {
    let mut last = b'\n';
    loop {
        let next = tokio::select! {
            next = exec.until(|state| state.stdin.next(DATA_CHUNK_MAX)) => next,
            () = exec.until(|state| state.has_exited().then_some(())) => Next::Dead,
        };
        match next {
            Next::Write(bytes) => {
                let written = tokio::select! {
                    written = to.write(&bytes) => written,
                    () = exec.until(|state| state.has_exited().then_some(())) => break,
                };
                match written {
                    Ok(len) => {
                        last = bytes[..len].last().copied().unwrap_or(last);
                        exec.change(|state| state.with_stdin(|stdin| stdin.advance(len)));
                    }
                    // The process has closed its input.
                    Err(_) => break,
                }
            }
            Next::Close if terminal => {
                type_end_of_file(&to, last).await;
                // What follows is nobody's, but the terminal stays open for output.
                break;
            }
            Next::Close | Next::Dead => break,
        }
    }
    exec.change(|state| state.with_stdin(Stdin::kill));
}

/// A terminal has no end of input: its reader sees one when the end-of-file character is typed, twice
/// if a line has been begun.
async fn type_end_of_file(terminal: &NonBlocking, last: u8) {
    let Ok(modes) = rustix::termios::tcgetattr(terminal) else { return };
    if !modes.local_modes.contains(rustix::termios::LocalModes::ICANON) {
        return;
    }
    let eof = modes.special_codes[rustix::termios::SpecialCodeIndex::VEOF];
    let times = if last == b'\n' { 1 } else { 2 };
    for _ in 0..times {
        let _ = terminal.write(&[eof]).await;
    }
}

/// Ends an exec whose process has exited once both outputs are closed.
pub(crate) async fn settle(exec: &Exec) {
    exec.until(|state| {
        let closed = state.stdout.closed && state.stderr.closed;
        (closed && state.has_exited()).then_some(())
    })
    .await;
    exec.change(|state| {
        if let Life::Running(running) = &mut state.life {
            let status = running.exited.take().unwrap_or_default();
            state.life = Life::Ended(status);
        }
    });
}
