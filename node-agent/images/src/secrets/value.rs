//! Tells a secret from what stands in its place: examples, variables, words, paths, digests.
//!
//! A format of its own needs only [`is_token`]; a value that is called a password by its name must
//! be [`is_random`] or at least [`is_password`]; in a file that is there to hold secrets,
//! [`is_set`] is enough.

/// Anywhere in a value, these say that it is not the real one.
const MARKERS: &str = "\
    example changeme change_me change-me placeholder your_ your- yourtoken yourpass \
    yoursecret yourapikey yourkey redacted xxxx **** .... dummy not-a-real notreal replace_ \
    replace- replaceme insert_ deadbeef 00010203 01020304 foobar _here";

/// Words that make up values which only look like secrets; a value that is half made of them is one.
const WORDS: &str = "\
    password passwd passphrase secret token apikey api_key api-key access private public \
    client default sample test demo fake admin root user name login credential null none \
    true false undefined string value foo bar baz pass auth key hello world letmein qwerty \
    welcome temp type hash file path invalid required missing this the my some not is new \
    old wrong correct field input text config 123 1234 service account cookie session header \
    server encrypted open sesame";

/// Characters that are there before a secret repeats or counts like this.
const RUN_MAX: usize = 6;

/// Says whether a value that has a service's form can be one of its tokens.
pub(super) fn is_token(value: &[u8]) -> bool {
    !has_marker(value) && !has_run(value) && entropy(value) >= 2.5
}

/// Says whether a value can only have come from a random generator.
pub(super) fn is_random(value: &[u8]) -> bool {
    let mix = Mix::of(value);
    if value.len() < 16 || mix.letters() < 2 || is_placeholder(value) || is_structured(value) {
        return false;
    }
    let longest = (value.len().min(64) as f64).log2();
    if value.iter().all(u8::is_ascii_hexdigit) {
        return mix.digit >= 2 && entropy(value) >= 0.65 * longest.min(4.0);
    }
    // Small letters and digits alternate less, and short mixes of them are what examples have.
    let small = mix.upper == 0;
    let (length_min, digits_min, changes_min) = if small { (20, 2, 0.15) } else { (16, 0, 0.27) };
    let changes = changes(value) as f64 / (value.len() - 1) as f64;
    value.len() >= length_min
        && mix.other * 4 <= value.len()
        && mix.digit >= digits_min
        && changes >= changes_min
        && entropy(value) >= 0.75 * longest
}

/// Says whether a value is such as a person chooses who is told to choose a good password.
pub(super) fn is_password(value: &[u8]) -> bool {
    let mix = Mix::of(value);
    (8..=64).contains(&value.len())
        && mix.kinds() >= 3
        && mix.digit >= 1
        && mix.letters() >= 3
        && value.iter().all(u8::is_ascii_graphic)
        && !is_placeholder(value)
        && !is_structured(value)
}

/// Says whether a value is there at all, and is not a reference to one elsewhere.
pub(super) fn is_set(value: &[u8]) -> bool {
    const UNSET: &str = "null none true false undefined prompt";
    let lower = value.to_ascii_lowercase();
    value.len() >= 4
        && !UNSET.split(' ').any(|unset| lower == unset.as_bytes())
        && !has_marker(value)
        && !is_reference(value)
        && !value.iter().all(|b| *b == value[0])
}

/// Says whether a user's password of a URL or a command line may be real: anything that is not made
/// of the words that examples use.
pub(super) fn is_chosen(value: &[u8]) -> bool {
    let mix = Mix::of(value);
    is_set(value)
        && !is_placeholder(value)
        && (value.len() >= 6 && mix.kinds() >= 2 || value.len() >= 10)
}

/// Says whether a value stands in the place of a secret.
fn is_placeholder(value: &[u8]) -> bool {
    has_marker(value) || has_run(value) || is_reference(value) || is_made_of_words(value)
}

fn has_marker(value: &[u8]) -> bool {
    let lower = value.to_ascii_lowercase();
    MARKERS.split(' ').any(|marker| contains(&lower, marker.as_bytes()))
}

/// Repeats one character, or counts up as `123456` and `abcdef` do.
fn has_run(value: &[u8]) -> bool {
    let run = |step: u8| {
        let mut length = 1;
        value.windows(2).any(|pair| {
            length = if pair[1] == pair[0].wrapping_add(step) { length + 1 } else { 1 };
            length > RUN_MAX
        })
    };
    run(0) || run(1)
}

/// A variable, a template, a format, a path, or a call.
fn is_reference(value: &[u8]) -> bool {
    const ANYWHERE: &str = "${ $( {{ }} <% %( %s %d :// ()";
    const BEGINS: &str =
        "$ < / ./ ../ ~/ env: vault: secret: !vault !ref !sub !secret !getatt @microsoft";
    let lower = value.to_ascii_lowercase();
    let windows_variable = value.starts_with(b"%") && value.ends_with(b"%");
    windows_variable
        || ANYWHERE.split(' ').any(|mark| contains(value, mark.as_bytes()))
        || BEGINS.split(' ').any(|mark| lower.starts_with(mark.as_bytes()))
}

/// At least half of it are words that examples use, also where digits stand for letters.
fn is_made_of_words(value: &[u8]) -> bool {
    let lower = value.to_ascii_lowercase();
    let plain: Vec<u8> = lower.iter().map(|b| as_letter(*b)).collect();
    let mut at = 0;
    let mut covered = 0;
    while at < plain.len() {
        let here = |word: &&str| {
            plain[at..].starts_with(word.as_bytes()) || lower[at..].starts_with(word.as_bytes())
        };
        let word = WORDS.split(' ').filter(here).map(|word| word.len()).max();
        covered += word.unwrap_or(0);
        at += word.unwrap_or(1);
    }
    covered * 2 >= value.len()
}

fn as_letter(byte: u8) -> u8 {
    match byte {
        b'0' => b'o',
        b'1' => b'l',
        b'3' => b'e',
        b'5' | b'$' => b's',
        b'@' | b'4' => b'a',
        other => other,
    }
}

/// Has the form of something that is no secret: an identifier, a name with dots, a UUID, a digest
/// with its algorithm's name, a list.
fn is_structured(value: &[u8]) -> bool {
    const DIGESTS: &str = "sha1 sha256 sha384 sha512 md5 h1: blake";
    let lower = value.to_ascii_lowercase();
    let digest = DIGESTS.split(' ').any(|name| lower.starts_with(name.as_bytes()));
    digest
        || is_uuid(value)
        || is_dotted(value)
        || is_camel_case(value)
        || value.iter().any(|b| b" ,;()[]{}<>|`\\".contains(b))
}

fn is_uuid(value: &[u8]) -> bool {
    value.len() == 36
        && value.iter().enumerate().all(|(at, b)| match at {
            8 | 13 | 18 | 23 => *b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

/// `config.database.password2`, `lib/crypto/key_1`, `some-kebab-name-2`: parts that are words, and
/// short ones between them.
fn is_dotted(value: &[u8]) -> bool {
    let (short, long): (Vec<&[u8]>, Vec<&[u8]>) =
        value.split(|b| b"./-_:".contains(b)).partition(|part| part.len() <= 4);
    short.len() + long.len() >= 2
        && !long.is_empty()
        && long.iter().all(|part| part.len() <= 16 && is_word(part))
}

/// Letters, and a short number after them.
fn is_word(part: &[u8]) -> bool {
    let letters = part.iter().take_while(|b| b.is_ascii_alphabetic()).count();
    let rest = &part[letters..];
    rest.len() <= 5 && rest.iter().all(u8::is_ascii_digit)
}

/// `WebIdentityTokenLoader`, `V1SecretVolumeSource.kind`: most of it are runs of small letters, as in
/// words, and random text that has capitals has few of those.
fn is_camel_case(value: &[u8]) -> bool {
    let runs = value.split(|b| !b.is_ascii_lowercase()).filter(|run| run.len() >= 3);
    // A word's capital belongs to it.
    let covered: usize = runs.map(|run| run.len() + 1).sum();
    value.iter().any(u8::is_ascii_uppercase) && covered * 10 >= value.len() * 7
}

/// Says whether a value without quotes is a member of something: `self.private_key`,
/// `ec.EllipticCurvePrivateKey`.
pub(super) fn is_member(value: &[u8]) -> bool {
    let mut parts = value.split(|b| *b == b'.');
    let first = parts.next().unwrap_or_default();
    parts.next().is_some() && first.len() <= 12 && is_word(first)
}

/// How many bytes of each kind there are.
struct Mix {
    lower: usize,
    upper: usize,
    digit: usize,
    other: usize,
}

impl Mix {
    fn of(value: &[u8]) -> Self {
        let count = |is: fn(&u8) -> bool| value.iter().filter(|b| is(b)).count();
        let (lower, upper) = (count(u8::is_ascii_lowercase), count(u8::is_ascii_uppercase));
        let digit = count(u8::is_ascii_digit);
        Self { lower, upper, digit, other: value.len() - lower - upper - digit }
    }

    fn letters(&self) -> usize {
        self.lower + self.upper
    }

    fn kinds(&self) -> usize {
        [self.lower, self.upper, self.digit, self.other].iter().filter(|n| **n > 0).count()
    }
}

/// How often two neighbours are of different kinds: often in random text, seldom in words.
fn changes(value: &[u8]) -> usize {
    let kind = |b: u8| match b {
        b'a'..=b'z' => 0,
        b'A'..=b'Z' => 1,
        b'0'..=b'9' => 2,
        _ => 3,
    };
    value.windows(2).filter(|pair| kind(pair[0]) != kind(pair[1])).count()
}

/// Shannon's entropy, in bits for each byte.
pub(super) fn entropy(value: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for byte in value {
        counts[usize::from(*byte)] += 1;
    }
    let total = value.len() as f64;
    let of = |count: &u32| {
        let share = f64::from(*count) / total;
        -share * share.log2()
    };
    counts.iter().filter(|count| **count > 0).map(of).sum()
}

pub(super) fn contains(text: &[u8], needle: &[u8]) -> bool {
    memchr::memmem::find(text, needle).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_values_are_told_from_words_paths_and_digests() {
        for value in
            ["q7Hs0Xw2LpV9tRkE", "9f1c07ae53b2d84e6a0f7d1c9be2438a", "b6Jk-0aQz_81LmXt2RwE"]
        {
            assert!(is_random(value.as_bytes()), "{value}");
        }
        for value in [
            "getAuthorizationToken2",
            "config.database.primary2",
            "/run/secrets/database1",
            "550e8400-e29b-41d4-a716-446655440000",
            "sha256-q7Hs0Xw2LpV9tRkEq7Hs0Xw2LpV9tRkE",
            "1234567890abcdef",
            "AKIAIOSFODNN7EXAMPLE",
            "some-long-kebab-case-name-2",
        ] {
            assert!(!is_random(value.as_bytes()), "{value}");
        }
    }

    #[test]
    fn passwords_are_told_from_the_words_of_examples() {
        for value in ["Tr0ub4dor&3x", "kX9!mmQe", "Winter2031!"] {
            assert!(is_password(value.as_bytes()), "{value}");
        }
        for value in ["changeme", "P@ssw0rd", "myPassword1", "${PASSWORD_1}", "Test1234!", "secret"]
        {
            assert!(!is_password(value.as_bytes()), "{value}");
        }
    }

    #[test]
    fn a_value_that_is_set_is_told_from_a_reference() {
        for value in ["postgres", "hunter2", "!kX9mmQe", "@dmin123", "a\\b%c&d"] {
            assert!(is_set(value.as_bytes()), "{value}");
        }
        for value in ["", "null", "$PASSWORD", "/run/secrets/pw", "<password>", "xxxxxxxx", "%PW%"]
        {
            assert!(!is_set(value.as_bytes()), "{value}");
        }
    }
}
