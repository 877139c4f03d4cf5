//! A registry whose every answer a test decides: enough HTTP to be believed, over plain sockets, so
//! that it can also break off, stall and lie.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use towline_images::fixture::Layout;

pub(crate) mod shelf;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) path: String,
    /// Lower-case names.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// More was to come: the connection ends here, without an answer.
    pub(crate) cut: bool,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| &value[..])
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// First byte that is asked for.
    pub(crate) fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What is answered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    /// 0: the connection ends without an answer, or stays without one.
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub(crate) cut: Option<usize>,
    /// Nothing more comes after so many bytes of the body, and the connection stays.
    pub(crate) stall: Option<usize>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, body: body.into(), ..Reply::default() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Reply {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

type Answer = dyn Fn(&Seen) -> Reply + Send + Sync;
/// Of a request without its body: how much of that is taken before the connection ends.
type Cut = dyn Fn(&Seen) -> Option<usize> + Send + Sync;

/// A server, gone when dropped.
pub(crate) struct Fake {
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _serving: JoinSet<()>,
}

impl Fake {
    pub(crate) async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Fake {
        Fake::serve(answer, |_| None, None).await
    }

    pub(crate) async fn start_cutting(
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
        cut: impl Fn(&Seen) -> Option<usize> + Send + Sync + 'static,
    ) -> Fake {
        Fake::serve(answer, cut, None).await
    }

    pub(crate) async fn start_tls(
        acceptor: TlsAcceptor,
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Fake {
        Fake::serve(answer, |_| None, Some(acceptor)).await
    }

    async fn serve(
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
        cut: impl Fn(&Seen) -> Option<usize> + Send + Sync + 'static,
        tls: Option<TlsAcceptor>,
    ) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, answer): (_, Arc<Answer>) = (Arc::clone(&seen), Arc::new(answer));
        let cut: Arc<Cut> = Arc::new(cut);
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, answer, tls) = (Arc::clone(&log), Arc::clone(&answer), tls.clone());
                let cut = Arc::clone(&cut);
                connections.spawn(async move {
                    match tls {
                        None => converse(stream, log, answer, cut).await,
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            converse(stream, log, answer, cut).await;
                        }
                    }
                });
            }
        });
        Fake { address, seen, _serving: serving }
    }

    /// Requests for a path, in the order in which they came.
    pub(crate) fn seen(&self, path: &str) -> Vec<Seen> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.path.contains(path)).cloned().collect()
    }
}

async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    log: Arc<Mutex<Vec<Seen>>>,
    answer: Arc<Answer>,
    cut: Arc<Cut>,
) {
    let Some(seen) = read(&mut stream, &*cut).await else {
        // As servers do with what is no HTTP: a TLS greeting.
        drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n").await);
        return;
    };
    let reply = answer(&seen);
    let ends = seen.cut || reply.status == 0;
    log.lock().unwrap().push(seen);
    if ends {
        if reply.stall.is_some() {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        return;
    }
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| name == "content-length") {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    let end = reply.cut.or(reply.stall).unwrap_or(reply.body.len());
    let _gone = stream.write_all(head.as_bytes()).await;
    let _gone = stream.write_all(&reply.body[..end]).await;
    let _gone = stream.flush().await;
    if reply.stall.is_some() {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    let _gone = stream.shutdown().await;
}

async fn read(stream: &mut (impl AsyncRead + Unpin), cut: &Cut) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.ok()?;
        head.push(byte);
        if !byte.is_ascii() || byte == 0 {
            return None;
        }
    }
    let head = String::from_utf8(head).ok()?;
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut seen = Seen { method, path, headers, body: Vec::new(), cut: false };
    let length = seen.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let taken = cut(&seen).filter(|taken| *taken < length);
    seen.cut = taken.is_some();
    seen.body = vec![0; taken.unwrap_or(length)];
    stream.read_exact(&mut seen.body).await.ok()?;
    Some(seen)
}

/// The honest answers of a registry that has one image as `x:latest`.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) manifest: String,
}

impl Image {
    pub(crate) fn new(layout: &Layout) -> Image {
        let (files, manifest) = layout.files();
        Image { files, manifest: manifest.to_string() }
    }

    pub(crate) fn blob(&self, digest: &str) -> Option<&[u8]> {
        let path = format!("blobs/{}", digest.replace(':', "/"));
        self.files.iter().find(|(name, _)| *name == path).map(|(_, bytes)| &bytes[..])
    }

    /// The largest layer's digest and size.
    pub(crate) fn largest(&self) -> (String, usize) {
        let blobs = self.files.iter().filter_map(|(name, bytes)| {
            Some((format!("sha256:{}", name.strip_prefix("blobs/sha256/")?), bytes.len()))
        });
        blobs.max_by_key(|(_, size)| *size).unwrap()
    }

    pub(crate) fn answer(&self, seen: &Seen) -> Reply {
        let Some(rest) = seen.path.strip_prefix("/v2/") else { return Reply::new(404, "") };
        if rest.is_empty() {
            return Reply::new(200, "{}");
        }
        if let Some(name) = rest.strip_prefix("x/manifests/") {
            let name = if name == "latest" { &self.manifest } else { name };
            let Some(bytes) = self.blob(name) else {
                let body =
                    r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
                return Reply::new(404, body);
            };
            return Reply::new(200, bytes)
                .with("content-type", "application/vnd.oci.image.manifest.v1+json")
                .with("docker-content-digest", name);
        }
        let Some(bytes) = rest.strip_prefix("x/blobs/").and_then(|digest| self.blob(digest)) else {
            return Reply::new(404, "");
        };
        match seen.from() {
            Some(from) if from < bytes.len() => {
                let last = bytes.len() - 1;
                Reply::new(206, &bytes[from..])
                    .with("content-range", format!("bytes {from}-{last}/{}", bytes.len()))
            }
            Some(_) => Reply::new(416, ""),
            None => Reply::new(200, bytes),
        }
    }
}
