//! Orders to a QEMU over its control socket: JSON lines, one answer each, events between.
//!
//! The QEMU may have been taken over by its guest: lines are bounded, and the caller bounds the time.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::UnixStream;

use super::connect;
use super::vm::ORDERS_SOCKET;

/// Longest line that is taken: QEMU's own are a few hundred bytes.
const LINE_MAX: usize = 64 << 10;
/// Lines that are passed over while an answer or an event is waited for.
const SKIPPED_MAX: usize = 1000;

/// A session with a QEMU.
#[derive(Debug)]
pub(super) struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects to the QEMU that runs in this directory.
    pub(super) async fn connect(dir: &Path) -> io::Result<Self> {
        let mut qmp = Self(BufReader::new(connect(dir, ORDERS_SOCKET).await?));
        qmp.line().await?;
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Gives an order and waits for its answer.
    pub(super) async fn execute(&mut self, order: &str, arguments: Value) -> io::Result<Value> {
        self.send(order, arguments, None).await
    }

    /// Hands a descriptor over, under a name for later orders.
    pub(super) async fn hand_over(&mut self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.send("getfd", json!({ "fdname": name }), Some(fd)).await.map(drop)
    }

    /// Waits for an event of this name.
    pub(super) async fn event(&mut self, name: &str) -> io::Result<Value> {
        for _ in 0..SKIPPED_MAX {
            let mut line = self.line().await?;
            if line["event"] == name {
                return Ok(line["data"].take());
            }
        }
        Err(io::Error::other(format!("it does not come to {name}")))
    }

    async fn send(
        &mut self,
        order: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<Value> {
        let mut line = json!({ "execute": order, "arguments": arguments }).to_string();
        line.push('\n');
        let socket = self.0.get_ref();
        let sent = socket.async_io(Interest::WRITABLE, || send_with(socket, &line, fd)).await?;
        if sent != line.len() {
            // An order is far smaller than a socket's buffer.
            return Err(io::ErrorKind::WriteZero.into());
        }
        for _ in 0..SKIPPED_MAX {
            let mut line = self.line().await?;
            if let Some(error) = line.get("error") {
                let text = error["desc"].as_str().unwrap_or("no reason");
                return Err(io::Error::other(format!("{order}: {text}")));
            }
            if line.get("return").is_some() {
                return Ok(line["return"].take());
            }
        }
        Err(io::Error::other(format!("{order}: no answer")))
    }

    async fn line(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        loop {
            let got = self.0.fill_buf().await?;
            if got.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = got.iter().position(|&byte| byte == b'\n');
            let len = end.map_or(got.len(), |end| end + 1);
            line.extend_from_slice(&got[..len]);
            self.0.consume(len);
            if line.len() > LINE_MAX {
                return Err(io::Error::other("a line of QEMU's control socket is too long"));
            }
            if end.is_some() {
                return serde_json::from_slice(&line).map_err(io::Error::other);
            }
        }
    }
}

fn send_with(socket: &UnixStream, line: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let line = [IoSlice::new(line.as_bytes())];
    Ok(sendmsg(socket.as_fd(), &line, &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::mem::MaybeUninit;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// Plays a QEMU: answers each line with the next of these.
    async fn play(listener: UnixListener, answers: Vec<String>) {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        let mut buffer = [0; 4096];
        for answer in answers {
            assert!(socket.read(&mut buffer).await.unwrap() > 0);
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn answers_are_told_from_events_and_errors() {
        let dir = tempfile::tempdir().unwrap();
        let answers = [
            "{\"return\": {}}\n",
            "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"paused\"}}\n",
            "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n{\"event\": \"RESUME\"}\n{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n",
        ];
        let answers = answers.map(str::to_owned).to_vec();
        let listener = UnixListener::bind(dir.path().join(ORDERS_SOCKET)).unwrap();
        tokio::join!(play(listener, answers), async {
            let mut qmp = Qmp::connect(dir.path()).await.unwrap();
            let answer = qmp.execute("query-status", json!({})).await.unwrap();
            assert_eq!(answer["status"], "paused");
            let error = qmp.execute("jump", json!({})).await.unwrap_err();
            assert_eq!(error.to_string(), "jump: no such thing");
            assert_eq!(qmp.event("MIGRATION").await.unwrap()["status"], "completed");
            assert!(qmp.event("MIGRATION").await.is_err(), "the other side has closed");
        });
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let answers = vec!["{\"return\": {}}\n".to_owned(), "x".repeat(2 * LINE_MAX)];
        let listener = UnixListener::bind(dir.path().join(ORDERS_SOCKET)).unwrap();
        let player = play(listener, answers);
        let order = async {
            let mut qmp = Qmp::connect(dir.path()).await.unwrap();
            let error = qmp.execute("query-status", json!({})).await.unwrap_err();
            assert!(error.to_string().contains("too long"), "{error}");
        };
        tokio::select! {
            () = order => {}
            () = async { player.await; std::future::pending().await } => {}
        }
    }

    #[tokio::test]
    async fn a_descriptor_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile_in(dir.path()).unwrap();
        file.write_all(b"saved").unwrap();
        send_with(&ours, "order\n", Some(file.as_fd())).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 6];
        let parts = &mut [std::io::IoSliceMut::new(&mut bytes)];
        theirs.readable().await.unwrap();
        recvmsg(theirs.as_fd(), parts, &mut control, RecvFlags::empty()).unwrap();
        let Some(RecvAncillaryMessage::ScmRights(mut fds)) = control.drain().next() else {
            panic!("no descriptor came");
        };
        let mut got = File::from(fds.next().unwrap());
        got.rewind().unwrap();
        let mut text = String::new();
        got.read_to_string(&mut text).unwrap();
        assert_eq!((bytes.as_slice(), text.as_str()), (b"order\n".as_slice(), "saved"));
    }
}
