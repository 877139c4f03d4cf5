//! Talking to one cluster's control plane: which context, who we are there, a connection that
//! mends itself, and calls that are tried again where that is safe.
//!
//! Used by `tow` directly and by the daemon. Every mutation carries an idempotency key made once by
//! [`new_key`], so trying again never does anything twice. Certificates are renewed at half their
//! life by whoever notices first; the key stays, because tickets are bound to it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{FlockOperation, flock};
use tonic::transport::Channel;
use tonic::{Response, Status};
use towline_link::authority::CaCertificate;
use towline_link::enroll::{self, EnrollError, Enrolled};
use towline_link::identity::{CertificateInfo, IdentityError, Role};
use towline_link::retry::{RetryBudget, RetryPolicy, retry};
use towline_link::rpc::{self, ControlPlaneClient, RpcTransportError};
use towline_link::status::RpcError;
use towline_link::tls::{self, ALPN_H2, CertStore, TlsError, Trust};

use crate::config::{self, Config, ConfigError, Context};

/// A client of the control plane.
pub type Client = ControlPlaneClient<Channel>;

/// Says why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of the context could not be used.
    #[error("could not {what} `{path}` of context `{context}`")]
    File {
        /// `read`, `write` or `lock`.
        what: &'static str,
        /// The context.
        context: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate or key is bad.
    #[error("the certificates of context `{context}` cannot be used: {source}")]
    Tls {
        /// The context.
        context: String,
        /// Why.
        source: TlsError,
    },
    /// Nobody renewed it in time.
    #[error("our certificate for context `{context}` has expired: this machine must join again")]
    Expired {
        /// The context.
        context: String,
    },
    /// The endpoint is not one.
    #[error(transparent)]
    Transport(#[from] RpcTransportError),
    /// Renewal failed.
    #[error("could not renew our certificate for context `{context}`: {source}")]
    Renew {
        /// The context.
        context: String,
        /// Why.
        source: EnrollError,
    },
}

/// One cluster, and us in it.
#[derive(Debug)]
pub struct Session {
    name: String,
    context: Context,
    ca: CaCertificate,
    store: CertStore,
    channel: Channel,
    budget: RetryBudget,
}

impl Session {
    /// Opens the context that is selected: `wanted`, else `TOWLINE_CONTEXT`, else the current one.
    /// `None` when nothing is configured.
    pub async fn selected(wanted: Option<&str>) -> Result<Option<Self>, SessionError> {
        let config = Config::load()?;
        let Some((name, context)) = config.selected(wanted)? else { return Ok(None) };
        Self::open(&name, context).await.map(Some)
    }

    /// Opens a context. Nothing is dialled before the first call, unless the certificate is due
    /// for renewal.
    pub async fn open(name: &str, context: &Context) -> Result<Self, SessionError> {
        let session = Self::load(name, context)?;
        if let Err(error) = session.renew_if_due().await {
            // There is half a life left to succeed in.
            tracing::warn!(%error, context = name, "certificate not renewed");
        }
        Ok(session)
    }

    fn load(name: &str, context: &Context) -> Result<Self, SessionError> {
        let tls = |source: TlsError| SessionError::Tls { context: name.into(), source };
        let identity = |source: IdentityError| tls(source.into());
        let read = |path: &Path| read(name, path);
        let ca = CaCertificate::from_pem(&read(&context.ca_file)?).map_err(identity)?;
        let certificate = read(&context.cert_file)?;
        let store = CertStore::new(&certificate, &read(&context.key_file)?, &ca).map_err(tls)?;
        if store.info().not_after <= SystemTime::now() {
            return Err(SessionError::Expired { context: name.into() });
        }
        let trust = Trust::Ca(ca.clone());
        let config =
            tls::client_config(Some(&store), trust, Role::Member, &[ALPN_H2]).map_err(tls)?;
        let channel = rpc::connect_lazy(&context.endpoint, config)?;
        Ok(Self {
            name: name.into(),
            context: context.clone(),
            ca,
            store,
            channel,
            budget: RetryBudget::default(),
        })
    }

    /// The context's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Our certificate and key.
    pub fn store(&self) -> &CertStore {
        &self.store
    }

    /// The cluster's CA.
    pub fn ca(&self) -> &CaCertificate {
        &self.ca
    }

    /// A client for streams and for calls that must not be tried again.
    pub fn client(&self) -> Client {
        rpc::control_plane(self.channel.clone())
    }

    /// Makes a call, again where that may help, for as long as the default policy says.
    pub async fn call<T, F, Fut>(&self, call: F) -> Result<T, RpcError>
    where
        F: FnMut(Client) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(RetryPolicy::default(), call).await
    }

    /// As [`Self::call`], with a policy.
    pub async fn call_within<T, F, Fut>(
        &self,
        policy: RetryPolicy,
        mut call: F,
    ) -> Result<T, RpcError>
    where
        F: FnMut(Client) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = || {
            let answer = call(self.client());
            async { answer.await.map(Response::into_inner).map_err(RpcError::from) }
        };
        retry(policy, &self.budget, attempt).await
    }

    /// Renews the certificate when half of its life is over. Another process that is at it, or was
    /// faster, is made use of.
    pub async fn renew_if_due(&self) -> Result<(), SessionError> {
        if !self.store.wants_renewal(SystemTime::now()) {
            return Ok(());
        }
        let lock_path = self.context.cert_file.with_extension("lock");
        let lock = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&lock_path)
            .map_err(|e| self.file("lock", &lock_path, e))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(()); // somebody is at it; ours is good for the other half of its life
        }
        self.reload()?;
        if !self.store.wants_renewal(SystemTime::now()) {
            return Ok(());
        }
        let key = read(&self.name, &self.context.key_file)?;
        let renew = |source| SessionError::Renew { context: self.name.clone(), source };
        let certificate = enroll::renew(self.channel.clone(), &key).await.map_err(renew)?;
        let tls = |source| renew(EnrollError::Tls(source));
        self.store.replace(&certificate, &key, &self.ca).map_err(tls)?;
        let path = &self.context.cert_file;
        config::write_private(path, certificate.as_bytes())
            .map_err(|e| self.file("write", path, e))?;
        tracing::info!(context = self.name, "certificate renewed");
        Ok(())
    }

    /// Takes a certificate that another process has written since.
    fn reload(&self) -> Result<(), SessionError> {
        let tls = |source| SessionError::Tls { context: self.name.clone(), source };
        let certificate = read(&self.name, &self.context.cert_file)?;
        let info = CertificateInfo::from_pem(&certificate).map_err(|e| tls(e.into()))?;
        if info.not_after > self.store.info().not_after {
            let key = read(&self.name, &self.context.key_file)?;
            self.store.replace(&certificate, &key, &self.ca).map_err(tls)?;
        }
        Ok(())
    }

    fn file(&self, what: &'static str, path: &Path, source: io::Error) -> SessionError {
        SessionError::File { what, context: self.name.clone(), path: path.into(), source }
    }
}

fn read(context: &str, path: &Path) -> Result<String, SessionError> {
    fs::read_to_string(path).map_err(|source| SessionError::File {
        what: "read",
        context: context.into(),
        path: path.into(),
        source,
    })
}

/// A new idempotency key, exec id and the like: 16 random bytes.
pub fn new_key() -> Vec<u8> {
    let mut key = vec![0; 16];
    SystemRandom::new().fill(&mut key).expect("the system has random numbers");
    key
}

/// Writes what enrolment gave into `dir` (`ca.pem`, `cert.pem`, `key.pem`, 0600) and returns the
/// context for it; the caller stores that in the configuration.
pub fn store_enrolled(dir: &Path, endpoint: &str, enrolled: &Enrolled) -> io::Result<Context> {
    let context = Context {
        endpoint: endpoint.into(),
        ca_file: dir.join("ca.pem"),
        cert_file: dir.join("cert.pem"),
        key_file: dir.join("key.pem"),
        cluster_id: enrolled.identity.cluster().into(),
    };
    config::write_private(&context.key_file, enrolled.key_pem.as_bytes())?;
    config::write_private(&context.ca_file, enrolled.ca_pem.as_bytes())?;
    config::write_private(&context.cert_file, enrolled.certificate_pem.as_bytes())?;
    Ok(context)
}

/// Sessions by context, for a process that lives long: opened once, and again when the files of
/// the context are other ones.
#[derive(Debug, Default)]
pub struct Sessions {
    open: tokio::sync::Mutex<Vec<Open>>,
}

/// Contexts that are kept open at once; the oldest goes first.
const OPEN_MAX: usize = 32;

#[derive(Debug)]
struct Open {
    config: PathBuf,
    name: String,
    stamp: Vec<Option<Stamp>>,
    session: Arc<Session>,
}

/// Enough of a file's metadata to see that it was replaced.
type Stamp = (u64, u64, i64, i64);

impl Sessions {
    /// The session of context `name` (empty: the current one) in the configuration file `config`.
    pub async fn get(&self, config: &Path, name: &str) -> Result<Arc<Session>, SessionError> {
        let mut open = self.open.lock().await;
        if let Some(place) = open.iter().position(|o| o.config == config && o.name == name) {
            if open[place].stamp == stamps(config, open[place].session.context()) {
                let session = Arc::clone(&open[place].session);
                renew_in_background(&session);
                return Ok(session);
            }
            let (context_name, context) = find(config, name)?;
            let old = open.swap_remove(place);
            if let Some(session) = old.session.same_after(&context_name, &context)? {
                let stamp = stamps(config, &context);
                open.push(Open { stamp, ..old });
                return Ok(session);
            }
        }
        let (context_name, context) = find(config, name)?;
        let stamp = stamps(config, &context);
        let session = Arc::new(Session::load(&context_name, &context)?);
        renew_in_background(&session);
        if open.len() == OPEN_MAX {
            open.remove(0);
        }
        let entry =
            Open { config: config.into(), name: name.into(), stamp, session: Arc::clone(&session) };
        open.push(entry);
        Ok(session)
    }
}

impl Session {
    /// This session, with the certificate that the files hold now, if all else is as it was.
    fn same_after(
        self: &Arc<Self>,
        name: &str,
        context: &Context,
    ) -> Result<Option<Arc<Self>>, SessionError> {
        if self.name != name || self.context != *context {
            return Ok(None);
        }
        let fresh = Self::load(name, context)?;
        if fresh.ca != self.ca || fresh.store.info().spki_sha256 != self.store.info().spki_sha256 {
            return Ok(None);
        }
        self.reload()?;
        Ok(Some(Arc::clone(self)))
    }
}

/// A control plane that does not answer must not hold up those who do not need it.
fn renew_in_background(session: &Arc<Session>) {
    if !session.store.wants_renewal(SystemTime::now()) {
        return;
    }
    let session = Arc::clone(session);
    tokio::spawn(async move {
        if let Err(error) = session.renew_if_due().await {
            tracing::warn!(%error, context = session.name, "certificate not renewed");
        }
    });
}

fn find(config: &Path, name: &str) -> Result<(String, Context), SessionError> {
    let invalid = |message: String| ConfigError::Invalid { path: config.into(), message };
    let text = fs::read_to_string(config).map_err(|source| ConfigError::Io {
        what: "read",
        path: config.into(),
        source,
    })?;
    let mut parsed: Config =
        toml::from_str(&text).map_err(|e| invalid(crate::nearest::explain_toml(&e)))?;
    let name = match name {
        "" => parsed.current.take().ok_or_else(|| invalid("it has no current context".into()))?,
        name => name.to_owned(),
    };
    match parsed.context.remove(&name) {
        Some(context) => Ok((name, context)),
        None => Err(invalid(format!("it has no context `{name}`")).into()),
    }
}

fn stamps(config: &Path, context: &Context) -> Vec<Option<Stamp>> {
    use std::os::unix::fs::MetadataExt;
    [config, &context.ca_file, &context.cert_file, &context.key_file]
        .iter()
        .map(|path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
        })
        .collect()
}
