//! `tow ttl`: when a sandbox is stopped by itself. A timeout stops and never removes.

use clap::Args;
use towline_proto::v1;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::session::{Client, new_key};
use crate::{parse, sandbox};

/// Arguments of `tow ttl`.
#[derive(Debug, Args)]
pub struct TtlArgs {
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Stop it so long after now, and after each later start; `never` for no timeout
    #[arg(value_name = "DURATION", value_parser = parse::timeout_s)]
    pub duration: Option<u64>,
    /// Print the sandbox as an object
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: TtlArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let mut found = sandbox::find(&cluster, &args.name).await?;
    if let Some(ttl_s) = args.duration {
        let (idempotency_key, id) = (new_key(), found.id.clone());
        let request = v1::SetExpiryRequest { idempotency_key, id, ttl_s };
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.set_expiry(request).await }
        };
        found = cluster.call(call).await?;
    }
    match env.printer.json() {
        true => env.printer.object(&json::sandbox(&found))?,
        false => env.printer.answer(text(&found))?,
    }
    Ok(Exit::OK)
}

fn text(found: &v1::Sandbox) -> String {
    let timeout_s = found.spec.as_ref().map_or(0, |spec| spec.timeout_s);
    match (timeout_s, found.expires_ms) {
        (0, _) => "never".into(),
        (after, 0) => format!("{} after its next start", human::timeout(after)),
        (after, at) => format!("{} ({} after each start)", human::until(at), human::timeout(after)),
    }
}
