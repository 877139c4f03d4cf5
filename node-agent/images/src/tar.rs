//! Reading and writing tar streams: ustar with PAX and GNU long names, and nothing that needs a
//! file system.
//!
//! Our own, because the bytes are a stranger's: every header is bounded before it is kept, numbers
//! are checked, and what we do not know is an error rather than a guess.

use std::io::{self, Read, Write};

use crate::limits;

const BLOCK: usize = 512;

/// What kind of thing a tar entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Regular,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// One entry's header, with everything that extension headers said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Type,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) size: u64,
    pub(crate) device: (u32, u32),
    /// Name and value, as PAX has them under `SCHILY.xattr.`.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why a tar stream could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error(transparent)]
    Input(#[from] io::Error),
    #[error("{0}")]
    Bad(String),
}

fn bad<T>(why: impl Into<String>) -> Result<T, TarError> {
    Err(TarError::Bad(why.into()))
}

/// Reads entries one after the other; between two calls of [`Reader::next`] the entry's data is
/// read from it as from any reader.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    input: R,
    left: u64,
    padding: u64,
    ended: bool,
}

#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(input: R) -> Reader<R> {
        Reader { input, left: 0, padding: 0, ended: false }
    }

    /// Returns the next entry's header, or `None` at the archive's end.
    pub(crate) fn next(&mut self) -> Result<Option<Header>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = 0;
        loop {
            self.skip_data()?;
            let Some(block) = self.header_block()? else {
                if extended > 0 {
                    return bad("an extension header without an entry");
                }
                return Ok(None);
            };
            let size = number(&block[124..136])?;
            let flag = block[156];
            match flag {
                b'x' | b'g' | b'L' | b'K' => {
                    extended += 1;
                    if extended > 16 {
                        return bad("too many extension headers before one entry");
                    }
                    let content = self.extension(size)?;
                    match flag {
                        b'x' => extensions.read_pax(&content)?,
                        b'L' => extensions.path = Some(until_nul(&content).to_vec()),
                        b'K' => extensions.link = Some(until_nul(&content).to_vec()),
                        // Global headers carry comments (git's commit id).
                        _ => {}
                    }
                }
                _ => return self.entry(&block, size, flag, extensions).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        size: u64,
        flag: u8,
        extensions: Extensions,
    ) -> Result<Header, TarError> {
        let short_path = path_of(block);
        let path = extensions.path.unwrap_or(short_path);
        let kind = match flag {
            b'0' | b'7' => Type::Regular,
            0 if path.ends_with(b"/") => Type::Directory,
            0 => Type::Regular,
            b'1' => Type::HardLink,
            b'2' => Type::Symlink,
            b'3' => Type::Character,
            b'4' => Type::Block,
            b'5' => Type::Directory,
            b'6' => Type::Fifo,
            b'S' => return bad(SPARSE),
            other => return bad(format!("unknown entry type {:?}", char::from(other))),
        };
        let size = extensions.size.unwrap_or(size);
        // A hard link may repeat its file's size and has no data in any archive that we know.
        let data = if kind == Type::Regular { size } else { 0 };
        if kind != Type::Regular && kind != Type::HardLink && size != 0 {
            return bad("data in an entry that cannot have any");
        }
        self.left = data;
        self.padding = data.next_multiple_of(BLOCK as u64) - data;
        let device = match kind {
            Type::Character | Type::Block => {
                (number_u32(&block[329..337])?, number_u32(&block[337..345])?)
            }
            _ => (0, 0),
        };
        Ok(Header {
            kind,
            path,
            link: extensions.link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec()),
            mode: number_u32(&block[100..108])? & 0o7777,
            uid: extensions.uid.map_or_else(|| number_u32(&block[108..116]), Ok)?,
            gid: extensions.gid.map_or_else(|| number_u32(&block[116..124]), Ok)?,
            mtime: extensions.mtime.map_or_else(|| time(&block[136..148]), Ok)?,
            size: data,
            device,
            xattrs: extensions.xattrs,
        })
    }

    /// Reads one header block; `None` at the end marker, or where the stream ends between entries.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        let got = read_full(&mut self.input, &mut block)?;
        if got == 0 || block.iter().all(|byte| *byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        if got < BLOCK {
            return bad("it ends within a header");
        }
        let expected = number(&block[148..156])?;
        let sum = |block: &[u8; BLOCK], signed: bool| -> i64 {
            let each = block.iter().enumerate().map(|(at, byte)| match at {
                148..156 => i64::from(b' '),
                _ if signed => i64::from(byte.cast_signed()),
                _ => i64::from(*byte),
            });
            each.sum()
        };
        let fits = |signed| u64::try_from(sum(&block, signed)).is_ok_and(|sum| sum == expected);
        if !fits(false) && !fits(true) {
            return bad("a header's checksum is wrong: not a tar archive, or damaged");
        }
        Ok(Some(block))
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > limits::EXTENSION_MAX {
            return bad(format!("an extension header of {size} bytes"));
        }
        let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
        if read_full(&mut self.input, &mut content)? < content.len() {
            return bad("it ends within an extension header");
        }
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(content)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.input).take(rest), &mut io::sink())?;
        // A last entry's padding may be missing; its data may not.
        if skipped < self.left {
            return bad("it ends within a file");
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// Returns what the archive was read from, at the end of what was read.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.input.read(&mut buffer[..most])?;
        if n == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within a file"));
        }
        self.left -= n as u64;
        Ok(n)
    }
}

const SPARSE: &str = "sparse files of GNU tar are not part of OCI layers: make the layer without \
                      --sparse";

impl Extensions {
    fn read_pax(&mut self, mut content: &[u8]) -> Result<(), TarError> {
        while !content.is_empty() {
            let space = content.iter().take(20).position(|b| *b == b' ');
            let len = space.and_then(|at| std::str::from_utf8(&content[..at]).ok()?.parse().ok());
            let record = len.and_then(|len: usize| content.split_at_checked(len));
            let (Some(space), Some((record, rest))) = (space, record) else {
                return bad("a damaged PAX record");
            };
            let body = record.get(space + 1..).and_then(|body| body.strip_suffix(b"\n"));
            let Some((key, value)) = body.and_then(|body| {
                let at = body.iter().position(|b| *b == b'=')?;
                Some((&body[..at], &body[at + 1..]))
            }) else {
                return bad("a damaged PAX record");
            };
            self.set(key, value)?;
            content = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let text = || std::str::from_utf8(value).map_err(|_| TarError::Bad(BAD_NUMBER.into()));
        let parse = |text: &str| text.parse().map_err(|_| TarError::Bad(BAD_NUMBER.into()));
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(parse(text()?)?),
            b"uid" => self.uid = Some(id(parse(text()?)?)?),
            b"gid" => self.gid = Some(id(parse(text()?)?)?),
            b"mtime" => self.mtime = Some(pax_seconds(text()?)?),
            _ if key.starts_with(b"GNU.sparse.") => return bad(SPARSE),
            _ => {
                let name = key
                    .strip_prefix(b"SCHILY.xattr.")
                    .or_else(|| key.strip_prefix(b"LIBARCHIVE.xattr.").filter(|_| false));
                if let Some(name) = name {
                    if self.xattrs.len() >= limits::XATTRS_MAX
                        || value.len() > limits::XATTR_VALUE_MAX
                        || name.len() > limits::NAME_MAX
                    {
                        return bad("too many or too large extended attributes");
                    }
                    self.xattrs.retain(|(other, _)| other != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

const BAD_NUMBER: &str = "a number that cannot be read";

fn id(value: u64) -> Result<u32, TarError> {
    u32::try_from(value).map_err(|_| TarError::Bad("an owner beyond 32 bits".into()))
}

fn pax_seconds(text: &str) -> Result<i64, TarError> {
    let whole = text.split('.').next().unwrap_or(text);
    let seconds: i64 = whole.parse().map_err(|_| TarError::Bad(BAD_NUMBER.into()))?;
    let fraction = text.len() > whole.len() && !text[whole.len() + 1..].bytes().all(|b| b == b'0');
    // Whole seconds, rounded down also before 1970.
    Ok(if fraction && text.starts_with('-') { seconds.saturating_sub(1) } else { seconds })
}

/// Octal, or GNU's base 256 where the first bit is set.
fn number(field: &[u8]) -> Result<u64, TarError> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let wide = field[1..].iter().try_fold(u64::from(field[0] & 0x3f), |value, byte| {
            value.checked_mul(256).map(|value| value | u64::from(*byte))
        });
        return match wide {
            Some(value) if !negative => Ok(value),
            _ => bad(BAD_NUMBER),
        };
    }
    let text = until_nul(field).trim_ascii();
    text.iter().try_fold(0u64, |value, byte| match byte {
        b'0'..=b'7' => value
            .checked_mul(8)
            .map(|value| value | u64::from(byte - b'0'))
            .ok_or_else(|| TarError::Bad(BAD_NUMBER.into())),
        _ => bad(BAD_NUMBER),
    })
}

fn number_u32(field: &[u8]) -> Result<u32, TarError> {
    u32::try_from(number(field)?).map_err(|_| TarError::Bad(BAD_NUMBER.into()))
}

/// Times before 1970 are written in base 256; they become 1970.
fn time(field: &[u8]) -> Result<i64, TarError> {
    if field[0] & 0xc0 == 0xc0 {
        return Ok(0);
    }
    i64::try_from(number(field)?).map_err(|_| TarError::Bad(BAD_NUMBER.into()))
}

fn path_of(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&block[..100]);
    let prefix = until_nul(&block[345..500]);
    if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
        return [prefix, b"/", name].concat();
    }
    name.to_vec()
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match input.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Writes entries as ustar, with a PAX header before those that do not fit into it.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(output: W) -> Writer<W> {
        Writer { output }
    }

    /// Writes an entry's header.
    pub(crate) fn header(&mut self, header: &Header) -> io::Result<()> {
        let pax = pax_records(header);
        if !pax.is_empty() {
            let block = ustar(b'x', b"pax", b"", 0o644, (0, 0), 0, pax.len() as u64, (0, 0));
            self.output.write_all(&block)?;
            self.output.write_all(&pax)?;
            self.pad(pax.len() as u64)?;
        }
        let flag = match header.kind {
            Type::Regular => b'0',
            Type::HardLink => b'1',
            Type::Symlink => b'2',
            Type::Character => b'3',
            Type::Block => b'4',
            Type::Directory => b'5',
            Type::Fifo => b'6',
        };
        let owner = (header.uid, header.gid);
        self.output.write_all(&ustar(
            flag,
            &header.path,
            &header.link,
            header.mode,
            owner,
            header.mtime,
            header.size,
            header.device,
        ))
    }

    /// Copies an entry's data, exactly as much as its header said.
    pub(crate) fn data(&mut self, size: u64, input: &mut impl Read) -> io::Result<()> {
        let copied = io::copy(&mut input.take(size), &mut self.output)?;
        if copied < size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within a file"));
        }
        self.pad(size)
    }

    /// Writes a piece of an entry's data; all of them together are as long as its header said.
    pub(crate) fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes)
    }

    /// What is written to.
    pub(crate) fn output(&self) -> &W {
        &self.output
    }

    /// Writes the end marker and returns what was written to.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()?;
        Ok(self.output)
    }

    /// Ends an entry's data of this size.
    pub(crate) fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        self.output.write_all(&[0; BLOCK][..usize::try_from(padding).unwrap_or(0)])
    }
}

const OCTAL_7: u32 = 0o777_7777;
const OCTAL_11: u64 = 0o777_7777_7777;

fn pax_records(header: &Header) -> Vec<u8> {
    let mut out = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| {
        // The length counts its own digits.
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        out.extend(len.to_string().as_bytes());
        out.push(b' ');
        out.extend(key);
        out.push(b'=');
        out.extend(value);
        out.push(b'\n');
    };
    if header.path.len() > 100 {
        record(b"path", &header.path);
    }
    if header.link.len() > 100 {
        record(b"linkpath", &header.link);
    }
    if header.size > OCTAL_11 {
        record(b"size", header.size.to_string().as_bytes());
    }
    if header.uid > OCTAL_7 {
        record(b"uid", header.uid.to_string().as_bytes());
    }
    if header.gid > OCTAL_7 {
        record(b"gid", header.gid.to_string().as_bytes());
    }
    if !u64::try_from(header.mtime).is_ok_and(|mtime| mtime <= OCTAL_11) {
        record(b"mtime", header.mtime.to_string().as_bytes());
    }
    for (name, value) in &header.xattrs {
        record(&[b"SCHILY.xattr.", &name[..]].concat(), value);
    }
    out
}

#[expect(clippy::too_many_arguments, reason = "the fields of one header block")]
fn ustar(
    flag: u8,
    path: &[u8],
    link: &[u8],
    mode: u32,
    (uid, gid): (u32, u32),
    mtime: i64,
    size: u64,
    (major, minor): (u32, u32),
) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8], most: usize| {
        let len = bytes.len().min(most);
        block[at..at + len].copy_from_slice(&bytes[..len]);
    };
    let octal7 = |value: u32| format!("{:07o}", value.min(OCTAL_7));
    let octal11 = |value: u64| format!("{:011o}", value.min(OCTAL_11));
    put(0, path, 100);
    put(100, octal7(mode).as_bytes(), 7);
    put(108, octal7(uid).as_bytes(), 7);
    put(116, octal7(gid).as_bytes(), 7);
    put(124, octal11(size).as_bytes(), 11);
    put(136, octal11(u64::try_from(mtime).unwrap_or(0)).as_bytes(), 11);
    put(148, b"        ", 8);
    put(156, &[flag], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    put(329, octal7(major).as_bytes(), 7);
    put(337, octal7(minor).as_bytes(), 7);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Type, path: &[u8], size: u64) -> Header {
        Header {
            kind,
            path: path.to_vec(),
            link: Vec::new(),
            mode: 0o4755,
            uid: 3_000_000_000,
            gid: 5,
            mtime: 1_700_000_000,
            size,
            device: (0, 0),
            xattrs: vec![(b"security.capability".to_vec(), vec![0, 10, b'=', 0xff])],
        }
    }

    #[test]
    fn reads_back_what_it_writes() {
        let long = [b"d/".repeat(120), vec![0xff, b'\n', b'x']].concat();
        let file = header(Type::Regular, &long, 700);
        let folder = header(Type::Directory, b"d", 0);
        let old = Header { mtime: -315_619_200, ..header(Type::Fifo, b"old", 0) };
        let late = Header { mtime: 1 << 40, ..header(Type::Fifo, b"late", 0) };
        let mut writer = Writer::new(Vec::new());
        for empty in [&folder, &old, &late] {
            writer.header(empty).unwrap();
        }
        writer.header(&file).unwrap();
        writer.data(700, &mut &[7u8; 700][..]).unwrap();
        let bytes = writer.finish().unwrap();

        let mut reader = Reader::new(&bytes[..]);
        for written in [folder, old, late, file] {
            assert_eq!(reader.next().unwrap().unwrap(), written);
        }
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, [7; 700]);
        assert!(reader.next().unwrap().is_none());
    }

    #[test]
    fn damage_is_an_error_and_never_a_guess() {
        let mut writer = Writer::new(Vec::new());
        writer.header(&header(Type::Regular, b"a", 600)).unwrap();
        writer.data(600, &mut &[7u8; 600][..]).unwrap();
        let whole = writer.finish().unwrap();
        let read = |bytes: &[u8]| -> Result<usize, TarError> {
            let mut reader = Reader::new(bytes);
            let mut entries = 0;
            while reader.next()?.is_some() {
                entries += 1;
            }
            Ok(entries)
        };
        assert_eq!(read(&whole).unwrap(), 1);
        for cut in [100, 513, 1100, 1536, 1900, 2100] {
            assert!(read(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for flip in [0, 130, 150, 1024] {
            let mut damaged = whole.clone();
            damaged[flip] ^= 1;
            assert!(read(&damaged).is_err(), "flipped at {flip}");
        }
    }
}
