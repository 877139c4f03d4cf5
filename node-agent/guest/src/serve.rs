//! Tells the streams of clients apart by their first frame and hands each to who serves it.
//!
//! A stream that says nothing, or something else than OPEN, costs a bounded time and one frame.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{PortList, StreamErrorCode, StreamOpen, User, stream_open::Kind};
use towline_streams::{FrameReader, FrameWriter};

use crate::copy::{self, Copier};
use crate::diff::{self, Trees};
use crate::exec::{self, ExecTable};
use crate::forward::{self, Forwards};
use crate::refusal::Refusal;
use crate::tcp::{self, TcpTable};
use crate::{credentials, files, layer, listening};

/// How long a stream may take to say what it is.
const OPEN_MAX: Duration = Duration::from_secs(30);

/// What a configured guest offers.
#[derive(Debug)]
pub struct Services {
    /// Its commands.
    pub execs: Arc<ExecTable>,
    /// The project folder as the agent sees it, and whose it is.
    pub folder: Option<(PathBuf, User)>,
    /// The sandbox's user.
    pub user: User,
    /// The workload's root as the agent sees it.
    pub root: PathBuf,
    /// What is compared for `tow diff`; absent where there is no overlay.
    pub trees: Option<Trees>,
    /// Connections that the laptop forwards.
    pub tcp: Arc<TcpTable>,
    /// Listeners whose connections the laptop takes.
    pub forwards: Arc<Forwards>,
}

impl Services {
    /// What a guest offers whose root is mounted at `root`.
    pub fn new(
        execs: Arc<ExecTable>,
        folder: Option<(PathBuf, User)>,
        user: User,
        root: PathBuf,
    ) -> Self {
        let forwards = Arc::<Forwards>::default();
        let tcp = TcpTable::new(Arc::clone(&forwards));
        Self { execs, folder, user, root, trees: None, tcp, forwards }
    }

    /// What a copy for this user is done with, the sandbox's where none is named.
    async fn copier(&self, user: Option<User>) -> Result<Copier<'_>, Refusal> {
        let settings = self.execs.settings();
        let user = match user {
            None => self.user.clone(),
            // Reads files of the sandbox, which may come from afar.
            Some(user) => {
                tokio::task::spawn_blocking(move || credentials::complete(user, &settings.files))
                    .await
                    .map_err(std::io::Error::other)
                    .and_then(|user| user)
                    .map_err(|error| Refusal::io("cannot look the user up", &error))?
            }
        };
        let folder = self.execs.folder();
        Ok(Copier { root: &self.root, folder, user })
    }
}

/// Serves one stream of a client.
pub async fn serve<R, W>(services: &Services, reader: R, writer: W)
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let (mut reader, mut writer) = (FrameReader::new(reader), FrameWriter::new(writer));
    let refusal = match read_open(&mut reader).await {
        Ok(Kind::Exec(open)) => return exec::serve(&services.execs, open, reader, writer).await,
        Ok(Kind::Files(open)) => match &services.folder {
            Some((root, user)) => {
                return files::serve(open, reader, writer, root, user.uid, user.gid).await;
            }
            None => Refusal::new(
                StreamErrorCode::Unsupported,
                "this sandbox was made without a project folder",
            ),
        },
        Ok(Kind::Ping(_)) => {
            return answer(&mut writer, &Frame::raw(FrameKind::Pong, &b""[..])).await;
        }
        Ok(Kind::ExecList(_)) => {
            let list = services.execs.list();
            return answer(&mut writer, &Frame::message(FrameKind::ExecList, &list)).await;
        }
        Ok(Kind::Tcp(open)) => return tcp::serve(&services.tcp, open, reader, writer).await,
        Ok(Kind::Forward(open)) => {
            let (run, user) = (services.root.join("run"), &services.user);
            return forward::serve(&services.forwards, open, &run, user, reader, writer).await;
        }
        Ok(Kind::Copy(open)) => match services.copier(open.user.clone()).await {
            Ok(copier) => return copy::serve(copier, open, reader, writer).await,
            Err(refusal) => refusal,
        },
        Ok(Kind::Diff(_)) => match &services.trees {
            Some(trees) => return diff::serve(trees.clone(), reader, writer).await,
            None => Refusal::new(StreamErrorCode::Unsupported, "this sandbox is not of an image"),
        },
        Ok(Kind::Layer(open)) => match &services.trees {
            Some(trees) => {
                return layer::serve(
                    open,
                    trees.clone(),
                    services.execs.workload(),
                    reader,
                    writer,
                )
                .await;
            }
            None => Refusal::new(StreamErrorCode::Unsupported, "this sandbox is not of an image"),
        },
        Ok(Kind::PortList(_)) => match tokio::task::spawn_blocking(listen_table).await {
            Ok(list) => {
                return answer(&mut writer, &Frame::message(FrameKind::PortList, &list)).await;
            }
            Err(_) => Refusal::new(StreamErrorCode::Internal, "the ports could not be listed"),
        },
        Ok(
            Kind::Control(_)
            | Kind::Fuse(_)
            | Kind::ImageImport(_)
            | Kind::ImagePull(_)
            | Kind::ImageExport(_)
            | Kind::ImagePush(_)
            | Kind::ImageCollect(_)
            | Kind::Save(_)
            | Kind::Egress(_)
            | Kind::Lookup(_)
            | Kind::Feed(_),
        ) => Refusal::new(StreamErrorCode::Unsupported, "the guest does not serve this stream"),
        Err(refusal) => refusal,
    };
    answer(&mut writer, &Frame::message(FrameKind::Error, &refusal.to_message())).await;
}

fn listen_table() -> PortList {
    listening::list(Path::new("/proc"))
}

async fn read_open<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> Result<Kind, Refusal> {
    let first = tokio::time::timeout(OPEN_MAX, reader.next())
        .await
        .map_err(|_| Refusal::invalid("the stream did not say what it is for"))?;
    let frame = match first {
        Ok(Some(frame)) if frame.is(FrameKind::Open) => frame,
        Ok(Some(frame)) => {
            return Err(Refusal::invalid(format!(
                "a stream begins with OPEN, not with a frame of kind {}",
                frame.kind
            )));
        }
        Ok(None) => return Err(Refusal::invalid("the stream ended before it began")),
        Err(error) => return Err(Refusal::invalid(error.to_string())),
    };
    let open: StreamOpen = frame.decode().map_err(|error| Refusal::invalid(error.to_string()))?;
    open.kind.ok_or_else(|| {
        Refusal::new(
            StreamErrorCode::Unsupported,
            "the guest agent does not know this kind of stream: it is older than the client",
        )
    })
}

/// Sends the one frame of a short stream; a client that has left needs none.
async fn answer<W: AsyncWrite + Unpin>(writer: &mut FrameWriter<W>, frame: &Frame) {
    if writer.send(frame).await.is_ok() {
        let _ = writer.finish().await;
    }
}
