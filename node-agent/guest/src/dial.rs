//! Connects to ports of the sandbox's loopback, no faster than their servers take connections.
//!
//! Linux drops the end of a handshake that finds the accept queue full: the server's side forgets the
//! connection some seconds later, while the client's believes in it until what it sends is reset. A
//! slow server with a short queue (python's `http.server` has one of 5) would lose some of many
//! connections that come at once. So who dials looks at the queue before, one at a time for each
//! port, and waits for room.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use towline_proto::v1::StreamErrorCode;

use crate::accept_queue;
use crate::refusal::Refusal;

/// Bound on connecting, waiting for room with it: about as long as the kernel would go on itself.
const CONNECT_MAX: Duration = Duration::from_secs(120);
/// How long a connection that is not there at once keeps the others of its port waiting: it is not
/// the accept queue that it waits for.
const TURN_MAX: Duration = Duration::from_millis(100);
/// How often a full queue is looked at; the kernel does not tell of room.
const ROOM_TICK: Duration = Duration::from_millis(2);

/// Who dials, and whose turn it is at each port.
#[derive(Debug, Default)]
pub(crate) struct Dialler {
    turns: Mutex<BTreeMap<u16, Weak<Turn>>>,
}

type Turn = tokio::sync::Mutex<()>;

impl Dialler {
    /// Connects to a port of the sandbox's loopback, IPv4 first.
    pub(crate) async fn dial(&self, port: u16) -> Result<TcpStream, Refusal> {
        let mut why = None;
        let late = timeout(CONNECT_MAX, async {
            for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
                match self.connect(SocketAddr::new(ip, port)).await {
                    Ok(stream) => return Some(stream),
                    Err(error) => why = why.take().or(Some(error)),
                }
            }
            None
        });
        match late.await {
            Ok(Some(stream)) => {
                // Small answers must not wait for one another.
                let _ = stream.set_nodelay(true);
                Ok(stream)
            }
            Ok(None) => {
                Err(refusal(port, &why.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into())))
            }
            Err(_) => Err(refusal(port, &io::ErrorKind::TimedOut.into())),
        }
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let turn = self.turn(address.port());
        let held = turn.lock().await;
        room(address).await;
        let mut connecting = pin!(TcpStream::connect(address));
        match timeout(TURN_MAX, &mut connecting).await {
            Ok(connected) => connected,
            Err(_) => {
                drop(held);
                connecting.await
            }
        }
    }

    fn turn(&self, port: u16) -> Arc<Turn> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(&port).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(port, Arc::downgrade(&turn));
        turn
    }
}

/// Waits until the accept queue has room. A port where nothing listens has: it refuses by itself. So
/// has one whose queue the kernel does not tell of.
async fn room(address: SocketAddr) {
    while let Ok(Some(queue)) = accept_queue::of(address) {
        if queue.has_room() {
            return;
        }
        sleep(ROOM_TICK).await;
    }
}

fn refusal(port: u16, error: &io::Error) -> Refusal {
    let (code, message) = match error.kind() {
        io::ErrorKind::ConnectionRefused => (
            StreamErrorCode::ConnectionRefused,
            format!("nothing in the sandbox listens on port {port}"),
        ),
        io::ErrorKind::TimedOut => (
            StreamErrorCode::TimedOut,
            format!(
                "the server on port {port} in the sandbox did not take the connection within {} s",
                CONNECT_MAX.as_secs()
            ),
        ),
        _ => return Refusal::io(format!("cannot connect to port {port}"), error),
    };
    Refusal::new(code, message)
}

#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a test that cannot run says so")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const QUEUE: u32 = 3;
    const CONNECTIONS: u8 = 60;

    fn listener() -> TcpListener {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        socket.listen(QUEUE).unwrap()
    }

    #[tokio::test]
    async fn many_connections_wait_for_room_and_none_is_lost() {
        let listener = listener();
        let address = listener.local_addr().unwrap();
        match accept_queue::of(address) {
            Ok(Some(queue)) => assert_eq!((queue.waiting, queue.len), (0, QUEUE)),
            other => {
                eprintln!("SKIPPED: this kernel does not tell of accept queues: {other:?}");
                return;
            }
        }
        let (dialler, connected) = (Arc::new(Dialler::default()), Arc::new(AtomicUsize::new(0)));
        let dial = |number: u8| {
            let (dialler, connected) = (Arc::clone(&dialler), Arc::clone(&connected));
            tokio::spawn(async move {
                let mut stream = dialler.dial(address.port()).await.unwrap();
                connected.fetch_add(1, Ordering::SeqCst);
                stream.write_all(&[number]).await.unwrap();
                stream.read_u8().await.unwrap()
            })
        };
        let all: Vec<_> = (0..CONNECTIONS).map(dial).collect();
        // The server takes nothing yet: no more than its queue is long are connected.
        while connected.load(Ordering::SeqCst) < QUEUE as usize {
            sleep(ROOM_TICK).await;
        }
        sleep(10 * ROOM_TICK).await;
        assert_eq!(connected.load(Ordering::SeqCst), QUEUE as usize);
        for _ in 0..CONNECTIONS {
            assert!(accept_queue::of(address).unwrap().unwrap().waiting <= QUEUE);
            let (mut stream, _) = listener.accept().await.unwrap();
            let number = stream.read_u8().await.unwrap();
            stream.write_all(&[number]).await.unwrap();
        }
        for (number, answered) in all.into_iter().enumerate() {
            assert_eq!(usize::from(answered.await.unwrap()), number);
        }
    }

    #[tokio::test]
    async fn a_port_where_nothing_listens_refuses_at_once_and_is_forgotten() {
        let port = listener().local_addr().unwrap().port();
        let dialler = Dialler::default();
        let refusal = dialler.dial(port).await.unwrap_err().to_message();
        assert_eq!(refusal.code(), StreamErrorCode::ConnectionRefused);
        assert!(refusal.message.contains("nothing in the sandbox listens"), "{}", refusal.message);
        drop(dialler.turn(port));
        let other = dialler.turn(if port == 1 { 2 } else { 1 });
        assert_eq!((dialler.turns.lock().unwrap().len(), Arc::strong_count(&other)), (1, 1));
    }

    #[tokio::test]
    async fn a_listener_on_all_addresses_of_both_families_is_found() {
        let Ok(socket) = TcpSocket::new_v6() else {
            eprintln!("SKIPPED: this machine has no IPv6");
            return;
        };
        let Ok(()) = socket.bind((Ipv6Addr::UNSPECIFIED, 0).into()) else {
            eprintln!("SKIPPED: this machine has no IPv6 address");
            return;
        };
        let listener = socket.listen(QUEUE).unwrap();
        let port = listener.local_addr().unwrap().port();
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            match accept_queue::of(SocketAddr::new(ip, port)) {
                Ok(queue) => assert_eq!(queue.map(|queue| queue.len), Some(QUEUE), "{ip}"),
                Err(error) => {
                    eprintln!("SKIPPED: this kernel does not tell of accept queues: {error}");
                    return;
                }
            }
        }
    }
}
