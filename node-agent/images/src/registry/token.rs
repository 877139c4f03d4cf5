//! Tokens for pulling and pushing, from the token service that a registry names: docker's token
//! specification, and its OAuth2 form for identity tokens.

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Request, StatusCode, Url};
use serde::Deserialize;

use super::credentials::Credentials;
use super::error::PullError;
use super::pace::Pace;
use super::session::basic;
use super::transport::{Transport, read, shown};

/// Bytes of a token service's answer.
const ANSWER_MAX: u64 = 256 << 10;

/// What a token is asked for with.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) realm: &'a str,
    pub(crate) service: Option<&'a str>,
    /// At least one.
    pub(crate) scopes: &'a [&'a str],
    pub(crate) credentials: Option<&'a Credentials>,
    /// Plain HTTP is allowed, as the registry itself is spoken to by it.
    pub(crate) plain: bool,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// Why there is no token.
pub(crate) enum Refused {
    /// The service does not accept the credentials, or wants some.
    Unauthorized,
    /// Anything else.
    Failed(PullError),
}

impl From<PullError> for Refused {
    fn from(error: PullError) -> Refused {
        Refused::Failed(error)
    }
}

/// Asks for a token; returns the header that shows it.
pub(crate) async fn fetch(
    transport: &Transport,
    pace: &Pace,
    registry: &str,
    wanted: &Wanted<'_>,
) -> Result<HeaderValue, Refused> {
    let protocol = |why: &str| PullError::Protocol { host: registry.to_owned(), why: why.into() };
    let realm: Url = wanted.realm.parse().map_err(|_| protocol("its token service is no URL"))?;
    match realm.scheme() {
        "https" => {}
        "http" if wanted.plain => {}
        _ => return Err(protocol("its token service is not reached by https").into()),
    }
    let host = shown(&realm);
    let response = transport.send(request(realm, wanted)?).await?;
    match response.status() {
        status if status.is_success() => {}
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
            return Err(Refused::Unauthorized);
        }
        status => {
            let (what, said) = ("a token".into(), String::new());
            let status = status.as_u16();
            return Err(PullError::Status { host, status, what, said }.into());
        }
    }
    let bytes = read(response, ANSWER_MAX, pace.document, "the token").await?;
    Ok(header(&bytes).ok_or_else(|| protocol("its token service gave no token"))?)
}

/// Reads a token service's answer.
fn header(bytes: &[u8]) -> Option<HeaderValue> {
    let answer: Answer = serde_json::from_slice(bytes).ok()?;
    let token = answer.token.filter(|token| !token.is_empty()).or(answer.access_token)?;
    let mut header = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn request(mut realm: Url, wanted: &Wanted<'_>) -> Result<Request, PullError> {
    let mut fields = Vec::new();
    fields.extend(wanted.service.map(|service| ("service", service)));
    let Some(Credentials::Identity(token)) = wanted.credentials else {
        fields.extend(wanted.scopes.iter().map(|scope| ("scope", *scope)));
        realm.query_pairs_mut().extend_pairs(fields);
        let mut request = Request::new(Method::GET, realm);
        if let Some(Credentials::Basic { username, password }) = wanted.credentials {
            request.headers_mut().insert(AUTHORIZATION, basic(username, password));
        }
        return Ok(request);
    };
    let scopes = wanted.scopes.join(" ");
    fields.extend([
        ("scope", &scopes[..]),
        ("grant_type", "refresh_token"),
        ("client_id", "towline"),
        ("refresh_token", token),
    ]);
    let form = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    let mut request = Request::new(Method::POST, realm);
    let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
    request.headers_mut().insert(CONTENT_TYPE, kind);
    *request.body_mut() = Some(form.into());
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_under_both_names() {
        let shown = |text: &str| header(text.as_bytes()).map(|h| h.to_str().unwrap().to_owned());
        assert_eq!(shown(r#"{"token":"a","access_token":"b"}"#).as_deref(), Some("Bearer a"));
        assert_eq!(shown(r#"{"token":"","access_token":"b"}"#).as_deref(), Some("Bearer b"));
        for bad in ["{}", "[]", "", r#"{"token":"a\nb"}"#, r#"{"token":1}"#] {
            assert_eq!(shown(bad), None, "{bad}");
        }
    }
}
