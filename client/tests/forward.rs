//! Forwarded connections between the laptop's end and the guest agent's, over links that are cut
//! again and again: nothing is lost or doubled, ends and resets pass, hostile peers are refused.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use towline_client::tunnel::tcp::{self, Dialer, Ended, NoStream, Stream, Target};
use towline_guest_agent::forward::Forwards;
use towline_guest_agent::tcp::{TcpTable, serve};
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{StreamErrorCode, TcpConnected, TcpOpen, tcp_open::How};
use towline_streams::{FrameReader, FrameWriter, Memory};

/// Nothing here takes long; a test that hangs must say so.
const BOUND: Duration = Duration::from_secs(120);

/// Links to a guest agent, each of which breaks after so many bytes of either way.
struct Links {
    table: Arc<TcpTable>,
    cut_after: Box<dyn Fn(u64) -> u64 + Send + Sync>,
    dialled: AtomicU64,
}

impl Links {
    fn new(cut_after: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Self {
        let table = TcpTable::new(Arc::<Forwards>::default());
        Self { table, cut_after: Box::new(cut_after), dialled: AtomicU64::new(0) }
    }

    fn whole() -> Self {
        Self::new(|_| u64::MAX)
    }
}

impl Dialer for Links {
    type Reader = ReadHalf<DuplexStream>;
    type Writer = WriteHalf<DuplexStream>;

    async fn dial(
        &self,
        open: TcpOpen,
        _: bool,
    ) -> Result<Stream<Self::Reader, Self::Writer>, NoStream> {
        let number = self.dialled.fetch_add(1, Ordering::Relaxed);
        let (near, middle_near) = tokio::io::duplex(50_000);
        let (middle_far, far) = tokio::io::duplex(50_000);
        tokio::spawn(relay(middle_near, middle_far, (self.cut_after)(number)));
        let table = Arc::clone(&self.table);
        tokio::spawn(async move {
            let (read, write) = tokio::io::split(far);
            serve(&table, open, FrameReader::new(read), FrameWriter::new(write)).await;
        });
        let (read, write) = tokio::io::split(near);
        let (reader, writer) = (FrameReader::new(read), FrameWriter::new(write));
        Ok(Stream { reader, writer, held: None })
    }
}

/// Copies both ways; after so many bytes of one way both streams are dropped, whatever is in them.
async fn relay(a: DuplexStream, b: DuplexStream, cut_after: u64) {
    async fn copy(mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>, max: u64) {
        let (mut buffer, mut left) = (vec![0; 4096], max);
        while left > 0 {
            let Ok(len) = from.read(&mut buffer).await else { return };
            if len == 0 {
                let _ = to.shutdown().await;
                return std::future::pending().await;
            }
            let now = len.min(usize::try_from(left).unwrap_or(usize::MAX));
            if to.write_all(&buffer[..now]).await.is_err() {
                return;
            }
            left -= now as u64;
        }
    }
    let ((a_read, a_write), (b_read, b_write)) = (tokio::io::split(a), tokio::io::split(b));
    tokio::select! {
        () = copy(a_read, b_write, cut_after) => {}
        () = copy(b_read, a_write, cut_after) => {}
    }
}

/// A connected pair: ours, and the laptop's end of it.
async fn local() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap());
    let (ours, accepted) = tokio::join!(ours, listener.accept());
    (ours.unwrap(), accepted.unwrap().0)
}

/// Forwards one connection to a port; returns our end and how it will have ended.
async fn open(links: &Arc<Links>, port: u16) -> (TcpStream, tokio::task::JoinHandle<Ended>) {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let (ours, laptops) = local().await;
    let links = Arc::clone(links);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    let forwarding = tokio::spawn(async move {
        let memory = Memory::new(64 << 20);
        let target = Target::Port(port);
        tcp::forward(&*links, id, &target, laptops, &memory).await
    });
    (ours, forwarding)
}

async fn server() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31) >> 3).to_le_bytes()[0] ^ seed).collect()
}

async fn ended(forwarding: tokio::task::JoinHandle<Ended>) -> Ended {
    tokio::time::timeout(BOUND, forwarding).await.expect("an end in time").unwrap()
}

#[tokio::test]
async fn both_ways_arrive_whole_over_links_that_are_cut_again_and_again() {
    let (listener, port) = server().await;
    let (up, down) = (pattern(3_000_000, 1), pattern(2_000_000, 2));
    // Some links die before their first answer is whole.
    let links = Arc::new(Links::new(|number| match number % 3 {
        0 => 100_000 + number * 7919,
        1 => number % 40,
        _ => 250_001,
    }));
    let (mut ours, forwarding) = open(&links, port).await;
    let (wanted, answer) = (up.clone(), down.clone());
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let mut got = Vec::new();
        let (read, wrote) = tokio::join!(read.read_to_end(&mut got), async {
            write.write_all(&answer).await?;
            write.shutdown().await
        });
        read.and(wrote.map(|()| 0)).unwrap();
        assert!(got == wanted, "what came to the sandbox");
    });
    let exchange = async {
        let (mut read, mut write) = ours.split();
        let mut got = Vec::new();
        let (read, wrote) = tokio::join!(read.read_to_end(&mut got), async {
            write.write_all(&up).await?;
            write.shutdown().await
        });
        read.and(wrote.map(|()| 0)).unwrap();
        got
    };
    let got = tokio::time::timeout(BOUND, exchange).await.expect("in time");
    assert!(got == down, "what came back");
    serving.await.unwrap();
    assert!(matches!(ended(forwarding).await, Ended::Closed));
    assert!(links.dialled.load(Ordering::Relaxed) > 5, "links were cut");
}

#[tokio::test]
async fn one_way_may_end_while_the_other_goes_on() {
    let (listener, port) = server().await;
    let links = Arc::new(Links::whole());
    let (mut ours, forwarding) = open(&links, port).await;
    ours.write_all(b"question").await.unwrap();
    ours.shutdown().await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut question = String::new();
    stream.read_to_string(&mut question).await.unwrap();
    stream.write_all(b"a late answer").await.unwrap();
    drop(stream);
    let mut answer = String::new();
    ours.read_to_string(&mut answer).await.unwrap();
    assert_eq!((question.as_str(), answer.as_str()), ("question", "a late answer"));
    assert!(matches!(ended(forwarding).await, Ended::Closed));
    // The guest forgets it too, once its last words are out.
    for _ in 0..1000 {
        if links.table.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the guest agent keeps a connection that has ended");
}

#[tokio::test]
async fn a_port_without_a_listener_resets_the_laptops_connection() {
    let (listener, port) = server().await;
    drop(listener);
    let links = Arc::new(Links::whole());
    let (mut ours, forwarding) = open(&links, port).await;
    let error = ours.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let Ended::Refused(error) = ended(forwarding).await else { panic!("not refused") };
    assert_eq!(error.code(), StreamErrorCode::ConnectionRefused);
    assert!(links.table.is_empty());
}

#[tokio::test]
async fn resets_pass_in_both_directions() {
    let (listener, port) = server().await;
    let links = Arc::new(Links::whole());
    let (mut ours, forwarding) = open(&links, port).await;
    ours.write_all(b"x").await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.read_u8().await.unwrap();
    stream.set_zero_linger().unwrap();
    drop(stream);
    let error = ours.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(ended(forwarding).await, Ended::Closed));

    let (mut ours, forwarding) = open(&links, port).await;
    ours.write_all(b"x").await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.read_u8().await.unwrap();
    ours.set_zero_linger().unwrap();
    drop(ours);
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(ended(forwarding).await, Ended::Closed));
}

#[tokio::test]
async fn the_first_bytes_travel_with_the_open() {
    struct Recording(std::sync::Mutex<Vec<TcpOpen>>);
    impl Dialer for Recording {
        type Reader = ReadHalf<DuplexStream>;
        type Writer = WriteHalf<DuplexStream>;
        async fn dial(
            &self,
            open: TcpOpen,
            _: bool,
        ) -> Result<Stream<Self::Reader, Self::Writer>, NoStream> {
            self.0.lock().unwrap().push(open);
            Err(NoStream { message: "seen".into(), code: StreamErrorCode::Invalid, retry: false })
        }
    }
    let (mut ours, laptops) = local().await;
    ours.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    laptops.readable().await.unwrap();
    let recording = Recording(std::sync::Mutex::default());
    let memory = Memory::new(1 << 20);
    tcp::forward(&recording, [1; 16], &Target::Port(80), laptops, &memory).await;
    let open = recording.0.lock().unwrap().remove(0);
    let Some(How::Connect(connect)) = open.how else { panic!("{open:?}") };
    assert_eq!(connect.first, b"GET / HTTP/1.0\r\n\r\n");
}

#[tokio::test]
async fn a_hostile_guest_is_left_and_cannot_make_us_hold_much() {
    struct Hostile(Vec<Frame>);
    impl Dialer for Hostile {
        type Reader = ReadHalf<DuplexStream>;
        type Writer = WriteHalf<DuplexStream>;
        async fn dial(
            &self,
            _: TcpOpen,
            _: bool,
        ) -> Result<Stream<Self::Reader, Self::Writer>, NoStream> {
            let (near, far) = tokio::io::duplex(1 << 20);
            let frames = self.0.clone();
            tokio::spawn(async move {
                let (_keep, write) = tokio::io::split(far);
                let mut writer = FrameWriter::new(write);
                for frame in frames {
                    let _ = writer.send(&frame).await;
                }
                std::future::pending::<()>().await;
            });
            let (read, write) = tokio::io::split(near);
            let (reader, writer) = (FrameReader::new(read), FrameWriter::new(write));
            Ok(Stream { reader, writer, held: None })
        }
    }
    let connected = |received_offset| {
        Frame::message(FrameKind::TcpConnected, &TcpConnected { received_offset })
    };
    let flood: Vec<Frame> = std::iter::once(connected(0))
        .chain((0..40).map(|i| Frame::data(FrameKind::TcpData, i << 16, &[0; 1 << 16])))
        .collect();
    let scripts = [
        vec![connected(99)],
        vec![connected(0), Frame::data(FrameKind::TcpData, 7, b"a gap")],
        vec![connected(0), Frame::data(FrameKind::TcpAck, 0, b"short")],
        vec![Frame::raw(FrameKind::Pong, &b""[..])],
        flood,
    ];
    for script in scripts {
        // Our application reads nothing, so that nothing is passed on.
        let (_ours, laptops) = local().await;
        let (hostile, memory) = (Hostile(script.clone()), Memory::new(1 << 20));
        let target = Target::Port(80);
        let forwarding = tcp::forward(&hostile, [1; 16], &target, laptops, &memory);
        let bounded = tokio::time::timeout(Duration::from_secs(3), forwarding).await;
        // The flood is taken as far as it was granted, and no further: nobody may hear of it.
        match bounded {
            Ok(ended) => assert!(matches!(ended, Ended::Lost(_)), "{ended:?}"),
            Err(_) => assert_eq!(script.len(), 41, "only the flood may stall"),
        }
    }
}
