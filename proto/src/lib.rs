//! What is said between Towline's processes: schema, ids, checked types, sans-IO frames, limits.
//!
//! Leaves out how it is carried (`towline-link`) and what is decided (the two cores). Nothing here
//! does IO, reads a clock or draws a random number. Versioning: fields are added, never reused; a
//! reader ignores what it does not know, except commands in the replicated log.

mod desired;
pub mod durable;
pub mod frame;
pub mod ids;
pub mod limits;
pub mod mux;
pub mod process;
mod secret;

/// Messages generated from `schema/towline/v1`; `tests/tidy` checks that they are current.
#[allow(missing_docs, missing_debug_implementations, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
#[path = "generated/towline.v1.rs"]
pub mod v1;
