//! Talks to one registry about one repository: the scheme, logging in, redirects, and what a
//! refusal means.
//!
//! The authorization header goes to the registry's own origin (scheme, host, port) and nowhere
//! else; only the registry's own origin is answered when it asks for a login.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Method, Request, Response, StatusCode, Url};
use serde::Deserialize;
use std::ops::Range;
use std::time::Duration;
use tokio::sync::Mutex;

use super::challenge::{Challenge, challenges};
use super::content::Content;
use super::credentials::Credentials;
use super::error::PullError;
use super::pace::Pace;
use super::reach::{self, Private};
use super::reference::Reference;
use super::token::{self, Refused, Wanted};
use super::transport::{Transport, is_no_tls, read, shown};

/// Redirects of one request that are followed.
const REDIRECTS_MAX: usize = 5;
/// Bytes of a refusal that are read for the registry's own words, and how many are repeated.
const REFUSAL_MAX: u64 = 16 << 10;
const SAID_MAX: usize = 200;

/// A registry, ready to be asked.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) pace: Pace,
    transport: Transport,
    registry: String,
    repository: String,
    base: Url,
    credentials: Option<Credentials>,
    /// Rights that tokens are asked for; the first one is needed, the others are of use.
    scopes: Vec<String>,
    /// What is shown with each request; renewed by one task at a time.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Who is asked, how, and as whom.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    pub(crate) credentials: Option<Credentials>,
    pub(crate) insecure: bool,
    pub(crate) private: &'a Private,
    pub(crate) pace: Pace,
    /// In the words of docker's token specification; at least one.
    pub(crate) scopes: Vec<String>,
}

/// A request of any kind.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(HeaderName, String)>,
    pub(crate) body: Body<'a>,
    /// In words, for errors.
    pub(crate) what: &'a str,
}

/// What a request brings along; the same again when it is sent again.
#[derive(Debug)]
pub(crate) enum Body<'a> {
    Nothing,
    Bytes(Bytes),
    /// A part of a blob.
    Part(&'a Content, Range<u64>),
}

/// What a download is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Get<'a> {
    /// Below `/v2/REPOSITORY/`.
    pub(crate) path: &'a str,
    /// Media types that are understood.
    pub(crate) accept: Option<&'static str>,
    /// First byte that is wanted.
    pub(crate) from: u64,
    /// In words, for errors.
    pub(crate) what: &'a str,
}

impl Session {
    /// Finds out how the registry is spoken to: by https; by plain HTTP if that is allowed and it
    /// speaks nothing else.
    pub(crate) async fn open(
        reference: &Reference,
        options: Options<'_>,
    ) -> Result<Session, PullError> {
        let Options { credentials, insecure, private, pace, scopes } = options;
        let (host, port) = (&reference.host, reference.port);
        let transport = Transport::to(host, port.unwrap_or(443), private, &pace).await?;
        let local = host.parse().is_ok_and(|a| reach::class(a) == Some(reach::Class::Loopback))
            || reach::is_local_name(host);
        let plain = insecure || (local && transport.is_loopback());
        let url = |scheme: &str| {
            let port = port.map_or_else(String::new, |port| format!(":{port}"));
            let url = format!("{scheme}://{host}{port}/").parse::<Url>();
            url.map_err(|e| PullError::Protocol { host: host.clone(), why: e.to_string() })
        };
        let mut session = Session {
            pace,
            transport,
            registry: reference.registry.clone(),
            repository: reference.repository.clone(),
            base: url("https")?,
            credentials,
            scopes,
            authorization: Mutex::new(None),
        };
        let mut greeted = session.greet().await;
        let no_https = |error: &PullError| {
            matches!(error, PullError::Unreachable { .. } | PullError::Slow { .. })
        };
        if plain && greeted.as_ref().is_err_and(no_https) {
            session.base = url("http")?;
            greeted = session.greet().await;
        }
        match greeted {
            Ok(()) => {}
            Err(error) if is_no_tls(&error) => {
                let why = "it speaks no TLS; `--insecure` allows plain HTTP, which anybody on the \
                           way can read and change";
                return Err(session.protocol(why));
            }
            Err(error) => {
                let mut first = Some(error);
                let again = || {
                    let first = first.take();
                    let session = &session;
                    async move {
                        first.map_or(Ok(()), Err)?;
                        session.greet().await
                    }
                };
                session.retrying(again).await?;
            }
        }
        Ok(session)
    }

    /// Where errors say that something came from.
    pub(crate) fn host(&self) -> String {
        shown(&self.base)
    }

    /// Asks whether there is a registry, and logs in if it says how.
    async fn greet(&self) -> Result<(), PullError> {
        let url = self.join("/v2/")?;
        let response = self.transport.send(Request::new(Method::GET, url)).await?;
        match response.status() {
            StatusCode::UNAUTHORIZED => self.log_in(&response, None).await,
            StatusCode::TOO_MANY_REQUESTS => Err(self.refusal(response, "a greeting").await),
            status if status.is_server_error() => Err(self.refusal(response, "a greeting").await),
            // Some answer 404 here and serve images all the same.
            _ => Ok(()),
        }
    }

    /// Tries until it succeeds, fails for good, or has failed too often.
    pub(crate) async fn retrying<T, F: Future<Output = Result<T, PullError>>>(
        &self,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, PullError> {
        let mut failed = 0;
        loop {
            let error = match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            failed += 1;
            let Some(pause) = error.passing().and_then(|asked| self.pace.pause(failed, asked))
            else {
                return Err(error);
            };
            tracing::debug!(%error, failed, "registry request failed, trying again");
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks for a document or a blob; returns an answer with a successful status.
    pub(crate) async fn get(&self, get: Get<'_>) -> Result<Response, PullError> {
        let url = self.url(get.path)?;
        let mut headers = Vec::new();
        headers.extend(get.accept.map(|accept| (ACCEPT, accept.to_owned())));
        if get.from > 0 {
            headers.push((RANGE, format!("bytes={}-", get.from)));
        }
        let (method, body) = (Method::GET, Body::Nothing);
        self.ask(&Ask { method, url, headers, body, what: get.what }).await
    }

    /// Asks once; returns an answer with a successful status.
    pub(crate) async fn ask(&self, ask: &Ask<'_>) -> Result<Response, PullError> {
        let mut renewed = false;
        loop {
            let shown = self.authorization.lock().await.clone();
            let response = self.follow(ask, shown.as_ref()).await?;
            let ours = same_origin(response.url(), &self.base);
            if response.status() == StatusCode::UNAUTHORIZED && ours && !renewed {
                renewed = true;
                self.log_in(&response, shown.as_ref()).await?;
                continue;
            }
            if response.status().is_success() {
                return Ok(response);
            }
            return Err(self.refusal(response, ask.what).await);
        }
    }

    /// Sends the request, and again where it is redirected to. What changes something is not: no
    /// registry that we know sends it elsewhere so.
    async fn follow(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, PullError> {
        let mut url = ask.url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.send(ask, url.clone(), authorization).await?;
            let may = matches!(ask.method, Method::GET | Method::HEAD);
            match (response.status().as_u16(), response.headers().get(LOCATION)) {
                (301 | 302 | 303 | 307 | 308, Some(location)) if may => {
                    url = self.led(&url, location, "redirects to")?;
                }
                _ => return Ok(response),
            }
        }
        Err(self.protocol("it redirects without end"))
    }

    async fn send(
        &self,
        ask: &Ask<'_>,
        url: Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, PullError> {
        let mut request = Request::new(ask.method.clone(), url);
        let shown = authorization.filter(|_| same_origin(request.url(), &self.base)).cloned();
        let headers = request.headers_mut();
        for (name, value) in &ask.headers {
            let value = HeaderValue::try_from(value);
            headers.insert(name, value.map_err(|e| self.protocol(&e.to_string()))?);
        }
        headers.extend(shown.map(|value| (AUTHORIZATION, value)));
        match &ask.body {
            Body::Nothing => {
                if !matches!(ask.method, Method::GET | Method::HEAD) {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
                }
            }
            Body::Bytes(bytes) => *request.body_mut() = Some(bytes.clone().into()),
            Body::Part(content, range) => {
                let length = range.end - range.start;
                headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
                *request.body_mut() = Some(content.body(range.clone()));
                let sent = self.transport.upload(request, content.taken(), length, &self.pace);
                return sent.await.map_err(|error| content.cut(error, range.start));
            }
        }
        self.transport.send(request).await
    }

    /// Where an answer leads. What is not https is followed only where the registry itself is not.
    pub(crate) fn led(
        &self,
        from: &Url,
        location: &HeaderValue,
        doing: &str,
    ) -> Result<Url, PullError> {
        let wrong = |what: &str| self.protocol(&format!("it {doing} {what}"));
        let location = location.to_str().map_err(|_| wrong("no URL"))?;
        let mut to = from.join(location).map_err(|_| wrong("no URL"))?;
        match to.scheme() {
            "https" => {}
            "http" if self.is_plain() => {}
            _ => return Err(wrong("something that is not https")),
        }
        // A name and a password in a redirect would become a login of ours.
        let cleared = to.set_username("").and_then(|()| to.set_password(None));
        cleared.map_err(|()| wrong("no host"))?;
        Ok(to)
    }

    /// Answers a challenge. `shown` is what was shown when it was made: another task may have
    /// renewed it since.
    async fn log_in(
        &self,
        response: &Response,
        shown: Option<&HeaderValue>,
    ) -> Result<(), PullError> {
        let mut authorization = self.authorization.lock().await;
        if authorization.as_ref() != shown {
            return Ok(());
        }
        let offered = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let offered = offered.filter_map(|header| header.to_str().ok()).flat_map(challenges);
        for challenge in offered {
            match (challenge, &self.credentials) {
                (Challenge::Bearer { realm, service, scope }, _) => {
                    let mut got =
                        self.token(&realm, service.as_deref(), &self.scopes, &scope).await;
                    if matches!(got, Err(Refused::Unauthorized)) && self.scopes.len() > 1 {
                        // Some services grant all that is asked for or nothing.
                        let needed = &self.scopes[..1];
                        got = self.token(&realm, service.as_deref(), needed, &scope).await;
                    }
                    *authorization = Some(got.map_err(|refused| match refused {
                        Refused::Unauthorized => self.unauthorized(String::new()),
                        Refused::Failed(error) => error,
                    })?);
                    return Ok(());
                }
                (Challenge::Basic, Some(Credentials::Basic { username, password })) => {
                    let header = basic(username, password);
                    if shown == Some(&header) {
                        break;
                    }
                    *authorization = Some(header);
                    return Ok(());
                }
                (Challenge::Basic, _) => {}
            }
        }
        Err(self.unauthorized(String::new()))
    }

    /// Asks for a token with our rights and the one that the registry names.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        ours: &[String],
        asked: &Option<String>,
    ) -> Result<HeaderValue, Refused> {
        let mut scopes: Vec<_> = ours.iter().map(String::as_str).collect();
        let asked = asked.iter().flat_map(|asked| asked.split(' '));
        scopes.extend(asked.filter(|scope| !ours.iter().any(|ours| ours == scope)));
        let (credentials, plain) = (self.credentials.as_ref(), self.is_plain());
        let wanted = Wanted { realm, service, scopes: &scopes, credentials, plain };
        token::fetch(&self.transport, &self.pace, &self.registry, &wanted).await
    }

    fn unauthorized(&self, said: String) -> PullError {
        let with_credentials = self.credentials.is_some();
        PullError::Unauthorized { registry: self.registry.clone(), with_credentials, said }
    }

    /// Says what an unsuccessful answer means. Only the registry's own words are repeated.
    async fn refusal(&self, response: Response, what: &str) -> PullError {
        let (host, what, status) = (shown(response.url()), what.to_owned(), response.status());
        let ours = same_origin(response.url(), &self.base);
        let retry_after = retry_after(response.headers());
        let said = match ours {
            true => {
                read(response, REFUSAL_MAX, self.pace.read, "refusal").await.unwrap_or_default()
            }
            false => Vec::new(),
        };
        let said = words(&said);
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if ours => self.unauthorized(said),
            StatusCode::NOT_FOUND if ours => {
                PullError::NotFound { registry: self.registry.clone(), what, said }
            }
            StatusCode::TOO_MANY_REQUESTS => PullError::TooMany { host, retry_after, said },
            status => PullError::Status { host, status: status.as_u16(), what, said },
        }
    }

    fn is_plain(&self) -> bool {
        self.base.scheme() == "http"
    }

    /// A place below `/v2/REPOSITORY/`.
    pub(crate) fn url(&self, path: &str) -> Result<Url, PullError> {
        self.join(&format!("/v2/{}/{path}", self.repository))
    }

    fn join(&self, path: &str) -> Result<Url, PullError> {
        self.base.join(path).map_err(|error| self.protocol(&error.to_string()))
    }

    pub(crate) fn protocol(&self, why: &str) -> PullError {
        PullError::Protocol { host: self.host(), why: why.to_owned() }
    }
}

/// The header of a name and a password.
pub(crate) fn basic(username: &str, password: &str) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    // Base64 is always a header's value.
    let mut header = HeaderValue::try_from(format!("Basic {encoded}"))
        .unwrap_or_else(|_| HeaderValue::from_static("Basic"));
    header.set_sensitive(true);
    header
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.origin() == b.origin()
}

/// `Retry-After` in seconds; a date is as if it were not there.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// The message in a registry's error document, as ` (message)`, bounded and printable.
pub(crate) fn words(bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        errors: Vec<Message>,
    }
    #[derive(Deserialize)]
    struct Message {
        message: String,
    }
    let Ok(refusal) = serde_json::from_slice::<Refusal>(bytes) else { return String::new() };
    let Some(first) = refusal.errors.first() else { return String::new() };
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    let said: String = first.message.chars().take(SAID_MAX).map(shown).collect();
    if said.trim().is_empty() { String::new() } else { format!(" ({})", said.trim()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_words_are_bounded_and_printable() {
        let said = words(br#"{"errors":[{"code":"X","message":"no \u001b[31m way","detail":1}]}"#);
        assert_eq!(said, " (no  [31m way)");
        assert_eq!(words(b"<html>"), "");
        assert_eq!(words(br#"{"errors":[]}"#), "");
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(1000));
        assert!(words(long.as_bytes()).len() < 220);
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let url = |text: &str| text.parse::<Url>().unwrap();
        assert!(same_origin(&url("https://a/x"), &url("https://a:443/y")));
        for other in ["http://a/x", "https://b/x", "https://a:444/x"] {
            assert!(!same_origin(&url("https://a/x"), &url(other)), "{other}");
        }
    }
}
