use domain::base::message_builder::OptBuilder;
use domain::base::{Message, MessageBuilder, Name};
use proptest::prelude::*;
use towline_proto::v1::DnsRecord;

use super::*;

fn question(name: &str, rtype: Rtype, edns: Option<u16>) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec().question();
    builder.header_mut().set_id(0x1234);
    builder.header_mut().set_rd(true);
    builder.push((name.parse::<Name<Vec<u8>>>().unwrap(), rtype)).unwrap();
    let mut builder = builder.additional();
    if let Some(size) = edns {
        let opt = |opt: &mut OptBuilder<'_, Vec<u8>>| {
            opt.set_udp_payload_size(size);
            Ok(())
        };
        builder.opt(opt).unwrap();
    }
    builder.finish()
}

fn said(response_code: u32, has_ipv4: bool, has_ipv6: bool) -> LookupAnswer {
    LookupAnswer { response_code, has_ipv4, has_ipv6, records: vec![] }
}

/// Asks, and lets the node say this; what it was asked, and the answer.
fn ask(
    names: &mut Names,
    bytes: &[u8],
    by_tcp: bool,
    said: &LookupAnswer,
) -> (Option<(String, u16)>, Message<Vec<u8>>) {
    let (asked, answer) = match read(bytes, by_tcp, names) {
        Asked::Node(query) => {
            (Some((query.name.clone(), query.record_type)), query.answer(said, names))
        }
        Asked::Answer(answer) => (None, answer),
        Asked::Nothing => panic!("it is a question"),
    };
    let answer = Message::from_octets(answer).unwrap();
    assert_eq!(answer.header().id(), 0x1234);
    assert!(answer.header().qr() && answer.header().ra());
    (asked, answer)
}

/// The records of the answer, as text.
fn shown(answer: &Message<Vec<u8>>) -> Vec<String> {
    let records = answer.answer().unwrap();
    let records = records.limit_to::<domain::rdata::AllRecordData<_, _>>();
    records
        .map(|record| {
            let record = record.unwrap();
            format!("{} {} {}", record.owner(), record.rtype(), record.data())
        })
        .collect()
}

#[test]
fn names_get_addresses_of_their_own() {
    let mut names = Names::default();
    let yes = said(0, true, true);
    let first = question("Mirror.Example.", Rtype::A, None);
    let (asked, answer) = ask(&mut names, &first, false, &yes);
    assert_eq!(asked, Some(("mirror.example".into(), 1)));
    assert_eq!(shown(&answer), ["Mirror.Example A 198.18.1.0"]);
    let (_, answer) = ask(&mut names, &question("b.example.", Rtype::A, None), false, &yes);
    assert_eq!(shown(&answer), ["b.example A 198.18.1.1"]);
    let (_, answer) = ask(&mut names, &question("mirror.example.", Rtype::AAAA, None), false, &yes);
    assert_eq!(shown(&answer), ["mirror.example AAAA fd74:6f77:6c69::100"]);
    assert_eq!(names.name(256).as_deref(), Some("mirror.example"));
}

#[test]
fn the_node_is_passed_on_truthfully() {
    for (code, rcode) in [
        (0, Rcode::NOERROR),
        (2, Rcode::SERVFAIL),
        (3, Rcode::NXDOMAIN),
        (5, Rcode::REFUSED),
        (4711, Rcode::SERVFAIL),
    ] {
        let mut names = Names::default();
        let bytes = question("x.example.", Rtype::A, None);
        let (_, answer) = ask(&mut names, &bytes, false, &said(code, false, true));
        assert_eq!(answer.header().rcode(), rcode, "{code}");
        assert_eq!(shown(&answer), Vec::<String>::new());
        assert_eq!(names.name(256), None, "only a name that is there gets a number");
    }
}

#[test]
fn other_records_are_the_nodes_and_what_is_too_long_is_cut() {
    let mut names = Names::default();
    let text = |len: u8| DnsRecord {
        record_type: 16,
        ttl_s: 60,
        data: std::iter::once(len).chain(std::iter::repeat_n(b'x', len.into())).collect(),
    };
    let address = DnsRecord { record_type: 1, ttl_s: 1, data: vec![10, 0, 0, 1] };
    let few = LookupAnswer { records: vec![text(2), address.clone()], ..said(0, false, false) };
    let bytes = question("x.example.", Rtype::TXT, None);
    let (asked, answer) = ask(&mut names, &bytes, false, &few);
    assert_eq!(asked, Some(("x.example".into(), 16)));
    assert_eq!(shown(&answer), ["x.example TXT \"xx\""], "an address does not slip through");

    let many = LookupAnswer { records: vec![text(200); 8], ..said(0, false, false) };
    for (edns, by_tcp, whole) in [
        (None, false, false),
        (Some(512), false, false),
        (Some(4096), false, true),
        (None, true, true),
    ] {
        let bytes = question("x.example.", Rtype::TXT, edns);
        let (_, answer) = ask(&mut names, &bytes, by_tcp, &many);
        assert_eq!(answer.header().tc(), !whole, "{edns:?} {by_tcp}");
        assert_eq!(shown(&answer).len(), if whole { 8 } else { 0 });
        assert_eq!(answer.opt().is_some(), edns.is_some());
        assert!(by_tcp || answer.as_slice().len() <= usize::from(edns.unwrap_or(512)));
    }
    let broken = LookupAnswer {
        records: vec![DnsRecord { record_type: 99_999, ..DnsRecord::default() }],
        ..said(0, false, false)
    };
    assert!(shown(&ask(&mut names, &bytes, false, &broken).1).is_empty());
}

#[test]
fn what_is_known_here_is_not_asked() {
    let mut names = Names::default();
    let number = names.bind("mirror.example").unwrap();
    let name = "0.1.18.198.in-addr.arpa.";
    let none = said(3, false, false);
    let (asked, answer) = ask(&mut names, &question(name, Rtype::PTR, None), false, &none);
    assert_eq!(asked, None);
    assert_eq!(shown(&answer), [format!("{} PTR mirror.example.", name.trim_end_matches('.'))]);
    let bits = addresses::name_v6(number).to_bits();
    let nibbles: Vec<String> = format!("{bits:032x}").chars().rev().map(String::from).collect();
    let name = format!("{}.ip6.arpa.", nibbles.join("."));
    let (asked, answer) = ask(&mut names, &question(&name, Rtype::PTR, None), false, &none);
    assert_eq!((asked, shown(&answer).len()), (None, 1));
    let name = "9.9.18.198.in-addr.arpa.";
    let (asked, answer) = ask(&mut names, &question(name, Rtype::PTR, None), false, &none);
    assert_eq!((asked, answer.header().rcode()), (None, Rcode::NXDOMAIN));
    let name = "1.0.0.10.in-addr.arpa.";
    let (asked, _) = ask(&mut names, &question(name, Rtype::PTR, None), false, &none);
    assert!(asked.is_some(), "a real address is the node's affair");

    for (name, rtype, wanted) in [
        ("localhost.", Rtype::A, "localhost A 127.0.0.1"),
        ("a.localhost.", Rtype::AAAA, "a.localhost AAAA ::1"),
    ] {
        let (asked, answer) = ask(&mut names, &question(name, rtype, None), false, &none);
        assert_eq!((asked, shown(&answer)), (None, vec![wanted.to_owned()]));
    }
    for rtype in [Rtype::HTTPS, Rtype::SVCB] {
        let (asked, answer) = ask(&mut names, &question("x.example.", rtype, None), false, &none);
        assert_eq!((asked, answer.header().rcode()), (None, Rcode::NOERROR));
    }
    for rtype in [Rtype::ANY, Rtype::AXFR] {
        let (asked, answer) = ask(&mut names, &question("x.example.", rtype, None), false, &none);
        assert_eq!((asked, answer.header().rcode()), (None, Rcode::NOTIMP));
    }
}

#[test]
fn what_is_no_question_is_refused_or_passed_over() {
    let mut names = Names::default();
    let none = said(0, true, true);
    let bad = question(r"a\032b.example.", Rtype::A, None);
    let (asked, answer) = ask(&mut names, &bad, false, &none);
    assert_eq!((asked, answer.header().rcode()), (None, Rcode::REFUSED));
    let mut empty = question("x.example.", Rtype::A, None);
    empty.truncate(12);
    empty[5] = 0;
    let (asked, answer) = ask(&mut names, &empty, false, &none);
    assert_eq!((asked, answer.header().rcode()), (None, Rcode::FORMERR));
    let mut response = question("x.example.", Rtype::A, None);
    response[2] |= 0x80;
    assert!(matches!(read(&response, false, &names), Asked::Nothing));
    assert!(matches!(read(&response[..11], false, &names), Asked::Nothing));
}

#[test]
fn without_numbers_left_the_answer_is_a_failure() {
    let mut names = Names::default();
    for index in 0..addresses::NAMES_MAX {
        names.bind(&format!("n{index}")).unwrap();
    }
    let yes = said(0, true, true);
    let (_, answer) = ask(&mut names, &question("late.example.", Rtype::A, None), false, &yes);
    assert_eq!(answer.header().rcode(), Rcode::SERVFAIL);
    let (_, answer) = ask(&mut names, &question("n7.", Rtype::A, None), false, &yes);
    assert_eq!(shown(&answer).len(), 1);
}

proptest! {
    #[test]
    fn no_bytes_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600),
        as_question: bool,
        by_tcp: bool,
    ) {
        if as_question && bytes.len() > 12 {
            bytes[2] &= 0x07;
            bytes[4..12].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        }
        let mut names = Names::default();
        if let Asked::Node(query) = read(&bytes, by_tcp, &names) {
            let answer = query.answer(&said(0, true, true), &mut names);
            prop_assert!(Message::from_octets(answer).is_ok());
        }
    }
}
