//! Which addresses are on the public internet: IANA's special-purpose registries for IPv4 and IPv6
//! (RFC 6890 and what updates it), multicast, and where clouds keep their metadata.
//!
//! Pure. The longest matching block decides; what no block calls globally reachable is not. An IPv6
//! address that carries an IPv4 one stands for both, and must be reachable as both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A block of addresses that is not on the public internet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Special {
    /// What people call it: `private`, `loopback`.
    pub name: &'static str,
    /// Its range.
    pub range: IpNet,
    /// Leads to the node itself or its cloud's metadata: only a range within the block opens it.
    pub guarded: bool,
}

/// How a block is treated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Global,
    Not,
    Guarded,
}
use Reach::{Global, Guarded, Not};

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(high: [u16; 4], low: u16, prefix: u8) -> Ipv6Net {
    let [a, b, c, d] = high;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, low), prefix)
}

const V4: &[(Ipv4Net, &str, Reach)] = &[
    (v4(0, 0, 0, 0, 0), "public", Global),
    (v4(0, 0, 0, 0, 8), "this network", Guarded),
    (v4(10, 0, 0, 0, 8), "private", Not),
    (v4(100, 64, 0, 0, 10), "shared address space (CGNAT)", Not),
    (v4(100, 100, 100, 200, 32), "metadata", Guarded),
    (v4(127, 0, 0, 0, 8), "loopback", Guarded),
    (v4(168, 63, 129, 16, 32), "metadata", Guarded),
    (v4(169, 254, 0, 0, 16), "link-local", Guarded),
    (v4(169, 254, 169, 254, 32), "metadata", Guarded),
    (v4(172, 16, 0, 0, 12), "private", Not),
    (v4(192, 0, 0, 0, 24), "IETF protocol assignments", Not),
    (v4(192, 0, 0, 9, 32), "PCP anycast", Global),
    (v4(192, 0, 0, 10, 32), "TURN anycast", Global),
    (v4(192, 0, 0, 192, 32), "metadata", Guarded),
    (v4(192, 0, 2, 0, 24), "documentation", Not),
    (v4(192, 88, 99, 0, 24), "6to4 relay", Not),
    (v4(192, 168, 0, 0, 16), "private", Not),
    (v4(198, 18, 0, 0, 15), "benchmarking", Not),
    (v4(198, 51, 100, 0, 24), "documentation", Not),
    (v4(203, 0, 113, 0, 24), "documentation", Not),
    (v4(224, 0, 0, 0, 4), "multicast", Guarded),
    (v4(240, 0, 0, 0, 4), "reserved", Not),
    (v4(255, 255, 255, 255, 32), "broadcast", Guarded),
];

const V6: &[(Ipv6Net, &str, Reach)] = &[
    (v6([0; 4], 0, 0), "reserved", Not),
    (v6([0; 4], 0, 96), "IPv4-compatible", Guarded),
    (v6([0; 4], 0, 128), "unspecified", Guarded),
    (v6([0; 4], 1, 128), "loopback", Guarded),
    // Its IPv4 address is looked at too.
    (v6([0x64, 0xff9b, 0, 0], 0, 96), "NAT64", Global),
    (v6([0x64, 0xff9b, 1, 0], 0, 48), "local NAT64", Not),
    (v6([0x100, 0, 0, 0], 0, 64), "discard", Not),
    (v6([0x2000, 0, 0, 0], 0, 3), "public", Global),
    (v6([0x2001, 0, 0, 0], 0, 23), "IETF protocol assignments", Not),
    (v6([0x2001, 0, 0, 0], 0, 32), "Teredo", Not),
    (v6([0x2001, 1, 0, 0], 1, 128), "PCP anycast", Global),
    (v6([0x2001, 1, 0, 0], 2, 128), "TURN anycast", Global),
    (v6([0x2001, 1, 0, 0], 3, 128), "DNS-SD anycast", Global),
    (v6([0x2001, 3, 0, 0], 0, 32), "AMT", Global),
    (v6([0x2001, 4, 0x112, 0], 0, 48), "AS112", Global),
    (v6([0x2001, 0x20, 0, 0], 0, 28), "ORCHIDv2", Global),
    (v6([0x2001, 0x30, 0, 0], 0, 28), "drone identifiers", Global),
    (v6([0x2001, 0xdb8, 0, 0], 0, 32), "documentation", Not),
    (v6([0x2002, 0, 0, 0], 0, 16), "6to4", Not),
    (v6([0x3fff, 0, 0, 0], 0, 20), "documentation", Not),
    (v6([0xfc00, 0, 0, 0], 0, 7), "unique local", Not),
    (v6([0xfd00, 0xec2, 0, 0], 0x254, 128), "metadata", Guarded),
    (v6([0xfd20, 0xce, 0, 0], 0x254, 128), "metadata", Guarded),
    (v6([0xfe80, 0, 0, 0], 0, 10), "link-local", Guarded),
    (v6([0xfec0, 0, 0, 0], 0, 10), "site-local", Not),
    (v6([0xff00, 0, 0, 0], 0, 8), "multicast", Guarded),
];

/// `::ffff:0:0/96`, which cannot be written with [`v6`].
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

/// Returns the block that keeps an address off the public internet. Looks at this address only,
/// not at those that it carries.
pub fn special(address: IpAddr) -> Option<Special> {
    let (range, name, reach) = match address {
        IpAddr::V4(address) => {
            let blocks = V4.iter().filter(|(range, ..)| range.contains(&address));
            let (range, name, reach) = blocks.max_by_key(|(range, ..)| range.prefix_len())?;
            (IpNet::V4(*range), *name, *reach)
        }
        IpAddr::V6(address) if MAPPED.contains(&address) => {
            (IpNet::V6(MAPPED), "IPv4-mapped", Guarded)
        }
        IpAddr::V6(address) => {
            let blocks = V6.iter().filter(|(range, ..)| range.contains(&address));
            let (range, name, reach) = blocks.max_by_key(|(range, ..)| range.prefix_len())?;
            (IpNet::V6(*range), *name, *reach)
        }
    };
    (reach != Global).then_some(Special { name, range, guarded: reach == Guarded })
}

/// Returns the IPv4 addresses that an IPv6 address carries, for whoever translates it: mapped and
/// compatible forms, NAT64, 6to4, Teredo (server and client), ISATAP.
pub fn carried(address: IpAddr) -> Vec<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return Vec::new() };
    let word = |at: usize| {
        let o = address.octets();
        Ipv4Addr::new(o[at], o[at + 1], o[at + 2], o[at + 3])
    };
    let s = address.segments();
    let mut all = Vec::new();
    let zero_high = s[..5] == [0; 5] && (s[5] == 0 || s[5] == 0xffff);
    let translated = s[..4] == [0, 0, 0, 0] && s[4] == 0xffff && s[5] == 0;
    if zero_high || translated || (s[0], s[1]) == (0x64, 0xff9b) {
        all.push(word(12));
    }
    if s[0] == 0x2002 {
        all.push(word(2));
    }
    if (s[0], s[1]) == (0x2001, 0) {
        all.push(word(4));
        all.push(Ipv4Addr::from_bits(!word(12).to_bits()));
    }
    if s[4] & !0x0200 == 0 && s[5] == 0x5efe {
        all.push(word(12));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(address: &str) -> Option<&'static str> {
        special(address.parse().unwrap()).map(|special| special.name)
    }

    #[test]
    fn the_registries_edges() {
        let cases = [
            ("9.255.255.255", None),
            ("10.0.0.0", Some("private")),
            ("10.255.255.255", Some("private")),
            ("11.0.0.0", None),
            ("100.63.255.255", None),
            ("100.64.0.0", Some("shared address space (CGNAT)")),
            ("100.127.255.255", Some("shared address space (CGNAT)")),
            ("100.128.0.0", None),
            ("100.100.100.200", Some("metadata")),
            ("0.0.0.0", Some("this network")),
            ("0.1.2.3", Some("this network")),
            ("127.255.255.254", Some("loopback")),
            ("128.0.0.1", None),
            ("169.254.169.254", Some("metadata")),
            ("169.254.1.1", Some("link-local")),
            ("172.15.255.255", None),
            ("172.16.0.1", Some("private")),
            ("172.31.255.255", Some("private")),
            ("172.32.0.0", None),
            ("192.0.0.8", Some("IETF protocol assignments")),
            ("192.0.0.9", None),
            ("192.0.2.1", Some("documentation")),
            ("192.168.255.255", Some("private")),
            ("198.18.0.1", Some("benchmarking")),
            ("198.20.0.0", None),
            ("223.255.255.255", None),
            ("224.0.0.1", Some("multicast")),
            ("240.0.0.1", Some("reserved")),
            ("255.255.255.255", Some("broadcast")),
            ("::", Some("unspecified")),
            ("::1", Some("loopback")),
            ("::7f00:1", Some("IPv4-compatible")),
            ("::ffff:8.8.8.8", Some("IPv4-mapped")),
            ("64:ff9b::808:808", None),
            ("64:ff9b:1::808:808", Some("local NAT64")),
            ("100::1", Some("discard")),
            ("2001::1", Some("Teredo")),
            ("2001:db8::1", Some("documentation")),
            ("2001:4860:4860::8888", None),
            ("2002:808:808::1", Some("6to4")),
            ("2606:4700::1111", None),
            ("3fff::1", Some("documentation")),
            ("4000::1", Some("reserved")),
            ("5f00::1", Some("reserved")),
            ("fc00::1", Some("unique local")),
            ("fd00:ec2::254", Some("metadata")),
            ("fe80::1", Some("link-local")),
            ("fec0::1", Some("site-local")),
            ("ff02::1", Some("multicast")),
        ];
        for (address, wanted) in cases {
            assert_eq!(name(address), wanted, "{address}");
        }
    }

    #[test]
    fn carried_addresses_are_found() {
        let cases = [
            ("::ffff:10.0.0.1", vec!["10.0.0.1"]),
            ("::ffff:0:10.0.0.1", vec!["10.0.0.1"]),
            ("::10.0.0.1", vec!["10.0.0.1"]),
            ("64:ff9b::127.0.0.1", vec!["127.0.0.1"]),
            ("2002:a00:1::1", vec!["10.0.0.1"]),
            ("2001:0:a00:1::80ff:fffe", vec!["10.0.0.1", "127.0.0.1"]),
            ("2606:4700::5efe:a00:1", vec!["10.0.0.1"]),
            ("2606:4700::200:5efe:a00:1", vec!["10.0.0.1"]),
            ("2606:4700::1111", vec![]),
            ("10.0.0.1", vec![]),
        ];
        for (address, wanted) in cases {
            let got = carried(address.parse().unwrap());
            let got: Vec<String> = got.iter().map(ToString::to_string).collect();
            assert_eq!(got, wanted, "{address}");
        }
    }
}
