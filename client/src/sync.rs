//! The folder's barriers around a command, and what a person hears of them.
//!
//! Leaves all of the work to `tunnel/files.rs`. Before a command everything edited here is in the
//! sandbox; after it, everything it made and that is not ignored is here.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use towline_proto::v1::{self, stream_open::Kind};

use crate::commands::Env;
use crate::folder::ProjectFolder;
use crate::tunnel::files::{self, Report, Target};
use crate::tunnel::guest::{Guest, open_failed};
use crate::{config, env_vars, user};

/// Returns the folder that `tow` was typed in, if a sandbox has been synchronised with it: a look
/// at the file system only, so that `tow exec` elsewhere asks nobody.
pub fn known_folder() -> Option<ProjectFolder> {
    let cwd = std::env::current_dir().ok()?;
    let folder = ProjectFolder::find(&cwd, user::home().as_deref()).ok()?;
    mark(&folder.path).ok()?.exists().then_some(folder)
}

fn mark(folder: &Path) -> anyhow::Result<PathBuf> {
    let hash = blake3::hash(folder.as_os_str().as_bytes()).to_hex();
    Ok(env_vars::state_dir()?.join("folders").join(&hash.as_str()[..32]))
}

fn set_mark(folder: &Path) -> anyhow::Result<()> {
    let mark = mark(folder)?;
    if !mark.exists() {
        config::write_private(&mark, folder.as_os_str().as_bytes())
            .with_context(|| format!("could not write `{}`", mark.display()))?;
    }
    Ok(())
}

/// Makes the sandbox see what is in the folder now.
pub async fn before(
    guest: &Guest<'_>,
    found: &v1::Sandbox,
    folder: &ProjectFolder,
    env: &Env,
) -> anyhow::Result<()> {
    set_mark(&folder.path)?;
    let target = Target::new(&folder.path, &found.id)?;
    let shown = Arc::new(env.printer.progress("bringing the folder in"));
    let show = shown.clone();
    let report = files::push(
        async |open| open_files(guest, open).await,
        &target,
        Arc::new(move |text| show.set(format!("bringing the folder in: {text}"))),
    );
    let report = report.await?;
    drop(shown);
    say(&report, env, false);
    Ok(())
}

/// Brings back what the command changed.
pub async fn after(
    guest: &Guest<'_>,
    found: &v1::Sandbox,
    folder: &ProjectFolder,
    env: &Env,
) -> anyhow::Result<()> {
    let target = Target::new(&folder.path, &found.id)?;
    let shown = Arc::new(env.printer.progress("bringing changes back"));
    let show = shown.clone();
    let report = files::pull(
        async |open| open_files(guest, open).await,
        &target,
        Arc::new(move |text| show.set(format!("bringing changes back: {text}"))),
    );
    let report = report.await?;
    drop(shown);
    say(&report, env, true);
    Ok(())
}

async fn open_files(
    guest: &Guest<'_>,
    open: v1::FilesOpen,
) -> anyhow::Result<(
    towline_streams::FrameReader<tokio::net::unix::OwnedReadHalf>,
    towline_streams::FrameWriter<tokio::net::unix::OwnedWriteHalf>,
)> {
    let opened = guest.open(Kind::Files(open)).await.map_err(open_failed)?;
    Ok((opened.reader, opened.writer))
}

/// What is ignored is worth a hint; everything else that did not pass must not be missed.
fn say(report: &Report, env: &Env, after: bool) {
    let mut lines = report.lines();
    let ignored = if report.ignored_count > 0 { lines.pop() } else { None };
    for line in lines {
        env.printer.warning(crate::output::human::printable(&line));
    }
    if let Some(line) = ignored.filter(|_| after) {
        env.printer.hint(crate::output::human::printable(&line));
    }
}
