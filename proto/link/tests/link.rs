//! The link over real UDP sockets: bytes both ways, resets, strangers, and a node by name.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use common::{HOUR, authority, good, leaf};
use ring::digest::{Context, SHA256};
use tokio::task::JoinSet;
use towline_link::authority::CertificateAuthority;
use towline_link::endpoint::{LinkClient, LinkConnection, LinkServer};
use towline_link::identity::Role;
use towline_link::stream::{Priority, RESET_BROKEN};
use towline_proto::frame::{Frame, FrameKind};

/// A node that sends every frame back, and resets a stream that says `break`.
struct Node {
    endpoint: String,
    _tasks: JoinSet<()>,
}

fn node(ca: &CertificateAuthority) -> Node {
    let server =
        LinkServer::bind("127.0.0.1:0".parse().unwrap(), &good(ca, Role::Node), ca.certificate())
            .unwrap();
    let endpoint = server.local_addr().unwrap().to_string();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut links = JoinSet::new();
        while let Some(handshake) = server.accept().await {
            links.spawn(async move {
                if let Ok(link) = handshake.finish().await {
                    echo(link).await;
                }
            });
        }
    });
    Node { endpoint, _tasks: tasks }
}

async fn echo(link: LinkConnection) {
    let mut streams = JoinSet::new();
    while let Ok(mut stream) = link.accept().await {
        streams.spawn(async move {
            while let Ok(Some(frame)) = stream.reader.next().await {
                if &frame.body[..] == b"drop" {
                    return; // without finish: an error for the peer, not an end
                }
                if &frame.body[..] == b"break" {
                    stream.reset(RESET_BROKEN);
                    return;
                }
                if stream.writer.send(&frame).await.is_err() {
                    return;
                }
            }
            let _ = stream.writer.finish().await;
        });
    }
}

async fn connect(ca: &CertificateAuthority, node: &Node) -> (LinkClient, LinkConnection) {
    let client = LinkClient::new(&good(ca, Role::User), ca.certificate()).unwrap();
    let link = client.connect(&node.endpoint, None).await.unwrap();
    (client, link)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_megabytes_come_back_as_they_went() {
    const PIECES: usize = 1024;
    let ca = authority("cluster_a");
    let node = node(&ca);
    let (client, link) = connect(&ca, &node).await;
    let mut stream = link.open(Priority::Exec).await.unwrap();
    let sender = tokio::spawn(async move {
        let mut digest = Context::new(&SHA256);
        let mut state = 1u64;
        for _ in 0..PIECES {
            let piece: Vec<u8> = (0..8192)
                .flat_map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    state.to_le_bytes()
                })
                .collect();
            digest.update(&piece);
            let frame = Frame::raw(FrameKind::Stdin, Bytes::from(piece));
            stream.writer.send(&frame).await.unwrap();
        }
        stream.writer.finish().await.unwrap();
        digest.finish()
    });
    let mut digest = Context::new(&SHA256);
    let mut bytes = 0;
    while let Some(frame) = stream.reader.next().await.unwrap() {
        digest.update(&frame.body);
        bytes += frame.body.len();
    }
    assert_eq!(bytes, 64 << 20);
    assert_eq!(digest.finish().as_ref(), sender.await.unwrap().as_ref());
    let lost = link.stats().path.lost_packets;
    assert!(lost < 5000, "{lost} packets lost on loopback");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_stream_is_an_error_and_the_others_live() {
    let ca = authority("cluster_a");
    let node = node(&ca);
    let (_client, link) = connect(&ca, &node).await;
    let mut other = link.open(Priority::Control).await.unwrap();
    for how in [&b"break"[..], b"drop"] {
        let mut broken = link.open(Priority::Exec).await.unwrap();
        broken.writer.send(&Frame::raw(FrameKind::Stdin, how)).await.unwrap();
        broken.reader.next().await.unwrap_err();
    }
    let ping = Frame::raw(FrameKind::Pong, &b"still here"[..]);
    other.writer.send(&ping).await.unwrap();
    assert_eq!(other.reader.next().await.unwrap(), Some(ping));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_no_link() {
    let ca = authority("cluster_a");
    let node = node(&ca);
    let other = authority("cluster_a");
    let past = SystemTime::now() - 10 * HOUR;
    for (store, trusted) in [
        (good(&other, Role::User), &ca), // the node refuses the laptop
        (good(&ca, Role::User), &other), // the laptop refuses the node
        (leaf(&ca, "cluster_a", Role::User, past, HOUR), &ca),
    ] {
        let client = LinkClient::new(&store, trusted.certificate()).unwrap();
        // A client learns of the server's refusal when it first waits for something.
        let refused = match client.connect(&node.endpoint, None).await {
            Err(_) => true,
            Ok(link) => tokio::time::timeout(Duration::from_secs(10), link.closed()).await.is_ok(),
        };
        assert!(refused);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_name_is_refused() {
    let ca = authority("cluster_a");
    let node = node(&ca);
    let client = LinkClient::new(&good(&ca, Role::User), ca.certificate()).unwrap();
    client.connect(&node.endpoint, Some("ada")).await.unwrap();
    let error = client.connect(&node.endpoint, Some("grace")).await.unwrap_err().to_string();
    assert!(error.contains("it is node `ada`, not `grace`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_cannot_pass_for_a_node() {
    let ca = authority("cluster_a");
    let store = good(&ca, Role::Member);
    let server =
        LinkServer::bind("127.0.0.1:0".parse().unwrap(), &store, ca.certificate()).unwrap();
    let endpoint = server.local_addr().unwrap().to_string();
    let task = tokio::spawn(async move {
        while let Some(handshake) = server.accept().await {
            let _ = handshake.finish().await;
        }
    });
    let client = LinkClient::new(&good(&ca, Role::User), ca.certificate()).unwrap();
    let error = client.connect(&endpoint, None).await.unwrap_err().to_string();
    assert!(error.contains("is not a node"), "{error}");
    task.abort();
}
