//! `tow image`: images to start sandboxes from.
//!
//! `import` sends an OCI image layout to a node's store, which checks all of it, and then names
//! what came out in the control plane.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use towline_proto::v1;

use crate::cluster::{self, Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{human, json};
use crate::session::{Client, new_key};
use crate::tunnel::guest::Guest;
use crate::tunnel::import::{self, Source};

/// Verbs of `tow image`.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Import an OCI image layout: a folder, a tar archive, or - for standard input
    Import(ImportArgs),
    /// List images
    Ls(ImageLsArgs),
    /// Say everything known about images
    Inspect(ImageNamesArgs),
    /// Remove images; sandboxes that use them keep them
    Rm(ImageNamesArgs),
}

/// Arguments of `tow image import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The layout
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
            Self::Import(args) => args.json,
            Self::Ls(args) => args.json,
            Self::Inspect(args) | Self::Rm(args) => args.json,
        }
    }
}

pub(super) async fn run(verb: ImageVerb, env: &Env) -> Outcome {
    match verb {
        ImageVerb::Import(args) => import(args, env).await,
        ImageVerb::Ls(_) => ls(env).await,
        ImageVerb::Inspect(args) => inspect(args, env).await,
        ImageVerb::Rm(args) => rm(args, env).await,
    }
}

async fn import(args: ImportArgs, env: &Env) -> Outcome {
    if args.name.is_empty() || args.name == crate::spec::LOCAL {
        let text = format!("`{}` cannot be an image's name", args.name);
        return Err(Failure::usage(text)
            .hint("for example `tow image import DIR debian:12`")
            .into());
    }
    let source = Source::open(&args.path)?;
    let context = cluster::ensure(env, Start::Always).await?;
    let guest = Guest::image_store(env, &context)?;
    let progress = env.printer.progress(format!("importing {}", args.name));
    let show = |step: &v1::ImageImportProgress| progress.set(describe(&args.name, step));
    let imported = import::run(&guest, &args.name, source, show).await?;
    drop(progress);
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let image = v1::Image {
        name: args.name,
        digest: imported.digest,
        bytes: imported.bytes,
        created_ms: 0,
    };
    let request = v1::PutImageRequest { idempotency_key: new_key(), image: Some(image) };
    let call = |mut client: Client| {
        let request = request.clone();
        async move { client.put_image(request).await }
    };
    let image = cluster.call(call).await?;
    match env.printer.json() {
        true => env.printer.object(&json::image_record(&image))?,
        false => env.printer.answer(&image.digest)?,
    }
    Ok(Exit::OK)
}

fn describe(name: &str, step: &v1::ImageImportProgress) -> String {
    let stage = human::printable(&step.stage);
    match step.total {
        0 => format!("importing {name}: {stage} {}", human::bytes(step.done)),
        total => {
            format!(
                "importing {name}: {stage} {} of {}",
                human::bytes(step.done),
                human::bytes(total)
            )
        }
    }
}

async fn list(env: &Env) -> anyhow::Result<(Cluster, Vec<v1::Image>)> {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let call =
        |mut client: Client| async move { client.list_images(v1::ListImagesRequest {}).await };
    let images = cluster.call(call).await?.images;
    Ok((cluster, images))
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
        Failure::new(text)
            .hint("`tow image ls` lists them, `tow image import` brings one in")
            .into()
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
