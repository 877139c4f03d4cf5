//! What happened to a sandbox, as lines for people and as objects for programs.
//!
//! Texts come from a node and a guest's names are in them: shown without control characters.

use serde_json::{Value, json};
use towline_proto::v1::{self, EgressDecision, EgressProtocol, FeedEntry, feed_entry::What};

use super::human::{self, printable};
use super::json;

/// Returns an entry as `tow events --json` and `tow logs --json` print it.
pub fn entry(entry: &FeedEntry) -> Value {
    let (kind, mut object) = match &entry.what {
        Some(What::Egress(decision)) => ("egress", self::decision(decision)),
        Some(What::Note(text)) => ("note", json!({ "text": text })),
        None => ("unknown", json!({})),
    };
    object["schema"] = "towline.event/1".into();
    object["kind"] = kind.into();
    object["sequence"] = entry.sequence.into();
    object["unix_ms"] = entry.unix_ms.into();
    object
}

/// Returns a change that the control plane told.
pub fn phase(sandbox: &v1::Sandbox) -> Value {
    json!({
        "schema": "towline.event/1",
        "kind": "phase",
        "unix_ms": sandbox.since_ms,
        "phase": json::phase(sandbox),
        "desired": json::desired(sandbox),
        "reason": sandbox.observed.as_ref().map_or("", |observed| &observed.reason),
    })
}

/// Returns a decision of the network policy.
pub fn decision(decision: &EgressDecision) -> Value {
    json!({
        "protocol": protocol(decision),
        "target": decision.target,
        "port": decision.port,
        "address": decision.address,
        "allowed": decision.allowed,
        "rule": decision.rule,
        "hint": decision.hint,
        "count": decision.count,
    })
}

fn protocol(decision: &EgressDecision) -> &'static str {
    match decision.protocol() {
        EgressProtocol::Tcp => "tcp",
        EgressProtocol::Udp => "udp",
        // A name that was only asked for.
        EgressProtocol::Unspecified => "lookup",
    }
}

/// Returns `connect to mirror.example:443 (10.0.0.1)`.
pub fn what(decision: &EgressDecision) -> String {
    let target = match decision.target.contains(':') {
        true => format!("[{}]", printable(&decision.target)),
        false => printable(&decision.target),
    };
    let verb = match decision.protocol() {
        EgressProtocol::Tcp => "connect to",
        EgressProtocol::Udp => "send to",
        EgressProtocol::Unspecified => return format!("look up {target}"),
    };
    let address = match decision.address.as_str() {
        "" => String::new(),
        address => format!(" ({})", printable(address)),
    };
    format!("{verb} {target}:{}{address}", decision.port)
}

/// Returns one line for an entry; its time is the caller's to show.
pub fn line(entry: &FeedEntry) -> String {
    match &entry.what {
        Some(What::Egress(decision)) => {
            let word = if decision.allowed { "allowed" } else { "blocked" };
            let rule = printable(&decision.rule);
            format!("{word}: {} by rule `{rule}`{}", what(decision), times(decision.count))
        }
        Some(What::Note(text)) => printable(text),
        None => "something that this version of tow does not know".into(),
    }
}

fn times(count: u32) -> String {
    if count > 1 { format!(", {count} times") } else { String::new() }
}

/// What was blocked, each once with its count, in the order of the newest.
pub fn blocked(entries: &[FeedEntry]) -> Vec<(u64, EgressDecision)> {
    let mut all: Vec<(u64, EgressDecision)> = Vec::new();
    for entry in entries {
        let Some(What::Egress(decision)) = &entry.what else { continue };
        if decision.allowed {
            continue;
        }
        let same = |other: &EgressDecision| {
            (other.protocol, &other.target, other.port, &other.rule)
                == (decision.protocol, &decision.target, decision.port, &decision.rule)
        };
        let mut decision = decision.clone();
        if let Some(at) = all.iter().position(|(_, other)| same(other)) {
            decision.count = decision.count.saturating_add(all.remove(at).1.count);
        }
        all.push((entry.unix_ms, decision));
    }
    all
}

/// A line for each distinct connection that was blocked, with what would allow it.
pub fn blocked_lines(entries: &[FeedEntry]) -> Vec<String> {
    let line = |(_, decision): &(u64, EgressDecision)| {
        let (rule, hint) = (printable(&decision.rule), printable(&decision.hint));
        let count = times(decision.count);
        format!("blocked: {} by rule `{rule}`{count}; {hint}", what(decision))
    };
    blocked(entries).iter().map(line).collect()
}

/// Returns `14:03:07` of the day in UTC.
pub fn clock(unix_ms: u64) -> String {
    let s = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", s / 3600, s / 60 % 60, s % 60)
}

/// Returns `5 s ago`.
pub fn ago(unix_ms: u64) -> String {
    match human::age(unix_ms) {
        age if age.is_empty() => "at an unknown time".into(),
        age => format!("{age} ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked_entry(sequence: u64, target: &str, count: u32) -> FeedEntry {
        let decision = EgressDecision {
            protocol: EgressProtocol::Tcp.into(),
            target: target.into(),
            port: 80,
            address: if target.contains("example") { "10.0.0.1".into() } else { String::new() },
            allowed: false,
            rule: "private 10.0.0.0/8".into(),
            hint: "an operator allows it".into(),
            count,
        };
        FeedEntry { sequence, unix_ms: sequence, what: Some(What::Egress(decision)) }
    }

    #[test]
    fn the_same_is_one_line_with_its_count_and_shows_no_control_characters() {
        let entries = [
            blocked_entry(1, "10.0.0.1", 1),
            blocked_entry(2, "mirror.example", 1),
            blocked_entry(3, "10.0.0.1", 4),
            blocked_entry(4, "fd00::1", 1),
            blocked_entry(5, "a\x1b[2J", 1),
        ];
        let rest = "by rule `private 10.0.0.0/8`";
        assert_eq!(
            blocked_lines(&entries),
            [
                format!(
                    "blocked: connect to mirror.example:80 (10.0.0.1) {rest}; an operator allows it"
                ),
                format!("blocked: connect to 10.0.0.1:80 {rest}, 5 times; an operator allows it"),
                format!("blocked: connect to [fd00::1]:80 {rest}; an operator allows it"),
                format!("blocked: connect to a\u{fffd}[2J:80 {rest}; an operator allows it"),
            ]
        );
    }

    /// What programs read: a change here is a change of the contract.
    #[test]
    fn events_are_printed_as_reviewed() {
        let note = FeedEntry { sequence: 2, unix_ms: 5, what: Some(What::Note("running".into())) };
        let observed = v1::Observed {
            phase: v1::Phase::Stopped.into(),
            reason: "host restarted".into(),
            ..Default::default()
        };
        let sandbox = v1::Sandbox {
            desired: v1::Desired::Running.into(),
            since_ms: 7,
            observed: Some(observed),
            ..Default::default()
        };
        let all = [entry(&blocked_entry(1, "mirror.example", 3)), entry(&note), phase(&sandbox)];
        insta::assert_json_snapshot!(all);
    }
}
