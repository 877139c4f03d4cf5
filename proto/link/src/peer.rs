//! What is known of the other end of a connection, as its transport proved it.

use std::net::SocketAddr;
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;

use crate::identity::{CertificateInfo, Identity, IdentityError};

/// The other end. Services find it in a request's extensions: `request.extensions().get::<Peer>()`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// From its certificate; `None` over a Unix socket, or from a client that came to enrol.
    pub identity: Option<Identity>,
    /// SHA-256 of its certificate's SubjectPublicKeyInfo.
    pub spki_sha256: Option<[u8; 32]>,
    /// When its certificate ends: a session must not outlive it.
    pub not_after: Option<SystemTime>,
    /// The user at the other end of a Unix socket.
    pub uid: Option<u32>,
    /// Where it comes from; `None` over a Unix socket.
    pub address: Option<SocketAddr>,
}

impl Peer {
    /// Reads the chain that a handshake accepted; no chain is a peer without an identity.
    pub(crate) fn from_chain(
        chain: Option<&[CertificateDer<'_>]>,
        address: SocketAddr,
    ) -> Result<Self, IdentityError> {
        let mut peer = Self { address: Some(address), ..Self::default() };
        if let Some(leaf) = chain.and_then(<[_]>::first) {
            let info = CertificateInfo::from_der(leaf)?;
            peer.identity = Some(info.identity);
            peer.spki_sha256 = Some(info.spki_sha256);
            peer.not_after = Some(info.not_after);
        }
        Ok(peer)
    }
}
