//! The network of a real sandbox against a node that the test plays: what the workload's sockets
//! tell, and bytes both ways, over the real guest link.

use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towline_node_agent::hypervisor::Hypervisor;
use towline_proto::frame::FrameKind;
use towline_proto::v1::egress_open::Target;
use towline_proto::v1::{
    EgressOpen, EgressOpened, EgressProtocol, LookupAnswer, StreamError, StreamErrorCode,
    StreamOpen, stream_open::Kind,
};
use towline_streams::{FrameReader, FrameWriter, Incoming, MuxDriver, MuxRecv, MuxSend};

use crate::guest::{Guest, cloud_hypervisor, process, qemu, run_async, vm_dir};

/// What the guest sends: `seq 1 LINES`, some 50 MB.
const LINES: u32 = 6_500_000;

type Notes = Arc<Mutex<Vec<EgressOpen>>>;

#[test]
fn qemu_reaches_what_the_node_opens_and_nothing_else() {
    run_async(async {
        let Some(driver) = qemu().await else { return };
        reaches(&driver).await;
    });
}

#[test]
fn cloud_hypervisor_reaches_what_the_node_opens_and_nothing_else() {
    run_async(async {
        let Some(driver) = cloud_hypervisor().await else { return };
        reaches(&driver).await;
    });
}

#[test]
fn process_reaches_what_the_node_opens_and_nothing_else() {
    run_async(async {
        let Some(driver) = process() else { return };
        reaches(&driver).await;
    });
}

async fn reaches(driver: &dyn Hypervisor) {
    let (_guard, dir) = vm_dir();
    let Some(mut guest) = Guest::boot(driver, &dir).await else { return };
    let notes = serve(&mut guest);
    guest.check_device().await;
    guest.check_truth(&notes).await;
    guest.check_names(&notes).await;
    guest.check_bytes().await;
    guest.check_many().await;
}

impl Guest {
    async fn check_device(&self) {
        let out =
            self.run(&["cat", "/etc/resolv.conf", "/proc/net/dev", "/proc/net/if_inet6"]).await;
        assert!(out.stdout.starts_with("nameserver 198.18.0.2\n"), "{out:?}");
        assert!(out.stdout.contains("tow0:") && out.stdout.contains("lo:"), "{out:?}");
        assert!(!out.stdout.contains("fe80"), "nothing is made up: {out:?}");
    }

    async fn check_truth(&self, notes: &Notes) {
        for (port, text) in
            [(1, "Connection refused"), (2, "Connection refused"), (3, "No route to host")]
        {
            for address in ["203.0.113.9", "2001:db8::9"] {
                let script = format!("exec 3<>/dev/tcp/{address}/{port}");
                let out = self.run(&["bash", "-c", &script]).await;
                assert!(out.code != 0 && out.stderr.contains(text), "{script}: {out:?}");
            }
        }
        assert_eq!(notes.lock().unwrap().len(), 6);
        // `read` would take one byte of the datagram and lose the rest.
        let script = "exec 3<>/dev/udp/203.0.113.9/7; echo ping >&3; head -n 1 <&3";
        let out = self.run(&["bash", "-c", script]).await;
        assert_eq!(out.stdout, "ping\n", "{out:?}");
    }

    async fn check_names(&self, notes: &Notes) {
        let script = "exec 3<>/dev/tcp/web.test/7; echo hello >&3; read -t 60 line <&3; echo $line";
        let out = self.run(&["bash", "-c", script]).await;
        assert_eq!(out.stdout, "hello\n", "{out:?}");
        let target = notes.lock().unwrap().last().unwrap().target.clone();
        assert_eq!(target, Some(Target::Name("web.test".into())));
        let out = self.run(&["bash", "-c", "exec 3<>/dev/tcp/missing.test/7"]).await;
        assert!(out.stderr.contains("not known"), "{out:?}");
        // A question over TCP, by hand: its id comes back, and the address that the name has.
        let script = r#"
            socket(S, 2, 1, 6) or die; connect(S, pack("SnC4x8", 2, 53, 198, 18, 0, 2)) or die $!;
            my $q = pack("n6", 4711, 256, 1, 0, 0, 0) . "\3web\4test\0" . pack("n2", 1, 1);
            syswrite(S, pack("n", length $q) . $q); my $a = "";
            while (length($a) < 2 || length($a) < 2 + unpack("n", $a)) { sysread(S, $a, 4096, length $a) or die }
            print unpack("n", substr($a, 2)), " ", join(".", unpack("C4", substr($a, -4))), "\n";
        "#;
        let out = self.run(&["perl", "-e", script]).await;
        assert_eq!(out.stdout, "4711 198.18.1.0\n", "{out:?}");
    }

    async fn check_bytes(&self) {
        // Up, half-closed, and the node's digest of it back.
        let script = format!(
            r#"socket(S, 2, 1, 6) or die; connect(S, pack("SnC4x8", 2, 9, 203, 0, 113, 9)) or die $!;
            open(F, "seq 1 {LINES} |"); while (sysread(F, my $b, 65536)) {{
                my $o = 0; while ($o < length $b) {{ $o += syswrite(S, $b, length($b) - $o, $o) or die $! }}
            }}
            shutdown(S, 1); while (sysread(S, my $b, 100)) {{ print $b }}"#
        );
        let out = self.run(&["perl", "-e", &script]).await;
        let wanted = format!("{:x?}", Sha256::digest(numbers()));
        assert_eq!(out.stdout, wanted, "{}", out.stderr);
        let out = self.run(&["bash", "-c", "sha256sum < /dev/tcp/2001:db8::9/19"]).await;
        let hex: String =
            Sha256::digest(numbers()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(out.stdout, format!("{hex}  -\n"), "{out:?}");
    }

    async fn check_many(&self) {
        let count = 200.min(towline_proto::mux::GUEST_OPENED_MAX - 8);
        let script = format!(
            "for i in $(seq {count}); do exec {{fd}}<>/dev/tcp/203.0.113.9/7 || exit 1; all+=($fd); done
             for fd in ${{all[@]}}; do echo $fd >&$fd; done
             for fd in ${{all[@]}}; do read -t 60 line <&$fd; [ $line = $fd ] || exit 1; done; echo all"
        );
        let out = self.run(&["bash", "-c", &script]).await;
        assert_eq!(out.stdout, "all\n", "{out:?}");
    }
}

/// Plays the node from now on.
fn serve(guest: &mut Guest) -> Notes {
    let (_, none, _) = MuxDriver::host(tokio::io::duplex(1).0, &[], [0; 16]);
    let mut incoming: Incoming = std::mem::replace(&mut guest.link.incoming, none);
    let notes = Notes::default();
    let noted = Arc::clone(&notes);
    tokio::spawn(async move {
        while let Some((send, receive)) = incoming.next().await {
            tokio::spawn(serve_stream(Arc::clone(&noted), send, receive));
        }
    });
    notes
}

async fn serve_stream(notes: Notes, send: MuxSend, receive: MuxRecv) {
    let (mut reader, mut writer) = (FrameReader::new(receive), FrameWriter::new(send));
    let open: StreamOpen = reader.next().await.unwrap().unwrap().decode().unwrap();
    match open.kind.unwrap() {
        Kind::Lookup(open) => {
            let response_code = if open.name == "web.test" { 0 } else { 3 };
            let answer = LookupAnswer { response_code, has_ipv4: true, ..LookupAnswer::default() };
            writer.send_message(FrameKind::LookupAnswer, &answer).await.unwrap();
            writer.finish().await.unwrap();
        }
        Kind::Egress(open) => serve_egress(notes, open, reader, writer).await,
        other => panic!("a guest opened {other:?}"),
    }
}

async fn serve_egress(
    notes: Notes,
    open: EgressOpen,
    mut reader: FrameReader<MuxRecv>,
    mut writer: FrameWriter<MuxSend>,
) {
    notes.lock().unwrap().push(open.clone());
    let code = match open.port {
        1 => StreamErrorCode::Blocked,
        2 => StreamErrorCode::ConnectionRefused,
        3 => StreamErrorCode::Unreachable,
        _ => StreamErrorCode::Unspecified,
    };
    if code != StreamErrorCode::Unspecified {
        let error = StreamError { code: code.into(), message: String::new() };
        writer.send_message(FrameKind::Error, &error).await.unwrap();
        return writer.finish().await.unwrap();
    }
    writer.send_message(FrameKind::EgressOpened, &EgressOpened {}).await.unwrap();
    if open.protocol() == EgressProtocol::Udp {
        while let Ok(Some(frame)) = reader.next().await {
            assert!(frame.is(FrameKind::EgressDatagram));
            writer.send(&frame).await.unwrap();
        }
        return;
    }
    let (mut receive, mut send) = (reader.into_parts().0, writer.into_inner());
    match open.port {
        7 => drop(tokio::io::copy(&mut receive, &mut send).await),
        9 => {
            let (mut digest, mut buffer) = (Sha256::new(), vec![0; 64 << 10]);
            loop {
                let len = receive.read(&mut buffer).await.unwrap();
                if len == 0 {
                    break;
                }
                digest.update(&buffer[..len]);
            }
            send.write_all(format!("{:x?}", digest.finalize()).as_bytes()).await.unwrap();
        }
        19 => send.write_all(&numbers()).await.unwrap(),
        other => panic!("no such port: {other}"),
    }
    let _ = send.shutdown().await;
}

/// What `seq 1 LINES` writes.
fn numbers() -> Vec<u8> {
    (1..=LINES).flat_map(|number| format!("{number}\n").into_bytes()).collect()
}
