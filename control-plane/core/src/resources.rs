//! Amounts of CPU, memory and disk, and the one question asked of them: does it fit? The scheduler
//! and the applier ask it here and nowhere else, so they can never disagree.

use towline_proto::v1;

use crate::planted;

/// An amount of each resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpus: u64,
    /// Memory.
    pub memory_mib: u64,
    /// Disk.
    pub disk_mib: u64,
}

impl Resources {
    /// What a sandbox of this shape takes while it may run.
    pub fn of_shape(shape: &v1::Shape) -> Self {
        Self { cpus: u64::from(shape.cpus), memory_mib: shape.memory_mib, disk_mib: shape.disk_mib }
    }

    /// What of it is taken only while the sandbox may run.
    pub fn compute(self) -> Self {
        Self { disk_mib: 0, ..self }
    }

    /// What of it is kept until the sandbox is destroyed.
    pub fn storage(self) -> Self {
        Self { disk_mib: self.disk_mib, ..Self::default() }
    }

    /// Adds, without overflow.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_add(other.cpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }

    /// Subtracts, stopping at nothing.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_sub(other.cpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            disk_mib: self.disk_mib.saturating_sub(other.disk_mib),
        }
    }

    /// The larger of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.max(other.cpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
            disk_mib: self.disk_mib.max(other.disk_mib),
        }
    }

    /// Whether each is at most the other's.
    pub fn within(self, other: Self) -> bool {
        self.cpus <= other.cpus
            && self.memory_mib <= other.memory_mib
            && self.disk_mib <= other.disk_mib
    }
}

impl From<&v1::Capacity> for Resources {
    fn from(capacity: &v1::Capacity) -> Self {
        Self {
            cpus: u64::from(capacity.cpus),
            memory_mib: capacity.memory_mib,
            disk_mib: capacity.disk_mib,
        }
    }
}

impl From<Resources> for v1::Capacity {
    fn from(amount: Resources) -> Self {
        Self {
            cpus: u32::try_from(amount.cpus).unwrap_or(u32::MAX),
            memory_mib: amount.memory_mib,
            disk_mib: amount.disk_mib,
        }
    }
}

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Short {
    /// CPUs.
    Cpus,
    /// Memory.
    Memory,
    /// Disk.
    Disk,
}

/// Says whether `want` fits beside `reserved` below `limits`, and if not, what is short.
pub fn fits(limits: Resources, reserved: Resources, want: Resources) -> Result<(), Short> {
    if planted::fits_skipped() {
        return Ok(());
    }
    let after = reserved.plus(want);
    if want.memory_mib > 0 && after.memory_mib > limits.memory_mib {
        Err(Short::Memory)
    } else if want.cpus > 0 && after.cpus > limits.cpus {
        Err(Short::Cpus)
    } else if want.disk_mib > 0 && after.disk_mib > limits.disk_mib {
        Err(Short::Disk)
    } else {
        Ok(())
    }
}

/// `64 GiB`, `512 MiB`: an amount for people.
pub fn amount(mib: u64) -> String {
    match mib {
        0..1024 => format!("{mib} MiB"),
        _ if mib.is_multiple_of(1024) => format!("{} GiB", mib / 1024),
        _ => format!("{}.{} GiB", mib / 1024, (mib % 1024) * 10 / 1024),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(cpus: u64, memory_mib: u64, disk_mib: u64) -> Resources {
        Resources { cpus, memory_mib, disk_mib }
    }

    #[test]
    fn what_is_short_is_named() {
        let limits = r(4, 1000, 1000);
        assert_eq!(fits(limits, r(2, 500, 500), r(2, 500, 500)), Ok(()));
        assert_eq!(fits(limits, r(2, 500, 500), r(2, 501, 500)), Err(Short::Memory));
        assert_eq!(fits(limits, r(3, 0, 0), r(2, 0, 0)), Err(Short::Cpus));
        assert_eq!(fits(limits, r(0, 0, 999), r(0, 0, 2)), Err(Short::Disk));
        assert_eq!(fits(limits, r(0, u64::MAX, 0), r(0, u64::MAX, 0)), Err(Short::Memory));
    }

    #[test]
    fn an_overfull_resource_refuses_only_those_who_want_it() {
        assert_eq!(fits(r(4, 10, 10), r(9, 0, 0), r(0, 5, 5)), Ok(()));
    }

    #[test]
    fn amounts_read_well() {
        assert_eq!(amount(512), "512 MiB");
        assert_eq!(amount(65536), "64 GiB");
        assert_eq!(amount(18 * 1024 + 512), "18.5 GiB");
    }
}
