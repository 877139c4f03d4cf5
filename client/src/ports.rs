//! Published ports as `tow` asks its daemon for them: what was typed, the answer as a person reads
//! it, and the lease of a command in the foreground.

use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use towline_proto::ids::SandboxId;
use towline_proto::v1::{self, PortMapping, PublishPorts, PublishedPort};

use crate::commands::Env;
use crate::daemon::client::DaemonClient;
use crate::error::Failure;
use crate::folder::{self, FolderConfig};
use crate::output::{human, json as objects};
use crate::sandbox;
use crate::tunnel::guest::open_failed;

/// Ports of one range.
const RANGE_MAX: usize = 128;
/// Before a lease is asked for again of a new daemon.
const PAUSE: Duration = Duration::from_millis(200);

/// One `-p`: a port, or a range of them.
#[derive(Debug, Clone, PartialEq)]
pub struct PortSpec(pub Vec<PortMapping>);

/// Flags that publish ports.
#[derive(Debug, Clone, Default, Args)]
pub struct PortArgs {
    /// Publish a port of the sandbox here: PORT, HOSTPORT:PORT or ADDRESS:HOSTPORT:PORT
    #[arg(short, long, value_name = "[HOST:]PORT", value_parser = parse)]
    pub publish: Vec<PortSpec>,
}

impl PortArgs {
    /// Returns what is to be published: what was typed, and what the folder asks for.
    pub fn wanted(&self, config: &FolderConfig) -> anyhow::Result<Vec<PortMapping>> {
        let mut all: Vec<PortMapping> = Vec::new();
        for text in &config.ports {
            let spec = parse(text)
                .map_err(|error| Failure::usage(format!("`{}`: ports: {error}", folder::FILE)))?;
            all.extend(spec.0);
        }
        all.extend(self.publish.iter().flat_map(|spec| spec.0.clone()));
        all.dedup();
        Ok(all)
    }
}

/// Parses `PORT`, `HOSTPORT:PORT`, `ADDRESS:PORT` or `ADDRESS:HOSTPORT:PORT`, with docker's ranges.
pub fn parse(text: &str) -> Result<PortSpec, String> {
    let wrong = || {
        format!("`{text}` is not a port: write for example 8080, 3000:8080 or 127.0.0.1:3000:8080")
    };
    let plain = match text.rsplit_once('/') {
        Some((plain, "tcp")) => plain,
        Some((_, "udp")) => return Err(format!("`{text}`: only TCP ports can be published")),
        Some(_) => return Err(wrong()),
        None => text,
    };
    let (host, ports) = host_of(plain).ok_or_else(wrong)?;
    let (host_ports, inside) = match ports.split_once(':') {
        // `ADDRESS::PORT`, docker's "any free port".
        Some(("", inside)) if host.is_some() => (None, range(inside).ok_or_else(wrong)?),
        Some((outside, inside)) => {
            (Some(range(outside).ok_or_else(wrong)?), range(inside).ok_or_else(wrong)?)
        }
        None => (range(ports), range(ports).ok_or_else(wrong)?),
    };
    let count = inside.len();
    if host_ports.as_ref().is_some_and(|outside| outside.len() != count) {
        return Err(format!("`{text}`: both ranges must be of the same length"));
    }
    if count > RANGE_MAX {
        return Err(format!("`{text}`: at most {RANGE_MAX} ports can be published at once"));
    }
    let host = host.flatten().map_or_else(Vec::new, octets);
    let first = *inside.start();
    let mapping = |port: u16| PortMapping {
        host: host.clone(),
        host_port: host_ports
            .as_ref()
            .map_or(0, |outside| u32::from(*outside.start()) + u32::from(port - first)),
        port: port.into(),
    };
    Ok(PortSpec(inside.map(mapping).collect()))
}

/// Splits the address off: `None` in it means both loopbacks, as with no address at all.
#[expect(clippy::option_option, reason = "no address, localhost, an address")]
fn host_of(text: &str) -> Option<(Option<Option<IpAddr>>, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once("]:")?;
        return Some((Some(Some(address.parse().ok()?)), rest));
    }
    let Some((first, rest)) = text.split_once(':') else { return Some((None, text)) };
    if first.contains('.') {
        return Some((Some(Some(first.parse().ok()?)), rest));
    }
    match first {
        "localhost" => Some((Some(None), rest)),
        _ => Some((None, text)),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port > 0);
    let range = match text.split_once('-') {
        Some((first, last)) => port(first)?..=port(last)?,
        None => port(text)?..=port(text)?,
    };
    (!range.is_empty()).then_some(range)
}

fn request(found: &v1::Sandbox, ports: Vec<PortMapping>, leased: bool) -> PublishPorts {
    let (sandbox_id, sandbox_name) = (found.id.clone(), sandbox::name(found));
    PublishPorts { sandbox_id, sandbox_name, ports, leased }
}

/// Publishes ports until they are unpublished or the sandbox is removed; says where they are.
pub async fn keep(
    daemon: &DaemonClient,
    found: &v1::Sandbox,
    wanted: &[PortMapping],
    env: &Env,
) -> anyhow::Result<Vec<PublishedPort>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let answer = daemon.publish(request(found, wanted.to_vec(), false)).await;
    let (ports, _) = answer.map_err(open_failed)?;
    let ports = of(ports, wanted);
    say(&ports, env);
    Ok(ports)
}

/// Ports that are published for as long as this lives; a daemon that dies is replaced.
#[derive(Debug)]
pub struct Leased(JoinSet<()>);

/// Publishes ports for a command in the foreground; says where they are.
pub async fn lease(
    daemon: &DaemonClient,
    found: &v1::Sandbox,
    wanted: &[PortMapping],
    env: &Env,
) -> anyhow::Result<Leased> {
    let mut tasks = JoinSet::new();
    if wanted.is_empty() {
        return Ok(Leased(tasks));
    }
    let answer = daemon.publish(request(found, wanted.to_vec(), true)).await;
    let (ports, lease) = answer.map_err(open_failed)?;
    let ports = of(ports, wanted);
    say(&ports, env);
    // Where they really are is where they should be again.
    let again: Vec<PortMapping> = ports.iter().filter_map(where_it_is).collect();
    let (daemon, request) = (daemon.clone(), request(found, again, true));
    tasks.spawn(async move {
        let mut current = Some(lease);
        loop {
            if let Some(lease) = &mut current {
                lease.lost().await;
            }
            tokio::time::sleep(PAUSE).await;
            current = match daemon.publish(request.clone()).await {
                Ok((_, lease)) => Some(lease),
                Err(error) => {
                    tracing::debug!(%error, "ports not published again");
                    None
                }
            };
        }
    });
    Ok(Leased(tasks))
}

impl Leased {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Those of all published ports that were asked for.
fn of(ports: Vec<PublishedPort>, wanted: &[PortMapping]) -> Vec<PublishedPort> {
    let is = |port: &PublishedPort| {
        let asked = |w: &PortMapping| {
            port.asked.as_ref() == Some(w) || where_it_is(port).as_ref() == Some(w)
        };
        wanted.iter().any(asked)
    };
    ports.into_iter().filter(is).collect()
}

fn where_it_is(port: &PublishedPort) -> Option<PortMapping> {
    Some(PortMapping { host_port: port.host_port, ..port.asked.clone()? })
}

/// Says where ports are: aloud when that is not where they were asked for.
pub fn say(ports: &[PublishedPort], env: &Env) {
    for port in ports {
        let inside = port.asked.as_ref().map_or(0, |asked| asked.port);
        let at = port.addresses.join(" and ");
        match port.problem.is_empty() {
            true => env.printer.hint(format!("port {inside} of the sandbox is at {at}")),
            false => env.printer.warning(format!(
                "{}: port {inside} of the sandbox is at {at}",
                human::printable(&port.problem)
            )),
        }
    }
}

/// Returns a published port as programs read it.
pub fn object(port: &PublishedPort) -> Value {
    let asked = port.asked.clone().unwrap_or_default();
    json!({
        "port": asked.port,
        "host_port": port.host_port,
        "asked_port": asked.host_port,
        "addresses": port.addresses,
        "connections": port.connections,
        "problem": port.problem,
        "leased": port.leased,
        "sandbox": port.sandbox_name,
        "sandbox_id": objects::id_text::<SandboxId>(&port.sandbox_id),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<(Vec<u8>, u32, u32)> {
        let spec = parse(text).unwrap();
        spec.0.into_iter().map(|m| (m.host, m.host_port, m.port)).collect()
    }

    #[test]
    fn ports_mean_what_dockers_users_mean() {
        let none = Vec::new;
        assert_eq!(parsed("8080"), [(none(), 8080, 8080)]);
        assert_eq!(parsed("8080/tcp"), [(none(), 8080, 8080)]);
        assert_eq!(parsed("3000:8080"), [(none(), 3000, 8080)]);
        assert_eq!(parsed("localhost:3000:8080"), [(none(), 3000, 8080)]);
        assert_eq!(parsed("127.0.0.1:3000:8080"), [(vec![127, 0, 0, 1], 3000, 8080)]);
        assert_eq!(parsed("0.0.0.0:8080"), [(vec![0; 4], 8080, 8080)]);
        assert_eq!(parsed("127.0.0.1::8080"), [(vec![127, 0, 0, 1], 0, 8080)]);
        assert_eq!(parsed("[::1]:3000:8080")[0].0.len(), 16);
        let range = parsed("8000-8002:9000-9002");
        assert_eq!(range[2], (none(), 8002, 9002));
        for bad in
            ["", "0", "65536", "a", "1:2:3", "8080/udp", "1-2:3", "9-8", "1-1000", "256.0.0.1:1:1"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_folders_ports_come_with_those_that_were_typed() {
        let config: FolderConfig = toml::from_str("ports = ['8080', '3000:80']").unwrap();
        let args = PortArgs { publish: vec![parse("9000").unwrap()] };
        let ports: Vec<u32> = args.wanted(&config).unwrap().iter().map(|m| m.port).collect();
        assert_eq!(ports, [8080, 80, 9000]);
        let config: FolderConfig = toml::from_str("ports = ['http']").unwrap();
        let error = PortArgs::default().wanted(&config).unwrap_err().to_string();
        assert!(error.contains("towline.toml") && error.contains("`http`"), "{error}");
    }
}
