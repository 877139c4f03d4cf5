//! An archive between a stream's frames and code that reads or writes it without `async`: a bounded
//! queue of pieces each way. An archive that is cut is an error, never a short one.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

/// Bytes of one piece.
const PIECE: usize = 256 << 10;
/// Pieces that wait: with the size of one this bounds the memory of a copy.
const QUEUE: usize = 4;

/// Reads an archive whose pieces come through a queue; an empty piece is its end.
#[derive(Debug)]
pub struct ArchiveReader {
    pieces: mpsc::Receiver<Bytes>,
    current: Bytes,
    ended: bool,
}

/// Writes an archive as pieces into a queue; [`ArchiveWriter::finish`] says that it is whole.
#[derive(Debug)]
pub struct ArchiveWriter {
    pieces: mpsc::Sender<Bytes>,
    buffer: BytesMut,
}

/// The two ends of a queue into code that reads.
pub fn archive_reader() -> (mpsc::Sender<Bytes>, ArchiveReader) {
    let (sender, pieces) = mpsc::channel(QUEUE);
    (sender, ArchiveReader { pieces, current: Bytes::new(), ended: false })
}

/// The two ends of a queue out of code that writes.
pub fn archive_writer() -> (ArchiveWriter, mpsc::Receiver<Bytes>) {
    let (pieces, receiver) = mpsc::channel(QUEUE);
    (ArchiveWriter { pieces, buffer: BytesMut::new() }, receiver)
}

impl Read for ArchiveReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(piece) if piece.is_empty() => self.ended = true,
                Some(piece) => self.current = piece,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let len = into.len().min(self.current.len());
        into[..len].copy_from_slice(&self.current.split_to(len));
        Ok(len)
    }
}

impl ArchiveReader {
    /// Reads on to the end: what follows an archive belongs to it.
    pub fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(drop)
    }
}

impl Write for ArchiveWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..len]);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = self.buffer.split().freeze();
        self.pieces.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl ArchiveWriter {
    /// Says that the archive is whole.
    pub fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.pieces.blocking_send(Bytes::new()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_archive_passes_whole_and_a_cut_one_is_an_error() {
        let (mut writer, mut pieces) = archive_writer();
        let (sender, mut reader) = archive_reader();
        let bytes: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let wanted = bytes.clone();
        let writing = tokio::task::spawn_blocking(move || {
            writer.write_all(&bytes).and_then(|()| writer.finish())
        });
        let reading = tokio::task::spawn_blocking(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).map(|_| got)
        });
        while let Some(piece) = pieces.recv().await {
            sender.send(piece).await.unwrap();
        }
        writing.await.unwrap().unwrap();
        assert!(reading.await.unwrap().unwrap() == wanted);

        let (sender, mut reader) = archive_reader();
        sender.send(Bytes::from_static(b"half")).await.unwrap();
        drop(sender);
        let cut = tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()));
        assert_eq!(cut.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
