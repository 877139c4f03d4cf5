//! `tow cp` in the guest: makes an archive of what is asked for, or applies one, with the rights of
//! the user for whom it is done and beneath the workload's root.
//!
//! The work is plain blocking code on a thread of its own that has become that user: what the user
//! may not read or write, a copy may not either, and what it makes is the user's.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use towline_filesync::copy::{Base, CopyError, Totals, pack, source_name, unpack};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{CopyDirection, CopyDone, CopyOpen, StreamErrorCode, User};
use towline_streams::{FrameReader, FrameWriter, archive_reader, archive_writer};

use crate::refusal::Refusal;

/// Longest path, as Linux bounds those that it resolves.
const PATH_MAX: usize = 4095;

/// What a copy is done with.
#[derive(Debug)]
pub struct Copier<'a> {
    /// The workload's root.
    pub root: &'a Path,
    /// The project folder's path in the sandbox; empty without one.
    pub folder: &'a [u8],
    /// For whom.
    pub user: User,
}

/// One copy on its thread.
struct Job {
    root: PathBuf,
    path: Vec<u8>,
    user: User,
}

/// Serves one copy stream whose OPEN was read.
pub async fn serve<R, W>(
    copier: Copier<'_>,
    open: CopyOpen,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let done = serve_or_refuse(copier, open, &mut reader, &mut writer).await;
    let _ = match done {
        Ok(totals) => {
            let Totals { files, bytes, skipped } = totals;
            let done = CopyDone { files, bytes, skipped };
            writer.send_message(FrameKind::CopyDone, &done).await
        }
        Err(refusal) => writer.send_message(FrameKind::Error, &refusal.to_message()).await,
    };
    let _ = writer.finish().await;
}

async fn serve_or_refuse<R, W>(
    copier: Copier<'_>,
    open: CopyOpen,
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
) -> Result<Totals, Refusal>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if open.path.is_empty() || open.path.len() > PATH_MAX || open.path.contains(&0) {
        return Err(Refusal::invalid("the path is empty, too long, or holds a NUL byte"));
    }
    let path = match open.path.first() {
        Some(b'/') => open.path.clone(),
        _ => [copier.folder, b"/", &open.path].concat(),
    };
    let job = Job { root: copier.root.to_owned(), path, user: copier.user };
    match open.direction() {
        CopyDirection::FromSandbox => from_sandbox(job, writer).await,
        CopyDirection::ToSandbox => to_sandbox(job, &open, reader).await,
        CopyDirection::Unspecified => Err(Refusal::invalid("the copy has no direction")),
    }
}

async fn from_sandbox<W: AsyncWrite + Unpin>(
    job: Job,
    writer: &mut FrameWriter<W>,
) -> Result<Totals, Refusal> {
    let (mut archive, mut pieces) = archive_writer();
    let work = job.spawn(move |base, path| {
        let source = base.source(path).map_err(|error| cannot("read", path, &error))?;
        let totals = pack(&source, &mut archive).map_err(|error| refusal(&error))?;
        archive.finish().map_err(|error| Refusal::io("the copy's stream broke", &error))?;
        Ok(totals)
    })?;
    while let Some(piece) = pieces.recv().await {
        let frame = Frame::raw(FrameKind::CopyData, piece);
        if writer.send(&frame).await.is_err() {
            break;
        }
    }
    // Whoever still writes sees that nobody listens.
    drop(pieces);
    ended(work).await
}

async fn to_sandbox<R: AsyncRead + Unpin>(
    job: Job,
    open: &CopyOpen,
    reader: &mut FrameReader<R>,
) -> Result<Totals, Refusal> {
    let (pieces, mut archive) = archive_reader();
    let name = match open.name.is_empty() {
        true => None,
        false => Some(
            source_name(&open.name)
                .filter(|name| *name == open.name)
                .ok_or_else(|| Refusal::invalid("the copy's name is none of a file"))?
                .to_vec(),
        ),
    };
    let make = !open.must_exist;
    let mut work = job.spawn(move |base, path| {
        let place = base.place(path, name.as_deref(), make);
        let place = place.map_err(|error| cannot("write to", path, &error))?;
        let totals = unpack(&mut archive, &place, None).map_err(|error| refusal(&error))?;
        archive.drain().map_err(|error| Refusal::io("the copy's stream broke", &error))?;
        Ok(totals)
    })?;
    loop {
        tokio::select! {
            frame = reader.next() => match frame {
                Ok(Some(frame)) if frame.is(FrameKind::CopyData) => {
                    let last = frame.body.is_empty();
                    if pieces.send(frame.body).await.is_err() || last {
                        break;
                    }
                }
                Ok(Some(frame)) => {
                    let text = format!("a frame of kind {} came in a copy", frame.kind);
                    return Err(Refusal::invalid(text));
                }
                Ok(None) | Err(_) => break,
            },
            // Refused in the middle: the client is told at once.
            ended = &mut work => return ended.unwrap_or_else(|_| Err(died())),
        }
    }
    drop(pieces);
    ended(work).await
}

async fn ended(work: oneshot::Receiver<Result<Totals, Refusal>>) -> Result<Totals, Refusal> {
    work.await.unwrap_or_else(|_| Err(died()))
}

fn died() -> Refusal {
    Refusal::new(StreamErrorCode::Internal, "the copy's thread died")
}

fn refusal(error: &CopyError) -> Refusal {
    match error {
        CopyError::At { source, .. } => {
            Refusal { message: error.to_string(), ..Refusal::io("", source) }
        }
        CopyError::Refused { .. } => Refusal::invalid(error.to_string()),
        CopyError::Archive(_) | CopyError::Output(_) => {
            Refusal::new(StreamErrorCode::Invalid, error.to_string())
        }
    }
}

fn cannot(what: &str, path: &[u8], error: &io::Error) -> Refusal {
    let shown = String::from_utf8_lossy(path);
    match error.kind() {
        io::ErrorKind::NotFound => Refusal::new(
            StreamErrorCode::NotFound,
            format!("cannot {what} `{shown}`: there is no such file or directory in the sandbox"),
        ),
        io::ErrorKind::PermissionDenied => Refusal::new(
            StreamErrorCode::Invalid,
            format!("cannot {what} `{shown}`: the sandbox's user may not; `tow cp -u root` may"),
        ),
        _ => Refusal::io(format!("cannot {what} `{shown}`"), error),
    }
}

impl Job {
    /// Starts the work on a thread that has become the user.
    fn spawn(
        self,
        work: impl FnOnce(&Base, &[u8]) -> Result<Totals, Refusal> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<Totals, Refusal>>, Refusal> {
        let (tell, told) = oneshot::channel();
        let run = move || {
            let result = self.base().and_then(|base| {
                become_user(&self.user)
                    .map_err(|error| Refusal::io("cannot become the sandbox's user", &error))?;
                work(&base, &self.path)
            });
            let _ = tell.send(result);
        };
        std::thread::Builder::new()
            .name("copy".into())
            .spawn(run)
            .map_err(|error| Refusal::io("cannot start a thread for the copy", &error))?;
        Ok(told)
    }

    fn base(&self) -> Result<Base, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory: OwnedFd = rustix::fs::open(&self.root, flags, Mode::empty())
            .map_err(|error| Refusal::io("cannot open the sandbox's root", &error.into()))?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(Base { directory, resolve })
    }
}

/// Makes this thread, and no other, the user's. One that is not privileged can only be itself.
fn become_user(user: &User) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if !rustix::process::geteuid().is_root() {
        return match rustix::process::geteuid() == uid {
            true => Ok(()),
            false => Err(io::ErrorKind::PermissionDenied.into()),
        };
    }
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}
