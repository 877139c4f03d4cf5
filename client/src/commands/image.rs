//! `tow image`: images to start sandboxes from.
//!
//! `import` sends an image's archive to a node's store, `pull` has the node fetch it from a
//! registry; the node checks all of it, and then the control plane is told its name. `export` and
//! `push` are the way back.

pub(super) mod export;
pub(super) mod pull;
pub(super) mod push;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use oci_spec::distribution::Reference;
use towline_proto::v1;

use crate::cluster::{self, Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{human, json};
use crate::session::{Client, new_key};
use crate::tunnel::export::NotHere;
use crate::tunnel::guest::Guest;
use crate::tunnel::import::{self, Source};

/// Verbs of `tow image`.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Pull an image from a registry; again, to have its newest version
    Pull(pull::PullArgs),
    /// Import an image: an OCI layout (folder or archive), an archive of docker save, - for stdin
    Import(ImportArgs),
    /// Push an image to a registry, with what is not there yet
    Push(push::PushArgs),
    /// Write an image as an OCI layout or as an archive that docker load reads
    Export(export::ExportArgs),
    /// List images
    Ls(ImageLsArgs),
    /// Say everything known about images
    Inspect(ImageNamesArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Remove images; sandboxes that use them keep them
    Rm(ImageNamesArgs),
}

/// Arguments of `tow image import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The layout or archive
    pub path: PathBuf,
    /// The name that it gets, for example debian:12
    pub name: String,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tow image ls`.
#[derive(Debug, Args)]
pub struct ImageLsArgs {
    /// Print an object per image
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tow image tag`.
#[derive(Debug, Args)]
pub struct TagArgs {
    /// Name or digest of an image that is here
    #[arg(value_name = "REF")]
    pub image: String,
    /// The new name
    pub name: String,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `tow image inspect` and `rm`.
#[derive(Debug, Args)]
pub struct ImageNamesArgs {
    /// Names
    #[arg(required = true, value_name = "REF")]
    pub names: Vec<String>,
    /// Print an object per image
    #[arg(long)]
    pub json: bool,
}

impl ImageVerb {
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Pull(args) => args.json,
            Self::Import(args) => args.json,
            Self::Push(args) => args.json,
            Self::Export(args) => args.json,
            Self::Tag(args) => args.json,
            Self::Ls(args) => args.json,
            Self::Inspect(args) | Self::Rm(args) => args.json,
        }
    }
}

pub(super) async fn run(verb: ImageVerb, env: &Env) -> Outcome {
    match verb {
        ImageVerb::Pull(args) => pull::run(args, env).await,
        ImageVerb::Import(args) => import(args, env).await,
        ImageVerb::Push(args) => push::run(args, env).await,
        ImageVerb::Export(args) => export::run(args, env).await,
        ImageVerb::Tag(args) => tag(args, env).await,
        ImageVerb::Ls(_) => ls(env).await,
        ImageVerb::Inspect(args) => inspect(args, env).await,
        ImageVerb::Rm(args) => rm(args, env).await,
    }
}

async fn import(args: ImportArgs, env: &Env) -> Outcome {
    check_name(&args.name)?;
    let source = Source::open(&args.path)?;
    let context = cluster::ensure(env, Start::Always).await?;
    let guest = Guest::image_store(env, &context)?;
    let progress = env.printer.progress(format!("importing {}", args.name));
    let show =
        |step: &v1::ImageImportProgress| progress.set(describe("importing", &args.name, step));
    let imported = import::run(&guest, &args.name, source, show).await?;
    drop(progress);
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let image = put(&cluster, &args.name, &imported).await?;
    match env.printer.json() {
        true => env.printer.object(&json::image_record(&image))?,
        false => env.printer.answer(&image.digest)?,
    }
    Ok(Exit::OK)
}

/// An image is called as registries and archives can call it.
pub(super) fn check_name(name: &str) -> anyhow::Result<()> {
    let is_taken = name == crate::spec::LOCAL || name.starts_with("sha256:");
    if is_taken || name.parse::<Reference>().is_err() {
        let text = format!("`{name}` cannot be an image's name");
        return Err(Failure::usage(text)
            .hint("an image is called like debian:12 or team/web:2")
            .into());
    }
    Ok(())
}

/// Tells the control plane what a name means now.
pub(super) async fn put(
    cluster: &Cluster,
    name: &str,
    imported: &v1::ImageImported,
) -> anyhow::Result<v1::Image> {
    let image = v1::Image {
        name: name.to_owned(),
        digest: imported.digest.clone(),
        bytes: imported.bytes,
        created_ms: 0,
        sandboxes: 0,
    };
    let request = v1::PutImageRequest { idempotency_key: new_key(), image: Some(image) };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.put_image(request).await }
    };
    cluster.call(call).await
}

pub(super) fn describe(doing: &str, name: &str, step: &v1::ImageImportProgress) -> String {
    let (name, stage) = (human::printable(name), human::printable(&step.stage));
    match (step.done, step.total) {
        (0, 0) => format!("{doing} {name}: {stage}"),
        (done, 0) => format!("{doing} {name}: {stage} {}", human::bytes(done)),
        (done, total) => {
            format!("{doing} {name}: {stage} {} of {}", human::bytes(done), human::bytes(total))
        }
    }
}

pub(super) async fn list(env: &Env) -> anyhow::Result<(Cluster, Vec<v1::Image>)> {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let call =
        |mut client: Client| async move { client.list_images(v1::ListImagesRequest {}).await };
    let images = cluster.call(call).await?.images;
    Ok((cluster, images))
}

/// Does something with an image on the first node that has it.
async fn where_it_is<T>(
    cluster: &Cluster,
    env: &Env,
    work: impl AsyncFn(&Guest<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let call = |mut client: Client| async move { client.list_nodes(v1::ListNodesRequest {}).await };
    let mut nodes = cluster.call(call).await?.nodes;
    let answers = [v1::NodeState::Ready, v1::NodeState::Cordoned];
    nodes.retain(|node| answers.contains(&node.state()));
    let mut missing = None;
    for node in nodes {
        let guest = Guest::image_store_of(env, cluster.context(), node.id)?;
        match work(&guest).await {
            Err(error) if error.is::<NotHere>() => missing = Some(error),
            done => return done,
        }
    }
    Err(missing.unwrap_or_else(|| {
        Failure::new("no node is ready").hint("`tow node ls` says what they are doing").into()
    }))
}

async fn ls(env: &Env) -> Outcome {
    let (_, images) = list(env).await?;
    if env.printer.json() {
        images.iter().try_for_each(|image| env.printer.object(&json::image_record(image)))?;
        return Ok(Exit::OK);
    }
    let mut rows = vec![["NAME", "DIGEST", "SIZE", "AGE"].map(str::to_owned).to_vec()];
    rows.extend(images.iter().map(|image| {
        let age = human::age(image.created_ms);
        vec![image.name.clone(), short(&image.digest), human::bytes(image.bytes), age]
    }));
    human::table(&rows).iter().try_for_each(|line| env.printer.answer(line))?;
    Ok(Exit::OK)
}

fn short(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}

fn pick<'a>(images: &'a [v1::Image], name: &str) -> anyhow::Result<&'a v1::Image> {
    let found = images.iter().find(|image| image.name == name || image.digest == name);
    found.ok_or_else(|| {
        let text = format!("there is no image `{}`", human::printable(name));
        Failure::new(text).hint("`tow image ls` lists them, `tow image pull` brings one in").into()
    })
}

async fn inspect(args: ImageNamesArgs, env: &Env) -> Outcome {
    let (_, images) = list(env).await?;
    for name in &args.names {
        let object = json::image_record(pick(&images, name)?);
        match env.printer.json() {
            true => env.printer.object(&object)?,
            false => env.printer.answer(serde_json::to_string_pretty(&object)?)?,
        }
    }
    Ok(Exit::OK)
}

async fn tag(args: TagArgs, env: &Env) -> Outcome {
    check_name(&args.name)?;
    let (cluster, images) = list(env).await?;
    let image = pick(&images, &args.image)?;
    let same = v1::ImageImported { digest: image.digest.clone(), bytes: image.bytes, layers: 0 };
    let image = put(&cluster, &args.name, &same).await?;
    match env.printer.json() {
        true => env.printer.object(&json::image_record(&image))?,
        false => env.printer.answer(&image.digest)?,
    }
    Ok(Exit::OK)
}

async fn rm(args: ImageNamesArgs, env: &Env) -> Outcome {
    let (cluster, images) = list(env).await?;
    for name in &args.names {
        let image = pick(&images, name)?;
        let request =
            v1::DeleteImageRequest { idempotency_key: new_key(), name: image.name.clone() };
        let call = |mut client: Client| {
            let request = request.clone();
            async move { client.delete_image(request).await }
        };
        cluster.call(call).await.with_context(|| format!("removing image `{name}`"))?;
        match env.printer.json() {
            true => env.printer.object(&json::image_record(image))?,
            false => env.printer.answer(format!("removed image {}", image.name))?,
        }
    }
    Ok(Exit::OK)
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn an_image_is_called_as_registries_can_call_it() {
        for good in ["debian:12", "debian", "team/web:2", "127.0.0.1:5000/a/b:C_1", "ghcr.io/a/b"] {
            check_name(good).unwrap();
        }
        for bad in ["", "local", "sha256:1", "Bad Ref", "Debian:12", "a:b:c", "a//b", "a:", "-a"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
