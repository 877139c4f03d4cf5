//! Sends one request to one place, if that place may be reached, and nothing more: no redirect is
//! followed and no credential added here.
//!
//! Clients for one pull or push, so that no connection is shared between users. Names are resolved
//! here, and only addresses that the pull may reach are ever dialled.

use std::error::Error as StdError;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Request, Response, Url};
use rustls::{ClientConfig, RootCertStore};
use tokio::time::timeout;

use super::error::PullError;
use super::pace::{Pace, SLOWEST};
use super::reach::{self, Class, Private};

/// Where proxies are said; names of their hosts may have any address.
const PROXY_VARIABLES: [&str; 6] =
    ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// How long one name may take to resolve.
const RESOLVE_MAX: Duration = Duration::from_secs(15);

/// Header lines of one answer.
const HEADERS_MAX: usize = 100;

/// Sends the requests of one pull or push.
#[derive(Debug)]
pub(crate) struct Transport {
    client: Client,
    /// Its answers begin when all was sent, however long that takes.
    uploads: Client,
    most: Class,
}

impl Transport {
    /// Looks at where the registry is, and makes a client that reaches nothing more private.
    pub(crate) async fn to(
        host: &str,
        port: u16,
        private: &Private,
        pace: &Pace,
    ) -> Result<Transport, PullError> {
        let most = class_of(host, port).await?;
        if most > Class::Public && !private.allows(host, port) {
            let hint = "; the node's operator can list it in `private_registries`";
            let what = format!("{most}");
            return Err(PullError::Blocked { host: host.to_owned(), what, hint });
        }
        let tls = tokio::task::spawn_blocking(tls).await.map_err(|_| PullError::Interrupted)??;
        let builder = || {
            let builder = Client::builder()
                .user_agent(concat!("towline/", env!("CARGO_PKG_VERSION")))
                .tls_backend_preconfigured(tls.clone())
                .dns_resolver(Arc::new(Resolver { most, proxies: proxies() }))
                .redirect(Policy::none())
                .referer(false)
                .retry(reqwest::retry::never())
                .http1_only()
                .http1_max_headers(HEADERS_MAX)
                .connect_timeout(pace.connect);
            // A proxy has another loopback.
            if most == Class::Loopback { builder.no_proxy() } else { builder }
        };
        let made =
            |builder: ClientBuilder| builder.build().map_err(|error| unreachable(host, error));
        let client = made(builder().read_timeout(pace.read))?;
        Ok(Transport { client, uploads: made(builder())?, most })
    }

    /// Whether the registry is this machine itself.
    pub(crate) fn is_loopback(&self) -> bool {
        self.most == Class::Loopback
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(&self, request: Request) -> Result<Response, PullError> {
        let host = shown(request.url());
        self.check(request.url())?;
        self.client.execute(request).await.map_err(|error| failed(&host, error))
    }

    /// Sends a request with `length` bytes of a blob, of which `taken` counts those that went out. It
    /// may take as long as they move, and then until the registry has put them away.
    pub(crate) async fn upload(
        &self,
        request: Request,
        taken: &AtomicU64,
        length: u64,
        pace: &Pace,
    ) -> Result<Response, PullError> {
        let host = shown(request.url());
        self.check(request.url())?;
        let mut sending = std::pin::pin!(self.uploads.execute(request));
        let mut before = 0;
        let mut bound = pace.window;
        loop {
            if let Ok(answer) = timeout(bound, &mut sending).await {
                return answer.map_err(|error| failed(&host, error));
            }
            let now = taken.load(Ordering::Relaxed);
            if now < length && now - before < SLOWEST {
                return Err(PullError::Slow { host, what: "a few bytes a second" });
            }
            if now == length && before == length {
                return Err(PullError::Slow { host, what: "no answer to what was sent" });
            }
            bound = if now == length { pace.settle } else { pace.window };
            before = now;
        }
    }

    /// An address in a URL is never resolved, so it is looked at here.
    fn check(&self, url: &Url) -> Result<(), PullError> {
        let address: IpAddr = match url.host() {
            Some(url::Host::Ipv4(address)) => address.into(),
            Some(url::Host::Ipv6(address)) => address.into(),
            Some(url::Host::Domain(_)) => return Ok(()),
            None => {
                let why = "it names a place without a host".into();
                return Err(PullError::Protocol { host: shown(url), why });
            }
        };
        match reach::class(address) {
            Some(class) if class <= self.most => Ok(()),
            class => Err(PullError::blocked(&shown(url), class, "")),
        }
    }
}

/// `host` or `host:port` of a URL, for people.
pub(crate) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or("no host");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// How private a registry is that a user named: as its most public address.
async fn class_of(host: &str, port: u16) -> Result<Class, PullError> {
    let blocked = || PullError::blocked(host, None, "");
    if let Ok(address) = host.parse::<IpAddr>() {
        return reach::class(address).ok_or_else(blocked);
    }
    if reach::is_local_name(host) {
        return Ok(Class::Loopback);
    }
    match resolve(host, port).await {
        Ok(addresses) => {
            addresses.iter().filter_map(|a| reach::class(a.ip())).min().ok_or_else(blocked)
        }
        // Behind a proxy a machine often knows no names; the proxy decides then.
        Err(_) if !proxies().is_empty() => Ok(Class::Public),
        Err(source) => Err(PullError::UnknownHost { host: host.to_owned(), source }),
    }
}

async fn resolve(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let found = tokio::time::timeout(RESOLVE_MAX, tokio::net::lookup_host((host, port))).await;
    found.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?.map(Iterator::collect)
}

/// The hosts of the proxies that the environment names.
fn proxies() -> Vec<String> {
    let set = PROXY_VARIABLES.iter().filter_map(|name| std::env::var(name).ok());
    set.filter(|text| !text.is_empty())
        .filter_map(|text| {
            let url = Url::parse(&text).or_else(|_| Url::parse(&format!("http://{text}"))).ok()?;
            url.host_str().map(str::to_owned)
        })
        .collect()
}

/// Gives only addresses that the pull may reach.
struct Resolver {
    most: Class,
    proxies: Vec<String>,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (most, is_proxy) = (self.most, self.proxies.iter().any(|host| host == name.as_str()));
        Box::pin(async move {
            let mut found = resolve(name.as_str(), 0).await?;
            if !is_proxy {
                let fits = |a: &SocketAddr| reach::class(a.ip()).is_some_and(|c| c <= most);
                let first = found.first().and_then(|a| reach::class(a.ip()));
                found.retain(fits);
                if found.is_empty() {
                    return Err(PullError::blocked(name.as_str(), first, "").into());
                }
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The system's certificate authorities (or `SSL_CERT_FILE`, `SSL_CERT_DIR`), read for each pull.
fn tls() -> Result<ClientConfig, PullError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(PullError::NoRoots);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unreachable("", error))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn unreachable(host: &str, error: impl StdError + Send + Sync + 'static) -> PullError {
    PullError::Unreachable { host: host.to_owned(), source: Box::new(error) }
}

/// Says what a failed request means.
fn failed(host: &str, error: reqwest::Error) -> PullError {
    // The URL may hold what a blob store signed.
    let error = error.without_url();
    if let Some(blocked) = find::<PullError>(&error) {
        return PullError::Blocked {
            host: host.to_owned(),
            what: match blocked {
                PullError::Blocked { what, .. } => what.clone(),
                other => other.to_string(),
            },
            hint: "",
        };
    }
    if error.is_timeout() {
        return PullError::Slow { host: host.to_owned(), what: "no answer in time" };
    }
    let certificate = find::<rustls::Error>(&error).is_some_and(|error| {
        matches!(
            error,
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented
        )
    });
    if certificate {
        return PullError::Certificate { host: host.to_owned(), source: Box::new(error) };
    }
    unreachable(host, error)
}

/// Whether the other side does not speak TLS at all.
pub(crate) fn is_no_tls(error: &PullError) -> bool {
    let PullError::Unreachable { source, .. } = error else { return false };
    find::<rustls::Error>(&**source).is_some_and(|error| {
        matches!(
            error,
            rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. }
        )
    })
}

/// Looks for an error of a type among the causes, also inside of `io::Error`s.
fn find<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        if let Some(found) = inner.and_then(|inner| find::<E>(inner)) {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// Reads a whole answer of at most `most` bytes within `time`.
pub(crate) async fn read(
    mut response: Response,
    most: u64,
    time: Duration,
    what: &'static str,
) -> Result<Vec<u8>, PullError> {
    let host = shown(response.url());
    let reading = async {
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| failed(&host, e))? {
            if (bytes.len() + piece.len()) as u64 > most {
                let why = format!("its {what} has more than {most} bytes");
                return Err(PullError::Protocol { host: host.clone(), why });
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    };
    match tokio::time::timeout(time, reading).await {
        Ok(read) => read,
        Err(_) => Err(PullError::Slow { host, what }),
    }
}

/// Returns the next piece of an answer, or `None` at its end.
pub(crate) async fn piece(response: &mut Response) -> Result<Option<bytes::Bytes>, PullError> {
    let piece = response.chunk().await;
    piece.map_err(|error| failed(&shown(response.url()), error))
}
