//! `tow why`: what a sandbox is doing and why, what keeps it, and what its network policy blocked,
//! by which rule and what would allow it.
//!
//! What cannot be asked now (a stopped guest's commands, a silent node's feed) is said to be unknown,
//! never left out as if there were none.

use std::time::Duration;

use clap::Args;
use prost::Message as _;
use serde_json::{Value, json};
use towline_proto::frame::FrameKind;
use towline_proto::v1::{self, EgressDecision, Phase, stream_open::Kind};

use super::run::named_or_here;
use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{events, human, json};
use crate::sandbox;
use crate::tunnel::feed;
use crate::tunnel::guest::{Guest, open_failed};

/// Bound on asking the guest for its commands.
const EXECS_MAX: Duration = Duration::from_secs(10);
/// The newest blocked connections that a person is shown.
const SHOWN_MAX: usize = 20;

/// Arguments of `tow why`.
#[derive(Debug, Args)]
pub struct WhyArgs {
    /// Print an object
    #[arg(long)]
    pub json: bool,
    /// Name or id of the sandbox; this folder's when there is none
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// What is known about one sandbox.
#[derive(Debug)]
struct Why {
    sandbox: v1::Sandbox,
    /// Running commands; `None` when the guest could not be asked.
    execs: Option<Vec<v1::ExecInfo>>,
    /// What was blocked, newest last; `None` when the node could not be asked.
    blocked: Option<Vec<(u64, EgressDecision)>>,
}

pub(super) async fn run(args: WhyArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = named_or_here(&cluster, args.name.as_deref()).await?;
    let guest = Guest::of(env, cluster, &found)?;
    let execs = async {
        if sandbox::phase(&found) != Phase::Running {
            return Some(Vec::new());
        }
        let asked = tokio::time::timeout(EXECS_MAX, execs(&guest)).await;
        asked.map_err(anyhow::Error::from).and_then(|asked| asked).map_err(logged).ok()
    };
    let entries = async { feed::read(&guest, 0).await.map_err(logged).ok() };
    let (execs, entries) = tokio::join!(execs, entries);
    let blocked = entries.map(|entries| events::blocked(&entries));
    let why = Why { sandbox: found, execs, blocked };
    match env.printer.json() {
        true => env.printer.object(&object(&why))?,
        false => lines(&why).iter().try_for_each(|line| env.printer.answer(line))?,
    }
    Ok(Exit::OK)
}

fn logged(error: anyhow::Error) -> anyhow::Error {
    tracing::debug!(%error, "not known");
    error
}

/// The commands that run.
async fn execs(guest: &Guest<'_>) -> anyhow::Result<Vec<v1::ExecInfo>> {
    let open = Kind::ExecList(v1::ExecListOpen {});
    let mut opened = guest.open(open).await.map_err(open_failed)?;
    let frame = opened.reader.next().await?;
    let frame = frame.filter(|frame| frame.is(FrameKind::ExecList));
    let frame = frame.ok_or_else(|| Failure::new("the guest did not list its commands"))?;
    let list = v1::ExecList::decode(frame.body)?;
    Ok(list.execs.into_iter().filter(|exec| exec.exited.is_none()).collect())
}

fn object(why: &Why) -> Value {
    let sandbox = json::sandbox(&why.sandbox);
    let spec = why.sandbox.spec.clone().unwrap_or_default();
    let exec = |exec: &v1::ExecInfo| {
        let argv: Vec<String> = exec.argv.iter().map(|word| json::bytes(word)).collect();
        json!({
            "argv": argv, "pid": exec.pid, "main": exec.main, "detached": exec.detached,
            "started_ms": exec.started_unix_ms,
        })
    };
    let blocked = |(unix_ms, decision): &(u64, EgressDecision)| {
        let mut object = events::decision(decision);
        object["unix_ms"] = (*unix_ms).into();
        object
    };
    json!({
        "schema": "towline.why/1",
        "id": sandbox["id"],
        "name": spec.name,
        "phase": sandbox["phase"],
        "desired": sandbox["desired"],
        "reason": sandbox["reason"],
        "since_ms": why.sandbox.since_ms,
        "policy": spec.policy,
        "kept_by": {
            "running": why.execs.as_ref().map(|all| all.iter().map(exec).collect::<Vec<_>>()),
            "expires_ms": (why.sandbox.expires_ms != 0).then_some(why.sandbox.expires_ms),
            "remove_on_exit": spec.remove_on_exit,
        },
        "blocked": why.blocked.as_ref().map(|all| all.iter().map(blocked).collect::<Vec<_>>()),
    })
}

fn lines(why: &Why) -> Vec<String> {
    let spec = why.sandbox.spec.clone().unwrap_or_default();
    let mut all = vec![state(&why.sandbox)];
    all.extend(kept(why, &spec));
    all.push(match spec.policy.as_str() {
        "public" => {
            "network policy `public`: the public internet, and what the node's operator allows"
                .into()
        }
        "none" => "network policy `none`: nothing is reached".into(),
        other => format!("network policy `{}`", human::printable(other)),
    });
    match &why.blocked {
        None => all.push("blocked connections: unknown, its node could not be asked".into()),
        Some(blocked) if blocked.is_empty() => all.push("blocked connections: none".into()),
        Some(blocked) => {
            all.push("blocked connections, the newest first:".into());
            let newest = blocked.iter().rev().take(SHOWN_MAX);
            all.extend(newest.flat_map(|(unix_ms, decision)| blocked_lines(*unix_ms, decision)));
        }
    }
    all
}

fn state(found: &v1::Sandbox) -> String {
    let (phase, desired) = (json::phase(found), json::desired(found));
    let mut text = format!("{} is {phase}", sandbox::name(found));
    if found.since_ms != 0 {
        text.push_str(&format!(" for {}", human::age(found.since_ms)));
    }
    if phase != desired {
        text.push_str(&format!(", wanted {desired}"));
    }
    match sandbox::reason(found) {
        reason if reason.is_empty() => text,
        reason => format!("{text}: {reason}"),
    }
}

/// What keeps it there, and what will end it.
fn kept(why: &Why, spec: &v1::SandboxSpec) -> Vec<String> {
    let mut all = Vec::new();
    match &why.execs {
        None => all.push("running commands: unknown, the guest could not be asked".into()),
        Some(execs) if execs.is_empty() => {
            if sandbox::phase(&why.sandbox) == Phase::Running {
                let name = sandbox::name(&why.sandbox);
                all.push(format!(
                    "no command runs in it; it stays until `tow stop {name}` or `tow rm {name}`"
                ));
            }
        }
        Some(execs) => all.extend(execs.iter().map(exec_line)),
    }
    if why.sandbox.expires_ms != 0 {
        let name = sandbox::name(&why.sandbox);
        let left = human::until(why.sandbox.expires_ms);
        all.push(format!("it is stopped {left}; `tow ttl {name} never` keeps it"));
    }
    if spec.remove_on_exit {
        all.push("it is removed when the `tow run --rm` that made it ends".into());
    }
    all
}

fn exec_line(exec: &v1::ExecInfo) -> String {
    let argv: Vec<String> =
        exec.argv.iter().map(|word| human::printable(&json::bytes(word))).collect();
    let runs = match human::age(exec.started_unix_ms) {
        age if age.is_empty() => "runs".into(),
        age => format!("runs for {age}"),
    };
    format!("{runs}: {}{}", argv.join(" "), if exec.detached { " (detached)" } else { "" })
}

fn blocked_lines(unix_ms: u64, decision: &EgressDecision) -> [String; 2] {
    let times =
        if decision.count > 1 { format!(", {} times", decision.count) } else { String::new() };
    let rule = human::printable(&decision.rule);
    let (what, ago) = (events::what(decision), events::ago(unix_ms));
    [
        format!("  {what} by rule `{rule}`{times}, last {ago}"),
        format!("    {}", human::printable(&decision.hint)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why() -> Why {
        let spec = v1::SandboxSpec {
            name: "quick-otter".into(),
            policy: "public".into(),
            remove_on_exit: true,
            ..Default::default()
        };
        let observed = v1::Observed { phase: Phase::Running.into(), ..Default::default() };
        let sandbox = v1::Sandbox {
            spec: Some(spec),
            desired: v1::Desired::Running.into(),
            observed: Some(observed),
            ..Default::default()
        };
        let exec = v1::ExecInfo {
            argv: vec![b"make".to_vec(), b"test".to_vec()],
            pid: 7,
            main: true,
            detached: true,
            ..Default::default()
        };
        let decision = EgressDecision {
            protocol: v1::EgressProtocol::Tcp.into(),
            target: "mirror.example".into(),
            port: 443,
            address: "10.0.0.1".into(),
            allowed: false,
            rule: "private 10.0.0.0/8".into(),
            hint: "an operator allows it in node-agent.toml: …".into(),
            count: 3,
        };
        Why { sandbox, execs: Some(vec![exec]), blocked: Some(vec![(0, decision)]) }
    }

    #[test]
    fn a_person_reads_what_keeps_it_and_what_was_blocked() {
        insta::assert_snapshot!(lines(&why()).join("\n"));
    }

    #[test]
    fn a_program_reads_the_same() {
        insta::assert_json_snapshot!(object(&why()));
    }

    #[test]
    fn what_cannot_be_asked_is_unknown_and_not_nothing() {
        let why = Why { execs: None, blocked: None, ..why() };
        let text = lines(&why).join("\n");
        assert!(text.contains("running commands: unknown"), "{text}");
        assert!(text.contains("blocked connections: unknown"), "{text}");
        assert!(object(&why)["blocked"].is_null());
    }
}
