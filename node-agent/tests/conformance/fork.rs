//! A guest is halted, goes on, is saved and started again as other guests: what the drivers that can
//! save memory must do, and what the guest agent must, before `tow fork` may be built on it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use towline_node_agent::disks;
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::Hypervisor;
use towline_node_agent::seal::Key;
use towline_proto::frame::FrameKind;
use towline_proto::v1::{
    Became, Become, ExecStarted, Freeze, Frozen, GuestCommand, GuestEvent, Thaw,
    guest_command::Command, guest_event::Event,
};

use super::guest::{
    BOOT_MAX, Guest, Machine, SECRET, cloud_hypervisor, frame, layer, message, process, qemu,
    run_async, spec, start, to_the_end, vm_dir,
};

/// A line each of what no two guests may share.
const DRAW: &str = "cat /proc/sys/kernel/random/uuid /etc/machine-id /etc/hostname; uname -n; \
                    head -c 1048576 /dev/urandom | sha256sum";

#[test]
fn vm_is_copied_and_no_copy_is_what_it_was() {
    run_async(async {
        let Some(driver) = qemu().await else { return };
        is_copied(&driver).await;
    });
}

#[test]
fn cloud_hypervisor_is_copied_and_no_copy_is_what_it_was() {
    run_async(async {
        let Some(driver) = cloud_hypervisor().await else { return };
        is_copied(&driver).await;
    });
}

#[test]
fn process_is_halted_and_goes_on_and_says_that_it_cannot_be_copied() {
    run_async(async {
        let Some(driver) = process() else { return };
        let (_guard, dir) = vm_dir();
        let Some(mut guest) = Guest::boot(&driver, &dir).await else { return };
        check_pause(&guest).await;
        guest = check_node_agent_gone(guest).await;
        assert_eq!(driver.fits(), None);
        assert!(driver.save(&guest.vm, &dir.join("saved")).await.is_err());
        let Event::Frozen(said) = order(&mut guest, freeze()).await else {
            panic!("another event")
        };
        assert!(said.error.unwrap().message.contains("kernel of its own"));
    });
}

/// Halted twice, it is halted; let go on twice, it goes on, and nothing is lost.
async fn check_pause(guest: &Guest) {
    let (mut reader, mut writer) = guest.open(start(&["cat"])).await;
    let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
    guest.vm.pause().await.unwrap();
    guest.vm.pause().await.unwrap();
    writer.send_data(FrameKind::Stdin, 0, b"said while it was halted\n").await.unwrap();
    let silent = tokio::time::timeout(Duration::from_millis(300), reader.next()).await;
    assert!(silent.is_err(), "it is halted, and says {silent:?}");
    guest.vm.resume().await.unwrap();
    assert!(!guest.vm.resume().await.unwrap(), "it was not halted any more");
    writer.send_data(FrameKind::StdinEof, 25, &[]).await.unwrap();
    let out = to_the_end(&mut reader, &mut writer).await;
    assert_eq!(out.stdout, "said while it was halted\n", "{out:?}");
}

/// The node agent dies while it is halted and has more to say; the next one lets it go on and reaches
/// it, whichever it does first.
async fn check_node_agent_gone(mut guest: Guest) -> Guest {
    for round in 0..4 {
        let (mut reader, _writer) = guest.open(start(&["seq", "100000"])).await;
        let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        guest.vm.pause().await.unwrap();
        let Guest { capabilities, vm, link, next_key } = guest;
        drop((link, reader, _writer));
        if round % 2 == 0 {
            vm.open_link_ahead().await;
        }
        vm.resume().await.unwrap();
        // What it says now is lost, and must not keep it from being heard later.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await;
        let link = link.unwrap_or_else(|error| panic!("round {round}: {error}"));
        guest = Guest { capabilities, vm, link, next_key };
        assert_eq!(guest.run(&["sh", "-c", "exit 7"]).await.code, 7);
    }
    guest
}

fn freeze() -> Command {
    Command::Freeze(Freeze { fork_id: vec![4; 16] })
}

fn become_(n: u8) -> Become {
    Become {
        fork_id: vec![4; 16],
        sandbox_id: format!("sbx_{n}"),
        resync_marker: vec![n; 32],
        hostname: format!("copy-{n}"),
        unix_ns: 1_900_000_000_000_000_000,
        entropy: vec![n; 64],
        machine_id: vec![n; 16],
    }
}

async fn command(guest: &mut Guest, command: Command) {
    let command = GuestCommand { command: Some(command) };
    let commands = &mut guest.link.control.commands;
    commands.send_message(FrameKind::Command, &command).await.unwrap();
}

/// Gives an order, and waits for the event that answers it.
async fn order(guest: &mut Guest, given: Command) -> Event {
    command(guest, given).await;
    loop {
        let event: GuestEvent = frame(&mut guest.link.control.events).await.decode().unwrap();
        if let Some(event @ (Event::Frozen(_) | Event::Became(_))) = event.event {
            return event;
        }
    }
}

pub(crate) async fn is_copied(driver: &dyn Hypervisor) {
    assert!(driver.fits().is_some());
    let dirs = [vm_dir(), vm_dir(), vm_dir()];
    let [(_, first), (_, second), (_, third)] = &dirs;
    let Some(original) = Guest::boot(driver, first).await else { return };
    check_pause(&original).await;
    let mut original = check_node_agent_gone(original).await;
    original.run_as_root("echo kept > /kept").await;
    // One that is asleep in the middle of something.
    let (mut reader, mut writer) = original.open(start(&["sh", "-c", "read x; echo got $x"])).await;
    let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;

    let frozen = order(&mut original, freeze()).await;
    assert_eq!(frozen, Event::Frozen(Frozen { fork_id: vec![4; 16], error: None }));
    let saved = second.join("saved");
    original.vm.pause().await.unwrap();
    driver.save(&original.vm, &saved).await.unwrap();
    for dir in [second, third] {
        disks::replace(&first.join("upper.img"), &dir.join("upper.img")).unwrap();
    }
    assert!(original.vm.resume().await.unwrap(), "it stays halted until it is let go on");
    command(&mut original, Command::Thaw(Thaw {})).await;
    writer.send_data(FrameKind::Stdin, 0, b"this\n").await.unwrap();
    assert_eq!(to_the_end(&mut reader, &mut writer).await.stdout, "got this\n");

    let layers = vec![layer(first).unwrap()];
    let (mut one, mut two) = tokio::join!(
        copy(driver, second, &saved, layers.clone(), 1),
        copy(driver, third, &saved, layers.clone(), 2),
    );
    for (copy, n) in [(&mut one, 1), (&mut two, 2)] {
        let refused = order(copy, Command::Become(Become { entropy: vec![], ..become_(n) })).await;
        assert!(matches!(refused, Event::Became(Became { error: Some(_), .. })), "{refused:?}");
        let became = order(copy, Command::Become(become_(n))).await;
        assert_eq!(became, Event::Became(Became { fork_id: vec![4; 16], error: None }));
        // Once it runs, it is who it is. (A secret that it knows already would begin a session.)
        let again = order(copy, Command::Become(become_(n + 10))).await;
        assert!(matches!(again, Event::Became(Became { error: Some(_), .. })), "{again:?}");
        check_nothing_held_back(copy, n).await;
    }
    let drawn = [draw(&original).await, draw(&one).await, draw(&two).await];
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        for (line, other) in drawn[a].lines().zip(drawn[b].lines()) {
            assert_ne!(line, other, "{drawn:?}");
        }
    }
    assert!(drawn[1].lines().count() == 5 && drawn[1].contains("copy-1\ncopy-1\n"), "{drawn:?}");
    let told = "cat /run/towline/fork /kept; perl -e 'print time'";
    let told = one.run_as_root(told).await.stdout;
    let [fork, kept, now] = told.lines().collect::<Vec<_>>()[..] else { panic!("{told}") };
    assert_eq!((fork, kept), (format!("{} sbx_1", "04".repeat(16)).as_str(), "kept"));
    assert!((1_900_000_000..1_900_000_600).contains(&now.parse::<u64>().unwrap()), "{now}");
    assert_eq!(original.run_as_root("cat /run/towline/fork").await.stdout, "");
    // Its next session is by its own secret.
    let Guest { capabilities, vm, link, next_key } = one;
    drop(link);
    let link = GuestLink::connect(&vm, [1; 32], BOOT_MAX).await.unwrap();
    assert!(link.hello.configured && !link.hello.frozen);
    let one = Guest { capabilities, vm, link, next_key };
    assert_eq!(one.run(&["sh", "-c", "exit 7"]).await.code, 7);
    drop((one, two));
    check_damaged(driver, second, &saved, layers).await;
}

async fn draw(guest: &Guest) -> String {
    let out = guest.run_as_root(DRAW).await;
    assert_eq!((out.code, out.stderr.as_str()), (0, ""), "{out:?}");
    out.stdout
}

/// What ends like the start of the secret that it was given in this very session is no secret.
async fn check_nothing_held_back(copy: &Guest, n: u8) {
    let (mut reader, mut writer) = copy.open(start(&["cat"])).await;
    let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
    let mut offset = 0;
    for len in 1..32 {
        let said = vec![n; len];
        writer.send_data(FrameKind::Stdin, offset, &said).await.unwrap();
        offset += len as u64;
        let mut echoed = 0;
        while echoed < len {
            let next = tokio::time::timeout(BOOT_MAX, frame(&mut reader)).await;
            let next = next.unwrap_or_else(|_| panic!("{echoed} of {len} bytes came back"));
            if next.is(FrameKind::Stdout) {
                echoed += next.split_data().unwrap().1.len();
            }
        }
    }
    writer.send_data(FrameKind::StdinEof, offset, &[]).await.unwrap();
    to_the_end(&mut reader, &mut writer).await;
}

/// Up to the hello: it is still the original, and stands still.
async fn copy(
    driver: &dyn Hypervisor,
    dir: &Path,
    saved: &Path,
    layers: Vec<PathBuf>,
    n: u8,
) -> Guest {
    let vm = Machine(driver.start_copy(&spec(dir, layers), saved).await.unwrap());
    let link = GuestLink::connect_copy(&vm, [n; 32], SECRET, BOOT_MAX).await.unwrap();
    assert!(link.hello.configured && link.hello.frozen);
    let next_key = std::cell::Cell::new(1 << 64);
    Guest { capabilities: driver.capabilities().clone(), vm, link, next_key }
}

/// What was cut short breaks its seal; a VMM that sees it refuses, too, and nothing lives of it.
async fn check_damaged(driver: &dyn Hypervisor, dir: &Path, saved: &Path, layers: Vec<PathBuf>) {
    let key = Key::open(&dir.join("key")).unwrap();
    let name = saved.file_name().unwrap().to_str().unwrap();
    let seal = key.seal(saved.parent().unwrap(), &[name], b"").unwrap();
    let mut files = vec![saved.to_owned()];
    if saved.is_dir() {
        let entries = std::fs::read_dir(saved).unwrap();
        files = entries.map(|entry| entry.unwrap().path()).collect();
    }
    let size = |path: &PathBuf| std::fs::metadata(path).unwrap().len();
    // What is read whole: a large memory may come as it is used.
    let smallest = files.iter().min_by_key(|path| size(path)).unwrap();
    let open = std::fs::OpenOptions::new().write(true).open(smallest).unwrap();
    open.set_len(size(smallest) / 2).unwrap();
    key.check(&seal, saved.parent().unwrap(), &[name], b"").unwrap_err();
    // The copy that was killed a moment ago.
    while let Some(vm) = driver.adopt(dir).unwrap() {
        vm.kill().unwrap();
        vm.wait_exit().await;
    }
    driver.start_copy(&spec(dir, layers), saved).await.unwrap_err();
    assert!(driver.adopt(dir).unwrap().is_none());
}
