//! `tow image pull`, and the same before a sandbox is made of an image that nobody brought in yet.
//!
//! The name that was typed is the name that the cluster gets; pulling again moves it to what the
//! registry has by then. Sandboxes keep the image that they were made with.

use clap::Args;
use oci_spec::distribution::Reference;
use towline_proto::v1::{self, image_ref::Source};

use super::put;
use crate::cluster::{self, Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::json;
use crate::registry_login;
use crate::session::Client;
use crate::tunnel::guest::Guest;
use crate::tunnel::pull;

/// Arguments of `tow image pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The image, for example debian:12 or ghcr.io/owner/name@sha256:…
    #[arg(value_name = "REF")]
    pub name: String,
    /// Allow plain HTTP, which anybody on the way can read and change
    #[arg(long)]
    pub insecure: bool,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: PullArgs, env: &Env) -> Outcome {
    super::check_name(&args.name)?;
    let context = cluster::ensure(env, Start::Always).await?;
    let imported = fetch(&args.name, args.insecure, &context, env).await?;
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let image = put(&cluster, &args.name, &imported).await?;
    match env.printer.json() {
        true => env.printer.object(&json::image_record(&image))?,
        false => env.printer.answer(&image.digest)?,
    }
    Ok(Exit::OK)
}

/// The image that a sandbox's spec names, unless it is the machine's own system.
fn named(spec: &v1::SandboxSpec) -> Option<&str> {
    match spec.image.as_ref()?.source.as_ref()? {
        Source::Oci(name) => Some(name),
        Source::Local(_) => None,
    }
}

/// Whether a spec's image could be one to pull.
pub(in crate::commands) fn may_need(spec: &v1::SandboxSpec) -> bool {
    named(spec).is_some()
}

/// Pulls a new sandbox's image unless the cluster knows it.
pub(in crate::commands) async fn ensure(
    cluster: &Cluster,
    spec: &v1::SandboxSpec,
    env: &Env,
) -> anyhow::Result<()> {
    let Some(name) = named(spec) else { return Ok(()) };
    let call =
        |mut client: Client| async move { client.list_images(v1::ListImagesRequest {}).await };
    let known = cluster.call(call).await?.images;
    let latest = format!("{name}:latest");
    let is_known =
        |image: &v1::Image| image.name == name || image.name == latest || image.digest == name;
    // A bare digest says nothing of where it could come from: the control plane has its words.
    if known.iter().any(is_known) || name.starts_with("sha256:") {
        return Ok(());
    }
    env.printer.hint(format!("no image {name} here yet, pulling it"));
    let imported = fetch(name, false, cluster.context(), env).await?;
    put(cluster, name, &imported).await?;
    Ok(())
}

async fn fetch(
    name: &str,
    insecure: bool,
    context: &str,
    env: &Env,
) -> anyhow::Result<v1::ImageImported> {
    let credentials = login(&reference(name)?, env).await;
    let guest = Guest::image_store(env, context)?;
    let progress = env.printer.progress(format!("pulling {name}"));
    let show =
        |step: &v1::ImageImportProgress| progress.set(super::describe("pulling", name, step));
    let open = v1::ImagePullOpen { reference: name.to_owned(), credentials, insecure };
    pull::run(&guest, open, show).await
}

/// What was typed, as docker reads it.
pub(super) fn reference(name: &str) -> anyhow::Result<Reference> {
    name.parse().map_err(|error| {
        Failure::usage(format!("`{name}` is not an image reference: {error}"))
            .hint("for example debian:12 or ghcr.io/owner/name:tag")
            .into()
    })
}

/// This user's login to an image's registry; what of it cannot be read is said.
pub(in crate::commands) async fn login(
    reference: &Reference,
    env: &Env,
) -> Option<v1::RegistryCredentials> {
    let (credentials, warnings) =
        registry_login::find(reference.registry(), reference.repository()).await;
    for warning in warnings {
        env.printer.warning(format!("{:#}", anyhow::Error::from(warning)));
    }
    credentials
}
