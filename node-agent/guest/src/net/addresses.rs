//! The addresses that exist only in the sandbox: its own, its resolver's, and those made up for
//! names. All are in ranges that the internet never routes (RFC 2544, RFC 4193).
//!
//! Every sandbox has the same ones: nothing outside ever sees them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The sandbox's own IPv4 address.
pub const OWN_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The sandbox's own IPv6 address.
pub const OWN_V6: Ipv6Addr = v6(1);
/// Where DNS questions are answered.
pub const RESOLVER_V4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
/// Where DNS questions are answered, by IPv6.
pub const RESOLVER_V6: Ipv6Addr = v6(2);
/// The first number of a name; those below are kept for the sandbox's own use.
pub(super) const NAMES_FIRST: u32 = 256;
/// Names that get an address in one life of a sandbox, about half of what the IPv4 range holds. With
/// the longest names the table takes some 24 MiB.
pub(super) const NAMES_MAX: usize = 65_536;

const V4_BASE: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const V4_MASK: u32 = 0xfffe_0000;
/// fd74:6f77:6c69::/48.
const V6_BASE: u128 = 0xfd74_6f77_6c69 << 80;

const fn v6(number: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(V6_BASE | number as u128)
}

/// What an address stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The guest agent's own DNS service.
    Resolver,
    /// The name with this number, if there is one.
    Name(u32),
    /// A real address.
    Real,
}

/// Tells what a destination stands for.
pub(super) fn place(address: IpAddr) -> Place {
    let number = match address {
        IpAddr::V4(address) => {
            let bits = address.to_bits();
            (bits & V4_MASK == V4_BASE).then_some(bits & !V4_MASK)
        }
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            // Beyond 32 bits there are no names: a number that none has.
            (bits >> 80 == V6_BASE >> 80)
                .then(|| u32::try_from(bits & ((1 << 80) - 1)).unwrap_or(u32::MAX))
        }
    };
    match number {
        Some(2) => Place::Resolver,
        Some(number) => Place::Name(number),
        None => Place::Real,
    }
}

/// The IPv4 address of the name with this number.
pub(super) fn name_v4(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(V4_BASE | (number & !V4_MASK))
}

/// The IPv6 address of the name with this number.
pub(super) fn name_v6(number: u32) -> Ipv6Addr {
    v6(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let of = |text: &str| place(text.parse().unwrap());
        assert_eq!(of("198.18.0.2"), Place::Resolver);
        assert_eq!(of("fd74:6f77:6c69::2"), Place::Resolver);
        assert_eq!(of("198.18.1.0"), Place::Name(256));
        assert_eq!(of("198.19.255.255"), Place::Name(0x1_ffff));
        assert_eq!(of("fd74:6f77:6c69::100"), Place::Name(256));
        assert_eq!(of("fd74:6f77:6c69:1::100"), Place::Name(u32::MAX));
        for real in ["198.20.0.0", "198.17.255.255", "10.0.0.1", "fd74:6f77:6c6a::1", "::1"] {
            assert_eq!(of(real), Place::Real, "{real}");
        }
        let last = NAMES_FIRST + u32::try_from(NAMES_MAX).unwrap() - 1;
        for number in [NAMES_FIRST, 70_000, last] {
            assert_eq!(place(name_v4(number).into()), Place::Name(number));
            assert_eq!(place(name_v6(number).into()), Place::Name(number));
        }
        assert_eq!(place(OWN_V4.into()), Place::Name(1), "a number that no name has");
    }
}
