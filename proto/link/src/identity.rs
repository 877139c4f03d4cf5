//! Who a process is: a URI in its certificate, `spiffe://<cluster>/<role>/<name>`, and the key
//! pair that goes with it.
//!
//! Leaves issuing to `authority` and checking to `tls`. A name is a safe file name and URI segment
//! by construction, so that whoever has an [`Identity`] may print it and use it in paths.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use ring::digest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Longest name in an identity.
pub const NAME_MAX: usize = 64;

/// What a process may be in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Somebody with a laptop.
    User,
    /// A machine that runs sandboxes.
    Node,
    /// A member of the control plane.
    Member,
    /// Somebody who may change the cluster itself.
    Operator,
}

impl Role {
    /// The URI's segment.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Node => "node",
            Self::Member => "member",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Says what is wrong with an identity, certificate or key.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not `spiffe://<cluster>/<role>/<name>`.
    #[error(
        "`{0}` is not an identity: spiffe://<cluster>/<user|node|member|operator>/<name> is expected"
    )]
    Uri(String),
    /// Not a name that certificates may carry.
    #[error(
        "`{0}` is not a name: 1 to {NAME_MAX} characters of a-z A-Z 0-9 . _ - are allowed, beginning with a letter or digit"
    )]
    Name(String),
    /// The bytes are not the PEM or DER that they should be.
    #[error("the {what} cannot be read: {reason}")]
    Parse {
        /// Which one.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// A certificate without exactly one identity in its URI names.
    #[error("the certificate names {0} identities instead of one")]
    NotOne(usize),
    /// Making a key, request or certificate failed.
    #[error("could not make the {what}: {reason}")]
    Make {
        /// What was to be made.
        what: &'static str,
        /// The library's words.
        reason: String,
    },
}

/// Who a certificate says its holder is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    cluster: String,
    role: Role,
    name: String,
}

impl Identity {
    /// Makes an identity of checked parts.
    pub fn new(cluster: &str, role: Role, name: &str) -> Result<Self, IdentityError> {
        check_name(cluster)?;
        check_name(name)?;
        Ok(Self { cluster: cluster.into(), role, name: name.into() })
    }

    /// The cluster's id, as text.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What it may be.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The last segment.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Refuses what is not a safe name.
pub fn check_name(name: &str) -> Result<(), IdentityError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if !first || name.len() > NAME_MAX || !name.bytes().all(allowed) {
        return Err(IdentityError::Name(name.chars().take(NAME_MAX).collect()));
    }
    Ok(())
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.cluster, self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Uri(uri.chars().take(200).collect());
        let rest = uri.strip_prefix("spiffe://").ok_or_else(wrong)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let role = match role {
            "user" => Role::User,
            "node" => Role::Node,
            "member" => Role::Member,
            "operator" => Role::Operator,
            _ => return Err(wrong()),
        };
        Self::new(cluster, role, name)
    }
}

/// What is read from a leaf certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Its one identity.
    pub identity: Identity,
    /// SHA-256 of its SubjectPublicKeyInfo: what tickets are bound to.
    pub spki_sha256: [u8; 32],
    /// Valid from here on.
    pub not_before: SystemTime,
    /// Valid until here.
    pub not_after: SystemTime,
}

impl CertificateInfo {
    /// Reads a certificate. It does not check who signed it: `tls` does.
    pub fn from_der(der: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|e| IdentityError::Parse { what: "certificate", reason: e.to_string() })?;
        let uris = uri_names(&certificate);
        let [uri] = uris[..] else { return Err(IdentityError::NotOne(uris.len())) };
        let validity = certificate.validity();
        Ok(Self {
            identity: uri.parse()?,
            spki_sha256: sha256(certificate.public_key().raw),
            not_before: from_unix(validity.not_before.timestamp()),
            not_after: from_unix(validity.not_after.timestamp()),
        })
    }

    /// Reads the first certificate of a PEM text.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        Self::from_der(&certificate_der(pem)?)
    }

    /// When half of its life is over: the time to renew it.
    pub fn half_life(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + life / 2
    }
}

/// SHA-256 of the SubjectPublicKeyInfo of a PEM certificate.
pub fn spki_sha256(certificate_pem: &str) -> Result<[u8; 32], IdentityError> {
    Ok(CertificateInfo::from_pem(certificate_pem)?.spki_sha256)
}

pub(crate) fn uri_names<'a>(certificate: &'a X509Certificate<'_>) -> Vec<&'a str> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let uri = |name: &GeneralName<'a>| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

pub(crate) fn certificate_der(pem: &str) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| IdentityError::Parse { what: "certificate", reason: e.to_string() })
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Lower-case hexadecimal, as pins are printed.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    bytes.iter().for_each(|b| {
        let _ = write!(text, "{b:02x}");
    });
    text
}

fn from_unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// A leaf's private key (ECDSA P-256).
pub struct LeafKey(rcgen::KeyPair);

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeafKey(..)")
    }
}

impl LeafKey {
    /// Draws a new one from the system's random numbers.
    pub fn generate() -> Result<Self, IdentityError> {
        rcgen::KeyPair::generate().map(Self).map_err(|e| make("key", &e))
    }

    /// Reads one from PKCS #8 PEM.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        rcgen::KeyPair::from_pem(pem)
            .map(Self)
            .map_err(|e| IdentityError::Parse { what: "private key", reason: e.to_string() })
    }

    /// The key as PKCS #8 PEM: keep it in a 0600 file.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A certificate signing request. Only its public key counts: the issuer decides the identity.
    pub fn csr_pem(&self) -> Result<String, IdentityError> {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let request = parameters.serialize_request(&self.0).map_err(|e| make("request", &e))?;
        request.pem().map_err(|e| make("request", &e))
    }
}

pub(crate) fn make(what: &'static str, error: &rcgen::Error) -> IdentityError {
    IdentityError::Make { what, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_round_trip() {
        for role in [Role::User, Role::Node, Role::Member, Role::Operator] {
            let identity = Identity::new("cluster_1", role, "ada-l.99").unwrap();
            assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        }
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for uri in [
            "",
            "spiffe://",
            "https://c/user/a",
            "spiffe://c/user",
            "spiffe://c/user/",
            "spiffe://c/user/a/b",
            "spiffe://c/root/a",
            "spiffe://c/user/..",
            "spiffe://c/user/a b",
            "spiffe://c/user/a%2f",
            "spiffe:///user/a",
        ] {
            assert!(uri.parse::<Identity>().is_err(), "{uri}");
        }
        assert!(Identity::new("c", Role::User, &"x".repeat(NAME_MAX + 1)).is_err());
    }
}
