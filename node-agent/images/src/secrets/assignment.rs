//! `password = "..."` and its like in any language: a name that says secret, something that assigns,
//! and a value that looks like one.
//!
//! The name and the sign between are read strictly and the value is judged by [`value`]: this rule
//! has no form to go by, and a wrong alarm in every second file would teach people to look away.

use std::ops::Range;

use super::Rule;
use super::names::Kind;
use super::value;

/// The rule of all assignments that no file's own rule claims.
pub(super) const RULE: Rule = Rule {
    id: "secret-assignment",
    finds: "A password, token or key that is assigned a value, by the name it is given.",
};

/// Names that say secret, in any case and within longer names.
const WORDS: &str = "\
    password passwd passphrase pass_phrase secret token apikey api_key api-key \
    access_key access-key accesskey private_key private-key privatekey auth_key auth-key \
    authkey encryption_key encryption-key encryptionkey signing_key signing-key signingkey \
    master_key masterkey credential pwd _pass dbpass psk _key";

/// Returns the words that make a place worth a look.
pub(super) fn words() -> impl Iterator<Item = &'static str> {
    WORDS.split(' ')
}

/// Names of which only files that are there to hold settings are asked: too many others have them.
const WEAK: &str = "psk _key _pass pwd dbpass";

/// What a name goes on with when it is about a secret and not one.
const ABOUT: &str = "\
    id ids name names type types file files filename path paths url uri urls endpoint hash \
    hashes hashed length len size ttl expiry expires expiration expire count limit max min \
    policy pattern regex regexp field label hint prompt placeholder manager provider class \
    header format version ref arn algorithm alg digest checksum fingerprint index position \
    offset kind usage policies list map error message msg description title text input form \
    icon strength validator encoder param parameter attribute env var issuer location dir \
    folder selector regexes command cmd helper store ring space created updated age date \
    time timeout status state scope scopes audience cookie info rule rules check required";

/// Tokens of a page or a request, by what stands before the word.
const PASSING: &str = "page next csrf xsrf cancel continu";

/// Keys that are told to everybody, before `_key`.
const TOLD: &str = "gpg pgp primary foreign sort partition registry";

/// Bytes of a name after its word, and of a value, that are read.
const NAME_MAX: usize = 40;
const VALUE_MAX: usize = 4096;

/// What was assigned, and how.
struct Assigned<'w> {
    value: &'w [u8],
    quoted: bool,
}

/// Says which rule, if any, an assignment matches whose name has a word at `word`.
pub(super) fn look(near: &[u8], word: Range<usize>, kind: Kind) -> Option<Rule> {
    let (before, name) = (&near[..word.start], &near[word.clone()]);
    let settings = match kind {
        Kind::Lock => return None,
        Kind::Settings(_) => true,
        Kind::Text => is_pair(before, name),
        Kind::Whole(_) | Kind::Plain => false,
    };
    let weak = WEAK.split(' ').any(|weak| name.eq_ignore_ascii_case(weak.as_bytes()));
    if weak && !settings || is_harmless(before, name) {
        return None;
    }
    let option = is_option(before);
    let assigned = assigned(name, &near[word.end..], option)?;
    let secret = if settings {
        value::is_set(assigned.value)
    } else if option && matches!(kind, Kind::Text) {
        value::is_chosen(assigned.value)
    } else {
        let password = assigned.quoted || option;
        value::is_random(assigned.value) || password && value::is_password(assigned.value)
    };
    let rule = if let Kind::Settings(rule) = kind { rule } else { RULE };
    secret.then_some(rule)
}

/// Reads what follows a name's word: the rest of the name, a sign, a value.
fn assigned<'w>(word: &[u8], after: &'w [u8], option: bool) -> Option<Assigned<'w>> {
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    let tail = after.iter().take(NAME_MAX).take_while(|b| in_name(b)).count();
    if !is_secrets_name(word, &after[..tail]) {
        return None;
    }
    let (sign, rest) = sign(&after[tail..], option)?;
    // Quotes within quotes are written with a backslash.
    let rest = rest.strip_prefix(b"\\").unwrap_or(rest);
    if let [quote @ (b'"' | b'\'' | b'`'), rest @ ..] = rest {
        let rest = &rest[..rest.len().min(VALUE_MAX)];
        let value = &rest[..rest.iter().position(|b| b == quote)?];
        let value = value.strip_suffix(b"\\").unwrap_or(value);
        return Some(Assigned { value, quoted: true });
    }
    let ends = |b: &u8| !b.is_ascii_graphic() || b"\"'`,;<>&(){}[]".contains(b);
    let end = rest.iter().take(VALUE_MAX).position(ends).unwrap_or(rest.len());
    let value = &rest[..end];
    // A call, an index, a type or a member of something: not a value.
    let code = match rest.get(end) {
        Some(b'(' | b'[' | b'{') => true,
        Some(b'<') => sign != Sign::Tag || rest.get(end + 1) != Some(&b'/'),
        _ => match sign {
            Sign::Assigns => value::is_member(value),
            Sign::Tag | Sign::Comma => true,
            Sign::Blank => false,
        },
    };
    (!code && end < VALUE_MAX).then_some(Assigned { value, quoted: false })
}

/// Says whether a name with this word and this rest names a secret: `tokenizer`, `secret_name` and
/// `passwordLength` do not.
fn is_secrets_name(word: &[u8], tail: &[u8]) -> bool {
    let Some(first) = tail.first() else { return true };
    let same_case = first.is_ascii_lowercase() && word.last().is_some_and(u8::is_ascii_lowercase)
        || first.is_ascii_uppercase() && word.last().is_some_and(u8::is_ascii_uppercase);
    let attached = same_case.then(|| {
        let end = tail.iter().position(|b| !b.is_ascii_alphabetic()).unwrap_or(tail.len());
        tail[..end].to_ascii_lowercase()
    });
    if attached.is_some_and(|rest| !matches!(&rest[..], b"s" | b"key" | b"base" | b"value")) {
        return false;
    }
    let last = last_part(tail).to_ascii_lowercase();
    !ABOUT.split(' ').any(|about| last == about.as_bytes())
}

/// The last part of `_file.name` or `FileName`.
fn last_part(tail: &[u8]) -> &[u8] {
    let separator =
        tail.iter().rposition(|b| matches!(b, b'_' | b'-' | b'.')).map_or(0, |at| at + 1);
    let part = &tail[separator..];
    let camel =
        part.windows(2).rposition(|p| p[0].is_ascii_lowercase() && p[1].is_ascii_uppercase());
    camel.map_or(part, |at| &part[at + 1..])
}

/// What stands between a name and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sign {
    /// `=`, `:`, `:=`, `=>`.
    Assigns,
    /// The end of an opening tag.
    Tag,
    /// After a name in quotes, as `define('NAME', 'value')` has it.
    Comma,
    /// After an option of a command.
    Blank,
}

/// Reads what assigns, and what follows it.
fn sign(rest: &[u8], option: bool) -> Option<(Sign, &[u8])> {
    let closed = skip(rest, b"\\\"'`])", 3);
    let named_in_quotes = rest.len() > closed.len();
    let next = skip(closed, b" \t", 8);
    match next {
        // A comparison, and a name's path.
        [b'=', b'=', ..] | [b':', b':', ..] => None,
        [b'=' | b':', b'=' | b'>', rest @ ..] | [b'=' | b':', rest @ ..] => {
            Some((Sign::Assigns, skip(rest, b" \t", 8)))
        }
        [b'>', rest @ ..] => Some((Sign::Tag, rest)),
        [b',', rest @ ..] if named_in_quotes => Some((Sign::Comma, skip(rest, b" \t", 8))),
        _ if option && next.len() < closed.len() => Some((Sign::Blank, next)),
        _ => None,
    }
}

fn skip<'w>(bytes: &'w [u8], these: &[u8], most: usize) -> &'w [u8] {
    let count = bytes.iter().take(most).take_while(|b| these.contains(b)).count();
    &bytes[count..]
}

/// Says whether the name is that of a variable: it begins the text, as in an image's environment, or
/// a word of it in capitals, as build arguments have it in a history.
fn is_pair(before: &[u8], word: &[u8]) -> bool {
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    let rest = &before[..before.len() - before.iter().rev().take_while(|b| in_name(b)).count()];
    let capitals = !word.iter().any(u8::is_ascii_lowercase);
    rest.last().is_none_or(|b| capitals && b.is_ascii_whitespace())
}

/// Says whether the name is that of a command's option: `--db-password`.
fn is_option(before: &[u8]) -> bool {
    let in_option = |b: &u8| b.is_ascii_alphabetic() || *b == b'-';
    let length = before.iter().rev().take(NAME_MAX).take_while(|b| in_option(b)).count();
    before[before.len() - length..].starts_with(b"--")
}

/// Says whether what stands before the word in its name makes the value harmless.
fn is_harmless(before: &[u8], word: &[u8]) -> bool {
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    let length = before.iter().rev().take(NAME_MAX).take_while(|b| in_name(b)).count();
    let part = before[before.len() - length..].to_ascii_lowercase();
    let is = |name: &[u8]| word.eq_ignore_ascii_case(name);
    let has = |mark: &str| value::contains(&part, mark.as_bytes());
    has("public")
        || is(b"token") && PASSING.split(' ').any(has)
        || is(b"_key") && TOLD.split(' ').any(|told| part.ends_with(told.as_bytes()))
}
