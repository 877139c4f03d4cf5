//! What a registry's `WWW-Authenticate` asks for.

use http_auth::ChallengeRef;
use http_auth::parser::ChallengeParser;

/// Bytes of the header that are looked at.
const HEADER_MAX: usize = 8 << 10;
/// Challenges in one header that are looked at.
const CHALLENGES_MAX: usize = 8;

/// One way to log in that a registry offers, of those that we know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A name and a password with each request.
    Basic,
    /// A token from a token service.
    Bearer {
        /// The token service's URL.
        realm: String,
        /// What the token is for, in the service's words.
        service: Option<String>,
        /// The right that is needed.
        scope: Option<String>,
    },
}

/// Returns the challenges of a header that we know how to answer, a token first. What cannot be
/// read is as if it were not there.
pub(crate) fn challenges(header: &str) -> Vec<Challenge> {
    if header.len() > HEADER_MAX {
        return Vec::new();
    }
    let parsed = ChallengeParser::new(header).map_while(Result::ok).take(CHALLENGES_MAX);
    let mut known: Vec<_> = parsed.filter_map(|challenge| known(&challenge)).collect();
    known.sort_by_key(|challenge| *challenge == Challenge::Basic);
    known
}

fn known(challenge: &ChallengeRef<'_>) -> Option<Challenge> {
    let parameter = |name: &str| {
        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(found.1.to_unescaped()).filter(|text| !text.is_empty())
    };
    if challenge.scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !challenge.scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (service, scope) = (parameter("service"), parameter("scope"));
    Some(Challenge::Bearer { realm: parameter("realm")?, service, scope })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_preferred() {
        let header = r#"Basic realm="x", Bearer realm="https://auth/token",service="r",scope="repository:a/b:pull,push""#;
        let found = challenges(header);
        let bearer = Challenge::Bearer {
            realm: "https://auth/token".into(),
            service: Some("r".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(found, [bearer, Challenge::Basic]);
    }

    #[test]
    fn what_is_unknown_or_broken_is_left_out() {
        assert_eq!(challenges("Basic realm=\"Registry Realm\""), [Challenge::Basic]);
        for header in ["", "Digest realm=\"x\"", "Bearer service=\"x\"", "Bearer realm=", "\u{0}"] {
            assert_eq!(challenges(header), [], "{header:?}");
        }
        assert_eq!(challenges(&format!("Basic realm=\"{}\"", "x".repeat(9000))), []);
    }
}
