//! The machine's own system as the guest's root, over FUSE and a real link that is cut on the way.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::JoinHandle;
use towline_images::local;
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::Hypervisor;
use towline_proto::frame::{Frame, FrameKind};
use towline_proto::v1::{
    ExecOpen, ExecResume, ExecStarted, GuestConfigure, GuestConfigured, StreamOpen, exec_open::How,
    stream_open::Kind,
};
use towline_streams::{FrameReader, FrameWriter};

use crate::guest::{
    BOOT_MAX, Guest, SECRET, cloud_hypervisor, configuration, message, process, qemu, run_async,
    start, to_the_end, vm_dir,
};

/// Counts requests, and swallows all from the given one on: they stay unanswered.
#[derive(Default)]
struct Counter {
    requests: AtomicUsize,
    swallow_from: AtomicUsize,
}

#[test]
fn vm_runs_the_machines_own_programs_over_a_link_that_is_cut() {
    run_async(async {
        let Some(driver) = qemu().await else { return };
        runs_the_machines_own_programs(&driver).await;
    });
}

#[test]
fn cloud_hypervisor_runs_the_machines_own_programs_over_a_link_that_is_cut() {
    run_async(async {
        let Some(driver) = cloud_hypervisor().await else { return };
        runs_the_machines_own_programs(&driver).await;
    });
}

#[test]
fn process_runs_the_machines_own_programs_over_a_link_that_is_cut() {
    run_async(async {
        let Some(driver) = process() else { return };
        runs_the_machines_own_programs(&driver).await;
    });
}

async fn runs_the_machines_own_programs(driver: &dyn Hypervisor) {
    let (_guard, dir) = vm_dir();
    let cache = tempfile::tempdir().unwrap();
    let home = cache.path().join("home");
    std::fs::create_dir(&home).unwrap();
    let built = local::build(cache.path(), Path::new("/"), &home, &mut |_| {}).unwrap();
    let root = std::fs::File::open("/").unwrap();
    let server = Arc::new(local::Server::new(built.manifest, root.into()));
    let counter = Arc::new(Counter::default());
    counter.swallow_from.store(usize::MAX, Ordering::Relaxed);

    let mut guest = Guest::boot_only(driver, &dir, Vec::new()).await;
    let served = configure(&mut guest, &server, &counter).await;

    let out = guest.run(&["bash", "-c", "test -x /usr/bin/env && id -u && echo $PWD"]).await;
    assert_eq!(out.stdout, "1000\n/home/ann/project\n", "{out:?}");
    let out = guest.run_as_root("echo changed > /etc/debian_version && cat /etc/debian_version && rm /usr/bin/tac && ls /usr/bin/tac; ls /proc/self/fd /dev/shm").await;
    assert!(out.stdout.starts_with("changed\n"), "{out:?}");
    assert!(out.stderr.contains("'/usr/bin/tac': No such file"), "{out:?}");
    let before = counter.requests.load(Ordering::Relaxed);
    let again = guest.run(&["bash", "-c", "true"]).await;
    assert_eq!(again.code, 0);
    let more = counter.requests.load(Ordering::Relaxed) - before;
    assert!(more < 20, "{more} requests for what the guest has read already");

    // In the middle of reading, the node stops answering, then is replaced.
    let big = std::fs::canonicalize("/usr/bin/perl").unwrap();
    let script = format!("sha256sum {}", big.display());
    let (mut reader, _writer) = guest.open(start(&["sh", "-c", &script])).await;
    let started: ExecStarted = message(&mut reader, FrameKind::Started).await;
    let now = counter.requests.load(Ordering::Relaxed);
    counter.swallow_from.store(now + 3, Ordering::Relaxed);
    let swallowed = async {
        while counter.requests.load(Ordering::Relaxed) < now + 4 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(BOOT_MAX, swallowed).await.expect("requests that are not answered");
    served.abort();
    let Guest { capabilities, vm, link, next_key } = guest;
    drop(link);
    counter.swallow_from.store(usize::MAX, Ordering::Relaxed);
    let mut link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
    let _served = serve_fuse(&mut link, &server, &counter).await;
    let guest = Guest { capabilities, vm, link, next_key };
    let resume = ExecResume::default();
    let open = ExecOpen { exec_id: started.exec_id, how: Some(How::Resume(resume)) };
    let (mut reader, mut writer) = guest.open_stream(Kind::Exec(open)).await;
    let out = to_the_end(&mut reader, &mut writer).await;
    assert_eq!((out.code, out.stdout), (0, sha256_of(&big)), "{}", out.stderr);
    is_killed_while_it_waits(driver, guest, &counter).await;
}

/// A command waits for the node before it has even begun, and the sandbox is killed: it ends whole.
async fn is_killed_while_it_waits(driver: &dyn Hypervisor, guest: Guest, counter: &Counter) {
    counter.swallow_from.store(0, Ordering::Relaxed);
    let before = counter.requests.load(Ordering::Relaxed);
    let (_reader, _writer) = guest.open(start(&["base32", "--version"])).await;
    let asked = async {
        while counter.requests.load(Ordering::Relaxed) == before {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(BOOT_MAX, asked).await.expect("its program is looked for");
    guest.vm.kill().unwrap();
    tokio::time::timeout(BOOT_MAX, guest.vm.wait_exit()).await.expect("it ends");
    assert!(driver.adopt(guest.vm.dir()).unwrap().is_none());
}

fn sha256_of(file: &Path) -> String {
    let out = std::process::Command::new("sha256sum").arg(file).output().unwrap();
    String::from_utf8(out.stdout).unwrap()
}

/// Configures, and serves the file system meanwhile: the guest needs it to answer.
async fn configure(
    guest: &mut Guest,
    server: &Arc<local::Server>,
    counter: &Arc<Counter>,
) -> JoinHandle<()> {
    let configure = GuestConfigure { local_image: true, ..configuration() };
    let commands = &mut guest.link.control.commands;
    commands.send_message(FrameKind::Configure, &configure).await.unwrap();
    let served = serve_fuse(&mut guest.link, server, counter).await;
    let answer = tokio::time::timeout(BOOT_MAX, guest.link.control.events.next()).await.unwrap();
    let configured: GuestConfigured = answer.unwrap().unwrap().decode().unwrap();
    assert_eq!(configured.error, None);
    served
}

/// Takes the session's Fuse stream and serves it as the node agent does, one request at a time.
async fn serve_fuse(
    link: &mut GuestLink,
    server: &Arc<local::Server>,
    counter: &Arc<Counter>,
) -> JoinHandle<()> {
    let opened = tokio::time::timeout(BOOT_MAX, link.incoming.next()).await;
    let (send, recv) = opened.expect("a stream in time").expect("the Fuse stream");
    let (mut reader, mut writer) = (FrameReader::new(recv), FrameWriter::new(send));
    let open: StreamOpen = message(&mut reader, FrameKind::Open).await;
    assert!(matches!(open.kind, Some(Kind::Fuse(_))), "{open:?}");
    let (server, counter) = (Arc::clone(server), Arc::clone(counter));
    tokio::spawn(async move {
        while let Ok(Some(frame)) = reader.next().await {
            assert!(frame.is(FrameKind::FuseRequest));
            let number = counter.requests.fetch_add(1, Ordering::Relaxed);
            if number >= counter.swallow_from.load(Ordering::Relaxed) {
                continue;
            }
            let server = Arc::clone(&server);
            let answer = tokio::task::spawn_blocking(move || server.handle(&frame.body)).await;
            if let Some(answer) = answer.unwrap() {
                let frame = Frame::raw(FrameKind::FuseAnswer, answer);
                if writer.send(&frame).await.is_err() {
                    return;
                }
            }
        }
    })
}
