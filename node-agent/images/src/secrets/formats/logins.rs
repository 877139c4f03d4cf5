//! Logins that any program may have written: signed tokens, passwords in URLs and on command lines,
//! hashes of passwords, logins of registries and clusters.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::{Format, token};
use crate::secrets::engine::Hit;
use crate::secrets::value;

/// URL schemes of databases and message queues.
const DATABASES: &str = "\
    postgres postgresql mysql mysql2 mariadb mongodb mongodb+srv redis rediss valkey amqp \
    amqps mssql sqlserver clickhouse cockroachdb cassandra neo4j bolt oracle db2 nats kafka \
    memcached couchdb";

pub(super) const ALL: &[Format] = &[
    token(
        "jwt",
        "A signed JSON Web Token.",
        &["eyJ"],
        r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}",
    )
    .check(is_jwt),
    token(
        "database-url",
        "A URL of a database or message queue with a password in it.",
        &["://"],
        r#"://[!-~&&[^:/@"'<>`{}]]{0,100}:([!-~&&[^:/@"'<>`{}]]{3,200})@[A-Za-z0-9\[_$-]"#,
    )
    .anywhere()
    .check(|hit| is_of_a_database(hit) && is_url_password(hit)),
    token(
        "url-password",
        "Any other URL with a password or token in it.",
        &["://"],
        r#"://(?:[!-~&&[^:/@"'<>`{}]]{0,100}:([!-~&&[^:/@"'<>`{}]]{3,200})|([A-Za-z0-9_-]{24,200}))@[A-Za-z0-9\[_$-]"#,
    )
    .anywhere()
    .check(|hit| !is_of_a_database(hit) && is_url_password(hit)),
    token(
        "authorization-header",
        "A login in a header of HTTP: Basic, Bearer or token.",
        &["authorization"],
        r#"(?i:authorization)\\?["'`]{0,2}\s{0,4}(?:[=:,]|=>)\s{0,4}\\?["'`]?(?i:basic|bearer|token|apikey|bot)\s+([A-Za-z0-9._~+/=-]{16,})"#,
    )
    .check(is_authorization),
    token(
        "curl-user",
        "A login on the command line of curl.",
        &["curl "],
        r#"curl\s[^\n|;&]{0,200}?\s?(?:-u|--user|--proxy-user|-U)[ =]?["']?[!-~&&[^:"'$]]{1,64}:([!-~&&[^"'$]]{4,100})"#,
    )
    .check(|hit| value::is_chosen(hit.value)),
    token(
        "sshpass-password",
        "A password on the command line of sshpass.",
        &["sshpass "],
        r#"sshpass\s+-p\s?["']?([!-~&&[^"'$]]{4,100})"#,
    )
    .check(|hit| value::is_chosen(hit.value)),
    token(
        "password-hash",
        "A password's hash, as /etc/shadow and .htpasswd hold them.",
        &[
            ":$1$", ":$5$", ":$6$", ":$7$", ":$y$", ":$gy$", ":$2a$", ":$2b$", ":$2y$", ":$apr1$",
            ":$argon2", ":{SHA}", ":{SSHA}",
        ],
        r":(?:\$(?:1|apr1)\$[./A-Za-z0-9]{1,8}\$[./A-Za-z0-9]{22}|\$5\$(?:rounds=[0-9]+\$)?[./A-Za-z0-9]{1,16}\$[./A-Za-z0-9]{43}|\$6\$(?:rounds=[0-9]+\$)?[./A-Za-z0-9]{1,16}\$[./A-Za-z0-9]{86}|\$g?y\$[./A-Za-z0-9]{1,8}\$[./A-Za-z0-9]{1,86}\$[./A-Za-z0-9]{43}|\$7\$[./A-Za-z0-9]{11,97}\$[./A-Za-z0-9]{43}|\$2[aby]\$[0-9]{2}\$[./A-Za-z0-9]{53}|\$argon2i?d?\$[A-Za-z0-9=,$+/]{40,}|\{S?SHA\}[A-Za-z0-9+/]{27,}={0,2})(?:[:\s\x00]|\z)",
    )
    .anywhere()
    .check(|hit| is_a_name(hit.before) && value::entropy(hit.text) > 3.5),
    token(
        "netrc-password",
        "A login in the form of .netrc.",
        &["machine "],
        r"machine\s+[\w.-]+\s+login\s+[!-~]{1,100}\s+password\s+([!-~]{4,200})",
    )
    .check(|hit| value::is_chosen(hit.value)),
    token(
        "docker-login",
        "A login of a container registry, as Docker and Podman keep it.",
        &[r#""auth""#, r#""identitytoken""#],
        r#""(?:auth|identitytoken)"\s*:\s*"([A-Za-z0-9+/._=-]{8,})""#,
    )
    .anywhere()
    .check(is_docker_login),
    token(
        "kubeconfig-key",
        "A client's key, token or password for a Kubernetes cluster.",
        &["client-key-data", "user:"],
        r#"(?:client-key-data["']?\s*:\s*["']?[A-Za-z0-9+/]{40,}|user:\s*\n(?:[ \t]+[^\n]*\n){0,6}?[ \t]+(?:token|password):\s*["']?[!-~&&[^"']]{8,})"#,
    )
    .check(|hit| value::is_set(last_word(hit.text))),
];

/// Its two parts are JSON, it says how it is signed, and it is none of those that everybody shows.
fn is_jwt(hit: &Hit<'_>) -> bool {
    let mut parts = hit.text.split(|b| *b == b'.');
    let mut json = || URL_SAFE_NO_PAD.decode(parts.next()?).ok();
    let (Some(header), Some(claims)) = (json(), json()) else { return false };
    let shown = [&b"John Doe"[..], b"1234567890", b"example.com", b"\"joe\"", b"\"payload\""];
    value::contains(&header, b"\"alg\"")
        && !value::contains(&header, b"\"none\"")
        && !shown.iter().any(|name| value::contains(&claims, name))
}

fn is_of_a_database(hit: &Hit<'_>) -> bool {
    let in_scheme = |b: &u8| b.is_ascii_alphanumeric() || b"+.-".contains(b);
    let length = hit.before.iter().rev().take(20).take_while(|b| in_scheme(b)).count();
    let scheme = hit.before[hit.before.len() - length..].to_ascii_lowercase();
    // `postgresql+psycopg2`, `jdbc:mysql`: the driver's name is no part of it.
    let name = scheme.split(|b| *b == b'+').next().unwrap_or_default();
    DATABASES
        .split(' ')
        .any(|database| name == database.as_bytes() || scheme == database.as_bytes())
}

/// The host and the user are no example's either.
fn is_url_password(hit: &Hit<'_>) -> bool {
    const EXAMPLES: &[&str] =
        &["example", "host", "hostname", "server", "domain", "foo", "bar", "a.", "b.", "myhost"];
    let Some(at) = hit.text.iter().rposition(|b| *b == b'@') else { return false };
    let after = hit.after.iter().take(253).take_while(|b| !b":/?\"' \n".contains(b));
    let host: Vec<u8> =
        hit.text[at + 1..].iter().chain(after).map(u8::to_ascii_lowercase).collect();
    let example = EXAMPLES.iter().any(|name| {
        host == name.as_bytes() || name.ends_with('.') && host.starts_with(name.as_bytes())
    });
    let user = hit.text[3..at].split(|b| *b == b':').next().unwrap_or_default();
    let login = &hit.text[3..at];
    // A token in the user's place has no colon.
    let token = login.len() == user.len();
    let value = if token { login } else { &login[user.len() + 1..] };
    !example
        && !value::contains(&host, b"example")
        && !host.ends_with(b".test")
        && (token || user != value)
        && if token { value::is_random(value) } else { value::is_chosen(value) }
}

fn is_authorization(hit: &Hit<'_>) -> bool {
    let basic = hit.text.to_ascii_lowercase();
    if !value::contains(&basic, b"basic") {
        return value::is_random(hit.value) || value::contains(hit.value, b".eyJ");
    }
    STANDARD.decode(hit.value).is_ok_and(|login| is_login(&login))
}

fn is_docker_login(hit: &Hit<'_>) -> bool {
    if hit.text.starts_with(br#""identitytoken""#) {
        return value::is_random(hit.value) || value::contains(hit.value, b".eyJ");
    }
    STANDARD.decode(hit.value).is_ok_and(|login| is_login(&login))
}

/// `user:password`, and none that an example would have, such as the one of RFC 7617.
fn is_login(login: &[u8]) -> bool {
    if login.ends_with(b":open sesame") {
        return false;
    }
    let colon = login.iter().position(|b| *b == b':');
    let printable = login.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    colon.is_some_and(|colon| printable && colon > 0 && value::is_chosen(&login[colon + 1..]))
}

/// Says whether the line so far is the name of a user.
fn is_a_name(before: &[u8]) -> bool {
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || b"_.@-".contains(b);
    let length = before.iter().rev().take(64).take_while(|b| in_name(b)).count();
    let rest = &before[..before.len() - length];
    length > 0 && rest.last().is_none_or(|b| !b.is_ascii_graphic() || b"\"'(".contains(b))
        || rest.ends_with(b"\\n")
}

fn last_word(text: &[u8]) -> &[u8] {
    let start = text.iter().rposition(|b| b.is_ascii_whitespace() || b"\"':".contains(b));
    &text[start.map_or(0, |at| at + 1)..]
}
