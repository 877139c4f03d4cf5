//! What this user is logged in to a registry with: docker's and podman's configuration, and
//! docker's credential helpers.
//!
//! Read for one pull and passed on inside its stream; never printed, never kept. What of a
//! configuration cannot be read is said as a warning, and the pull goes on without a login: most
//! images need none.

use std::fmt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use towline_proto::v1::RegistryCredentials;

use crate::env_vars;
use crate::user;

/// Bytes of a configuration file.
const CONFIG_MAX: u64 = 4 << 20;
/// Bytes of a helper's answer, and how long it may take: some ask the user to unlock something.
const ANSWER_MAX: u64 = 64 << 10;
const HELPER_MAX: Duration = Duration::from_secs(60);
/// What Docker Hub is called in configurations since before it had a name of its own.
const HUB: &str = "docker.io";
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// User name with which a helper says that its secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// Why a configuration or a helper is of no use.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The file cannot be read.
    #[error("could not read `{path}`")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what docker and podman write.
    #[error("{0} in the docker configuration")]
    Config(String),
    /// A helper failed.
    #[error("`{program}` gave no credentials for {registry}: {why}")]
    Helper {
        /// What was run.
        program: String,
        /// For which registry.
        registry: String,
        /// What went wrong.
        why: String,
    },
}

/// Looks for the login of an image's registry. The second part is what to warn of.
pub async fn find(
    registry: &str,
    repository: &str,
) -> (Option<RegistryCredentials>, Vec<LoginError>) {
    let mut warnings = Vec::new();
    for path in config_files() {
        match in_file(path, registry, repository).await {
            Ok(Some(found)) => return (Some(found), warnings),
            Ok(None) => {}
            Err(error) => warnings.push(error),
        }
    }
    (None, warnings)
}

/// Docker's file first, then those of podman, each in the order of its own documentation.
fn config_files() -> Vec<PathBuf> {
    let home = user::home();
    let docker = match env_vars::get(env_vars::DOCKER_CONFIG) {
        Some(folder) => Some(PathBuf::from(folder)),
        None => home.as_ref().map(|home| home.join(".docker")),
    };
    let below = |name: &str| env_vars::get(name).map(PathBuf::from);
    let config = below(env_vars::XDG_CONFIG_HOME).or_else(|| Some(home?.join(".config")));
    let podman = |folder: PathBuf| folder.join("containers/auth.json");
    let files = [
        docker.map(|folder| folder.join("config.json")),
        below(env_vars::REGISTRY_AUTH_FILE),
        below(env_vars::XDG_RUNTIME_DIR).map(podman),
        config.map(podman),
    ];
    files.into_iter().flatten().collect()
}

async fn in_file(
    path: PathBuf,
    registry: &str,
    repository: &str,
) -> Result<Option<RegistryCredentials>, LoginError> {
    let failed = |source| LoginError::Read { path: path.clone(), source };
    let file = match tokio::fs::File::open(&path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(CONFIG_MAX).read_to_end(&mut bytes).await.map_err(failed)?;
    let config = Config::parse(&bytes)?;
    if let Some(helper) = config.helper(registry)
        && let Some(found) = ask(&helper, registry).await?
    {
        return Ok(Some(found));
    }
    config.stored(registry, repository)
}

/// docker's `config.json` and podman's `auth.json`, as far as logins go.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, Entry>,
    #[serde(default)]
    creds_store: String,
    #[serde(default)]
    cred_helpers: std::collections::BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("auths", &self.auths.len()).finish_non_exhaustive()
    }
}

impl Config {
    /// Reads a file's content. The parser's own words could repeat a secret, so only the place of
    /// the error is said.
    pub fn parse(bytes: &[u8]) -> Result<Self, LoginError> {
        serde_json::from_slice(bytes).map_err(|error| {
            LoginError::Config(format!("line {}, column {} is wrong", error.line(), error.column()))
        })
    }

    /// Returns the helper that keeps a registry's login.
    pub fn helper(&self, registry: &str) -> Option<String> {
        let own = self.cred_helpers.iter().find(|(key, _)| named(key, registry, "").is_some());
        let name = own.map_or(&self.creds_store, |(_, name)| name);
        // Part of a program's name, which is looked up in PATH.
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        (!name.is_empty() && name.chars().all(plain)).then(|| format!("docker-credential-{name}"))
    }

    /// Returns the login that the file itself holds; that of the longest name wins.
    pub fn stored(
        &self,
        registry: &str,
        repository: &str,
    ) -> Result<Option<RegistryCredentials>, LoginError> {
        let fitting = self.auths.iter().filter_map(|(key, entry)| {
            let length = named(key, registry, repository)?;
            (!entry.is_empty()).then_some((length, entry))
        });
        let best = fitting.max_by_key(|(length, _)| *length);
        best.map(|(_, entry)| entry.credentials(registry)).transpose()
    }
}

impl Entry {
    /// With a helper docker leaves empty entries in the file.
    fn is_empty(&self) -> bool {
        [&self.auth, &self.username, &self.password, &self.identitytoken]
            .iter()
            .all(|part| part.is_empty())
    }

    fn credentials(&self, registry: &str) -> Result<RegistryCredentials, LoginError> {
        let mut found = RegistryCredentials {
            username: self.username.clone(),
            password: self.password.clone(),
            identity_token: self.identitytoken.clone(),
        };
        if !self.auth.is_empty() {
            let bad = || LoginError::Config(format!("`auth` of {registry} is wrong"));
            let text = self.auth.trim();
            let decoded = STANDARD.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text));
            let decoded = String::from_utf8(decoded.map_err(|_| bad())?).map_err(|_| bad())?;
            let (name, password) = decoded.split_once(':').ok_or_else(bad)?;
            found.username = name.to_owned();
            found.password = password.trim_end_matches('\0').to_owned();
        }
        Ok(found)
    }
}

/// Whether a key of a configuration means this registry, or podman's narrower form of it, and how
/// long it is.
fn named(key: &str, registry: &str, repository: &str) -> Option<usize> {
    let without = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let key = match without {
        // A URL's path says only which version of the protocol: `/v1/`.
        Some(url) => url.split('/').next().unwrap_or(url),
        None => key.trim_end_matches('/'),
    };
    let is_hub = |host: &str| ["index.docker.io", "registry-1.docker.io", HUB].contains(&host);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    if host != registry && !(registry == HUB && is_hub(host)) {
        return None;
    }
    let inside = repository
        .strip_prefix(path)
        .is_some_and(|rest| path.is_empty() || rest.is_empty() || rest.starts_with('/'));
    (inside || matches!(path, "v1" | "v2")).then_some(key.len())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Runs a helper's `get`.
async fn ask(program: &str, registry: &str) -> Result<Option<RegistryCredentials>, LoginError> {
    let failed = |why: String| LoginError::Helper {
        program: program.to_owned(),
        registry: registry.to_owned(),
        why,
    };
    let asking = async {
        let mut child = Command::new(program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            let server = if registry == HUB { HUB_KEY } else { registry };
            // One that reads nothing has its reasons: its end says which.
            let _ = stdin.write_all(server.as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(ANSWER_MAX).read_to_end(&mut said).await?;
        }
        std::io::Result::Ok((child.wait().await?, said))
    };
    let (status, said) = match tokio::time::timeout(HELPER_MAX, asking).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("no answer in {} s", HELPER_MAX.as_secs()))),
    };
    if !status.success() {
        // The one error of the protocol that is none.
        let nothing = String::from_utf8_lossy(&said).contains("credentials not found");
        return if nothing { Ok(None) } else { Err(failed(format!("it ended with {status}"))) };
    }
    let answer: Answer = serde_json::from_slice(&said)
        .map_err(|_| failed("its answer is not that of a credential helper".into()))?;
    Ok(match answer {
        Answer { secret, .. } if secret.is_empty() => None,
        Answer { username, secret } if username == TOKEN_USER => {
            Some(RegistryCredentials { identity_token: secret, ..Default::default() })
        }
        Answer { username, secret } => {
            Some(RegistryCredentials { username, password: secret, ..Default::default() })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(config: &str, registry: &str, repository: &str) -> Option<(String, String)> {
        let config = Config::parse(config.as_bytes()).unwrap();
        let found = config.stored(registry, repository).unwrap();
        found.map(|found| (found.username, found.password + &found.identity_token))
    }

    fn pair(name: &str, secret: &str) -> Option<(String, String)> {
        Some((name.to_owned(), secret.to_owned()))
    }

    #[test]
    fn each_way_of_writing_a_registry_is_found() {
        // alice:s3cret, bob:x:y
        let config = r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"YWxpY2U6czNjcmV0"},
            "127.0.0.1:5000":{"auth":"Ym9iOng6eQ=="},
            "https://ghcr.io":{"username":"carol","password":"p"},
            "quay.io":{"identitytoken":"t"},
            "quay.io/team":{"auth":"YWxpY2U6czNjcmV0"},
            "empty.io":{}}}"#;
        assert_eq!(stored(config, "docker.io", "library/debian"), pair("alice", "s3cret"));
        assert_eq!(stored(config, "127.0.0.1:5000", "x"), pair("bob", "x:y"));
        assert_eq!(stored(config, "ghcr.io", "a/b"), pair("carol", "p"));
        assert_eq!(stored(config, "quay.io", "other/x"), pair("", "t"));
        assert_eq!(stored(config, "quay.io", "team/x"), pair("alice", "s3cret"));
        assert_eq!(stored(config, "quay.io", "teamster/x"), pair("", "t"));
        for other in ["empty.io", "127.0.0.1:5001", "127.0.0.1", "evil-ghcr.io", "io"] {
            assert_eq!(stored(config, other, "x"), None, "{other}");
        }
    }

    #[test]
    fn helpers_are_named_and_no_paths() {
        let helper =
            |text: &str, registry: &str| Config::parse(text.as_bytes()).unwrap().helper(registry);
        let config = r#"{"credsStore":"pass","credHelpers":{"gcr.io":"gcloud"}}"#;
        assert_eq!(helper(config, "gcr.io").as_deref(), Some("docker-credential-gcloud"));
        assert_eq!(helper(config, "ghcr.io").as_deref(), Some("docker-credential-pass"));
        assert_eq!(helper("{}", "ghcr.io"), None);
        assert_eq!(helper(r#"{"credsStore":"../../tmp/x"}"#, "ghcr.io"), None);
    }

    #[test]
    fn errors_repeat_no_secret() {
        let error = Config::parse(br#"{"auths":{"x":{"auth":5, "s3cret"}}}"#).unwrap_err();
        assert!(!error.to_string().contains("s3cret"), "{error}");
        let config = Config::parse(br#"{"auths":{"x":{"auth":"s3cret!"}}}"#).unwrap();
        let error = config.stored("x", "y").unwrap_err();
        assert!(!format!("{error} {config:?}").contains("s3cret"), "{error}");
    }
}
