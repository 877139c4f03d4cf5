//! Answers a guest's FUSE requests from a manifest and the machine's files.
//!
//! A request is any bytes: the guest is hostile. Node ids are indexes into the manifest, so
//! nothing that the manifest does not have can be named, and the server keeps no state that a
//! restart could lose. Only [`Files`] touches the machine, and only to read what the manifest has.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::files::{Files, ReadError};
use super::fuse::{self, Answer, Attributes, ReadIn, Request, op};
use super::manifest::{Entry, Kind, Manifest};

/// How long the guest's kernel may keep what it was told: an image does not change.
const VALID_S: u64 = 86_400;

/// Largest READ that is answered; the guest agent negotiates no more.
pub const READ_MAX: usize = 1 << 20;

/// Messages kept until somebody takes them; more changed files than these are one story.
const MESSAGES_MAX: usize = 64;

/// Serves one local image to one guest. Requests may be handled by several threads at once.
#[derive(Debug)]
pub struct Server {
    manifest: Arc<Manifest>,
    files: Files,
    messages: Mutex<Messages>,
}

#[derive(Debug, Default)]
struct Messages {
    told: BTreeSet<u32>,
    waiting: VecDeque<String>,
}

impl Server {
    /// Makes a server for a manifest of the machine under `root` (a folder's descriptor).
    pub fn new(manifest: Arc<Manifest>, root: OwnedFd) -> Server {
        Server { manifest, files: Files::new(root), messages: Mutex::default() }
    }

    /// Returns the image that is served.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Answers one FUSE request with the bytes to write to the guest's /dev/fuse; `None` where the
    /// protocol has no answer (FORGET), or there is nothing to answer to.
    pub fn handle(&self, request: &[u8]) -> Option<Vec<u8>> {
        let request = Request::parse(request)?;
        if matches!(request.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            return None;
        }
        let answer = self.answer(&request);
        Some(answer.unwrap_or_else(|error| Answer::error(request.unique, error)))
    }

    /// Takes the messages for the user that have come up since the last call.
    pub fn take_messages(&self) -> Vec<String> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.waiting.drain(..).collect()
    }

    fn answer(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        match request.opcode {
            op::LOOKUP => self.lookup(request),
            op::GETATTR => {
                let (index, entry) = self.node(request.node)?;
                let mut answer = Answer::new(request.unique, 104);
                answer.attr(&self.attributes(index, &entry), VALID_S);
                Ok(answer.finish())
            }
            op::READLINK => self.read_link(request),
            op::READ => self.read(request),
            op::READDIR => self.read_folder(request, false),
            op::READDIRPLUS => self.read_folder(request, true),
            op::STATFS => {
                let mut answer = Answer::new(request.unique, 80);
                answer.statfs(u64::from(self.manifest.count()));
                Ok(answer.finish())
            }
            opcode if op::WRITES.contains(&opcode) => Err(Errno::ROFS),
            _ => Err(Errno::NOSYS),
        }
    }

    fn node(&self, node: u64) -> Result<(u32, Entry), Errno> {
        let index = node.checked_sub(1).and_then(|index| u32::try_from(index).ok());
        let index = index.ok_or(Errno::NOENT)?;
        Ok((index, self.manifest.entry(index).ok_or(Errno::NOENT)?))
    }

    fn folder(&self, node: u64) -> Result<(u32, Entry), Errno> {
        let (index, entry) = self.node(node)?;
        if entry.kind == Kind::Folder { Ok((index, entry)) } else { Err(Errno::NOTDIR) }
    }

    fn lookup(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let (_, folder) = self.folder(request.node)?;
        let name = request.body.strip_suffix(&[0]).ok_or(Errno::INVAL)?;
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        let mut answer = Answer::new(request.unique, 128);
        let child = self.manifest.child(&folder, name);
        let child = child.and_then(|index| Some((index, self.manifest.entry(index)?)));
        let attributes = child.map(|(index, entry)| self.attributes(index, &entry));
        answer.entry(attributes.as_ref(), VALID_S);
        Ok(answer.finish())
    }

    fn read_link(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let (_, entry) = self.node(request.node)?;
        if entry.kind != Kind::Symlink {
            return Err(Errno::INVAL);
        }
        let target = self.manifest.target(&entry);
        let mut answer = Answer::new(request.unique, target.len());
        answer.bytes(target);
        Ok(answer.finish())
    }

    fn read(&self, request: &Request<'_>) -> Result<Vec<u8>, Errno> {
        let (index, entry) = self.node(request.node)?;
        match entry.kind {
            Kind::Folder => return Err(Errno::ISDIR),
            Kind::Symlink => return Err(Errno::INVAL),
            Kind::File => {}
        }
        let asked = ReadIn::parse(request.body).ok_or(Errno::INVAL)?;
        // A shorter answer would mean the end of the file to the kernel.
        let size = usize::try_from(asked.size).ok().filter(|size| *size <= READ_MAX);
        let size = size.ok_or(Errno::INVAL)?;
        let left = entry.identity.size.saturating_sub(asked.offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(size);
        let mut answer = Answer::new(request.unique, len);
        if len > 0 {
            let buffer = answer.space(len);
            let read =
                self.files.read(&self.manifest, index, &entry.identity, asked.offset, buffer);
            match read {
                Ok(n) if n == len => {}
                // The size is as it was, so a short read is a file cut off in between.
                Ok(_) | Err(ReadError::Changed) => return Err(self.changed(index)),
                Err(ReadError::Machine(error)) => return Err(self.unreadable(index, error)),
            }
        }
        Ok(answer.finish())
    }

    fn read_folder(&self, request: &Request<'_>, plus: bool) -> Result<Vec<u8>, Errno> {
        let (index, folder) = self.folder(request.node)?;
        let asked = ReadIn::parse(request.body).ok_or(Errno::INVAL)?;
        let size = usize::try_from(asked.size).unwrap_or(usize::MAX).min(READ_MAX);
        let mut answer = Answer::new(request.unique, size.min(64 << 10));
        let mut at = asked.offset;
        loop {
            // Offsets count entries: `.`, `..`, then the children.
            let (name, index, entry) = match at {
                0 => (&b"."[..], index, folder),
                1 => {
                    let parent = self.manifest.entry(folder.parent).ok_or(Errno::IO)?;
                    (&b".."[..], folder.parent, parent)
                }
                _ => {
                    let child = u32::try_from(at - 2).ok().filter(|n| *n < folder.children);
                    let Some(child) = child else { break };
                    let child = folder.first_child + child;
                    let entry = self.manifest.entry(child).ok_or(Errno::IO)?;
                    (self.child_name(child), child, entry)
                }
            };
            if answer.payload_len() + fuse::dirent_len(name, plus) > size {
                break;
            }
            let attributes = self.attributes(index, &entry);
            if plus {
                // The kernel takes no reference to `.` and `..`: node 0.
                answer.entry(Some(&attributes).filter(|_| at > 1), VALID_S);
            }
            at += 1;
            answer.dirent(attributes.node, at, entry.kind, name);
        }
        Ok(answer.finish())
    }

    fn child_name(&self, index: u32) -> &[u8] {
        self.manifest.entry(index).map(|entry| self.manifest.name(&entry)).unwrap_or_default()
    }

    fn attributes(&self, index: u32, entry: &Entry) -> Attributes {
        // Hard links are one node: the guest sees one inode with as many names.
        let node = if entry.kind == Kind::File { entry.canonical } else { index };
        Attributes {
            node: u64::from(node) + 1,
            kind: entry.kind,
            permissions: entry.permissions,
            size: match entry.kind {
                Kind::Folder => 4096,
                Kind::File => entry.identity.size,
                Kind::Symlink => self.manifest.target(entry).len() as u64,
            },
            mtime_ns: entry.identity.mtime_ns,
            ctime_ns: entry.identity.ctime_ns,
            links: if entry.kind == Kind::Folder { 2 } else { entry.names },
            uid: entry.uid,
            gid: entry.gid,
        }
    }

    fn changed(&self, index: u32) -> Errno {
        self.tell(index, |path| {
            format!(
                "{path} changed on the laptop since the sandbox started: run again with --new \
                 to use the new one"
            )
        });
        Errno::STALE
    }

    fn unreadable(&self, index: u32, error: Errno) -> Errno {
        self.tell(index, |path| format!("{path} could not be read on the laptop: {error}"));
        Errno::IO
    }

    /// Says something about a file once.
    fn tell(&self, index: u32, message: impl FnOnce(&str) -> String) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.waiting.len() >= MESSAGES_MAX
            || messages.told.len() >= 16 * MESSAGES_MAX
            || !messages.told.insert(index)
        {
            return;
        }
        let path = String::from_utf8_lossy(&self.manifest.path(index)).into_owned();
        messages.waiting.push_back(message(&format!("/{path}")));
    }
}
