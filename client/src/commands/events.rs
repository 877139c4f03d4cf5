//! `tow events`: what happened to a sandbox, from its node's feed, with the changes of its phase that
//! the control plane has committed.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use towline_proto::v1;

use super::run::named_or_here;
use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{Printer, events, json};
use crate::sandbox;
use crate::tunnel::feed;
use crate::tunnel::guest::Guest;

/// Arguments of `tow events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on showing what happens until the sandbox is gone
    #[arg(short, long)]
    pub follow: bool,
    /// Print an object per event
    #[arg(long)]
    pub json: bool,
    /// Name or id of the sandbox; this folder's when there is none
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

pub(super) async fn run(args: EventsArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = named_or_here(&cluster, args.name.as_deref()).await?;
    let guest = Guest::of(env, cluster.clone(), &found)?;
    let print = |entry: &v1::FeedEntry| print_entry(&env.printer, entry);
    if !args.follow {
        for entry in feed::read(&guest, 0).await? {
            print(&entry)?;
        }
        print_phase(&env.printer, &found, found.since_ms)?;
        return Ok(Exit::OK);
    }
    let mut last = None;
    let phases = sandbox::changes(&cluster, &found, |now| {
        let state = (json::phase(now), json::desired(now), sandbox::reason(now));
        if last.as_ref() == Some(&state) {
            return Ok(());
        }
        last = Some(state);
        print_phase(&env.printer, now, unix_ms())
    });
    // The feed ends with its node's interest; the sandbox's end is what the control plane says.
    tokio::select! {
        ended = phases => ended?,
        broken = feed::follow(&guest, print) => broken?,
    }
    Ok(Exit::OK)
}

fn print_entry(printer: &Printer, entry: &v1::FeedEntry) -> anyhow::Result<()> {
    if printer.json() {
        return Ok(printer.object(&events::entry(entry))?);
    }
    let line = format!("{} {}", events::clock(entry.unix_ms), events::line(entry));
    Ok(printer.answer(line)?)
}

fn print_phase(printer: &Printer, now: &v1::Sandbox, at_ms: u64) -> anyhow::Result<()> {
    if printer.json() {
        return Ok(printer.object(&events::phase(now))?);
    }
    let reason = match sandbox::reason(now) {
        reason if reason.is_empty() => String::new(),
        reason => format!(": {reason}"),
    };
    let phase = json::phase(now);
    let wanted = match json::desired(now) {
        desired if desired == phase => String::new(),
        desired => format!(" (wanted: {desired})"),
    };
    Ok(printer.answer(format!("{} phase {phase}{wanted}{reason}", events::clock(at_ms)))?)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
