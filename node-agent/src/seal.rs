//! Seals of files that were saved, so that what is restored is what was saved: authenticated with a key
//! of the node, and void as soon as any of the files was written, swapped or cut short.
//!
//! Content is not read again, it may be gigabytes: with every write a file's change time moves, and it
//! cannot be set back but by root.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use prost::Message;
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

const KEY_BYTES: usize = 32;
/// How deep folders may be; a VMM's have none within.
const DEPTH_MAX: u32 = 4;

/// The node's key.
#[derive(Debug, Clone)]
pub struct Key(hmac::Key);

/// What files were when they were sealed.
#[derive(Clone, PartialEq, Message)]
pub struct Seal {
    #[prost(message, repeated, tag = "1")]
    files: Vec<FileFacts>,
    #[prost(bytes = "vec", tag = "2")]
    mac: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct FileFacts {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    inode: u64,
    #[prost(uint64, tag = "3")]
    bytes: u64,
    #[prost(int64, tag = "4")]
    changed_s: i64,
    #[prost(int64, tag = "5")]
    changed_ns: i64,
}

impl Key {
    /// The key in this file, which is made if there is none, for its owner only.
    pub fn open(path: &Path) -> io::Result<Self> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(path)?;
                fs::read(path)?
            }
            read => read?,
        };
        if bytes.len() != KEY_BYTES {
            let problem = format!("the key `{}` is damaged: remove it", path.display());
            return Err(io::Error::other(problem));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// Seals these files and folders of a folder, together with what belongs to them.
    pub fn seal(&self, folder: &Path, names: &[&str], with: &[u8]) -> io::Result<Seal> {
        let files = facts(folder, names)?;
        let mac = hmac::sign(&self.0, &signed(&files, with)).as_ref().to_vec();
        Ok(Seal { files, mac })
    }

    /// Says what is not as it was sealed.
    pub fn check(&self, seal: &Seal, folder: &Path, names: &[&str], with: &[u8]) -> io::Result<()> {
        let changed = |what: &str| Err(io::Error::other(format!("{what} was changed since")));
        if hmac::verify(&self.0, &signed(&seal.files, with), &seal.mac).is_err() {
            return changed("its seal");
        }
        let now = facts(folder, names)?;
        if let Some((file, _)) = now.iter().zip(&seal.files).find(|(now, then)| now != then) {
            return changed(&format!("`{}`", file.name));
        }
        if now.len() == seal.files.len() { Ok(()) } else { changed("its list of files") }
    }
}

/// Makes a key, unless another process does so just now.
fn make(path: &Path) -> io::Result<()> {
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).map_err(|_| io::Error::other("no random numbers"))?;
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(&key)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Err(other) if other.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map(drop).map_err(|error| error.error),
    }
}

fn signed(files: &[FileFacts], with: &[u8]) -> Vec<u8> {
    let listed = Seal { files: files.to_vec(), mac: Vec::new() }.encode_to_vec();
    let mut text = b"towline seal 1\0".to_vec();
    text.extend(u64::try_from(listed.len()).unwrap_or(u64::MAX).to_be_bytes());
    text.extend(listed);
    text.extend(with);
    text
}

fn facts(folder: &Path, names: &[&str]) -> io::Result<Vec<FileFacts>> {
    let mut found = Vec::new();
    for name in names {
        add_facts(folder, (*name).to_owned(), DEPTH_MAX, &mut found)?;
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn add_facts(
    folder: &Path,
    name: String,
    depth: u32,
    found: &mut Vec<FileFacts>,
) -> io::Result<()> {
    let path = folder.join(&name);
    let meta = fs::symlink_metadata(&path)?;
    if meta.is_dir() && depth > 0 {
        for entry in fs::read_dir(&path)? {
            let below = format!("{name}/{}", entry?.file_name().to_string_lossy());
            add_facts(folder, below, depth - 1, found)?;
        }
        return Ok(());
    }
    if !meta.is_file() {
        return Err(io::Error::other(format!("`{name}` is no file")));
    }
    found.push(FileFacts {
        name,
        inode: meta.ino(),
        bytes: meta.len(),
        changed_s: meta.ctime(),
        changed_ns: meta.ctime_nsec(),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_was_done_to_the_files_breaks_the_seal() {
        let dir = tempfile::tempdir().unwrap();
        let (key_path, folder) = (dir.path().join("key"), dir.path().join("it"));
        let key = Key::open(&key_path).unwrap();
        assert_eq!(fs::metadata(&key_path).unwrap().mode() & 0o777, 0o600);
        let names = ["saved", "disk"];
        let damage: [fn(&Path); 5] = [
            |it| fs::write(it.join("disk"), "DISK").unwrap(),
            |it| {
                let file = fs::File::options().write(true).open(it.join("saved/a")).unwrap();
                file.set_len(1).unwrap();
            },
            |it| fs::rename(it.join("saved/a"), it.join("saved/b")).unwrap(),
            |it| fs::write(it.join("saved/more"), "").unwrap(),
            |it| {
                // Another file of the same content.
                fs::rename(it.join("disk"), it.join("old")).unwrap();
                fs::copy(it.join("old"), it.join("disk")).unwrap();
            },
        ];
        for (number, damage) in damage.into_iter().enumerate() {
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(folder.join("saved")).unwrap();
            fs::write(folder.join("saved/a"), "memory").unwrap();
            fs::write(folder.join("saved/b"), "state").unwrap();
            fs::write(folder.join("disk"), "disk").unwrap();
            let seal = key.seal(&folder, &names, b"of this").unwrap();
            let again = Key::open(&key_path).unwrap();
            again.check(&seal, &folder, &names, b"of this").unwrap();
            again.check(&seal, &folder, &names, b"of that").unwrap_err();
            let other = Key::open(&dir.path().join("other")).unwrap();
            other.check(&seal, &folder, &names, b"of this").unwrap_err();
            // The clock of change times ticks every few milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
            damage(&folder);
            key.check(&seal, &folder, &names, b"of this").expect_err(&number.to_string());
        }
    }
}
