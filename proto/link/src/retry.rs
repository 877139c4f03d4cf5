//! Trying again: exponential back-off with full jitter, up to a deadline, and within a budget that
//! keeps many callers from turning a slow server into a dead one.
//!
//! Only calls that are safe to repeat come here: reads, and mutations with an idempotency key.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::Instant;

use crate::status::RpcError;

/// How to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Most that the first wait takes.
    pub first: Duration,
    /// Most that any wait takes.
    pub longest: Duration,
    /// No attempt begins later than this after the first.
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(50),
            longest: Duration::from_secs(2),
            deadline: Duration::from_secs(15),
        }
    }
}

/// The waits between attempts.
#[derive(Debug)]
pub struct Backoff {
    policy: RetryPolicy,
    until: Instant,
    next: Duration,
}

impl Backoff {
    /// Starts now.
    pub fn new(policy: RetryPolicy) -> Self {
        Self { policy, until: Instant::now() + policy.deadline, next: policy.first }
    }

    /// How long to wait before the next attempt, at least `at_least`; `None` when the deadline
    /// leaves no room for one.
    pub fn next(&mut self, at_least: Duration) -> Option<Duration> {
        let wait = jitter(self.next).max(at_least);
        self.next = (self.next * 2).min(self.policy.longest);
        (Instant::now() + wait < self.until).then_some(wait)
    }
}

/// Between half of `most` and all of it.
fn jitter(most: Duration) -> Duration {
    let mut random = [0u8; 2];
    // Without random numbers every caller waits the longest: slower, not wrong.
    if SystemRandom::new().fill(&mut random).is_err() {
        return most;
    }
    most / 2 + (most / 2) * u32::from(u16::from_be_bytes(random)) / u32::from(u16::MAX)
}

/// Tokens for attempts beyond the first: each success earns a tenth, each repeat costs one.
#[derive(Debug)]
pub struct RetryBudget {
    tenths: AtomicU32,
}

/// Repeats that a caller may make in a burst.
const BUDGET_MAX_TENTHS: u32 = 1000;

impl Default for RetryBudget {
    fn default() -> Self {
        Self { tenths: AtomicU32::new(BUDGET_MAX_TENTHS) }
    }
}

impl RetryBudget {
    /// Takes a token; false when there is none left.
    pub fn withdraw(&self) -> bool {
        self.tenths
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |t| t.checked_sub(10))
            .is_ok()
    }

    /// Notes a success.
    pub fn deposit(&self) {
        let _ = self.tenths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |t| {
            Some((t + 1).min(BUDGET_MAX_TENTHS))
        });
    }
}

/// Calls until it succeeds, fails for good, or deadline or budget are used up; then the last error.
pub async fn retry<T, F, Fut>(
    policy: RetryPolicy,
    budget: &RetryBudget,
    mut call: F,
) -> Result<T, RpcError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, RpcError>>,
{
    let mut backoff = Backoff::new(policy);
    loop {
        let error = match call().await {
            Ok(answer) => {
                budget.deposit();
                return Ok(answer);
            }
            Err(error) => error,
        };
        let at_least = match &error {
            RpcError::Busy { retry_after, .. } => *retry_after,
            _ => Duration::ZERO,
        };
        if !error.may_retry() || !budget.withdraw() {
            return Err(error);
        }
        let Some(wait) = backoff.next(at_least) else { return Err(error) };
        tracing::debug!(%error, wait_ms = wait.as_millis(), "trying again");
        tokio::time::sleep(wait).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quick() -> RetryPolicy {
        let ms = Duration::from_millis;
        RetryPolicy { first: ms(1), longest: ms(2), deadline: Duration::from_secs(30) }
    }

    async fn attempts(
        budget: &RetryBudget,
        policy: RetryPolicy,
        error: RpcError,
        ok_at: u32,
    ) -> (u32, bool) {
        let mut calls = 0;
        let result = retry(policy, budget, || {
            calls += 1;
            let answer = if calls >= ok_at { Ok(()) } else { Err(error.clone()) };
            async move { answer }
        })
        .await;
        (calls, result.is_ok())
    }

    #[tokio::test]
    async fn only_what_may_help_is_tried_again() {
        let budget = RetryBudget::default();
        let gone = || RpcError::Unreachable("x".into());
        assert_eq!(attempts(&budget, quick(), gone(), 4).await, (4, true));
        assert_eq!(attempts(&budget, quick(), RpcError::refused("x"), 4).await, (1, false));
        let busy = RpcError::Busy { reason: "x".into(), retry_after: Duration::from_secs(60) };
        assert_eq!(attempts(&budget, quick(), busy, 4).await, (1, false), "beyond the deadline");
    }

    #[tokio::test]
    async fn an_empty_budget_ends_it() {
        let budget = RetryBudget { tenths: AtomicU32::new(25) };
        let gone = RpcError::Unreachable("x".into());
        assert_eq!(attempts(&budget, quick(), gone, 100).await, (3, false));
    }
}
