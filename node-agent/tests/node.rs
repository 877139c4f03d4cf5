//! The whole node agent between doubles: what is wanted becomes what is, over restarts and faults,
//! and streams come in by ticket only.

#![allow(clippy::unwrap_used, reason = "tests")]

mod node_support;

use node_support::{Template, WAIT_MAX, World, desired, sandbox};
use towline_images::fixture::{Layer, Layout};
use towline_link::stream::LinkStream;
use towline_link::ticket::keep_digest;
use towline_node_agent::hypervisor::VmShape;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{
    Desired, DesiredSandbox, EgressOpen, EgressProtocol, ExecListOpen, FeedEntry, FeedOpen,
    ForkOrigin, ImageCollectOpen, ImageExportOpen, ImageImportOpen, ImageImported, ImagePushOpen,
    ImagesCollected, LookupAnswer, LookupOpen, Phase, StreamError, StreamErrorCode, StreamOpen,
    Ticket, egress_open, feed_entry, image_ref,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wanted_running_stopped_and_gone() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    let running = world.control.until(1, 1, Phase::Running).await;
    assert_eq!(running.driver, "double");
    assert_eq!(running.isolation, "vm (emulated: not a security boundary)");
    assert!(running.image_digest.starts_with("sha256:"), "{}", running.image_digest);
    assert_eq!(world.control.registered().await.name, "n1");

    let configured = world.doubles.configured(0);
    assert_eq!((configured.hostname.as_str(), configured.local_image), ("box-1", true));
    assert_eq!((configured.entropy.len(), configured.resync_marker.len()), (64, 32));

    world.control.want(vec![desired(1, 2, Desired::Stopped)]);
    world.control.until(1, 2, Phase::Stopped).await;
    assert!(!world.doubles.is_running(0));
    world.control.want(vec![desired(1, 3, Desired::Running)]);
    world.control.until(1, 3, Phase::Running).await;
    world.control.want(vec![desired(1, 4, Desired::Deleted)]);
    world.control.until(1, 4, Phase::Gone).await;
    assert!(!world.doubles.is_running(1));
    let left = std::fs::read_dir(world.data().join("sandboxes")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_is_warm_where_a_template_works_and_cold_where_not() {
    let Some(mut world) = World::new().await else { return };
    *world.doubles.template.lock().unwrap() = Template::Broken;
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    let running = world.control.until(1, 1, Phase::Running).await;
    assert_eq!(running.start, "cold");
    let template = *world.doubles.template.lock().unwrap();
    assert_eq!(template, Template::Missing, "what did not work is thrown away");
    let shape = VmShape { cpus: 1, memory_mib: 128 };
    let wished = async {
        while !world.doubles.wished.lock().unwrap().contains(&shape) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(WAIT_MAX, wished).await.expect("another one is made");

    *world.doubles.template.lock().unwrap() = Template::Good;
    world.control.want(vec![desired(1, 1, Desired::Running), desired(2, 1, Desired::Running)]);
    let running = world.control.until(2, 1, Phase::Running).await;
    assert_eq!(running.start, "warm");
    assert_eq!(world.doubles.configured(1).hostname, "box-2");
    assert_ne!(world.doubles.configured(0).entropy, world.doubles.configured(1).entropy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_come_in_by_a_good_ticket_only() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    let laptop = world.laptop().await;
    let good = world.ticket(&laptop, 1);
    world.ping(&laptop, &good).await.unwrap();

    let refused = async |ticket: Ticket, code: StreamErrorCode, says: &str| {
        let error = world.ping(&laptop, &ticket).await.unwrap_err();
        assert_eq!(error.code(), code, "{}", error.message);
        assert!(error.message.contains(says), "{}", error.message);
    };
    let ticket = StreamErrorCode::Ticket;
    refused(Ticket { epoch: 2, ..good.clone() }, ticket, "epoch").await;
    refused(Ticket { not_after_unix_s: 5, ..good.clone() }, ticket, "expired").await;
    refused(Ticket { node_id: vec![1; 16], ..good.clone() }, ticket, "another node").await;
    let other = Ticket { client_key_sha256: vec![1; 32], ..good.clone() };
    refused(other, ticket, "another client").await;
    refused(Ticket { sandbox_id: vec![], ..good.clone() }, ticket, "ticket for a sandbox").await;
    let elsewhere = Ticket { sandbox_id: sandbox(2).to_vec(), ..good.clone() };
    refused(elsewhere, StreamErrorCode::NotRunning, "not here").await;
    let error = laptop.ping(Vec::new()).await.unwrap_err();
    assert_eq!(error.code(), ticket);

    // An open stream ends with its sandbox, and no new one comes in.
    let kind = Some(Kind::ExecList(ExecListOpen {}));
    let open = StreamOpen { ticket: world.control.signer.sign(&good), kind };
    let mut held = laptop.open(&open).await;
    world.ping(&laptop, &good).await.unwrap();
    world.control.want(vec![desired(1, 2, Desired::Deleted)]);
    let ended = tokio::time::timeout(node_support::WAIT_MAX, held.reader.next()).await;
    assert!(ended.expect("the stream ends").is_err(), "it ends by a reset");
    let error = world.ping(&laptop, &good).await.unwrap_err();
    assert_eq!(error.code(), StreamErrorCode::NotRunning, "{}", error.message);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_agents_vms_live_on_and_are_taken_up() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running), desired(2, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    world.control.until(2, 1, Phase::Running).await;
    let pids = world.doubles.pids();
    let first = world.control.link_endpoint();
    world.kill().await;
    assert!(world.doubles.is_running(0) && world.doubles.is_running(1));
    // One of them ends while nobody looks.
    let second = usize::from(world.doubles.configured(1).hostname == "box-2");
    world.doubles.end(second).await;
    world.control.forget();
    world.start();
    world.control.until(1, 1, Phase::Running).await;
    let stopped = world.control.until(2, 1, Phase::Stopped).await;
    assert!(stopped.reason.contains("ended while the node agent was away"), "{}", stopped.reason);
    assert_eq!(world.doubles.pids(), pids, "nothing was started anew");
    assert!(world.doubles.sessions(1 - second) >= 2);
    assert_eq!(world.control.link_endpoint(), first, "laptops find it where it was");
    let laptop = world.laptop().await;
    world.ping(&laptop, &world.ticket(&laptop, 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_vm_stays_so_while_the_node_agent_is_away() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    world.control.want(vec![desired(1, 2, Desired::Paused)]);
    world.control.until(1, 2, Phase::Paused).await;
    let laptop = world.laptop().await;
    let refused = world.ping(&laptop, &world.ticket(&laptop, 1)).await.unwrap_err();
    assert_eq!(refused.code(), StreamErrorCode::NotRunning, "{}", refused.message);
    world.kill().await;
    world.control.forget();
    world.start();
    world.control.until(1, 2, Phase::Paused).await;
    assert_eq!(world.doubles.sessions(0), 1, "nobody talks to one that is halted");
    world.control.want(vec![desired(1, 3, Desired::Running)]);
    world.control.until(1, 3, Phase::Running).await;
    let laptop = world.laptop().await;
    world.ping(&laptop, &world.ticket(&laptop, 1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_what_was_paused_meanwhile_is_refused_and_lets_nothing_go_on() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    let paused = desired(1, 2, Desired::Paused);
    world.control.want(vec![paused.clone()]);
    world.control.until(1, 2, Phase::Paused).await;
    let origin = ForkOrigin { sandbox_id: sandbox(1).to_vec(), fork_id: vec![7; 16] };
    let copy =
        |n| DesiredSandbox { forked_from: Some(origin.clone()), ..desired(n, 1, Desired::Running) };
    world.control.want(vec![paused, copy(2), copy(3)]);
    for n in [2, 3] {
        let failed = world.control.until(n, 1, Phase::Failed).await;
        assert!(failed.reason.contains("is paused: let it go on"), "{}", failed.reason);
        assert!(failed.reason.contains("fork again"), "{}", failed.reason);
    }
    assert!(world.doubles.is_halted(0) && world.doubles.is_running(0));
    assert_eq!(world.doubles.pids().len(), 1, "no copy was started");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_reboot_a_sandbox_is_stopped_and_can_be_started() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    let running = world.control.until(1, 1, Phase::Running).await;
    world.kill().await;
    world.doubles.end(0).await;
    let store = towline_node_agent::store::Store::open(&world.data()).unwrap();
    let dir = store.sandbox(sandbox(1));
    let state =
        towline_node_agent::store::State { boot_id: "another boot".into(), ..dir.state().unwrap() };
    dir.set_state(&state).unwrap();
    drop(store);
    world.control.forget();
    world.start();
    let stopped = world.control.until(1, 1, Phase::Stopped).await;
    assert_eq!(stopped.reason, "host restarted");
    assert_eq!(stopped.image_digest, running.image_digest);
    world.control.want(vec![desired(1, 2, Desired::Running)]);
    world.control.until(1, 2, Phase::Running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_wanted_any_more_is_destroyed_after_a_restart() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running), desired(2, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    world.control.until(2, 1, Phase::Running).await;
    world.kill().await;
    world.control.want(vec![desired(1, 2, Desired::Deleted)]);
    world.control.forget();
    world.start();
    world.control.until(1, 2, Phase::Gone).await;
    let sandboxes = world.data().join("sandboxes");
    let gone = async {
        while std::fs::read_dir(&sandboxes).unwrap().count() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(node_support::WAIT_MAX, gone).await.expect("the second is removed too");
    assert!(!world.doubles.is_running(0) && !world.doubles.is_running(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_vm_and_failures_are_told_with_their_reason() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    let mut unknown = desired(2, 1, Desired::Running);
    let image = unknown.spec.as_mut().unwrap().image.as_mut().unwrap();
    image.source = Some(image_ref::Source::Oci("nope:1".into()));
    unknown.image_digest = format!("sha256:{}", "1".repeat(64));
    let mut large = desired(3, 1, Desired::Running);
    large.spec.as_mut().unwrap().shape.as_mut().unwrap().memory_mib = 4096;
    world.control.want(vec![desired(1, 1, Desired::Running), unknown, large]);
    world.control.until(1, 1, Phase::Running).await;
    world.doubles.end(0).await;
    let stopped = world.control.until(1, 1, Phase::Stopped).await;
    assert!(stopped.reason.contains("signal: 9"), "{}", stopped.reason);
    let failed = world.control.until(2, 1, Phase::Failed).await;
    assert!(failed.reason.contains("tow image import"), "{}", failed.reason);
    let failed = world.control.until(3, 1, Phase::Failed).await;
    assert!(failed.reason.contains("the sandbox needs 4096"), "{}", failed.reason);

    *world.doubles.refuse_boot.lock().unwrap() = Some("no luck today".into());
    world.control.want(vec![desired(1, 2, Desired::Running)]);
    let failed = world.control.until(1, 2, Phase::Failed).await;
    assert!(failed.reason.contains("no luck today"), "{}", failed.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_a_laptop_sends_is_what_a_sandbox_runs() {
    let Some(mut world) = World::new().await else { return };
    if std::process::Command::new("mksquashfs").arg("-version").output().is_err() {
        node_support::print_skipped("mksquashfs (squashfs-tools) is not installed");
        return;
    }
    world.start();
    world.control.registered().await;
    let laptop = world.laptop().await;
    let images = Ticket { sandbox_id: vec![], ..world.ticket(&laptop, 1) };
    let layer = Layer::new().folder("bin", 0o755).file("bin/tool", 0o755, b"tool");
    let layout = Layout::new(vec![layer.finish()]);
    let ticket = world.control.signer.sign(&images);
    let import = |ticket| {
        let kind = Some(Kind::ImageImport(ImageImportOpen { name: "tool:1".into() }));
        StreamOpen { ticket, kind }
    };
    let mut stream = laptop.open(&import(ticket.clone())).await;
    let mut archive = layout.archive();
    for piece in archive.chunks(1000).chain([&[][..]]) {
        let frame = Frame::raw(FrameKind::ImportData, piece.to_vec());
        stream.writer.send(&frame).await.unwrap();
    }
    let imported: ImageImported = answer(&mut stream, FrameKind::Imported).await.decode().unwrap();
    assert_eq!((imported.digest.clone(), imported.layers), (layout.files().1.to_string(), 1));

    let mut wanted = desired(1, 1, Desired::Running);
    let image = wanted.spec.as_mut().unwrap().image.as_mut().unwrap();
    image.source = Some(image_ref::Source::Oci("tool:1".into()));
    wanted.image_digest = imported.digest.clone();
    world.control.want(vec![wanted]);
    let running = world.control.until(1, 1, Phase::Running).await;
    assert_eq!(running.image_digest, imported.digest);
    assert_eq!(world.doubles.configured(0).layers, 1);

    // Images are removed only by a ticket that names what stays, and what is young stays.
    let keep = vec![imported.digest.clone()];
    let collect = |ticket: &Ticket, keep: &[String]| StreamOpen {
        ticket: world.control.signer.sign(ticket),
        kind: Some(Kind::ImageCollect(ImageCollectOpen { keep: keep.to_vec() })),
    };
    let names = Ticket { keep_sha256: keep_digest(&keep), ..images.clone() };
    for open in [collect(&images, &keep), collect(&names, &[]), collect(&images, &[])] {
        let mut stream = laptop.open(&open).await;
        let error: StreamError = answer(&mut stream, FrameKind::Error).await.decode().unwrap();
        assert_eq!(error.code(), StreamErrorCode::Ticket, "{}", error.message);
    }
    for kept in [&keep[..], &[]] {
        let named = Ticket { keep_sha256: keep_digest(kept), ..images.clone() };
        let mut stream = laptop.open(&collect(&named, kept)).await;
        let frame = answer(&mut stream, FrameKind::ImagesCollected).await;
        assert_eq!(frame.decode::<ImagesCollected>().unwrap(), ImagesCollected::default());
    }

    // A damaged archive, and one that is cut off, are refused, the former with its reason.
    let middle = archive.len() / 2;
    archive[middle..middle + 200].fill(7);
    let mut stream = laptop.open(&import(ticket.clone())).await;
    for piece in [&archive[..], &[]] {
        let frame = Frame::raw(FrameKind::ImportData, piece.to_vec());
        stream.writer.send(&frame).await.unwrap();
    }
    let error: StreamError = answer(&mut stream, FrameKind::Error).await.decode().unwrap();
    assert_eq!(error.code(), StreamErrorCode::Invalid, "{}", error.message);
    let mut stream = laptop.open(&import(ticket)).await;
    stream.writer.finish().await.unwrap();
    answer(&mut stream, FrameKind::Error).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_a_laptop_sent_comes_back_whole_or_not_at_all() {
    let Some(mut world) = World::new().await else { return };
    if std::process::Command::new("mksquashfs").arg("-version").output().is_err() {
        node_support::print_skipped("mksquashfs (squashfs-tools) is not installed");
        return;
    }
    world.start();
    world.control.registered().await;
    let laptop = world.laptop().await;
    let of_sandbox = world.ticket(&laptop, 1);
    let images = Ticket { sandbox_id: vec![], ..of_sandbox.clone() };
    let noise: Vec<u8> = (0..500_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
    let layout = Layout::new(vec![Layer::new().file("noise", 0o644, &noise).finish()]);
    let open = |ticket: &Ticket, kind| StreamOpen {
        ticket: world.control.signer.sign(ticket),
        kind: Some(kind),
    };
    let import = || open(&images, Kind::ImageImport(ImageImportOpen { name: "tool:1".into() }));
    let digest = layout.files().1.to_string();
    let export = |ticket: &Ticket, digest: &str| {
        let name = "tool:1".into();
        open(ticket, Kind::ImageExport(ImageExportOpen { digest: digest.into(), name }))
    };
    let mut archive = layout.archive();
    for _ in 0..2 {
        let mut stream = laptop.open(&import()).await;
        for piece in archive.chunks(100_000).chain([&[][..]]) {
            let frame = Frame::raw(FrameKind::ImportData, piece.to_vec());
            stream.writer.send(&frame).await.unwrap();
        }
        let imported: ImageImported =
            answer(&mut stream, FrameKind::Imported).await.decode().unwrap();
        assert_eq!(imported.digest, digest);
        // What is exported is imported next.
        let mut stream = laptop.open(&export(&images, &digest)).await;
        archive.clear();
        loop {
            let piece = answer(&mut stream, FrameKind::ExportData).await.body;
            archive.extend_from_slice(&piece);
            if piece.is_empty() {
                break;
            }
        }
    }
    let push = |ticket: &Ticket, digest: &str, reference: &str| {
        let (digest, reference) = (digest.to_owned(), reference.to_owned());
        open(ticket, Kind::ImagePush(ImagePushOpen { digest, reference, ..Default::default() }))
    };
    let other = format!("sha256:{}", "1".repeat(64));
    for (open, code) in [
        (export(&images, &other), StreamErrorCode::NotFound),
        (export(&images, "tool:1"), StreamErrorCode::Invalid),
        (export(&of_sandbox, &digest), StreamErrorCode::Ticket),
        (push(&images, &other, "reg.example/x"), StreamErrorCode::NotFound),
        (push(&images, "tool:1", "reg.example/x"), StreamErrorCode::Invalid),
        (push(&images, &digest, "No Name"), StreamErrorCode::Invalid),
        (push(&of_sandbox, &digest, "reg.example/x"), StreamErrorCode::Ticket),
    ] {
        let mut stream = laptop.open(&open).await;
        let error: StreamError = answer(&mut stream, FrameKind::Error).await.decode().unwrap();
        assert_eq!(error.code(), code, "{}", error.message);
    }
}

/// The first frame that is not progress.
async fn answer(stream: &mut LinkStream, wanted: FrameKind) -> Frame {
    loop {
        let next = tokio::time::timeout(node_support::WAIT_MAX, stream.reader.next());
        let frame = next.await.expect("an answer").unwrap().expect("a frame");
        if !frame.is(FrameKind::ImportProgress) {
            assert!(frame.is(wanted), "{:?}", frame.decode::<StreamError>());
            return frame;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_was_away_is_told_everything_again() {
    let Some(mut world) = World::new().await else { return };
    world.start();
    world.control.want(vec![desired(1, 1, Desired::Running)]);
    world.control.until(1, 1, Phase::Running).await;
    world.control.forget();
    world.control.cut();
    // Meanwhile the VM ends.
    world.doubles.end(0).await;
    let stopped = world.control.until(1, 1, Phase::Stopped).await;
    assert!(stopped.reason.contains("signal: 9"), "{}", stopped.reason);
    assert_eq!(world.doubles.pids().len(), 1, "it is not started again by itself");
}

/// A listener that counts who came, on an address of the loopback network.
async fn server(address: &str) -> (u16, std::sync::Arc<std::sync::atomic::AtomicU32>) {
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = std::sync::Arc::<std::sync::atomic::AtomicU32>::default();
    let counted = std::sync::Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    (port, count)
}

fn egress(name: &str, port: u16) -> Kind {
    let target = Some(egress_open::Target::Name(name.into()));
    let protocol = EgressProtocol::Tcp.into();
    Kind::Egress(EgressOpen { protocol, target, port: port.into() })
}

async fn said(world: &World, vm: usize, kind: Kind) -> Frame {
    let (mut reader, _writer) = world.doubles.open(vm, kind).await;
    let frame = tokio::time::timeout(node_support::WAIT_MAX, reader.next()).await.unwrap();
    frame.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_reaches_what_policy_and_operator_allow_and_its_owner_is_told_the_rest() {
    let Some(mut world) = World::new().await else { return };
    let (port, allowed) = server("127.0.0.1:0").await;
    let (_, blocked) = server(&format!("127.0.0.2:{port}")).await;
    world.more = format!("[[egress.allow]]\nrange = '127.0.0.1/32'\nports = [{port}]\n");
    world.names.set("rebind.example", &["127.0.0.1", "127.0.0.2"]);
    world.start();
    let mut open = desired(1, 1, Desired::Running);
    open.spec.as_mut().unwrap().policy = "public".into();
    let mut closed = desired(2, 1, Desired::Running);
    closed.spec.as_mut().unwrap().policy = "none".into();
    world.control.want(vec![open, closed]);
    world.control.until(1, 1, Phase::Running).await;
    world.control.until(2, 1, Phase::Running).await;
    let vm = usize::from(world.doubles.configured(0).hostname != "box-1");

    let (mut reader, mut writer) = world.doubles.open(vm, egress("rebind.example", port)).await;
    let opened = tokio::time::timeout(node_support::WAIT_MAX, reader.next()).await.unwrap();
    assert!(opened.unwrap().unwrap().is(FrameKind::EgressOpened));
    let hello = Frame::raw(FrameKind::Pong, &b"hello"[..]);
    writer.send(&hello).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(reader.next().await.unwrap(), Some(hello), "an echo, then its end");
    assert_eq!(reader.next().await.unwrap(), None);

    let code = |frame: &Frame| frame.decode::<StreamError>().unwrap().code();
    let frame = said(&world, vm, egress("rebind.example", port)).await;
    assert_eq!(code(&frame), StreamErrorCode::Blocked);
    let frame = said(&world, 1 - vm, egress("rebind.example", port)).await;
    assert_eq!(code(&frame), StreamErrorCode::Blocked);
    let lookup = Kind::Lookup(LookupOpen { name: "rebind.example".into(), record_type: 1 });
    let frame = said(&world, 1 - vm, lookup).await;
    assert_eq!(frame.decode::<LookupAnswer>().unwrap().response_code, 5);
    let counts = [allowed, blocked].map(|count| count.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(counts, [1, 0]);

    // The owner reads why, over a restart of the node agent too.
    world.kill().await;
    world.control.forget();
    world.start();
    world.control.until(1, 1, Phase::Running).await;
    let rules = feed(&world, 1).await;
    let blocked = format!("rebind.example:{port} 127.0.0.2 loopback 127.0.0.0/8");
    assert!(rules.contains(&blocked) && rules.contains(&"running".to_owned()), "{rules:?}");
    let rules = feed(&world, 2).await;
    assert!(rules.contains(&format!("rebind.example:{port}  policy none")), "{rules:?}");
    world.control.want(vec![desired(1, 2, Desired::Stopped)]);
    world.control.until(1, 2, Phase::Stopped).await;
    let rules = feed(&world, 1).await;
    assert!(rules.iter().any(|rule| rule.starts_with("stopped")), "{rules:?}");
}

/// What a sandbox's feed says, read to its end.
async fn feed(world: &World, n: u8) -> Vec<String> {
    let laptop = world.laptop().await;
    let ticket = world.control.signer.sign(&world.ticket(&laptop, n));
    let kind = Some(Kind::Feed(FeedOpen { after_sequence: 0, follow: false }));
    let mut stream = laptop.open(&StreamOpen { ticket, kind }).await;
    let mut all = Vec::new();
    loop {
        let frame = tokio::time::timeout(node_support::WAIT_MAX, stream.reader.next()).await;
        let frame = frame.unwrap().unwrap().unwrap();
        if frame.is(FrameKind::FeedEnd) {
            return all;
        }
        let entry: FeedEntry = frame.decode().unwrap();
        all.push(match entry.what.unwrap() {
            feed_entry::What::Note(text) => text,
            feed_entry::What::Egress(d) => {
                format!("{}:{} {} {}", d.target, d.port, d.address, d.rule)
            }
        });
    }
}
