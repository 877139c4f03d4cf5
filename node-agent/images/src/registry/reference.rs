//! What was asked for, by docker's grammar: `debian:12` is `docker.io/library/debian:12`.
//!
//! The grammar itself is oci-spec's; here it is bounded and turned into what a request needs.

use std::fmt;

use oci_spec::distribution::Reference as Parsed;

use super::error::PullError;
use crate::Digest;

/// Longest reference that is looked at: a name of 255, a tag of 128, a digest, a host.
const TEXT_MAX: usize = 1024;
/// Docker Hub's registry answers under another name than its images are called by.
const HUB: &str = "docker.io";
const HUB_REGISTRY: &str = "registry-1.docker.io";

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// `host[:port]` as the image is called.
    pub(crate) registry: String,
    /// The host that is asked.
    pub(crate) host: String,
    /// The port that was named.
    pub(crate) port: Option<u16>,
    /// Path of the image in it.
    pub(crate) repository: String,
    /// A name for what is wanted, or the thing itself.
    pub(crate) version: Version,
}

/// Which image of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Version {
    /// Whatever has this tag now.
    Tag(String),
    /// Exactly this manifest or index; a tag beside it says nothing.
    Digest(Digest),
}

impl Reference {
    pub(crate) fn parse(text: &str) -> Result<Reference, PullError> {
        let bad = |why: String| PullError::BadReference {
            reference: text.chars().take(100).collect(),
            why,
        };
        if text.len() > TEXT_MAX {
            return Err(bad(format!("it has more than {TEXT_MAX} bytes")));
        }
        let parsed: Parsed = text.parse().map_err(|e| bad(format!("{e}")))?;
        let version = match (parsed.digest(), parsed.tag()) {
            (Some(digest), _) => Version::Digest(
                digest
                    .parse()
                    .map_err(|_| bad("only SHA-256 digests in lower case are supported".into()))?,
            ),
            (None, Some(tag)) => Version::Tag(tag.to_owned()),
            (None, None) => return Err(bad("it has neither tag nor digest".into())),
        };
        let registry = parsed.registry().to_owned();
        let asked = if registry == HUB { HUB_REGISTRY } else { &registry };
        let (host, port) = match asked.split_once(':') {
            Some((host, port)) => {
                let port = port.parse().map_err(|_| bad(format!("`{port}` is not a port")))?;
                (host, Some(port))
            }
            None => (asked, None),
        };
        let (host, repository) = (host.to_ascii_lowercase(), parsed.repository().to_owned());
        Ok(Reference { registry, host, port, repository, version })
    }
}

/// Returns how docker would show a name, and the same written out in full; nothing for what cannot be
/// a name of docker's: a digest, or what its grammar does not know.
pub(crate) fn names(text: &str) -> Option<(String, String)> {
    if text.starts_with("sha256:") {
        return None;
    }
    let reference = Reference::parse(text).ok()?;
    let Version::Tag(_) = reference.version else { return None };
    let whole = reference.to_string();
    let short = whole.strip_prefix("docker.io/").map(|s| s.strip_prefix("library/").unwrap_or(s));
    Some((short.unwrap_or(&whole).to_owned(), whole))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_they_mean_to_docker() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, whole, host, port) in [
            ("debian", "docker.io/library/debian:latest", HUB_REGISTRY, None),
            ("debian:12", "docker.io/library/debian:12", HUB_REGISTRY, None),
            ("a/b", "docker.io/a/b:latest", HUB_REGISTRY, None),
            ("ghcr.io/a/b/c:1.2", "ghcr.io/a/b/c:1.2", "ghcr.io", None),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "127.0.0.1", Some(5000)),
            ("localhost/x", "localhost/x:latest", "localhost", None),
            ("reg:5000/x:y", "reg:5000/x:y", "reg", Some(5000)),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.to_string(), whole);
            assert_eq!((&reference.host[..], reference.port), (host, port), "{text}");
        }
        let reference = Reference::parse(&format!("reg:5000/x:tag@{digest}")).unwrap();
        assert_eq!(reference.to_string(), format!("reg:5000/x@{digest}"));
    }

    #[test]
    fn images_are_called_as_docker_calls_them() {
        for (text, short, whole) in [
            ("debian", "debian:latest", "docker.io/library/debian:latest"),
            ("docker.io/a/b:1", "a/b:1", "docker.io/a/b:1"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "127.0.0.1:5000/x:latest"),
        ] {
            assert_eq!(names(text), Some((short.into(), whole.into())), "{text}");
        }
        let digest = format!("sha256:{}", "a".repeat(64));
        for text in ["", "A B", &digest, &format!("x@{digest}")] {
            assert_eq!(names(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = "a".repeat(2000);
        for text in ["", "UPPER", "a:b:c", "reg:99999/x", "x@sha256:12", "../x", "a b", "-", &long]
        {
            let error = Reference::parse(text).unwrap_err();
            assert!(matches!(error, PullError::BadReference { .. }), "{text}: {error}");
        }
        let sha512 = format!("x@sha512:{}", "a".repeat(128));
        assert!(Reference::parse(&sha512).unwrap_err().to_string().contains("SHA-256"));
    }
}
