//! Bugs that the simulator plants to prove that its checkers catch them. Without the feature
//! `planted-bugs`, which only the simulator turns on, every question here is the constant `false`.

#[cfg(feature = "planted-bugs")]
mod switches {
    use std::cell::Cell;

    thread_local! {
        static FITS_SKIPPED: Cell<bool> = const { Cell::new(false) };
        static DEDUP_SKIPPED: Cell<bool> = const { Cell::new(false) };
        static EXPIRY_SKIPPED: Cell<bool> = const { Cell::new(false) };
        static RESIZE_UNGUARDED: Cell<bool> = const { Cell::new(false) };
    }

    /// Plants or removes: `fits()` says yes to everything.
    pub fn plant_fits_skipped(on: bool) {
        FITS_SKIPPED.set(on);
    }

    /// Plants or removes: a repeated idempotency key is done again.
    pub fn plant_dedup_skipped(on: bool) {
        DEDUP_SKIPPED.set(on);
    }

    /// Plants or removes: no timeout ever stops a sandbox.
    pub fn plant_expiry_skipped(on: bool) {
        EXPIRY_SKIPPED.set(on);
    }

    /// Plants or removes: a sandbox is resized whatever it does.
    pub fn plant_resize_unguarded(on: bool) {
        RESIZE_UNGUARDED.set(on);
    }

    pub(crate) fn resize_unguarded() -> bool {
        RESIZE_UNGUARDED.get()
    }

    pub(crate) fn expiry_skipped() -> bool {
        EXPIRY_SKIPPED.get()
    }

    pub(crate) fn fits_skipped() -> bool {
        FITS_SKIPPED.get()
    }

    pub(crate) fn dedup_skipped() -> bool {
        DEDUP_SKIPPED.get()
    }
}

#[cfg(not(feature = "planted-bugs"))]
mod switches {
    pub(crate) const fn resize_unguarded() -> bool {
        false
    }

    pub(crate) const fn expiry_skipped() -> bool {
        false
    }

    pub(crate) const fn fits_skipped() -> bool {
        false
    }

    pub(crate) const fn dedup_skipped() -> bool {
        false
    }
}

pub(crate) use switches::{dedup_skipped, expiry_skipped, fits_skipped, resize_unguarded};
#[cfg(feature = "planted-bugs")]
pub use switches::{
    plant_dedup_skipped, plant_expiry_skipped, plant_fits_skipped, plant_resize_unguarded,
};
