//! Where a session starts in a byte pipe that may hold the rest of an older one.
//!
//! The host sends marker, nonce and terms inside a PAD frame; the guest looks for its marker anywhere,
//! also inside a frame, and answers marker, nonce and its own terms; the host skips everything before
//! that answer. Terms ([`super::terms`]) let two ends of different builds work together: a guest runs
//! on with the build that it was started with.
//! Invariant: no byte of a marker that the guest knows is ever passed on as a session's.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

use super::StreamId;
use super::terms::{TERMS_LEN, Terms};
use super::wire::{Kind, put_header};

/// Bytes of a marker.
pub const MARKER_LEN: usize = 32;
/// Bytes of a nonce.
pub const NONCE_LEN: usize = 16;
/// What follows a marker: the nonce and the sender's terms.
const OPENING_LEN: usize = NONCE_LEN + TERMS_LEN;
const PREAMBLE_LEN: usize = MARKER_LEN + OPENING_LEN;

/// Chosen by the host for one session; repeated in the guest's answer.
pub type Nonce = [u8; NONCE_LEN];

/// What a guest looks for. Zero bytes are replaced, at both ends alike, so that a PAD frame without
/// a body, which ends with zeros, always ends the suspicion that a marker has begun.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Marker([u8; MARKER_LEN]);

impl Marker {
    /// Marks the first session of a guest's boot.
    pub const BOOT: Self = Self(*b"towline guest link boot marker 1");

    /// Makes a marker of 32 bytes, which should be random and secret.
    pub fn new(mut bytes: [u8; MARKER_LEN]) -> Self {
        for byte in &mut bytes {
            if *byte == 0 {
                *byte = 0xa5;
            }
        }
        Self(bytes)
    }

    /// Length of the longest end of `bytes` that could be the start of this marker.
    fn begun(&self, bytes: &[u8]) -> usize {
        let longest = bytes.len().min(MARKER_LEN - 1);
        (1..=longest).rev().find(|&len| bytes.ends_with(&self.0[..len])).unwrap_or(0)
    }
}

impl std::fmt::Debug for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker(..)")
    }
}

/// What a guest found in its input, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A session of a host with these terms starts here: drop what was, send [`answer`].
    Session(Nonce, Terms),
    /// Bytes of the session that started last.
    Bytes(Bytes),
}

/// The guest's side: looks for its marker in everything that comes.
#[derive(Debug)]
pub struct GuestScan {
    marker: Marker,
    finder: memmem::Finder<'static>,
    /// The end of the input so far, if it could be the start of the marker or of an opening.
    held: BytesMut,
    /// How much of `held` has been used as an opening already and is not the session's.
    used: usize,
    state: GuestState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GuestState {
    /// No session yet.
    Waiting,
    /// `held` is the start of an opening.
    Opening,
    Running,
}

impl GuestScan {
    /// Waits for the first session.
    pub fn new(marker: Marker) -> Self {
        Self {
            marker,
            finder: memmem::Finder::new(&marker.0).into_owned(),
            held: BytesMut::new(),
            used: 0,
            state: GuestState::Waiting,
        }
    }

    /// Replaces the marker for all later sessions.
    pub fn set_marker(&mut self, marker: Marker) {
        self.marker = marker;
        self.finder = memmem::Finder::new(&marker.0).into_owned();
    }

    /// The marker that it looks for.
    pub fn marker(&self) -> Marker {
        self.marker
    }

    /// Forgets the session, after an error in it: the next bytes count from the next marker on.
    pub fn end_session(&mut self) {
        if self.state == GuestState::Running {
            self.state = GuestState::Waiting;
        }
    }

    /// Takes input, cut anywhere; pushes what it found to `found`.
    pub fn push(&mut self, input: Bytes, found: &mut Vec<Found>) {
        let mut input = self.join(input);
        while !input.is_empty() {
            if self.state == GuestState::Opening {
                if input.len() < OPENING_LEN {
                    self.held = BytesMut::from(&input[..]);
                    return;
                }
                self.start_session(&input, found);
                // It may be the rest of a preamble that was cut and the start of the next.
                self.used = self.marker.begun(&input[..OPENING_LEN]);
                let _ = input.split_to(OPENING_LEN - self.used);
                continue;
            }
            if let Some(at) = self.finder.find(&input) {
                let _ = input.split_to(at + MARKER_LEN);
                self.used = 0;
                self.state = GuestState::Opening;
                continue;
            }
            let begun = self.marker.begun(&input);
            let held = input.split_off(input.len() - begun);
            self.pass_on(input, found);
            self.held = BytesMut::from(&held[..]);
            return;
        }
    }

    fn join(&mut self, input: Bytes) -> Bytes {
        if self.held.is_empty() {
            return input;
        }
        let mut joined = std::mem::take(&mut self.held);
        joined.extend_from_slice(&input);
        joined.freeze()
    }

    fn start_session(&mut self, input: &[u8], found: &mut Vec<Found>) {
        // Terms that no host sends are the rest of a preamble that was cut, and start nothing.
        self.state = GuestState::Waiting;
        if let Some((nonce, rest)) = input.split_first_chunk::<NONCE_LEN>()
            && let Some(terms) = Terms::decode(rest)
        {
            self.state = GuestState::Running;
            found.push(Found::Session(*nonce, terms));
        }
    }

    fn pass_on(&mut self, mut bytes: Bytes, found: &mut Vec<Found>) {
        let used = self.used.min(bytes.len());
        self.used -= used;
        let _ = bytes.split_to(used);
        if self.state == GuestState::Running && !bytes.is_empty() {
            found.push(Found::Bytes(bytes));
        }
    }
}

/// The host's side: skips everything before the guest's answer.
#[derive(Debug)]
pub struct HostScan {
    /// What an answer that counts begins with, one for each marker that was sent.
    answers: Vec<memmem::Finder<'static>>,
    held: BytesMut,
    /// Known once the guest has answered.
    terms: Option<Terms>,
}

/// The guest's answer names terms that cannot be worked with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest agent answered with terms that this node agent cannot work with ({0:02x?}): it is of \
     another version, and is replaced when the sandbox is stopped and started"
)]
pub struct BadTerms([u8; TERMS_LEN]);

impl HostScan {
    /// Waits for the answer to [`preamble`] with the same markers and nonce.
    pub fn new(markers: &[Marker], nonce: &Nonce) -> Self {
        let finder = |marker| memmem::Finder::new(&opening(marker, nonce)).into_owned();
        Self { answers: markers.iter().map(finder).collect(), held: BytesMut::new(), terms: None }
    }

    /// The guest's terms, once it has answered.
    pub fn terms(&self) -> Option<Terms> {
        self.terms
    }

    /// Takes input, cut anywhere; returns bytes of the session.
    pub fn push(&mut self, input: Bytes) -> Result<Bytes, BadTerms> {
        if self.terms.is_some() {
            return Ok(input);
        }
        self.held.extend_from_slice(&input);
        let found = self.answers.iter().filter_map(|answer| answer.find(&self.held)).min();
        let Some(at) = found else {
            let keep = self.held.len().min(PREAMBLE_LEN - 1);
            self.held = self.held.split_off(self.held.len() - keep);
            return Ok(Bytes::new());
        };
        let end = at + PREAMBLE_LEN;
        if self.held.len() < end {
            return Ok(Bytes::new());
        }
        let rest = self.held.split_off(end).freeze();
        let answered = &self.held[end - TERMS_LEN..];
        let terms = Terms::decode(answered).filter(|terms| terms.is_ours());
        self.terms = Some(terms.ok_or_else(|| {
            let mut bytes = [0; TERMS_LEN];
            bytes.copy_from_slice(answered);
            BadTerms(bytes)
        })?);
        self.held = BytesMut::new();
        Ok(rest)
    }
}

/// What a host sends to start a session. Several markers may be offered when it is not known which
/// the guest has; a guest in a session takes the others for padding. The secret one goes first.
pub fn preamble(markers: &[Marker], nonce: &Nonce, terms: Terms) -> Bytes {
    let mut out = BytesMut::new();
    for marker in markers {
        put_header(&mut out, StreamId(0), Kind::Pad, PREAMBLE_LEN);
        out.extend_from_slice(&answer(marker, nonce, terms));
    }
    pad_after(&mut out, markers);
    out.freeze()
}

/// What a guest answers to a preamble; `terms` are its own, for the host's version
/// ([`Terms::answer_to`]).
pub fn answer(marker: &Marker, nonce: &Nonce, terms: Terms) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..MARKER_LEN + NONCE_LEN].copy_from_slice(&opening(marker, nonce));
    out[MARKER_LEN + NONCE_LEN..].copy_from_slice(&terms.encode());
    out
}

fn opening(marker: &Marker, nonce: &Nonce) -> [u8; MARKER_LEN + NONCE_LEN] {
    let mut out = [0; MARKER_LEN + NONCE_LEN];
    out[..MARKER_LEN].copy_from_slice(&marker.0);
    out[MARKER_LEN..].copy_from_slice(nonce);
    out
}

/// Ends a batch that the host is about to write: if its end looks like the start of a marker, which
/// the guest would hold back, an empty PAD frame follows it.
pub fn pad_after(out: &mut BytesMut, markers: &[Marker]) {
    if markers.iter().any(|marker| marker.begun(out) > 0) {
        put_header(out, StreamId(0), Kind::Pad, 0);
    }
}
