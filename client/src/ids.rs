//! New ids, from the clock and the kernel's randomness.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use ring::rand::{SecureRandom as _, SystemRandom};
use towline_proto::ids::ExecId;

/// Returns bytes that nobody can guess.
pub fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).ok().context("the kernel gave no random bytes")?;
    Ok(bytes)
}

/// Returns a new id for one exec.
pub fn exec_id() -> anyhow::Result<ExecId> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unix_ms = u64::try_from(now.as_millis()).context("the clock is beyond its range")?;
    Ok(ExecId::from_parts(unix_ms, random()?))
}
