//! The multiplexer under cuts, loss, garbage and hostile input: what it promises in its own words.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test that fails, fails here"
)]

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use towline_proto::mux::preamble::{
    Found, GuestScan, HostScan, Marker, answer, pad_after, preamble,
};
use towline_proto::mux::terms::{Terms, VERSION, WINDOW_MIN};
use towline_proto::mux::{
    EXTRA_MAX, End, FIRST_WINDOW, GUEST_OPENED_MAX, HalfError, Mux, MuxError, PIECE_MAX, Priority,
    Read, SEND_BUFFER_MAX, StreamId, WINDOW,
};

const SECRET: [u8; 32] = *b"\0\x01secret marker of this boot . 1";

fn terms() -> Terms {
    Terms::new(WINDOW)
}

/// Two ends that know each other's windows.
fn pair(host: u32, guest: u32) -> (Mux, Mux) {
    let mut ends = (Mux::new(End::Host, Terms::new(host)), Mux::new(End::Guest, Terms::new(guest)));
    ends.0.agree(Terms::new(guest));
    ends.1.agree(Terms::new(host));
    ends
}

/// Moves everything that `from` has to say to `to`, cut into pieces of `cut` bytes.
fn carry(from: &mut Mux, to: &mut Mux, cut: usize) {
    while from.has_output() {
        let mut wire = BytesMut::new();
        from.transmit(&mut wire, 4096);
        for piece in wire.chunks(cut.max(1)) {
            to.receive(Bytes::copy_from_slice(piece)).unwrap();
        }
    }
}

fn read_all(mux: &mut Mux, id: StreamId) -> (Vec<u8>, Result<Read, HalfError>) {
    let (mut got, mut buffer) = (Vec::new(), [0; 1000]);
    loop {
        match mux.read(id, &mut buffer) {
            Ok(Read::Data(len)) => got.extend_from_slice(&buffer[..len]),
            other => return (got, other),
        }
    }
}

fn priority(number: u8) -> Priority {
    [Priority::Control, Priority::Interactive, Priority::Demand, Priority::Bulk]
        [usize::from(number % 4)]
}

#[test]
fn a_question_and_its_answer_pass_and_the_stream_is_forgotten() {
    let (mut host, mut guest) = pair(WINDOW, WINDOW);
    let id = host.open(Priority::Control).unwrap();
    assert_eq!(host.write(id, b"question"), Ok(8));
    host.finish(id).unwrap();
    carry(&mut host, &mut guest, 3);
    let (there, seen) = guest.accept().unwrap();
    assert_eq!(seen, Priority::Control);
    assert_eq!(read_all(&mut guest, there), (b"question".to_vec(), Ok(Read::End)));
    guest.write(there, b"answer").unwrap();
    guest.finish(there).unwrap();
    // Leaving after FIN must not spoil what was sent before.
    guest.release_receiver(there);
    guest.release_sender(there);
    carry(&mut guest, &mut host, 5);
    assert_eq!(read_all(&mut host, id), (b"answer".to_vec(), Ok(Read::End)));
    host.release_sender(id);
    host.release_receiver(id);
    assert_eq!((host.streams(), guest.streams()), (0, 0));
}

#[test]
fn a_reader_that_leaves_early_stops_the_writer_but_not_its_own_output() {
    let (mut host, mut guest) = pair(WINDOW, WINDOW);
    let id = host.open(Priority::Interactive).unwrap();
    host.write(id, b"input that nobody wants").unwrap();
    carry(&mut host, &mut guest, 100);
    let (there, _) = guest.accept().unwrap();
    guest.write(there, b"last words").unwrap();
    guest.finish(there).unwrap();
    guest.release_receiver(there);
    carry(&mut guest, &mut host, 100);
    assert!(matches!(host.write(id, b"more"), Err(HalfError::Stopped(_))));
    assert_eq!(read_all(&mut host, id), (b"last words".to_vec(), Ok(Read::End)));
    guest.release_sender(there);
    host.release_sender(id);
    host.release_receiver(id);
    carry(&mut host, &mut guest, 100);
    assert_eq!((host.streams(), guest.streams()), (0, 0));
}

#[test]
fn an_abandoned_sender_is_an_error_to_its_reader_not_an_end() {
    let (mut host, mut guest) = pair(WINDOW, WINDOW);
    let id = guest.open(Priority::Demand).unwrap();
    guest.write(id, b"half of it").unwrap();
    carry(&mut guest, &mut host, 100);
    let (there, _) = host.accept().unwrap();
    guest.release_sender(id);
    carry(&mut guest, &mut host, 100);
    assert!(matches!(host.read(there, &mut [0; 64]), Err(HalfError::Reset(_))));
}

#[test]
fn a_writer_stops_at_the_window_until_the_reader_has_read() {
    let (mut host, mut guest) = pair(WINDOW, WINDOW);
    let id = host.open(Priority::Bulk).unwrap();
    let mut sent = 0;
    loop {
        let taken = host.write(id, &[7; 10_000]).unwrap();
        sent += taken;
        carry(&mut host, &mut guest, 1 << 20);
        if taken == 0 {
            break;
        }
    }
    assert!(sent > WINDOW as usize && sent <= WINDOW as usize + SEND_BUFFER_MAX);
    let (there, _) = guest.accept().unwrap();
    assert_eq!(read_all(&mut guest, there).0.len(), WINDOW as usize);
    carry(&mut guest, &mut host, 100);
    assert!(host.write(id, &[7; 10]).is_ok_and(|taken| taken == 0));
    carry(&mut host, &mut guest, 100);
    assert!(host.write(id, &[7; 10]).is_ok_and(|taken| taken == 10));
}

#[test]
fn bulk_does_not_delay_control_and_is_not_starved_by_it() {
    let mut host = Mux::new(End::Host, terms());
    let bulk = host.open(Priority::Bulk).unwrap();
    let control = host.open(Priority::Control).unwrap();
    let mut wire = BytesMut::new();
    host.transmit(&mut wire, 1 << 20);
    host.write(bulk, &[b'b'; 60_000]).unwrap();
    host.write(control, b"now").unwrap();
    wire.clear();
    host.transmit(&mut wire, 1000);
    assert_eq!(wire.windows(3).position(|three| three == b"now"), Some(8));
    let mut bulk_came = false;
    for _ in 0..16 {
        host.write(control, &[b'c'; 4000]).unwrap();
        wire.clear();
        host.transmit(&mut wire, 4008);
        bulk_came |= wire.contains(&b'b');
    }
    assert!(bulk_came, "bulk never got a turn in 16 batches full of control");
}

#[test]
fn a_guest_cannot_open_streams_without_bound() {
    let mut host = Mux::new(End::Host, terms());
    let mut result = Ok(());
    for number in 0..10_000_u32 {
        let mut frame = BytesMut::new();
        frame.extend_from_slice(&(number * 2 + 1).to_le_bytes());
        frame.extend_from_slice(&[1, 4, 0, 0, 3, 0, 0, 0]);
        result = host.receive(frame.freeze());
        if result.is_err() {
            break;
        }
    }
    assert_eq!(result, Err(MuxError::TooManyRefusals));
    assert!(host.streams() <= GUEST_OPENED_MAX);
}

#[test]
fn a_preamble_cut_in_its_nonce_does_not_hide_the_next_one() {
    let marker = Marker::new(SECRET);
    let whole = preamble(&[marker], &[9; 16], terms());
    for cut in 0..whole.len() {
        let mut scan = GuestScan::new(marker);
        let mut found = Vec::new();
        scan.push(whole.slice(..cut), &mut found);
        scan.push(preamble(&[marker], &[4; 16], terms()), &mut found);
        scan.push(Bytes::from_static(b"!"), &mut found);
        let last = found.iter().rposition(|item| *item == Found::Session([4; 16], terms()));
        let rest = last.map(|at| &found[at + 1..]);
        assert_eq!(rest, Some(&[Found::Bytes(Bytes::from_static(b"!"))][..]), "cut at {cut}");
    }
}

#[test]
fn a_guest_with_the_secret_takes_the_boot_marker_for_padding() {
    let marker = Marker::new(SECRET);
    let offered = [marker, Marker::BOOT];
    let nonce = [3; 16];
    for (has, starts) in [(marker, 1), (Marker::BOOT, 1)] {
        let mut scan = GuestScan::new(has);
        let mut found = Vec::new();
        scan.push(preamble(&offered, &nonce, terms()), &mut found);
        let sessions = found.iter().filter(|item| **item == Found::Session(nonce, terms())).count();
        assert_eq!(sessions, starts);
        // Whatever follows in the preamble must be legal for the session.
        let mut mux = Mux::new(End::Guest, terms());
        for item in found {
            if let Found::Bytes(bytes) = item {
                mux.receive(bytes).unwrap();
            }
        }
        let mut host = HostScan::new(&offered, &nonce);
        let answer = Bytes::copy_from_slice(&answer(&has, &nonce, terms()));
        assert_eq!(host.push(answer), Ok(Bytes::new()));
        assert_eq!(host.terms(), Some(terms()));
    }
}

#[test]
fn each_end_keeps_to_the_others_window_whatever_its_own_is() {
    for (ours, theirs) in [(WINDOW_MIN, WINDOW), (WINDOW, WINDOW_MIN), (5 * WINDOW, 70_001)] {
        let (mut host, mut guest) = pair(ours, theirs);
        let id = host.open(Priority::Bulk).unwrap();
        let mut unread = 0;
        while unread <= theirs as usize + SEND_BUFFER_MAX {
            let taken = host.write(id, &[7; 9999]).unwrap();
            unread += taken;
            carry(&mut host, &mut guest, 1 << 20);
            if taken == 0 {
                break;
            }
        }
        let (there, _) = guest.accept().unwrap();
        assert_eq!(read_all(&mut guest, there).0.len(), theirs as usize);
        carry(&mut guest, &mut host, 100);
        carry(&mut host, &mut guest, 1 << 20);
        assert!(!read_all(&mut guest, there).0.is_empty(), "{ours}, {theirs}: it never went on");
    }
}

#[test]
fn before_a_host_knows_its_guests_window_it_sends_what_every_build_takes() {
    let mut host = Mux::new(End::Host, terms());
    let mut guest = Mux::new(End::Guest, Terms::new(WINDOW_MIN * 3));
    let id = host.open(Priority::Bulk).unwrap();
    host.write(id, &[7; 100_000]).unwrap();
    carry(&mut host, &mut guest, 1 << 20);
    let (there, _) = guest.accept().unwrap();
    host.agree(Terms::new(WINDOW_MIN * 3));
    carry(&mut host, &mut guest, 1 << 20);
    assert_eq!(read_all(&mut guest, there).0.len(), WINDOW_MIN as usize * 3);
}

#[test]
fn a_guest_of_another_version_is_an_error_that_says_so() {
    let nonce = [3; 16];
    let newer = Terms { version: VERSION + 1, ..terms() };
    for bad in [newer, Terms { version: 1, window: 7 }] {
        let mut scan = HostScan::new(&[Marker::BOOT], &nonce);
        let answer = Bytes::copy_from_slice(&answer(&Marker::BOOT, &nonce, bad));
        assert_eq!(scan.push(answer.slice(..50)), Ok(Bytes::new()));
        let error = scan.push(answer.slice(50..)).unwrap_err();
        assert!(error.to_string().contains("stopped and started"), "{error}");
    }
}

/// One end of a session with the streams that it knows.
struct Peer {
    mux: Mux,
    streams: Vec<StreamId>,
    received: BTreeMap<StreamId, Vec<u8>>,
}

impl Peer {
    fn new(mux: Mux) -> Self {
        Self { mux, streams: Vec::new(), received: BTreeMap::new() }
    }

    fn take_in(&mut self, bytes: Bytes) {
        self.mux.receive(bytes).unwrap();
        while let Some((id, _)) = self.mux.accept() {
            self.streams.push(id);
        }
    }

    /// Whether there was something: then credit may be due.
    fn read_some(&mut self, id: StreamId, len: usize) -> bool {
        let mut buffer = vec![0; len];
        let Ok(Read::Data(len)) = self.mux.read(id, &mut buffer) else { return false };
        self.received.entry(id).or_default().extend_from_slice(&buffer[..len]);
        true
    }
}

#[derive(Debug, Clone)]
enum Step {
    Open(bool, u8),
    Write(bool, usize, usize),
    Read(bool, usize, usize),
    Carry(bool, usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (any::<bool>(), any::<u8>()).prop_map(|(end, priority)| Step::Open(end, priority)),
        (any::<bool>(), 0..8usize, 0..100_000usize).prop_map(|(e, s, l)| Step::Write(e, s, l)),
        (any::<bool>(), 0..8usize, 1..100_000usize).prop_map(|(e, s, l)| Step::Read(e, s, l)),
        (any::<bool>(), 1..70_000usize, 1..5_000usize).prop_map(|(e, l, c)| Step::Carry(e, l, c)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every byte arrives once, in order, on its own stream, whatever the schedule; a receiver that
    /// is over its credit would fail in `receive`.
    #[test]
    fn streams_carry_their_bytes_in_any_schedule(
        steps in prop::collection::vec(step(), 1..150),
        windows in (WINDOW_MIN..2 * WINDOW, WINDOW_MIN..2 * WINDOW),
        agreed_at in 0..50usize,
    ) {
        let mut ends = [
            Peer::new(Mux::new(End::Host, Terms::new(windows.0))),
            Peer::new(Mux::new(End::Guest, Terms::new(windows.1))),
        ];
        // A guest knows the host's terms from the start, a host the guest's some time later.
        ends[1].mux.agree(Terms::new(windows.0));
        let mut sent: [BTreeMap<StreamId, Vec<u8>>; 2] = Default::default();
        let mut byte = 0u8;
        for (at, step) in steps.into_iter().enumerate() {
            if at == agreed_at {
                ends[0].mux.agree(Terms::new(windows.1));
            }
            match step {
                Step::Open(end, number) => {
                    let peer = &mut ends[usize::from(end)];
                    if peer.streams.len() < 8 {
                        let id = peer.mux.open(priority(number)).unwrap();
                        peer.streams.push(id);
                    }
                }
                Step::Write(end, stream, len) => {
                    let end = usize::from(end);
                    let Some(&id) = ends[end].streams.get(stream) else { continue };
                    byte = byte.wrapping_add(1);
                    let bytes: Vec<u8> = (0..len).map(|at| byte ^ (at % 251) as u8).collect();
                    let taken = ends[end].mux.write(id, &bytes).unwrap();
                    sent[end].entry(id).or_default().extend_from_slice(&bytes[..taken]);
                }
                Step::Read(end, stream, len) => {
                    let peer = &mut ends[usize::from(end)];
                    if let Some(&id) = peer.streams.get(stream) {
                        peer.read_some(id, len);
                    }
                }
                Step::Carry(from, limit, cut) => {
                    let from = usize::from(from);
                    let mut wire = BytesMut::new();
                    ends[from].mux.transmit(&mut wire, limit);
                    prop_assert!(wire.len() <= limit.max(PIECE_MAX) + 1024);
                    for piece in wire.chunks(cut) {
                        ends[1 - from].take_in(Bytes::copy_from_slice(piece));
                    }
                }
            }
        }
        ends[0].mux.agree(Terms::new(windows.1));
        loop {
            let mut moved = false;
            for from in 0..2 {
                let mut wire = BytesMut::new();
                ends[from].mux.transmit(&mut wire, 32 << 10);
                moved |= !wire.is_empty();
                ends[1 - from].take_in(wire.freeze());
                for id in ends[1 - from].streams.clone() {
                    moved |= ends[1 - from].read_some(id, 1 << 20);
                }
            }
            if !moved {
                break;
            }
        }
        for from in 0..2 {
            for (id, bytes) in &sent[from] {
                let got = ends[1 - from].received.get(id).map_or(&[][..], Vec::as_slice);
                prop_assert!(got == &bytes[..], "stream {id:?} differs");
            }
        }
    }

    /// Hostile bytes end in an error or in nothing; a session never holds more than its windows.
    #[test]
    fn no_bytes_panic_either_end(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        frames in prop::collection::vec((0..6u32, 0..9u8, 0..40_000u32), 0..40),
        cut in 1..3000usize,
    ) {
        for end in [End::Host, End::Guest] {
            let mut mux = Mux::new(end, terms());
            let _ = mux.receive(Bytes::copy_from_slice(&bytes));
            let mut mux = Mux::new(end, terms());
            let own = mux.open(Priority::Bulk).unwrap();
            let mut wire = BytesMut::new();
            for (id, kind, len) in &frames {
                wire.extend_from_slice(&id.to_le_bytes());
                let len = if matches!(kind, 1 | 3 | 5 | 6) { 4 } else { *len };
                wire.extend_from_slice(&(len << 8 | u32::from(*kind)).to_le_bytes());
                wire.extend_from_slice(&vec![0; len as usize]);
            }
            for piece in wire.chunks(cut) {
                if mux.receive(Bytes::copy_from_slice(piece)).is_err() {
                    break;
                }
                let _ = mux.read(own, &mut [0; 64]);
                let mut out = BytesMut::new();
                mux.transmit(&mut out, 4096);
            }
        }
    }

    /// The guest finds a preamble behind the cut-off rest of an older session, and neither passes on
    /// a byte of the marker nor holds back a byte of what a host has padded.
    #[test]
    fn a_preamble_is_found_behind_anything(
        before in prop::collection::vec(any::<u8>(), 0..200),
        marker_part in 0..32usize,
        after in prop::collection::vec(any::<u8>(), 1..200),
        cut in 1..80usize,
    ) {
        let marker = Marker::new(SECRET);
        let mut scan = GuestScan::new(marker);
        let mut found = Vec::new();
        scan.push(preamble(&[marker], &[1; 16], terms()), &mut found);
        prop_assert_eq!(&found[..], &[Found::Session([1; 16], terms())]);
        found.clear();
        // A frame's payload that ends like a marker, padded as the host does, comes out whole.
        let mut batch = BytesMut::from(&before[..]);
        batch.extend_from_slice(&answer(&marker, &[0; 16], terms())[..marker_part]);
        let payload = batch.clone();
        pad_after(&mut batch, &[marker]);
        for piece in batch.chunks(cut) {
            scan.push(Bytes::copy_from_slice(piece), &mut found);
        }
        let whole: Vec<u8> = found.drain(..).flat_map(|item| match item {
            Found::Bytes(bytes) => bytes.to_vec(),
            Found::Session(..) => panic!("a session out of nothing"),
        }).collect();
        prop_assert_eq!(&whole[..], &batch[..]);
        prop_assert!(whole.starts_with(&payload));
        // The host dies in the middle of the payload; a new one comes.
        let mut wire = payload;
        wire.extend_from_slice(&preamble(&[marker], &[2; 16], terms()));
        wire.extend_from_slice(&after);
        let end = wire.len();
        pad_after(&mut wire, &[marker]);
        for piece in wire.chunks(cut) {
            scan.push(Bytes::copy_from_slice(piece), &mut found);
        }
        let start = found.iter().position(|item| *item == Found::Session([2; 16], terms())).unwrap();
        let old: usize = found[..start].iter().map(|item| match item {
            Found::Bytes(bytes) => bytes.len(),
            Found::Session(..) => 0,
        }).sum();
        prop_assert!(old <= before.len() + marker_part + 8, "bytes of the marker were passed on");
        let new: Vec<u8> = found[start + 1..].iter().flat_map(|item| match item {
            Found::Bytes(bytes) => bytes.to_vec(),
            Found::Session(..) => Vec::new(),
        }).collect();
        prop_assert_eq!(&new[..], &wire[end - after.len()..]);
    }

    /// The host skips whatever a guest had under way, and nothing of the new session.
    #[test]
    fn an_answer_is_found_behind_old_output(
        before in prop::collection::vec(any::<u8>(), 0..300),
        after in prop::collection::vec(any::<u8>(), 0..300),
        cut in 1..80usize,
    ) {
        let (marker, nonce) = (Marker::new(SECRET), [7; 16]);
        let mut scan = HostScan::new(&[marker, Marker::BOOT], &nonce);
        let mut wire = before;
        wire.extend_from_slice(&answer(&marker, &nonce, terms())[..20]);
        wire.extend_from_slice(&answer(&marker, &nonce, terms()));
        wire.extend_from_slice(&after);
        let mut got = Vec::new();
        for piece in wire.chunks(cut) {
            got.extend_from_slice(&scan.push(Bytes::copy_from_slice(piece)).unwrap());
        }
        prop_assert_eq!(got, after);
        prop_assert_eq!(scan.terms(), Some(terms()));
    }
}

/// Writes from guest to node until no more goes, reads all of it, and so on; returns what was under
/// way in the last round.
fn grow(guest: &mut Mux, host: &mut Mux, id: StreamId, there: StreamId, rounds: usize) -> usize {
    let mut held = 0;
    for round in 0..=rounds {
        let mut idle = 0;
        while idle < 2 {
            let taken = guest.write(id, &[7; 60_000]).unwrap();
            carry(guest, host, 1 << 20);
            idle = if taken == 0 { idle + 1 } else { 0 };
        }
        if round == rounds {
            break;
        }
        held = read_all(host, there).0.len();
        carry(host, guest, 1 << 20);
    }
    held
}

#[test]
fn a_stream_that_a_guest_opened_starts_small_and_grows_as_it_is_read() {
    let (mut host, mut guest) = pair(WINDOW, WINDOW);
    let mut held = Vec::new();
    // More streams than the extra is enough for.
    let streams = (EXTRA_MAX / (WINDOW - FIRST_WINDOW)) as usize + 3;
    let mut open = Vec::new();
    for _ in 0..streams {
        let id = guest.open(Priority::Bulk).unwrap();
        guest.write(id, b"x").unwrap();
        carry(&mut guest, &mut host, 1 << 20);
        let (there, _) = host.accept().unwrap();
        held.push(grow(&mut guest, &mut host, id, there, 8));
        open.push((id, there));
    }
    assert_eq!(held[0], WINDOW as usize);
    assert_eq!(held[streams - 1], FIRST_WINDOW as usize);
    let most = streams * FIRST_WINDOW as usize + EXTRA_MAX as usize;
    assert!(held.iter().sum::<usize>() <= most);
    // What one stream had is another's when it is gone.
    let (id, there) = open[0];
    guest.release_sender(id);
    guest.release_receiver(id);
    host.release_sender(there);
    host.release_receiver(there);
    carry(&mut guest, &mut host, 1 << 20);
    carry(&mut host, &mut guest, 1 << 20);
    let (id, there) = open[streams - 1];
    assert_eq!(grow(&mut guest, &mut host, id, there, 8), WINDOW as usize);
}

#[test]
fn many_streams_of_a_guest_hold_no_more_than_is_said() {
    let held = GUEST_OPENED_MAX * FIRST_WINDOW as usize + EXTRA_MAX as usize;
    assert!(held <= 64 << 20);
}
