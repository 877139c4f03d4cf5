//! The smallest guest that speaks the guest link: PID 1 of a microVM that echoes, sinks and makes
//! bytes, to measure the multiplexer and to test drivers without the guest agent.
//!
//! The first byte of a stream says what it is for: `e` echo, `s` sink (the count comes back), `m`
//! make as many bytes as the u64 that follows says.

use std::fs::File;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towline_proto::frame::FrameKind;
use towline_proto::limits::GUEST_PROTOCOL;
use towline_proto::mux::PORT_NAME;
use towline_proto::v1::stream_open::Kind;
use towline_proto::v1::{GuestHello, StreamOpen};
use towline_streams::{
    FrameWriter, GuestSession, Marker, MuxDriver, MuxRecv, MuxSend, Port, Priority,
};

/// What the test gives as the secret of the boot.
const SECRET: [u8; 32] = [0x5e; 32];

fn main() -> std::io::Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, place, kind, MountFlags::empty(), None)?;
    }
    for name in std::fs::read_to_string("/modules/order")?.lines() {
        let file = File::open(Path::new("/modules").join(name))?;
        rustix::system::finit_module(&file, c"", 0)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve())
}

async fn serve() -> std::io::Result<()> {
    let device = loop {
        match Port::find(PORT_NAME) {
            Ok(device) => break device,
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
        }
    };
    let (mut sessions, driver) = MuxDriver::guest(Port::open(&device)?, Marker::BOOT);
    let mut configured = false;
    let serve = async move {
        while let Some(GuestSession { handle, mut incoming }) = sessions.next().await {
            // A link that was cut before the hello is one of several: the next may hold.
            let Ok((send, recv)) = handle.open(Priority::Control) else { continue };
            let mut control = FrameWriter::new(send);
            let hello = GuestHello {
                protocol: GUEST_PROTOCOL,
                agent_version: "echo".into(),
                configured,
                ..GuestHello::default()
            };
            let open = StreamOpen { kind: Some(Kind::Control(hello)), ..StreamOpen::default() };
            if control.send_message(FrameKind::Open, &open).await.is_err() {
                continue;
            }
            configured = true;
            sessions.set_marker(Marker::new(SECRET));
            tokio::spawn(async move {
                let _control = (control, recv);
                while let Some((send, recv)) = incoming.next().await {
                    tokio::spawn(stream(send, recv));
                }
            });
        }
        std::io::Result::Ok(())
    };
    tokio::select! {
        result = driver => result,
        result = serve => result,
    }
}

async fn stream(mut send: MuxSend, mut recv: MuxRecv) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    match recv.read_u8().await? {
        b'e' => loop {
            let len = recv.read(&mut buffer).await?;
            if len == 0 {
                break;
            }
            send.write_all(&buffer[..len]).await?;
        },
        b's' => {
            let mut total = 0;
            loop {
                let len = recv.read(&mut buffer).await?;
                if len == 0 {
                    break;
                }
                total += len as u64;
            }
            send.write_u64(total).await?;
        }
        _ => {
            let mut left = recv.read_u64().await?;
            while left > 0 {
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                send.write_all(&buffer[..len]).await?;
                left -= len as u64;
            }
        }
    }
    send.shutdown().await
}
