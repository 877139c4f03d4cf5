//! What the helper decides: whether a VMM may be started and under which user, which may be ended,
//! and when all must end. No clock, no process, no descriptor: the server does what is decided, and
//! tells what happened.

use std::collections::BTreeMap;

use crate::protocol::{LEASE_MAX_NS, Name, Spawn};

/// One connection of the node agent's.
pub type Connection = u64;

/// Says why nothing is done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The program is not listed.
    #[error(
        "`{0}` is not among the `programs` of the helper's configuration: list it there, and start the \
         helper anew"
    )]
    Program(String),
    /// One of this name runs.
    #[error("the VM {name} runs already, as process {pid}")]
    Running {
        /// Which.
        name: Name,
        /// Its process.
        pid: i32,
    },
    /// There is none of this name.
    #[error("no VM {0} runs")]
    Unknown(Name),
    /// No user id is left.
    #[error(
        "all {0} user ids of VMMs are in use: raise `uids_count` in the helper's configuration"
    )]
    Users(u32),
    /// The deadline is in the past, or too far ahead.
    #[error("a deadline lies at most {} s ahead", LEASE_MAX_NS / 1_000_000_000)]
    Lease,
    /// The lease has ended, and with it all VMMs.
    #[error("the node's lease has ended: renew it first")]
    Expired,
}

/// A VMM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vmm {
    /// Its process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// The connection with which it ends.
    pub bound: Option<Connection>,
}

/// All that is known.
#[derive(Debug)]
pub struct Table {
    programs: Vec<String>,
    uids: (u32, u32),
    vmms: BTreeMap<Name, Vmm>,
    lease: Option<u64>,
}

impl Table {
    /// With what an earlier helper has left running, and the deadline that it was told.
    pub fn new(
        programs: Vec<String>,
        uids: (u32, u32),
        running: BTreeMap<Name, Vmm>,
        lease: Option<u64>,
    ) -> Self {
        Self { programs, uids, vmms: running, lease }
    }

    /// Decides on a start; returns the user, which is its alone.
    pub fn admit(&self, spawn: &Spawn, now: u64) -> Result<u32, Refusal> {
        if !self.programs.contains(&spawn.program) {
            return Err(Refusal::Program(spawn.program.chars().take(200).collect()));
        }
        if self.is_expired(now) {
            return Err(Refusal::Expired);
        }
        if let Some(vmm) = self.vmms.get(&spawn.name) {
            return Err(Refusal::Running { name: spawn.name.clone(), pid: vmm.pid });
        }
        let (first, count) = self.uids;
        let in_use = |uid: &u32| self.vmms.values().any(|vmm| vmm.uid == *uid);
        (first..first + count).find(|uid| !in_use(uid)).ok_or(Refusal::Users(count))
    }

    /// One that was admitted runs.
    pub fn started(&mut self, name: Name, vmm: Vmm) {
        self.vmms.insert(name, vmm);
    }

    /// One has ended, and nothing of it is left.
    pub fn ended(&mut self, name: &Name) {
        self.vmms.remove(name);
    }

    /// The one of this name.
    pub fn get(&self, name: &Name) -> Result<Vmm, Refusal> {
        self.vmms.get(name).copied().ok_or_else(|| Refusal::Unknown(name.clone()))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Vmm)> {
        self.vmms.iter()
    }

    /// Those that end with this connection.
    pub fn bound_to(&self, connection: Connection) -> Vec<Name> {
        let bound = self.vmms.iter().filter(|(_, vmm)| vmm.bound == Some(connection));
        bound.map(|(name, _)| name.clone()).collect()
    }

    /// Moves the deadline.
    pub fn renew(&mut self, until: Option<u64>, now: u64) -> Result<(), Refusal> {
        if until.is_some_and(|until| until <= now || until - now > LEASE_MAX_NS) {
            return Err(Refusal::Lease);
        }
        self.lease = until;
        Ok(())
    }

    /// When all must end.
    pub fn lease(&self) -> Option<u64> {
        self.lease
    }

    /// Those that must end now.
    pub fn expired(&self, now: u64) -> Vec<Name> {
        if self.is_expired(now) { self.vmms.keys().cloned().collect() } else { Vec::new() }
    }

    fn is_expired(&self, now: u64) -> bool {
        self.lease.is_some_and(|until| until <= now)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Bounds;

    const COUNT: u32 = 3;

    fn table() -> Table {
        Table::new(vec!["/vmm".into()], (1000, COUNT), BTreeMap::new(), None)
    }

    fn spawn(number: u8) -> Spawn {
        let bounds =
            Bounds { memory_bytes: 1, data_bytes: 1, file_bytes: 1, processes: 16, cpus: 1 };
        Spawn {
            name: Name::of(Path::new(&format!("/{number}"))),
            program: "/vmm".into(),
            args: Vec::new(),
            files: Vec::new(),
            dir: String::new(),
            bounds,
            background: false,
            bound: false,
            inherit: None,
        }
    }

    #[test]
    fn only_what_is_listed_is_started() {
        let other = Spawn { program: "/bin/sh".into(), ..spawn(1) };
        assert_eq!(table().admit(&other, 0), Err(Refusal::Program("/bin/sh".into())));
        assert_eq!(table().admit(&spawn(1), 0), Ok(1000));
    }

    #[test]
    fn after_the_deadline_all_end_and_none_is_started() {
        let mut table = table();
        table.started(spawn(1).name, Vmm { pid: 1, uid: 1000, bound: None });
        table.renew(Some(10), 5).unwrap();
        assert!(table.expired(9).is_empty());
        assert_eq!(table.expired(10), [spawn(1).name]);
        assert_eq!(table.admit(&spawn(2), 10), Err(Refusal::Expired));
        assert_eq!(table.renew(Some(10), 10), Err(Refusal::Lease), "the past is no deadline");
        assert_eq!(table.renew(Some(12 + LEASE_MAX_NS), 11), Err(Refusal::Lease));
        table.renew(Some(20), 11).unwrap();
        assert!(table.expired(11).is_empty() && table.admit(&spawn(2), 11).is_ok());
        table.renew(None, 11).unwrap();
        assert!(table.expired(u64::MAX).is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Spawn(u8, Option<Connection>),
        Ended(u8),
        Closed(Connection),
        Renew(Option<u64>),
        Pass(u64),
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..6_u8, proptest::option::of(0..3_u64)).prop_map(|(n, bound)| Step::Spawn(n, bound)),
            (0..6_u8).prop_map(Step::Ended),
            (0..3_u64).prop_map(Step::Closed),
            proptest::option::of(0..50_u64).prop_map(Step::Renew),
            (0..20_u64).prop_map(Step::Pass),
            Just(Step::Restart),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn no_two_share_a_user_and_none_outlives_what_it_is_bound_to(steps in steps()) {
            let (mut table, mut now, mut pid) = (table(), 0, 1);
            for step in steps {
                match step {
                    Step::Spawn(number, bound) => {
                        let spawn = spawn(number);
                        let is_there = table.get(&spawn.name).is_ok();
                        match table.admit(&spawn, now) {
                            Ok(uid) => {
                                prop_assert!(!is_there && table.expired(now).is_empty());
                                pid += 1;
                                table.started(spawn.name, Vmm { pid, uid, bound });
                            }
                            Err(Refusal::Running { .. }) => prop_assert!(is_there),
                            Err(Refusal::Users(_)) => {
                                prop_assert_eq!(table.iter().count(), COUNT as usize);
                            }
                            Err(Refusal::Expired) => {
                                prop_assert!(table.lease().is_some_and(|until| until <= now));
                            }
                            Err(other) => prop_assert!(false, "{}", other),
                        }
                    }
                    Step::Ended(number) => table.ended(&spawn(number).name),
                    Step::Closed(connection) => {
                        for name in table.bound_to(connection) {
                            table.ended(&name);
                        }
                        prop_assert!(table.iter().all(|(_, vmm)| vmm.bound != Some(connection)));
                    }
                    Step::Renew(ahead) => {
                        let until = ahead.map(|ahead| now + ahead);
                        let before = table.lease();
                        let renewed = table.renew(until, now).is_ok();
                        prop_assert_eq!(table.lease(), if renewed { until } else { before });
                    }
                    Step::Pass(time) => {
                        now += time;
                        for name in table.expired(now) {
                            table.ended(&name);
                        }
                    }
                    // What is kept is in cgroups and in one file.
                    Step::Restart => {
                        let running = table.iter().map(|(name, vmm)| (name.clone(), *vmm)).collect();
                        let lease = table.lease();
                        table = Table::new(vec!["/vmm".into()], (1000, COUNT), running, lease);
                    }
                }
                let uids: BTreeSet<u32> = table.iter().map(|(_, vmm)| vmm.uid).collect();
                prop_assert_eq!(uids.len(), table.iter().count());
                prop_assert!(uids.iter().all(|uid| (1000..1000 + COUNT).contains(uid)));
            }
        }
    }
}
