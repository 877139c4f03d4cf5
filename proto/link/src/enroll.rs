//! Joining a cluster by token, and renewing what was got: the client's part.
//!
//! A token is `tow1.<token id>.<secret>.<pin>`; the pin names the one CA that is trusted with it,
//! so the secret is never shown to a stranger.

use std::fmt;

use tonic::transport::Channel;
use towline_proto::ids::TokenId;
use towline_proto::v1::{EnrollRequest, EnrollResponse, RenewCertificateRequest};

use crate::authority::CaCertificate;
use crate::identity::{Identity, IdentityError, LeafKey, Role};
use crate::rpc::{self, RpcTransportError};
use crate::status::RpcError;
use crate::tls::{self, ALPN_H2, CertStore, TlsError, Trust};

const PREFIX: &str = "tow1";

/// Says why joining or renewing failed.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Not a token.
    #[error("this is not a join token: tow1.<id>.<secret>.<pin> is expected")]
    Token,
    /// A key, request or certificate is bad.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No connection to the control plane, or not the token's one.
    #[error(transparent)]
    Transport(#[from] RpcTransportError),
    /// The control plane refused.
    #[error("the control plane refused: {0}")]
    Refused(#[from] RpcError),
    /// The answer is not of the cluster that the token is for.
    #[error("the answer carries another CA than the token's")]
    OtherCa,
}

impl From<IdentityError> for EnrollError {
    fn from(error: IdentityError) -> Self {
        Self::Tls(error.into())
    }
}

/// A join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Which one.
    pub id: TokenId,
    /// What proves that the holder was given it.
    pub secret: String,
    /// SHA-256 of the CA certificate.
    pub pin: [u8; 32],
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}.{}", self.id, self.secret, crate::identity::hex(&self.pin))
    }
}

impl std::str::FromStr for JoinToken {
    type Err = EnrollError;

    fn from_str(text: &str) -> Result<Self, EnrollError> {
        let mut parts = text.trim().split('.');
        let (Some(PREFIX), Some(id), Some(secret), Some(pin), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(EnrollError::Token);
        };
        let id = id.parse().map_err(|_| EnrollError::Token)?;
        let Ok(Trust::Pin(pin)) = Trust::from_pin(pin) else { return Err(EnrollError::Token) };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if secret.is_empty() || secret.len() > 128 || !secret.bytes().all(plain) {
            return Err(EnrollError::Token);
        }
        Ok(Self { id, secret: secret.into(), pin })
    }
}

/// What a process needs to be somebody in a cluster; the PEM texts go to files, the key's 0600.
#[derive(Clone)]
pub struct Enrolled {
    /// Who it is now.
    pub identity: Identity,
    /// Its certificate.
    pub certificate_pem: String,
    /// Its key.
    pub key_pem: String,
    /// The cluster's CA.
    pub ca_pem: String,
    /// The same, read.
    pub ca: CaCertificate,
}

impl fmt::Debug for Enrolled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolled").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Enrolled {
    /// The certificate and key, ready for TLS.
    pub fn store(&self) -> Result<CertStore, TlsError> {
        CertStore::new(&self.certificate_pem, &self.key_pem, &self.ca)
    }
}

/// Exchanges a token for a certificate of a key that is made here and never leaves.
pub async fn enroll(
    endpoint: &str,
    token: &JoinToken,
    name: &str,
) -> Result<Enrolled, EnrollError> {
    let key = LeafKey::generate()?;
    let tls = tls::client_config(None, Trust::Pin(token.pin), Role::Member, &[ALPN_H2])?;
    let channel = rpc::connect(endpoint, tls).await?;
    let request =
        EnrollRequest { token: token.to_string(), csr_pem: key.csr_pem()?, name: name.into() };
    let answer = rpc::control_plane(channel).enroll(request).await.map_err(RpcError::from)?;
    let EnrollResponse { certificate_pem, ca_pem, identity, cluster_id: _ } = answer.into_inner();
    let ca = CaCertificate::from_pem(&ca_pem)?;
    if crate::identity::sha256(ca.der()) != token.pin {
        return Err(EnrollError::OtherCa);
    }
    let identity = identity.parse()?;
    let enrolled = Enrolled { identity, certificate_pem, key_pem: key.to_pem(), ca_pem, ca };
    enrolled.store()?; // the key must be the certificate's
    Ok(enrolled)
}

/// Renews the certificate of a connection that shows the old one, for the same key, so that
/// tickets bound to it stay good. Returns the new certificate; the caller stores and replaces it.
pub async fn renew(channel: Channel, key_pem: &str) -> Result<String, EnrollError> {
    let csr_pem = LeafKey::from_pem(key_pem)?.csr_pem()?;
    let request = RenewCertificateRequest { csr_pem };
    let answer =
        rpc::control_plane(channel).renew_certificate(request).await.map_err(RpcError::from)?;
    Ok(answer.into_inner().certificate_pem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip_and_strangers_are_refused() {
        let token =
            JoinToken { id: TokenId::from_bytes([3; 16]), secret: "s3cret-_".into(), pin: [9; 32] };
        let text = token.to_string();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        assert_eq!(format!("{text}\n").parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("s3cret"));
        for bad in ["", "tow1", "tow2.a.b.c", &text[..text.len() - 1], &format!("{text}.x")] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }
}
