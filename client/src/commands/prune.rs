//! `tow prune`: removes stopped sandboxes and images that nobody uses, and says what that freed.
//!
//! Asks on a terminal before anything is destroyed, and elsewhere does nothing without `--force`.
//! Which images are used is the control plane's to say, what a node frees is the node's.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use serde_json::json;
use towline_proto::frame::FrameKind;
use towline_proto::ids::{NodeId, SandboxId};
use towline_proto::v1::{self, Desired, NodeState, Phase, stream_open::Kind};

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{human, json as objects};
use crate::session::{Client, new_key};
use crate::tunnel::guest::{Guest, open_failed};
use crate::{commands::rm, sandbox};

/// Arguments of `tow prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Only sandboxes
    #[arg(long, conflicts_with = "images")]
    pub sandboxes: bool,
    /// Only images
    #[arg(long)]
    pub images: bool,
    /// Do not ask
    #[arg(short, long, visible_short_alias = 'y')]
    pub force: bool,
    /// Print an object per thing removed
    #[arg(long)]
    pub json: bool,
}

/// What is to be removed.
#[derive(Debug, Default)]
struct Plan {
    sandboxes: Vec<v1::Sandbox>,
    images: Vec<v1::Image>,
}

pub(super) async fn run(args: PruneArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let plan = Plan::new(&cluster, &args).await?;
    let destroys = !plan.sandboxes.is_empty() || !plan.images.is_empty();
    if destroys && !args.force && !ask(&plan)? {
        return Ok(Exit::NO);
    }
    let mut freed = 0;
    for found in &plan.sandboxes {
        freed += remove_sandbox(&cluster, found, env).await?;
    }
    for image in &plan.images {
        remove_image(&cluster, image, env).await?;
    }
    let mut exit = Exit::OK;
    if !args.sandboxes {
        let (collected, all) = collect(&cluster, env).await?;
        freed += collected;
        exit = if all { Exit::OK } else { Exit::NO };
    }
    match env.printer.json() {
        true => env.printer.object(&json!({
            "schema": "towline.pruned/1", "kind": "total", "freed_bytes": freed,
        }))?,
        false => env.printer.answer(format!("freed {}", human::bytes(freed)))?,
    }
    Ok(exit)
}

impl Plan {
    async fn new(cluster: &Cluster, args: &PruneArgs) -> anyhow::Result<Self> {
        let mut plan = Self::default();
        if !args.images {
            plan.sandboxes = sandbox::list(cluster, None).await?;
            plan.sandboxes.retain(is_at_rest);
        }
        if !args.sandboxes {
            let call = |mut client: Client| async move {
                client.list_images(v1::ListImagesRequest {}).await
            };
            plan.images = cluster.call(call).await?.images;
            let going = plan.sandboxes.iter().map(objects_image).collect::<Vec<_>>();
            plan.images.retain(|image| is_unused(image, &going));
        }
        Ok(plan)
    }

    fn describe(&self) -> Vec<String> {
        let mut lines = vec!["This destroys for good:".to_owned()];
        lines.extend(self.sandboxes.iter().map(|found| {
            let since = human::age(found.since_ms);
            let phase = objects::phase(found);
            format!("  sandbox {} with its disk ({phase} for {since})", sandbox::name(found))
        }));
        lines.extend(self.images.iter().map(|image| {
            let (name, size) = (human::printable(&image.name), human::bytes(image.bytes));
            format!("  image {name} ({size}), which no sandbox uses")
        }));
        lines
    }
}

/// What a sandbox was made from, by name and by digest.
fn objects_image(found: &v1::Sandbox) -> (String, String) {
    let spec = found.spec.clone().unwrap_or_default();
    let digest = found.observed.clone().unwrap_or_default().image_digest;
    (objects::image(&spec), digest)
}

/// Whether no sandbox but those that go was made from the image.
fn is_unused(image: &v1::Image, going: &[(String, String)]) -> bool {
    let of_it = going.iter().filter(|(name, digest)| {
        *digest == image.digest || digest.is_empty() && *name == image.name
    });
    usize::try_from(image.sandboxes).is_ok_and(|used| used <= of_it.count())
}

/// Whether it does not run, and nobody has just asked for it to.
fn is_at_rest(found: &v1::Sandbox) -> bool {
    let observed = found.observed.clone().unwrap_or_default();
    let current = observed.generation >= found.generation;
    found.desired() != Desired::Deleted
        && current
        && matches!(observed.phase(), Phase::Stopped | Phase::Failed | Phase::Lost)
}

fn ask(plan: &Plan) -> anyhow::Result<bool> {
    let mut err = std::io::stderr().lock();
    for line in plan.describe() {
        writeln!(err, "{line}")?;
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Err(Failure::new("nothing was removed: there is no terminal to ask on")
            .hint("`tow prune --force` does not ask")
            .into());
    }
    write!(err, "Remove them? [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn remove_sandbox(cluster: &Cluster, found: &v1::Sandbox, env: &Env) -> anyhow::Result<u64> {
    let freed = rm::remove(cluster, found, env).await?;
    let name = sandbox::name(found);
    match env.printer.json() {
        true => env.printer.object(&json!({
            "schema": "towline.pruned/1", "kind": "sandbox", "name": name,
            "id": objects::id_text::<SandboxId>(&found.id), "freed_bytes": freed,
        }))?,
        false => env.printer.answer(format!("removed {name}{}", rm::lost(found, freed)))?,
    }
    Ok(freed.unwrap_or(0))
}

async fn remove_image(cluster: &Cluster, image: &v1::Image, env: &Env) -> anyhow::Result<()> {
    let request = v1::DeleteImageRequest { idempotency_key: new_key(), name: image.name.clone() };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.delete_image(request).await }
    };
    cluster.call(call).await?;
    match env.printer.json() {
        true => env.printer.object(&json!({
            "schema": "towline.pruned/1", "kind": "image", "name": image.name,
            "digest": image.digest,
        }))?,
        false => env.printer.answer(format!("removed image {}", human::printable(&image.name)))?,
    }
    Ok(())
}

/// Has each node remove what no image needs any more; returns what that freed, and whether all did.
async fn collect(cluster: &Cluster, env: &Env) -> anyhow::Result<(u64, bool)> {
    let call = |mut client: Client| async move { client.list_nodes(v1::ListNodesRequest {}).await };
    let (mut freed, mut all) = (0, true);
    for node in cluster.call(call).await?.nodes {
        let name = human::printable(&node.name);
        if node.state() != NodeState::Ready {
            env.printer.warning(format!("node {name} does not answer: its images stay"));
            all = false;
            continue;
        }
        let collected = match collect_on(cluster, &node, env).await {
            Ok(collected) => collected,
            Err(error) => {
                env.printer.warning(format!("node {name} keeps its images: {error:#}"));
                all = false;
                continue;
            }
        };
        freed += collected.bytes;
        match env.printer.json() {
            true => env.printer.object(&json!({
                "schema": "towline.pruned/1", "kind": "cache", "node": name,
                "node_id": objects::id_text::<NodeId>(&node.id), "images": collected.images,
                "files": collected.files, "freed_bytes": collected.bytes,
            }))?,
            false if collected.files > 0 => {
                let (files, bytes) = (collected.files, human::bytes(collected.bytes));
                env.printer
                    .answer(format!("node {name}: {files} files of images, {bytes} freed"))?;
            }
            false => {}
        }
    }
    Ok((freed, all))
}

async fn collect_on(
    cluster: &Cluster,
    node: &v1::Node,
    env: &Env,
) -> anyhow::Result<v1::ImagesCollected> {
    let request =
        v1::IssueTicketRequest { node_id: node.id.clone(), collect: true, ..Default::default() };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.issue_ticket(request).await }
    };
    let issued = cluster.call(call).await?;
    let guest = Guest::image_store(env, cluster.context())?;
    let kind = Kind::ImageCollect(v1::ImageCollectOpen { keep: issued.keep });
    let opened = guest.open_images(node.id.clone(), issued.ticket, kind).await;
    let mut opened = opened.map_err(open_failed)?;
    let broke = |error: Option<std::io::Error>| {
        let failure = Failure::new("the node went away while it removed images")
            .hint("`tow prune --images` again is safe");
        match error {
            Some(error) => failure.because(error),
            None => failure,
        }
    };
    match opened.reader.next().await {
        Ok(Some(frame)) if frame.is(FrameKind::ImagesCollected) => Ok(frame.decode()?),
        Ok(Some(frame)) if frame.is(FrameKind::Error) => {
            let error: v1::StreamError = frame.decode()?;
            Err(Failure::new(human::printable(&error.message)).into())
        }
        Ok(_) => Err(broke(None).into()),
        Err(error) => Err(broke(Some(error)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(desired: Desired, phase: Phase, seen: u64) -> v1::Sandbox {
        let observed = v1::Observed { phase: phase.into(), generation: seen, ..Default::default() };
        v1::Sandbox {
            desired: desired.into(),
            generation: 2,
            observed: Some(observed),
            ..Default::default()
        }
    }

    #[test]
    fn only_what_rests_and_is_not_wanted_otherwise_goes() {
        assert!(is_at_rest(&found(Desired::Stopped, Phase::Stopped, 2)));
        assert!(is_at_rest(&found(Desired::Running, Phase::Failed, 2)), "it ended by itself");
        assert!(!is_at_rest(&found(Desired::Running, Phase::Stopped, 1)), "it is being started");
        assert!(!is_at_rest(&found(Desired::Stopped, Phase::Running, 1)));
        assert!(
            !is_at_rest(&found(Desired::Running, Phase::Unknown, 2)),
            "not heard of is not stopped"
        );
        assert!(!is_at_rest(&found(Desired::Deleted, Phase::Stopped, 2)));
    }

    #[test]
    fn an_image_goes_when_all_its_sandboxes_do() {
        let image =
            v1::Image { name: "a".into(), digest: "d".into(), sandboxes: 2, ..Default::default() };
        let one = ("a".to_owned(), "d".to_owned());
        assert!(!is_unused(&image, std::slice::from_ref(&one)));
        assert!(is_unused(&image, &[one.clone(), ("a".into(), String::new())]));
        assert!(
            !is_unused(&image, &[one, ("a".into(), "other".into())]),
            "an older image of that name"
        );
    }
}
