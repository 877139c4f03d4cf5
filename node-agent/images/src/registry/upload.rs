//! One blob of an image, from the store to the registry: not at all if it is there, by the registry
//! itself if it has it elsewhere, else in parts.
//!
//! Where an upload stands is the registry's to say: after whatever went wrong it is asked, and the
//! upload goes on there, or begins anew where it is not known any more. Nothing of an upload that
//! broke off has a name in the registry.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::task::spawn_blocking;

use super::board::Line;
use super::content::Content;
use super::error::PullError;
use super::pace::PROGRESS;
use super::session::{Ask, Body, Session};
use crate::Store;
use crate::document::Blob;

/// Bytes of one request: large enough for every registry's idea of a part, small enough that one
/// which keeps only whole parts loses little.
const PART: u64 = 64 << 20;
/// What is sent in one request, without parts.
const SMALL: u64 = 1 << 20;
/// Repositories that are tried for one blob.
const MOUNTS_MAX: usize = 3;
/// Between two looks at how much went out.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// How a blob came to be in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    There,
    Mounted,
    Sent,
}

/// Repositories of the same registry that may have a blob.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    repositories: Vec<String>,
    /// The one that had the last blob has the next one, too, more often than not.
    best: AtomicUsize,
}

impl Mounts {
    pub(crate) fn new(repositories: Vec<String>) -> Mounts {
        Mounts { repositories, best: AtomicUsize::new(0) }
    }

    fn each(&self) -> impl Iterator<Item = (usize, &String)> {
        let best = self.best.load(Ordering::Relaxed);
        let all = self.repositories.iter().enumerate();
        all.clone().skip(best).chain(all.take(best)).take(MOUNTS_MAX)
    }
}

/// Makes sure that a blob is in the registry.
pub(crate) async fn upload(
    session: &Session,
    store: &Store,
    blob: Blob,
    what: &str,
    mounts: &Mounts,
    line: &Line,
) -> Result<How, PullError> {
    let mut sending = Sending { session, blob, what, line, place: Place::Nowhere, furthest: 0 };
    if session.retrying(|| sending.is_there()).await? {
        line.finish();
        return Ok(How::There);
    }
    let (of, name) = (store.clone(), what.to_owned());
    let content = spawn_blocking(move || Content::open(&of, blob, &name));
    let content = content.await.map_err(|_| PullError::Interrupted)??;
    let (mut failed, mut before, mut anew) = (0, 0, false);
    loop {
        let error = match sending.step(&content, mounts).await {
            Ok(None) => continue,
            Ok(Some(how)) => {
                line.finish();
                return Ok(how);
            }
            Err(error) => error,
        };
        if sending.furthest.saturating_sub(before) >= PROGRESS {
            failed = 0;
        }
        before = sending.furthest;
        failed += 1;
        let pause = match sending.after(&error, &mut anew) {
            After::GiveUp => None,
            After::Again => session.pace.pause(failed, error.passing().flatten()),
        };
        let Some(pause) = pause else {
            // One that cannot be reached is not waited for again.
            if error.passing().is_none() {
                sending.forget().await;
            }
            return Err(error);
        };
        tracing::info!(%error, failed, "a blob's upload failed, going on");
        line.say(format!("trying again ({error})"));
        tokio::time::sleep(pause).await;
        line.say("");
    }
}

/// A blob on its way.
struct Sending<'a> {
    session: &'a Session,
    blob: Blob,
    what: &'a str,
    line: &'a Line,
    place: Place,
    /// Bytes that the registry ever said it has.
    furthest: u64,
}

/// Where an upload stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Not begun.
    Nowhere,
    /// So many bytes are there.
    At(Url, u64),
    /// A request failed: the registry knows.
    Unsure(Url),
}

enum After {
    Again,
    GiveUp,
}

impl Sending<'_> {
    /// One step on the way; `Some` when the blob is there.
    async fn step(&mut self, content: &Content, mounts: &Mounts) -> Result<Option<How>, PullError> {
        match self.place.clone() {
            Place::Nowhere => match self.begin(mounts).await? {
                Some(url) => self.place = Place::At(url, 0),
                None => return Ok(Some(How::Mounted)),
            },
            Place::Unsure(url) => {
                // The answer that was lost may have been that all is well.
                if self.is_there().await? {
                    return Ok(Some(How::Sent));
                }
                self.place = self.look(url).await?;
                if let Place::At(_, got) = self.place {
                    self.furthest = self.furthest.max(got);
                    self.line.set(got);
                }
            }
            Place::At(url, offset) => {
                self.place = Place::Unsure(url.clone());
                let done = self.go_on(url.clone(), offset, content).await;
                if matches!(done, Err(PullError::TooMany { .. })) {
                    // It did not look at what came: there is nothing to ask.
                    self.place = Place::At(url, offset);
                }
                return done;
            }
        }
        Ok(None)
    }

    /// Sends what comes next.
    async fn go_on(
        &mut self,
        url: Url,
        offset: u64,
        content: &Content,
    ) -> Result<Option<How>, PullError> {
        let size = self.blob.size;
        if offset == size || (offset == 0 && size <= SMALL) {
            self.close(url, offset, content).await?;
            return Ok(Some(How::Sent));
        }
        let (url, offset) = self.part(url, offset, content).await?;
        self.furthest = self.furthest.max(offset);
        self.line.set(offset);
        self.place = Place::At(url, offset);
        Ok(None)
    }

    /// What to do after a step that failed.
    fn after(&mut self, error: &PullError, anew: &mut bool) -> After {
        let begun = self.place != Place::Nowhere;
        // The upload is not known any more.
        if begun && is_absent(error) {
            self.place = Place::Nowhere;
            return After::Again;
        }
        // Its parts do not fit together, which the beginning may mend.
        let misfit = matches!(error, PullError::Status { status: 400 | 409 | 416, .. });
        if begun && misfit && !*anew {
            *anew = true;
            self.place = Place::Nowhere;
            return After::Again;
        }
        if error.passing().is_some() { After::Again } else { After::GiveUp }
    }

    async fn is_there(&self) -> Result<bool, PullError> {
        let url = self.session.url(&format!("blobs/{}", self.blob.digest))?;
        match self.ask(Method::HEAD, url, Vec::new(), Body::Nothing).await {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Begins an upload; `None` when the registry had the blob in another repository.
    async fn begin(&self, mounts: &Mounts) -> Result<Option<Url>, PullError> {
        let mut begun: Option<Url> = None;
        for (number, from) in mounts.each() {
            let path = format!("blobs/uploads/?mount={}&from={from}", self.blob.digest);
            match self.post(&path).await {
                Ok(None) => {
                    mounts.best.store(number, Ordering::Relaxed);
                    self.cancel(begun).await;
                    return Ok(None);
                }
                // Not there: an upload began instead.
                Ok(Some(url)) => self.cancel(begun.replace(url)).await,
                Err(error) if error.passing().is_some() => return Err(error),
                // It may not be read from, or the registry knows nothing of mounts.
                Err(error) => tracing::debug!(%error, from, "no mount"),
            }
        }
        match begun {
            Some(url) => Ok(Some(url)),
            None => match self.post("blobs/uploads/").await? {
                Some(url) => Ok(Some(url)),
                None => Err(self.session.protocol("it has what nobody sent to it")),
            },
        }
    }

    async fn post(&self, path: &str) -> Result<Option<Url>, PullError> {
        let url = self.session.url(path)?;
        let response = self.ask(Method::POST, url, Vec::new(), Body::Nothing).await?;
        match response.status() {
            StatusCode::CREATED => Ok(None),
            StatusCode::ACCEPTED => Ok(Some(self.next(&response)?)),
            status => Err(self.session.protocol(&format!("it begins an upload with {status}"))),
        }
    }

    /// Sends the next part; returns where the upload is then, and how much of it there is.
    async fn part(&self, url: Url, from: u64, content: &Content) -> Result<(Url, u64), PullError> {
        let end = self.blob.size.min(from + PART);
        let range = (CONTENT_RANGE, format!("{from}-{}", end - 1));
        let headers = vec![binary(), range];
        let body = Body::Part(content, from..end);
        let sent = self.ask(Method::PATCH, url, headers, body);
        let response = self.watched(sent, content, from).await?;
        let got = range_end(&response).unwrap_or(end);
        if got > end {
            return Err(self.session.protocol("it has more than it was sent"));
        }
        if got <= from {
            let host = self.session.host();
            return Err(PullError::Cut { host, what: self.what.into(), got, size: self.blob.size });
        }
        Ok((self.next(&response)?, got))
    }

    /// Asks where the upload stands.
    async fn look(&self, url: Url) -> Result<Place, PullError> {
        let response = match self.ask(Method::GET, url, Vec::new(), Body::Nothing).await {
            Ok(response) => response,
            // It cannot be gone on with, whatever the reason.
            Err(error) if error.passing().is_none() && !is_refusal(&error) => {
                return Ok(Place::Nowhere);
            }
            Err(error) => return Err(error),
        };
        let got = range_end(&response).unwrap_or(0);
        // More than was ever sent is somebody else's.
        if got > self.blob.size {
            return Ok(Place::Nowhere);
        }
        let moved = response.headers().contains_key(LOCATION);
        let url = if moved { self.next(&response)? } else { response.url().clone() };
        Ok(Place::At(url, got))
    }

    /// Names the blob, with all of it where it is small.
    async fn close(&self, mut url: Url, offset: u64, content: &Content) -> Result<(), PullError> {
        url.query_pairs_mut().append_pair("digest", &self.blob.digest.to_string());
        if offset == self.blob.size {
            content.whole()?;
            self.ask(Method::PUT, url, vec![binary()], Body::Nothing).await?;
            return Ok(());
        }
        let body = Body::Part(content, 0..self.blob.size);
        let sent = self.ask(Method::PUT, url, vec![binary()], body);
        self.watched(sent, content, 0).await?;
        Ok(())
    }

    /// Shows how much went out while it does.
    async fn watched(
        &self,
        sent: impl Future<Output = Result<Response, PullError>>,
        content: &Content,
        from: u64,
    ) -> Result<Response, PullError> {
        let watch = async {
            loop {
                tokio::time::sleep(LOOK_PAUSE).await;
                self.line.set(from + content.taken().load(Ordering::Relaxed));
            }
        };
        tokio::select! {
            response = sent => response,
            () = watch => Err(PullError::Interrupted),
        }
    }

    async fn ask(
        &self,
        method: Method,
        url: Url,
        headers: Vec<(reqwest::header::HeaderName, String)>,
        body: Body<'_>,
    ) -> Result<Response, PullError> {
        self.session.ask(&Ask { method, url, headers, body, what: self.what }).await
    }

    /// Where the upload goes on.
    fn next(&self, response: &Response) -> Result<Url, PullError> {
        let location: Option<&HeaderValue> = response.headers().get(LOCATION);
        let location = location
            .ok_or_else(|| self.session.protocol("it does not say where an upload goes on"))?;
        self.session.led(response.url(), location, "sends an upload to")
    }

    /// Gives up an upload; a registry that does not listen removes it by itself, later.
    async fn cancel(&self, url: Option<Url>) {
        if let Some(url) = url {
            let asked = self.ask(Method::DELETE, url, Vec::new(), Body::Nothing).await;
            tracing::debug!(ok = asked.is_ok(), "upload given up");
        }
    }

    async fn forget(&self) {
        match &self.place {
            Place::At(url, _) | Place::Unsure(url) => self.cancel(Some(url.clone())).await,
            Place::Nowhere => {}
        }
    }
}

fn binary() -> (reqwest::header::HeaderName, String) {
    (CONTENT_TYPE, "application/octet-stream".into())
}

/// How many bytes a registry has: `Range: 0-LAST`, `bytes=0-LAST` with some. For none most say
/// `0-0`, as for one.
fn range_end(response: &Response) -> Option<u64> {
    bytes_of(response.headers().get(RANGE)?.to_str().ok()?)
}

/// Reads `0-LAST` with or without its unit.
pub(crate) fn bytes_of(range: &str) -> Option<u64> {
    let range = range.strip_prefix("bytes=").unwrap_or(range);
    let last: u64 = range.strip_prefix("0-")?.parse().ok()?;
    if last == 0 { Some(0) } else { last.checked_add(1) }
}

fn is_absent(error: &PullError) -> bool {
    matches!(error, PullError::NotFound { .. } | PullError::Status { status: 404, .. })
}

fn is_refusal(error: &PullError) -> bool {
    matches!(error, PullError::Unauthorized { .. } | PullError::Image(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_has_is_read() {
        for (range, bytes) in [
            ("0-99", Some(100)),
            ("bytes=0-99", Some(100)),
            ("0-0", Some(0)),
            ("1-99", None),
            ("0--1", None),
            ("", None),
            ("0-18446744073709551615", None),
        ] {
            assert_eq!(bytes_of(range), bytes, "{range}");
        }
    }

    #[test]
    fn the_repository_that_had_a_blob_is_asked_first() {
        let mounts = Mounts::new(["a", "b", "c", "d"].map(str::to_owned).to_vec());
        let names = || mounts.each().map(|(_, name)| name.as_str()).collect::<Vec<_>>();
        assert_eq!(names(), ["a", "b", "c"]);
        mounts.best.store(2, Ordering::Relaxed);
        assert_eq!(names(), ["c", "d", "a"]);
    }
}
