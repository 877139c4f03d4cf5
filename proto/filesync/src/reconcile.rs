//! Three trees in, one step per path out.
//!
//! Pure. `decide.rs` rules on single paths; here directories are kept where something in them
//! survives, what would have no place is put aside, and what may not reach the laptop is held.
//! Steps come in path order: parents before what is in them.

mod places;

use std::collections::BTreeMap;

use crate::decide::{Decision, Node, Side, What, decide};
use crate::guard::{self, Held};
use crate::path::TreePath;

/// A tree as decisions see it.
pub type Nodes = BTreeMap<TreePath, Node>;

/// What to do about one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Both sides have the same: it becomes the ancestor.
    Adopt,
    /// Neither side has it: the ancestor goes.
    Forget,
    /// The laptop's version goes to the guest; both get this mode.
    ToGuest(u32),
    /// The guest's version goes to the laptop; both get this mode.
    ToLaptop(u32),
    /// Contents agree; both get this mode.
    Mode(u32),
    /// Remove it from the guest.
    RemoveGuest,
    /// Remove it from the laptop.
    RemoveLaptop,
    /// Both contents must be read; then reconcile again.
    Compare,
    /// The guest's version is kept aside; then the guest gets what the laptop has there, if
    /// anything.
    Conflict,
    /// Nothing moves.
    Held(Held),
}

/// A removal of more than half of at least this many files by the guest is held.
pub const MASS_DELETION_FILES: usize = 100;

/// Plans how both sides come to agree.
pub fn reconcile(
    bases: &Nodes,
    laptop: &Nodes,
    guest: &Nodes,
    git_locked: bool,
) -> BTreeMap<TreePath, Step> {
    let trees = Trees { bases, laptop, guest, git_locked };
    let mut steps: BTreeMap<TreePath, Step> = trees.first_steps();
    hold_mass_deletion(bases, &mut steps);
    places::keep_needed_directories(&trees, &mut steps);
    places::find_places(&trees, &mut steps);
    steps
}

/// The three trees.
struct Trees<'a> {
    bases: &'a Nodes,
    laptop: &'a Nodes,
    guest: &'a Nodes,
    git_locked: bool,
}

impl Trees<'_> {
    fn first_steps(&self) -> BTreeMap<TreePath, Step> {
        let mut steps = BTreeMap::new();
        for path in self.bases.keys().chain(self.laptop.keys()).chain(self.guest.keys()) {
            if !steps.contains_key(path) {
                steps.insert(path.clone(), self.first_step(path));
            }
        }
        steps
    }

    fn first_step(&self, path: &TreePath) -> Step {
        let (base, laptop, guest) =
            (self.bases.get(path), self.laptop.get(path), self.guest.get(path));
        let decision = decide(base, laptop, guest);
        if guard::goes_up_only(path) {
            return self.up_only(path, decision);
        }
        let step = match decision {
            Decision::Settled if laptop.is_some() => Step::Adopt,
            Decision::Settled => Step::Forget,
            Decision::Take(Side::Laptop, mode) => Step::ToGuest(mode),
            Decision::Take(Side::Guest, mode) => Step::ToLaptop(mode),
            Decision::Mode(mode) => Step::Mode(mode),
            Decision::RemoveFrom(Side::Laptop) => Step::RemoveLaptop,
            Decision::RemoveFrom(Side::Guest) => Step::RemoveGuest,
            Decision::Compare => Step::Compare,
            Decision::Conflict => Step::Conflict,
        };
        self.held(path, step).map_or(step, Step::Held)
    }

    /// The laptop's version wins always; the guest's never comes down.
    fn up_only(&self, path: &TreePath, decision: Decision) -> Step {
        let laptop = self.laptop.get(path);
        if self.git_locked {
            return Step::Held(Held::GitLocked);
        }
        match (laptop, decision) {
            (Some(_), Decision::Settled) => Step::Adopt,
            (
                Some(laptop),
                Decision::Take(Side::Laptop, _) | Decision::Conflict | Decision::Compare,
            ) => Step::ToGuest(laptop.mode),
            (Some(laptop), Decision::RemoveFrom(_)) => Step::ToGuest(laptop.mode),
            (None, Decision::RemoveFrom(Side::Guest)) => Step::RemoveGuest,
            (None, Decision::Settled) => Step::Forget,
            (_, Decision::Take(Side::Guest, _) | Decision::Mode(_)) => Step::Held(Held::UpOnly),
            (None, _) => Step::Held(Held::UpOnly),
        }
    }

    /// Whether the guest's part in this step may not reach the laptop.
    fn held(&self, path: &TreePath, step: Step) -> Option<Held> {
        if self.git_locked
            && guard::waits_for_git(path)
            && !matches!(step, Step::Adopt | Step::Forget)
        {
            return Some(Held::GitLocked);
        }
        let laptop_mode = self.laptop.get(path).map(|node| node.mode);
        match step {
            Step::ToLaptop(_) | Step::RemoveLaptop | Step::Conflict => {}
            Step::Mode(mode) if laptop_mode != Some(mode) => {}
            Step::Adopt
            | Step::Forget
            | Step::ToGuest(_)
            | Step::Mode(_)
            | Step::RemoveGuest
            | Step::Compare
            | Step::Held(_) => return None,
        }
        self.guarded(path)
    }

    /// Whether the guest's version of a path is guarded.
    fn guarded(&self, path: &TreePath) -> Option<Held> {
        let guest = self.guest.get(path);
        let by_name = guard::guarded(path, |directory| self.is_git_directory(directory));
        let by_kind = match guest.map(|node| &node.what) {
            Some(What::Symlink(target)) => {
                guard::symlink_held(path, target).or_else(|| self.new_kind_held(path))
            }
            Some(What::File { .. }) => self.new_kind_held(path),
            Some(What::Directory) => None,
            None => guard::dot_git_held(path).filter(|_| !self.is_directory(Side::Laptop, path)),
        };
        by_name.or(by_kind)
    }

    /// A `.git` that is not a directory leads git elsewhere, and a new HEAD makes a directory into
    /// a repository whose config git obeys.
    fn new_kind_held(&self, path: &TreePath) -> Option<Held> {
        let in_git = path.components().any(|name| name == b".git");
        let new_head = !in_git && path.name() == b"HEAD" && !self.laptop.contains_key(path);
        guard::dot_git_held(path).or_else(|| new_head.then_some(Held::Git))
    }

    /// Whether the laptop has a bare repository there.
    fn is_git_directory(&self, directory: &TreePath) -> bool {
        let has =
            |name: &[u8]| directory.join(name).is_ok_and(|path| self.laptop.contains_key(&path));
        has(b"HEAD") && has(b"objects")
    }

    fn node(&self, side: Side, path: &TreePath) -> Option<&Node> {
        match side {
            Side::Laptop => self.laptop.get(path),
            Side::Guest => self.guest.get(path),
        }
    }

    fn is_directory(&self, side: Side, path: &TreePath) -> bool {
        self.node(side, path).is_some_and(|node| node.what == What::Directory)
    }
}

fn hold_mass_deletion(bases: &Nodes, steps: &mut BTreeMap<TreePath, Step>) {
    let is_file =
        |path: &TreePath| bases.get(path).is_some_and(|node| node.what != What::Directory);
    let files = bases.values().filter(|node| node.what != What::Directory).count();
    let removed =
        steps.iter().filter(|(path, step)| **step == Step::RemoveLaptop && is_file(path)).count();
    if files < MASS_DELETION_FILES || removed * 2 <= files {
        return;
    }
    for step in steps.values_mut().filter(|step| **step == Step::RemoveLaptop) {
        *step = Step::Held(Held::MassDeletion);
    }
}

#[cfg(test)]
mod tests;
