use proptest::prelude::*;

use super::*;

/// One end with its local socket: what it is still to say, and what it was told.
struct End {
    state: Durable,
    to_say: Vec<u8>,
    said: usize,
    heard: Vec<u8>,
    heard_end: bool,
}

impl End {
    fn new(to_say: Vec<u8>) -> Self {
        Self { state: Durable::default(), to_say, said: 0, heard: Vec::new(), heard_end: false }
    }

    fn read(&mut self, max: usize) {
        let len = max.min(self.state.room()).min(self.to_say.len() - self.said);
        self.state.on_read(Bytes::copy_from_slice(&self.to_say[self.said..self.said + len]));
        self.said += len;
        if self.said == self.to_say.len() {
            self.state.on_read_end();
        }
    }

    fn write(&mut self, max: usize) {
        match self.state.next_write() {
            Some(Write::Bytes(bytes)) => {
                let len = max.min(bytes.len());
                self.heard.extend_from_slice(&bytes[..len]);
                self.state.written(len);
            }
            Some(Write::End) => {
                assert!(!self.heard_end, "an end is told once");
                self.heard_end = true;
                self.state.end_written();
            }
            Some(Write::Reset) => panic!("nobody has reset"),
            None => {}
        }
    }
}

/// Both ends, and the frames between them.
struct Pair {
    ends: [End; 2],
    wire: [VecDeque<Frame>; 2],
}

impl Pair {
    fn attach(&mut self) {
        let received = [0, 1].map(|end| self.ends[end].state.received_offset());
        self.ends[0].state.attach(received[1]).unwrap();
        self.ends[1].state.attach(received[0]).unwrap();
    }

    fn cut(&mut self) {
        for end in 0..2 {
            self.ends[end].state.detach();
            self.wire[end].clear();
        }
        self.attach();
    }

    fn send(&mut self, from: usize) {
        if let Some(outgoing) = self.ends[from].state.next_outgoing() {
            self.wire[from].push_back(outgoing.to_frame());
        }
    }

    fn deliver(&mut self, from: usize) {
        if let Some(frame) = self.wire[from].pop_front() {
            self.ends[1 - from].state.on_frame(&frame).unwrap();
        }
    }

    fn step(&mut self, (what, end, size): (u8, usize, usize)) {
        match what {
            0 | 1 => self.ends[end].read(size),
            2 | 3 => self.ends[end].write(size),
            4..=6 => self.send(end),
            7..=9 => self.deliver(end),
            10 => self.ends[end].state.set_pressed(size % 2 == 0),
            _ => self.cut(),
        }
        for end in &self.ends {
            assert!(end.state.held() <= 2 * TCP_WINDOW + TCP_FIRST_WINDOW, "memory is bounded");
        }
    }

    fn finish(&mut self) {
        // A bound: each round moves something until there is nothing to move.
        for _ in 0..10_000 {
            for end in 0..2 {
                self.ends[end].read(DATA_CHUNK_MAX);
                self.ends[end].write(DATA_CHUNK_MAX);
                self.send(end);
                self.deliver(end);
            }
            if self.ends.iter().all(|end| end.state.is_complete()) {
                return;
            }
        }
        panic!("the connection stalled");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn nothing_is_lost_or_doubled_however_links_are_cut(
        there in prop::collection::vec(any::<u8>(), 0..300_000),
        back in 0usize..100_000,
        steps in prop::collection::vec((0u8..13, 0usize..2, 1usize..100_000), 0..400),
    ) {
        let back: Vec<u8> = (0..back).map(|i| (i % 251).to_le_bytes()[0]).collect();
        let ends = [End::new(there.clone()), End::new(back.clone())];
        let mut pair = Pair { ends, wire: [VecDeque::new(), VecDeque::new()] };
        pair.attach();
        for step in steps {
            pair.step(step);
        }
        pair.finish();
        prop_assert!(pair.ends[1].heard == there, "there");
        prop_assert!(pair.ends[0].heard == back, "back");
    }

    #[test]
    fn no_frame_of_a_hostile_peer_panics_or_makes_us_hold_more_than_was_granted(
        frames in prop::collection::vec(
            (100u8..105, any::<bool>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..70_000)),
            0..20,
        ),
    ) {
        let mut state = Durable::default();
        state.attach(0).unwrap();
        state.on_read(Bytes::from_static(b"ours"));
        for (kind, near, offset, bytes) in frames {
            let offset = if near { state.received_offset() } else { offset };
            let mut body = offset.to_le_bytes().to_vec();
            body.extend(bytes);
            let _ = state.on_frame(&Frame { kind, body: body.into() });
            prop_assert!(state.held() <= TCP_FIRST_WINDOW + 4);
            while state.next_outgoing().is_some() {}
        }
    }
}

#[test]
fn a_reset_comes_after_what_was_said_before_it() {
    let mut state = Durable::default();
    state.attach(0).unwrap();
    state.on_read(Bytes::from_static(b"last words"));
    state.on_local_reset();
    assert!(matches!(state.next_outgoing(), Some(Outgoing::Data(0, _))));
    assert_eq!(state.next_outgoing(), Some(Outgoing::Reset));
    assert!(state.is_reset() && state.next_outgoing().is_none());

    let mut peer = Durable::default();
    peer.attach(0).unwrap();
    peer.on_data(0, Bytes::from_static(b"last words")).unwrap();
    peer.on_frame(&Outgoing::Reset.to_frame()).unwrap();
    assert_eq!(peer.next_write(), Some(Write::Bytes(Bytes::from_static(b"last words"))));
    peer.written(10);
    assert_eq!(peer.next_write(), Some(Write::Reset));
}

#[test]
fn first_bytes_are_said_again_until_somebody_has_them() {
    let mut state = Durable::default();
    state.on_read(Bytes::from_static(b"GET /"));
    assert_eq!(state.first(3), Bytes::from_static(b"GET"));
    assert_eq!(state.first(100), Bytes::from_static(b"GET /"));
    state.attach(3).unwrap();
    assert_eq!(state.next_outgoing(), Some(Outgoing::Data(3, Bytes::from_static(b" /"))));
}

#[test]
fn what_comes_after_an_end_or_leaves_a_gap_is_refused() {
    let mut state = Durable::default();
    state.on_data(0, Bytes::from_static(b"abc")).unwrap();
    assert!(matches!(state.on_data(4, Bytes::new()), Err(DurableError::Gap { .. })));
    assert!(matches!(state.on_end(2), Err(DurableError::AfterEnd)));
    state.on_end(3).unwrap();
    assert!(matches!(state.on_data(3, Bytes::from_static(b"d")), Err(DurableError::AfterEnd)));
    assert!(matches!(state.attach(1), Err(DurableError::Gone { .. })));
}
