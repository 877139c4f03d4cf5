//! The rate of the processor's time stamp counter. An emulated guest has no other timer to measure
//! it by and hangs at boot unless it is told (`tsc_early_khz`).
#![expect(unsafe_code, reason = "reading the counter is an intrinsic")]

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Long enough that reading the clocks (well under 1 us) is less than 20 parts per million.
const MEASURE: Duration = Duration::from_millis(60);

/// Kilohertz of the counter; measured once. `None` where there is no such counter.
pub fn khz() -> Option<u64> {
    static KHZ: OnceLock<Option<u64>> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u64> {
    let (start, from) = (Instant::now(), read());
    std::thread::sleep(MEASURE);
    let (elapsed, to) = (start.elapsed(), read());
    let khz = u128::from(to.wrapping_sub(from)) * 1_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(khz).ok().filter(|&khz| khz > 100_000)
}

#[cfg(target_arch = "x86_64")]
fn read() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u64> {
    None
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
mod tests {
    #[test]
    fn the_rate_is_that_of_a_processor() {
        match super::khz() {
            Some(khz) => assert!((500_000..10_000_000).contains(&khz), "{khz}"),
            None => eprintln!("SKIPPED: this processor has no time stamp counter"),
        }
    }
}
