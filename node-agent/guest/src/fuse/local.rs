//! Which FUSE requests never leave the guest, and their answers: INIT, and what a read-only server
//! without open files has nothing to say to. Pure bytes, in the kernel's native order.

use rustix::io::Errno;

/// `struct fuse_in_header`.
const IN_HEADER: usize = 40;
/// `struct fuse_out_header`.
const OUT_HEADER: usize = 16;

mod op {
    pub(super) const FORGET: u32 = 2;
    pub(super) const OPEN: u32 = 14;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const LISTXATTR: u32 = 23;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const ACCESS: u32 = 34;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const BATCH_FORGET: u32 = 42;
}

mod init {
    pub(super) const MAJOR: u32 = 7;
    /// What the flags below need; the kernel's, if that is older.
    pub(super) const MINOR: u32 = 31;
    pub(super) const READAHEAD: u32 = 1 << 20;
    pub(super) const ASYNC_READ: u32 = 1;
    pub(super) const DO_READDIRPLUS: u32 = 1 << 13;
    pub(super) const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub(super) const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub(super) const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(super) const MAX_PAGES: u32 = 1 << 22;
    pub(super) const CACHE_SYMLINKS: u32 = 1 << 23;
    pub(super) const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub(super) const FLAGS: u32 = ASYNC_READ
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | NO_OPEN_SUPPORT
        | PARALLEL_DIROPS
        | MAX_PAGES
        | CACHE_SYMLINKS
        | NO_OPENDIR_SUPPORT;
    /// Requests that the kernel keeps in flight by itself (read-ahead).
    pub(super) const BACKGROUND: u16 = 64;
    pub(super) const CONGESTION: u16 = 48;
    pub(super) const MAX_WRITE: u32 = 4096;
    /// Pages of one read: 1 MiB, what fits a frame.
    pub(super) const PAGES: u16 = 256;
}

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Local {
    /// Answer so.
    Answer(Vec<u8>),
    /// It wants no answer, and the server no notice.
    Nothing,
    /// The server's; this is its `unique`.
    Forward(u64),
}

/// Decides by the request's header.
pub(super) fn look_at(request: &[u8]) -> Local {
    let (Some(opcode), Some(unique)) = (u32_at(request, 4), u64_at(request, 8)) else {
        return Local::Nothing;
    };
    if request.len() < IN_HEADER {
        return Local::Nothing;
    }
    match opcode {
        op::INIT => Local::Answer(init(unique, &request[IN_HEADER..])),
        // Remembered by the kernel as "not needed", which keeps its page cache.
        op::OPEN
        | op::OPENDIR
        | op::FLUSH
        | op::GETXATTR
        | op::LISTXATTR
        | op::ACCESS
        | op::INTERRUPT => Local::Answer(error(unique, Errno::NOSYS)),
        op::IOCTL => Local::Answer(error(unique, Errno::NOTTY)),
        op::RELEASE | op::RELEASEDIR | op::DESTROY => Local::Answer(out(unique, 0, &[])),
        op::FORGET | op::BATCH_FORGET => Local::Nothing,
        _ => Local::Forward(unique),
    }
}

/// An answer that says only that it failed.
pub(super) fn error(unique: u64, errno: Errno) -> Vec<u8> {
    out(unique, -errno.raw_os_error(), &[])
}

/// The request that a server's answer is for, if the answer is well formed.
pub(super) fn unique_of_answer(answer: &[u8]) -> Option<u64> {
    let (len, error) = (u32_at(answer, 0)?, u32_at(answer, 4)?.cast_signed());
    let whole = usize::try_from(len).is_ok_and(|len| len == answer.len());
    let sane = (-4095..=0).contains(&error) && answer.len() >= OUT_HEADER;
    (whole && sane).then(|| u64_at(answer, 8))?
}

fn init(unique: u64, body: &[u8]) -> Vec<u8> {
    let minor = u32_at(body, 4).unwrap_or(init::MINOR).min(init::MINOR);
    let offered = u32_at(body, 12).unwrap_or(0);
    let mut answer = Vec::with_capacity(64);
    for word in [init::MAJOR, minor, init::READAHEAD, offered & init::FLAGS] {
        answer.extend_from_slice(&word.to_ne_bytes());
    }
    for half in [init::BACKGROUND, init::CONGESTION] {
        answer.extend_from_slice(&half.to_ne_bytes());
    }
    answer.extend_from_slice(&init::MAX_WRITE.to_ne_bytes());
    // Times are kept to the nanosecond.
    answer.extend_from_slice(&1u32.to_ne_bytes());
    answer.extend_from_slice(&init::PAGES.to_ne_bytes());
    answer.resize(64, 0);
    out(unique, 0, &answer)
}

fn out(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let mut answer = Vec::with_capacity(OUT_HEADER + body.len());
    let len = u32::try_from(OUT_HEADER + body.len()).unwrap_or(0);
    answer.extend_from_slice(&len.to_ne_bytes());
    answer.extend_from_slice(&error.to_ne_bytes());
    answer.extend_from_slice(&unique.to_ne_bytes());
    answer.extend_from_slice(body);
    answer
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; IN_HEADER];
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&77u64.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn only_what_the_server_can_answer_leaves_the_guest() {
        assert_eq!(look_at(&request(1, b"name\0")), Local::Forward(77));
        assert_eq!(look_at(&request(op::FORGET, &[])), Local::Nothing);
        assert_eq!(look_at(&[1, 2, 3]), Local::Nothing);
        let Local::Answer(answer) = look_at(&request(op::IOCTL, &[])) else { panic!("answered") };
        assert_eq!(u32_at(&answer, 4).unwrap().cast_signed(), -25);
        assert_eq!(unique_of_answer(&answer), Some(77));
    }

    #[test]
    fn init_takes_no_flag_that_was_not_offered() {
        let mut body = Vec::new();
        for word in [7u32, 36, 0, init::ASYNC_READ | 1 << 30] {
            body.extend_from_slice(&word.to_ne_bytes());
        }
        let Local::Answer(answer) = look_at(&request(op::INIT, &body)) else { panic!("answered") };
        assert_eq!(answer.len(), OUT_HEADER + 64);
        assert_eq!(u32_at(&answer, OUT_HEADER + 4), Some(init::MINOR));
        assert_eq!(u32_at(&answer, OUT_HEADER + 12), Some(init::ASYNC_READ));
    }

    #[test]
    fn malformed_answers_belong_to_nobody() {
        let mut good = error(5, Errno::IO);
        assert_eq!(unique_of_answer(&good), Some(5));
        good[4..8].copy_from_slice(&1i32.to_ne_bytes());
        assert_eq!(unique_of_answer(&good), None);
        assert_eq!(unique_of_answer(&error(5, Errno::IO)[..15]), None);
        let mut long = error(5, Errno::IO);
        long.push(0);
        assert_eq!(unique_of_answer(&long), None);
    }
}
