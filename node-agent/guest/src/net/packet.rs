//! What comes from the workload as packets, and the few packets that the guest agent makes without
//! a connection: resets, "unreachable" messages, datagrams.
//!
//! Nothing is trusted: a packet that is not what it says is none.

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv6DstUnreachable, Icmpv6Message,
    Icmpv6Packet, IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv6Packet, TcpControl, TcpPacket,
    TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

/// Largest packet of an interface, and of IPv4.
pub(super) const PACKET_MAX: usize = 65_535;
const HOP_LIMIT: u8 = 64;
const UDP_HEADER: usize = 8;
const ICMP_HEADER: usize = 8;
/// What an "unreachable" message quotes, so that it fits every link (RFC 1812, RFC 4443).
const QUOTE_V4: usize = 576 - 20 - ICMP_HEADER;
const QUOTE_V6: usize = 1280 - 40 - ICMP_HEADER;

/// One connection or flow of datagrams, by the workload's end and the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    /// The workload's address.
    pub(super) source: IpAddr,
    /// The workload's port.
    pub(super) source_port: u16,
    /// Where it wants to.
    pub(super) target: IpAddr,
    /// The port there.
    pub(super) target_port: u16,
}

/// What a packet carries.
#[derive(Debug)]
pub(super) enum Content<'a> {
    /// A segment: its flags and how much of sequence space it takes.
    Tcp { key: FlowKey, segment: Segment },
    /// A datagram.
    Udp { key: FlowKey, data: &'a [u8] },
    /// Something that is not carried to the outside, and that may be answered by "prohibited".
    Prohibited,
    /// Something to pass over in silence.
    Nothing,
}

/// What a connection's beginning and a reset need to know of a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// It begins a connection.
    pub(super) opens: bool,
    /// It resets one.
    pub(super) resets: bool,
    seq: TcpSeqNumber,
    ack: Option<TcpSeqNumber>,
    len: usize,
}

/// Why a target cannot be reached, as a packet says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// `EHOSTUNREACH`.
    Host,
    /// `ECONNREFUSED` of a datagram.
    Port,
    /// Not by this kind of packet.
    Prohibited,
}

/// Reads a packet of the workload.
pub(super) fn read(bytes: &[u8]) -> Content<'_> {
    let content = match bytes.first().map(|byte| byte >> 4) {
        Some(4) => read_v4(bytes),
        Some(6) => read_v6(bytes),
        _ => None,
    };
    content.unwrap_or(Content::Nothing)
}

fn read_v4(bytes: &[u8]) -> Option<Content<'_>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    let (source, target) = (packet.src_addr(), packet.dst_addr());
    if !is_host(source.into()) || !is_host(target.into()) {
        return None;
    }
    if packet.more_frags() || packet.frag_offset() != 0 {
        return Some(Content::Prohibited);
    }
    Some(read_transport(packet.next_header(), source.into(), target.into(), packet.payload()))
}

fn read_v6(bytes: &[u8]) -> Option<Content<'_>> {
    let packet = Ipv6Packet::new_checked(bytes).ok()?;
    let (source, target) = (packet.src_addr(), packet.dst_addr());
    if !is_host(source.into()) || !is_host(target.into()) {
        return None;
    }
    let payload = bytes.get(packet.header_len()..packet.total_len())?;
    Some(read_transport(packet.next_header(), source.into(), target.into(), payload))
}

/// Whether an address is one machine's, and not many's or nobody's.
fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !address.is_multicast() && !address.is_unspecified() && !address.is_broadcast()
        }
        IpAddr::V6(address) => !address.is_multicast() && !address.is_unspecified(),
    }
}

fn read_transport(
    protocol: IpProtocol,
    source: IpAddr,
    target: IpAddr,
    payload: &[u8],
) -> Content<'_> {
    let key = |source_port, target_port| FlowKey { source, source_port, target, target_port };
    match protocol {
        IpProtocol::Tcp => {
            let Ok(packet) = TcpPacket::new_checked(payload) else { return Content::Nothing };
            if packet.src_port() == 0 || packet.dst_port() == 0 {
                return Content::Nothing;
            }
            let segment = Segment {
                opens: packet.syn() && !packet.ack() && !packet.rst() && !packet.fin(),
                resets: packet.rst(),
                seq: packet.seq_number(),
                ack: packet.ack().then(|| packet.ack_number()),
                len: packet.segment_len(),
            };
            Content::Tcp { key: key(packet.src_port(), packet.dst_port()), segment }
        }
        IpProtocol::Udp => {
            let Ok(packet) = UdpPacket::new_checked(payload) else { return Content::Nothing };
            if packet.src_port() == 0 || packet.dst_port() == 0 {
                return Content::Nothing;
            }
            Content::Udp { key: key(packet.src_port(), packet.dst_port()), data: packet.payload() }
        }
        // A message about a packet is never answered by another; of the rest only the asking ones.
        IpProtocol::Icmp if payload.first() != Some(&8) => Content::Nothing,
        IpProtocol::Icmpv6 if payload.first() != Some(&128) => Content::Nothing,
        // Membership reports and the like go to no host; what is left wants to go out.
        _ => Content::Prohibited,
    }
}

/// The reset that refuses a segment; `None` for one that is a reset itself.
pub(super) fn reset(key: &FlowKey, segment: &Segment) -> Option<Vec<u8>> {
    if segment.resets {
        return None;
    }
    let (seq_number, ack_number) = match segment.ack {
        Some(ack) => (ack, None),
        None => (TcpSeqNumber(0), Some(segment.seq + segment.len)),
    };
    let repr = TcpRepr {
        src_port: key.target_port,
        dst_port: key.source_port,
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (from, to) = (IpAddress::from(key.target), IpAddress::from(key.source));
    Some(ip_packet(from, to, IpProtocol::Tcp, repr.buffer_len(), |payload| {
        let mut packet = TcpPacket::new_unchecked(payload);
        repr.emit(&mut packet, &from, &to, &ChecksumCapabilities::default());
    }))
}

/// A datagram to the workload; `None` when it is too long for one packet.
pub(super) fn datagram(key: &FlowKey, data: &[u8]) -> Option<Vec<u8>> {
    let (from, to) = (IpAddress::from(key.target), IpAddress::from(key.source));
    let header = if key.source.is_ipv4() { 20 } else { 40 };
    if header + UDP_HEADER + data.len() > PACKET_MAX {
        return None;
    }
    let repr = UdpRepr { src_port: key.target_port, dst_port: key.source_port };
    Some(ip_packet(from, to, IpProtocol::Udp, UDP_HEADER + data.len(), |payload| {
        let mut packet = UdpPacket::new_unchecked(payload);
        repr.emit(
            &mut packet,
            &from,
            &to,
            data.len(),
            |into| into.copy_from_slice(data),
            &ChecksumCapabilities::default(),
        );
    }))
}

/// The message that this packet of the workload reaches nobody, as if its target had sent it.
pub(super) fn unreachable(original: &[u8], why: Unreachable) -> Option<Vec<u8>> {
    match original.first()? >> 4 {
        4 => {
            let packet = Ipv4Packet::new_checked(original).ok()?;
            let (from, to) = (packet.dst_addr(), packet.src_addr());
            let quote = &original[..original.len().min(QUOTE_V4)];
            let code = match why {
                Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let len = ICMP_HEADER + quote.len();
            Some(ip_packet(from.into(), to.into(), IpProtocol::Icmp, len, |payload| {
                let mut message = Icmpv4Packet::new_unchecked(payload);
                message.set_msg_type(Icmpv4Message::DstUnreachable);
                message.set_msg_code(code.into());
                message.data_mut().copy_from_slice(quote);
                message.fill_checksum();
            }))
        }
        6 => {
            let packet = Ipv6Packet::new_checked(original).ok()?;
            let (from, to) = (packet.dst_addr(), packet.src_addr());
            let quote = &original[..original.len().min(QUOTE_V6)];
            let code = match why {
                Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let len = ICMP_HEADER + quote.len();
            Some(ip_packet(from.into(), to.into(), IpProtocol::Icmpv6, len, |payload| {
                payload[ICMP_HEADER..].copy_from_slice(quote);
                let mut message = Icmpv6Packet::new_unchecked(payload);
                message.set_msg_type(Icmpv6Message::DstUnreachable);
                message.set_msg_code(code.into());
                message.fill_checksum(&from, &to);
            }))
        }
        _ => None,
    }
}

fn ip_packet(
    from: IpAddress,
    to: IpAddress,
    protocol: IpProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let repr = IpRepr::new(from, to, protocol, len, HOP_LIMIT);
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut bytes[..], &ChecksumCapabilities::default());
    fill(&mut bytes[repr.header_len()..]);
    bytes
}
