//! Private keys, in the forms that programs write them to files.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Format, token};
use crate::secrets::engine::Hit;
use crate::secrets::value;

pub(super) const ALL: &[Format] = &[
    // The armor, headers if any, and enough of the key that it is one: programs that read keys hold
    // the first line alone. Line ends may be written as `\n`, and lines quoted or indented.
    token(
        "private-key",
        "A private key in PEM or OpenPGP armor: RSA, EC, DSA, OpenSSH, PGP, encrypted or not.",
        &["-----BEGIN "],
        r#"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:\\+[rn]|[\s"'+,#*/])+(?:[A-Za-z-]+:(?: [^\n\\]*)?(?:\\+[rn]|\s)+)*(?:[A-Za-z0-9+/=](?:\\+[rn]|[\s"'+,#*])*){60}"#,
    )
    .anywhere()
    .check(|hit| !value::contains(hit.text, b"...")),
    token(
        "ssh2-private-key",
        "A private key in SSH2 form.",
        &["---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----"],
        r"[ -~]{42}\r?\n(?:[A-Za-z-]+: [^\n]*\n)*[A-Za-z0-9+/=]{20,}",
    )
    .anywhere(),
    token(
        "putty-private-key",
        "A private key as PuTTY keeps it.",
        &["Private-Lines: "],
        r"Private-Lines: [0-9]+\r?\n[A-Za-z0-9+/=]{20,}",
    ),
    token(
        "age-secret-key",
        "A secret key of age.",
        &["AGE-SECRET-KEY-"],
        r"AGE-SECRET-KEY-(?:PQ-)?1([AC-HJ-NP-Z02-9]{58,})",
    ),
    token(
        "jwk-private-key",
        "A private or symmetric key as a JSON Web Key.",
        &[r#""d""#, r#""k""#],
        r#""[dk]"\s*:\s*"([A-Za-z0-9_-]{22,})""#,
    )
    .anywhere()
    .check(is_of_a_jwk),
    token(
        "wireguard-private-key",
        "A private or preshared key of WireGuard.",
        &["PrivateKey", "PresharedKey"],
        r"(?i:PrivateKey|PresharedKey)\s*=\s*([A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=)",
    ),
    token(
        "tor-secret-key",
        "The secret key of an onion service.",
        &["== ed25519v1-secret: type0 =="],
        r"== ed25519v1-secret: type0 ==\x00{3}",
    )
    .anywhere()
    .check(|_| true),
    token(
        "dnssec-private-key",
        "A private key of DNSSEC, as BIND keeps it.",
        &["Private-key-format: v1"],
        r"Private-key-format: v1\.[0-9]\s+Algorithm: [^\n]*\n(?:[A-Za-z0-9]+: *[^\n]*\n)*?(?:PrivateKey|PrivateExponent|Key): *[A-Za-z0-9+/=]{20,}",
    ),
    token(
        "tsig-key",
        "A shared key of DNS servers.",
        &["secret \""],
        r#"(?i:secret)\s+"([A-Za-z0-9+/]{22,}={0,2})"\s*;"#,
    ),
    token(
        "signify-secret-key",
        "A secret key of signify or minisign.",
        &["untrusted comment: "],
        r"untrusted comment: (?:minisign encrypted |signify |rsign encrypted )?secret key[^\n]*\n([A-Za-z0-9+/=]{80,})",
    ),
];

/// A JWK says its type in the same object.
fn is_of_a_jwk(hit: &Hit<'_>) -> bool {
    let symmetric = hit.text.starts_with(br#""k""#);
    let near = |needle: &[u8]| {
        value::contains(&hit.before[hit.before.len().saturating_sub(2048)..], needle)
            || value::contains(&hit.after[..hit.after.len().min(2048)], needle)
    };
    near(br#""kty""#)
        && near(br#""oct""#) == symmetric
        && URL_SAFE_NO_PAD.decode(hit.value).is_ok()
        && value::is_token(hit.value)
}
