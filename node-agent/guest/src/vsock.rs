//! The guest link's listening socket where the VMM has a vsock: the node connects, and nobody else
//! can from outside. From inside anybody may where the kernel has its loopback; whoever does must know
//! the sandbox's secret to be taken for the node.

use std::io;
use std::task::{Context, Poll};

use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};
use towline_proto::mux::VSOCK_PORT;
use towline_streams::Accept;

/// A listening vsock. It survives that its guest is saved and restored; open connections do not.
#[derive(Debug)]
pub struct Vsock(VsockListener);

impl Vsock {
    /// Listens at the guest link's port. Must be called within a tokio runtime with IO.
    pub fn listen() -> io::Result<Self> {
        let address = VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT);
        VsockListener::bind(address).map(Self).map_err(|error| {
            io::Error::new(error.kind(), format!("the machine has no guest link: {error}"))
        })
    }
}

impl Accept for Vsock {
    type Stream = VsockStream;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<VsockStream>> {
        self.0.poll_accept(cx).map_ok(|(stream, _)| stream)
    }
}
