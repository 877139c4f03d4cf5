//! Two-way synchronisation of the project folder, as run by both ends: `tow` and the guest agent.
//!
//! Reading order: [`path`] and [`entry`] (what a tree consists of, checked), [`content`] (identity
//! of a file's bytes), [`decide`] and [`reconcile`] (pure: three trees in, a plan out), [`guard`]
//! and [`classes`] (what does not travel), [`wire`] (frames), [`tree`] (the only part that touches
//! a file system), [`copy`] (archives, `tow cp`'s). Leaves streams, sessions and saved state to the two ends.
//!
//! The invariant: nothing that a sandbox says makes the laptop lose an edit, write outside the
//! folder, or take over a file that could run code there.

pub mod classes;
pub mod content;
pub mod copy;
pub mod decide;
pub mod entry;
pub mod git_index;
pub mod guard;
pub mod path;
pub mod reconcile;
pub mod tree;
pub mod wire;

pub use content::{BLOCK, ContentHasher, ContentId};
pub use entry::{Entry, Kind, Stamp};
pub use path::TreePath;
