//! Names of sandboxes: which are allowed, and one made from an id for who gave none.

use towline_proto::ids::SandboxId;

use crate::random::fingerprint;
use crate::refusal::Refusal;

const ADJECTIVES: [&str; 32] = [
    "able", "amber", "brave", "brisk", "calm", "clear", "coral", "crisp", "dapper", "eager",
    "early", "fair", "fleet", "fond", "gentle", "glad", "keen", "kind", "light", "lively", "lucky",
    "mellow", "merry", "neat", "noble", "plain", "quick", "quiet", "sunny", "swift", "vivid",
    "warm",
];
const NOUNS: [&str; 32] = [
    "anchor", "barge", "bay", "beacon", "bridge", "buoy", "cape", "cove", "current", "dinghy",
    "dock", "ferry", "fjord", "harbor", "helm", "island", "jetty", "keel", "lagoon", "mast", "oar",
    "otter", "pier", "pilot", "reef", "rudder", "sail", "shore", "skiff", "tide", "tug", "wharf",
];

/// Longest name.
const NAME_MAX: usize = 63;

/// Checks a wanted name.
pub(crate) fn check(name: &str) -> Result<(), Refusal> {
    let starts_well = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let all_good = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if name.len() > NAME_MAX || !starts_well || !all_good {
        return Err(Refusal::invalid(format!(
            "`{}` is not a name for a sandbox: 1 to {NAME_MAX} letters, digits, `-`, `_` or `.`, \
             starting with a letter or digit",
            name.chars().take(80).collect::<String>().escape_debug()
        )));
    }
    if name.starts_with(SandboxId::PREFIX) {
        return Err(Refusal::invalid(format!(
            "`{name}` cannot be a name: what starts with `{}` is an id",
            SandboxId::PREFIX
        )));
    }
    Ok(())
}

/// The name that follows from an id: the `attempt`th, should earlier ones be taken.
pub(crate) fn from_id(id: SandboxId, attempt: u32) -> String {
    let hash = fingerprint(id.as_bytes());
    let adjective = ADJECTIVES[(hash % 32) as usize];
    let noun = NOUNS[(hash >> 8) as usize % 32];
    match attempt {
        0 => format!("{adjective}-{noun}"),
        n => format!("{adjective}-{noun}-{}", n + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_are_allowed_names_and_follow_from_the_id() {
        for n in 0..100 {
            let id = SandboxId::from_parts(n, [7; 10]);
            check(&from_id(id, 0)).unwrap();
            check(&from_id(id, 7)).unwrap();
            assert_eq!(from_id(id, 0), from_id(id, 0));
        }
    }

    #[test]
    fn bad_names_are_refused_with_the_rule() {
        for bad in ["", "-a", "a b", "a/b", "ü", &"x".repeat(64), "sbx_1", "a\u{1b}[0m"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
