//! Makes an image of a sandbox for a laptop's stream: one SaveOpen, answered by progress and at last
//! SAVED or an ERROR.
//!
//! What changed comes from the guest, frame by frame, and is written on a blocking thread; a few
//! frames wait between, no more. A laptop that goes away ends it, and so does the guest: then there is
//! no image. The sandbox goes on in any case.

use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use towline_images::save::{
    Allowed, Compression, Save, SaveError, SaveRequest, SavedImage, Settings, Times,
};
use towline_images::secrets::Finding;
use towline_images::{Digest, Store};
use towline_link::stream::{LinkSend, LinkStream};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    AllowedSecret, ImageImportProgress, ImageSettings, LayerCompression, LayerDone, LayerOpen,
    LayerPart, SaveOpen, SaveSecrets, Saved, SecretFinding, StreamError, StreamErrorCode,
    StreamOpen,
};
use towline_streams::{FrameReader, FrameWriter, MuxRecv, MuxSend};

use crate::gates::{Pass, Refused};
use crate::image_pull::image_code;
use crate::streams;

/// Images that are made at once; each uses a CPU. Further ones wait.
const SAVES_MAX: usize = 2;
/// Frames of up to 1 MiB that wait for the writer.
const WAITING_MAX: usize = 4;
/// How long a guest may say nothing: it tells every second that it goes on.
const SILENCE_MAX: Duration = Duration::from_secs(180);
/// Between two reports of progress.
const PROGRESS_PAUSE: Duration = Duration::from_millis(250);
/// Settings of an image: each far above what an image has.
const TEXTS_MAX: usize = 1000;
const TEXT_MAX: usize = 64 << 10;

/// What sandboxes are saved with.
#[derive(Debug)]
pub(crate) struct Saves {
    store: Store,
    at_once: Semaphore,
}

/// The sandbox that is saved.
pub(crate) struct Source {
    /// Digest of its image.
    pub(crate) base: Digest,
    /// What that was called.
    pub(crate) base_name: String,
    /// A stream to its guest.
    pub(crate) guest: (MuxSend, MuxRecv),
    /// Says when its streams must end.
    pub(crate) pass: Pass,
}

impl Saves {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, at_once: Semaphore::new(SAVES_MAX) }
    }

    /// Serves one.
    pub(crate) async fn serve(&self, open: SaveOpen, source: Source, stream: LinkStream) {
        let LinkStream { mut reader, mut writer } = stream;
        let Source { base, base_name, guest, pass } = source;
        let work = async {
            let layer = LayerOpen { whole: open.squash, with_folder: open.with_folder };
            let request = request(open, base, base_name)?;
            let _permit = self.at_once.acquire().await;
            self.save(request, layer, guest, &mut writer).await
        };
        let result = tokio::select! {
            result = work => result,
            // The laptop has nothing more to say: whatever comes is its end.
            _ = reader.next() => {
                tracing::info!(%base, "a save ended: the laptop went away");
                return;
            }
            () = pass.revoked() => {
                let why = "the sandbox was stopped while it was saved";
                Err(Refused::new(StreamErrorCode::NotRunning, why))
            }
        };
        let frame = match result {
            Ok(Outcome::Saved(saved)) => {
                tracing::info!(digest = saved.digest, entries = saved.entries, "sandbox saved");
                Frame::message(FrameKind::Saved, &saved)
            }
            Ok(Outcome::Secrets(secrets)) => {
                tracing::info!(secrets = secrets.findings.len(), "a save was refused");
                Frame::message(FrameKind::SaveSecrets, &secrets)
            }
            Err(refused) => {
                tracing::info!(reason = refused.message, "a save failed");
                return streams::refuse(&mut writer, &refused).await;
            }
        };
        if writer.send(&frame).await.is_err() || writer.finish().await.is_err() {
            crate::tunnel::give_up(LinkStream { reader, writer });
        }
    }

    async fn save(
        &self,
        request: SaveRequest,
        layer: LayerOpen,
        (send, recv): (MuxSend, MuxRecv),
        laptop: &mut FrameWriter<LinkSend>,
    ) -> Result<Outcome, Refused> {
        let (mut reader, mut writer) = streams::framed(recv, send);
        let (frames, waiting) = mpsc::channel(WAITING_MAX);
        let store = self.store.clone();
        let written = tokio::task::spawn_blocking(move || write(&store, request, waiting));
        let open = StreamOpen { ticket: Vec::new(), kind: Some(Kind::Layer(layer)) };
        let asked = writer.send_message(FrameKind::Open, &open).await;
        let done = match asked {
            Ok(()) => pass_on(&mut reader, frames, laptop).await,
            Err(error) => Err(Ended::Refused(gone(&error.to_string()))),
        };
        let written = written.await.map_err(|error| {
            Refused::new(StreamErrorCode::Internal, format!("the image's writer died: {error}"))
        })?;
        match (done, written) {
            (Err(Ended::Refused(refused)), _) => Err(refused),
            (_, Err(SaveError::Secrets { found, more })) => {
                let findings = found.iter().map(finding).collect();
                Ok(Outcome::Secrets(SaveSecrets { findings, more }))
            }
            (_, Err(error)) => Err(Refused::new(code(&error), crate::chain(&error))),
            (Ok(done), Ok(Some(image))) => Ok(Outcome::Saved(saved(&image, &done))),
            (Ok(_) | Err(Ended::WriterStopped), Ok(_)) => {
                Err(Refused::new(StreamErrorCode::Internal, "the image was not ended"))
            }
        }
    }
}

/// What is told.
enum Outcome {
    Saved(Saved),
    Secrets(SaveSecrets),
}

/// Why the guest's frames were not passed on to their end.
enum Ended {
    Refused(Refused),
    /// It has its reason.
    WriterStopped,
}

/// What the writer is given.
enum Item {
    Frame(Frame),
    /// All has come.
    End,
}

/// Gives the guest's frames to the writer until the guest has said all.
async fn pass_on(
    guest: &mut FrameReader<MuxRecv>,
    frames: mpsc::Sender<Item>,
    laptop: &mut FrameWriter<LinkSend>,
) -> Result<LayerDone, Ended> {
    let refused = |code, why: String| Ended::Refused(Refused::new(code, why));
    let mut progress = ImageImportProgress { stage: "looking".into(), ..Default::default() };
    let mut told = Instant::now();
    loop {
        let frame = match timeout(SILENCE_MAX, guest.next()).await {
            Ok(Ok(Some(frame))) => frame,
            Ok(Ok(None)) => return Err(Ended::Refused(gone("it ended"))),
            Ok(Err(error)) => return Err(Ended::Refused(gone(&error.to_string()))),
            Err(_) => {
                let why = format!("the guest said nothing for {} s", SILENCE_MAX.as_secs());
                return Err(refused(StreamErrorCode::TimedOut, why));
            }
        };
        if frame.is(FrameKind::LayerDone) {
            let done = frame.decode::<LayerDone>();
            let done = done.map_err(|e| refused(StreamErrorCode::Invalid, e.to_string()))?;
            frames.send(Item::End).await.map_err(|_| Ended::WriterStopped)?;
            return Ok(done);
        }
        if frame.is(FrameKind::Error) {
            let error: StreamError = frame.decode().unwrap_or_default();
            let message = error.message.chars().take(4 * 1024).collect::<String>();
            return Err(refused(error.code(), message));
        }
        progress.done = progress.done.saturating_add(frame.body.len() as u64);
        frames.send(Item::Frame(frame)).await.map_err(|_| Ended::WriterStopped)?;
        if told.elapsed() >= PROGRESS_PAUSE {
            told = Instant::now();
            progress.stage = "saving".into();
            // Who does not listen has gone, which is seen elsewhere.
            let _ = laptop.send_message(FrameKind::ImportProgress, &progress).await;
        }
    }
}

fn gone(why: &str) -> Refused {
    let text = format!("the guest went away while its files were read: {why}");
    Refused::new(StreamErrorCode::NotRunning, text)
}

/// Writes what comes; nothing when it ended early.
fn write(
    store: &Store,
    request: SaveRequest,
    mut items: mpsc::Receiver<Item>,
) -> Result<Option<SavedImage>, SaveError> {
    let mut save = Save::begin(store, request)?;
    while let Some(item) = items.blocking_recv() {
        match item {
            Item::Frame(frame) => take(&mut save, &frame)?,
            Item::End => return save.finish().map(Some),
        }
    }
    Ok(None)
}

/// Takes one frame of a guest.
fn take(save: &mut Save, frame: &Frame) -> Result<(), SaveError> {
    if frame.is(FrameKind::LayerPart) {
        let part: LayerPart =
            frame.decode().map_err(|error| SaveError::Guest(error.to_string()))?;
        part.entries.iter().try_for_each(|entry| save.entry(entry))
    } else if frame.is(FrameKind::LayerData) {
        save.data(&frame.body)
    } else if frame.is(FrameKind::LayerHole) {
        let zeros = frame.body[..].try_into();
        let bad = |_| SaveError::Guest("a hole without a length".into());
        save.hole(u64::from_le_bytes(zeros.map_err(bad)?))
    } else {
        Err(SaveError::Guest(format!("a frame of kind {} was not expected", frame.kind)))
    }
}

/// Checks what a laptop asked for.
fn request(open: SaveOpen, base: Digest, base_name: String) -> Result<SaveRequest, Refused> {
    let invalid = |why: &str| Refused::new(StreamErrorCode::Invalid, why);
    let times = match (open.keep_times, open.timestamp_s) {
        (true, None) => Times::Keep,
        (true, Some(_)) => return Err(invalid("times cannot both be kept and clamped")),
        (false, None) => Times::Base,
        (false, Some(seconds)) => {
            Times::Clamp(i64::try_from(seconds).map_err(|_| invalid("the time is too late"))?)
        }
    };
    let compression = match open.compression() {
        LayerCompression::Unspecified | LayerCompression::Zstd => Compression::Zstd,
        LayerCompression::Gzip => Compression::Gzip,
    };
    let settings = settings(open.settings.unwrap_or_default())?;
    if open.allowed_secrets.len() > TEXTS_MAX {
        let why = format!("more than {TEXTS_MAX} paths whose secrets are let through");
        return Err(Refused::new(StreamErrorCode::Limit, why));
    }
    let allowed = open.allowed_secrets.into_iter().map(|AllowedSecret { path, reason }| {
        let path = path.strip_prefix(b"/").ok_or_else(|| invalid("a path begins with /"))?;
        if reason.is_empty() || reason.len() > TEXT_MAX || path.len() > TEXT_MAX {
            return Err(invalid("a secret that is let through has a reason"));
        }
        let path = path.strip_suffix(b"/").unwrap_or(path).to_vec();
        Ok(Allowed { path, reason })
    });
    let allowed = allowed.collect::<Result<_, _>>()?;
    let squash = open.squash;
    Ok(SaveRequest { base, base_name, squash, times, compression, settings, allowed })
}

fn settings(sent: ImageSettings) -> Result<Settings, Refused> {
    let invalid = |why: &str| Refused::new(StreamErrorCode::Invalid, why);
    let ImageSettings { cmd, entrypoint, env, workdir, user, labels, message } = sent;
    let lists = [cmd.as_ref(), entrypoint.as_ref()];
    let arguments = lists.iter().flatten().flat_map(|list| &list.arguments);
    let texts: Vec<&String> = arguments
        .chain(&env)
        .chain(&labels)
        .chain(workdir.iter().chain(&user))
        .chain([&message])
        .collect();
    if texts.len() > TEXTS_MAX || texts.iter().any(|text| text.len() > TEXT_MAX) {
        let why = format!(
            "an image's settings are at most {TEXTS_MAX} texts of at most {} KiB",
            TEXT_MAX >> 10
        );
        return Err(Refused::new(StreamErrorCode::Limit, why));
    }
    if texts.iter().any(|text| text.contains('\0')) {
        return Err(invalid("an image's settings cannot have a NUL"));
    }
    if workdir.as_ref().is_some_and(|workdir| !workdir.starts_with('/')) {
        return Err(invalid("an image's working directory is absolute"));
    }
    let pairs = |list: Vec<String>| -> Result<Vec<(String, String)>, Refused> {
        list.into_iter()
            .map(|pair| match pair.split_once('=') {
                Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
                _ => Err(invalid("settings of an image are NAME=VALUE")),
            })
            .collect()
    };
    Ok(Settings {
        cmd: cmd.map(|list| list.arguments),
        entrypoint: entrypoint.map(|list| list.arguments),
        env: pairs(env)?,
        workdir,
        user,
        labels: pairs(labels)?,
        message,
    })
}

fn saved(image: &SavedImage, done: &LayerDone) -> Saved {
    Saved {
        digest: image.image.digest.to_string(),
        bytes: image.image.bytes,
        layers: image.image.layers,
        entries: image.entries,
        layer_bytes: image.layer_bytes,
        layer_unpacked_bytes: image.layer_unpacked_bytes,
        sockets: done.sockets,
        volatile: done.volatile,
        one_instant: done.one_instant,
        allowed: image.allowed.iter().map(finding).collect(),
    }
}

fn finding(found: &Finding) -> SecretFinding {
    SecretFinding { place: found.path.clone(), line: found.line, rule: found.rule.into() }
}

fn code(error: &SaveError) -> StreamErrorCode {
    match error {
        SaveError::Entry { .. } | SaveError::Guest(_) => StreamErrorCode::Invalid,
        SaveError::Limit(_) => StreamErrorCode::Limit,
        SaveError::NoBase { .. } => StreamErrorCode::NotFound,
        SaveError::Secrets { .. } => StreamErrorCode::Blocked,
        SaveError::Image(error) => image_code(error),
    }
}
