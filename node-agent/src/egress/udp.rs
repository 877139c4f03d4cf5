//! Datagrams between a guest and what was connected for it, until the guest ends the flow, the
//! other end refuses, or nothing came either way for [`IDLE_MAX`].

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};
use towline_proto::frame::{Frame, FrameKind};
use towline_streams::{FrameReader, FrameWriter};

use super::{error_frame, refused_by};

/// Silence after which a flow is forgotten, as NATs do.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Longest payload of a datagram, over IPv4 or IPv6.
pub(super) const DATAGRAM_MAX: usize = 65_527;

/// Says that it is open, then passes datagrams on.
pub(super) async fn relay<R, W>(
    socket: &UdpSocket,
    mut reader: FrameReader<R>,
    mut writer: FrameWriter<W>,
) where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if super::say_opened(&mut writer).await.is_err() {
        return;
    }
    let mut buffer = vec![0; DATAGRAM_MAX];
    let mut deadline = Instant::now() + IDLE_MAX;
    loop {
        let passed = tokio::select! {
            frame = reader.next() => match frame {
                Ok(Some(frame)) if is_datagram(&frame) => socket.send(&frame.body).await.map(drop),
                // The guest has done with it, or does not keep to the protocol.
                Ok(_) | Err(_) => break,
            },
            received = socket.recv(&mut buffer) => match received {
                Ok(len) => {
                    let frame = Frame::raw(FrameKind::EgressDatagram, buffer[..len].to_vec());
                    if writer.send(&frame).await.is_err() {
                        return;
                    }
                    Ok(())
                }
                Err(error) => Err(error),
            },
            () = sleep_until(deadline) => break,
        };
        match passed {
            Ok(()) => deadline = Instant::now() + IDLE_MAX,
            // One datagram too long for the way is lost, as on any way.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
            Err(error) => {
                let _ = writer.send(&error_frame(&refused_by(&error))).await;
                break;
            }
        }
    }
    let _ = writer.finish().await;
}

fn is_datagram(frame: &Frame) -> bool {
    frame.is(FrameKind::EgressDatagram) && frame.body.len() <= DATAGRAM_MAX
}
