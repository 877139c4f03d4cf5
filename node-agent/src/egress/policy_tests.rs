//! Tables of decisions, and the property that no special address in any encoding is allowed.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::egress::rules::RuleText;

fn rules(text: &str) -> OperatorRules {
    #[derive(serde::Deserialize)]
    struct Texts {
        allow: Vec<RuleText>,
    }
    let texts: Texts = toml::from_str(text).unwrap();
    OperatorRules::parse(texts.allow).unwrap()
}

fn own() -> OwnAddresses {
    OwnAddresses {
        node: ["11.22.33.44", "10.9.9.9", "2606:4700::7", "127.0.0.1"]
            .map(|a| a.parse().unwrap())
            .to_vec(),
        cluster: vec!["11.22.33.55".parse().unwrap()],
    }
}

fn ask(policy: Policy, rules: &OperatorRules, target: (&str, &str, u16)) -> Decision {
    let (name, address, port) = target;
    let name = (!name.is_empty()).then(|| TargetName::parse(name).unwrap());
    let wanted = Wanted {
        name: name.as_ref(),
        address: address.parse().unwrap(),
        port,
        protocol: EgressProtocol::Tcp,
    };
    decide(policy, rules, &own(), wanted)
}

#[test]
fn public_is_the_public_internet_and_nothing_else() {
    let none = OperatorRules::default();
    let cases = [
        ("8.8.8.8", 443, true, "policy public"),
        ("2606:4700::1111", 443, true, "policy public"),
        ("64:ff9b::8.8.8.8", 443, true, "policy public"),
        ("8.8.8.8", 25, false, "mail port 25"),
        ("10.0.0.1", 80, false, "private 10.0.0.0/8"),
        ("127.0.0.1", 80, false, "loopback 127.0.0.0/8"),
        ("0.0.0.0", 80, false, "this network 0.0.0.0/8"),
        ("169.254.169.254", 80, false, "metadata 169.254.169.254/32"),
        ("168.63.129.16", 80, false, "metadata 168.63.129.16/32"),
        ("100.64.0.1", 80, false, "shared address space (CGNAT) 100.64.0.0/10"),
        ("11.22.33.44", 80, false, "the node's own address 11.22.33.44/32"),
        ("11.22.33.55", 80, false, "the cluster's address 11.22.33.55/32"),
        ("10.9.9.9", 80, false, "the node's own address 10.9.9.9/32"),
        ("2606:4700::7", 80, false, "the node's own address 2606:4700::7/128"),
        ("64:ff9b::11.22.33.44", 80, false, "the node's own address 11.22.33.44/32"),
        ("64:ff9b::10.0.0.1", 80, false, "private 10.0.0.0/8"),
        ("::1", 80, false, "loopback ::1/128"),
        ("::ffff:127.0.0.1", 80, false, "IPv4-mapped ::ffff:0.0.0.0/96"),
        ("::ffff:8.8.8.8", 80, false, "IPv4-mapped ::ffff:0.0.0.0/96"),
        ("2002:7f00:1::", 80, false, "6to4 2002::/16"),
        ("2606:4700::5efe:7f00:1", 80, false, "loopback 127.0.0.0/8"),
        ("fd00::1", 80, false, "unique local fc00::/7"),
    ];
    for (address, port, allowed, rule) in cases {
        let decision = ask(Policy::Public, &none, ("", address, port));
        assert_eq!((decision.allowed, decision.rule.as_str()), (allowed, rule), "{address}:{port}");
        assert_eq!(decision.hint.is_empty(), allowed);
        assert_eq!(ask(Policy::None, &none, ("", address, port)), closed());
    }
}

#[test]
fn operators_open_what_they_name_and_no_more() {
    let rules = rules(
        "allow = [
            { name = 'mirror.example', ports = [443] },
            { name = '*.corp.example' },
            { range = '10.1.0.0/16', ports = [443, 25] },
            { range = '0.0.0.0/0', ports = [7] },
            { range = '10.9.9.9', ports = [8] },
            { range = '127.0.0.0/24', ports = [9] },
            { range = '169.254.169.254/32', ports = [80] },
        ]",
    );
    let cases = [
        ("mirror.example", "10.0.0.1", 443, true),
        ("mirror.example", "10.0.0.1", 80, false),
        ("mirror.example", "fd00::1", 443, true),
        // What the name leads to is not followed to the node or its metadata.
        ("mirror.example", "127.0.0.1", 443, false),
        ("mirror.example", "169.254.169.254", 443, false),
        ("mirror.example", "10.9.9.9", 443, false),
        ("mirror.example", "11.22.33.44", 443, false),
        ("mirror.example", "64:ff9b::127.0.0.1", 443, false),
        ("evil.example", "10.0.0.1", 443, false),
        ("a.corp.example", "192.168.1.1", 8080, true),
        ("corp.example", "192.168.1.1", 8080, false),
        ("a.corp.example", "192.168.1.1", 25, false),
        ("", "10.1.2.3", 443, true),
        ("", "10.1.2.3", 25, true),
        ("", "10.2.2.3", 443, false),
        ("", "::ffff:10.1.2.3", 443, false),
        // All of IPv4 is not the node.
        ("", "10.77.1.1", 7, true),
        ("", "127.0.0.1", 7, false),
        ("", "10.9.9.9", 7, false),
        ("", "169.254.169.254", 7, false),
        ("", "224.0.0.1", 7, false),
        ("", "0.0.0.0", 7, false),
        // The node itself, where somebody wrote down that it is meant.
        ("", "10.9.9.9", 8, true),
        ("", "127.0.0.7", 9, true),
        ("", "127.0.1.7", 9, false),
        ("", "169.254.169.254", 80, true),
    ];
    for (name, address, port, allowed) in cases {
        let decision = ask(Policy::Public, &rules, (name, address, port));
        assert_eq!(decision.allowed, allowed, "{name} {address}:{port}: {}", decision.rule);
        assert!(!ask(Policy::None, &rules, (name, address, port)).allowed);
    }
}

#[test]
fn a_hint_is_a_rule_that_would_allow_it() {
    let none = OperatorRules::default();
    let cases = [
        ("mirror.example", "10.0.0.1", 443),
        ("mirror.example", "127.0.0.1", 443),
        ("", "11.22.33.44", 25),
        ("", "2002:7f00:1::", 1),
        ("", "64:ff9b::127.0.0.1", 1),
        ("", "::ffff:10.0.0.1", 80),
    ];
    for (name, address, port) in cases {
        let decision = ask(Policy::Public, &none, (name, address, port));
        let (_, rule) = decision.hint.split_once("[[egress.allow]] ").unwrap();
        let text = rule.replace(" ports", "\nports");
        let text: RuleText = toml::from_str(&text).unwrap();
        let rules = OperatorRules::parse(vec![text]).unwrap();
        assert!(ask(Policy::Public, &rules, (name, address, port)).allowed, "{}", decision.hint);
    }
}

/// Every way to write an IPv4 address into an IPv6 one.
fn encodings(address: Ipv4Addr) -> Vec<IpAddr> {
    let [a, b, c, d] = address.octets().map(u16::from);
    let (high, low) = (a << 8 | b, c << 8 | d);
    let v6 = |s: [u16; 8]| IpAddr::V6(Ipv6Addr::from(s));
    vec![
        IpAddr::V4(address),
        v6([0, 0, 0, 0, 0, 0xffff, high, low]),
        v6([0, 0, 0, 0, 0xffff, 0, high, low]),
        v6([0, 0, 0, 0, 0, 0, high, low]),
        v6([0x64, 0xff9b, 0, 0, 0, 0, high, low]),
        v6([0x64, 0xff9b, 1, 0, 0, 0, high, low]),
        v6([0x64, 0xff9b, 1, 7, 7, 7, high, low]),
        v6([0x2002, high, low, 0, 0, 0, 0, 1]),
        v6([0x2001, 0, high, low, 0, 0, 0, 0]),
        v6([0x2001, 0, 0x808, 0x808, 0, 0, !high, !low]),
        v6([0x2606, 0x4700, 0, 0, 0, 0x5efe, high, low]),
        v6([0x2606, 0x4700, 0, 0, 0x200, 0x5efe, high, low]),
    ]
}

fn special_v4() -> impl Strategy<Value = Ipv4Addr> {
    let within = |base: [u8; 4], prefix: u32| {
        let base = u32::from_be_bytes(base);
        let mask = u32::MAX.checked_shr(prefix).unwrap_or(0);
        any::<u32>().prop_map(move |bits| Ipv4Addr::from_bits(base | (bits & mask)))
    };
    prop_oneof![
        within([0, 0, 0, 0], 8),
        within([10, 0, 0, 0], 8),
        within([100, 64, 0, 0], 10),
        within([127, 0, 0, 0], 8),
        within([169, 254, 0, 0], 16),
        within([172, 16, 0, 0], 12),
        within([192, 0, 2, 0], 24),
        within([192, 88, 99, 0], 24),
        within([192, 168, 0, 0], 16),
        within([198, 18, 0, 0], 15),
        within([198, 51, 100, 0], 24),
        within([203, 0, 113, 0], 24),
        within([224, 0, 0, 0], 3),
        Just(Ipv4Addr::new(11, 22, 33, 44)),
    ]
}

fn allowed(address: IpAddr, port: u16) -> bool {
    let wanted = Wanted { name: None, address, port, protocol: EgressProtocol::Udp };
    decide(Policy::Public, &OperatorRules::default(), &own(), wanted).allowed
}

proptest! {
    #[test]
    fn no_special_address_in_any_encoding_is_allowed(address in special_v4(), port: u16) {
        for form in encodings(address) {
            prop_assert!(!allowed(form, port), "{form}");
        }
    }

    #[test]
    fn outside_the_global_unicast_block_only_nat64_is_allowed(bits: u128, port: u16) {
        let address = Ipv6Addr::from_bits(bits);
        let first = address.segments()[0];
        let unicast = (0x2000..0x4000).contains(&first);
        prop_assert!(unicast || first == 0x64 || !allowed(IpAddr::V6(address), port), "{address}");
    }

    #[test]
    fn none_allows_nothing(bits: u128, v4: u32, port: u16) {
        for address in [IpAddr::V6(Ipv6Addr::from_bits(bits)), IpAddr::V4(Ipv4Addr::from_bits(v4))] {
            let wanted = Wanted { name: None, address, port, protocol: EgressProtocol::Tcp };
            let own = OwnAddresses::default();
            let decision = decide(Policy::None, &OperatorRules::default(), &own, wanted);
            prop_assert!(!decision.allowed);
        }
    }
}
