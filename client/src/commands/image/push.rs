//! `tow image push`: an image of the cluster to a registry.
//!
//! The node sends it; the login is this user's, as for a pull. Layers that came from the same
//! registry need not be sent: it is told where it has them.

use clap::Args;
use oci_spec::distribution::Reference;
use towline_proto::v1;

use super::pull;
use crate::cluster::Cluster;
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{human, json};
use crate::tunnel::push;

/// Names that a registry is told as places where it may have layers.
const MOUNT_FROM_MAX: usize = 8;

/// Arguments of `tow image push`.
#[derive(Debug, Args)]
pub struct PushArgs {
    /// The image
    pub name: String,
    /// Where it goes, for example ghcr.io/owner/name:tag; the image's own name unless given
    pub target: Option<String>,
    /// Allow plain HTTP, which anybody on the way can read and change
    #[arg(long)]
    pub insecure: bool,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: PushArgs, env: &Env) -> Outcome {
    let target = args.target.as_deref().unwrap_or(&args.name);
    let reference = destination(target)?;
    let (cluster, images) = super::list(env).await?;
    let image = super::pick(&images, &args.name)?;
    let pushed = send(&cluster, (image, &images), (target, &reference), args.insecure, env).await?;
    if env.printer.json() {
        env.printer.object(&json::image_pushed(&image.name, &pushed))?;
    } else {
        env.printer.answer(human::printable(&pushed.digest))?;
        env.printer.hint(said(&pushed));
    }
    Ok(Exit::OK)
}

/// Sends an image that is in the cluster, among these.
pub(in crate::commands) async fn send(
    cluster: &Cluster,
    (image, images): (&v1::Image, &[v1::Image]),
    (target, reference): (&str, &Reference),
    insecure: bool,
    env: &Env,
) -> anyhow::Result<v1::ImagePushed> {
    let credentials = pull::login(reference, env).await;
    let open = v1::ImagePushOpen {
        digest: image.digest.clone(),
        reference: target.to_owned(),
        credentials,
        insecure,
        mount_from: mount_from(reference, image, images),
    };
    let progress = env.printer.progress(format!("pushing {target}"));
    let show = |step: &_| progress.set(super::describe("pushing", target, step));
    super::where_it_is(cluster, env, async |guest| push::run(guest, open.clone(), show).await).await
}

pub(in crate::commands) fn said(pushed: &v1::ImagePushed) -> String {
    let (there, mounted) = (pushed.blobs_there, pushed.blobs_mounted);
    let sent = human::bytes(pushed.bytes_sent);
    let reference = human::printable(&pushed.reference);
    format!(
        "pushed {reference}: {} parts sent ({sent}), {there} there already, {mounted} taken over",
        pushed.blobs_sent
    )
}

/// Where an image goes.
pub(in crate::commands) fn destination(target: &str) -> anyhow::Result<Reference> {
    if target.starts_with("sha256:") {
        let failure = Failure::usage("an image that is named by its digest needs a TARGET");
        return Err(failure.hint("for example ghcr.io/owner/name:tag").into());
    }
    pull::reference(target)
}

/// Images of the same registry, those that are the same image first.
fn mount_from(to: &Reference, image: &v1::Image, images: &[v1::Image]) -> Vec<String> {
    let is_near = |other: &&v1::Image| {
        other.name.parse::<Reference>().is_ok_and(|other| {
            other.registry() == to.registry() && other.repository() != to.repository()
        })
    };
    let mut near: Vec<_> = images.iter().filter(is_near).collect();
    near.sort_by_key(|other| other.digest != image.digest);
    near.into_iter().take(MOUNT_FROM_MAX).map(|other| other.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_taken_over_within_one_registry_only() {
        let image = |name: &str, digest: &str| v1::Image {
            name: name.into(),
            digest: digest.into(),
            ..Default::default()
        };
        let images = [
            image("reg:5000/base:1", "sha256:a"),
            image("debian:12", "sha256:a"),
            image("reg:5000/mine:2", "sha256:b"),
            image("reg:5000/same:1", "sha256:b"),
            image("Not A Name", "sha256:b"),
        ];
        let to = destination("reg:5000/mine").unwrap();
        assert_eq!(mount_from(&to, &images[2], &images), ["reg:5000/same:1", "reg:5000/base:1"]);
    }

    #[test]
    fn a_digest_is_no_destination() {
        let error = destination(&format!("sha256:{}", "a".repeat(64))).unwrap_err();
        assert!(error.to_string().contains("needs a TARGET"), "{error}");
    }
}
