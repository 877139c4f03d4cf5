//! DNS as messages in and out: what is asked, and the answer from what the node said. Knows no
//! socket and no time.
//!
//! Addresses of names are made up here; response codes and all other records are the node's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::message_builder::{AnswerBuilder, PushError, StaticCompressor};
use domain::base::name::ToLabelIter;
use domain::base::rdata::UnknownRecordData;
use domain::base::{Message, MessageBuilder, Name, Ttl};
use domain::rdata::{A, Aaaa, Ptr};
use towline_proto::v1::LookupAnswer;

use super::addresses::{self, Place};
use super::names::{NAME_MAX, Names};

/// Short, so that a program asks again rather than trust an answer for long.
const TTL: Ttl = Ttl::from_secs(30);
/// What a client without EDNS takes by UDP.
const UDP_PLAIN: usize = 512;
/// What is sent by UDP at most, whatever the client offers.
const UDP_MAX: usize = 4096;
/// Room for an OPT record without options.
const OPT_LEN: usize = 11;
/// Records of one answer that are passed on.
const RECORDS_MAX: usize = 256;

/// A question that can be put to the node.
#[derive(Debug)]
pub(super) struct Query<'a> {
    message: Message<&'a [u8]>,
    limit: usize,
    edns: bool,
    /// In lower case, without a final dot; `.` is the root.
    pub(super) name: String,
    /// As IANA numbers them.
    pub(super) record_type: u16,
}

/// What to do about a message.
#[derive(Debug)]
pub(super) enum Asked<'a> {
    /// The node knows.
    Node(Query<'a>),
    /// It is answered here.
    Answer(Vec<u8>),
    /// It is no question.
    Nothing,
}

/// Reads a message. `by_tcp` answers may be as long as they are.
pub(super) fn read<'a>(bytes: &'a [u8], by_tcp: bool, names: &Names) -> Asked<'a> {
    let Ok(message) = Message::from_octets(bytes) else { return Asked::Nothing };
    if message.header().qr() {
        return Asked::Nothing;
    }
    if message.header().opcode() != Opcode::QUERY {
        return Asked::Answer(error(&message, Rcode::NOTIMP));
    }
    let Ok(question) = message.sole_question() else {
        return Asked::Answer(error(&message, Rcode::FORMERR));
    };
    let opt = message.opt();
    let offered = opt.as_ref().map_or(UDP_PLAIN, |opt| usize::from(opt.udp_payload_size()));
    let limit = if by_tcp { usize::from(u16::MAX) } else { offered.clamp(UDP_PLAIN, UDP_MAX) };
    let query = Query {
        message,
        limit,
        edns: opt.is_some(),
        name: String::new(),
        record_type: question.qtype().to_int(),
    };
    if question.qclass() != Class::IN {
        return Asked::Answer(query.answer_with(Rcode::REFUSED));
    }
    let Some(name) = host_name(question.qname()) else {
        return Asked::Answer(query.answer_with(Rcode::REFUSED));
    };
    let query = Query { name, ..query };
    match question.qtype() {
        // Zone transfers, and questions for everything at once (RFC 8482).
        Rtype::AXFR | Rtype::IXFR | Rtype::ANY => Asked::Answer(query.answer_with(Rcode::NOTIMP)),
        // They hold addresses, which would lead past the name (and the policy's rules for it).
        Rtype::SVCB | Rtype::HTTPS => Asked::Answer(query.answer_with(Rcode::NOERROR)),
        Rtype::PTR => match reverse(&query.name).map(addresses::place) {
            Some(Place::Name(number)) => Asked::Answer(query.pointer(names, number)),
            Some(Place::Resolver) => Asked::Answer(query.answer_with(Rcode::NXDOMAIN)),
            Some(Place::Real) | None => Asked::Node(query),
        },
        // RFC 6761: the loopback is this machine's own, whatever the node's is.
        _ if is_localhost(&query.name) => Asked::Answer(query.localhost()),
        _ => Asked::Node(query),
    }
}

impl Query<'_> {
    /// The answer from what the node said.
    pub(super) fn answer(&self, said: &LookupAnswer, names: &mut Names) -> Vec<u8> {
        let rcode = match u8::try_from(said.response_code).map(Rcode::checked_from_int) {
            Ok(Some(rcode)) => rcode,
            Ok(None) | Err(_) => Rcode::SERVFAIL,
        };
        if rcode != Rcode::NOERROR {
            return self.answer_with(rcode);
        }
        let rtype = Rtype::from_int(self.record_type);
        let exists = match rtype {
            Rtype::A => said.has_ipv4,
            Rtype::AAAA => said.has_ipv6,
            _ => return self.records(said),
        };
        if !exists {
            return self.answer_with(Rcode::NOERROR);
        }
        match names.bind(&self.name) {
            Some(number) if rtype == Rtype::A => {
                self.address(IpAddr::V4(addresses::name_v4(number)))
            }
            Some(number) => self.address(IpAddr::V6(addresses::name_v6(number))),
            None => self.failure(),
        }
    }

    /// The answer when the node could not be asked.
    pub(super) fn failure(&self) -> Vec<u8> {
        self.answer_with(Rcode::SERVFAIL)
    }

    fn answer_with(&self, rcode: Rcode) -> Vec<u8> {
        self.build(rcode, |_| Ok(()))
    }

    fn address(&self, address: IpAddr) -> Vec<u8> {
        self.build(Rcode::NOERROR, |answer| match (self.message.sole_question(), address) {
            (Ok(question), IpAddr::V4(address)) => {
                answer.push((question.qname(), Class::IN, TTL, A::new(address)))
            }
            (Ok(question), IpAddr::V6(address)) => {
                answer.push((question.qname(), Class::IN, TTL, Aaaa::new(address)))
            }
            (Err(_), _) => Ok(()),
        })
    }

    fn localhost(&self) -> Vec<u8> {
        match Rtype::from_int(self.record_type) {
            Rtype::A => self.address(Ipv4Addr::LOCALHOST.into()),
            Rtype::AAAA => self.address(Ipv6Addr::LOCALHOST.into()),
            _ => self.answer_with(Rcode::NOERROR),
        }
    }

    fn pointer(&self, names: &Names, number: u32) -> Vec<u8> {
        let name = names.name(number).and_then(|name| name.parse::<Name<Vec<u8>>>().ok());
        let Some(name) = name else { return self.answer_with(Rcode::NXDOMAIN) };
        self.build(Rcode::NOERROR, |answer| match self.message.sole_question() {
            Ok(question) => answer.push((question.qname(), Class::IN, TTL, Ptr::new(&name))),
            Err(_) => Ok(()),
        })
    }

    fn records(&self, said: &LookupAnswer) -> Vec<u8> {
        self.build(Rcode::NOERROR, |answer| {
            let Ok(question) = self.message.sole_question() else { return Ok(()) };
            for record in said.records.iter().take(RECORDS_MAX) {
                let rtype = u16::try_from(record.record_type).map(Rtype::from_int);
                let Ok(rtype) = rtype else { continue };
                // Addresses are never told; a record of another type would not be what was asked.
                if rtype.to_int() != self.record_type {
                    continue;
                }
                let data = UnknownRecordData::from_octets(rtype, record.data.as_slice());
                let Ok(data) = data else { continue };
                let ttl = Ttl::from_secs(record.ttl_s);
                answer.push((question.qname(), Class::IN, ttl, data))?;
            }
            Ok(())
        })
    }

    /// Answers within the limit; what does not fit is left out, and says so.
    fn build(
        &self,
        rcode: Rcode,
        fill: impl FnOnce(&mut AnswerBuilder<StaticCompressor<Vec<u8>>>) -> Result<(), PushError>,
    ) -> Vec<u8> {
        let Ok(builder) = MessageBuilder::from_target(StaticCompressor::new(Vec::new()));
        let mut answer = builder
            .start_answer(&self.message, rcode)
            .expect("a sole question was read from it, and a `Vec` takes it");
        answer.header_mut().set_ra(true);
        answer.set_push_limit(self.limit - OPT_LEN);
        if fill(&mut answer).is_err() {
            answer.rewind();
            answer.header_mut().set_tc(true);
        }
        answer.clear_push_limit();
        let mut additional = answer.additional();
        if self.edns {
            let size = u16::try_from(UDP_MAX).unwrap_or(u16::MAX);
            let opt = additional.opt(|opt| {
                opt.set_udp_payload_size(size);
                Ok(())
            });
            if opt.is_err() {
                additional.rewind();
            }
        }
        additional.finish().into_target()
    }
}

/// An answer to what cannot even be read as a question.
fn error(message: &Message<&[u8]>, rcode: Rcode) -> Vec<u8> {
    let mut answer = MessageBuilder::new_vec().start_error(message, rcode);
    answer.header_mut().set_ra(true);
    answer.finish()
}

/// The name as text. `None`: it has bytes that no name of a service has.
fn host_name(name: impl ToLabelIter) -> Option<String> {
    let mut text = String::new();
    for label in name.iter_labels().filter(|label| !label.is_root()) {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label.as_slice() {
            let byte = byte.to_ascii_lowercase();
            if !(byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
                return None;
            }
            text.push(char::from(byte));
        }
    }
    if text.is_empty() {
        text.push('.');
    }
    (text.len() <= NAME_MAX).then_some(text)
}

fn is_localhost(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// The address that a name under in-addr.arpa or ip6.arpa stands for.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(parts) = name.strip_suffix(".in-addr.arpa") {
        let mut bytes = [0; 4];
        let mut parts = parts.rsplit('.');
        for byte in &mut bytes {
            *byte = parts.next()?.parse().ok()?;
        }
        return parts.next().is_none().then(|| Ipv4Addr::from(bytes).into());
    }
    let parts = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    let mut count = 0;
    for part in parts.rsplit('.') {
        let [digit] = part.as_bytes() else { return None };
        bits = bits.checked_mul(16)? | u128::from(char::from(*digit).to_digit(16)?);
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from_bits(bits).into())
}

#[cfg(test)]
#[path = "dns/tests.rs"]
mod tests;
