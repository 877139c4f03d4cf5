//! A server that a sandbox can run, and requests to it.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::cluster::SHORT;

/// Port of [`SERVER`] in its sandbox.
pub const PORT: u16 = 8080;
/// A server for `python3 -c`, of the files where it runs; it closes each connection in order,
/// whatever the load.
pub const SERVER: &str = r"
import http.server, socketserver
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 1024
    daemon_threads = True
Server(('127.0.0.1', 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
";

/// One request; `None` while nobody answers it whole.
pub fn get(address: &str, path: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(SHORT)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let body = answer.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
    answer.starts_with(b"HTTP/1.0 200").then(|| answer.split_off(body))
}
