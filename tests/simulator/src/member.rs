//! One member: its core, its log, and the disk that outlives it.

use towline_control_core::wal::Wal;
use towline_control_core::{Config, ControlPlane, Effect, Input, Now, snapshot};
use towline_proto::v1::WalRecord;

use crate::disk::SimDisk;
use crate::world::Bug;

/// Small, so that runs cross many segments.
const SEGMENT_BYTES: u64 = 16 << 10;
/// Few, so that runs take and send many snapshots.
const SNAPSHOT_ENTRIES: u64 = 60;

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) id: u64,
    pub(crate) life: u64,
    pub(crate) core: Option<ControlPlane>,
    pub(crate) disk: SimDisk,
    wal: Option<Wal<SimDisk>>,
    /// Writes are acknowledged in order: not before this time.
    written_at: u64,
    digested: Option<u64>,
    /// Not heard of, and hearing nothing, until then.
    pub(crate) paused_until: u64,
}

/// What a disk will say, and after how long at least.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) input: Input,
    pub(crate) sync: bool,
}

impl Member {
    pub(crate) fn new(id: u64) -> Self {
        Self {
            id,
            life: 0,
            core: None,
            disk: SimDisk::default(),
            wal: None,
            written_at: 0,
            digested: None,
            paused_until: 0,
        }
    }

    pub(crate) fn start(&mut self, seed: u64, members: u64, bug: Bug) -> Result<(), String> {
        let opened = Wal::open_sized(self.disk.clone(), self.id, SEGMENT_BYTES);
        let (wal, mut recovered) =
            opened.map_err(|error| format!("member {} after a crash: {error}", self.id))?;
        if bug == Bug::TailDropped {
            recovered.entries.pop();
            let last = recovered.entries.last().map_or(0, |entry| entry.index);
            let base = recovered.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
            let commit = &mut recovered.hard_state.commit;
            *commit = (*commit).min(last.max(base));
        }
        let config = Config {
            member: self.id,
            voters: (1..=members).collect(),
            cluster_id: "cluster_sim".to_owned(),
            seed: [seed ^ self.id, seed ^ (self.life << 32)],
            snapshot_entries: SNAPSHOT_ENTRIES,
        };
        self.core = Some(ControlPlane::new(config, recovered)?);
        self.wal = Some(wal);
        self.written_at = 0;
        Ok(())
    }

    pub(crate) fn crash(&mut self) {
        self.core = None;
        self.wal = None;
        self.digested = None;
        self.life += 1;
    }

    pub(crate) fn step(&mut self, now: u64, input: Input) -> Vec<Effect> {
        // Members' clocks differ; nothing may depend on their agreement.
        let now = Now { mono_ms: now, unix_ms: 1_800_000_000_000 + now + self.id * 777 };
        self.core.as_mut().map_or_else(Vec::new, |core| core.step(now, input))
    }

    /// Puts a write of the core on disk; gives what the disk will say when it is done.
    pub(crate) fn write(&mut self, effect: Effect) -> Result<Option<Writing>, String> {
        let Some(wal) = &mut self.wal else { return Ok(None) };
        let fail = |error: towline_control_core::wal::WalError| error.to_string();
        let writing = match effect {
            Effect::Persist { number, entries, hard_state, sync } => {
                if sync {
                    wal.append(&WalRecord { entries, hard_state, restored: 0 }).map_err(fail)?;
                }
                Writing { input: Input::Persisted(number), sync }
            }
            Effect::InstallSnapshot { number, snapshot, hard_state, entries } => {
                let record = WalRecord { entries, hard_state: Some(hard_state), restored: 0 };
                wal.install(&snapshot, record).map_err(fail)?;
                Writing { input: Input::Persisted(number), sync: false }
            }
            Effect::SaveSnapshot(snapshot) => {
                wal.sync().map_err(fail)?;
                wal.save_snapshot(&snapshot).map_err(fail)?;
                Writing { input: Input::SnapshotSaved(snapshot.index), sync: false }
            }
            Effect::Compact(through) => {
                wal.compact(through).map_err(fail)?;
                return Ok(None);
            }
            _ => return Ok(None),
        };
        Ok(Some(writing))
    }

    /// When a write that takes so long is done: writes end in order.
    pub(crate) fn written_at(&mut self, time: u64) -> u64 {
        self.written_at = self.written_at.max(time);
        self.written_at
    }

    pub(crate) fn sync(&mut self) -> Result<(), String> {
        self.wal.as_mut().map_or(Ok(()), |wal| wal.sync().map_err(|error| error.to_string()))
    }

    /// Index of what is applied and a hash of the state, if something was applied since.
    pub(crate) fn new_digest(&mut self) -> Option<(u64, u64)> {
        let core = self.core.as_ref()?;
        let index = core.applied_index();
        if self.digested.replace(index) == Some(index) {
            return None;
        }
        Some((index, crate::world::hash(&snapshot::encode(core.state()))))
    }
}
