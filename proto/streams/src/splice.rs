//! Copies bytes both ways between two streams, each way until its own end.
//!
//! A way that ends well passes the end on (half close); a way that fails drops its two halves, which
//! tells both neighbours, and lets the other way run to its end: what was sent before is not lost.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const BUFFER: usize = 64 << 10;

/// Copies `a` to `b` and `b` to `a`; returns the bytes of each way once both have ended, or the
/// first failure.
pub async fn splice<AR, AW, BR, BW>(
    a_read: AR,
    a_write: AW,
    b_read: BR,
    b_write: BW,
) -> io::Result<(u64, u64)>
where
    AR: AsyncRead + Unpin,
    AW: AsyncWrite + Unpin,
    BR: AsyncRead + Unpin,
    BW: AsyncWrite + Unpin,
{
    let (there, back) = tokio::join!(copy(a_read, b_write), copy(b_read, a_write));
    Ok((there?, back?))
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let len = from.read(&mut buffer).await?;
        if len == 0 {
            to.shutdown().await?;
            return Ok(total);
        }
        to.write_all(&buffer[..len]).await?;
        to.flush().await?;
        total += len as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_end_may_finish_while_the_other_goes_on() {
        let (a, a_far) = tokio::io::duplex(64);
        let (b, b_far) = tokio::io::duplex(64);
        let (ar, aw) = tokio::io::split(a_far);
        let (br, bw) = tokio::io::split(b_far);
        let copier = tokio::spawn(splice(ar, aw, br, bw));
        let (mut a_in, mut a_out) = tokio::io::split(a);
        let (mut b_in, mut b_out) = tokio::io::split(b);
        a_out.write_all(b"question").await.unwrap();
        a_out.shutdown().await.unwrap();
        let mut question = String::new();
        b_in.read_to_string(&mut question).await.unwrap();
        b_out.write_all(b"a longer answer").await.unwrap();
        b_out.shutdown().await.unwrap();
        let mut answer = String::new();
        a_in.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "a longer answer"));
        assert_eq!(copier.await.unwrap().unwrap(), (8, 15));
    }
}
