//! Which ready guests a node keeps: guests that wait, with an image's disks and an empty one of their
//! own, for a sandbox that asks for just that.
//!
//! What is promised to sandboxes goes first: ready guests have only memory that is promised to nobody,
//! and one is made only where a claim leaves room for it, so that the sandbox that claims it does not
//! push it out. One is made at a time. Kinds are learned from the starts of this node.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Kinds that are remembered: those that were started last.
const KINDS_MAX: usize = 4;
/// How long after its last start a kind is still kept ready.
const KIND_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Failures in a row after which a kind is left alone until it is started again.
const FAILURES_MAX: u32 = 3;
/// After a start, until a guest is made for the next: what was just started goes first.
const PAUSE: Duration = Duration::from_secs(2);
/// Until a kind of which none could be made is tried again.
const RETRY: Duration = Duration::from_secs(20);

/// What a ready guest is ready for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyKind {
    /// The image's layer disks; none for a local image.
    pub layers: Vec<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory of the guest.
    pub memory_mib: u64,
    /// Size of its writable disk.
    pub disk_mib: u64,
}

/// A ready guest's number, never used twice by one node agent.
pub type ReadyId = u64;

/// What should be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyEffect {
    /// Make a guest; the answer is `made`, `failed` or `absent`.
    Make(ReadyId, ReadyKind),
    /// End a guest; the answer is `ended`.
    End(ReadyId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Making,
    Waiting,
    Ending,
}

#[derive(Debug, Clone)]
struct Guest {
    kind: ReadyKind,
    state: State,
}

#[derive(Debug, Clone)]
struct Used {
    kind: ReadyKind,
    last: Duration,
    failures: u32,
    not_before: Duration,
}

/// The ready guests of a node.
#[derive(Debug, Clone)]
pub struct Ready {
    wanted: usize,
    free_mib: u64,
    /// The one that was started last comes first.
    kinds: Vec<Used>,
    guests: BTreeMap<ReadyId, Guest>,
    ids: ReadyId,
}

impl Ready {
    /// Keeps `wanted` guests of each kind, once something is known to be free.
    pub fn new(wanted: usize) -> Self {
        Self { wanted, free_mib: 0, kinds: Vec::new(), guests: BTreeMap::new(), ids: 0 }
    }

    /// So much memory of what this node offers is promised to nobody. Returns whether that is news.
    pub fn free(&mut self, free_mib: u64) -> bool {
        std::mem::replace(&mut self.free_mib, free_mib) != free_mib
    }

    /// A sandbox of this kind was started.
    pub fn started(&mut self, now: Duration, kind: ReadyKind) {
        let before = self.kinds.iter().position(|used| used.kind == kind);
        let before = before.map(|at| self.kinds.remove(at));
        // Many starts in a row do not put it off for ever.
        let not_before = match before {
            Some(used) if used.failures == 0 && used.not_before > now => used.not_before,
            _ => now + PAUSE,
        };
        self.kinds.insert(0, Used { kind, last: now, failures: 0, not_before });
        self.kinds.truncate(KINDS_MAX);
    }

    /// Takes a guest out for a sandbox, the one that waits longest.
    pub fn claim(&mut self, kind: &ReadyKind) -> Option<ReadyId> {
        let waits = |guest: &Guest| guest.state == State::Waiting && guest.kind == *kind;
        let id = *self.guests.iter().find(|(_, guest)| waits(guest))?.0;
        self.guests.remove(&id);
        Some(id)
    }

    /// A guest that was made waits now.
    pub fn made(&mut self, id: ReadyId) {
        let Some(guest) = self.guests.get_mut(&id) else { return };
        if guest.state == State::Making {
            guest.state = State::Waiting;
        }
        let kind = guest.kind.clone();
        if let Some(used) = self.used(&kind) {
            used.failures = 0;
        }
    }

    /// A guest could not be made, or ended while it waited; nothing of it is left.
    pub fn failed(&mut self, now: Duration, id: ReadyId) {
        self.gone(now, id, 1);
    }

    /// There is nothing yet that one could be made from.
    pub fn absent(&mut self, now: Duration, id: ReadyId) {
        self.gone(now, id, 0);
    }

    /// Nothing of the guest is left.
    pub fn ended(&mut self, id: ReadyId) {
        self.guests.remove(&id);
    }

    /// Whether all that runs, and all that is promised, has room.
    pub fn fits(&self) -> bool {
        self.memory_mib() <= self.free_mib
    }

    /// What should be done now, in order.
    pub fn next(&mut self, now: Duration) -> Vec<ReadyEffect> {
        self.kinds.retain(|used| now.saturating_sub(used.last) < KIND_LIFE);
        let mut effects = Vec::new();
        while let Some(id) = self.excess() {
            let guest = self.guests.get_mut(&id).expect("one of them");
            guest.state = State::Ending;
            effects.push(ReadyEffect::End(id));
        }
        effects.extend(self.make(now));
        effects
    }

    /// When `next` should be asked again, if nothing happens before.
    pub fn next_deadline(&self, now: Duration) -> Option<Duration> {
        let ends = self.kinds.iter().map(|used| used.last + KIND_LIFE);
        let retries = self.kinds.iter().map(|used| used.not_before);
        ends.chain(retries).filter(|&at| at > now).min()
    }

    /// Memory of all guests, those that are being ended too.
    fn memory_mib(&self) -> u64 {
        self.guests.values().map(|guest| guest.kind.memory_mib).sum()
    }

    fn used(&mut self, kind: &ReadyKind) -> Option<&mut Used> {
        self.kinds.iter_mut().find(|used| used.kind == *kind)
    }

    fn gone(&mut self, now: Duration, id: ReadyId, failures: u32) {
        let Some(guest) = self.guests.remove(&id) else { return };
        if let Some(used) = self.used(&guest.kind) {
            used.failures += failures;
            used.not_before = now + RETRY;
        }
    }

    /// A guest that should not be: of a kind that is not kept, or one for which there is no room. The
    /// kind that was started longest ago goes first, and of a kind the newest.
    fn excess(&self) -> Option<ReadyId> {
        let lives = || self.guests.iter().rev().filter(|(_, guest)| guest.state != State::Ending);
        let rank = |kind: &ReadyKind| self.kinds.iter().position(|used| used.kind == *kind);
        if let Some((&id, _)) = lives().find(|(_, guest)| rank(&guest.kind).is_none()) {
            return Some(id);
        }
        let stays: u64 = lives().map(|(_, guest)| guest.kind.memory_mib).sum();
        if stays <= self.free_mib {
            return None;
        }
        let (&id, _) = lives().max_by_key(|(id, guest)| (rank(&guest.kind), **id))?;
        Some(id)
    }

    fn make(&mut self, now: Duration) -> Option<ReadyEffect> {
        if self.guests.values().any(|guest| guest.state == State::Making) {
            return None;
        }
        let used = self.kinds.iter().find(|used| {
            let have = self.guests.values().filter(|guest| guest.kind == used.kind).count();
            // With it and the sandbox that claims it.
            let with_it = self.memory_mib().saturating_add(used.kind.memory_mib.saturating_mul(2));
            have < self.wanted
                && used.failures < FAILURES_MAX
                && used.not_before <= now
                && with_it <= self.free_mib
        })?;
        let kind = used.kind.clone();
        self.ids += 1;
        self.guests.insert(self.ids, Guest { kind: kind.clone(), state: State::Making });
        Some(ReadyEffect::Make(self.ids, kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When kinds are started, and when guests can be made for them.
    const START: Duration = Duration::from_secs(1000);
    const NOW: Duration = START.saturating_add(PAUSE);

    fn kind(image: &str, memory_mib: u64) -> ReadyKind {
        ReadyKind { layers: vec![image.into()], cpus: 1, memory_mib, disk_mib: 64 }
    }

    fn made(ready: &mut Ready, now: Duration) -> Option<(ReadyId, ReadyKind)> {
        match ready.next(now).as_slice() {
            [] => None,
            [ReadyEffect::Make(id, kind)] => {
                ready.made(*id);
                Some((*id, kind.clone()))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_started_last_is_kept_ready_as_far_as_there_is_room() {
        let (a, b) = (kind("a", 1000), kind("b", 500));
        let mut ready = Ready::new(2);
        ready.started(START, b.clone());
        ready.started(START, a.clone());
        assert_eq!(made(&mut ready, NOW), None, "nothing is known to be free");
        // Two of `a` with one claim to come, or one less and those of `b`.
        ready.free(3000);
        assert_eq!(made(&mut ready, NOW), Some((1, a.clone())));
        assert_eq!(made(&mut ready, NOW), Some((2, a.clone())));
        assert_eq!(made(&mut ready, NOW), Some((3, b.clone())), "2000 and twice 500");
        assert_eq!(made(&mut ready, NOW), None);
        // A sandbox is promised what it needs, then claims its guest, and none was ended for it.
        ready.free(2500);
        assert_eq!(ready.next(NOW), []);
        assert!(ready.fits());
        assert_eq!(ready.claim(&b), Some(3));
        assert_eq!(ready.claim(&b), None);
        // The node fills: the newest of what is left goes, and counts until it is gone.
        ready.free(1999);
        assert_eq!(ready.next(NOW), [ReadyEffect::End(2)]);
        assert!(!ready.fits());
        assert_eq!(ready.claim(&a), Some(1));
        ready.ended(2);
        assert!(ready.fits());
    }

    #[test]
    fn a_guest_that_is_being_ended_is_never_claimed() {
        let a = kind("a", 100);
        let mut ready = Ready::new(1);
        ready.started(START, a.clone());
        ready.free(1000);
        let (id, _) = made(&mut ready, NOW).unwrap();
        ready.free(0);
        assert_eq!(ready.next(NOW), [ReadyEffect::End(id)]);
        assert_eq!(ready.claim(&a), None);
        assert_eq!(ready.next(NOW), [], "once");
        // One that was being made then is not claimed either, when it is told to have been made.
        ready.free(1000);
        ready.ended(id);
        let [ReadyEffect::Make(id, _)] = ready.next(NOW)[..] else { panic!("not made") };
        ready.free(0);
        assert_eq!(ready.next(NOW), [ReadyEffect::End(id)]);
        ready.made(id);
        assert_eq!(ready.claim(&a), None);
    }

    #[test]
    fn what_fails_is_tried_a_few_times_and_what_is_old_is_forgotten() {
        let a = kind("a", 100);
        let mut ready = Ready::new(1);
        ready.free(1000);
        ready.started(START, a.clone());
        let mut now = NOW;
        for _ in 0..FAILURES_MAX {
            let [ReadyEffect::Make(id, _)] = ready.next(now)[..] else { panic!("not tried") };
            ready.failed(now, id);
            assert_eq!(ready.next(now), [], "not at once");
            assert_eq!(ready.next_deadline(now), Some(now + RETRY));
            now += RETRY;
        }
        assert_eq!(ready.next(now), []);
        // A start of it is a new beginning; that there is no template yet is no failure.
        ready.started(now, a.clone());
        assert_eq!(ready.next(now), [], "what was started goes first");
        now += Duration::from_secs(1);
        ready.started(now, a.clone());
        now += PAUSE - Duration::from_secs(1);
        for _ in 0..2 * FAILURES_MAX {
            let [ReadyEffect::Make(id, _)] = ready.next(now)[..] else { panic!("not tried") };
            ready.absent(now, id);
            now += RETRY;
        }
        let (id, _) = made(&mut ready, now).unwrap();
        now += KIND_LIFE;
        assert_eq!(ready.next(now), [ReadyEffect::End(id)]);
        assert_eq!(ready.next_deadline(now), None);
    }

    #[test]
    fn only_the_last_kinds_are_kept() {
        let mut ready = Ready::new(1);
        ready.free(1 << 20);
        for number in 0..=KINDS_MAX {
            ready.started(START, kind(&number.to_string(), 100));
            assert!(ready.next(NOW).iter().any(|effect| matches!(effect, ReadyEffect::Make(..))));
            ready.made(ready.ids);
        }
        assert_eq!(
            ready.guests.values().filter(|it| it.state == State::Waiting).count(),
            KINDS_MAX
        );
        assert_eq!(ready.claim(&kind("0", 100)), None);
    }

    /// Whatever happens: what waits or is made fits beside what is promised, at most `wanted` of each
    /// kind, and what is claimed waited.
    #[test]
    fn many_histories_keep_to_the_room() {
        for seed in 0..500u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = move |below: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % below
            };
            let (mut ready, mut now) = (Ready::new(2), NOW);
            let (mut making, mut ending) = (Vec::new(), Vec::new());
            for _ in 0..200 {
                now += Duration::from_secs(random(40));
                let one = kind(&random(6).to_string(), 100 * (1 + random(3)));
                match random(6) {
                    0 => ready.started(now, one),
                    1 => {
                        let _ = ready.free(random(2000));
                    }
                    2 => drop(ready.claim(&one)),
                    3 if !making.is_empty() => {
                        let id = making.swap_remove(0);
                        match random(3) {
                            0 => ready.made(id),
                            1 => ready.failed(now, id),
                            _ => ready.absent(now, id),
                        }
                    }
                    4 if !ending.is_empty() => ready.ended(ending.swap_remove(0)),
                    _ => {}
                }
                for effect in ready.next(now) {
                    match effect {
                        ReadyEffect::Make(id, _) => making.push(id),
                        ReadyEffect::End(id) => {
                            making.retain(|other| *other != id);
                            ending.push(id);
                        }
                    }
                }
                let lives = || ready.guests.values().filter(|guest| guest.state != State::Ending);
                assert!(lives().map(|guest| guest.kind.memory_mib).sum::<u64>() <= ready.free_mib);
                assert!(making.len() <= 1, "seed {seed}");
                for used in &ready.kinds {
                    assert!(lives().filter(|guest| guest.kind == used.kind).count() <= 2);
                }
            }
        }
    }
}
