//! Tickets: the short-lived, signed right of one client to reach one sandbox, or the image store,
//! of one node. The control plane signs, the node checks without asking anybody.
//!
//! Whether the epoch is the current one only the node knows: [`CheckedTicket::epoch`] is its
//! affair. Everything else is checked here, and a ticket that was checked is the only way to a
//! [`CheckedTicket`].

use std::collections::BTreeMap;
use std::fmt;

use prost::Message;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::limits::TICKET_LIFE_MAX;
use towline_proto::v1::{SignedTicket, Ticket, TicketKey};

use crate::identity::{Identity, sha256};

/// How far the control plane's clock may be ahead of the node's.
const CLOCK_SKEW_S: u64 = 60;

/// Largest encoded ticket: it travels in front of each stream.
pub const TICKET_BYTES_MAX: usize = 4096;

/// Bytes of a key's id.
const KEY_ID_LEN: usize = 8;

/// Says why a ticket is not good here and now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// There is none.
    #[error("the stream carries no ticket")]
    Missing,
    /// Not a ticket at all.
    #[error("the ticket cannot be read: {0}")]
    Malformed(&'static str),
    /// Signed by a key that this node was not told of.
    #[error("the ticket is signed by an unknown key: the node may not have heard of a new one yet")]
    UnknownKey,
    /// The signature is not that key's.
    #[error("the ticket's signature is wrong")]
    Signature,
    /// Of another cluster.
    #[error("the ticket is of another cluster")]
    Cluster,
    /// For another node.
    #[error("the ticket is for another node: the sandbox has moved")]
    Node,
    /// Shown by somebody else than it was made for.
    #[error("the ticket was made for another client certificate")]
    Client,
    /// Over.
    #[error("the ticket expired {0} s ago")]
    Expired(u64),
    /// Longer than tickets may live.
    #[error("the ticket would live for longer than tickets may")]
    TooLong,
}

/// Signs tickets.
pub struct TicketSigner {
    key: Ed25519KeyPair,
    pkcs8: Vec<u8>,
}

impl fmt::Debug for TicketSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketSigner").field("key", &self.public_key()).finish_non_exhaustive()
    }
}

impl TicketSigner {
    /// Draws a new key from the system's random numbers.
    pub fn generate() -> Result<Self, TicketError> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| TicketError::Malformed("the system has no random numbers"))?;
        Self::from_pkcs8(document.as_ref())
    }

    /// Takes a key that [`Self::pkcs8`] gave.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, TicketError> {
        let key = Ed25519KeyPair::from_pkcs8(pkcs8)
            .map_err(|_| TicketError::Malformed("the signing key is not an Ed25519 PKCS #8 key"))?;
        Ok(Self { key, pkcs8: pkcs8.to_vec() })
    }

    /// The key, to be kept in a 0600 file.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// What nodes need to check its tickets.
    pub fn public_key(&self) -> TicketKey {
        let public = self.key.public_key().as_ref().to_vec();
        TicketKey { key_id: key_id(&public), ed25519_public: public }
    }

    /// Signs a ticket; the answer is an encoded `SignedTicket`.
    pub fn sign(&self, ticket: &Ticket) -> Vec<u8> {
        let ticket = ticket.encode_to_vec();
        let signature = self.key.sign(&ticket).as_ref().to_vec();
        SignedTicket { ticket, signature, key_id: self.public_key().key_id }.encode_to_vec()
    }
}

/// What a ticket opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TicketTarget {
    /// Streams of one sandbox.
    Sandbox(SandboxId),
    /// The node's image store.
    Images,
}

/// A ticket that passed every check but the epoch's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedTicket {
    /// What it opens.
    pub target: TicketTarget,
    /// The placement it was made for: a node refuses any but the current one.
    pub epoch: u64,
    /// Whose it is.
    pub identity: Identity,
    /// When it ends.
    pub not_after_unix_s: u64,
    /// For a removal of images: [`keep_digest`] of those that stay; else empty.
    pub keep_sha256: Vec<u8>,
}

/// Digest of a list of images as a ticket names it.
pub fn keep_digest(keep: &[String]) -> Vec<u8> {
    sha256(keep.join("\n").as_bytes()).to_vec()
}

/// Who checks a ticket, and on which connection.
#[derive(Debug, Clone, Copy)]
pub struct TicketContext<'a> {
    /// The cluster, as text.
    pub cluster_id: &'a str,
    /// The node that checks.
    pub node_id: NodeId,
    /// The connection's client certificate.
    pub client_spki_sha256: &'a [u8; 32],
    /// The time.
    pub now_unix_s: u64,
}

/// Checks tickets against the keys that the control plane announced.
#[derive(Debug, Clone, Default)]
pub struct TicketVerifier {
    keys: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl TicketVerifier {
    /// Takes the keys of `NodeRegistered`. A key whose id is not its digest is left out.
    pub fn new(keys: &[TicketKey]) -> Self {
        let keys = keys
            .iter()
            .filter(|key| key.key_id == key_id(&key.ed25519_public))
            .map(|key| (key.key_id.clone(), key.ed25519_public.clone()))
            .collect();
        Self { keys }
    }

    /// Checks an encoded `SignedTicket`.
    pub fn verify(
        &self,
        signed: &[u8],
        context: &TicketContext<'_>,
    ) -> Result<CheckedTicket, TicketError> {
        let ticket = self.verify_signature(signed)?;
        if ticket.cluster_id != context.cluster_id {
            return Err(TicketError::Cluster);
        }
        if ticket.node_id != context.node_id.as_bytes() {
            return Err(TicketError::Node);
        }
        if ticket.client_key_sha256 != context.client_spki_sha256 {
            return Err(TicketError::Client);
        }
        check_life(ticket.not_after_unix_s, context.now_unix_s)?;
        let target = if ticket.sandbox_id.is_empty() {
            TicketTarget::Images
        } else {
            let id = SandboxId::try_from(ticket.sandbox_id.as_slice())
                .map_err(|_| TicketError::Malformed("its sandbox id has not 16 bytes"))?;
            TicketTarget::Sandbox(id)
        };
        let identity = ticket
            .identity
            .parse()
            .map_err(|_| TicketError::Malformed("its identity is not one"))?;
        Ok(CheckedTicket {
            target,
            epoch: ticket.epoch,
            identity,
            not_after_unix_s: ticket.not_after_unix_s,
            keep_sha256: ticket.keep_sha256,
        })
    }

    fn verify_signature(&self, signed: &[u8]) -> Result<Ticket, TicketError> {
        if signed.is_empty() {
            return Err(TicketError::Missing);
        }
        if signed.len() > TICKET_BYTES_MAX {
            return Err(TicketError::Malformed("it is too long"));
        }
        let signed = SignedTicket::decode(signed)
            .map_err(|_| TicketError::Malformed("it is not a SignedTicket"))?;
        let key = self.keys.get(&signed.key_id).ok_or(TicketError::UnknownKey)?;
        UnparsedPublicKey::new(&ED25519, key)
            .verify(&signed.ticket, &signed.signature)
            .map_err(|_| TicketError::Signature)?;
        Ticket::decode(signed.ticket.as_slice())
            .map_err(|_| TicketError::Malformed("what was signed is not a Ticket"))
    }
}

fn check_life(not_after: u64, now: u64) -> Result<(), TicketError> {
    if not_after <= now {
        return Err(TicketError::Expired(now - not_after));
    }
    if not_after - now > TICKET_LIFE_MAX.as_secs() + CLOCK_SKEW_S {
        return Err(TicketError::TooLong);
    }
    Ok(())
}

fn key_id(public: &[u8]) -> Vec<u8> {
    sha256(public)[..KEY_ID_LEN].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const CLIENT: [u8; 32] = [7; 32];

    fn node() -> NodeId {
        NodeId::from_bytes([1; 16])
    }

    fn ticket() -> Ticket {
        Ticket {
            cluster_id: "cluster_a".into(),
            ticket_id: vec![9; 16],
            sandbox_id: vec![2; 16],
            epoch: 3,
            node_id: node().to_vec(),
            client_key_sha256: CLIENT.to_vec(),
            not_after_unix_s: NOW + 600,
            identity: "spiffe://cluster_a/user/ada".into(),
            keep_sha256: Vec::new(),
        }
    }

    fn verify(signer: &TicketSigner, signed: &[u8]) -> Result<CheckedTicket, TicketError> {
        let context = TicketContext {
            cluster_id: "cluster_a",
            node_id: node(),
            client_spki_sha256: &CLIENT,
            now_unix_s: NOW,
        };
        TicketVerifier::new(&[signer.public_key()]).verify(signed, &context)
    }

    #[test]
    fn a_good_ticket_opens_its_sandbox() {
        let signer = TicketSigner::generate().unwrap();
        let again = TicketSigner::from_pkcs8(signer.pkcs8()).unwrap();
        let checked = verify(&again, &signer.sign(&ticket())).unwrap();
        assert_eq!(checked.target, TicketTarget::Sandbox(SandboxId::from_bytes([2; 16])));
        assert_eq!((checked.epoch, checked.identity.name()), (3, "ada"));
        let images = Ticket { sandbox_id: vec![], ..ticket() };
        let checked = verify(&signer, &signer.sign(&images)).unwrap();
        assert_eq!(checked.target, TicketTarget::Images);
    }

    #[test]
    fn each_field_is_checked_even_when_well_signed() {
        let signer = TicketSigner::generate().unwrap();
        let check = |ticket: Ticket, error: TicketError| {
            assert_eq!(verify(&signer, &signer.sign(&ticket)), Err(error));
        };
        check(Ticket { cluster_id: "cluster_b".into(), ..ticket() }, TicketError::Cluster);
        check(Ticket { node_id: vec![8; 16], ..ticket() }, TicketError::Node);
        check(Ticket { node_id: vec![], ..ticket() }, TicketError::Node);
        check(Ticket { client_key_sha256: vec![8; 32], ..ticket() }, TicketError::Client);
        check(Ticket { client_key_sha256: vec![], ..ticket() }, TicketError::Client);
        check(Ticket { not_after_unix_s: NOW, ..ticket() }, TicketError::Expired(0));
        check(Ticket { not_after_unix_s: NOW - 5, ..ticket() }, TicketError::Expired(5));
        check(Ticket { not_after_unix_s: NOW + 700, ..ticket() }, TicketError::TooLong);
        check(Ticket { not_after_unix_s: u64::MAX, ..ticket() }, TicketError::TooLong);
        let malformed = |ticket: Ticket| {
            let error = verify(&signer, &signer.sign(&ticket)).unwrap_err();
            assert!(matches!(error, TicketError::Malformed(_)), "{error}");
        };
        malformed(Ticket { sandbox_id: vec![2; 15], ..ticket() });
        malformed(Ticket { identity: "ada".into(), ..ticket() });
    }

    #[test]
    fn a_changed_byte_anywhere_is_refused() {
        let signer = TicketSigner::generate().unwrap();
        let signed = signer.sign(&ticket());
        for place in 0..signed.len() {
            for flip in [1, 0x80] {
                let mut changed = signed.clone();
                changed[place] ^= flip;
                assert!(verify(&signer, &changed).is_err(), "byte {place} ^ {flip}");
            }
        }
        for len in 0..signed.len() {
            assert!(verify(&signer, &signed[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn another_signers_ticket_is_refused() {
        let (signer, other) =
            (TicketSigner::generate().unwrap(), TicketSigner::generate().unwrap());
        assert_eq!(verify(&signer, &other.sign(&ticket())), Err(TicketError::UnknownKey));
        let mut forged = SignedTicket::decode(other.sign(&ticket()).as_slice()).unwrap();
        forged.key_id = signer.public_key().key_id;
        assert_eq!(verify(&signer, &forged.encode_to_vec()), Err(TicketError::Signature));
        assert_eq!(verify(&signer, &[]), Err(TicketError::Missing));
    }
}
