//! What an operator allows beyond a policy: names, ranges and ports, from `[[egress.allow]]` of
//! `node-agent.toml`.
//!
//! Checked whole when it is read: a rule that could match nothing, or that has a typing mistake, is
//! an error.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

use super::name::TargetName;

/// Keys of one rule.
pub const KEYS: &[&str] = &["name", "range", "ports"];
/// Rules of one node: each is looked at for each connection.
const RULES_MAX: usize = 4096;

/// One `[[egress.allow]]` as written.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RuleText {
    name: Option<String>,
    range: Option<String>,
    #[serde(default)]
    ports: Vec<u16>,
}

/// What a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Subject {
    /// This name.
    Name(TargetName),
    /// Every name below this one.
    Below(TargetName),
    /// Every address in it.
    Range(IpNet),
}

/// One thing that is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    subject: Subject,
    /// Empty: every port but 25.
    ports: Vec<u16>,
}

/// All that an operator allows.
#[derive(Debug, Clone, Default)]
pub struct OperatorRules(Vec<Rule>);

impl OperatorRules {
    /// Checks what was written.
    pub fn parse(texts: Vec<RuleText>) -> Result<Self, String> {
        if texts.len() > RULES_MAX {
            return Err(format!("`egress.allow` has {} rules; at most {RULES_MAX}", texts.len()));
        }
        texts.into_iter().map(Rule::parse).collect::<Result<_, _>>().map(Self)
    }

    /// Returns the rules that are about this port.
    pub(crate) fn of_port(&self, port: u16) -> impl Iterator<Item = &Rule> {
        self.0.iter().filter(move |rule| rule.has_port(port))
    }
}

impl Rule {
    fn parse(text: RuleText) -> Result<Self, String> {
        let subject = match (&text.name, &text.range) {
            (Some(name), None) => named(name)?,
            (None, Some(range)) => Subject::Range(range_of(range)?),
            _ => return Err("each `egress.allow` has either a `name` or a `range`".into()),
        };
        if text.ports.contains(&0) {
            return Err("`egress.allow`: 0 is not a port".into());
        }
        Ok(Self { subject, ports: text.ports })
    }

    /// A rule without ports is about every port but 25: mail is opened by naming it only.
    fn has_port(&self, port: u16) -> bool {
        self.ports.contains(&port) || (self.ports.is_empty() && port != super::policy::MAIL_PORT)
    }

    pub(crate) fn is_about(&self, name: &TargetName) -> bool {
        match &self.subject {
            Subject::Name(rule) => rule == name,
            Subject::Below(rule) => name.is_below(rule),
            Subject::Range(_) => false,
        }
    }

    /// The range, if it is a rule about a range that has this address.
    pub(crate) fn range_with(&self, address: IpAddr) -> Option<IpNet> {
        match &self.subject {
            Subject::Range(range) if range.contains(&address) => Some(*range),
            _ => None,
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.subject {
            Subject::Name(name) => write!(f, "allow {name}")?,
            Subject::Below(name) => write!(f, "allow *.{name}")?,
            Subject::Range(range) => write!(f, "allow {range}")?,
        }
        let ports: Vec<String> = self.ports.iter().map(ToString::to_string).collect();
        if ports.is_empty() { Ok(()) } else { write!(f, ":{}", ports.join(",")) }
    }
}

fn named(text: &str) -> Result<Subject, String> {
    let bad = |why: &dyn fmt::Display| format!("`egress.allow`: name `{text}`: {why}");
    if text.trim_end_matches('.').parse::<IpAddr>().is_ok() {
        return Err(bad(&"it is an address; use `range`"));
    }
    let (rest, below) = match text.strip_prefix("*.") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let name = TargetName::parse(rest).map_err(|error| bad(&error))?;
    Ok(if below { Subject::Below(name) } else { Subject::Name(name) })
}

fn range_of(text: &str) -> Result<IpNet, String> {
    let bad = |why: &str| format!("`egress.allow`: range `{text}`: {why}");
    let range = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse::<IpNet>().map_err(|_| bad("expected as 10.1.0.0/16"))?,
    };
    if range.trunc() != range {
        let network = range.trunc();
        return Err(bad(&format!("it has bits beyond its prefix; did you mean `{network}`?")));
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Rule, String> {
        Rule::parse(toml::from_str(text).unwrap())
    }

    #[test]
    fn rules_print_as_they_were_meant() {
        let cases = [
            ("name = 'Mirror.Example.'\nports = [443, 80]", "allow mirror.example:443,80"),
            ("name = '*.example'", "allow *.example"),
            ("range = '10.1.0.0/16'\nports = [443]", "allow 10.1.0.0/16:443"),
            ("range = 'fd00::1'", "allow fd00::1/128"),
        ];
        for (text, wanted) in cases {
            assert_eq!(parse(text).unwrap().to_string(), wanted);
        }
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            ("", "either a `name` or a `range`"),
            ("name = 'a'\nrange = '10.0.0.0/8'", "either a `name` or a `range`"),
            ("range = '10.1.2.3/8'", "did you mean `10.0.0.0/8`"),
            ("range = 'mirror'", "expected as"),
            ("name = 'a b'", "name `a b`"),
            ("name = '10.0.0.1'", "use `range`"),
            ("name = '*'", "name `*`"),
            ("name = 'a.*'", "name `a.*`"),
            ("name = 'a'\nports = [0]", "0 is not a port"),
        ];
        for (text, says) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_suffix_is_below_only() {
        let rule = parse("name = '*.b.example'").unwrap();
        let about = |name: &str| rule.is_about(&TargetName::parse(name).unwrap());
        assert!(about("a.b.example") && about("x.A.B.EXAMPLE."));
        assert!(!about("b.example") && !about("ab.example") && !about("a.b.example.evil"));
    }
}
