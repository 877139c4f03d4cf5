//! A disk that loses, tears and reorders what was not synced when its machine crashes.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use towline_control_core::wal::{Disk, DiskError};

use crate::rng::Rng;

/// Sectors are written whole or not at all.
const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct Files {
    durable: BTreeMap<String, Vec<u8>>,
    /// Written and not synced, in order.
    pending: Vec<(String, usize, Vec<u8>)>,
}

/// A handle: the files stay when the process that held them is gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct SimDisk(Rc<RefCell<Files>>);

impl SimDisk {
    /// The machine goes: each sector that was not synced is there or not.
    pub(crate) fn crash(&self, rng: &mut Rng) {
        let mut files = self.0.borrow_mut();
        for (name, offset, bytes) in std::mem::take(&mut files.pending) {
            let Some(file) = files.durable.get_mut(&name) else { continue };
            let fate = rng.range(0, 2);
            let mut at = 0;
            while at < bytes.len() {
                let end = bytes.len().min((offset + at) / SECTOR * SECTOR + SECTOR - offset);
                if fate == 0 || (fate == 1 && rng.percent(50)) {
                    write(file, offset + at, &bytes[at..end]);
                }
                at = end;
            }
        }
    }
}

fn write(file: &mut [u8], offset: usize, bytes: &[u8]) {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl Disk for SimDisk {
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        Ok(self.0.borrow().durable.keys().cloned().collect())
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>, DiskError> {
        let files = self.0.borrow();
        let mut bytes = files.durable.get(name).cloned().ok_or_else(|| DiskError {
            what: "read",
            name: name.to_owned(),
            reason: "no such file".to_owned(),
        })?;
        for (_, offset, new) in files.pending.iter().filter(|(file, ..)| file == name) {
            write(&mut bytes, *offset, new);
        }
        Ok(bytes)
    }

    fn create(&mut self, name: &str, start: &[u8], size: u64) -> Result<(), DiskError> {
        let mut bytes = start.to_vec();
        bytes.resize(usize::try_from(size).unwrap_or(usize::MAX), 0);
        self.0.borrow_mut().durable.insert(name.to_owned(), bytes);
        Ok(())
    }

    fn write_at(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        self.0.borrow_mut().pending.push((name.to_owned(), offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        let mut files = self.0.borrow_mut();
        let (now, later) =
            std::mem::take(&mut files.pending).into_iter().partition(|(file, ..)| file == name);
        files.pending = later;
        for (file, offset, bytes) in Vec::from_iter::<Vec<_>>(now) {
            if let Some(file) = files.durable.get_mut(&file) {
                write(file, offset, &bytes);
            }
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        let mut files = self.0.borrow_mut();
        files.durable.remove(name);
        files.pending.retain(|(file, ..)| file != name);
        Ok(())
    }
}
