//! Which addresses a pull may connect to.
//!
//! A user names a registry and the registry names further hosts (token services, blob stores), so
//! without a rule a stranger could point the node at what only the node can reach. The rule: never
//! a link-local, metadata, multicast or reserved address; and no hop is more private than the
//! registry that the user named.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How private an address is; later ones are more so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// The public internet.
    Public,
    /// Private, shared or unique local ranges.
    Private,
    /// This machine.
    Loopback,
}

/// Whether registries on private and loopback addresses may be named at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Private {
    /// Any: the node is the user's own machine.
    Any,
    /// Only these, as `host` or `host:port`: the node is somebody else's.
    Only(Vec<String>),
}

impl Private {
    /// Whether the registry `host:port` may be on a private address.
    pub(crate) fn allows(&self, host: &str, port: u16) -> bool {
        match self {
            Private::Any => true,
            Private::Only(list) => {
                list.iter().any(|known| known == host || *known == format!("{host}:{port}"))
            }
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Public => "public",
            Class::Private => "private",
            Class::Loopback => "loopback",
        })
    }
}

/// Returns an address's class; `None` for one that no pull may connect to.
pub(crate) fn class(address: IpAddr) -> Option<Class> {
    match address {
        IpAddr::V4(v4) => class_v4(v4),
        IpAddr::V6(v6) => class_v6(v6),
    }
}

fn class_v4(address: Ipv4Addr) -> Option<Class> {
    match address.octets() {
        // Services of clouds that answer any local process: Alibaba's, Azure's.
        [100, 100, 100, 200] | [168, 63, 129, 16] => None,
        [127, ..] => Some(Class::Loopback),
        [10, ..] | [192, 168, ..] => Some(Class::Private),
        [172, second, ..] if second & 0xf0 == 16 => Some(Class::Private),
        // Shared address space (RFC 6598), benchmarking (RFC 2544).
        [100, second, ..] if second & 0xc0 == 64 => Some(Class::Private),
        [198, 18 | 19, ..] => Some(Class::Private),
        // This network, link-local with the metadata services, IETF assignments, documentation,
        // 6to4 relays, multicast and reserved.
        [0, ..] | [169, 254, ..] | [192, 0, 0 | 2, _] | [192, 88, 99, _] => None,
        [198, 51, 100, _] | [203, 0, 113, _] | [224..=255, ..] => None,
        _ => Some(Class::Public),
    }
}

fn class_v6(address: Ipv6Addr) -> Option<Class> {
    if address == Ipv6Addr::LOCALHOST {
        return Some(Class::Loopback);
    }
    let s = address.segments();
    let v4 = |high: u16, low: u16| class_v4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match s {
        // IPv4 in other clothes: mapped, translated (RFC 6052, RFC 8215), 6to4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x64, 0xff9b, 1, ..] => None,
        [0x2002, high, low, ..] => v4(high, low),
        // Amazon's metadata service; Teredo and other IETF assignments; documentation.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => None,
        [0x2001, 0..0x200, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..0x1000, ..] => None,
        [first, ..] if first & 0xfe00 == 0xfc00 => Some(Class::Private),
        [first, ..] if first & 0xe000 == 0x2000 => Some(Class::Public),
        _ => None,
    }
}

/// Whether a host as it was typed is this machine without asking anybody.
pub(crate) fn is_local_name(host: &str) -> bool {
    host == "localhost" || host.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_has_its_class() {
        let cases: [(Option<Class>, &[&str]); 4] = [
            (Some(Class::Public), &["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1"]),
            (
                Some(Class::Private),
                &[
                    "10.0.0.1",
                    "172.16.0.1",
                    "172.31.255.255",
                    "192.168.1.1",
                    "100.64.0.1",
                    "fd00::1",
                ],
            ),
            (Some(Class::Loopback), &["127.0.0.1", "127.9.9.9", "::1"]),
            (
                None,
                &[
                    "0.0.0.0",
                    "169.254.169.254",
                    "224.0.0.1",
                    "255.255.255.255",
                    "240.0.0.1",
                    "192.0.2.1",
                    "198.51.100.7",
                    "203.0.113.9",
                    "168.63.129.16",
                    "100.100.100.200",
                    "::",
                    "fe80::1",
                    "ff02::1",
                    "fec0::1",
                    "2001:db8::1",
                    "2001::1",
                    "fd00:ec2::254",
                    "::7f00:1",
                    "64:ff9b:1::1",
                ],
            ),
        ];
        for (expected, addresses) in cases {
            for address in addresses {
                assert_eq!(class(address.parse().unwrap()), expected, "{address}");
            }
        }
    }

    #[test]
    fn ipv4_in_ipv6_is_what_it_carries() {
        for (text, expected) in [
            ("::ffff:127.0.0.1", Some(Class::Loopback)),
            ("::ffff:169.254.169.254", None),
            ("::ffff:10.0.0.1", Some(Class::Private)),
            ("64:ff9b::169.254.169.254", None),
            ("64:ff9b::10.0.0.1", Some(Class::Private)),
            ("2002:7f00:1::", Some(Class::Loopback)),
            ("::ffff:8.8.8.8", Some(Class::Public)),
        ] {
            assert_eq!(class(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn an_operator_lists_private_registries() {
        let only = Private::Only(vec!["registry.corp".into(), "10.0.0.5:5000".into()]);
        assert!(only.allows("registry.corp", 443));
        assert!(only.allows("10.0.0.5", 5000));
        assert!(!only.allows("10.0.0.5", 22));
        assert!(Private::Any.allows("127.0.0.1", 5000));
    }
}
