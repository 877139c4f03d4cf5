//! Keeps a guest from flooding its feed: the same decision is told once and then counted, and new
//! ones are told at a bounded rate. Sans-IO; time comes in.

use std::collections::BTreeMap;
use std::time::Duration;

use towline_proto::v1::EgressDecision;

/// Different decisions that are remembered as told.
const KEYS_MAX: usize = 256;
/// How often the same decision is told again, with its count.
const REPEAT_AFTER: Duration = Duration::from_secs(10);
/// Decisions that may be told at once, and then one more each so often.
const BURST: u32 = 64;
const REFILL: Duration = Duration::from_millis(250);

type Key = (i32, String, u32, String);

/// What was told lately.
#[derive(Debug)]
pub(super) struct Coalescer {
    told: BTreeMap<Key, Told>,
    tokens: u32,
    refilled: Duration,
    /// Decisions that are not told one by one.
    untold: u64,
}

#[derive(Debug)]
struct Told {
    at: Duration,
    /// Counts those since.
    since: EgressDecision,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self { told: BTreeMap::new(), tokens: BURST, refilled: Duration::ZERO, untold: 0 }
    }
}

impl Coalescer {
    /// Takes a decision; returns what is to be told now.
    pub(super) fn take(&mut self, now: Duration, decision: EgressDecision) -> Vec<EgressDecision> {
        let d = &decision;
        let key = (d.protocol, d.target.clone(), d.port, d.rule.clone());
        if let Some(told) = self.told.get_mut(&key) {
            let count = told.since.count.saturating_add(1);
            told.since = EgressDecision { count, ..decision };
            if now.saturating_sub(told.at) < REPEAT_AFTER || !self.spend(now) {
                return Vec::new();
            }
            return self.told.get_mut(&key).and_then(|told| told.tell(now)).into_iter().collect();
        }
        if !self.spend(now) {
            self.untold += 1;
            return Vec::new();
        }
        let mut all = self.make_room();
        let since = EgressDecision { count: 0, ..decision.clone() };
        self.told.insert(key, Told { at: now, since });
        all.push(EgressDecision { count: 1, ..decision });
        all
    }

    /// Whether something was counted and not told.
    pub(super) fn has_pending(&self) -> bool {
        self.untold > 0 || self.told.values().any(|told| told.since.count > 0)
    }

    /// Tells what was counted, and how many were not told one by one.
    pub(super) fn flush(&mut self, now: Duration) -> (Vec<EgressDecision>, u64) {
        let told = self.told.values_mut().filter_map(|told| told.tell(now)).collect();
        (told, std::mem::take(&mut self.untold))
    }

    /// Forgets the one that was told longest ago, with its count.
    fn make_room(&mut self) -> Vec<EgressDecision> {
        if self.told.len() < KEYS_MAX {
            return Vec::new();
        }
        let oldest = self.told.iter().min_by_key(|(_, told)| told.at).map(|(key, _)| key.clone());
        let gone = oldest.and_then(|key| self.told.remove(&key));
        gone.filter(|told| told.since.count > 0).map(|told| told.since).into_iter().collect()
    }

    fn spend(&mut self, now: Duration) -> bool {
        let steps = now.saturating_sub(self.refilled).as_millis() / REFILL.as_millis();
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        if steps > 0 {
            self.tokens = self.tokens.saturating_add(steps).min(BURST);
            self.refilled = now;
        }
        let some = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        some
    }
}

impl Told {
    fn tell(&mut self, now: Duration) -> Option<EgressDecision> {
        if self.since.count == 0 {
            return None;
        }
        self.at = now;
        let told = self.since.clone();
        self.since.count = 0;
        Some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(port: u32) -> EgressDecision {
        EgressDecision { target: "10.0.0.1".into(), port, count: 1, ..EgressDecision::default() }
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_same_is_told_once_then_counted() {
        let mut coalescer = Coalescer::default();
        assert_eq!(coalescer.take(at(0), decision(80)).len(), 1);
        for ms in 1..500 {
            assert!(coalescer.take(at(ms), decision(80)).is_empty());
        }
        let again = coalescer.take(at(10_000), decision(80));
        assert_eq!(again[0].count, 500);
        assert!(!coalescer.has_pending());
        coalescer.take(at(10_001), decision(80));
        assert_eq!(coalescer.flush(at(10_002)).0[0].count, 1);
    }

    #[test]
    fn a_flood_of_different_ones_has_a_rate_and_is_counted() {
        let mut coalescer = Coalescer::default();
        let mut told = 0;
        for port in 0..60_000 {
            told += coalescer.take(at(u64::from(port)), decision(port)).len();
        }
        let (rest, untold) = coalescer.flush(at(60_000));
        assert!((200..=400).contains(&told), "{told}");
        assert_eq!(told as u64 + rest.len() as u64 + untold, 60_000);
        assert!(coalescer.told.len() <= KEYS_MAX);
    }
}
