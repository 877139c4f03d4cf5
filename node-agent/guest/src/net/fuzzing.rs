//! What the workload sends, as functions of bytes: for fuzzing, and for nothing else.

use std::task::{Context, Poll, Waker};
use std::time::Duration;

use towline_proto::v1::{DnsRecord, LookupAnswer};

use super::connection::{Connection, Outgoing};
use super::dns::{self, Asked};
use super::names::Names;
use super::packet::{self, Content, FlowKey, PACKET_MAX, Unreachable};

/// Checks the packets that a connection makes.
struct Checked(Vec<u8>);

impl Outgoing for Checked {
    fn packet(&mut self, len: usize, fill: &mut dyn FnMut(&mut [u8])) {
        assert!(len <= PACKET_MAX);
        self.0.resize(len, 0);
        fill(&mut self.0);
        assert!(matches!(packet::read(&self.0), Content::Tcp { .. } | Content::Nothing));
    }
}

/// Packets, each behind two bytes of length: told apart, answered without a connection, and given to
/// the connection that the first of them opened.
pub fn packets(mut bytes: &[u8]) {
    let mut open: Option<(FlowKey, Connection)> = None;
    let mut now = Duration::ZERO;
    while let Some((len, rest)) = bytes.split_first_chunk() {
        let (packet, rest) = rest.split_at(rest.len().min(u16::from_be_bytes(*len).into()));
        bytes = rest;
        now += Duration::from_millis(300);
        for why in [Unreachable::Host, Unreachable::Port, Unreachable::Prohibited] {
            if let Some(made) = packet::unreachable(packet, why) {
                assert!(made.len() <= 1280 && matches!(packet::read(&made), Content::Nothing));
            }
        }
        match packet::read(packet) {
            Content::Tcp { key, segment } => {
                if let Some(made) = packet::reset(&key, &segment) {
                    let Content::Tcp { segment, .. } = packet::read(&made) else {
                        panic!("a reset is a segment")
                    };
                    assert!(segment.resets && packet::reset(&key, &segment).is_none());
                }
                take(&mut open, key, segment.opens, packet, now);
            }
            Content::Udp { key, data } => {
                assert!(packet::datagram(&key, data).is_some());
            }
            Content::Prohibited | Content::Nothing => {}
        }
    }
}

fn take(
    open: &mut Option<(FlowKey, Connection)>,
    key: FlowKey,
    opens: bool,
    packet: &[u8],
    now: Duration,
) {
    let mut out = Checked(Vec::new());
    let Some((_, connection)) = open.as_mut().filter(|(other, _)| *other == key) else {
        if opens && open.is_none() {
            *open = Some((key, Connection::accept(&key, packet, 7, 4096, now, &mut out)));
        }
        return;
    };
    connection.receive(packet, now, &mut out);
    let mut cx = Context::from_waker(Waker::noop());
    let mut came = Vec::new();
    let _ = connection.poll_receive(&mut cx, |_, bytes| {
        came.extend_from_slice(bytes);
        Poll::Ready(bytes.len())
    });
    if !came.is_empty() {
        let _ = connection.poll_send(&mut cx, |_, room| {
            let len = room.len().min(came.len());
            room[..len].copy_from_slice(&came[..len]);
            Poll::Ready(len)
        });
    }
    if came.first() == Some(&b'.') {
        connection.finish();
    }
    connection.poll(now, &mut out);
    let _ = (connection.due(now), connection.unheard(now), connection.is_over());
}

/// A message to the resolver, and the answer to it.
pub fn question(bytes: &[u8]) {
    let mut names = Names::default();
    names.bind("known.example");
    for by_tcp in [false, true] {
        let answer = match dns::read(bytes, by_tcp, &names) {
            Asked::Node(query) => {
                let record = DnsRecord {
                    record_type: query.record_type.into(),
                    ttl_s: 1,
                    data: vec![7; 90],
                };
                let said = LookupAnswer {
                    response_code: 0,
                    has_ipv4: true,
                    has_ipv6: true,
                    records: vec![record; 60],
                };
                query.answer(&said, &mut names)
            }
            Asked::Answer(answer) => answer,
            Asked::Nothing => continue,
        };
        assert!(answer.len() >= 12 && answer[..2] == bytes[..2], "an answer to this question");
        assert!(by_tcp || answer.len() <= bytes.len().max(4096), "it fits a datagram");
    }
}
