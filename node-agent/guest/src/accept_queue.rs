//! How full the accept queue of a listening socket is, from the kernel's socket diagnostics
//! (sock_diag(7)): one question and its answer.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rustix::io::Errno;
use rustix::net::netlink::SOCK_DIAG;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const INET: u8 = 2;
const INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u8 = 10;
/// `struct nlmsghdr`, then `struct inet_diag_req_v2`.
const REQUEST_LEN: usize = 16 + 56;
/// Where the answer has what, from its `struct nlmsghdr` on.
const ERROR_AT: usize = 16;
const STATE_AT: usize = 17;
const RQUEUE_AT: usize = 72;
const WQUEUE_AT: usize = 76;

/// The accept queue of a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AcceptQueue {
    /// Connections that wait for the server to take them.
    pub(crate) waiting: u32,
    /// The length that the server gave it, bounded by `net.core.somaxconn`. The kernel lets one more
    /// wait, and drops the end of a handshake that finds no room.
    pub(crate) len: u32,
}

impl AcceptQueue {
    /// Whether one more connection is sure to find room. The place beyond the length is left to
    /// others; only a queue of none has no other.
    pub(crate) fn has_room(self) -> bool {
        self.waiting < self.len.max(1)
    }
}

/// The queue of what listens there, also of a listener on all addresses; `None` where nothing does,
/// or a connection would meet something else than a listener of this network namespace. An error
/// where the kernel cannot say.
pub(crate) fn of(address: SocketAddr) -> io::Result<Option<AcceptQueue>> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )?;
    rustix::net::send(&socket, &request(address), SendFlags::empty())?;
    let mut answer = [0; 4096];
    let (len, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
    read(answer.get(..len).unwrap_or_default())
}

/// Asks for the one socket that a connection to this address, from anywhere, would meet.
fn request(address: SocketAddr) -> Vec<u8> {
    let (family, octets) = match address.ip() {
        IpAddr::V4(ip) => (INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (INET6, ip.octets().to_vec()),
    };
    let mut message = Vec::with_capacity(REQUEST_LEN);
    message.extend(u32::try_from(REQUEST_LEN).unwrap_or(0).to_ne_bytes());
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence and port: one question, to the kernel.
    message.extend([0; 8]);
    // No extensions, in any state.
    message.extend([family, IPPROTO_TCP, 0, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    // The socket: its ports in network order, its addresses, any device, any cookie.
    message.extend(address.port().to_be_bytes());
    message.extend([0; 2]);
    message.extend(&octets);
    message.resize(message.len() + 16 - octets.len(), 0);
    message.extend([0; 16 + 4]);
    message.extend([u8::MAX; 8]);
    message
}

fn read(answer: &[u8]) -> io::Result<Option<AcceptQueue>> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "a strange answer of the kernel");
    let number = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(strange)
    };
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    match kind {
        Some(SOCK_DIAG_BY_FAMILY) if answer.get(STATE_AT) == Some(&TCP_LISTEN) => {
            Ok(Some(AcceptQueue { waiting: number(RQUEUE_AT)?, len: number(WQUEUE_AT)? }))
        }
        Some(SOCK_DIAG_BY_FAMILY) => Ok(None),
        Some(NLMSG_ERROR) => {
            let error = number(ERROR_AT)?.cast_signed().checked_neg().ok_or_else(strange)?;
            match Errno::from_raw_os_error(error) {
                Errno::NOENT => Ok(None),
                errno => Err(errno.into()),
            }
        }
        _ => Err(strange()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_the_kernel_are_read() {
        let mut answer = vec![0; 88];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        answer[STATE_AT] = TCP_LISTEN;
        answer[RQUEUE_AT..RQUEUE_AT + 4].copy_from_slice(&3u32.to_ne_bytes());
        answer[WQUEUE_AT..WQUEUE_AT + 4].copy_from_slice(&5u32.to_ne_bytes());
        assert_eq!(read(&answer).unwrap(), Some(AcceptQueue { waiting: 3, len: 5 }));
        assert!(read(&answer[..WQUEUE_AT]).is_err());
        answer[STATE_AT] = 1;
        assert_eq!(read(&answer).unwrap(), None, "a connection, not a listener");

        let error = |number: i32| {
            let mut bytes = vec![0; 36];
            bytes[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
            bytes[ERROR_AT..ERROR_AT + 4].copy_from_slice(&number.to_ne_bytes());
            read(&bytes)
        };
        assert_eq!(error(-Errno::NOENT.raw_os_error()).unwrap(), None);
        assert!(error(-Errno::OPNOTSUPP.raw_os_error()).is_err());
        assert!(error(i32::MIN).is_err());
        assert!(read(&[]).is_err());
    }

    #[test]
    fn a_queue_of_none_has_room_for_one() {
        let has_room = |waiting, len| AcceptQueue { waiting, len }.has_room();
        assert!(has_room(0, 0) && !has_room(1, 0));
        assert!(has_room(4, 5) && !has_room(5, 5) && !has_room(6, 5));
    }
}
