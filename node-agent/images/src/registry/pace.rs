//! How patient a pull or push is: waits between tries and bounds on slow registries.

use std::time::Duration;

/// Bounds in time of one pull or push.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Tries of one request that fail one after the other without progress.
    pub tries: u32,
    /// Pause after the first failed try; doubled after each further one.
    pub first_pause: Duration,
    /// Longest pause of ours, and longest `Retry-After` that is waited for.
    pub longest_pause: Duration,
    /// Until a connection stands.
    pub connect: Duration,
    /// Between two pieces of an answer.
    pub read: Duration,
    /// A whole answer that is a document or a token.
    pub document: Duration,
    /// A blob must bring at least [`SLOWEST`] bytes in this time.
    pub window: Duration,
    /// From the last byte of an upload to its answer: some registries copy a blob before they do.
    pub settle: Duration,
}

/// Bytes of a blob that must come or go in each window.
pub(crate) const SLOWEST: u64 = 64 << 10;
/// Bytes that count as progress: the count of failed tries begins anew.
pub(crate) const PROGRESS: u64 = 1 << 20;

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            tries: 5,
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(60),
            connect: Duration::from_secs(10),
            read: Duration::from_secs(30),
            document: Duration::from_secs(60),
            window: Duration::from_secs(60),
            settle: Duration::from_secs(600),
        }
    }
}

impl Pace {
    /// Returns the pause after so many failed tries, or `None` when it is time to give up.
    /// `asked` is what the registry wants waited for.
    pub(crate) fn pause(&self, failed: u32, asked: Option<Duration>) -> Option<Duration> {
        if failed >= self.tries || asked.is_some_and(|asked| asked > self.longest_pause) {
            return None;
        }
        let ours = self.first_pause.saturating_mul(1 << failed.saturating_sub(1).min(16));
        Some(ours.min(self.longest_pause).max(asked.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let pace = Pace::default();
        let seconds = |failed, asked: Option<u64>| {
            pace.pause(failed, asked.map(Duration::from_secs)).map(|pause| pause.as_secs_f32())
        };
        assert_eq!(seconds(1, None), Some(0.5));
        assert_eq!(seconds(3, None), Some(2.0));
        assert_eq!(seconds(5, None), None);
        assert_eq!(seconds(1, Some(7)), Some(7.0));
        assert_eq!(seconds(1, Some(3600)), None, "nobody waits for an hour");
    }
}
