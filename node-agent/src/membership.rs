//! Who this node is in the cluster: its certificate and key under `<data_dir>/identity`, got by the
//! join token when there is no valid one, renewed at half of its life.
//!
//! Nothing is sent to a control plane whose CA is not the token's, or later the kept one.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use towline_link::authority::{CaCertificate, write_private};
use towline_link::enroll::{self, EnrollError, JoinToken};
use towline_link::identity::{Identity, Role};
use towline_link::retry::{Backoff, RetryPolicy};
use towline_link::rpc;
use towline_link::tls::{self, ALPN_H2, CertStore, Trust};

use crate::config::Config;

/// Between looks at the certificate's age.
const RENEWAL_CHECK: Duration = Duration::from_secs(60);
/// Bound on one attempt to enrol or renew.
const ATTEMPT_MAX: Duration = Duration::from_secs(20);
/// Enough for `tow up` to write a new token; then the process ends and is started again.
const ENROLL_MAX: Duration = Duration::from_secs(300);

/// Says why this node has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// There is none, and no way to get one.
    #[error("this node has no valid certificate, and `token_file` is not set in its configuration")]
    NoToken,
    /// The token cannot be read.
    #[error("could not read the join token `{path}`")]
    Token {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No member gave one.
    #[error("could not enrol this node")]
    Enroll(#[source] EnrollError),
    /// No answer within the bound.
    #[error("no answer from `{endpoint}` within {} s", ATTEMPT_MAX.as_secs())]
    Silent {
        /// The member.
        endpoint: String,
    },
    /// It cannot be kept.
    #[error("could not keep the certificate")]
    Keep(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The node's certificate and the CA that it trusts.
#[derive(Debug, Clone)]
pub struct Membership {
    /// For every connection; replaced at a renewal.
    pub store: CertStore,
    /// The cluster's.
    pub ca: CaCertificate,
    key_pem: std::sync::Arc<str>,
    dir: PathBuf,
}

impl Membership {
    /// The kept certificate, or a new one by the token; tries for a while.
    pub async fn obtain(config: &Config) -> Result<Self, MembershipError> {
        let dir = config.data_dir.join("identity");
        if let Some(kept) = Self::load(&dir, &config.name) {
            return Ok(kept);
        }
        let deadline = ENROLL_MAX;
        let policy =
            RetryPolicy { longest: Duration::from_secs(3), deadline, ..RetryPolicy::default() };
        let mut backoff = Backoff::new(policy);
        loop {
            for endpoint in &config.control_plane {
                match Self::enroll(config, endpoint, &dir).await {
                    Ok(membership) => return Ok(membership),
                    Err(error @ (MembershipError::NoToken | MembershipError::Keep(_))) => {
                        return Err(error);
                    }
                    Err(error) => {
                        let reason = crate::chain(&error);
                        tracing::warn!(endpoint, reason, "enrolment failed, trying again");
                        let Some(wait) = backoff.next(Duration::ZERO) else { return Err(error) };
                        tokio::time::sleep(wait).await;
                    }
                }
            }
        }
    }

    fn load(dir: &Path, name: &str) -> Option<Self> {
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).ok();
        let ca = CaCertificate::from_pem(&read("ca.pem")?).ok()?;
        let key_pem = read("node.key")?;
        let store = CertStore::new(&read("node.pem")?, &key_pem, &ca).ok()?;
        let info = store.info();
        let wanted = Identity::new(ca.cluster(), Role::Node, name).ok()?;
        let valid = info.not_after > SystemTime::now() && info.identity == wanted;
        valid.then(|| Self { store, ca, key_pem: key_pem.into(), dir: dir.into() })
    }

    async fn enroll(config: &Config, endpoint: &str, dir: &Path) -> Result<Self, MembershipError> {
        let path = config.token_file.clone().ok_or(MembershipError::NoToken)?;
        let token = std::fs::read_to_string(&path)
            .map_err(|source| MembershipError::Token { path, source })?;
        let token: JoinToken = token.parse().map_err(MembershipError::Enroll)?;
        let work = enroll::enroll(endpoint, &token, &config.name);
        let enrolled = tokio::time::timeout(ATTEMPT_MAX, work)
            .await
            .map_err(|_| MembershipError::Silent { endpoint: endpoint.into() })?
            .map_err(MembershipError::Enroll)?;
        let store = enrolled.store().map_err(|e| MembershipError::Keep(e.into()))?;
        crate::store::private_dir(dir).map_err(|e| MembershipError::Keep(e.into()))?;
        // The certificate goes last: with it, the others are there.
        keep(dir, "ca.pem", &enrolled.ca_pem)?;
        keep(dir, "node.key", &enrolled.key_pem)?;
        keep(dir, "node.pem", &enrolled.certificate_pem)?;
        tracing::info!(identity = %enrolled.identity, "enrolled");
        let key_pem = enrolled.key_pem.into();
        Ok(Self { store, ca: enrolled.ca, key_pem, dir: dir.into() })
    }

    /// Renews the certificate whenever half of its life is over. Runs until it is dropped.
    pub async fn renew_forever(self, endpoints: Vec<String>) {
        loop {
            if self.store.wants_renewal(SystemTime::now()) {
                for endpoint in &endpoints {
                    match tokio::time::timeout(ATTEMPT_MAX, self.renew(endpoint)).await {
                        Ok(Ok(())) => {
                            tracing::info!("certificate renewed");
                            break;
                        }
                        Ok(Err(error)) => {
                            let reason = crate::chain(&error);
                            tracing::warn!(endpoint, reason, "renewal failed, will be tried again");
                        }
                        Err(_) => tracing::warn!(endpoint, "renewal had no answer"),
                    }
                }
            }
            tokio::time::sleep(RENEWAL_CHECK).await;
        }
    }

    async fn renew(&self, endpoint: &str) -> Result<(), MembershipError> {
        let enroll = MembershipError::Enroll;
        let trust = Trust::Ca(self.ca.clone());
        let tls = tls::client_config(Some(&self.store), trust, Role::Member, &[ALPN_H2])
            .map_err(|e| enroll(e.into()))?;
        let channel = rpc::connect(endpoint, tls).await.map_err(|e| enroll(e.into()))?;
        let certificate = enroll::renew(channel, &self.key_pem).await.map_err(enroll)?;
        let checked = self.store.replace(&certificate, &self.key_pem, &self.ca);
        checked.map_err(|e| MembershipError::Keep(e.into()))?;
        keep(&self.dir, "node.pem", &certificate)
    }
}

fn keep(dir: &Path, name: &str, text: &str) -> Result<(), MembershipError> {
    write_private(&dir.join(name), text).map_err(|e| MembershipError::Keep(e.into()))
}
