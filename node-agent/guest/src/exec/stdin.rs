//! An exec's standard input: what clients sent, by offset, until the process has taken it.
//!
//! Bytes that came twice are dropped, a gap is refused; the queue is bounded by what a sender may
//! leave unacknowledged. A process that closed its input swallows the rest.

use std::collections::VecDeque;

use bytes::Bytes;
use towline_proto::limits::UNACKED_MAX;

use crate::refusal::Refusal;

/// Pieces below this are joined.
const SMALL: usize = 4 << 10;

/// The input of one exec.
#[derive(Debug, Default)]
pub(crate) struct Stdin {
    /// Pieces as they came, never empty: nothing is copied on the way to the process.
    queue: VecDeque<Bytes>,
    /// Bytes in the queue.
    queued: usize,
    /// Offset after the last byte that the process' pipe has taken.
    pub(crate) consumed: u64,
    /// There is no input from this offset on.
    eof: Option<u64>,
    /// Nobody reads it any more: the process closed it or has ended.
    dead: bool,
}

/// What the pump should do next.
#[derive(Debug)]
pub(crate) enum Next {
    Write(Bytes),
    Close,
    Dead,
}

impl Stdin {
    /// Offset after the last byte that was received.
    pub(crate) fn accepted(&self) -> u64 {
        self.consumed + self.queued as u64
    }

    /// Bytes in memory.
    pub(crate) fn held(&self) -> usize {
        self.queued
    }

    /// Takes bytes from a client.
    pub(crate) fn push(&mut self, offset: u64, bytes: &Bytes) -> Result<(), Refusal> {
        let accepted = self.accepted();
        if offset > accepted {
            return Err(Refusal::invalid(format!(
                "standard input continues at {offset}, but only {accepted} bytes came before"
            )));
        }
        let known = usize::try_from(accepted - offset).unwrap_or(usize::MAX).min(bytes.len());
        let new = bytes.slice(known..);
        if self.eof.is_some_and(|eof| accepted + new.len() as u64 > eof) {
            return Err(Refusal::invalid("standard input continues after its end"));
        }
        if self.dead {
            self.consumed += new.len() as u64;
            return Ok(());
        }
        if self.queued + new.len() > UNACKED_MAX {
            return Err(Refusal::invalid(format!(
                "more than {UNACKED_MAX} bytes of standard input were sent without waiting for an ACK"
            )));
        }
        self.queued += new.len();
        match self.queue.back_mut() {
            // Small pieces would cost more to keep than to copy.
            Some(last) if new.len() < SMALL && last.len() < SMALL => {
                *last = [&last[..], &new[..]].concat().into();
            }
            _ if new.is_empty() => {}
            _ => self.queue.push_back(new),
        }
        Ok(())
    }

    /// Notes the end of the input.
    pub(crate) fn finish(&mut self, offset: u64) -> Result<(), Refusal> {
        let fits = offset >= self.accepted();
        if !fits || self.eof.is_some_and(|eof| eof != offset) {
            return Err(Refusal::invalid("standard input ends where it has gone on already"));
        }
        self.eof = Some(offset);
        Ok(())
    }

    /// What there is to write, at most `max` bytes; they stay until `advance`.
    pub(crate) fn next(&self, max: usize) -> Option<Next> {
        if self.dead {
            return Some(Next::Dead);
        }
        let Some(first) = self.queue.front() else {
            return (self.eof == Some(self.consumed)).then_some(Next::Close);
        };
        Some(Next::Write(first.slice(..first.len().min(max))))
    }

    /// The process has taken `len` bytes.
    pub(crate) fn advance(&mut self, len: usize) {
        let mut left = len.min(self.queued);
        self.queued -= left;
        self.consumed += left as u64;
        while left > 0
            && let Some(first) = self.queue.front_mut()
        {
            let taken = left.min(first.len());
            drop(first.split_to(taken));
            left -= taken;
            if first.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    /// Nobody will read it any more.
    pub(crate) fn kill(&mut self) {
        self.consumed = self.accepted();
        self.queue = VecDeque::new();
        self.queued = 0;
        self.dead = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_that_comes_twice_counts_once_and_gaps_are_refused() {
        let mut stdin = Stdin::default();
        stdin.push(0, &Bytes::from_static(b"hello")).unwrap();
        stdin.push(2, &Bytes::from_static(b"llo world")).unwrap();
        stdin.push(0, &Bytes::from_static(b"he")).unwrap();
        assert_eq!(stdin.accepted(), 11);
        assert!(stdin.push(12, &Bytes::from_static(b"x")).is_err());
        let Some(Next::Write(bytes)) = stdin.next(100) else { panic!("there are bytes") };
        assert_eq!(&bytes[..], b"hello world");
        stdin.advance(11);
        stdin.finish(11).unwrap();
        stdin.finish(11).unwrap();
        assert!(stdin.finish(12).is_err());
        assert!(stdin.push(11, &Bytes::from_static(b"more")).is_err());
        assert!(matches!(stdin.next(100), Some(Next::Close)));
    }

    #[test]
    fn the_queue_is_bounded_and_a_dead_reader_swallows() {
        let mut stdin = Stdin::default();
        assert!(stdin.push(0, &vec![0; UNACKED_MAX + 1].into()).is_err());
        stdin.push(0, &vec![0; UNACKED_MAX].into()).unwrap();
        assert!(stdin.push(UNACKED_MAX as u64, &Bytes::from_static(b"x")).is_err());
        stdin.kill();
        stdin.push(UNACKED_MAX as u64, &Bytes::from_static(b"x")).unwrap();
        assert_eq!(stdin.consumed, UNACKED_MAX as u64 + 1);
    }
}
