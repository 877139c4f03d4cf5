//! Pure mixing of numbers: ids from the driver's seed, and election timeouts that are the same on
//! every run. Not for secrets.

/// Mixes one number well (the finaliser of SplitMix64).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A fingerprint of bytes that tells requests apart that should be alike. A caller who forges a
/// collision fools only himself.
pub(crate) fn fingerprint(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(hash)
}

/// The random part of ids: a counter behind a 128-bit seed.
#[derive(Debug)]
pub(crate) struct IdSource {
    seed: [u64; 2],
    counter: u64,
}

impl IdSource {
    pub(crate) fn new(seed: [u64; 2]) -> Self {
        Self { seed, counter: 0 }
    }

    pub(crate) fn next(&mut self) -> [u8; 10] {
        self.counter += 1;
        let high = mix(self.seed[0] ^ mix(self.counter));
        let low = mix(self.seed[1] ^ mix(self.counter ^ high));
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&high.to_be_bytes());
        bytes[8..].copy_from_slice(&low.to_be_bytes()[..2]);
        bytes
    }
}
