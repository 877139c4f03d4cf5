//! `tow ports`: what of a sandbox can be reached here, and what listens in it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use towline_proto::frame::FrameKind;
use towline_proto::ids::SandboxId;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{self, ListPorts, ListeningPort, Phase, PortMapping, PublishedPort};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::commands::run::folder_sandbox;
use crate::error::{Exit, Failure, Outcome};
use crate::folder::ProjectFolder;
use crate::output::{human, json as objects};
use crate::ports::{self, PortSpec};
use crate::tunnel::guest::{Guest, open_failed};
use crate::{sandbox, user};

/// Bound on the guest's answer.
const LIST_MAX: Duration = Duration::from_secs(10);

/// Arguments of `tow ports`.
#[derive(Debug, Args)]
pub struct PortsArgs {
    /// Name or id of the sandbox; this folder's when there is none
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Publish a port, until it is unpublished or the sandbox is removed
    #[arg(long, value_name = "[HOST:]PORT", value_parser = ports::parse)]
    pub publish: Vec<PortSpec>,
    /// Unpublish a port of the sandbox, or HOSTPORT:PORT
    #[arg(long, value_name = "[HOST:]PORT", value_parser = unpublished)]
    pub unpublish: Vec<PortSpec>,
    /// Print an object per port
    #[arg(long)]
    pub json: bool,
}

/// A port alone means wherever it is published.
fn unpublished(text: &str) -> Result<PortSpec, String> {
    let mut spec = ports::parse(text)?;
    if !text.contains(':') {
        spec.0.iter_mut().for_each(|mapping| mapping.host_port = 0);
    }
    Ok(spec)
}

pub(super) async fn run(args: PortsArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = match &args.name {
        Some(name) => sandbox::find(&cluster, name).await?,
        None => match here(&cluster).await {
            Some(found) => found,
            None if args.publish.is_empty() && args.unpublish.is_empty() => {
                return all(&cluster, env).await;
            }
            None => {
                return Err(Failure::usage("this folder has no sandbox: whose ports are meant?")
                    .hint("`tow ports NAME`; `tow ls` lists sandboxes")
                    .into());
            }
        },
    };
    let guest = Guest::of(env, cluster, &found)?;
    let daemon = guest.daemon();
    let mappings = |specs: &[PortSpec]| -> Vec<PortMapping> {
        specs.iter().flat_map(|spec| spec.0.clone()).collect()
    };
    if !args.unpublish.is_empty() {
        let request =
            v1::UnpublishPorts { sandbox_id: found.id.clone(), ports: mappings(&args.unpublish) };
        daemon.unpublish(request).await.map_err(open_failed)?;
    }
    ports::keep(daemon, &found, &mappings(&args.publish), env).await?;
    let request = ListPorts { sandbox_id: found.id.clone() };
    let published = daemon.list_ports(request).await.map_err(open_failed)?;
    let listening = match sandbox::phase(&found) {
        Phase::Running => listening(&guest).await?,
        _ => {
            let name = sandbox::name(&found);
            env.printer.hint(format!("sandbox {name} does not run: nothing listens in it"));
            Vec::new()
        }
    };
    show(&found, published, listening, env)
}

async fn here(cluster: &Cluster) -> Option<v1::Sandbox> {
    let cwd = std::env::current_dir().ok()?;
    let folder = ProjectFolder::find(&cwd, user::home().as_deref()).ok()?;
    folder_sandbox(cluster, &folder, None).await.ok()?
}

/// What is published of all sandboxes.
async fn all(cluster: &Cluster, env: &Env) -> Outcome {
    let guest = Guest::of(env, cluster.clone(), &v1::Sandbox::default())?;
    let published = guest.daemon().list_ports(ListPorts::default()).await.map_err(open_failed)?;
    if env.printer.json() {
        for port in &published {
            let object = json!({
                "schema": "towline.port/1",
                "sandbox": port.sandbox_name,
                "sandbox_id": objects::id_text::<SandboxId>(&port.sandbox_id),
                "port": port.asked.as_ref().map(|asked| asked.port),
                "published": [ports::object(port)],
                "listening": [],
            });
            env.printer.object(&object)?;
        }
        return Ok(Exit::OK);
    }
    let mut rows = vec![["SANDBOX", "PORT", "AT", "CONNECTIONS"].map(str::to_owned).to_vec()];
    rows.extend(published.iter().map(|port| {
        let inside = port.asked.as_ref().map_or(0, |asked| asked.port);
        let at = port.addresses.join(", ");
        vec![port.sandbox_name.clone(), inside.to_string(), at, port.connections.to_string()]
    }));
    human::table(&rows).iter().try_for_each(|line| env.printer.answer(line))?;
    Ok(Exit::OK)
}

/// Asks the guest agent what listens.
async fn listening(guest: &Guest<'_>) -> anyhow::Result<Vec<ListeningPort>> {
    let asking = async {
        let open = guest.open(Kind::PortList(v1::PortListOpen {})).await.map_err(open_failed)?;
        let mut reader = open.reader;
        reader.next().await.context("asking the sandbox which ports it listens on")
    };
    let late = || Failure::new("the sandbox did not say in time which ports it listens on");
    let frame = tokio::time::timeout(LIST_MAX, asking).await.map_err(|_| late())??;
    match frame {
        Some(frame) if frame.is(FrameKind::PortList) => Ok(frame.decode::<v1::PortList>()?.ports),
        Some(frame) if frame.is(FrameKind::Error) => {
            let error: v1::StreamError = frame.decode()?;
            Err(Failure::new(human::printable(&error.message)).into())
        }
        _ => Err(Failure::new("the sandbox did not say which ports it listens on").into()),
    }
}

/// One port of the sandbox: where it is here, and who listens there.
#[derive(Debug, Default)]
struct Port {
    published: Vec<PublishedPort>,
    listening: Vec<ListeningPort>,
}

fn show(
    found: &v1::Sandbox,
    published: Vec<PublishedPort>,
    listening: Vec<ListeningPort>,
    env: &Env,
) -> Outcome {
    let mut by_port: BTreeMap<u32, Port> = BTreeMap::new();
    for port in published {
        let inside = port.asked.as_ref().map_or(0, |asked| asked.port);
        by_port.entry(inside).or_default().published.push(port);
    }
    for port in listening {
        by_port.entry(port.port).or_default().listening.push(port);
    }
    if env.printer.json() {
        for (number, port) in &by_port {
            env.printer.object(&object(found, *number, port))?;
        }
        return Ok(Exit::OK);
    }
    let mut rows = vec![["PORT", "AT", "CONNECTIONS", "LISTENING"].map(str::to_owned).to_vec()];
    rows.extend(by_port.iter().map(|(number, port)| row(*number, port)));
    human::table(&rows).iter().try_for_each(|line| env.printer.answer(line))?;
    Ok(Exit::OK)
}

fn object(found: &v1::Sandbox, number: u32, port: &Port) -> serde_json::Value {
    json!({
        "schema": "towline.port/1",
        "sandbox": sandbox::name(found),
        "sandbox_id": objects::id_text::<SandboxId>(&found.id),
        "port": number,
        "published": port.published.iter().map(ports::object).collect::<Vec<_>>(),
        "listening": port.listening.iter().map(|one| json!({
            "address": address(&one.address), "pid": one.pid, "process": one.process,
        })).collect::<Vec<_>>(),
    })
}

fn row(number: u32, port: &Port) -> Vec<String> {
    let at: Vec<String> = port.published.iter().flat_map(|p| p.addresses.clone()).collect();
    let connections: u32 = port.published.iter().map(|p| p.connections).sum();
    let mut who: Vec<String> = port
        .listening
        .iter()
        .map(|one| match one.pid {
            0 => address(&one.address),
            pid => format!("{} ({pid})", one.process),
        })
        .collect();
    who.dedup();
    let connections = match port.published.is_empty() {
        true => String::new(),
        false => connections.to_string(),
    };
    vec![number.to_string(), at.join(", "), connections, who.join(", ")]
}

fn address(bytes: &[u8]) -> String {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| v6()).map(|ip| ip.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What programs read: a change here is a change of the contract.
    #[test]
    fn a_port_is_printed_as_reviewed() {
        let found = v1::Sandbox {
            id: SandboxId::from_parts(1, [0; 10]).to_vec(),
            spec: Some(v1::SandboxSpec { name: "web".into(), ..Default::default() }),
            ..Default::default()
        };
        let published = PublishedPort {
            sandbox_id: found.id.clone(),
            sandbox_name: "web".into(),
            asked: Some(PortMapping { host: Vec::new(), host_port: 8080, port: 80 }),
            addresses: vec!["127.0.0.1:8081".into(), "[::1]:8081".into()],
            host_port: 8081,
            connections: 2,
            problem: "port 8080 is in use on this machine".into(),
            leased: false,
        };
        let listening =
            ListeningPort { port: 80, address: vec![0; 4], pid: 12, process: "nginx".into() };
        let port = Port { published: vec![published], listening: vec![listening] };
        insta::assert_json_snapshot!(object(&found, 80, &port));
        let text = "80 127.0.0.1:8081, [::1]:8081 2 nginx (12)";
        assert_eq!(row(80, &port).join(" "), text);
    }
}
