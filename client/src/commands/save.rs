//! `tow save`: makes an image of a running sandbox: the image that it is of, and one layer more with
//! what it changed; or one layer of all that it has.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use towline_proto::ids::SandboxId;
use towline_proto::v1::{
    self, AllowedSecret, ArgumentList, ImageImported, ImageSettings, LayerCompression, SaveOpen,
    SaveSecrets, Saved,
};

use super::image;
use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Failure, Outcome};
use crate::folder::ProjectFolder;
use crate::output::{human, json as objects};
use crate::tunnel::export::Destination;
use crate::tunnel::guest::Guest;
use crate::tunnel::save;
use crate::{env_vars, sandbox, sync};

/// Arguments of `tow save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Name or id of the sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// What the image is to be called, for example web:2
    #[arg(value_name = "REF")]
    pub image: String,
    /// How the new layer is packed; gzip is for docker before 23
    #[arg(long, value_enum, default_value_t = Packing::Zstd, value_name = "HOW")]
    pub compression: Packing,
    /// Make one layer of all that the sandbox has, instead of one more on top of its image's
    #[arg(long)]
    pub squash: bool,
    /// Take the project folder into the image, at its place, with every edit made here until now
    #[arg(long)]
    pub with_folder: bool,
    /// Seconds since 1970 that later times become, instead of when the sandbox's image was made
    #[arg(long, value_name = "SECONDS", conflicts_with = "keep_times")]
    pub timestamp: Option<u64>,
    /// Leave times as they are: the same state is another image later
    #[arg(long)]
    pub keep_times: bool,
    /// What the image runs: a list in JSON, or a line for /bin/sh
    #[arg(long, value_name = "COMMAND")]
    pub cmd: Option<String>,
    /// What the image always starts: a list in JSON, or a line for /bin/sh
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Set an environment variable of the image
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory of the image
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User of the image
    #[arg(long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Set a label of the image
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// What to say in the image's history
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub message: String,
    /// Let the secrets in this file or directory into the image
    #[arg(long, value_name = "PATH", requires = "reason")]
    pub allow_secret: Vec<String>,
    /// Why; it is written into the image
    #[arg(long, value_name = "TEXT", requires = "allow_secret")]
    pub reason: Option<String>,
    /// Write the image, too: a name that ends in .tar for an archive, else a new folder
    #[arg(long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Push the image to the registry that its name says, too
    #[arg(long)]
    pub push: bool,
    /// Allow plain HTTP for it, which anybody on the way can read and change
    #[arg(long, requires = "push")]
    pub insecure: bool,
    /// Print an object
    #[arg(long)]
    pub json: bool,
}

/// `--compression`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Packing {
    /// Small and quick
    Zstd,
    /// Read by everything
    Gzip,
}

pub(super) async fn run(args: SaveArgs, env: &Env) -> Outcome {
    image::check_name(&args.image)?;
    let open = args.open()?;
    // What cannot go where it should is not made at all.
    let output = args.output.as_deref().map(destination).transpose()?;
    let registry = match args.push {
        true => Some(image::push::destination(&args.image)?),
        false => None,
    };
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let found = sandbox::find(&cluster, &args.name).await?;
    sandbox::must_run(&found, "saved")?;
    let guest = Guest::of(env, cluster, &found)?;
    let folder = found.spec.as_ref().and_then(ProjectFolder::of_sandbox);
    if let Some(folder) = folder.filter(|_| args.with_folder) {
        sync::before(&guest, &found, &folder, env).await?;
    }
    let progress = env.printer.progress(format!("saving {}", args.name));
    let show = |step: &v1::ImageImportProgress| {
        progress.set(image::describe("saving", &args.name, step));
    };
    let outcome = save::run(&guest, open, show).await?;
    drop(progress);
    let saved = match outcome {
        save::Outcome::Saved(saved) => saved,
        save::Outcome::Secrets(secrets) => return Err(refused(&secrets, &args, env)?.into()),
    };
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    let imported =
        ImageImported { digest: saved.digest.clone(), bytes: saved.bytes, layers: saved.layers };
    let image = image::put(&cluster, &args.image, &imported).await?;
    if !saved.one_instant {
        env.printer.warning(
            "the files in the image are not all of one instant: the sandbox, or the sync of its \
             folder, went on while it was saved",
        );
    }
    match env.printer.json() {
        true => env.printer.object(&object(&found, &args.image, &saved))?,
        false => env.printer.answer(&saved.digest)?,
    }
    env.printer.hint(said(&args.image, args.squash, &saved));
    let is_kept = || format!("{} is saved all the same; `tow image ls` lists it", args.image);
    if let Some(output) = output {
        image::export::write(&cluster, &image, &output, env).await.with_context(is_kept)?;
    }
    if let Some(registry) = registry {
        let (_, images) = image::list(env).await?;
        let to = (&args.image[..], &registry);
        let pushed = image::push::send(&cluster, (&image, &images), to, args.insecure, env);
        env.printer.hint(image::push::said(&pushed.await.with_context(is_kept)?));
    }
    Ok(Exit::OK)
}

fn destination(path: &Path) -> anyhow::Result<Destination> {
    if path == Path::new("-") {
        let text = "the image's digest goes to stdout: the image cannot go there too";
        return Err(Failure::usage(text).hint("`tow image export NAME -` writes it there").into());
    }
    Destination::at(path)
}

impl SaveArgs {
    fn open(&self) -> anyhow::Result<SaveOpen> {
        for pair in self.env.iter().chain(&self.label) {
            if pair.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
                return Err(Failure::usage(format!("`{pair}` is not NAME=VALUE")).into());
            }
        }
        if let Some(workdir) = self.workdir.as_ref().filter(|workdir| !workdir.starts_with('/')) {
            let text = format!("`{workdir}` is not absolute");
            return Err(Failure::usage(text).hint("a working directory begins with /").into());
        }
        let reason = self.reason.clone().unwrap_or_default();
        let allowed = |path: &String| match path.starts_with('/') {
            true => Ok(AllowedSecret { path: path.clone().into(), reason: reason.clone() }),
            false => Err(Failure::usage(format!("`{path}` is not absolute"))
                .hint("name the path as it was told, beginning with /")),
        };
        let compression = match self.compression {
            Packing::Zstd => LayerCompression::Zstd,
            Packing::Gzip => LayerCompression::Gzip,
        };
        Ok(SaveOpen {
            timestamp_s: self.timestamp_s()?,
            keep_times: self.keep_times,
            compression: compression.into(),
            settings: Some(ImageSettings {
                cmd: self.cmd.as_deref().map(arguments).transpose()?,
                entrypoint: self.entrypoint.as_deref().map(arguments).transpose()?,
                env: self.env.clone(),
                workdir: self.workdir.clone(),
                user: self.user.clone(),
                labels: self.label.clone(),
                message: self.message.clone(),
            }),
            squash: self.squash,
            with_folder: self.with_folder,
            allowed_secrets: self.allow_secret.iter().map(allowed).collect::<Result<_, _>>()?,
        })
    }
}

impl SaveArgs {
    /// As typed, or as builds are told.
    fn timestamp_s(&self) -> anyhow::Result<Option<u64>> {
        if self.timestamp.is_some() || self.keep_times {
            return Ok(self.timestamp);
        }
        let Some(text) = env_vars::get(env_vars::SOURCE_DATE_EPOCH) else { return Ok(None) };
        let seconds = text.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| {
            let text = format!("SOURCE_DATE_EPOCH is {text:?}: no number of seconds");
            Failure::usage(text).hint("unset it, or use `--timestamp`")
        })?;
        Ok(Some(seconds))
    }
}

/// As in a Dockerfile: a list, or a line for the shell.
fn arguments(typed: &str) -> anyhow::Result<ArgumentList> {
    if !typed.trim_start().starts_with('[') {
        let line = ["/bin/sh", "-c", typed].map(str::to_owned).to_vec();
        return Ok(ArgumentList { arguments: line });
    }
    let arguments = serde_json::from_str(typed).map_err(|error| {
        Failure::usage(format!("`{typed}` is no list of texts: {error}"))
            .hint(r#"for example '["python3", "app.py"]'"#)
    })?;
    Ok(ArgumentList { arguments })
}

/// Tells what was found, never the secrets themselves.
fn refused(secrets: &SaveSecrets, args: &SaveArgs, env: &Env) -> anyhow::Result<Failure> {
    for finding in &secrets.findings {
        let place = human::printable(&String::from_utf8_lossy(&finding.place));
        match env.printer.json() {
            true => env.printer.object(&json!({
                "schema": "towline.secret-finding/1",
                "place": place,
                "line": (finding.line > 0).then_some(finding.line),
                "rule": finding.rule,
            }))?,
            false => {
                let line = match finding.line {
                    0 => String::new(),
                    line => format!(":{line}"),
                };
                env.printer.warning(format!("{place}{line}: {}", finding.rule));
            }
        }
    }
    let more = if secrets.more { "more than " } else { "" };
    let text = format!(
        "there is no image: it would give away {more}{} secrets of {}",
        secrets.findings.len(),
        args.name
    );
    let hint = "remove them from the sandbox, or add `--allow-secret PATH --reason TEXT` where it \
                is none";
    Ok(Failure::new(text).hint(hint))
}

fn said(name: &str, squash: bool, saved: &Saved) -> String {
    if saved.layer_bytes == 0 {
        return format!("{name} has the layers of the sandbox's image: no file has changed");
    }
    let (files, below) = match squash {
        true => ("files", ""),
        false => ("changes", ", on top of the sandbox's image"),
    };
    format!(
        "{name}: one layer of {} {files}, {} ({} unpacked){below}",
        saved.entries,
        human::bytes(saved.layer_bytes),
        human::bytes(saved.layer_unpacked_bytes)
    )
}

fn object(found: &v1::Sandbox, name: &str, saved: &Saved) -> serde_json::Value {
    json!({
        "schema": "towline.saved-image/1",
        "sandbox": sandbox::name(found),
        "sandbox_id": objects::id_text::<SandboxId>(&found.id),
        "name": name,
        "digest": saved.digest,
        "bytes": saved.bytes,
        "layers": saved.layers,
        "changes": saved.entries,
        "layer_bytes": saved.layer_bytes,
        "layer_unpacked_bytes": saved.layer_unpacked_bytes,
        "sockets_left_out": saved.sockets,
        "volatile_left_out": saved.volatile,
        "one_instant": saved.one_instant,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lists_or_lines_of_a_shell() {
        let of = |text: &str| arguments(text).map(|list| list.arguments);
        assert_eq!(of("make run").unwrap(), ["/bin/sh", "-c", "make run"]);
        assert_eq!(of(r#" ["a b","c"]"#).unwrap(), ["a b", "c"]);
        assert_eq!(of("[]").unwrap(), [""; 0]);
        assert!(of(r#"["a", 1]"#).is_err());
    }

    /// What programs read: a change here is a change of the contract.
    #[test]
    fn saved_images_are_printed_as_reviewed() {
        let found = v1::Sandbox {
            id: SandboxId::from_parts(1, [0; 10]).to_vec(),
            spec: Some(v1::SandboxSpec { name: "web".into(), ..Default::default() }),
            ..Default::default()
        };
        let saved = Saved {
            digest: "sha256:1".into(),
            bytes: 3 << 20,
            layers: 2,
            entries: 7,
            layer_bytes: 1 << 20,
            layer_unpacked_bytes: 2 << 20,
            one_instant: true,
            ..Saved::default()
        };
        assert_eq!(
            said("web:2", false, &saved),
            "web:2: one layer of 7 changes, 1 MiB (2 MiB unpacked), on top of the sandbox's image"
        );
        insta::assert_json_snapshot!(object(&found, "web:2", &saved));
    }
}
