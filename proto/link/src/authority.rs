//! The cluster's certificate authority: made once, by the control plane's first start, and kept in
//! a 0700 directory. It turns public keys into short-lived certificates.
//!
//! Who may have which identity is the caller's decision. The invariant: a request's own wishes
//! (names, usages, validity) never reach the certificate.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{
    Identity, IdentityError, Role, certificate_der, check_name, hex, make, sha256, uri_names,
};

/// Life of the authority's own certificate: ten years.
pub const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How far a certificate is dated back, for clocks that are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca.key";

/// Says why the authority could not be made, kept or read.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its certificate, key or a request is bad.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A file could not be used.
    #[error("could not use `{path}`")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could read the key.
    #[error("`{0}` can be read by others: make it private with chmod 600")]
    NotPrivate(PathBuf),
}

/// The cluster's certificate, without its key: what everybody trusts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: CertificateDer<'static>,
    cluster: String,
}

impl CaCertificate {
    /// Reads it from PEM.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        Self::from_der(certificate_der(pem)?)
    }

    /// Reads it from DER; its one URI name is `spiffe://<cluster>`.
    pub fn from_der(der: CertificateDer<'static>) -> Result<Self, IdentityError> {
        let (_, parsed) = X509Certificate::from_der(&der)
            .map_err(|e| IdentityError::Parse { what: "CA certificate", reason: e.to_string() })?;
        let uris = uri_names(&parsed);
        let [uri] = uris[..] else { return Err(IdentityError::NotOne(uris.len())) };
        let cluster =
            uri.strip_prefix("spiffe://").ok_or_else(|| IdentityError::Uri(uri.into()))?.to_owned();
        check_name(&cluster)?;
        if !parsed.is_ca() {
            return Err(IdentityError::Parse {
                what: "CA certificate",
                reason: "it is not an authority's".into(),
            });
        }
        Ok(Self { der, cluster })
    }

    /// The certificate as DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The cluster's id, as text.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Hexadecimal SHA-256 of the certificate: what join tokens carry.
    pub fn pin(&self) -> String {
        hex(&sha256(&self.der))
    }
}

/// The authority with its key.
pub struct CertificateAuthority {
    certificate: CaCertificate,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAuthority").field("pin", &self.pin()).finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// Makes the authority of a new cluster; `cluster_id` is printed as `cluster_…`.
    pub fn create(cluster_id: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        check_name(cluster_id)?;
        let key = KeyPair::generate().map_err(|e| make("CA key", &e))?;
        let mut parameters = parameters(&format!("spiffe://{cluster_id}"), now, CA_LIFE)?;
        parameters.distinguished_name.push(DnType::CommonName, format!("Towline {cluster_id}"));
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = parameters.self_signed(&key).map_err(|e| make("CA certificate", &e))?;
        Self::from_pem(&certificate.pem(), key)
    }

    /// Reads the authority that [`Self::save`] wrote.
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let key_path = dir.join(KEY_FILE);
        let certificate_pem = read(&dir.join(CERTIFICATE_FILE))?;
        let mode = fs::metadata(&key_path).map_err(|e| file(&key_path, e))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(AuthorityError::NotPrivate(key_path));
        }
        let key = KeyPair::from_pem(&read(&key_path)?)
            .map_err(|e| IdentityError::Parse { what: "CA key", reason: e.to_string() })?;
        Self::from_pem(&certificate_pem, key)
    }

    /// Writes `ca.key` (0600) and then `ca.pem` into `dir`, durably. A directory with `ca.pem` is
    /// complete.
    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| file(dir, e))?;
        write_private(&dir.join(KEY_FILE), &self.issuer.key().serialize_pem())?;
        write_private(&dir.join(CERTIFICATE_FILE), &self.certificate_pem)
    }

    /// Issues a certificate for the public key of a request; whatever else the request asks for is
    /// ignored.
    pub fn issue(
        &self,
        csr_pem: &str,
        identity: &Identity,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(csr_pem).map_err(|e| {
            IdentityError::Parse { what: "certificate signing request", reason: e.to_string() }
        })?;
        let mut parameters = parameters(&identity.to_string(), now, life)?;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = match identity.role() {
            Role::User | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Role::Node | Role::Member => {
                vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth]
            }
        };
        parameters.use_authority_key_identifier_extension = true;
        let certificate = parameters
            .signed_by(&request.public_key, &self.issuer)
            .map_err(|e| make("certificate", &e))?;
        Ok(certificate.pem())
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CaCertificate {
        &self.certificate
    }

    /// Its certificate as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Hexadecimal SHA-256 of its certificate.
    pub fn pin(&self) -> String {
        self.certificate.pin()
    }

    fn from_pem(certificate_pem: &str, key: KeyPair) -> Result<Self, AuthorityError> {
        let certificate = CaCertificate::from_pem(certificate_pem)?;
        let issuer = Issuer::from_ca_cert_der(certificate.der(), key)
            .map_err(|e| IdentityError::Parse { what: "CA certificate", reason: e.to_string() })?;
        Ok(Self { certificate, certificate_pem: certificate_pem.to_owned(), issuer })
    }
}

fn parameters(
    uri: &str,
    now: SystemTime,
    life: Duration,
) -> Result<CertificateParams, IdentityError> {
    let mut serial = [0u8; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| IdentityError::Make {
        what: "serial number",
        reason: "the system has no random numbers".into(),
    })?;
    serial[0] &= 0x7f; // a positive number
    let uri = uri.try_into().map_err(|_| IdentityError::Uri(uri.into()))?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.serial_number = Some(SerialNumber::from_slice(&serial));
    parameters.subject_alt_names = vec![SanType::URI(uri)];
    parameters.not_before = (now - CLOCK_SKEW).into();
    parameters.not_after = (now + life).into();
    Ok(parameters)
}

/// Writes a file that only its owner may read, whole or not at all.
pub fn write_private(path: &Path, text: &str) -> Result<(), AuthorityError> {
    let new = path.with_extension("new");
    let write = || -> io::Result<()> {
        let _ = fs::remove_file(&new);
        let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        fs::rename(&new, path)?;
        path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
    };
    write().map_err(|e| file(path, e))
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|e| file(path, e))
}

fn file(path: &Path, source: io::Error) -> AuthorityError {
    AuthorityError::File { path: path.to_owned(), source }
}
