//! `tow image export`: an image of the cluster as an archive or a folder, for other tools.

use std::path::{Path, PathBuf};

use clap::Args;
use towline_proto::v1;

use crate::cluster::Cluster;
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::output::{human, json};
use crate::tunnel::export::{self, Destination};

/// Arguments of `tow image export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The image
    pub name: String,
    /// A name that ends in .tar for an archive, - for the same on stdout, else a new folder
    pub path: PathBuf,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

/// Writes an image that is in the cluster; returns the archive's bytes.
pub(in crate::commands) async fn write(
    cluster: &Cluster,
    image: &v1::Image,
    to: &Destination,
    env: &Env,
) -> anyhow::Result<u64> {
    let progress = env.printer.progress(format!("exporting {}", image.name));
    let show = |step: &_| progress.set(super::describe("exporting", &image.name, step));
    super::where_it_is(cluster, env, async |guest| {
        export::run(guest, &image.digest, &image.name, to, show).await
    })
    .await
}

pub(super) async fn run(args: ExportArgs, env: &Env) -> Outcome {
    if args.json && args.path == Path::new("-") {
        let failure = Failure::usage("the archive and an object cannot both go to stdout");
        return Err(failure.hint("name a file, or leave out --json").into());
    }
    let to = Destination::at(&args.path)?;
    let (cluster, images) = super::list(env).await?;
    let image = super::pick(&images, &args.name)?;
    let bytes = write(&cluster, image, &to, env).await?;
    let shown = args.path.display();
    match (to, env.printer.json()) {
        (Destination::Stdout, _) => {}
        (_, true) => env.printer.object(&json::image_exported(image, &args.path, bytes))?,
        (to, false) => {
            env.printer.answer(&image.digest)?;
            let next = match to {
                Destination::Archive(_) => format!(": `docker load -i {shown}` reads it"),
                Destination::Layout(_) => format!(": `skopeo copy oci:{shown} …` reads it"),
                Destination::Stdout => String::new(),
            };
            env.printer.hint(format!("wrote {}{next}", human::bytes(bytes)));
        }
    }
    Ok(Exit::OK)
}
