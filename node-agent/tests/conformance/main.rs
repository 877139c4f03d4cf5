//! One suite over all drivers, with the real guest agent: configured with a squashfs layer, or the
//! machine's own system over FUSE, and an ext4 disk, it runs commands and survives what they do.
//!
//! A driver's capabilities decide what is asked of it; what is not is said, with the capability. A
//! new driver needs a test function here and nothing else.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should say where"
)]

mod fork;
mod guest;
mod helper;
mod hostile;
mod limits;
mod local_image;
mod net;
mod warm;

use std::time::Duration;

use guest::{
    BOOT_MAX, Guest, SECRET, cloud_hypervisor, frame, message, process, qemu, run_async, start,
    to_the_end, until_shown, vm_dir,
};
use towline_node_agent::guest_link::GuestLink;
use towline_node_agent::hypervisor::Hypervisor;
use towline_proto::frame::FrameKind;
use towline_proto::v1::{
    ExecOpen, ExecSignal, ExecStart, ExecStarted, GuestCommand, GuestEvent, PingOpen, Shutdown,
    StreamErrorCode, Terminal, exec_open::How, guest_command, guest_event, stream_open::Kind,
};

#[test]
fn qemu_keeps_to_what_every_driver_does() {
    run_async(async {
        let Some(driver) = qemu().await else { return };
        conforms(&driver).await;
    });
}

#[test]
fn cloud_hypervisor_keeps_to_what_every_driver_does() {
    run_async(async {
        let Some(driver) = cloud_hypervisor().await else { return };
        conforms(&driver).await;
    });
}

#[test]
fn process_keeps_to_what_every_driver_does() {
    run_async(async {
        let Some(driver) = process() else { return };
        conforms(&driver).await;
    });
}

pub(crate) async fn conforms(driver: &dyn Hypervisor) {
    let (_guard, dir) = vm_dir();
    let Some(mut guest) = Guest::boot(driver, &dir).await else { return };
    guest.check_host_side();
    guest.check_commands().await;
    guest.check_terminal().await;
    guest.check_isolation().await;
    guest.check_hostile_root().await;
    guest.check_fork_bomb().await;
    guest.check_out_of_memory().await;
    guest.check_full_disk().await;
    guest = guest.check_adoption(driver).await;
    guest.check_reboot_inside().await;
    guest.check_shutdown().await;
    assert!(driver.adopt(&dir).unwrap().is_none(), "what has ended is not found");
    let again = Guest::boot(driver, &dir).await.expect("it boots again");
    let kept = again.run(&["cat", "/kept"]).await;
    assert_eq!(kept.stdout, "kept\n", "{kept:?}");
    again.check_kill(driver, &dir).await;
}

impl Guest {
    async fn check_commands(&self) {
        let (mut pong, _writer) = self.open_stream(Kind::Ping(PingOpen { guest: true })).await;
        assert!(frame(&mut pong).await.is(FrameKind::Pong));
        let out = self.run(&["sh", "-c", "echo $FROM_IMAGE $HOME; id -u; id -g; uname -n; cat /etc/hostname /etc/machine-id; echo err >&2; exit 3"]).await;
        let wanted =
            format!("yes /home/ann\n1000\n1000\nfirst-light\nfirst-light\n{}\n", "ab".repeat(16));
        assert_eq!(
            (out.code, out.stdout.as_str(), out.stderr.as_str()),
            (3, wanted.as_str(), "err\n")
        );
        let out = self.run(&["sh", "-c", "pwd; touch here && ls; stat -c %u:%g . /home/ann"]).await;
        assert_eq!(out.stdout, "/home/ann/project\nhere\n1000:1000\n1000:1000\n", "{out:?}");
        let out = self.run(&["sh", "-c", "kill -SEGV $$"]).await;
        assert_eq!(out.code, 128 + 11);
        let refused = self.run(&["no-such-command"]).await.refused.unwrap();
        assert_eq!(refused.code(), StreamErrorCode::CommandNotFound);
        let refused = self.run(&["/etc/hostname"]).await.refused.unwrap();
        assert_eq!(refused.code(), StreamErrorCode::CannotExecute, "{refused:?}");
        let out = self.run_as_root("echo kept > /kept; id -u").await;
        assert_eq!(out.stdout, "0\n", "{out:?}");
    }

    async fn check_terminal(&self) {
        let terminal = Some(Terminal { rows: 33, columns: 77, term: "xterm".into() });
        let what = ExecStart { terminal, ..start(&["sh", "-c", "tty; stty size; cat"]) };
        let (mut reader, mut writer) = self.open(what).await;
        let shown = until_shown(&mut reader, "33 77\r\n").await;
        assert!(shown.contains("/dev/pts/0\r\n"), "{shown}");
        writer.send_data(FrameKind::Stdin, 0, b"typed\n").await.unwrap();
        until_shown(&mut reader, "typed\r\ntyped\r\n").await;
        writer.send_data(FrameKind::Stdin, 6, b"\x03").await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!(out.code, 130, "ctrl-c interrupts: {out:?}");
    }

    /// Root in the sandbox sees neither the agent nor its disk, and cannot end it.
    async fn check_isolation(&self) {
        let out = self
            .run_as_root("cat /proc/1/comm; kill -9 1; kill -9 -1; ls / /proc/1/root/; cat /proc/mounts; ls /dev")
            .await;
        assert!(out.stdout.starts_with("towline-init\n"), "{out:?}");
        assert!(!out.stdout.contains("spool"), "{out:?}");
        for wanted in ["\nnull\n", "\nfull\n", "/home/ann/project ext4"] {
            assert!(out.stdout.contains(wanted), "{wanted}: {out:?}");
        }
        let out = self.run_as_root("ls -A /run/towline").await;
        assert_eq!(out.stdout, "fork\n", "the agent's own mounts are not there: {out:?}");
        let out = self.run_as_root("echo x > /sys/kernel/mm/uevent_seqnum").await;
        assert!(out.stderr.contains("Read-only"), "{out:?}");
    }

    async fn check_fork_bomb(&self) {
        if !self.asked("fork bomb", "process_limit", self.capabilities.process_limit) {
            return;
        }
        let bomb = "bomb() { bomb | bomb & }; bomb; sleep 1000";
        let (mut reader, mut writer) = self.open(start(&["bash", "-c", bomb])).await;
        let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        // At its limit nothing new can be started, and the refusal says so.
        let refused = loop {
            let out = self.run(&["sh", "-c", "true"]).await;
            if let Some(refused) = out.refused {
                break refused;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(refused.code(), StreamErrorCode::Limit, "{refused:?}");
        assert!(refused.message.contains("processes"), "{refused:?}");
        writer.send_message(FrameKind::Signal, &ExecSignal { signal: 9 }).await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!(out.code, 128 + 9);
        self.eventually_runs().await;
    }

    /// Processes that were killed are gone a moment later.
    async fn eventually_runs(&self) {
        let runs = async {
            loop {
                let out = self.run(&["sh", "-c", "ls > /dev/null && echo alive"]).await;
                if out.stdout == "alive\n" {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(BOOT_MAX, runs).await.expect("commands run again");
    }

    async fn check_out_of_memory(&mut self) {
        if !self.asked("out of memory", "memory_limit", self.capabilities.memory_limit) {
            return;
        }
        // A second command, which must not be the one that is killed.
        let (mut other, mut other_writer) = self.open(start(&["cat"])).await;
        let _started: ExecStarted = message(&mut other, FrameKind::Started).await;
        let together = self.capabilities.memory_limit_ends_commands;
        let argv = if self.asked("a hog ends its command", "memory_limit_ends_commands", together) {
            // One endless line, which tail must keep whole.
            ["sh", "-c", "head -c 1000m /dev/zero | tail; echo survived"]
        } else {
            ["perl", "-e", "my $x = 'y' x (900 << 20); print 'survived'"]
        };
        let out = self.run(&argv).await;
        assert_eq!((out.code, out.stdout.as_str()), (137, ""), "{out:?}");
        assert!(out.reason.starts_with("killed: out of memory (limit "), "{out:?}");
        other_writer.send_data(FrameKind::StdinEof, 0, &[]).await.unwrap();
        assert_eq!(to_the_end(&mut other, &mut other_writer).await.code, 0);
        self.eventually_runs().await;
        let event = tokio::time::timeout(BOOT_MAX, self.out_of_memory_event()).await.unwrap();
        assert!(event.contains("out of memory"), "{event}");
    }

    async fn out_of_memory_event(&mut self) -> String {
        loop {
            let frame = self.link.control.events.next().await.unwrap().unwrap();
            let event: GuestEvent = frame.decode().unwrap();
            if let Some(guest_event::Event::OutOfMemory(event)) = event.event {
                return event.message;
            }
        }
    }

    async fn check_full_disk(&self) {
        if !self.asked("full disk", "disk_limit", self.capabilities.disk_limit) {
            return;
        }
        let out = self.run_as_root("cat /dev/zero > /big; echo full; df /").await;
        assert!(out.stderr.contains("No space left"), "{out:?}");
        // A detached one cannot even make its spool, or keeps its output in memory.
        let what = ExecStart { detached: true, ..start(&["sh", "-c", "echo spooled"]) };
        let (mut reader, mut writer) = self.open(what).await;
        let out = to_the_end(&mut reader, &mut writer).await;
        let no_space = out.refused.as_ref().is_some_and(|e| e.code() == StreamErrorCode::NoSpace);
        assert!(out.stdout == "spooled\n" || no_space, "{out:?}");
        let out = self.run_as_root("rm /big && echo freed > /freed && cat /freed").await;
        assert_eq!(out.stdout, "freed\n", "{out:?}");
    }

    /// As a restarted node agent: the VM is found again, the command goes on, and its output is
    /// taken up where it was.
    async fn check_adoption(self, driver: &dyn Hypervisor) -> Self {
        let script = "echo before; read line; echo after $line";
        let (mut reader, _writer) = self.open(start(&["sh", "-c", script])).await;
        let started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        let shown = frame(&mut reader).await.split_data().unwrap().1;
        assert_eq!(&shown[..], b"before\n");
        let Self { capabilities, vm, link, next_key } = self;
        drop(link);
        let vm = vm.adopted(driver);
        let link = GuestLink::connect(&vm, SECRET, BOOT_MAX).await.unwrap();
        assert!(link.hello.configured);
        let guest = Self { capabilities, vm, link, next_key };
        let resume = towline_proto::v1::ExecResume { stdout_offset: 7, ..Default::default() };
        let open = ExecOpen { exec_id: started.exec_id, how: Some(How::Resume(resume)) };
        let (mut reader, mut writer) = guest.open_stream(Kind::Exec(open)).await;
        writer.send_data(FrameKind::Stdin, 0, b"all\n").await.unwrap();
        let out = to_the_end(&mut reader, &mut writer).await;
        assert_eq!((out.code, out.stdout.as_str()), (0, "after all\n"));
        guest
    }

    /// `reboot` in a pid namespace ends its init: the next command finds a new one.
    async fn check_reboot_inside(&self) {
        let (mut other, mut other_writer) = self.open(start(&["cat"])).await;
        let _started: ExecStarted = message(&mut other, FrameKind::Started).await;
        // reboot(LINUX_REBOOT_CMD_RESTART) on x86-64.
        let script = "syscall(169, 0xfee1dead, 672274793, 0x01234567, 0); sleep 60";
        self.run_as_root(&format!("perl -e '{script}'")).await;
        let ended = to_the_end(&mut other, &mut other_writer).await;
        assert_eq!(ended.code, 137, "all of the workload ends with its init: {ended:?}");
        self.eventually_runs().await;
    }

    async fn check_shutdown(mut self) {
        let (mut reader, _writer) = self
            .open(start(&[
                "sh",
                "-c",
                "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done",
            ]))
            .await;
        let _started: ExecStarted = message(&mut reader, FrameKind::Started).await;
        assert!(frame(&mut reader).await.is(FrameKind::Stdout));
        let command = Some(guest_command::Command::Shutdown(Shutdown { grace_ms: 20_000 }));
        let commands = &mut self.link.control.commands;
        commands.send_message(FrameKind::Command, &GuestCommand { command }).await.unwrap();
        let exit =
            tokio::time::timeout(BOOT_MAX, self.vm.wait_exit()).await.expect("it powers off");
        // The helper tells only who had it started, and this one was taken up since.
        let is_told = !self.has_own_user() || !exit.status.is_empty();
        assert!(!is_told || exit.status == "exit status: 0", "{exit}");
    }
}
