//! How often and when things are killed. The moments differ from run to run on purpose; the seed is
//! printed by whoever fails, so that a failure tells its moments.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `TOWLINE_KILLS`, or how often by default.
pub fn kills(default: u32) -> u32 {
    std::env::var("TOWLINE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Numbers for choosing moments and victims.
#[derive(Debug)]
pub struct Moments(u64);

impl Default for Moments {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::from(now.subsec_nanos()) | 1)
    }
}

impl Moments {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Sleeps for a while shorter than `bound`.
    pub fn pause(&mut self, bound: Duration) {
        let bound = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
        std::thread::sleep(Duration::from_millis(self.below(bound.max(1))));
    }
}
