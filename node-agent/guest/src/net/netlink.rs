//! The few rtnetlink requests that set the network device up: addresses, routes, size, up. Each is
//! one message and its acknowledgement.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::addresses::{OWN_V4, OWN_V6};
use super::packet::PACKET_MAX;

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
/// REQUEST and ACK.
const CHANGE: u16 = 0x05;
/// With CREATE and REPLACE.
const PUT: u16 = 0x505;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const INET: u8 = 2;
const INET6: u8 = 10;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

/// A netlink socket about one device.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    device: u32,
}

impl Netlink {
    /// Finds the device.
    pub(super) fn open(device: &str) -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let any = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let device = rustix::net::netdevice::name_to_index(&any, device)?;
        Ok(Self { socket, device })
    }

    /// Gives the device its size, addresses and routes, and switches it on.
    pub(super) fn set_up(&mut self) -> io::Result<()> {
        let mtu = u32::try_from(PACKET_MAX).unwrap_or(u32::MAX).to_ne_bytes();
        self.ask(RTM_NEWLINK, CHANGE, &self.link(0), &[(IFLA_MTU, &mtu)])?;
        // No link-local address, so nothing asks for routers. A kernel without IPv6 has no such
        // setting, and gets no IPv6 addresses either.
        let mode = attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        let family = attribute(INET6.into(), &mode);
        let has_v6 =
            self.ask(RTM_NEWLINK, CHANGE, &self.link(0), &[(IFLA_AF_SPEC, &family)]).is_ok();
        self.ask(RTM_NEWLINK, CHANGE, &self.link(IFF_UP), &[])?;
        self.add(OWN_V4.into())?;
        if has_v6 {
            match self.add(OWN_V6.into()) {
                // Switched off by the administrator of this network namespace.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::ACCESS) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Adds an address and the default route of its family.
    fn add(&mut self, address: IpAddr) -> io::Result<()> {
        let (family, octets) = match address {
            IpAddr::V4(address) => (INET, address.octets().to_vec()),
            IpAddr::V6(address) => (INET6, address.octets().to_vec()),
        };
        let whole = u8::try_from(octets.len() * 8).unwrap_or(0);
        let mut body = vec![family, whole, 0, 0];
        body.extend(self.device.to_ne_bytes());
        self.ask(RTM_NEWADDR, PUT, &body, &[(IFA_LOCAL, &octets), (IFA_ADDRESS, &octets)])?;
        let route =
            [family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_LINK, RTN_UNICAST, 0, 0, 0, 0];
        self.ask(RTM_NEWROUTE, PUT, &route, &[(RTA_OIF, &self.device.to_ne_bytes())])
    }

    /// `struct ifinfomsg`.
    fn link(&self, flags: u32) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend(self.device.to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body.extend(flags.to_ne_bytes());
        body
    }

    fn ask(
        &self,
        kind: u16,
        flags: u16,
        body: &[u8],
        attributes: &[(u16, &[u8])],
    ) -> io::Result<()> {
        let mut payload = body.to_vec();
        for (kind, data) in attributes {
            payload.extend(attribute(*kind, data));
        }
        let mut message = u32::try_from(16 + payload.len()).unwrap_or(0).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence and port: one question at a time, to the kernel.
        message.extend([0; 8]);
        message.extend(payload);
        rustix::net::send(&self.socket, &message, SendFlags::empty())?;
        let mut answer = [0; 4096];
        let (len, _) = rustix::net::recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        acknowledged(&answer[..len])
    }
}

/// Reads an acknowledgement: a header, and an error number that is negative or zero.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "a strange answer of the kernel");
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    let error = answer.get(16..20).and_then(|error| error.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => {
            Err(io::Error::from_raw_os_error(error.checked_neg().ok_or_else(strange)?))
        }
        _ => Err(strange()),
    }
}

/// `struct rtattr` and its data, padded.
fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = u16::try_from(4 + data.len()).unwrap_or(0).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_the_kernel_are_read() {
        let answer = |error: i32| {
            let mut bytes = vec![36, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes.extend(error.to_ne_bytes());
            bytes
        };
        assert!(acknowledged(&answer(0)).is_ok());
        let refused = acknowledged(&answer(-1)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(acknowledged(&answer(i32::MIN)).is_err());
        assert!(acknowledged(&[]).is_err());
    }

    #[test]
    fn attributes_are_padded_but_not_counted_so() {
        assert_eq!(attribute(8, &[1]), [5, 0, 8, 0, 1, 0, 0, 0]);
        assert_eq!(attribute(4, &[1, 2, 3, 4]), [8, 0, 4, 0, 1, 2, 3, 4]);
    }
}
