//! The project folder between this machine and a sandbox: what the laptop has goes in before a
//! command, what the command made comes back after it.
//!
//! A barrier makes both sides agree, in both directions, and loses no edit of either; `push` and
//! `pull` differ in what they may take for granted. The laptop decides everything
//! (`files/barrier.rs`), by the rules of `towline-filesync`; the guest only carries out.

mod barrier;
mod down;
mod link;
mod report;
mod state;
mod trees;
mod up;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncWrite};
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::v1::FilesOpen;
use towline_streams::{FrameReader, FrameWriter};

pub use barrier::Direction;
pub use link::SyncError;
pub use report::Report;

use barrier::Barrier;
use state::Store;

/// How often a barrier is begun anew when its stream breaks.
const ATTEMPTS: u32 = 5;

/// The wait before the second attempt; it doubles.
const BACKOFF: Duration = Duration::from_millis(200);

/// Told what is being done, in a few words.
pub type Progress = Arc<dyn Fn(String) + Send + Sync>;

/// What is synchronised with what.
#[derive(Debug, Clone)]
pub struct Target {
    /// The folder's real path.
    pub folder: PathBuf,
    /// Where the state of this sandbox is kept: see [`state_directory`].
    pub state: PathBuf,
}

impl Target {
    /// The folder and this user's state of a sandbox.
    pub fn new(folder: &Path, sandbox_id: &[u8]) -> anyhow::Result<Self> {
        Ok(Self { folder: folder.to_owned(), state: state_directory(sandbox_id)? })
    }
}

/// Makes the sandbox see every edit made here before this call.
pub async fn push<R, W>(
    open: impl AsyncFn(FilesOpen) -> anyhow::Result<(FrameReader<R>, FrameWriter<W>)>,
    target: &Target,
    progress: Progress,
) -> anyhow::Result<Report>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    synchronise(open, target, Direction::Up, progress).await
}

/// Brings back everything that was changed in the sandbox before this call.
pub async fn pull<R, W>(
    open: impl AsyncFn(FilesOpen) -> anyhow::Result<(FrameReader<R>, FrameWriter<W>)>,
    target: &Target,
    progress: Progress,
) -> anyhow::Result<Report>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    synchronise(open, target, Direction::Down, progress).await
}

/// Where the state of a sandbox's folder is kept: `$XDG_STATE_HOME/towline/sync/ID`.
pub fn state_directory(sandbox_id: &[u8]) -> anyhow::Result<PathBuf> {
    let absolute = |value: &OsString| Path::new(value).is_absolute();
    let base = match std::env::var_os("XDG_STATE_HOME").filter(absolute) {
        Some(base) => PathBuf::from(base),
        None => {
            let home = std::env::var_os("HOME").filter(absolute);
            PathBuf::from(home.context("neither XDG_STATE_HOME nor HOME is set")?)
                .join(".local/state")
        }
    };
    let mut id = String::new();
    sandbox_id.iter().try_for_each(|byte| write!(id, "{byte:02x}"))?;
    Ok(base.join("towline/sync").join(id))
}

/// Forgets a sandbox that was removed.
pub fn forget(sandbox_id: &[u8]) -> anyhow::Result<()> {
    let directory = state_directory(sandbox_id)?;
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("could not remove `{}`", directory.display())),
    }
}

async fn synchronise<R, W>(
    open: impl AsyncFn(FilesOpen) -> anyhow::Result<(FrameReader<R>, FrameWriter<W>)>,
    target: &Target,
    direction: Direction,
    progress: Progress,
) -> anyhow::Result<Report>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let store = take_turn(target, &progress).await?;
    let mut attempt = 1;
    loop {
        let stream = open(FilesOpen { session_id: session_id()?, protocol: GUEST_PROTOCOL }).await;
        let (reader, writer) = stream.context("could not open a stream for the folder's files")?;
        let barrier =
            Barrier::new(&target.folder, Arc::clone(&store), direction, progress.clone())?;
        let done =
            link::with_stream(reader, writer, move |out, incoming| barrier.run(&out, incoming));
        match done.await {
            Ok(report) => return Ok(report),
            Err(error) if error.may_retry() && attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "the barrier begins anew");
                progress(format!("the stream broke, trying again ({attempt} of {ATTEMPTS})"));
                tokio::time::sleep(BACKOFF * 2u32.pow(attempt - 1)).await;
                attempt += 1;
            }
            Err(error) => {
                let folder = target.folder.display();
                return Err(anyhow::Error::new(error)
                    .context(format!("could not synchronise `{folder}` with the sandbox")));
            }
        }
    }
}

async fn take_turn(target: &Target, progress: &Progress) -> anyhow::Result<Arc<Store>> {
    let (state, progress) = (target.state.clone(), progress.clone());
    let open = move || {
        Store::open(&state, || progress("waiting for another `tow` that syncs this folder".into()))
    };
    Ok(Arc::new(tokio::task::spawn_blocking(open).await??))
}

fn session_id() -> anyhow::Result<Vec<u8>> {
    let mut id = vec![0; 16];
    rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())
        .context("the kernel gave no randomness")?;
    Ok(id)
}
