//! Orders to a Cloud Hypervisor over its API socket: HTTP, one connection and one bound per order.
//!
//! Source: `vmm/src/api/openapi/cloud-hypervisor.yaml` of Cloud Hypervisor. Only the calls that are
//! used, and of their answers only what is used. The process may have been taken over by its guest:
//! answers are bounded.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::super::{HypervisorError, connect};

/// Where it listens.
pub(super) const API_SOCKET: &str = "api.sock";
/// Longest answer that is taken; what it says of a VM is a few KiB.
const ANSWER_MAX: usize = 256 << 10;
/// How much of a refusal is shown.
const SHOWN_MAX: usize = 500;
/// Until a process that was just started listens.
const LISTENS_MAX: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(2);

/// A Cloud Hypervisor that runs in a directory.
#[derive(Debug)]
pub(super) struct Api<'a>(pub(super) &'a Path);

/// What it says of itself.
#[derive(Debug, Deserialize)]
pub(super) struct Ping {
    #[serde(default)]
    pub(super) build_version: String,
    #[serde(default)]
    pub(super) version: String,
}

/// What it says of its VM.
#[derive(Debug, Deserialize)]
pub(super) struct VmInfo {
    pub(super) state: String,
}

impl Api<'_> {
    /// Waits until it listens, and says who it is. Give this up when its process has ended.
    pub(super) async fn ping(&self) -> Result<Ping, HypervisorError> {
        const ORDER: &str = "vmm.ping";
        let until = Instant::now() + LISTENS_MAX;
        let stream = loop {
            match connect(self.0, API_SOCKET).await {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < until => sleep(RETRY).await,
                Err(error) => return Err(self.refused(ORDER, error.to_string())),
            }
        };
        let asked = exchange(stream, Method::GET, ORDER, Bytes::new());
        let answer = self.within(ORDER, LISTENS_MAX, asked).await?;
        serde_json::from_slice(&answer).map_err(|error| self.refused(ORDER, error.to_string()))
    }

    /// What it says of its VM.
    pub(super) async fn info(&self) -> Result<VmInfo, HypervisorError> {
        const ORDER: &str = "vm.info";
        let asked = async {
            let stream = connect(self.0, API_SOCKET).await.map_err(|error| error.to_string())?;
            exchange(stream, Method::GET, ORDER, Bytes::new()).await
        };
        let answer = self.within(ORDER, LISTENS_MAX, asked).await?;
        serde_json::from_slice(&answer).map_err(|error| self.refused(ORDER, error.to_string()))
    }

    /// Gives an order, with a bound for its answer.
    pub(super) async fn order<T: Serialize + Sync>(
        &self,
        order: &'static str,
        body: Option<&T>,
        bound: Duration,
    ) -> Result<(), HypervisorError> {
        let body = match body {
            Some(body) => {
                serde_json::to_vec(body).map_err(|e| self.refused(order, e.to_string()))?
            }
            None => Vec::new(),
        };
        let asked = async {
            let stream = connect(self.0, API_SOCKET).await.map_err(|error| error.to_string())?;
            exchange(stream, Method::PUT, order, body.into()).await
        };
        self.within(order, bound, asked).await.map(drop)
    }

    async fn within<T>(
        &self,
        order: &'static str,
        bound: Duration,
        asked: impl Future<Output = Result<T, String>>,
    ) -> Result<T, HypervisorError> {
        let asked = timeout_at(Instant::now() + bound, asked).await;
        let asked = asked.unwrap_or_else(|_| Err(format!("no answer within {bound:?}")));
        asked.map_err(|problem| self.refused(order, problem))
    }

    fn refused(&self, order: &'static str, problem: String) -> HypervisorError {
        HypervisorError::Refused { dir: self.0.to_owned(), order, problem }
    }
}

/// One request on a connection of its own.
async fn exchange(
    stream: UnixStream,
    method: Method,
    order: &str,
    body: Bytes,
) -> Result<Bytes, String> {
    let explain = |error: hyper::Error| crate::chain(&error);
    let (mut sender, connection) =
        http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.map_err(explain)?;
    let request = Request::builder()
        .method(method)
        .uri(format!("/api/v1/{order}"))
        .header("Host", "localhost")
        .header("Content-Type", "application/json")
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(explain)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        Ok::<_, String>((status, body.map_err(|error| error.to_string())?.to_bytes()))
    };
    tokio::pin!(answer);
    let (status, body) = tokio::select! {
        answer = &mut answer => answer,
        // It ends with an error, or before the answer that it has read is taken.
        ended = connection => {
            ended.map_err(explain)?;
            answer.await
        }
    }?;
    if status.is_success() {
        return Ok(body);
    }
    let said: String = String::from_utf8_lossy(&body)
        .chars()
        .filter(|c| !c.is_control())
        .take(SHOWN_MAX)
        .collect();
    Err(format!("{status}: {said}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Answers each connection with the next of these, to whatever it asks; gives what was asked.
    fn serve(dir: &Path, answers: &'static [&'static str]) -> std::thread::JoinHandle<Vec<String>> {
        use std::io::{Read, Write};
        let listener = UnixListener::bind(dir.join(API_SOCKET)).unwrap();
        std::thread::spawn(move || {
            let serve_one = |answer: &&str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = vec![0; 4096];
                let len = stream.read(&mut asked).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8_lossy(&asked[..len]).into_owned()
            };
            answers.iter().map(serve_one).collect()
        })
    }

    #[tokio::test]
    async fn orders_are_given_and_refusals_told() {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(
            dir.path(),
            &[
                "HTTP/1.1 200 OK\r\nContent-Length: 45\r\n\r\n{\"build_version\":\"v53.0\",\"version\":\"53.0.0\"} ",
                "HTTP/1.1 204 \r\n\r\n",
                "HTTP/1.1 500 \r\nContent-Length: 12\r\n\r\nno such\ndisk",
                "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
                "no HTTP at all\r\n\r\n",
            ],
        );
        let api = Api(dir.path());
        assert_eq!(api.ping().await.unwrap().build_version, "v53.0");
        let bound = Duration::from_secs(20);
        api.order("vm.create", Some(&serde_json::json!({"a": 1})), bound).await.unwrap();
        let refused = api.order::<()>("vm.boot", None, bound).await.unwrap_err().to_string();
        assert!(refused.contains("refused vm.boot: 500") && refused.contains("no suchdisk"));
        let odd = api.ping().await.unwrap_err().to_string();
        assert!(odd.contains("vmm.ping"), "{odd}");
        api.order::<()>("vm.boot", None, bound).await.unwrap_err();
        let asked = server.join().unwrap();
        assert!(asked[1].starts_with("PUT /api/v1/vm.create") && asked[1].ends_with("{\"a\":1}"));
    }

    #[tokio::test]
    async fn one_that_hangs_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join(API_SOCKET)).unwrap();
        let api = Api(dir.path());
        let bound = Duration::from_millis(50);
        let refused = api.order::<()>("vm.boot", None, bound).await.unwrap_err().to_string();
        assert!(refused.contains("vm.boot"), "{refused}");
    }
}
