//! A cluster's certificates for tests.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::time::{Duration, SystemTime};

use towline_link::authority::CertificateAuthority;
use towline_link::identity::{Identity, LeafKey, Role};
use towline_link::tls::CertStore;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn authority(cluster: &str) -> CertificateAuthority {
    CertificateAuthority::create(cluster, SystemTime::now()).unwrap()
}

/// A leaf of `ca` that says it is of `cluster`, valid for `life` from `from` on.
pub(crate) fn leaf(
    ca: &CertificateAuthority,
    cluster: &str,
    role: Role,
    from: SystemTime,
    life: Duration,
) -> CertStore {
    let key = LeafKey::generate().unwrap();
    let identity = Identity::new(cluster, role, "ada").unwrap();
    let pem = ca.issue(&key.csr_pem().unwrap(), &identity, from, life).unwrap();
    CertStore::new(&pem, &key.to_pem(), ca.certificate()).unwrap()
}

pub(crate) fn good(ca: &CertificateAuthority, role: Role) -> CertStore {
    leaf(ca, ca.certificate().cluster(), role, SystemTime::now(), HOUR)
}
